"""Embeddings of prompts: encoded once, bounded in bytes in memory and on disk, shared by processes, never another's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import flux
from families.common import PROMPTS

from tempflow import models
from tempflow.media import Size
from tempflow.models.embeddings import MARK, Embeddings, Row, digest, stacked
from tempflow.models.quiet import quiet
from tempflow.request import asked

SIZE = Size(*flux.SIZES[0])


class Encoder:
    """Counts what it encodes; a row of 100 numbers, 400 bytes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def all_of(self, *keys: str) -> dict[str, Callable[[], Row]]:
        return {key: lambda key=key: self.encode(key) for key in keys}

    def encode(self, key: str) -> Row:
        self.seen.append(key)
        return {"embeds": torch.full((100,), float(len(key))), "mask": torch.tensor([True, False])}


def ask(cache: Embeddings, encoder: Encoder, *keys: str) -> list[Row]:
    return cache.rows(keys, encoder.all_of(*keys))


def test_each_is_encoded_once_and_in_the_order_asked(tmp_path: Path) -> None:
    encoder, cache = Encoder(), Embeddings()
    rows = ask(cache, encoder, "b", "aaa", "b")
    assert encoder.seen == ["b", "aaa"] and [float(row["embeds"][0]) for row in rows] == [1, 3, 1]
    ask(cache, encoder, "aaa", "c")
    assert encoder.seen == ["b", "aaa", "c"]


def test_memory_is_bounded_in_bytes_and_the_unused_go_first() -> None:
    encoder, cache = Encoder(), Embeddings(memory=2 * 402)
    ask(cache, encoder, "a", "b")
    ask(cache, encoder, "a")
    ask(cache, encoder, "c")
    assert len(cache) == 2
    encoder.seen.clear()
    ask(cache, encoder, "a", "c")
    assert encoder.seen == []
    ask(cache, encoder, "b")
    assert encoder.seen == ["b"]


def test_another_process_finds_them_on_disk(tmp_path: Path) -> None:
    encoder = Encoder()
    (made,) = ask(Embeddings(folder=tmp_path / "new" / "cache", content="x"), encoder, "a prompt")
    (again,) = ask(Embeddings(folder=tmp_path / "new" / "cache", content="x"), encoder, "a prompt")
    assert encoder.seen == ["a prompt"]
    assert all(torch.equal(made[n], again[n]) and made[n].dtype == again[n].dtype for n in made)
    ask(Embeddings(folder=tmp_path / "new" / "cache", content="y"), encoder, "a prompt")
    assert encoder.seen == ["a prompt"] * 2  # of other encoders


def test_a_file_that_is_cut_short_is_made_anew(tmp_path: Path) -> None:
    encoder = Encoder()
    ask(Embeddings(folder=tmp_path / "c"), encoder, "a")
    (file,) = (tmp_path / "c").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    (row,) = ask(Embeddings(folder=tmp_path / "c"), encoder, "a")
    assert encoder.seen == ["a", "a"] and float(row["embeds"][0]) == 1
    ask(Embeddings(folder=tmp_path / "c"), encoder, "a")
    assert encoder.seen == ["a", "a"]


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    bad = {"a": lambda: {"embeds": torch.tensor([float("nan")])}}
    Embeddings(folder=tmp_path / "c").rows(["a"], bad)
    assert not list((tmp_path / "c").glob("*/*"))


