"""Candidates of one state, graded by their ends: whose they are, at which σ, and what training makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tempflow.core.dynamics import CPS
from tempflow.core.rollout import Noise
from tempflow.core.schedule import shifted
from tempflow.latent_reward import Rated, RewardTraining, accuracy, fit, pairs_of, siblings

GRID, SHAPE, PROMPTS = shifted(5), (3, 2), ("fog", "snow")


def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return (0.7 + rows.view(-1, 1, 1)) * x


def mean(x: Tensor, prompts: Sequence[str]) -> Tensor:
    return x.flatten(1).mean(1) + torch.tensor([0.0 if p == "fog" else 10.0 for p in prompts])


def drawn(rows: int = 512) -> Rated:
    return siblings(PROMPTS, velocity, GRID, CPS(0.8), mean, Noise(4), shape=SHAPE, chains=2, candidates=3, rows=rows)


def test_every_candidate_is_at_its_sigma_and_graded_by_where_the_ode_takes_it() -> None:
    rated = drawn()
    assert rated.sigma is not None and len(rated.latents) == 2 * 2 * 3 * 4
    for i in range(1, 5):
        here = rated.sigma == GRID.sigmas[i]
        assert int(here.sum()) == 12
        for row, name in enumerate(PROMPTS):
            mine = here & (rated.rows == row)
            factor = torch.prod(1 + (GRID.sigmas[i + 1 :] - GRID.sigmas[i:-1]) * (0.7 + row))
            want = rated.latents[mine].flatten(1).mean(1) * factor + (0.0 if name == "fog" else 10.0)
            torch.testing.assert_close(rated.scores[mine], want, rtol=1e-5, atol=1e-5)


def test_groups_are_what_is_drawn_from_one_state_and_only_they_are_paired() -> None:
    rated = drawn()
    sizes = torch.bincount(rated.paired)
    assert sizes[sizes > 0].tolist() == [3] * 16
    pairs = pairs_of(rated)
    assert len(pairs) == 16 * 3 and bool((rated.paired[pairs[:, 0]] == rated.paired[pairs[:, 1]]).all())
    assert bool((rated.scores[pairs[:, 0]] > rated.scores[pairs[:, 1]]).all())
    assert rated.sigma is not None and bool((rated.sigma[pairs[:, 0]] == rated.sigma[pairs[:, 1]]).all())


def test_the_size_of_batches_does_not_matter() -> None:
    whole, small = drawn(), drawn(rows=5)
    torch.testing.assert_close(whole.latents, small.latents)
    torch.testing.assert_close(whole.scores, small.scores)


def test_training_sees_them_as_they_are() -> None:
    """No noise is added; a linear scorer finds the direction that their ends were graded by."""
    rated, module = drawn(), nn.Linear(6, 1, bias=False)
    nn.init.zeros_(module.weight)
    seen: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        seen.append(torch.cat([x.flatten(1), sigma[:, None], rows[:, None].to(x)], 1))
        return module(x.flatten(1)).squeeze(1)

    fit(module, score, rated, pairs_of(rated), RewardTraining(steps=60, pairs=16, lr=0.05))
    assert rated.sigma is not None
    known = torch.cat([rated.latents.flatten(1), rated.sigma[:, None], rated.rows[:, None].float()], 1)
    assert all(bool((row == known).all(1).any()) for row in torch.cat(seen))
    assert float(torch.nn.functional.cosine_similarity(module.weight[0], torch.ones(6), 0)) > 0.9


def test_what_does_not_fit_is_refused() -> None:
    x, scores, rows = torch.zeros(4, 2), torch.arange(4.0), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"sigma: shape \[3\] must be \[4\]"):
        Rated(x, scores, rows, PROMPTS, torch.ones(3))
    with pytest.raises(ValueError, match=r"sigma: differs within a group"):
        Rated(x, scores, rows, PROMPTS, torch.tensor([0.5, 0.6, 0.7, 0.7]))
    with pytest.raises(ValueError, match=r"rows: differs within a group"):
        Rated(x, scores, rows, PROMPTS, torch.ones(4), torch.tensor([0, 1, 1, 2]))
    with pytest.raises(ValueError, match=r"sigma: 0.0 … 1.0 must lie in \(0, 1\]"):
        Rated(x, scores, rows, PROMPTS, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"group: dtype torch.float32 cannot number groups"):
        Rated(x, scores, rows, PROMPTS, torch.ones(4), torch.zeros(4))
    given = Rated(x, scores, rows, PROMPTS, torch.ones(4))
    with pytest.raises(ValueError, match=r"sigma: is given, and buckets draw their own"):
        accuracy(lambda x, s, r: x[:, 0], given, pairs_of(given))
    empty = Rated(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long), PROMPTS)
    assert pairs_of(empty).shape == (0, 2)
