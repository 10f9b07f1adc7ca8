"""Intervals against scipy, tasks against the run's own means, time and differences by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from folder import SCORES, TASKS, make_run
from scipy import stats

from tempflow.report.figures import against, by_task, differences, flat, held_out, moved, paired, wall_time
from tempflow.report.runs import RunData, read_runs


def one(folder: Path) -> RunData:
    return read_runs([folder])[0]


def lines(prompts: Iterable[int]) -> list[dict[str, str]]:
    return [{"prompt": str(n), "kind": ""} for n in prompts]


def test_the_interval_is_scipys() -> None:
    random = np.random.default_rng(3)
    before = random.random(80)
    after = before + random.normal(0.08, 0.2, 80)
    got = paired("x", before.tolist(), after.tolist(), lines(range(80)))
    truth = stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert got.change == pytest.approx((after - before).mean()) and got.count == 80
    assert got.low == pytest.approx(truth.low, abs=0.003) and got.high == pytest.approx(truth.high, abs=0.003)
    # in pairs: as two samples of their own the interval would be far wider
    apart = stats.bootstrap((after, before), lambda a, b: a.mean(-1) - b.mean(-1), method="percentile", rng=random)
    assert got.high - got.low < 0.6 * (apart.confidence_interval.high - apart.confidence_interval.low)


def test_failed_scores_leave_their_pair_out() -> None:
    got = paired("x", [0.0, None, 1.0, 0.5], [1.0, 1.0, None, 1.0], lines(range(4)))
    assert (got.count, got.before, got.after) == (2, 0.25, 1.0)
    nothing = paired("x", [None], [1.0], lines([0]))
    assert nothing.count == 0 and math.isnan(nothing.change) and nothing.low is None and not nothing.sure
    assert paired("x", [0.0], [1.0], lines([0])).low is None
    # many pictures of one prompt, or pictures of nobody knows which prompt: no interval, rather than a narrow one
    assert paired("x", [0.0, 1.0] * 50, [1.0, 1.0] * 50, lines([7] * 100)).low is None
    assert paired("x", [0.0, 1.0], [1.0, 1.0], None).low is None


def test_tasks_are_as_the_run_wrote_them(tmp_path: Path) -> None:
    run = one(make_run(tmp_path / "a", shuffled=True))
    rows = by_task(run, "strict")
    assert [r.label for r in rows] == list(TASKS) and all(r.count == 10 and r.low is not None for r in rows)
    assert run.summary is not None
    for row in rows:
        assert row.after == pytest.approx(run.summary["after"]["by_kind"]["strict"][row.label])
    whole = held_out(run, "strict")
    assert whole is not None and whole.after == pytest.approx(run.summary["after"]["mean"]["strict"])
    assert held_out(run, "unknown") is None


def test_tasks_of_unknown_prompts_get_no_interval(tmp_path: Path) -> None:
    run = one(make_run(tmp_path / "a", prompts=False))
    rows = by_task(run, "strict")
    assert [r.low for r in rows] == [None] * len(TASKS) and all(r.count == 0 for r in rows)
    whole = held_out(run, "strict")
    assert whole is not None and whole.count == 30 and whole.low is None


def test_prompts_that_moved(tmp_path: Path) -> None:
    gained, lost = moved(one(make_run(tmp_path / "a")), "strict", most=3)
    assert len(gained) == 3 and gained[0].after - gained[0].before >= gained[2].after - gained[2].before > 0
    assert lost and all(row.after < row.before for row in lost)
    assert moved(one(make_run(tmp_path / "b", prompts=False)), "strict") == ([], [])


def test_wall_time_adds_up(tmp_path: Path) -> None:
    run = one(make_run(tmp_path / "a", iterations=4))
    phases = wall_time(run)
    assert sum(phases.values()) == pytest.approx(run.timings[-1]["elapsed"])
    assert phases["rollout"] == pytest.approx(4 * 2.0) and phases["other"] == pytest.approx(4 * 0.5)
    assert phases["validation"] == pytest.approx(2 * 1.0) and phases["start"] == pytest.approx(3.0)


def test_differences_between_configurations(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", name="a"), make_run(tmp_path / "b", name="b", seed=7)])
    assert differences(runs) == [("seed", ["0", "7"])]
    assert flat({"a": {"b": [1, 2]}, "r": [{"n": 1}], "z": None}) == {"a.b": "[1, 2]", "r.0.n": "1", "z": "–"}


def test_two_runs_compare_in_pairs_only_on_the_same_pictures(tmp_path: Path) -> None:
    a, b, c = read_runs(
        [
            make_run(tmp_path / "a", name="a"),
            make_run(tmp_path / "b", name="b", seed=1),
            make_run(tmp_path / "c", name="c", noise=9),
        ]
    )
    got = against(a, b, "strict")
    assert got is not None and got.count == len(SCORES) and got.change > 0 and got.low is not None
    assert against(a, c, "strict") is None
