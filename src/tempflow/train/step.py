"""One iteration but for its updates (`learn`): roll out, score, observe, give credit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.core.credit import Advantage
from tempflow.core.credit import Credit as CreditRule
from tempflow.core.draft import Draft, agreement, from_noises
from tempflow.core.dynamics import ODE
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.models.finite import GIVEN, WHOLE, Decoded, decoded, encoded
from tempflow.models.protocol import Predict
from tempflow.rewards import score_all
from tempflow.train.conditions import sampler
from tempflow.train.dist import World
from tempflow.train.laid import laid_out
from tempflow.train.setting import Clock, Counter, Setting
from tempflow.train.signals import Signals, measure

NO_EDGES = torch.zeros(0, dtype=torch.long)
"""What is kept of a rollout's edges where leaves are trained: their states are freed."""

LEAVES_AT_ONCE = 1024
"""A rollout advances in chunks of whole prompts with about this many leaves; each is decoded, scored and dropped."""


@dataclass(frozen=True, eq=False)
class Experience:
    """What one iteration's rollout brought, or the samples given in its place.

    forest     this rank's part; without leaf latents, unless leaves are trained: then they stand as its edges
    whole      all ranks' edges (or leaves in their stead) and leaves, without states
    first      where this rank's edges start among the whole's
    numbers    LongTensor [E], an edge's place among those of its prompt slot
    scores     of the whole's leaves
    signals    of the whole's leaves, by prompt slot
    models     this rank's predictors by weight set
    judged     a latent reward's scores of the whole's edges; None without one
    schedule   the grid that was walked
    iteration  which one it is, from 0
    fidelity   [P] how the draft ranked the chosen noises beside the regenerated pictures; None without a draft
    broken     LongTensor, which of the whole's leaves are no pictures, and why (`models.finite`)
    drafts     the same of the drafts, a pool for each prompt; None without a draft
    """

    forest: Forest
    whole: Forest
    first: int
    numbers: Tensor
    scores: Scores
    signals: Signals
    models: Mapping[str, Predict]
    judged: Scores | None
    schedule: Schedule
    iteration: int
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None

    @property
    def credited(self) -> tuple[Scores, Forest]:
        """The scores that credit sees, and the forest whose leaves they are of."""
        return (self.scores, self.whole) if self.judged is None else (self.judged, self.whole.as_candidates())

    def rule(self, credit: CreditRule) -> CreditRule:
        """How these are credited: a latent reward's scores are one column, without the weights of pictures' rewards."""
        return credit if self.judged is None else credit.weighted(None)


def collect(setting: Setting, prompts: Sequence[Prompt], iteration: int, counter: Counter, clock: Clock) -> Experience:
    """Grows this rank's part of the iteration's forest, decodes and scores its leaves chunk by chunk; or, where samples
    are given, lays these out.

    The counter counts all ranks' work.
    """
    algorithm, world = setting.algorithm, setting.world
    schedule = algorithm.schedule(iteration, setting.schedule)
    plans = [algorithm.plan(iteration, slot) for slot in range(len(prompts))]
    blocks = [world.block(len(prompts), rank) for rank in range(world.size)]
    mine = blocks[world.rank]
    bound = _binder(setting, [prompts[slot].text for slot in mine], mine.start)
    models = {"policy": bound(None)} | {name: bound(network) for name, network in setting.sets.items()}
    own = drafter = models[algorithm.sampler]
    if setting.drafter is not None:
        started = time.perf_counter()
        drafter = bound(setting.drafter.fresh())
        clock.add("draft", started)
    tour = _Tour(setting, plans, prompts, iteration, schedule, own, drafter, clock)
    grow = tour.grow if algorithm.given is None else tour.lay_out
    grown = [grow(slots) for slots in _chunks(plans, mine)]
    leaves = [plan.cost().leaves for plan in plans]
    costs = [algorithm.cost_of(plan) for plan in plans]
    counter.rollout += sum(cost.forwards for cost in costs)
    counter.draft += 0 if algorithm.draft is None else algorithm.draft.cost().forwards * len(plans)
    counter.decodes += sum(cost.leaves for cost in costs)
    counter.reward_calls += sum(cost.leaves for cost in costs) * len(setting.rewards)
    scores = Scores.cat([part.scores for part in grown])
    signals = Signals.cat([part.signals for part in grown])
    counts = [sum(leaves[slot] for slot in block) for block in blocks]
    forest, whole = Forest.cat([part.forest for part in grown]), skeleton(plans, range(len(plans)))
    if algorithm.draws is not None:
        forest, whole = forest.as_leaves(), whole.as_leaves()
    edges = [sum(int((whole.edges.prompt == slot).sum()) for slot in block) for block in blocks]
    return Experience(
        forest=forest,
        whole=_with_traits(world, forest, whole, edges, counts),
        first=sum(edges[: world.rank]),
        numbers=_numbers(whole.edges.prompt),
        scores=Scores(world.gather(scores.value, counts), world.gather(scores.ok, counts), scores.names),
        signals=Signals(*(world.gather(t, [len(b) for b in blocks]) for t in astuple(signals))),
        models=models,
        judged=None if setting.judge is None else _judged(setting, prompts, mine, forest, schedule, edges, counter),
        schedule=schedule,
        iteration=iteration,
        broken=world.gather(torch.cat([part.broken for part in grown]), counts),
        fidelity=_gathered(world, [part.fidelity for part in grown], [len(b) for b in blocks]),
        drafts=_gathered(
            world,
            [part.drafts for part in grown],
            [len(b) * (algorithm.draft.pool if algorithm.draft is not None else 0) for b in blocks],
        ),
    )


