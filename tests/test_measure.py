"""The estimate of a run's time: the count of the work, times what a row of each kind takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import tempflow.cost
from tempflow import measure
from tempflow.cli import main
from tempflow.cli.parse import configured
from tempflow.config import Config, load_config
from tempflow.cost import Memory, RunCost, run_cost
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


# ------------------------------------------------------------------------------------------------------ rows that fit
def out_of_memory_above(room: int, tried: list[int]) -> Callable[[int], None]:
    def step(rows: int) -> None:
        tried.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return step


@pytest.mark.parametrize("room", [0, 1, 2, 3, 31, 32, 33, 77, 96, 1000])
@pytest.mark.parametrize("most", [1, 7, 96])
def test_the_largest_rows_that_fit_are_found(room, most):
    tried = list[int]()

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= room

    found, best = measure.largest(fits, most), min(room, most)
    assert found <= best < found + max(1, found // measure.FINE) + 1 and len(tried) <= 12
    assert all(rows <= most for rows in tried) and (found in tried or found == 0)


def test_rows_are_tried_until_the_device_is_full():
    tried = list[int]()
    assert measure.largest(partial(measure.fits, out_of_memory_above(5, tried), lambda: None), 96) == 5
    assert tried == [1, 2, 4, 8, 6, 5]


def test_only_a_full_memory_counts_as_not_fitting():
    def raises(error: Exception) -> Callable[[int], None]:
        def step(rows: int) -> None:
            raise error

        return step

    full = RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)")
    assert measure.fits(raises(full), lambda: None, 1) is False
    with pytest.raises(RuntimeError, match="shapes"):
        measure.fits(raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), lambda: None, 1)


def test_rows_are_tried_on_the_runs_own_model(monkeypatch):
    config = configured("cost", ["shapes_tempflow", *SMALL, "--threads", "1"])
    own, rooms = {name: getattr(measure.Work, name) for name in ("forward", "train")}, {"forward": 5, "train": 2}

    def limited(name: str) -> Callable[..., None]:
        def step(work: measure.Work, rows: int, **others: bool) -> None:
            out_of_memory_above(rooms[name], [])(rows)
            own[name](work, rows, **others)

        return step

    for name in own:
        monkeypatch.setattr(measure.Work, name, limited(name))
    assert measure._tried(config, run_cost(config), (8, 8)) == [5, 2]


def test_the_rows_that_the_estimate_allows_are_written_into_a_configuration(monkeypatch, tmp_path, capsys):
    def linear(config: Config, cost: RunCost, ranks: int = 1) -> Memory:
        phases = {"sampling": 10 * config.rollout_rows, "decoding": 40, "training": 30 * config.train_rows}
        return Memory({"network": 1000 // ranks}, phases, 0, ranks)

    for module in (measure, tempflow.cost):
        monkeypatch.setattr(module, "memory_of", linear)
    monkeypatch.setattr(measure, "free_memory", lambda device: 1250)  # 1125 with a tenth to spare
    words = ["shapes_tempflow", *SMALL[: SMALL.index("--algorithm.seeds")], "--algorithm.seeds", "12"]
    config, file = configured("cost", words), tmp_path / "found.yaml"
    assert main(["cost", *words, "--find-rows", str(file)]) == 0
    assert load_config(file) == config.replace(rollout_rows=12, train_rows=4)
    said = capsys.readouterr().out
    assert "rollout_rows 12, train_rows 4: by the estimate" in said and f"tempflow train {file}" in said
    shared = config.replace(parallel=config.parallel.model_copy(update={"mode": "fsdp"}))
    assert measure.rows_that_fit(shared, ranks=2).train == 20
    # no more than an iteration can use
    monkeypatch.setattr(measure, "free_memory", lambda device: 10**9)
    rows, cost = measure.rows_that_fit(config), run_cost(config)
    assert (rows.rollout, rows.train) == (cost.first.leaves, cost.first.trained_edges)
    monkeypatch.setattr(measure, "free_memory", lambda device: 1130)
    with pytest.raises(ValueError, match=r"find_rows: not even one row of train_rows fits on cpu; nearest valid: "):
        measure.rows_that_fit(config)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert main(["cost", *words, "--find-rows", str(tmp_path / "mine.yaml")]) == 2
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


def test_where_memory_cannot_be_estimated_rows_are_not_guessed(monkeypatch):
    monkeypatch.setattr(measure, "memory_of", lambda config, cost, ranks: "the model's folder is not here")
    with pytest.raises(ValueError, match=r"find_rows: memory cannot be estimated \(the model's folder is not here\)"):
        measure.rows_that_fit(configured("cost", ["shapes_tempflow", *SMALL]))


def test_a_system_says_how_much_memory_is_free():
    assert 2**20 < measure.free_memory(torch.device("cpu")) < 2**50


# -------------------------------------------------------------------------------------------------------------- ranks
def test_ranks_share_states_and_under_fsdp_weights_too(monkeypatch):
    from tempflow.models import memory

    mib = 2**20
    found = memory.Footprint(
        network=100 * mib,
        encoders=30 * mib,
        vae=10 * mib,
        trainable=50 * mib,
        split=True,
        sampling=5 * mib,
        saved=20 * mib,
        training=140 * mib,
        decoding=8 * mib,
        block=10 * mib,
        outside=4 * mib,
        taught=5 * mib,
    )
    monkeypatch.setattr(memory, "footprint", lambda *given: found)
    config = configured("cost", ["shapes_tempflow", *SMALL, "--model.dtype", "bfloat16"])
    sharded = config.replace(parallel=config.parallel.model_copy(update={"mode": "fsdp"}))
    cost = run_cost(config)
    one, ddp, fsdp = (tempflow.cost.memory_of(c, cost, n) for c, n in ((config, 1), (config, 2), (sharded, 2)))
    assert tempflow.cost.memory_of(sharded, cost, 1) == one  # there is nobody to share with
    weights = [name for name in one.held if name not in ("states kept for training", "text encoders", "autoencoder")]
    assert {name: ddp.held[name] for name in weights} == {name: one.held[name] for name in weights}
    assert ddp.held["states kept for training"] == one.held["states kept for training"] // 2
    for name in ("network", "float32 masters", "gradients", "AdamW's moments"):
        assert fsdp.held[name] == ddp.held[name] // 2 > 0, name
    assert fsdp.held["blocks, gathered"] == 24 * mib and fsdp.held["a block's gradients, gathered"] == 50 * mib
    assert ddp.phases["training"] - fsdp.phases["training"] == 100 * mib  # gradients in bfloat16, of a block at a time
    assert fsdp.peak < ddp.peak and "of 2" in str(fsdp.table().title)
