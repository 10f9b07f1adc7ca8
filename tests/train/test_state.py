"""A run that was stopped, killed or interrupted and resumed ends bit for bit as the uninterrupted one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Fake, brightness, config, same
from kinds import bits
from PIL import Image
from torch import Tensor, nn

from tempflow.train import checkpoint, trainer
from tempflow.train.checkpoint import CheckpointError
from tempflow.train.display import Interrupted
from tempflow.train.guards import GuardError
from tempflow.train.records import LINES, Run
from tempflow.train.state import load_optimizer, optimizer_of, optimizer_tensors
from tempflow.train.trainer import train
from tempflow.train.weights import Trainable

Images = list[Image.Image]
OPTIONS: dict[str, Any] = {
    "iterations": 5,
    "optimizer": {"updates_per_iteration": 2, "ema_decay": 0.7, "warmup_iterations": 2},
    "checkpoint": {"every": 2},
    "evaluation": {"every": 2, "yardstick": (1.0, 2.0)},
    "algorithm": {"name": "tempflow_grpo", "steps": 4, "seeds": 2, "branches": 3, "clip": 0.02, "kl": 0.01},
}


class Killed(BaseException):
    """The process is gone: nothing after this runs but what a new process does."""


def go(folder: Path, resume: bool = False, reward: Any = brightness, **changes: Any) -> Run:
    settings = config(folder, **{**OPTIONS, **changes})
    return train(settings, model=Fake(), reward=reward, prompts=PROMPTS, quiet=True, resume=resume)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("whole") / "toy").folder


def assert_equal(a: Path, b: Path) -> None:
    for name in (*LINES, "samples.json", "model/model.safetensors", "before_after.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    ends = [checkpoint.read(checkpoint.newest(folder)) for folder in (a, b)]
    for name, part in ends[0].tensors.items():
        assert all(bits(t) == bits(ends[1].tensors[name][k]) for k, t in part.items()), name
    drop = {"seconds", "config"}
    assert [{k: v for k, v in e.state.items() if k not in drop} for e in ends[:1]] == [
        {k: v for k, v in e.state.items() if k not in drop} for e in ends[1:]
    ]


class Countdown:
    """Calls through, until it is time: then `act`, once."""

    def __init__(self, left: int, act: Any) -> None:
        self.left, self.act = left, act

    def wrap(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.act()
            return original(*args, **kwargs)

        return call


def dies() -> None:
    raise Killed


@pytest.mark.parametrize("left", [1, 2, 9, 20, 31, 44, 57, 73, 90, 104])
def test_killed_at_any_disk_write_and_resumed(
    left: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(left, dies)
    with monkeypatch.context() as patch:
        for name in ("save_file", "_flush", "sha256"):
            patch.setattr(checkpoint, name, countdown.wrap(getattr(checkpoint, name)))
        patch.setattr(trainer.Records, "_append", countdown.wrap(trainer.Records._append))
        with pytest.raises(Killed):
            go(tmp_path / "toy")
    assert_equal(whole, go(tmp_path / "toy", resume=True).folder)


@pytest.mark.parametrize("left", [3, 12, 22, 37])
def test_killed_during_a_forward_and_resumed_twice(
    left: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for resume, after in ((False, left), (True, left + 5)):
        countdown = Countdown(after, dies)
        with monkeypatch.context() as patch:
            patch.setattr(Fake, "decode", countdown.wrap(Fake.decode))
            with contextlib.suppress(Killed):
                go(tmp_path / "toy", resume=resume)
    assert_equal(whole, go(tmp_path / "toy", resume=True).folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("left", [8, 30, 48, 64, 80])
def test_a_signal_keeps_everything_and_the_run_goes_on(
    left: int, number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown = Countdown(left, lambda: os.kill(os.getpid(), number))
    kept = signal.getsignal(number)
    with monkeypatch.context() as patch:
        velocity = type(Fake().network)
        patch.setattr(velocity, "forward", countdown.wrap(velocity.forward))
        with pytest.raises(Interrupted):
            go(tmp_path / "toy")
    assert signal.getsignal(number) is kept
    assert_equal(whole, go(tmp_path / "toy", resume=True).folder)


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    countdown = Countdown(50, lambda: os.kill(os.getpid(), signal.SIGTERM))
    velocity = type(Fake().network)
    monkeypatch.setattr(velocity, "forward", countdown.wrap(velocity.forward))
    with pytest.raises(Interrupted):
        train(config(tmp_path / "toy", **OPTIONS), model=Fake(), reward=brightness, prompts=PROMPTS)
    said = capsys.readouterr().out
    given = "model=…, reward=brightness, prompts=…, resume=True)"  # the command line knows none of these
    assert "to go on: tempflow.train(" in said and given in said and "of 5 iterations" in said


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    countdown = Countdown(14, dies)
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "decode", countdown.wrap(Fake.decode))
        with pytest.raises(Killed):
            go(tmp_path / "toy")
    file = checkpoint.newest(tmp_path / "toy") / "policy" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert_equal(whole, go(tmp_path / "toy", resume=True).folder)


def test_changed_fields_are_named_and_refused_unless_allowed(tmp_path: Path) -> None:
    go(tmp_path / "toy", iterations=2)
    changes = {"iterations": 3, "optimizer": {**OPTIONS["optimizer"], "learning_rate": 0.01}}
    with pytest.raises(ValueError, match=r"iterations: 2 → 3; optimizer.learning_rate: 0.05 → 0.01.*--allow-changes"):
        go(tmp_path / "toy", resume=True, **changes)
    settings = config(tmp_path / "toy", **{**OPTIONS, **changes})
    run = train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=True, allow_changes=True)
    metrics = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 3


def test_a_finished_run_resumed_is_finished_again(whole: Path, tmp_path: Path) -> None:
    first = go(tmp_path / "toy")
    again = go(tmp_path / "toy", resume=True)
    assert again.last_line.split(", ")[2] == first.last_line.split(", ")[2]
    assert_equal(whole, again.folder)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .*no such folder"):
        go(tmp_path / "nowhere", resume=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        go(tmp_path / "other", resume=True)


def test_a_full_disk_stops_the_run_and_keeps_what_was_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file
    calls = {"n": 0}

    def full(part: Any, file: Path) -> None:
        calls["n"] += 1
        if calls["n"] > 9:
            raise OSError(28, "No space left on device")
        original(part, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(GuardError, match=r"could not be written: .*No space left.*resume=True"):
            go(tmp_path / "toy")
    assert_equal(whole, go(tmp_path / "toy", resume=True).folder)


def test_the_start_and_the_reference_may_be_another_run(tmp_path: Path) -> None:
    first = go(tmp_path / "first", iterations=2)
    best = checkpoint.best_weights(first.folder)
    assert any(not t.equal(dict(Fake().network.named_parameters())[n]) for n, t in best.items())
    start = {"start": str(first.folder), "reference": "start"}
    second = go(tmp_path / "second", iterations=1, model=start)
    assert second.before.mean("reward") == pytest.approx(first.after.mean("reward"))
    held_to_base = go(tmp_path / "third", iterations=1, model={"start": str(first.folder)})
    kl = [
        float(line.split('"kl": ')[1].split(",")[0])
        for line in ((r.folder / "metrics.jsonl").read_text() for r in (second, held_to_base))
    ]
    assert kl[1] > kl[0] >= 0


# --------------------------------------------------------------------------------------------------------------- 8 bits
class EightBit(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit keeps: a whole number of steps, bytes, their scale. Its steps are signs."""

    def __init__(self, params, lr, betas, eps, weight_decay) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                assert type(state["step"]) is int
                kept = state.get("state1", torch.zeros(p.shape, dtype=torch.uint8))
                state["state1"] = (kept + (p.grad > 0).to(torch.uint8)).clamp(max=200)
                state["absmax1"] = p.grad.abs().max().reshape(1)
                p.sub_(group["lr"] * p.grad.sign() * state["state1"].float() / state["step"])


