"""The estimate of a run's time: the count of the work, times what a row of each kind takes."""

from __future__ import annotations

import pytest

from tempflow import measure
from tempflow.cli.parse import configured
from tempflow.cost import run_cost
from tempflow.measure import LOOKING, Measured, Rate, clock

SMALL = ["--iterations", "5", "--evaluation.every", "2", "--evaluation.validation-prompts", "3"]
SMALL += ["--evaluation.test-prompts", "7", "--evaluation.steps", "4", "--data.prompts-per-iteration", "2"]
SMALL += [
    "--algorithm.steps",
    "3",
    "--algorithm.seeds",
    "1",
    "--algorithm.branches",
    "2",
    "--evaluation.yardstick",
    "2",
]
RATES = Measured("cpu", Rate(8, 1.0, 3), Rate(4, 10.0, 3), Rate(8, 100.0, 3), {"a": Rate(8, 1000.0, 3)})


def test_times_are_counts_times_rates():
    cost = run_cost(configured("cost", ["shapes_tempflow", *SMALL]))
    parts = RATES.parts(cost)
    assert parts["rollout"] == cost.total.forwards and parts["training, at most"] == 10 * cost.total.trained_edges
    assert parts["decoding"] == 100 * cost.total.leaves and parts["rewards"] == 1000 * cost.total.leaves
    # validations after 0, 2, 4 and 5 iterations, the test twice, and both once more by guidance, which doubles the rows
    assert (cost.looked_at, cost.looked_rows) == (4 * 3 + 2 * 7 + 3 + 7, 4 * (4 * 3 + 2 * 7) + 2 * 4 * (3 + 7))
    assert parts[LOOKING] == cost.looked_rows + 1100 * cost.looked_at


def test_other_weight_sets_and_guidance_count():
    plain = run_cost(configured("cost", ["shapes_tempflow", *SMALL]))
    guided = run_cost(configured("cost", ["shapes_tempflow", *SMALL, "--algorithm.kl", "1", "--model.guidance", "2"]))
    parts = RATES.parts(guided)
    assert parts["training, at most"] == (10 + 1) * guided.total.trained_edges
    assert parts[LOOKING] == plain.looked_rows / 2 + 1100 * plain.looked_at  # the measured row was of two


def test_rows_double_while_time_allows(monkeypatch):
    now, calls = [0.0], list[int]()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def work(rows: int) -> None:
        calls.append(rows)
        now[0] += 0.01 * rows + (5 if len(calls) == 1 else 0)

    rate = measure._rate(work, 12, 10.0, lambda: None)
    assert calls[:6] == [1, 1, 2, 4, 8, 12] and rate.rows == 12 and rate.seconds == pytest.approx(0.01)
    calls.clear()
    assert measure._rate(work, 64, 0.0, lambda: None) == Rate(1, pytest.approx(0.01), 1) and calls == [1, 1]


def test_the_embedded_model_is_measured():
    config = configured(
        "cost", ["shapes_tempflow", *SMALL, "--threads", "1", "--train-rows", "2", "--rollout-rows", "2"]
    )
    measured = measure.measured(config, seconds=0.0)
    rates = [measured.forward, measured.train, measured.decode, *measured.rewards.values()]
    assert all(rate.rows == 1 and rate.seconds > 0 for rate in rates) and [*measured.rewards] == [
        "shapes",
        "shapes_strict",
    ]
    assert measured.table(run_cost(config)).row_count == 6


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.123, "0.12 s"), (42, "42 s"), (600, "10 min"), (10_800, "3.0 h"), (864_000, "10.0 days")]
)
def test_durations_as_people_say_them(seconds, told):
    assert clock(seconds) == told
