"""Diffusion-DPO and SFT on given samples, through the real loop: gradients, counts, what is never touched, errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, same, weights
from loop_checks import check_errors, phased
from PIL import Image
from torch import Tensor

from tempflow.algorithms import diffusion_dpo, online_dpo, sft
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.phase import EdgePhase
from tempflow.config import Config
from tempflow.core import plan
from tempflow.core.draft import Draft
from tempflow.core.dynamics import FlowSDE
from tempflow.core.likelihood_proxy import corrupt
from tempflow.core.objective.ratio import clipped
from tempflow.core.offline import OfflineSamples
from tempflow.core.plan import Cost
from tempflow.core.times import GridTimes
from tempflow.cost import run_cost
from tempflow.media import Media
from tempflow.request import Prompt, asked

OFFLINE = {"dpo": lambda **o: diffusion_dpo(2, **o), "sft": lambda **o: sft(3, **o)}
every = pytest.mark.parametrize("name", OFFLINE)


class Exact(Fake):
    """Its pictures are numbers, of latents that `encode_media` looks up: no rounding to bytes."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents

    def encode_media(self, media: Media, size: Any) -> Tensor:
        assert size == SIZE
        return self.latents[media.frames[:, 0, 0, 0, 0].long()]


def numbered(keys: int) -> Any:
    """A reader for which prompt n of PROMPTS has the pictures keys·n, keys·n + 1, …"""

    def read(prompts: Sequence[Prompt]) -> Media:
        numbers = [PROMPTS.index(p.text) * keys + k for p in prompts for k in range(keys)]
        return Media.of(torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3))

    return read


def some_latents(count: int = 12) -> Tensor:
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(3))


def bench(algorithm: Algorithm, latents: Tensor | None = None, **options: Any) -> Bench:
    assert algorithm.offline is not None
    model = Exact(some_latents() if latents is None else latents)
    read = numbered(len(algorithm.offline.keys))
    return Bench(model, algorithm, **{"pictures": read, "max_grad_norm": 1e9, **options})