@pytest.fixture
def eight_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.optim = types.SimpleNamespace(AdamW8bit=EightBit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)


def test_moments_in_8_bits_go_into_a_checkpoint_and_back(eight_bit: None, tmp_path: Path) -> None:
    asked = config(tmp_path, optimizer={"kind": "adamw_8bit"})
    gradients = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def walked(network: nn.Module, optimizer: torch.optim.Optimizer, some: list[Tensor]) -> None:
        for gradient in some:
            for p in network.parameters():
                p.grad = gradient if p.ndim == 2 else gradient[:, 0]
            optimizer.step()

    whole, cut = (Trainable(Fake().network) for _ in range(2))
    first, second = optimizer_of(asked, whole), optimizer_of(asked, cut)
    walked(whole.network, first, gradients)
    walked(cut.network, second, gradients[:2])
    tensors = {k: v.clone() for k, v in optimizer_tensors(second, cut.names).items()}
    assert {v.dtype for v in tensors.values()} == {torch.uint8, torch.float32, torch.int64}
    again = Trainable(Fake().network)
    again.load(cut.state())
    third = optimizer_of(asked, again)
    load_optimizer(third, again.names, tensors)
    walked(again.network, third, gradients[2:])
    assert same(whole.state(), again.state())


def test_adamws_own_state_is_what_it_was(tmp_path: Path) -> None:
    trainable = Trainable(Fake().network)
    optimizer = optimizer_of(config(tmp_path), trainable)
    assert optimizer_tensors(optimizer, trainable.names) == {}
    for p in trainable.masters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    told = optimizer.state_dict()["state"]
    found = optimizer_tensors(optimizer, trainable.names)
    assert all(torch.equal(found[f"{trainable.names[i]}/{k}"], v) for i, part in told.items() for k, v in part.items())
    assert len(found) == 3 * len(trainable.names)


