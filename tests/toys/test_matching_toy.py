"""Distribution matching by two roles on the mixture of four Gaussians, whose teacher is the exact velocity."""

from __future__ import annotations

from dataclasses import replace

import torch
from fake import Bench
from mixture import MEANS, PROMPTS, SHAPE, SIZE, SPREAD, WEIGHTS, Mixture, posterior_velocity, samples
from torch import Tensor, nn

from tempflow.algorithms import Algorithm
from tempflow.algorithms.lesson import Role
from tempflow.algorithms.phase import NoisePhase
from tempflow.config.guards import GuardsConfig
from tempflow.core.objective.distill import DistributionMatching, FlowMatching
from tempflow.request import asked
from tempflow.train.guards import Guards
from tempflow.train.update import learn, lessons

STEPS, ITERATIONS = 2, 60


class Exact(nn.Module):
    """The mixture's velocity, whatever the prompt."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return posterior_velocity(x.flatten(1), sigma.to(x)).view(-1, *SHAPE)


def near(model: Mixture) -> tuple[float, Tensor]:
    """The share of two-step samples at most twice as far from a mode as its own are in the root mean square, and how
    these are shared by the modes."""
    points, _ = samples(model, 256, STEPS)
    distance = (points[:, None] - MEANS).square().sum(2)
    close, mode = distance.min(1)
    here = close < 4 * 2 * SPREAD**2
    return here.float().mean().item(), torch.bincount(mode[here], minlength=4) / here.sum()


def test_a_two_step_student_takes_on_the_mixture() -> None:
    matching = NoisePhase(DistributionMatching(), 32)
    follows = NoisePhase(FlowMatching(), 32, 3, role="fake")
    algorithm = Algorithm("matching", (matching, follows), STEPS, roles=(Role("fake", rate=2.0),))
    model = Mixture()
    bench = Bench(model, algorithm, lambda images, prompts: [0.0] * len(images), rate=1e-3, train_rows=256)
    context = replace(
        bench.context,
        size=SIZE,
        schedule=model.schedule(STEPS, SIZE),
        sets={**bench.context.sets, "reference": Exact()},
    )
    guards = Guards(GuardsConfig(), lambda iteration, alarms: None, bench.said.append)
    before, prompts = near(model)[0], asked(PROMPTS)
    for iteration in range(ITERATIONS):
        given = lessons(context, prompts, iteration, None, ())
        learn(context, prompts, given, bench.learners, bench.counter, bench.clock, guards)
    after, modes = near(model)
    assert before < 0.7 and after > 0.82, (before, after)
    assert float((modes - WEIGHTS).abs().max()) < 0.12