def gradient(run: Bench) -> dict[str, Tensor]:
    run.iterate()
    return {n: p.grad.clone() for n, p in run.model.network.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    size = max(float(t.abs().max()) for t in b.values())
    assert a.keys() == b.keys() and size > 1e-6
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * size, name


# ----------------------------------------------------------------------------------------------------------- gradients
def untied(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Brightness whose pixels count differently, so that no two pictures are worth the same."""
    return [
        sum(w * v for w, v in zip((1, 1.1, 1.23, 1.37), i.convert("L").tobytes(), strict=True)) / 999 for i in images
    ]


@pytest.mark.parametrize("group", [2, 5])
def test_a_pair_from_disk_teaches_what_the_same_pair_teaches_online(group: int) -> None:
    """β is small enough for the sigmoid not to be flat, and two updates leave the reference behind."""
    online = Bench(algorithm=online_dpo(4, group, 2, 30.0, kl=0.1), reward=untied, max_grad_norm=1e9, updates=2)
    experience = online.collect()
    assert len(experience.forest.nodes) == len(PROMPTS) * group
    apart = torch.arange(len(experience.scores)).roll(7)[:, None] / 100  # pictures of few grey levels tie
    experience = replace(experience, scores=replace(experience.scores, value=experience.scores.value + apart))
    value = experience.scores.value[:, 0].view(-1, group)
    first = torch.arange(len(PROMPTS)) * group
    rows = torch.stack([first + value.argmax(1), first + value.argmin(1)], 1).flatten()
    latents = experience.forest.nodes[experience.forest.edges.child[rows]]
    metrics = online.update(experience)
    offline = bench(diffusion_dpo(2, 30.0, kl=0.1), latents, updates=2)
    same_metrics = offline.iterate()
    assert_close(weights(offline.model), weights(online.model), 1e-6)
    for name in ("loss", "accuracy", "margin", "kl_reference", "grad_norm", "trained_edges"):
        assert same_metrics[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert same_metrics["margin"] != 0


def test_swapping_a_pair_turns_the_gradient_round() -> None:
    swapped = some_latents().view(6, 2, 2, 2, 2).flip(1).reshape(12, 2, 2, 2)
    turned = gradient(bench(diffusion_dpo(2), swapped))
    assert_close({n: -g for n, g in turned.items()}, gradient(bench(diffusion_dpo(2))))


def test_sft_is_plain_flow_matching() -> None:
    """Σ over samples and draws of mean (v − (ε − x0))², by hand in float64 at the loop's own (t, ε)."""
    algorithm, latents = sft(3), some_latents(6)
    got = gradient(bench(algorithm, latents))
    ids = [(0, slot, 0) for slot in range(6)]
    model = Fake()
    model.network.double()
    t, noise = algorithm.first.renoise(5, ids, model.schedule(1, SIZE), (2, 2, 2))  # 5: the bench's seed
    x0, noise = latents.double().repeat_interleave(3, 0), noise.double().flatten(0, 1)
    tokens = model.encode(asked(PROMPTS), SIZE).tensors["embeds"].double().repeat_interleave(3, 0)
    velocity = model.network(corrupt(x0, noise, t.flatten()), t.flatten(), tokens)
    (velocity - (noise - x0)).square().mean().backward()
    want = {n: p.grad.float() for n, p in model.network.named_parameters() if p.grad is not None}
    assert_close(got, want, 2e-5)


@every
def test_batches_do_not_matter(name: str) -> None:
    want = gradient(bench(OFFLINE[name](), train_rows=1000))
    for rows in (1, 3, 7):
        assert_close(gradient(bench(OFFLINE[name](), train_rows=rows)), want, 2e-5)


# -------------------------------------------------------------------------------------------------------------- counts
def test_costs_have_no_rollout() -> None:
    assert diffusion_dpo().cost(0, 3) == Cost(0, 0, 3 * 2 * 4) and sft().cost(0, 3) == Cost(0, 0, 3 * 4)


@every
def test_counted_forwards_are_the_cost_and_nothing_is_drawn_decoded_or_rewarded(name: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("offline training asks for none")

    algorithm = OFFLINE[name](kl=0.1)
    run = bench(algorithm, reward=never, train_rows=5)
    run.model.decode = never  # type: ignore[method-assign]
    metrics = run.iterate()
    cost, counter = algorithm.cost(0, len(PROMPTS)), run.counter
    assert (counter.rollout, counter.decodes, counter.reward_calls) == (0, 0, 0)
    assert counter.train == counter.reference == cost.trained_edges == metrics["trained_edges"] > 0
    assert sum(run.model.rows) == counter.forwards
    assert metrics["zero_variance"] == 0 and metrics["failed_rewards"] == 0 and metrics["updates"] == 1
    assert not any(key.startswith("reward/") for key in metrics) and "diversity" not in metrics


def test_a_run_s_cost() -> None:
    base = {"name": "x", "iterations": 5, "algorithm": {"name": "diffusion_dpo"}, "data": {"prompts_per_iteration": 3}}
    cost = run_cost(Config.model_validate(base))
    assert cost.first == Cost(0, 0, 24) and cost.forwards == 5 * 24 * 2 and cost.stored_nodes == 6
    with pytest.raises(ValueError, match=r"25 updates share 24 trained edges.*nearest valid: 24"):
        Config.model_validate({**base, "optimizer": {"updates_per_iteration": 25}})


# ------------------------------------------------------------------------------------------------------------ the rest
@every
def test_the_reference_never_moves_nor_gets_gradients(name: str) -> None:
    run = bench(OFFLINE[name](kl=0.1), updates=2)
    before = weights(run.model)
    for iteration in range(3):
        run.iterate(iteration)
    (held,) = run.context.sets["reference"].weights  # type: ignore[attr-defined]
    assert all(torch.equal(v, before[n]) for n, v in held.named().items())
    assert all(not v.requires_grad and v.grad is None for v in held.values)
    assert not same(weights(run.model), before)


def test_a_sample_that_is_not_finite_is_failed_and_left_out() -> None:
    """Its pair teaches nothing and counts in the mean; the others teach what they would have."""
    latents = some_latents()
    latents[4] = float("nan")
    broken = gradient(bench(diffusion_dpo(2), latents))
    whole = some_latents()
    whole[4] = whole[5]  # a pair of equal samples has no gradient
    assert_close(broken, gradient(bench(diffusion_dpo(2), whole)))
    run = bench(sft(2), latents)
    metrics = run.iterate()
    assert metrics["failed_rewards"] == 1 and metrics["trained_edges"] == 5 * 2


def test_grid_times_come_from_the_model_s_grid_of_that_many_steps() -> None:
    renoise = replace(sft().first.renoise, times=GridTimes(1.0))  # type: ignore[attr-defined]
    algorithm = replace(phased(sft(), renoise=renoise), steps=4)
    assert algorithm.cost(0, 1) == Cost(0, 0, 4)
    run = bench(algorithm)
    assert run.iterate()["trained_edges"] == 4 * len(PROMPTS)
    assert run.context.schedule.steps == 4


PAIR = OfflineSamples(("chosen", "rejected"), (1.0, 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plan": lambda i, s: plan.ode(1, 2)},
            r"plan: grows a rollout beside offline samples \('chosen', 'rejected'\)",
        ),
        ({"offline": OfflineSamples(("image",), (1.0,))}, r"plan: grows a rollout"),
        ({"offline": None}, r"steps: 1, but the plan has 0"),
        ({"phases": (EdgePhase(clipped(0.1, 0.1)),)}, r"phases: one learns from edges, and offline samples have none"),
        ({"dynamics": FlowSDE(0.7)}, r"dynamics: is a rollout's, and samples are given in its place"),
        ({"draft": Draft(4, 2)}, r"draft: is a rollout's"),
        ({"latent_reward": "folder"}, r"latent_reward: is a rollout's"),
        ({"grid": lambda i, schedule: schedule}, r"grid: is a rollout's"),
    ],
)
def test_parts_of_a_rollout_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(diffusion_dpo(), **changes)


def test_bad_arguments_and_sizes() -> None:
    check_errors(
        diffusion_dpo,
        [
            ({"pairs": 0}, "pairs: 0 must be at least 1"),
            ({"beta": 0.0}, "beta: 0.0 must be finite and above 0; 2000.0 is usual"),
            ({"kl": -1.0}, "kl: -1.0 must be finite and ≥ 0"),
        ],
    )
    check_errors(sft, [({"pairs": 0}, "pairs: 0 must be at least 1"), ({"kl": float("nan")}, "kl: nan must be")])


def test_which_sets_are_asked() -> None:
    assert diffusion_dpo().sets == ("reference",) and sft().sets == () and sft(kl=0.1).sets == ("reference",)
