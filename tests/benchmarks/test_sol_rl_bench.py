"""Sol-RL's benchmark: its figures by hand, and its three parts at a tiny size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import sol_rl as bench
from tempflow.data.prompts import load_prompts
from tempflow.models import load

TINY = ["--pool", "6", "--keep", "4", "--draft-steps", "2", "10"]


def test_a_perfect_draft_agrees_and_prompts_without_spread_are_left_out() -> None:
    full = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    full[1] = 0.5
    seen = bench.agreement(full, full, 24)
    assert all(seen[n] == pytest.approx(1.0) for n in seen if n != "contrast")
    against = bench.agreement(-full, full, 24)
    assert against["τ"] == pytest.approx(-1) and against["ρ"] == pytest.approx(-1) and against["best 4"] == 0
    assert against["contrast"] == pytest.approx(seen["contrast"])  # the ends are the ends
    assert all(map(math.isnan, bench.agreement(full[1:2], full[1:2], 24).values()))


def test_contrast_and_ties_by_hand() -> None:
    full = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0])
    kept = bench.contrast(torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), full, 2)  # the first and the last: 0 and 2
    assert kept == pytest.approx(1 / math.sqrt(0.8))
    assert bench.ties(torch.stack([full, torch.arange(5.0)])) == pytest.approx((4.0, 0.1, 0.3))


def test_every_side_is_what_its_label_says() -> None:
    a = bench.arguments(["--pool", "96", "--draft-steps", "2", "6", "10"])
    sides = bench.sides(a, ["full", "int8"])
    costs = {name: algorithm.plan(0, 0).cost().forwards for name, algorithm in sides.items()}
    assert costs["24 in 24"] == 240 and costs["24 in 96, in full"] == 960
    drafted = {name: side.draft for name, side in sides.items() if side.draft is not None}
    assert {(d.pool, d.steps, d.precision) for d in drafted.values()} == {
        (96, 2, "full"),
        (96, 6, "full"),
        (96, 6, "int8"),
    }


def test_final_runs_have_equal_compute() -> None:
    a = bench.arguments(["--final", "--budget", "100000", "--seeds", "0"])
    plain, naive, drafted = (by_seed[0] for by_seed in bench.finals(a).values())
    pairs = 24 * 6 * (3 + 1)  # the policy with gradient, and old
    for config, each in ((plain, 240), (naive, 960), (drafted, 96 * 4 + 240)):
        spent = config.iterations * a.final_prompts * (each + pairs)
        assert abs(spent - 100_000) <= a.final_prompts * (each + pairs) / 2


@pytest.mark.slow
def test_fidelity_and_time_at_a_tiny_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ENDS", (2, 3))
    monkeypatch.setattr(bench, "SHOWN", 3)
    a = bench.arguments([*TINY, "--image", str(tmp_path / "x.png"), "--repeats", "1"])
    prompts = list(load_prompts("shapes:train"))[:1]
    bench.fidelity(a, load("shapes"), prompts, ["full", "int8"])
    bench.timing(a, prompts, ["full"])
    said = capsys.readouterr().out
    assert "| full (itself) | 10 | 1.000 | 1.000 |" in said and "| int8 | 2 |" in said
    assert "4 in 6, in full" in said and (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.slow
def test_final_at_a_tiny_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--budget", "400", "--seeds", "0", "--final-prompts", "1", "--validation", "6", "--test", "6"]
    words = [*TINY, "--final", "--output", str(tmp_path), "--final-steps", "2", "--side-by-side", "1", *sizes]
    bench.compare(bench.arguments(words))
    said = capsys.readouterr().out
    assert "| 4 in 4 |" in said and "| 4 in 6, drafts of 2 |" in said and "strict score on 6 pictures" in said