def test_the_folder_is_bounded_and_the_unused_go_first(tmp_path: Path) -> None:
    encoder, folder = Encoder(), tmp_path / "c"
    cache = Embeddings(folder=folder)
    for age, key in ((300, "a"), (100, "b"), (200, "c")):
        ask(cache, encoder, key)
        file = cache._file(key)
        assert file is not None
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    size = max(f.stat().st_size for f in folder.glob("*/*"))
    ask(Embeddings(folder=folder, memory=0), encoder, "a")  # used just now
    Embeddings(folder=folder, disk=2 * size)
    encoder.seen.clear()
    ask(Embeddings(folder=folder, disk=10 * size), encoder, "a", "b")
    assert encoder.seen == []
    ask(Embeddings(folder=folder, disk=10 * size), encoder, "c")
    assert encoder.seen == ["c"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model.cache: .* holds something else; nearest valid: a new or empty folder"):
        Embeddings(folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_processes_that_write_at_once_leave_whole_files(tmp_path: Path) -> None:
    """Another process and this one, until the other is done."""
    code = """
import sys, torch
from pathlib import Path
from tempflow.models.embeddings import Embeddings

def round(folder):
    keys = [str(i) for i in range(12)]
    cache = Embeddings(folder=folder, memory=0, disk=4000)
    rows = cache.rows(keys, {k: (lambda k=k: {"embeds": torch.full((100,), float(k))}) for k in keys})
    assert [float(r["embeds"][99]) for r in rows] == [float(k) for k in keys]
"""
    here: dict[str, Any] = {}
    exec(code, here)
    loop = "\nprint('ready', flush=True)\nfor _ in range(10):\n    round(Path(sys.argv[1]))\n"
    job = subprocess.Popen([sys.executable, "-c", code + loop, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    rounds = 0
    while job.poll() is None:
        here["round"](tmp_path / "c")
        rounds += 1
    assert job.returncode == 0 and rounds > 0
    left = [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.name != MARK]
    assert left and all(p.suffix == ".safetensors" for p in left)


def test_a_row_that_another_process_deletes_meanwhile_is_made_anew(tmp_path: Path) -> None:
    made = {"a": lambda: {"embeds": torch.ones(3)}}
    Embeddings(folder=tmp_path / "c").rows(["a"], made)
    (file,) = (tmp_path / "c").rglob("*.safetensors")
    kept = tmp_path / "kept"
    kept.hardlink_to(file)
    code = """
import os, sys
while True:
    try:
        os.unlink(sys.argv[1])
    except FileNotFoundError:
        pass
    try:
        os.link(sys.argv[2], sys.argv[1])
    except FileExistsError:
        pass
"""
    other = subprocess.Popen([sys.executable, "-c", code, file, kept])
    try:
        for _ in range(3000):
            (row,) = Embeddings(folder=tmp_path / "c").rows(["a"], made)
            assert row["embeds"].tolist() == [1, 1, 1]
    finally:
        other.kill()
        other.wait()


def test_shorter_rows_end_in_zeros() -> None:
    rows = [{"e": torch.ones(n, 2), "mask": torch.ones(n, dtype=torch.bool)} for n in (1, 3)]
    beside = [{"e": torch.ones(4, 2), "mask": torch.ones(4, dtype=torch.bool)}]
    made = stacked(rows, beside)
    assert made["e"].shape == (2, 4, 2) and made["e"].sum(dim=(1, 2)).tolist() == [2, 6]
    assert made["mask"].dtype == torch.bool and made["mask"].sum(1).tolist() == [1, 3]


# ------------------------------------------------------------------------------------------------------------ a model's
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("embeddings") / "flux"
    with quiet():
        flux.pipeline().save_pretrained(place)
    return place


def test_a_model_keeps_its_prompts_and_may_drop_its_encoders(folder: Path, tmp_path: Path) -> None:
    first: Any = models.load(str(folder))
    plain = first.encode(asked(PROMPTS), SIZE)
    first.keep_embeddings(tmp_path / "cache", 1 << 30, folder)
    first.encode(asked(PROMPTS), SIZE)
    other: Any = models.load(str(folder))
    other.keep_embeddings(tmp_path / "cache", 1 << 30, folder)
    other.drop_encoders()
    assert other.pipe.text_encoder is None and other.nbytes < first.nbytes
    again = other.encode(asked(PROMPTS), SIZE)
    assert all(torch.equal(plain.tensors[n], again.tensors[n]) for n in plain.tensors)
    with pytest.raises(ValueError, match=r"prompt 'a new one' has not been encoded, and the text encoders are dropped"):
        other.encode(asked(["a new one"]), SIZE)


def test_other_encoders_are_told_apart(folder: Path, tmp_path: Path) -> None:
    parts = ("text_encoder", "tokenizer")
    before = digest(folder, parts, ("float32",))
    assert before == digest(folder, parts[::-1], ("float32",)) != digest(folder, parts, ("bfloat16",))
    weights = folder / "text_encoder" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        assert digest(folder, parts, ("float32",)) != before
    finally:
        weights.write_bytes(kept)
    sum_of = tmp_path / ("a" * 64)
    sum_of.write_bytes(b"never read")
    (tmp_path / "hub" / "text_encoder").mkdir(parents=True)
    (tmp_path / "hub" / "text_encoder" / "model.safetensors").symlink_to(sum_of)
    told = digest(tmp_path / "hub", parts, ())
    sum_of.write_bytes(b"its name is its sum")
    assert digest(tmp_path / "hub", parts, ()) == told
