"""Runs of two seeds train different windows, steps and chunks; runs of one seed the same."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from fake import Bench
from family import FAMILY
from loop_checks import bench_of
from test_forward_family import SMALL

from tempflow.algorithms import ALGORITHMS, Algorithm
from tempflow.algorithms.lesson import Seeded
from tempflow.core.rng import Stream
from tempflow.core.schedule import linear
from tempflow.train.experience import credit

SRC = Path(__file__).parents[2] / "src"

DRAWING: dict[str, dict[str, Any]] = {
    "flow_grpo": {"train_steps": 3},
    "tempflow_grpo": {"branch_steps": 3},
    "flow_grpo_fast": {"window": 1},
    "flow_dppo": {},
    "flash_grpo": {},
    "dance_grpo": {},
    "vipo": {},
    "mix_grpo": {"order": "random"},
    "mix_grpo_flash": {"order": "random"},
    "dynamic_treerpo": {"order": "random"},
    "pref_grpo": {"train_steps": 3},
    "slas": {"train_steps": 3},
    "perceptual_entropy": {"train_steps": 3},
    "ddpo": {"train_steps": 3},
    "rloo": {"train_steps": 3},
    "dr_grpo": {"train_steps": 3},
    "reinforce_pp": {"train_steps": 3},
    "dapo": {"train_steps": 3},
    "gspo": {"train_steps": 3},
    "cispo": {"train_steps": 3},
    "sapo": {"train_steps": 3},
    "rtdmd": {"train_steps": 1},
    "gcpo": {"steps": 6, "group": 4, "sizes": (2, 2, 1)},
}
"""Settings of every algorithm that can draw which steps, windows or chunks it trains, with which it does."""


def drawn(algorithm: Algorithm) -> Any:
    """What is trained over some iterations and slots."""
    if algorithm.name == "gcpo":
        bench = Bench(algorithm=algorithm, seed=_seed(algorithm))
        experience = bench.collect()
        return bench.items(experience, credit(bench.context, experience)).row.sort().values.tolist()
    grids = [algorithm.schedule(i, linear(algorithm.steps)).sigmas.tolist() for i in range(12)]
    return grids, [algorithm.plan(i, slot) for i in range(12) for slot in range(3)]


def _seed(algorithm: Algorithm) -> int:
    return algorithm.first.units.sampler.seed  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DRAWING)
def test_two_seeds_draw_different_steps_and_one_the_same(name: str) -> None:
    algorithm = ALGORITHMS[name](**DRAWING[name])
    assert drawn(algorithm.seeded(1)) == drawn(algorithm.seeded(1))
    assert drawn(algorithm.seeded(1)) != drawn(algorithm.seeded(2))


def test_every_algorithm_that_can_draw_is_looked_at() -> None:
    """By what its parts are at its defaults, and by its arguments."""
    made = {name: make() for name, make in ALGORITHMS.items()}
    parts = {
        name: (a.plan, a.grid, *(p for phase in a.phases for p in vars(phase).values())) for name, a in made.items()
    }
    seeded = {name for name, of in parts.items() if any(isinstance(p, Seeded) for p in of)}
    knobs = {"train_steps", "branch_steps", "order"}
    asked = {name for name, make in ALGORITHMS.items() if knobs & inspect.signature(make).parameters.keys()}
    assert seeded | asked == DRAWING.keys()


@pytest.mark.parametrize("name", [*FAMILY, *SMALL])
def test_an_iteration_draws_from_the_runs_seed_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an iteration draws, noise, windows, steps, chunks, (t, ε), order, it draws from streams of that seed."""
    algorithm = FAMILY[name](4) if name in FAMILY else SMALL[name]()
    seeds, start = set[int](), Stream.__init__

    def noted(stream: Stream, seed: int, name: str) -> None:
        seeds.add(seed)
        start(stream, seed, name)

    bench = bench_of(algorithm, seed=987_654_321)
    monkeypatch.setattr(Stream, "__init__", noted)
    bench.iterate()
    assert seeds == {987_654_321}


def test_no_stream_has_a_seed_of_its_own() -> None:
    """A number written in the code in place of a seed."""
    found = [
        f"{path.relative_to(SRC)}:{node.lineno}"
        for path in sorted(SRC.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Stream"
        if any(isinstance(given, ast.Constant) and isinstance(given.value, int) for given in node.args)
    ]
    assert not found
