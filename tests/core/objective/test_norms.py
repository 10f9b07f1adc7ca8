"""The size of velocities, overheard: the written ratio, the loss as it was, and what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from forward_toy import Field, batch, close, gradient, models

from tempflow.core.objective.leaves import noised
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate
from tempflow.core.objective.matching import NegativeAware
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.regularizer import PredictionDistance

HELD = NegativeAware(regularizers=(PredictionDistance("reference", 0.1),))


def test_it_is_the_mean_ratio_of_root_mean_squares() -> None:
    b = batch()
    found = with_velocity_norm(HELD, models(), b, len(b)).metrics["velocity_norm"]
    at = noised(models(), ("policy", "reference"), b)
    policy, reference = (v.flatten(1).square().mean(1).sqrt() for v in (at.policy, at.velocity["reference"]))
    close(found, (policy / reference).mean().expand(6), 1e-14)
    assert not found.requires_grad and abs(float(found[0]) - (policy.mean() / reference.mean()).item()) > 1e-3


@pytest.mark.parametrize("size", [1.0, 0.5, 3.0])
def test_it_is_the_factor_by_which_velocities_grew(size: float) -> None:
    class Grown(Field):
        def forward(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return size * super().forward(x, t, rows)

    b, sets = batch(), models(Grown(0.3, -0.3, 0.07))  # the reference's own field
    close(with_velocity_norm(HELD, sets, b, 6).metrics["velocity_norm"], torch.full((6,), size).double(), 1e-14)


def test_the_loss_its_gradient_and_its_other_metrics_are_as_they_were() -> None:
    b = batch()
    plain, overheard = HELD(models(), b), with_velocity_norm(HELD, models(), b, 6)
    assert torch.equal(plain.value, overheard.value)
    assert overheard.metrics.keys() - plain.metrics.keys() == {"velocity_norm"}
    assert all(torch.equal(overheard.metrics[name], column) for name, column in plain.metrics.items())
    left = gradient(lambda sets, some: with_velocity_norm(HELD, sets, some, 6), models(), b)
    assert torch.equal(left, gradient(HELD, models(), b))


def test_micro_batches_of_equal_size_average_to_the_whole() -> None:
    b = batch()
    whole = with_velocity_norm(HELD, models(), b, 6).metrics["velocity_norm"].mean()
    parts = [with_velocity_norm(HELD, models(), b.take(slice(k, k + 2)), 2).metrics["velocity_norm"] for k in (0, 2, 4)]
    close(torch.cat(parts).mean(), whole, 1e-14)


def test_without_a_reference_it_says_so() -> None:
    with pytest.raises(ValueError, match="'policy' was asked for 18 states and 'reference' for 0; nearest valid"):
        with_velocity_norm(ClippedLikelihood(estimate=Estimate(on_policy=True)), models(), batch(), 6)