# -------------------------------------------------------------------------------------------- behind the next iteration
BEHIND = {"checkpoint": {"every": 2, "background": True}}


def test_checkpoints_behind_the_run_hold_what_it_was_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write waits until the run has gone on; what it writes is the state that it was asked to keep."""
    plain = go(tmp_path / "plain").folder
    original = checkpoint.save_file

    def slow(part: Any, file: Path) -> None:
        time.sleep(0.05)
        original(part, file)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    behind = go(tmp_path / "behind", **BEHIND).folder
    kept = sorted(p.name for p in (plain / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == sorted(p.name for p in (behind / "checkpoints").iterdir() if p.name.isdigit())
    for name in kept:
        for file in ("policy/weights", "policy/ema", "policy/optimizer"):
            a, b = (r / "checkpoints" / name / f"{file}.safetensors" for r in (plain, behind))
            assert a.read_bytes() == b.read_bytes()
    assert (plain / "model").is_dir() and (behind / "summary.json").is_file()


@pytest.mark.parametrize("left", [2, 20, 44, 73])
def test_killed_while_writing_behind_the_run_and_resumed(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, countdown = go(tmp_path / "whole", **BEHIND).folder, Countdown(left, dies)
    with monkeypatch.context() as patch:
        for name in ("save_file", "_flush", "sha256"):
            patch.setattr(checkpoint, name, countdown.wrap(getattr(checkpoint, name)))
        with pytest.raises(Killed):
            go(tmp_path / "toy", **BEHIND)
    assert_equal(whole, go(tmp_path / "toy", resume=True, **BEHIND).folder)


def test_a_disk_that_fills_behind_the_run_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(tmp_path / "whole", **BEHIND).folder
    original, calls = checkpoint.save_file, {"n": 0}

    def full(part: Any, file: Path) -> None:
        calls["n"] += 1
        if calls["n"] > 9:
            raise OSError(28, "No space left on device")
        original(part, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(GuardError, match=r"checkpoint of iteration \d could not be written: .*No space left"):
            go(tmp_path / "toy", **BEHIND)
    assert_equal(whole, go(tmp_path / "toy", resume=True, **BEHIND).folder)
