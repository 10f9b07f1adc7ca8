"""Every algorithm and every loss trains to the weights that are frozen in golden.json (docs/golden.md)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.golden import against, frozen
from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import built, drive
from benchmarks.golden.library import losses
from tempflow.algorithms import ALGORITHMS, Algorithm

WANT = frozen.read()

CARRIERS = {
    "EdgeBatch",
    "Clipped",
    "LeafBatch",
    "Loss",
    "NoiseBatch",
    "Noised",
    "Old",
    "PairBatch",
    "Peers",
    "Replayed",
}
"""Classes of the losses' files that carry a batch or a result; losses are composed of all the rest."""

ELSEWHERE = {"draft_precision": {"int8", "float8", "nvfp4"}}
"""Options that the golden model cannot have: they need layers of 128 inputs and outputs, or a GPU."""


def run(name: str, change: Callable[[Algorithm], Algorithm] | None = None) -> dict[str, Any]:
    rate = WANT[name]["rate"]
    return frozen.frozen(drive(CASES[name], rate, change=change), rate)


# --------------------------------------------------------------------------------------------------------- the weights
@pytest.mark.parametrize("name", CASES)
def test_it_trains_to_the_frozen_weights(name: str) -> None:
    assert name in WANT, f"{name!r} is not frozen: python -m benchmarks.golden --write"
    assert frozen.differences(run(name), WANT[name]) == []


def flipped(algorithm: Algorithm) -> Algorithm:
    class Flipped:
        """The credit with its sign turned round."""

        def __init__(self, of: Any) -> None:
            self.of = of

        def __getattr__(self, name: str) -> Any:
            return getattr(self.of, name)

        def __call__(self, *given: Any) -> Any:
            advantage = self.of(*given)
            return replace(advantage, value=-advantage.value)

        def weighted(self, weights: Any) -> Any:
            return Flipped(self.of.weighted(weights))

    return replace(algorithm, credit=Flipped(algorithm.credit))  # type: ignore[arg-type]


def scaled(algorithm: Algorithm) -> Algorithm:
    phase: Any = algorithm.first
    weighted = replace(phase, weight=lambda *given: phase.weight(*given) * 1.01)
    return replace(algorithm, phases=(weighted,))


def wider(algorithm: Algorithm) -> Algorithm:
    """Its clip is another: the first update is the same, and the second is not."""
    objective = algorithm.objective
    return algorithm.taught(replace(objective, clip=replace(objective.clip, high=0.3, low=0.3)))


@pytest.mark.parametrize(
    ("name", "fault"),
    [("flow_grpo", flipped), ("diffusion_nft", flipped), ("tempflow_grpo", scaled), ("flow_grpo", wider)],
    ids=["sign", "sign of samples", "weight", "clip"],
)
def test_a_planted_fault_is_found(name: str, fault: Callable[[Algorithm], Algorithm]) -> None:
    found = frozen.differences(run(name, fault), WANT[name])
    assert any(line.startswith("policy after iteration") for line in found), found


def test_what_does_not_move_is_found() -> None:
    still = {**WANT["sft"], "sets": {"policy": [[0.0] * 4] * 2}}
    assert frozen.differences(still, still) == [f"policy has not moved after iteration {n}" for n in (1, 2)]
    assert frozen.differences(still, WANT["awm"])[0].startswith("weight sets ['policy'], not ['")


# -------------------------------------------------------------------------------------------------------- completeness
def test_nothing_is_frozen_that_is_no_case() -> None:
    assert WANT.keys() == CASES.keys()


def test_every_algorithm_has_a_case() -> None:
    assert {case.algorithm for case in CASES.values()} == set(ALGORITHMS)


def options(annotation: Any) -> set[object]:
    """The values among which an argument or a field chooses: of a literal or a bool; None and "a value"."""
    if annotation is bool:
        return {True, False}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
        return {None if part is NoneType else "a value" for part in parts} if NoneType in parts else set()
    return set()


def chosen(annotation: Any, value: object) -> object:
    return value if get_origin(annotation) not in (Union, UnionType) or value is None else "a value"


def test_every_option_of_an_argument_is_taken() -> None:
    """By the cases of one algorithm at least that has an argument of that name with that choice."""
    missing, taken = dict[tuple[str, str], set[object]](), dict[tuple[str, str], set[object]]()
    for name, make in ALGORITHMS.items():
        hints = get_type_hints(make)
        for argument, parameter in inspect.signature(make).parameters.items():
            among = options(hints[argument])
            key = (argument, repr(sorted(map(str, among))))
            missing.setdefault(key, set()).update(among - ELSEWHERE.get(argument, set()))
            for case in (case for case in CASES.values() if case.algorithm == name):
                value = case.fields.get(argument, parameter.default)
                taken.setdefault(key, set()).add(chosen(hints[argument], value))
    left = {key[0]: among - taken[key] for key, among in missing.items() if among - taken[key]}
    assert left == {"dino": {"a value"}}, "a case in benchmarks/golden/cases.py is wanted (dino: files of a backbone)"


def parts(of: object) -> Iterator[Any]:
    """The dataclasses that an object is composed of."""
    if dataclasses.is_dataclass(of) and not isinstance(of, type):
        yield of
        of = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    if isinstance(of, Mapping):
        of = tuple(of.values())
    if isinstance(of, tuple):
        for item in of:
            yield from parts(item)


@cache
def all_parts() -> tuple[Any, ...]:
    return tuple(part for case in CASES.values() for phase in built(case).phases for part in parts(phase.objective))


def test_every_class_of_a_loss_has_a_case() -> None:
    known = {kind.__name__ for kind in losses()}
    assert known >= CARRIERS and len(known) > 30
    assert known - CARRIERS - {type(part).__name__ for part in all_parts()} == set()


def test_every_option_of_a_loss_is_taken() -> None:
    left: dict[str, set[object]] = {}
    for kind in losses():
        if kind.__name__ in CARRIERS:
            continue
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            values = {chosen(hints[field.name], getattr(p, field.name)) for p in all_parts() if type(p) is kind}
            if rest := options(hints[field.name]) - values:
                left[f"{kind.__name__}.{field.name}"] = rest
    assert left == {}


# ------------------------------------------------------------------------------------------------------ two revisions
def test_dumps_are_compared_to_the_last_bit(tmp_path: Path) -> None:
    one = torch.tensor([[0.0, 1.0]])
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, values in ((old, [one, one, one]), (new, [one, torch.tensor([[-0.0, 1.0]]), one + 2**-20])):
        folder.mkdir()
        for name, value in zip("abc", values, strict=True):
            save_file({"policy": value}, folder / f"{name}.safetensors")
    assert against.difference(old, new, "a") is None
    assert against.difference(old, new, "b") == "policy apart by 0"
    assert against.difference(old, new, "c") == "policy apart by 9.5e-07"
    (new / "a.txt").write_text("Traceback\nValueError: steps\n")
    assert against.difference(old, new, "a") == "cannot be run now: ValueError: steps"
