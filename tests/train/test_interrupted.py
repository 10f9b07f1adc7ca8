"""What is registered as an algorithm can be stopped, killed and gone on with, bit for bit, and runs on ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from every import NAMES, dying, from_noises, go, kind, made
from kinds import bits
from test_parallel import close, launch
from test_state import Countdown, assert_equal

from tempflow.train import checkpoint
from tempflow.train.context import Counter
from tempflow.train.display import Interrupted
from tempflow.train.weights import Learner

KINDS = {kind(made(name)): name for name in reversed(NAMES) if from_noises(made(name))}
CASES = [name if name in KINDS.values() else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
"""Of what learns from starting noises, each combination of what there is to be kept; the rest when there is time."""


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the curve and without waiting for the disk, which take longer than the training."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.chdir(tmp_path)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_interrupted_then_killed_it_ends_as_the_unbroken_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes with the second iteration's first step, whoever's that is; the process dies when all roles have
    moved in the next one."""
    whole, broken = go(name, tmp_path / "whole").folder, tmp_path / "broken"
    steps = sum(int(value) for key, value in lines(whole)[0].items() if key.endswith("updates"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop = Countdown(steps + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(Learner, "step", stop.wrap(Learner.step))
        go(name, broken)
    assert 1 <= len(lines(broken)) <= 2
    with dying(1):
        go(name, broken, resume=True)
    assert not (broken / "summary.json").exists()
    assert_equal(whole, go(name, broken, resume=True).folder)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them on two ranks, killed in the second iteration and gone on with: in the same processes."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(2, "ddp", folder, "every", *NAMES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_that_were_killed_and_went_on_end_as_one_process(name: str, ranked: Path, tmp_path: Path) -> None:
    """Weights, moments and sets of all roles, metrics, and the counters, among them the scores' spread."""
    one, two = go(name, tmp_path / "one").folder, ranked / name
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        measured = [key for key in a if "rollout_gap" not in key]  # that one is of rounding itself
        assert [key for key in measured if b[key] != pytest.approx(a[key], rel=1e-5, abs=1e-7)] == []
    ends = [checkpoint.read(checkpoint.newest(folder)) for folder in (one, two)]
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    for part, tensors in ends[0].tensors.items():
        for key, value in tensors.items():
            other = ends[1].tensors[part][key]
            assert bits(other) == bits(value) if part == "looks" else close(other, value, 1e-5), (part, key)
    counters = [end.state["counter"] for end in ends]
    assert counters[1] == pytest.approx(counters[0], rel=1e-6)
    spreads = [Counter(**counter).spread for counter in counters]
    assert spreads[0] == spreads[1] or spreads[1] == pytest.approx(spreads[0], rel=1e-5)
