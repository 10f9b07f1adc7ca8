"""One iteration but for its updates: roll out, decode, score, observe, give credit; or take offline samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.core.credit import Advantage, CreditRule
from tempflow.core.draft import Draft, agreement, from_noises
from tempflow.core.dynamics import ODE
from tempflow.core.forest import Forest
from tempflow.core.offline import OfflineSamples
from tempflow.core.plan import Plan
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.core.state import WHOLE as WHOLE_STATE
from tempflow.core.state import StateLayout
from tempflow.media import Size
from tempflow.models.finite import ADVICE, GIVEN, WHOLE, WHY, Decoded, decoded, encoded, finite_rows, told
from tempflow.models.protocol import Conditioning, Model, Predict, layout_of
from tempflow.request import Prompt
from tempflow.rewards import score_all
from tempflow.rewards.safe import faults
from tempflow.train.conditions import perturbed_predictor
from tempflow.train.context import Clock, Context, Counter, ReadPictures
from tempflow.train.guards import GuardError
from tempflow.train.parallel import World
from tempflow.train.signals import Signals, measure, measure_given

NO_EDGES = torch.zeros(0, dtype=torch.long)
"""What is kept of a rollout's edges where leaves are trained: their states are freed."""

LEAVES_AT_ONCE = 1024
"""A rollout advances in chunks of whole prompts with about this many leaves; each is decoded, scored and dropped."""


@dataclass(frozen=True, eq=False)
class Experience:
    """What one iteration's rollout brought, or the offline samples in its place.

    forest     this rank's part; without leaf latents, unless leaves are trained: then they stand as its edges
    whole      all ranks' edges (or leaves in their stead) and leaves, without states
    first      where this rank's edges start among the whole's
    numbers    LongTensor [E], an edge's place among those of its prompt slot
    scores     of the whole's leaves
    signals    of the whole's leaves, by prompt slot
    models     this rank's predictors by weight set
    latent_scores  a latent reward's scores of the whole's edges; None without one
    schedule   the grid that was walked
    iteration  which one it is, from 0
    fidelity   [P] how the draft ranked the chosen noises beside the regenerated pictures; None without a draft
    broken     LongTensor, which of the whole's leaves are no pictures, and why (`models.finite`)
    drafts     the same of the drafts, a pool for each prompt; None without a draft
    layout     of this rank's states, by prompt slot
    """

    forest: Forest
    whole: Forest
    first: int
    numbers: Tensor
    scores: Scores
    signals: Signals
    models: Mapping[str, Predict]
    latent_scores: Scores | None
    schedule: Schedule
    iteration: int
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None
    layout: StateLayout = WHOLE_STATE

    @property
    def credited(self) -> tuple[Scores, Forest]:
        """The scores that credit sees, and the forest whose leaves they are of."""
        return (
            (self.scores, self.whole)
            if self.latent_scores is None
            else (self.latent_scores, self.whole.as_candidates())
        )

    def rule(self, credit: CreditRule) -> CreditRule:
        """How these are credited: a latent reward's scores are one column, without the weights of pictures' rewards."""
        return credit if self.latent_scores is None else credit.weighted(None)


def collect(context: Context, prompts: Sequence[Prompt], iteration: int, counter: Counter, clock: Clock) -> Experience:
    """Grows this rank's part of the iteration's forest, decodes and scores its leaves chunk by chunk; or, where samples
    are given, lays these out.

    The counter counts all ranks' work.
    """
    algorithm, world = context.algorithm, context.world
    schedule = algorithm.schedule(iteration, context.schedule)
    plans = [algorithm.plan(iteration, slot) for slot in range(len(prompts))]
    blocks = [world.block(len(prompts), rank) for rank in range(world.size)]
    mine = blocks[world.rank]
    condition = encoded(context.model, [prompts[slot] for slot in mine], context.size)
    layout = layout_of(context.model, condition, context.size, mine.start).to(context.model.device)
    bound = _binder(context, condition, mine.start, layout)
    models = {"policy": bound(None)} | {name: bound(network) for name, network in context.sets.items()}
    own = drafter = models[algorithm.sampler]
    if context.drafter is not None:
        started = time.perf_counter()
        drafter = bound(context.drafter.fresh())
        clock.add("draft", started)
    collector = _Collector(context, plans, prompts, iteration, schedule, own, drafter, clock, layout)
    grow = collector.rollout if algorithm.offline is None else collector.offline
    chunks = [grow(slots) for slots in _chunks(plans, mine)]
    leaves = [plan.cost().leaves for plan in plans]
    costs = [algorithm.cost_of(plan) for plan in plans]
    counter.rollout += sum(cost.forwards for cost in costs)
    counter.draft += 0 if algorithm.draft is None else algorithm.draft.cost().forwards * len(plans)
    counter.decodes += sum(cost.leaves for cost in costs)
    counter.reward_calls += sum(cost.leaves for cost in costs) * len(context.rewards)
    scores = Scores.cat([part.scores for part in chunks])
    signals = Signals.cat([part.signals for part in chunks])
    counts = [sum(leaves[slot] for slot in block) for block in blocks]
    forest, whole = Forest.cat([part.forest for part in chunks]), skeleton(plans, range(len(plans)))
    if algorithm.renoise is not None:
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
        latent_scores=None
        if context.latent_reward is None
        else _score_latents(context, prompts, mine, forest, schedule, edges, counter),
        schedule=schedule,
        iteration=iteration,
        broken=world.gather(torch.cat([part.broken for part in chunks]), counts),
        fidelity=_gathered(world, [part.fidelity for part in chunks], [len(b) for b in blocks]),
        drafts=_gathered(
            world,
            [part.drafts for part in chunks],
            [len(b) * (algorithm.draft.pool if algorithm.draft is not None else 0) for b in blocks],
        ),
        layout=layout,
    )


