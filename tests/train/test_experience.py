"""One iteration: what it costs, what it leaves out, and what its result must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, flow, same, tempflow, weights
from PIL import Image
from torch import Tensor

from tempflow.algorithms import Algorithm, diffusion_nft
from tempflow.algorithms.lesson import Batch
from tempflow.media import Media, Size
from tempflow.train.experience import Experience, credit
from tempflow.train.update import predictors

Images = list[Image.Image]


def gradient(bench: Bench, experience: Experience | None = None) -> dict[str, Tensor]:
    """What the (single) update's backward left on the parameters, unclipped."""
    bench.context = replace(bench.context, max_grad_norm=1e9)
    bench.update(bench.collect() if experience is None else experience)
    return {n: p.grad.clone() for n, p in bench.model.network.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-4) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-6)
    assert a.keys() == b.keys() and max(float(t.abs().max()) for t in a.values()) > 1e-3


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("make", [tempflow, flow])
def test_the_counter_equals_a_hook_on_the_network_and_the_plans_cost(make: Any, kl: float) -> None:
    bench = Bench(algorithm=make(kl=kl), updates=2, rollout_rows=7, train_rows=5)
    for iteration in range(2):
        metrics = bench.iterate(iteration)
        cost = bench.context.algorithm.cost(iteration, len(PROMPTS))
        counter = bench.counter
        assert metrics["trained_edges"] == cost.trained_edges  # every group has spread here
        assert counter.rollout == (iteration + 1) * cost.forwards
        assert counter.train == (iteration + 1) * cost.trained_edges
        assert counter.reference == (counter.train if kl else 0)
        assert counter.old == (iteration + 1) * bench.context.algorithm.old_forwards(cost.trained_edges, 2)
        assert counter.old == counter.train // 2, "the first update's old log-probs are its own forward's"
        assert counter.decodes == counter.reward_calls == (iteration + 1) * cost.leaves
        assert sum(bench.model.rows) == counter.forwards
        assert counter.forwards == counter.rollout + counter.train + counter.reference + counter.old
        assert max(bench.model.rows) <= 7
        assert counter.equivalents == counter.rollout + 3 * counter.train + counter.reference + counter.old


def test_default_costs_per_prompt() -> None:
    assert tempflow(steps=10, seeds=4, branches=6).cost(0, 1).forwards == 1116
    assert flow(steps=10, group=24).cost(0, 1).forwards == 240


@pytest.mark.parametrize("algorithm", [tempflow(kl=0.1), flow(kl=0.1)], ids=["tempflow", "flow"])
def test_results_do_not_depend_on_rollout_rows_or_train_rows(algorithm: Algorithm) -> None:
    """Gradients agree to rounding: accumulation over micro-batches equals one batch."""
    want = gradient(Bench(algorithm=algorithm, rollout_rows=1000, train_rows=1000))
    for rollout_rows, train_rows in ((3, 1000), (1000, 1), (5, 7)):
        assert_close(gradient(Bench(algorithm=algorithm, rollout_rows=rollout_rows, train_rows=train_rows)), want)


def test_chunks_of_prompts_change_nothing() -> None:
    whole = Bench().collect()
    bench = Bench(rollout_leaves=40)  # 18 leaves a prompt: two prompts at once
    parts = bench.collect()
    torch.testing.assert_close(parts.forest.nodes, whole.forest.nodes)
    assert torch.equal(parts.forest.edges.prompt, whole.forest.edges.prompt)
    assert torch.equal(parts.scores.value, whole.scores.value)
    assert bench.counter.rollout == bench.context.algorithm.cost(0, 6).forwards
    steps, chunks = 4, 3
    assert len(bench.model.rows) == steps * chunks


def test_leaf_latents_are_dropped_after_scoring() -> None:
    experience = Bench().collect()
    early = experience.forest.edges.step.max() < 3
    assert bool(early) and bool((experience.forest.leaves.node == -1).all())


