"""Checkpoints: whole or not used; nothing that dies in between spoils an older one."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempflow.core.ema import Ema
from tempflow.core.scores import Scores
from tempflow.train import checkpoint
from tempflow.train.checkpoint import (
    AVERAGE,
    OPTIMIZER,
    WEIGHTS,
    CheckpointError,
    best_weights,
    damage,
    newest,
    pointed,
    read,
    read_newest,
    read_weights,
    save,
)
from tempflow.train.state import learner_tensors, looks_of
from tempflow.train.weights import Learner, Trainable, WeightSet, WeightSets


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        WEIGHTS: {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)},
        OPTIMIZER: {"a/exp_avg": torch.randn(3, 4, generator=generator), "a/step": torch.tensor(float(seed))},
    }


def write(run: Path, iteration: int, best: bool = False, keep: int = 2, **state: Any) -> Path:
    return save(run, iteration, tensors(iteration), {"seconds": 1.5, **state}, best=best, keep=keep)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 40, note=[1, "two", None])
    saved = read(path)
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*.safetensors")) == [
        "policy/optimizer.safetensors",
        "policy/weights.safetensors",
    ]
    assert saved.state == {"format": checkpoint.FORMAT, "iteration": 40, "seconds": 1.5, "note": [1, "two", None]}
    for name, part in tensors(40).items():
        assert saved.tensors[name].keys() == part.keys()
        assert all(torch.equal(saved.tensors[name][k], v) for k, v in part.items())
    assert newest(tmp_path) == path == read_newest(tmp_path).path
    assert pointed(tmp_path, checkpoint.BEST) is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for iteration in range(6):
        write(tmp_path, iteration, best=iteration in (0, 2), keep=2)
    root = tmp_path / checkpoint.FOLDER
    assert sorted(p.name for p in root.iterdir()) == ["000002", "000004", "000005", "best"]
    best = pointed(tmp_path, checkpoint.BEST)
    assert best is not None and best.name == "000002"


def spoil(file: Path, how: str, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "longer":
        data += b"\0"
    elif how == "swap":
        data = bytearray(len(data))
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flip", "cut", "longer", "swap", "gone"])
def test_every_damage_is_found_and_the_one_before_is_used(how: str, tmp_path: Path) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    rng, tries = random.Random(how), 0
    for file in sorted(p for p in newer.rglob("*") if p.is_file()):
        if file.name == checkpoint.MANIFEST and how == "longer":
            continue  # a NUL behind JSON is an error of its own
        for _ in range(20 if how in ("flip", "cut") else 1):
            kept = file.read_bytes()
            spoil(file, how, rng)
            fault = damage(newer)
            if not (file.name == checkpoint.MANIFEST and same_sums(file, kept)):
                said: list[str] = []
                assert fault is not None, f"{how} in {file.name} went unseen"
                assert newest(tmp_path, said.append) == older
                assert len(said) == 1 and str(newer) in said[0] and "the one before it is used" in said[0]
                with pytest.raises(CheckpointError, match="damaged"):
                    read(newer)
                with pytest.raises(CheckpointError, match="damaged"):
                    read_weights(newer, "policy")
                tries += 1
            file.write_bytes(kept)
    assert tries >= 3 and damage(newer) is None


def same_sums(file: Path, kept: bytes) -> bool:
    """Whether a change of the manifest, in its white space, says the same."""
    try:
        return file.is_file() and json.loads(file.read_text()) == json.loads(kept)
    except ValueError:
        return False


def test_all_damaged_or_none_there(tmp_path: Path) -> None:
    for iteration in (1, 2):
        (write(tmp_path, iteration) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(no such folder\)"):
        newest(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(notes.txt\)"):
        newest(tmp_path / "other")


def test_a_full_disk_leaves_the_older_ones_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1, best=True)
    original = checkpoint.save_file

    def full(part: dict[str, Tensor], file: Path) -> None:
        if file.name.startswith("weights"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(part, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2, best=True)
    assert newest(tmp_path) == older == pointed(tmp_path, checkpoint.BEST)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["000001", "best"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", range(21))
def test_dying_at_any_moment_of_saving_leaves_a_whole_checkpoint(
    point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk is a moment to die at, with no chance to clean up."""
    write(tmp_path, 1, best=True)
    calls = {"left": point}

    def deadly(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("save_file", "_flush", "sha256"):
            patch.setattr(checkpoint, name, deadly(getattr(checkpoint, name)))
        for name in ("write_text", "rename", "replace"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        try:
            write(tmp_path, 2, best=True)
            died = False
        except Killed:
            died = True
    assert died == (point < 19)
    found = newest(tmp_path)
    assert found.name in ("000001", "000002") and damage(found) is None
    assert pointed(tmp_path, checkpoint.BEST) is not None
    assert write(tmp_path, 2, best=True) == newest(tmp_path)
    assert not list((tmp_path / checkpoint.FOLDER).glob(".[0-9]*"))


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    save(tmp_path, 3, tensors(9), {}, best=False, keep=2)
    assert torch.equal(read_weights(newest(tmp_path), "policy")["a"], tensors(9)[WEIGHTS]["a"])


def test_the_best_weights_are_the_average_where_there_is_one(tmp_path: Path) -> None:
    parts = tensors(1)
    path = save(tmp_path, 1, parts | {AVERAGE: {"a": torch.ones(2)}}, {}, best=True, keep=1)
    assert torch.equal(read_weights(path, "best")["a"], torch.ones(2))
    path = save(tmp_path, 2, parts, {}, best=True, keep=1)
    assert torch.equal(read_weights(path, "best")["a"], parts[WEIGHTS]["a"])
    with pytest.raises(ValueError, match=r"weights: 'ema' is not in .*; nearest valid: policy, best"):
        read_weights(path, "ema")


def test_a_pointer_never_leads_out_of_the_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    outside = tmp_path / "outside"
    shutil.copytree(tmp_path / checkpoint.FOLDER / "000001", outside)
    (tmp_path / checkpoint.FOLDER / checkpoint.BEST).write_text("../outside\n")
    assert pointed(tmp_path, checkpoint.BEST) is None


@pytest.mark.parametrize("name", ["../outside/policy/weights.safetensors", "{outside}/policy/weights.safetensors"])
def test_a_manifest_never_leads_out_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    outside = path.rename(tmp_path / "outside")
    path = write(tmp_path, 2)
    file = path / checkpoint.MANIFEST
    sums = json.loads(file.read_text()) | {
        name.format(outside=outside): json.loads((outside / checkpoint.MANIFEST).read_text())[f"{WEIGHTS}.safetensors"]
    }
    file.write_text(json.dumps(sums))
    assert "is missing" in (damage(path) or "")


def test_every_byte_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run is gone on with, where its best weights are taken, and where a checkpoint is written."""
    hashed: list[Path] = []
    original = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path) or original(path))
    for iteration, best in ((1, True), (2, False)):
        hashed.clear()
        path = write(tmp_path, iteration, best=best)
        assert sorted(p.name for p in hashed) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    for work, folder in (
        (lambda: read_newest(tmp_path), path),
        (lambda: best_weights(tmp_path), path.with_name("000001")),
        (lambda: read_weights(path, "policy"), path),
        (lambda: read(path), path),
    ):
        hashed.clear()
        work()
        assert sorted(hashed) == sorted({p for p in folder.rglob("*") if p.is_file()} - {folder / checkpoint.MANIFEST})


def test_best_weights_that_are_damaged_are_said_to_be_and_the_newest_stand_in(tmp_path: Path) -> None:
    best, newer = write(tmp_path, 1, best=True), write(tmp_path, 2)
    said: list[str] = []
    assert torch.equal(best_weights(tmp_path, said.append)["a"], tensors(1)[WEIGHTS]["a"]) and said == []
    (best / checkpoint.STATE).unlink()
    assert torch.equal(best_weights(tmp_path, said.append)["a"], tensors(2)[WEIGHTS]["a"])
    assert said == ["the best checkpoint is damaged or missing: the newest whole one is used"]
    (newer / checkpoint.STATE).unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        best_weights(tmp_path)


def test_what_is_kept_is_no_copy_and_only_the_first_rank_takes_it_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainable = Trainable(torch.nn.Linear(2, 3))
    average = WeightSet(trainable, Ema(0.5))
    optimizer = torch.optim.AdamW(trainable.masters, fused=True)
    for master in trainable.masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    scores = Scores(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), ("reward",))
    looks: Any = SimpleNamespace(before=SimpleNamespace(scores=scores), grid=torch.zeros(1), yardstick=None)
    learner = Learner(trainable, optimizer, WeightSets({"old": average}), average)
    kept = learner_tensors("policy", learner) | {"looks": looks_of(looks)}
    assert kept.keys() == {WEIGHTS, AVERAGE, OPTIMIZER, "policy/set.old", "looks"}
    live = {t.data_ptr() for t in (*trainable.masters, *average.values)}
    live |= {t.data_ptr() for part in optimizer.state.values() for t in part.values()}
    held = {t.data_ptr() for name, part in kept.items() if name != "looks" for t in part.values()}
    assert held == live
    moved: list[int] = []
    original = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda t: moved.append(t.data_ptr()) or original(t))
    (tmp_path / checkpoint.FOLDER / ".000001.new").mkdir(parents=True)
    save(tmp_path, 1, kept, {}, best=False, keep=1, first=False)
    assert moved == []
    save(tmp_path, 1, kept, {}, best=False, keep=1)
    assert sorted(moved) == sorted(t.data_ptr() for part in kept.values() for t in part.values())


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1, format=7)
    with pytest.raises(CheckpointError, match=f"format 7; this version reads {checkpoint.FORMAT}"):
        read(path)
