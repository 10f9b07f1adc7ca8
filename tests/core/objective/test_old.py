"""Old log-probs: the training forward's own, bit for bit; and how a rollout's distance from them is read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tempflow.core.dynamics import CPS, DDIM, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.objective.edges import EdgeBatch, replay
from tempflow.core.objective.old import detached, old_of, rounding_of, told
from tempflow.core.objective.ratio import NormRatio, PositionRatio, RegionRatio, StepRatio
from tempflow.core.schedule import linear

KINDS = (FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0))
SHAPE, ROWS = (4, 16, 16), 64


def field(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return torch.tanh(x) + sigma.view(-1, 1, 1, 1)


def drawn(dynamics: Dynamics, error: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[EdgeBatch, Tensor]:
    """Edges whose rollout had velocities of another relative error than training has, and training's velocities."""
    g = torch.Generator().manual_seed(3)
    schedule, step = linear(6, 3.0), torch.arange(ROWS) % 4
    x = torch.randn(ROWS, *SHAPE, generator=g).to(dtype)
    velocity = field(x, schedule.at(step), step)
    size = velocity.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    sampled = velocity + error * size * torch.randn(x.shape, generator=g)
    law = dynamics.transition(x, sampled, schedule, step)
    y = law.sample(torch.randn(x.shape, generator=g))
    ones = torch.ones(ROWS)
    columns = {"map": torch.ones(ROWS, *SHAPE[1:])}
    fields = {"step": step, "scale": ones, "rows": step, "advantage": ones, "weight": ones}
    batch = EdgeBatch(x, y, log_prob=law.log_prob(y), schedule=schedule, dynamics=dynamics, columns=columns, **fields)
    return batch, velocity


@pytest.mark.parametrize("ratio", [StepRatio(), NormRatio(), PositionRatio(), RegionRatio()], ids=repr)
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_the_training_forward_is_its_own_old_one_to_the_last_bit(dynamics: Dynamics, ratio: StepRatio) -> None:
    batch, velocity = drawn(dynamics, error=1e-2)
    velocity = velocity.requires_grad_()
    old = old_of(batch, velocity, 1e-3, keeps_mean=True)
    mine = replace(batch, log_prob=old.log_prob, mean=old.mean)
    log_ratio = ratio(replay({"policy": told(velocity, batch.x, field)}, ("policy",), mine))
    assert bool((log_ratio == 0).all()) and log_ratio.requires_grad
    assert not old.log_prob.requires_grad and float((old.log_prob - batch.log_prob).abs().max()) > 1e-4


@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
@pytest.mark.parametrize("errors", [1, 30, 300])
def test_the_gap_is_an_error_of_velocities_from_below(dynamics: Dynamics, errors: int) -> None:
    """It never claims more than there was, and of many elements not much less."""
    batch, velocity = drawn(dynamics, error=errors * 2**-12)
    gap = old_of(batch, velocity, 2**-12, keeps_mean=False).gap
    assert float(gap.max()) <= 1.1 * errors
    assert float(gap.max()) >= errors * (0.2 if errors == 1 else 0.3)


def test_nothing_lies_between_what_is_the_same_and_a_nan_is_one() -> None:
    batch, velocity = drawn(FlowSDE(0.7))
    assert bool((old_of(batch, velocity, 2**-24, keeps_mean=False).gap == 0).all())
    broken = replace(batch, log_prob=batch.log_prob.clone().index_fill(0, torch.tensor([5]), math.nan))
    gap = old_of(broken, velocity, 2**-24, keeps_mean=False).gap
    assert bool(gap[5].isnan()) and bool((gap[:5] == 0).all())
    assert old_of(batch, velocity, 2**-24, keeps_mean=False).mean is None


def test_roundings_of_dtypes_and_guidance() -> None:
    assert rounding_of(torch.finfo(torch.bfloat16).eps, 1.0) == 2**-8 + 2**-19
    float32 = 2**-24 + 2**-19
    assert rounding_of(torch.finfo(torch.float32).eps, 4.5) == pytest.approx(float32 * math.sqrt(4.5**2 + 3.5**2))


def test_a_predictor_is_not_asked_twice_and_takes_the_path_of_training() -> None:
    asked = list[bool]()

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return x.clone().requires_grad_() * 2

    x, other = torch.ones(2, 1), torch.ones(2, 1)
    said = told(torch.full((2, 1), 7.0), x, predict)
    assert float(said(x, x, x).mean()) == 7 and not asked
    assert float(said(other, x, x).detach().mean()) == 2 and asked == [True], "at other states it is"
    with torch.no_grad():
        answer = detached(predict)(x, x, x)
    assert asked == [True, True] and not answer.requires_grad