@pytest.mark.parametrize("kind", ["states", "samples"])
def test_samples_are_decoded_and_noised_anew_and_states_stay(kind: str) -> None:
    """Where a leaf is not yet a sample (`Schedule.gain`); a trajectory's transitions are between states."""
    decoded: list[Tensor] = []

    class Looking(Fake):
        def decode(self, x: Tensor, size: Size) -> Media:
            decoded.append(x)
            return super().decode(x, size)

    algorithm = diffusion_nft(steps=4, group=6) if kind == "samples" else flow()
    grown: list[Tensor] = []
    for gain in (1.0, 2.0):
        bench = Bench(Looking(), algorithm)
        bench.context = replace(bench.context, schedule=replace(bench.context.schedule, gain=gain))
        experience = bench.collect()
        batch = bench.batch(
            experience, credit(bench.context, experience), bench.items(experience, credit(bench.context, experience))
        )
        grown.append(batch.x0 if kind == "samples" else batch.x)
    assert torch.equal(decoded[1], 2 * decoded[0])
    assert torch.equal(grown[1], 2 * grown[0] if kind == "samples" else grown[0])


def test_two_iterations_of_one_seed_are_bit_equal_and_another_seed_differs() -> None:
    a, b, c = Bench(updates=2), Bench(updates=2), Bench(updates=2, seed=6)
    for iteration in range(2):
        first, second, third = (bench.iterate(iteration) for bench in (a, b, c))
        assert first == second != third
    assert same(weights(a.model), weights(b.model)) and not same(weights(a.model), weights(c.model))


def part_flat(images: Images, prompts: list[str]) -> list[float | None]:
    """Three of the six prompts get equal rewards."""
    flat = set(PROMPTS[::2])
    return [0.5 if p in flat else r for p, r in zip(prompts, brightness(images, prompts), strict=True)]