def _gathered(world: World, parts: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return world.gather(torch.cat(there), counts) if there else None


def _score_latents(
    context: Context,
    prompts: Sequence[Prompt],
    mine: range,
    forest: Forest,
    schedule: Schedule,
    counts: Sequence[int],
    counter: Counter,
) -> Scores:
    """The latent reward's scores of all ranks' edges, each at the σ of the state it reaches."""
    assert context.latent_reward is not None
    condition = encoded(context.model, [prompts[slot] for slot in mine], context.size)
    score, edges = context.latent_reward(condition), forest.edges
    sigma = schedule.after(edges.step.cpu()).to(forest.nodes)
    scores = score(forest.nodes[edges.child], sigma, edges.prompt - mine.start)
    counter.reward_calls += sum(counts)
    counter.latent += sum(counts)
    value, ok = (context.world.gather(t.cpu(), counts) for t in (scores.value, scores.ok))
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
class Advantages:
    """Advantages and loss weights of the whole's edges (or leaves), on the CPU."""

    advantage: Advantage
    weight: Tensor


def credit(context: Context, experience: Experience) -> Advantages:
    """The same on every rank: it needs all scores, but no states."""
    algorithm, whole = context.algorithm, experience.whole
    advantage = experience.rule(algorithm.credit)(*experience.credited)
    experience.layout.check_advantages(advantage.streams)
    if algorithm.dynamics is None:
        return Advantages(advantage, torch.ones_like(advantage.flat(advantage.value)))
    return Advantages(advantage, algorithm.weight(whole, experience.schedule, algorithm.dynamics))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """`fidelity` [P]: Kendall's τ between a draft's scores and the regenerated pictures', prompt by prompt; `broken`,
    `drafts`: as in `Experience`."""

    forest: Forest
    scores: Scores
    signals: Signals
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Collector:
    """What the chunks of one rollout share."""

    context: Context
    plans: Sequence[Plan]
    prompts: Sequence[Prompt]
    iteration: int
    schedule: Schedule
    sampler: Predict
    drafter: Predict
    clock: Clock
    layout: StateLayout

    def rollout(self, slots: Sequence[int]) -> _Chunk:
        """A chunk of whole prompts: rolled out, decoded, scored, measured, observed."""
        algorithm = self.context.algorithm
        plans, drafted, drafts = [self.plans[s] for s in slots], None, None
        if algorithm.draft is not None:
            plans, drafted, drafts = self._drafted(algorithm.draft, slots, plans)
        forest, seen, scores = self._rollout_and_score(slots, plans, self.schedule, self._sampler(slots), "rollout")
        pictures = seen.media.pictures()  # of a clip its middle frame
        latents = forest.nodes[forest.leaves.node]
        started = time.perf_counter()
        total, ok = scores.total(algorithm.credit.reward_weights)
        # where a latent reward trains, the pictures' failures are to look at: no group is left out for them
        counted = ok if self.context.latent_reward is None else None
        signals = measure(latents, pictures, forest.leaves.prompt, counted, self.context.figures)
        forest = observed(algorithm, forest, pictures, self.layout)
        self.clock.add("signals", started)
        kept = forest.drop_leaf_states() if algorithm.renoise is None else forest.select(NO_EDGES)
        fidelity = None
        if drafted is not None and len(drafted) == len(total):  # a root has one leaf
            fidelity = agreement(drafted, total, forest.leaves.prompt.cpu(), slots)
        return _Chunk(kept, scores, signals, seen.broken, fidelity, drafts)

    def offline(self, slots: Sequence[int]) -> _Chunk:
        """A chunk of whole prompts' offline samples, in the place of `rollout`."""
        context, samples, started = self.context, self.context.algorithm.offline, time.perf_counter()
        assert samples is not None and context.pictures is not None
        context.pause()
        prompts = [self.prompts[s] for s in slots]
        forest, scores, signals = offline_forest(samples, context.pictures, context.model, context.size, prompts, slots)
        self.clock.add("encode", started)
        return _Chunk(forest, scores, signals, torch.where(scores.ok[:, 0].cpu(), WHOLE, GIVEN))

    def _drafted(self, draft: Draft, slots: Sequence[int], plans: Sequence[Plan]) -> tuple[list[Plan], Tensor, Tensor]:
        """The plans from the noises that the draft chose, the draft's scores of these, root by root, and which drafts
        broke."""
        context = self.context
        schedule = context.model.schedule(draft.steps, context.size)
        _, seen, scores = self._rollout_and_score(slots, [draft.plan] * len(slots), schedule, self.drafter, "draft")
        value, ok = (t.view(len(slots), draft.pool) for t in scores.total(context.algorithm.credit.reward_weights))
        stream = Stream(context.seed, "draft.choice")
        starts = [
            draft.choose(v, o, plan.roots, stream, (self.iteration, slot))
            for v, o, plan, slot in zip(value, ok, plans, slots, strict=True)
        ]
        chosen = torch.cat([v[list(start)] for v, start in zip(value, starts, strict=True)])
        return [from_noises(plan, start) for plan, start in zip(plans, starts, strict=True)], chosen, seen.broken

    def _rollout_and_score(
        self, slots: Sequence[int], plans: Sequence[Plan], schedule: Schedule, predict: Predict, phase: str
    ) -> tuple[Forest, Decoded, Scores]:
        """Those plans rolled out, on the clock as `phase`; their leaves' pictures and scores."""
        context, clock, started = self.context, self.clock, time.perf_counter()
        forest = self._rollout(slots, plans, schedule, predict)
        started = clock.add(phase, started)
        seen = decoded(context.model, forest.nodes[forest.leaves.node], context.size)
        started = clock.add("decode", started)
        slot = forest.leaves.prompt.tolist()
        owner = [self.prompts[s] for s in slot]
        texts, metadata = [p.text for p in owner], [p.metadata for p in owner]
        scores = score_all(context.rewards, seen.media, texts, metadata, slot, ok=seen.ok, pause=context.pause)
        clock.add("reward", started)
        return forest, seen, scores

    def _sampler(self, slots: Sequence[int]) -> Predict:
        """The predictor that rolls out: as in training, or with the chunk's own conditions where there are some."""
        context, conditions = self.context, self.context.algorithm.conditions
        if conditions is None:
            return self.sampler
        network = context.sets.get(context.algorithm.sampler)
        own = ([self.prompts[slot] for slot in slots], context.size, slots[0], context.seed, context.guidance, network)
        return perturbed_predictor(context.model, context.learned, conditions, *own)

    def _rollout(self, slots: Sequence[int], plans: Sequence[Plan], schedule: Schedule, predict: Predict) -> Forest:
        context, algorithm = self.context, self.context.algorithm

        def with_pause(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            context.pause()
            return predict(x, sigma, rows)

        return rollout(
            plans,
            algorithm.dynamics or ODE(),
            schedule,
            with_pause,
            Noise(context.seed, self.iteration),
            shape=context.model.noise_shape(context.size),
            slots=slots,
            solver=algorithm.solver,
            variants=algorithm.variants,
            max_rows=context.rollout_rows,
            keep_mean=algorithm.renoise is None and algorithm.edge_objective.keeps_peers,
            layout=self.layout,
            device=context.model.device,
        )


def observed(algorithm: Algorithm, forest: Forest, pictures: Tensor, layout: StateLayout = WHOLE_STATE) -> Forest:
    """The forest with what the algorithm wants to know of it as traits; of held elements observations see 0."""
    shown = forest if layout.free is None else replace(forest, nodes=layout.take(forest.slots).silence(forest.nodes))
    seen = {o.name: (o.of, o(shown, pictures)) for o in algorithm.observe}
    of_edges = {name: value for name, (of, value) in seen.items() if of == "edge"}
    of_leaves = {name: value for name, (of, value) in seen.items() if of == "leaf"}
    return replace(
        forest, edges=replace(forest.edges, traits=of_edges), leaves=replace(forest.leaves, traits=of_leaves)
    )


def _binder(
    context: Context, condition: Conditioning, first: int, layout: StateLayout
) -> Callable[[nn.Module | None], Predict]:
    """Network (None: the policy's) -> predictor of slots of the iteration, of which this rank has encoded its own.

    It says 0 of held elements.
    """

    def bound(network: nn.Module | None) -> Predict:
        predict = context.model.predictor(condition, context.guidance, network=network)
        return lambda x, sigma, rows: layout.take(rows).silence(predict(x, sigma, rows - first))

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
    """Reward means and spreads (offline samples have none), failures, the share of trained edges without spread.

    A latent reward's mean is over all of an iteration's candidates, whose σ are the same in each, and failures are its.
    Edges of prompts that a credit leaves out for that reason count in the share.
    """
    scores, metrics, seen = experience.scores, dict[str, float](), advantage.pool or advantage
    for column, name in enumerate(scores.names if experience.whole.steps else ()):
        value = scores.value[scores.ok[:, column], column]
        metrics[f"reward/{name}"] = value.mean().item() if len(value) else float("nan")
        metrics[f"reward_std/{name}"] = value.std(unbiased=False).item() if len(value) else float("nan")
    if experience.latent_scores is not None and bool(experience.latent_scores.ok.any()):
        metrics["latent_reward"] = experience.latent_scores.value[experience.latent_scores.ok].mean().item()
    trained = experience.whole.edges.trained & seen.ok
    metrics["failed_rewards"] = int((~experience.credited[0].ok).any(1).sum())
    metrics["zero_variance"] = 1 - (trained & seen.live).sum().item() / max(1, int(trained.sum()))
    if experience.fidelity is not None and bool(experience.fidelity.isfinite().any()):
        metrics["draft/kendall"] = experience.fidelity.nanmean().item()
    measured = {name: value for name, value in experience.signals.metrics().items() if math.isfinite(value)}
    return metrics | measured


def offline_forest(
    samples: OfflineSamples,
    read: ReadPictures,
    model: Model,
    size: Size,
    prompts: Sequence[Prompt],
    slots: Sequence[int],
) -> tuple[Forest, Scores, Signals]:
    """The forest whose leaves are the slots' offline samples, their scores and what there is to measure of them.

    A prompt is read and encoded by itself, so that its latents do not depend on its neighbours nor on the ranks. A
    sample whose latent is not finite has a failed score.
    """
    latents = torch.cat([model.encode_media(read([prompt]), size) for prompt in prompts])
    plans = [samples.plan(0, slot) for slot in slots]
    forest = replace(skeleton(plans, slots), nodes=latents)
    ok = finite_rows(latents).cpu()
    scores = samples.scored(ok)
    return forest.to(model.device), scores, measure_given(latents, forest.leaves.prompt, ok)


def tell_broken(
    experience: Experience, prompts: Sequence[Prompt], say: Callable[[str], None], said: set[tuple[str, int]]
) -> None:
    """Says which samples of the rollout and of its drafts are no pictures, and why; each way of breaking once, which
    `said` keeps."""
    texts = [p.text for p in prompts]
    groups = [("pictures", experience.broken, [texts[slot] for slot in experience.whole.leaves.prompt.tolist()])]
    if experience.drafts is not None:
        pool = len(experience.drafts) // len(texts)
        groups.append(("drafts", experience.drafts, [text for text in texts for _ in range(pool)]))
    for what, broken, owner in groups:
        new = {(what, code) for code in broken.unique().tolist()} - said
        fresh = torch.tensor([code for _, code in new], dtype=torch.long)
        for line in told(torch.where(torch.isin(broken, fresh), broken, WHOLE), owner, what):
            say(f"warn: iteration {experience.iteration + 1}: {line}. They are failed; further ones are not told")
        said |= new


def check_advantages(advantages: Advantages, iteration: int) -> None:
    """Raises GuardError for an advantage or a weight that is to be trained on and is not finite."""
    ok = advantages.advantage.ok
    for name, value in (("advantage", advantages.advantage.value), ("weight", advantages.weight)):
        bad = ok & ~value.isfinite().view(len(ok), -1).all(1)
        if bool(bad.any()):
            raise GuardError(
                f"iteration {iteration}: the {name} of {int(bad.sum())} of {int(ok.sum())} edges is not finite. No "
                "weight was changed. Look at the size of this iteration's rewards, and what the algorithm observes"
            )


def check_scored(context: Context, experience: Experience, iteration: int) -> None:
    """Raises GuardError, with what the rewards or the model did, when no score that trains is valid.

    With a latent reward that is its own; the rewards of pictures are then to look at, and may all have failed.
    """
    scores = experience.credited[0]
    if scores.total(experience.rule(context.algorithm.credit).reward_weights)[1].any():
        return
    broken = experience.broken
    if bool((broken != WHOLE).all()):
        why = [f"{WHY[code]}: {ADVICE}" for code in broken.unique().tolist()]
    elif experience.latent_scores is not None:
        why = ["the latent reward gave NaN or infinity for all of them"]
    else:
        why = faults(context.rewards) or ["the rewards said so themselves (None, NaN or infinity)"]
    raise GuardError(
        f"iteration {iteration}: all {len(scores)} rewards failed, so there is nothing to learn from: " + "; ".join(why)
    )
