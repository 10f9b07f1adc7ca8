"""The loss that an objective's docstring spells out, run, against the objective: its value and its gradient."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from forward_toy import SHAPE, batch, models
from torch import Tensor, nn

from tempflow.core import objective as room
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.edges import EdgeBatch, Loss
from tempflow.core.objective.likelihood import ClippedLikelihood, PolicyGradient
from tempflow.core.objective.matching import NegativeAware, SignedLeastSquares
from tempflow.core.objective.preference import (
    CentredReward,
    GroupPreference,
    OnlinePairs,
    PairBatch,
    PreferencePairs,
    Supervised,
)
from tempflow.core.objective.ratio import PolicyRatio, clipped
from tempflow.core.objective.regularizer import PredictionDistance
from tempflow.core.schedule import Schedule

MOST_LINES = 10
D = tuple(range(-len(SHAPE), 0))
HELD = (PredictionDistance("reference", 0.3),)
Names = dict[str, Any]


UNROLLED = {"distill", "diversity", "guided_targets", "imitation", "reward_gradient", "shaping"}
"""Their losses walk the sampler themselves, which ten lines cannot say: a test of each has them by hand."""


def objectives() -> set[type]:
    """Every class of the room that is called with (models, batch) and answers with a `Loss`, but for UNROLLED's."""
    names = [m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in UNROLLED]
    modules = [importlib.import_module(f"{room.__name__}.{name}") for name in names]
    found = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    calls = [(c, vars(c).get("__call__")) for c in found if not getattr(c, "_is_protocol", False)]
    return {c for c, call in calls if call is not None and call.__annotations__.get("return") in ("Loss", Loss)}


def code_of(kind: type) -> str:
    """The literal block of its docstring."""
    blocks = re.findall(r"::\n\n((?: {4}.*\n?|\n)+)", inspect.getdoc(kind) or "")
    assert len(blocks) == 1, f"{kind.__name__}: its docstring has {len(blocks)} blocks of code in place of its loss"
    return inspect.cleandoc(blocks[0])


CASES: dict[type, tuple[Any, ...]] = {
    PolicyRatio: (PolicyRatio(), clipped(0.02, 0.03, kl=0.4)),
    NegativeAware: (NegativeAware(1.0, 2.0), NegativeAware(0.3, 2.0, adaptive=False, regularizers=HELD)),
    SignedLeastSquares: (
        SignedLeastSquares(),
        SignedLeastSquares(anchor="balanced", form="sum", reference=0.2),
        SignedLeastSquares(gamma=0.5, concave=True, adaptive=True),
    ),
    PolicyGradient: (
        PolicyGradient(),
        PolicyGradient("epg", ratio=False, regularizers=HELD),
        PolicyGradient("pepg", regularizers=HELD),
        PolicyGradient("par", regularizers=HELD),
    ),
    ClippedLikelihood: (ClippedLikelihood(), ClippedLikelihood(0.3, 0.01, soft_clip=0.5, regularizers=HELD)),
    Supervised: (Supervised(), Supervised(regularizers=HELD)),
    PreferencePairs: (PreferencePairs(2.0), PreferencePairs(0.5, regularizers=HELD)),
    OnlinePairs: (OnlinePairs(PreferencePairs(2.0)),),
    GroupPreference: (GroupPreference(1.0, 0.05), GroupPreference(3.0, 0.02, "old", regularizers=HELD)),
    CentredReward: (CentredReward(kl=0.3), CentredReward(2.0, 3.0, kl=0.2, adaptive_kl=False)),
}


def test_every_objective_says_its_loss() -> None:
    assert objectives() == CASES.keys()
    for kind in objectives():
        assert len(code_of(kind).splitlines()) <= MOST_LINES, kind.__name__


def wide(values: Tensor) -> Tensor:
    """A number per state in the shape of a mean over a latent, [..., 1, 1]."""
    return values[(..., *[None] * len(SHAPE))]


