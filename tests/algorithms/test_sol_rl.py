"""Sol-RL: what is drafted, what is drawn again from the same noises, and what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, brightness
from PIL import Image

from tempflow.algorithms.diffusion_nft import diffusion_nft
from tempflow.algorithms.sol_rl import sol_rl
from tempflow.core.dynamics import ODE
from tempflow.core.plan import ode
from tempflow.core.rollout import Noise, rollout
from tempflow.request import asked
from tempflow.train.experience import credit

SMALL: dict[str, Any] = {"steps": 4, "group": 4, "kl": 0.0}


def gradient(bench: Bench) -> torch.Tensor:
    bench.iterate()
    return torch.cat([p.grad.flatten() for p in bench.model.network.parameters() if p.grad is not None])


def test_counts() -> None:
    bench = Bench(algorithm=sol_rl(pool=10, draft_steps=2, **SMALL), rollout_rows=13)
    metrics = bench.iterate()
    cost = bench.context.algorithm.cost(0, len(PROMPTS))
    assert cost.forwards == 6 * (10 * 2 + 4 * 4) == bench.counter.rollout and cost.leaves == 6 * 14
    assert bench.counter.decodes == bench.counter.reward_calls == cost.leaves
    assert bench.counter.train == cost.trained_edges == metrics["trained_edges"] == 6 * 4 * 3
    assert sum(bench.model.rows) == bench.counter.forwards


def test_a_full_draft_of_the_group_itself_is_diffusion_nft() -> None:
    """Pool = group: the choice is a permutation, here the identity, and drafts change nothing."""
    drafted = gradient(Bench(algorithm=sol_rl(pool=4, draft_steps=4, **SMALL)))
    plain = gradient(Bench(algorithm=diffusion_nft(**SMALL)))
    assert torch.equal(drafted, plain) and float(plain.abs().max()) > 1e-4


def test_kept_pictures_come_from_the_ends_of_the_pool_and_from_the_same_noises() -> None:
    bench = Bench(algorithm=sol_rl(pool=12, draft_steps=4, **SMALL))
    experience = bench.collect()
    model, context = bench.model, bench.context
    everything = rollout(
        [ode(4, 12)] * len(PROMPTS),
        ODE(),
        context.schedule,
        model.predictor(model.encode(asked(PROMPTS), SIZE), 1.0),
        Noise(context.seed, 0),
        shape=(2, 2, 2),
        solver=context.algorithm.solver,
    )
    pool = everything.nodes[everything.leaves.node].view(len(PROMPTS), 12, -1)
    kept = experience.forest.nodes[experience.forest.edges.child].view(len(PROMPTS), 4, -1)
    for slot in range(len(PROMPTS)):
        value = model.decode(pool[slot].view(12, 2, 2, 2), SIZE).pictures().float().mean((1, 2, 3))
        order = sorted(range(12), key=lambda i: (-float(value[i]), i))
        want = sorted(order[:2] + order[-2:])
        torch.testing.assert_close(kept[slot], pool[slot][want], rtol=1e-5, atol=1e-5)


def test_advantages_come_from_the_redrawn_pictures_alone() -> None:
    """Drafts whose scores are changed by the same monotone map choose alike, so nothing else may change."""
    seen = {"calls": 0}

    def first_calls_squashed(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        seen["calls"] += 1
        values = brightness(images, prompts)
        return [None if v is None else v**3 for v in values] if seen["calls"] == 1 else values

    plain = Bench(algorithm=sol_rl(pool=9, draft_steps=2, **SMALL))
    squashed = Bench(algorithm=sol_rl(pool=9, draft_steps=2, **SMALL), reward=first_calls_squashed)
    a, b = (credit(x.context, x.collect()).advantage.value for x in (plain, squashed))
    assert seen["calls"] == 2 and torch.equal(a, b) and float(a.abs().max()) > 0.1


def test_what_drafts_score_changes_nothing_where_all_are_kept() -> None:
    """The choice is the same whatever they score; so is the gradient."""
    seen = {"calls": 0}

    def drafts_scored_anyhow(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        seen["calls"] += 1
        if seen["calls"] == 1:
            return [None if i % 5 == 0 else float((7 * i) % 11) for i in range(len(images))]
        return brightness(images, prompts)

    options = {**SMALL, "pool": 4, "draft_steps": 2, "draft_precision": "bfloat16"}
    plain = gradient(Bench(algorithm=sol_rl(**options)))
    other = gradient(Bench(algorithm=sol_rl(**options), reward=drafts_scored_anyhow))
    assert seen["calls"] == 2 and torch.equal(plain, other) and float(plain.abs().max()) > 1e-4


def test_drafts_in_low_precision_cost_the_same_rows() -> None:
    bench = Bench(algorithm=sol_rl(pool=10, draft_steps=2, draft_precision="bfloat16", **SMALL), rollout_rows=13)
    bench.iterate()
    cost = bench.context.algorithm.cost(0, len(PROMPTS))
    assert cost.forwards == bench.counter.rollout and sum(bench.model.rows) == bench.counter.forwards


def test_fidelity_is_reported_and_is_one_for_a_full_draft() -> None:
    assert Bench(algorithm=sol_rl(pool=8, draft_steps=4, **SMALL)).iterate()["draft/kendall"] == pytest.approx(1.0)
    coarse = Bench(algorithm=sol_rl(pool=8, draft_steps=2, **SMALL)).iterate()["draft/kendall"]
    assert -1 <= coarse <= 1
    assert "draft/kendall" not in Bench(algorithm=diffusion_nft(**SMALL)).iterate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": 3, "group": 4}, "pool: 3 must be at least 4"),
        ({"draft_steps": 0}, "draft_steps: 0 must be at least 1"),
        ({"choice": "best"}, "choice: 'best' is not one of"),
        ({"draft_precision": "fp8"}, "draft_precision: 'fp8' is not one of"),
        ({"group": 1}, "group: 1 must be at least 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sol_rl(**arguments)
