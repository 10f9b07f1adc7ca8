from __future__ import annotations

from typing import Any

from benchmarks.flagship import COMPARED, costs
from benchmarks.leaderboard import Standing, seeds


def run(*scores: float, seconds: float = 100.0) -> dict[str, Any]:
    return {"curve": [[1000 * i, score] for i, score in enumerate(scores)], "seconds": seconds, "stopped": None}


def test_compute_is_to_the_mean_of_the_rivals_last_validations() -> None:
    """Its best on the way does not count; a form that never gets there says so."""
    rival = Standing(COMPARED[2], {}, 1e-4, {0: run(0.4, 0.7, 0.5), 1: run(0.4, 0.4, 0.7)})
    quick, slow = run(0.4, 0.8, 0.9), run(0.4, 0.5, 0.55)
    ((name, form, each, seconds),) = costs(rival, [Standing(COMPARED[0], {}, 2e-4, {1: slow, 0: quick})])
    assert "0.400 → 0.600, 2 seeds" in name and form == "tempflow_grpo at 0.0002"
    assert each == "500 (0.25); never"
    assert seconds == "25"  # a quarter of its compute


def test_a_rival_that_gained_nothing_sets_no_target() -> None:
    rival = Standing(COMPARED[2], {}, 1e-4, {0: run(0.5, 0.6, 0.45)})
    ((_, _, each, seconds),) = costs(rival, [Standing(COMPARED[0], {}, 2e-4, {0: run(0.5, 0.7)})])
    assert (each, seconds) == ("the rival has gained nothing", "–")


def test_every_form_has_three_seeds() -> None:
    assert [seeds(entry) for entry in COMPARED] == [(0, 1, 2)] * 4
