"""One iteration: roll out and score, give credit, update. The whole of RL is in this file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.core.credit import Advantage
from tempflow.core.forest import Forest
from tempflow.core.objective.ratio import EdgeBatch
from tempflow.core.plan import Plan
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.models.protocol import Model, Predict, Size
from tempflow.rewards import score_all
from tempflow.rewards.protocol import Reward
from tempflow.train import guards
from tempflow.train.weights import Average, Trainable

LEAVES_AT_ONCE = 1024
"""A rollout advances in chunks of whole prompts with about this many leaves; each is decoded, scored and dropped."""


@dataclass
class Counter:
    """Rows given to the network so far (guidance not doubled), media decoded, and reward calls."""

    rollout: int = 0
    train: int = 0
    reference: int = 0
    decodes: int = 0
    reward_calls: int = 0

    @property
    def forwards(self) -> int:
        return self.rollout + self.train + self.reference


@dataclass
class Clock:
    """Wall time by phase, in seconds; kept apart from metrics, which must be equal from run to run."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since
        return now


@dataclass(frozen=True, eq=False)
class Setting:
    """What stays the same over a run."""

    model: Model
    algorithm: Algorithm
    schedule: Schedule
    size: Size
    guidance: float
    rewards: Sequence[Reward]
    seed: int
    rollout_rows: int
    train_rows: int
    updates: int
    max_grad_norm: float
    reference: nn.Module | None


@dataclass(frozen=True, eq=False)
class Experience:
    """What one iteration's rollout brought: the forest without leaf latents, the leaves' scores, and its predictors."""

    forest: Forest
    scores: Scores
    models: Mapping[str, Predict]


def collect(setting: Setting, prompts: Sequence[Prompt], iteration: int, counter: Counter, clock: Clock) -> Experience:
    """Grows the iteration's forest, decodes and scores its leaves chunk by chunk."""
    model, algorithm = setting.model, setting.algorithm
    started = time.perf_counter()
    condition = model.encode([p.text for p in prompts])
    predict = model.predictor(condition, setting.guidance)
    plans = [algorithm.plan(iteration, slot) for slot in range(len(prompts))]
    noise, shape = Noise(setting.seed, iteration), model.noise_shape(setting.size)
    forests, scores = [], []
    for slots in _chunks(plans):
        forest = rollout(
            [plans[s] for s in slots],
            algorithm.dynamics,
            setting.schedule,
            predict,
            noise,
            shape=shape,
            slots=slots,
            max_rows=setting.rollout_rows,
            device=model.device,
        )
        started = clock.add("rollout", started)
        media = model.decode(forest.nodes[forest.leaves.node], setting.size)
        started = clock.add("decode", started)
        owner = [prompts[p] for p in forest.leaves.prompt.tolist()]
        scores.append(
            score_all(
                setting.rewards,
                media,
                [p.text for p in owner],
                [p.metadata for p in owner],
                groups=forest.leaves.prompt.tolist(),
            )
        )
        started = clock.add("reward", started)
        counter.rollout += sum(plans[s].cost().forwards for s in slots)
        counter.decodes += len(media)
        counter.reward_calls += len(media) * len(setting.rewards)
        forests.append(forest.drop_leaf_states())
    models = {"policy": predict}
    if setting.reference is not None:
        models["reference"] = model.predictor(condition, setting.guidance, network=setting.reference)
    return Experience(Forest.cat(forests), Scores.cat(scores), models)


def _chunks(plans: Sequence[Plan]) -> list[list[int]]:
    chunks: list[list[int]] = []
    leaves = LEAVES_AT_ONCE
    for slot, plan in enumerate(plans):
        leaves += plan.cost().leaves
        if leaves > LEAVES_AT_ONCE:
            chunks.append([])
            leaves = plan.cost().leaves
        chunks[-1].append(slot)
    return chunks