def _gathered(world: World, parts: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return world.gather(torch.cat(given), counts) if given else None


def _judged(
    setting: Setting,
    prompts: Sequence[Prompt],
    mine: range,
    forest: Forest,
    schedule: Schedule,
    counts: Sequence[int],
    counter: Counter,
) -> Scores:
    """The latent reward's scores of all ranks' edges, each at the σ of the state it reaches."""
    assert setting.judge is not None
    judge, edges = setting.judge(encoded(setting.model, [prompts[slot].text for slot in mine])), forest.edges
    sigma = schedule.after(edges.step.cpu()).to(forest.nodes)
    scores = judge(forest.nodes[edges.child], sigma, edges.prompt - mine.start)
    counter.reward_calls += sum(counts)
    counter.latent += sum(counts)
    value, ok = (setting.world.gather(t.cpu(), counts) for t in (scores.value, scores.ok))
    return Scores(value, ok, scores.names)


def _with_traits(world: World, forest: Forest, whole: Forest, edges: Sequence[int], leaves: Sequence[int]) -> Forest:
    """The whole with all ranks' observations."""
    of_edges = {name: world.gather(t.cpu(), edges) for name, t in forest.edges.traits.items()}
    of_leaves = {name: world.gather(t.cpu(), leaves) for name, t in forest.leaves.traits.items()}
    return replace(whole, edges=replace(whole.edges, traits=of_edges), leaves=replace(whole.leaves, traits=of_leaves))


def _numbers(slot: Tensor) -> Tensor:
    """Each row's place among those of its slot; rows of a slot are neighbours."""
    start = torch.ones_like(slot, dtype=torch.bool)
    start[1:] = slot[1:] != slot[:-1]
    place = torch.arange(len(slot))
    return place - torch.where(start, place, 0).cummax(0).values


@dataclass(frozen=True, eq=False)
class Credit:
    """Advantages and loss weights of the whole's edges (or leaves), on the CPU."""

    advantage: Advantage
    weight: Tensor


def credit(setting: Setting, experience: Experience) -> Credit:
    """The same on every rank: it needs all scores, but no states."""
    algorithm, whole = setting.algorithm, experience.whole
    advantage = experience.rule(algorithm.credit)(*experience.credited)
    if algorithm.dynamics is None:
        return Credit(advantage, torch.ones_like(advantage.value))
    return Credit(advantage, algorithm.weight(whole, experience.schedule, algorithm.dynamics))


@dataclass(frozen=True, eq=False)
class _Grown:
    """`fidelity` [P]: Kendall's τ between a draft's scores and the regenerated pictures', prompt by prompt; `broken`,
    `drafts`: as in `Experience`."""

    forest: Forest
    scores: Scores
    signals: Signals
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Tour:
    """What the chunks of one rollout share."""

    setting: Setting
    plans: Sequence[Plan]
    prompts: Sequence[Prompt]
    iteration: int
    schedule: Schedule
    sampler: Predict
    drafter: Predict
    clock: Clock

    def grow(self, slots: Sequence[int]) -> _Grown:
        """A chunk of whole prompts: rolled out, decoded, scored, measured, observed."""
        algorithm = self.setting.algorithm
        plans, drafted, drafts = [self.plans[s] for s in slots], None, None
        if algorithm.draft is not None:
            plans, drafted, drafts = self._drafted(algorithm.draft, slots, plans)
        forest, seen, scores = self._judged(slots, plans, self.schedule, self._sampler(slots), "rollout")
        media = seen.media
        latents = forest.nodes[forest.leaves.node]
        started = time.perf_counter()
        total, ok = scores.total(algorithm.credit.reward_weights)
        # where a latent reward trains, the pictures' failures are to look at: no group is left out for them
        counted = ok if self.setting.judge is None else None
        signals = measure(latents, media, forest.leaves.prompt, counted, self.setting.figures)
        forest = observed(algorithm, forest, media)
        self.clock.add("signals", started)
        kept = forest.drop_leaf_states() if algorithm.draws is None else forest.select(NO_EDGES)
        fidelity = None
        if drafted is not None and len(drafted) == len(total):  # a root has one leaf
            fidelity = agreement(drafted, total, forest.leaves.prompt.cpu(), slots)
        return _Grown(kept, scores, signals, seen.broken, fidelity, drafts)

    def lay_out(self, slots: Sequence[int]) -> _Grown:
        """A chunk of whole prompts' given samples, in the place of `grow`."""
        setting, given, started = self.setting, self.setting.algorithm.given, time.perf_counter()
        assert given is not None and setting.pictures is not None
        setting.pause()
        prompts = [self.prompts[s] for s in slots]
        forest, scores, signals = laid_out(given, setting.pictures, setting.model, setting.size, prompts, slots)
        self.clock.add("encode", started)
        return _Grown(forest, scores, signals, torch.where(scores.ok[:, 0].cpu(), WHOLE, GIVEN))

    def _drafted(self, draft: Draft, slots: Sequence[int], plans: Sequence[Plan]) -> tuple[list[Plan], Tensor, Tensor]:
        """The plans from the noises that the draft chose, the draft's scores of these, root by root, and which drafts
        broke."""
        setting = self.setting
        schedule = setting.model.schedule(draft.steps, setting.size)
        _, seen, scores = self._judged(slots, [draft.plan] * len(slots), schedule, self.drafter, "draft")
        value, ok = (t.view(len(slots), draft.pool) for t in scores.total(setting.algorithm.credit.reward_weights))
        stream = Stream(setting.seed, "draft.choice")
        starts = [
            draft.choose(v, o, plan.roots, stream, (self.iteration, slot))
            for v, o, plan, slot in zip(value, ok, plans, slots, strict=True)
        ]
        chosen = torch.cat([v[list(start)] for v, start in zip(value, starts, strict=True)])
        return [from_noises(plan, start) for plan, start in zip(plans, starts, strict=True)], chosen, seen.broken

    def _judged(
        self, slots: Sequence[int], plans: Sequence[Plan], schedule: Schedule, predict: Predict, phase: str
    ) -> tuple[Forest, Decoded, Scores]:
        """Those plans rolled out, on the clock as `phase`; their leaves' pictures and scores."""
        setting, clock, started = self.setting, self.clock, time.perf_counter()
        forest = self._rollout(slots, plans, schedule, predict)
        started = clock.add(phase, started)
        seen = decoded(setting.model, forest.nodes[forest.leaves.node], setting.size)
        started = clock.add("decode", started)
        slot = forest.leaves.prompt.tolist()
        owner = [self.prompts[s] for s in slot]
        texts, metadata = [p.text for p in owner], [p.metadata for p in owner]
        scores = score_all(setting.rewards, seen.media, texts, metadata, slot, sound=seen.ok, pause=setting.pause)
        clock.add("reward", started)
        return forest, seen, scores

    def _sampler(self, slots: Sequence[int]) -> Predict:
        """The predictor that rolls out: as in training, or with the chunk's own conditions where there are some."""
        conditions = self.setting.algorithm.conditions
        if conditions is None:
            return self.sampler
        return sampler(self.setting, conditions, [self.prompts[slot].text for slot in slots], slots[0])

    def _rollout(self, slots: Sequence[int], plans: Sequence[Plan], schedule: Schedule, predict: Predict) -> Forest:
        setting, algorithm = self.setting, self.setting.algorithm

        def patient(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            setting.pause()
            return predict(x, sigma, rows)

        return rollout(
            plans,
            algorithm.dynamics or ODE(),
            schedule,
            patient,
            Noise(setting.seed, self.iteration),
            shape=setting.model.noise_shape(setting.size),
            slots=slots,
            solver=algorithm.solver,
            variants=algorithm.variants,
            max_rows=setting.rollout_rows,
            keep_mean=algorithm.draws is None and algorithm.edge_objective.keeps_peers,
            device=setting.model.device,
        )


def observed(algorithm: Algorithm, forest: Forest, media: Tensor) -> Forest:
    """The forest with what the algorithm wants to know of it as traits."""
    seen = {o.name: (o.of, o(forest, media)) for o in algorithm.observe}
    of_edges = {name: value for name, (of, value) in seen.items() if of == "edge"}
    of_leaves = {name: value for name, (of, value) in seen.items() if of == "leaf"}
    return replace(
        forest, edges=replace(forest.edges, traits=of_edges), leaves=replace(forest.leaves, traits=of_leaves)
    )


def _binder(setting: Setting, texts: Sequence[str], first: int) -> Callable[[nn.Module | None], Predict]:
    """Network (None: the policy's) -> predictor of slots of the iteration, of which this rank encodes its own."""
    model = setting.model
    condition = encoded(model, texts)

    def bound(network: nn.Module | None) -> Predict:
        predict = model.predictor(condition, setting.guidance, network=network)
        return lambda x, sigma, rows: predict(x, sigma, rows - first)

    return bound


def _chunks(plans: Sequence[Plan], slots: range) -> list[list[int]]:
    chunks: list[list[int]] = []
    leaves = LEAVES_AT_ONCE
    for slot in slots:
        leaves += plans[slot].cost().leaves
        if leaves > LEAVES_AT_ONCE:
            chunks.append([])
            leaves = plans[slot].cost().leaves
        chunks[-1].append(slot)
    return chunks


def rollout_metrics(experience: Experience, advantage: Advantage) -> dict[str, float]:
    """Reward means and spreads (given samples have none), failures, the share of trained edges without spread.

    A latent reward's mean is over all of an iteration's candidates, whose σ are the same in each, and failures are its.
    Edges of prompts that a credit leaves out for that reason count in the share.
    """
    scores, metrics, seen = experience.scores, dict[str, float](), advantage.pool or advantage
    for column, name in enumerate(scores.names if experience.whole.steps else ()):
        value = scores.value[scores.ok[:, column], column]
        metrics[f"reward/{name}"] = value.mean().item() if len(value) else float("nan")
        metrics[f"reward_std/{name}"] = value.std(unbiased=False).item() if len(value) else float("nan")
    if experience.judged is not None and bool(experience.judged.ok.any()):
        metrics["latent_reward"] = experience.judged.value[experience.judged.ok].mean().item()
    trained = experience.whole.edges.trained & seen.ok
    metrics["failed_rewards"] = int((~experience.credited[0].ok).any(1).sum())
    metrics["zero_variance"] = 1 - (trained & seen.live).sum().item() / max(1, int(trained.sum()))
    if experience.fidelity is not None and bool(experience.fidelity.isfinite().any()):
        metrics["draft/kendall"] = experience.fidelity.nanmean().item()
    measured = {name: value for name, value in experience.signals.metrics().items() if math.isfinite(value)}
    return metrics | measured