def fields_of(objective: Any) -> Names:
    """What a block may call by name: the objective's fields, those of its clip and pairs, and the weight of its KL."""
    parts = [objective, *(getattr(objective, part) for part in ("clip", "pairs") if hasattr(objective, part))]
    known = {f.name: getattr(p, f.name) for p in parts if hasattr(p, "__dataclass_fields__") for f in fields(p)}
    return {"kl": sum(r.coefficient for r in known.get("regularizers", ()))} | known


def velocities(sets: Mapping[str, nn.Module]) -> Names:
    """v(x, t, c) of each set; t and c are broadcast to the states. The policy's alone bears gradients."""

    def of(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            states = x.shape[: -len(SHAPE)]
            times, rows = t.flatten(-len(SHAPE)).squeeze(-1).expand(states), c.expand(states)
            with torch.set_grad_enabled(name == "policy"):
                return sets[name](x.flatten(0, len(states) - 1), times.flatten(), rows.flatten()).view(x.shape)

        return velocity

    return {"v": of("policy"), "v_old": of("old"), "v_ref": of("reference")}


def edges(sets: Mapping[str, nn.Module]) -> tuple[EdgeBatch, Names]:
    """Eight edges that the old policy drew, and the names of a block for them."""
    g = torch.Generator().manual_seed(3)
    schedule, dynamics = Schedule(torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)), FlowSDE(0.7)
    step, rows, scale = torch.arange(8) % 3, torch.arange(8), torch.ones(8, dtype=torch.float64)
    x, z = (torch.randn(8, *SHAPE, generator=g).double() for _ in range(2))
    A, w = torch.randn(8, generator=g).double(), 0.5 + torch.rand(8, generator=g).double()
    law = dynamics.transition(x, sets["old"](x, schedule.at(step), rows).detach(), schedule, step, scale)
    y = law.sample(z)
    log_p_old = law.log_prob(y)
    a, b, S = dynamics.coefficients(schedule, step, scale)
    many = {"a": a, "b": b, "S": S, "A": A, "w": w, "log_p_old": log_p_old, "sigma": schedule.at(step)}
    return (
        EdgeBatch(x, y, step, scale, rows, log_p_old, A, w, schedule, dynamics),
        {"x": x, "y": y, "c": rows, **{name: wide(values) for name, values in many.items()}},
    )


def samples(objective: Any) -> tuple[Any, Names]:
    """A batch of clean samples, or of pairs of them, and the names of a block for it."""
    b = batch()
    if objective.unit == "group":  # a group shares its (t, ε)
        b = type(b)(b.x0, b.advantage, b.rows, b.group, b.t[b.group], b.noise[b.group])
    names = {"t": wide(b.t), "noise": b.noise, "c": b.rows[:, None]}
    if isinstance(objective, PreferencePairs):
        rejected = b.x0.flip(0) + 0.1
        pairs = PairBatch(b.x0, rejected, b.rows, b.t, b.noise)
        return pairs, names | {"chosen": b.x0[:, None], "rejected": rejected[:, None]}
    return b, names | {"x0": b.x0[:, None], "A": wide(b.advantage[:, None]), "group": b.group}


@pytest.mark.parametrize(
    "objective", [pytest.param(o, id=f"{k.__name__}-{i}") for k, cases in CASES.items() for i, o in enumerate(cases)]
)
def test_a_docstrings_loss_is_the_objectives(objective: Any) -> None:
    sets = models()
    given, names = edges(sets) if isinstance(objective, PolicyRatio) else samples(objective)
    scope = {"torch": torch, "math": math, "D": D} | fields_of(objective) | names | velocities(sets)
    exec(code_of(type(objective)), scope)
    theta = sets["policy"].get_parameter("theta")
    spelled = torch.autograd.grad(scope["loss"], theta)[0]
    value = objective(sets, given).value
    torch.testing.assert_close(scope["loss"], value, rtol=1e-9, atol=0)
    torch.testing.assert_close(spelled, torch.autograd.grad(value, theta)[0], rtol=1e-9, atol=1e-13)
    assert spelled.abs().max() > 0