@pytest.mark.parametrize("make", [tempflow, flow])
def test_groups_without_spread_are_not_computed_but_count_in_the_mean(make: Any) -> None:
    bench = Bench(algorithm=make(), reward=part_flat)
    got = gradient(bench)
    edges = bench.context.algorithm.cost(0, 6).trained_edges
    assert bench.counter.train == edges // 2

    explicit = Bench(algorithm=make(), reward=part_flat)
    experience, context = explicit.collect(), explicit.context
    forest, algorithm = experience.forest, context.algorithm
    given = credit(context, experience)
    every = forest.edges.trained.nonzero()[:, 0]
    assert len(every) == edges and bool((given.advantage.value[every] == 0).sum() == edges // 2)
    batch = Batch(every, torch.zeros_like(every), torch.arange(edges), edges, edges, 1)
    edges_of_batch = explicit.batch(experience, given, batch)
    algorithm.objective(predictors(context, experience.prompts), edges_of_batch).value.backward()
    assert_close(got, {n: p.grad for n, p in explicit.model.network.named_parameters() if p.grad is not None})


def test_zero_variance_is_reported_and_all_flat_makes_no_update() -> None:
    assert Bench(reward=part_flat).iterate()["zero_variance"] == pytest.approx(0.5)
    bench = Bench(reward=lambda images, prompts: [0.25] * len(images))
    before = weights(bench.model)
    metrics = bench.iterate()
    assert metrics["zero_variance"] == 1 and metrics["updates"] == metrics["trained_edges"] == 0
    assert bench.counter.train == 0 and same(weights(bench.model), before)
    assert all(math.isfinite(v) for v in metrics.values())


def test_failed_rewards_reduce_the_valid_edges() -> None:
    """A prompt whose pictures all failed is as if it had not been drawn: the mean runs over the others."""

    def fails(images: Images, prompts: list[str]) -> list[float | None]:
        scores = brightness(images, prompts)
        return [None if p == PROMPTS[-1] else r for p, r in zip(prompts, scores, strict=True)]

    failing = Bench(reward=fails)
    metrics_edges = failing.context.algorithm.cost(0, 6).trained_edges
    got = gradient(failing)
    assert failing.counter.train == metrics_edges * 5 // 6
    without = Bench()
    assert_close(got, gradient(without, without.collect(prompts=PROMPTS[:-1])))


def test_some_failed_pictures_leave_their_groups_others() -> None:
    calls = []

    def fails(images: Images, prompts: list[str]) -> list[float | None]:
        calls.append(len(images))
        return [None if n % 9 == 0 else r for n, r in enumerate(brightness(images, prompts))]

    bench = Bench(reward=fails)
    metrics = bench.iterate()
    assert metrics["failed_rewards"] == 12 and sum(calls) == 108
    assert metrics["trained_edges"] == 96


def test_updates_per_iteration_share_the_edges() -> None:
    one, three = Bench(updates=1), Bench(updates=3)
    a, b = one.iterate(), three.iterate()
    assert (a["updates"], b["updates"]) == (1, 3)
    assert one.counter.train == three.counter.train == 108
    assert a["log_ratio_max"] == 0 and b["log_ratio_max"] > 1e-5  # later updates are off-policy
    assert one.counter.old == 0 and three.counter.old == 72
    assert not same(weights(one.model), weights(three.model))
    assert all(int(state["step"]) == 3 for state in three.optimizer.state.values())


def test_with_a_still_policy_shared_updates_average_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """rate 0: the mean over the updates' gradients is the gradient of one update; none of them carries another's."""
    taken: list[list[Tensor]] = []
    three = Bench(rate=0.0, updates=3, max_grad_norm=1e9)

    def step() -> None:
        taken.append([p.grad.clone() for p in three.trainable.masters if p.grad is not None])

    monkeypatch.setattr(three.optimizer, "step", step)
    three.iterate()
    assert len(taken) == 3
    mean = {n: torch.stack(g).mean(0) for n, g in zip(three.trainable.names, zip(*taken, strict=True), strict=True)}
    assert_close(mean, gradient(Bench(rate=0.0)))


def test_every_iteration_draws_its_own_noise_and_order() -> None:
    bench = Bench()
    first, again, second = bench.collect(0), bench.collect(0), bench.collect(1)
    assert torch.equal(first.forest.nodes, again.forest.nodes)
    shared = (first.forest.nodes[:, None] == second.forest.nodes[None]).flatten(2).all(2)
    assert not bool(shared.any())


def test_the_average_is_updated_once_an_optimizer_step() -> None:
    bench = Bench(ema=0.9, updates=3)
    start = weights(bench.model)
    bench.iterate()
    assert bench.average.updates == 3
    now = weights(bench.model)
    for name, value in zip(bench.trainable.names, bench.average.values, strict=True):
        moved, mean = (now[name] - start[name]).abs().sum(), (value - start[name]).abs().sum()
        assert 0 < float(mean) < float(moved)


def test_gradients_are_clipped_to_the_norm() -> None:
    bench = Bench(max_grad_norm=1e-3)
    metrics = bench.iterate()
    norm = torch.stack([p.grad.norm() for p in bench.trainable.masters if p.grad is not None]).norm()
    assert metrics["grad_norm"] > 1e-2 and float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_trains_float32_masters() -> None:
    bench = Bench(Fake(dtype=torch.bfloat16), rate=1e-4)
    start, masters = weights(bench.model), bench.trainable.state()
    metrics = bench.iterate()
    assert bench.collect().forest.nodes.dtype == torch.float32
    assert metrics["log_ratio_max"] == 0
    moved = {n: float((t - masters[n]).abs().max()) for n, t in bench.trainable.state().items()}
    assert all(0 < m < 2e-4 for m in moved.values())
    assert torch.equal(weights(bench.model)["mean.weight"][0], start["mean.weight"][0])  # .3 + 1e-4 rounds back to .3
    assert all(bool((t != start[n]).any()) for n, t in weights(bench.model).items() if n == "mean.bias")
    for name, master in bench.trainable.state().items():
        assert torch.equal(weights(bench.model)[name], master.bfloat16())


@pytest.mark.parametrize("make", [tempflow, flow])
def test_iterations_raise_the_reward(make: Any) -> None:
    bench = Bench(algorithm=make(), rate=0.05)
    rewards = [bench.iterate(i)["reward/brightness"] for i in range(12)]
    assert rewards[-1] > rewards[0] + 0.05


def test_a_strong_kl_holds_the_policy_back() -> None:
    """The same run with a heavy KL stays nearer to the start."""
    free, held = Bench(rate=0.05), Bench(algorithm=tempflow(kl=5.0), rate=0.05)
    start = weights(free.model)
    for i in range(8):
        free.iterate(i)
        metrics = held.iterate(i)
    distance = [sum(float((t - start[n]).norm()) for n, t in weights(b.model).items()) for b in (free, held)]
    assert metrics["kl"] > 0 and distance[1] < 0.7 * distance[0]