def update(
    setting: Setting,
    experience: Experience,
    trainable: Trainable,
    average: Average,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    counter: Counter,
    clock: Clock,
) -> dict[str, float]:
    """Trains on one iteration's edges; returns its metrics.

    An update's loss is a mean over its share of all valid trained edges. Edges of groups without spread have advantage
    0; they count in that mean but are not computed (so they bear no KL either, as in the official codes, which drop
    them). Raises GuardError before the weights move when something is not finite, no reward is valid, or the log ratio
    of the very first update is not 0.
    """
    algorithm, forest, scores = setting.algorithm, experience.forest, experience.scores
    guards.check_rewards(int(scores.total(algorithm.credit.reward_weights)[1].sum()), len(scores), iteration)
    started = time.perf_counter()
    advantage = algorithm.credit(scores, forest)
    weight = algorithm.weight(forest, setting.schedule, algorithm.dynamics)
    trained = forest.edges.trained & advantage.live
    valid = int((forest.edges.trained & advantage.ok).sum())
    metrics = rollout_metrics(scores, forest, advantage)
    edges = trained.nonzero()[:, 0].cpu()
    order = Stream(setting.seed, "train.order").permutation((iteration,), len(edges))
    edges = edges[torch.tensor(order, dtype=torch.long)]
    sums: dict[str, float] = {}
    worst, norms, losses = 0.0, [], []
    for part in torch.tensor_split(edges, setting.updates):
        if len(part) == 0:
            continue
        trainable.zero_grad()
        total = 0.0
        for rows in torch.tensor_split(part, -(-len(part) // setting.train_rows)):
            batch = edge_batch(setting, forest, advantage, weight, rows.to(forest.nodes.device))
            loss = algorithm.objective(experience.models, batch)
            counter.train += len(rows)
            counter.reference += len(rows) * (setting.reference is not None)
            guards.check_finite_loss(loss.value, iteration)
            share = loss.value * (len(rows) * setting.updates / valid)
            share.backward()
            trainable.collect()
            total += share.item()
            worst = max(worst, loss.metrics["log_ratio_abs"].max().item())
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.sum().item()
        if not optimizer.state:  # nothing has moved yet; an iteration without spread moves nothing either
            guards.check_first_ratio(worst, algorithm.objective.tightest_clip)
        norms.append(guards.clip_gradients(trainable.masters, setting.max_grad_norm, iteration))
        optimizer.step()
        trainable.publish()
        average.update()
        losses.append(total)
    clock.add("train", started)
    metrics |= {name: value / max(1, len(edges)) for name, value in sums.items()}
    return metrics | {
        "trained_edges": len(edges),
        "updates": len(norms),
        "loss": sum(losses) / max(1, len(losses)),
        "grad_norm": max(norms, default=0.0),
        "log_ratio_max": worst,
    }


def edge_batch(setting: Setting, forest: Forest, advantage: Advantage, weight: Tensor, rows: Tensor) -> EdgeBatch:
    """The edges `rows`, ready for an objective."""
    edges = forest.edges
    return EdgeBatch(
        x=forest.nodes[edges.parent[rows]],
        y=forest.nodes[edges.child[rows]],
        step=edges.step[rows],
        scale=edges.scale[rows],
        rows=edges.prompt[rows],
        log_prob=edges.log_prob[rows],
        advantage=advantage.value[rows],
        weight=weight[rows],
        schedule=setting.schedule,
        dynamics=setting.algorithm.dynamics,
    )


def rollout_metrics(scores: Scores, forest: Forest, advantage: Advantage) -> dict[str, float]:
    """Reward means and spreads, failures, and the share of trained edges whose group has no spread."""
    metrics: dict[str, float] = {}
    for column, name in enumerate(scores.names):
        value = scores.value[scores.ok[:, column], column]
        metrics[f"reward/{name}"] = value.mean().item() if len(value) else float("nan")
        metrics[f"reward_std/{name}"] = value.std(unbiased=False).item() if len(value) else float("nan")
    trained = forest.edges.trained & advantage.ok
    metrics["failed_rewards"] = int((~scores.ok).any(1).sum())
    metrics["zero_variance"] = 1 - (trained & advantage.live).sum().item() / max(1, int(trained.sum()))
    return metrics
