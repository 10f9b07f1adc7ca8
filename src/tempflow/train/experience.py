"""One iteration but for its updates: roll out, decode, score, observe, give credit; or take offline samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import NO_EDGES, Algorithm
from tempflow.algorithms.lesson import Phase
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
from tempflow.models.conditions import perturbed_predictor
from tempflow.models.finite import (
    ADVICE,
    GIVEN,
    WHOLE,
    WHY,
    Decoded,
    decoded,
    encoded,
    encoded_media,
    finite_rows,
    told,
)
from tempflow.models.protocol import LaysOut, Model, Predict, layout_of
from tempflow.request import Prompt
from tempflow.rewards.safe import faults
from tempflow.rewards.scoring import Pending, Scoring, as_scored
from tempflow.train.context import Clock, Context, Counter, ReadPictures
from tempflow.train.guards import GuardError
from tempflow.train.parallel import World
from tempflow.train.rollouts import Rollouts
from tempflow.train.signals import Signals, measure, measure_given


@dataclass(frozen=True, eq=False)
class Experience:
    """What one iteration's rollout brought, or the offline samples in its place: this rank's rollouts in the whole of
    all ranks. It holds no network and no function; `update.predictors` binds those of its prompts.

    prompts    of the iteration, one for each slot, of all ranks
    start      the first of this rank's prompt slots
    forest     this rank's part, with the states that phases need (`Algorithm.kept`)
    whole      all ranks' edges and leaves, without states
    scores     of the whole's leaves
    signals    of the whole's leaves, by prompt slot
    latent_scores  a latent reward's scores of the whole's edges; None without one
    schedule   the grid that was walked
    iteration  which one it is, from 0
    fidelity   [P] how the draft ranked the chosen noises beside the regenerated pictures; None without a draft
    broken     LongTensor, which of the whole's leaves are no pictures, and why (`models.finite`)
    drafts     the same of the drafts, a pool for each prompt; None without a draft
    layout     of this rank's states, by prompt slot
    """

    prompts: tuple[Prompt, ...]
    start: int
    forest: Forest
    whole: Forest
    scores: Scores
    signals: Signals
    latent_scores: Scores | None
    schedule: Schedule
    iteration: int
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None
    layout: StateLayout = WHOLE_STATE

    def of(self, phase: Phase) -> Experience:
        """The same as that phase sees it: its forests' edges are what is trained."""
        forest, whole = phase.view(self.forest), phase.view(self.whole)
        return self if forest is self.forest else replace(self, forest=forest, whole=whole)

    @cached_property
    def first(self) -> int:
        """Where this rank's edges start among the whole's."""
        return int((self.whole.edges.prompt < self.start).sum())

    @cached_property
    def numbers(self) -> Tensor:
        """An edge's place among those of its prompt slot, LongTensor [E], of the whole."""
        return _numbers(self.whole.edges.prompt)

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
    plans = context.algorithm.plans(iteration, len(prompts))
    chunks = chunks_of(plans, context.size.at_once(context.rollout_leaves), context.world.block(len(prompts)))
    with context.in_step():
        parts = roll_out(context, prompts, plans, iteration, chunks, clock)
    experience = experience_of(context, prompts, plans, Rollouts.join(parts))
    costs, algorithm = [context.algorithm.cost_of(plan) for plan in plans], context.algorithm
    leaves = sum(cost.leaves for cost in costs)
    counter.rollout += sum(cost.forwards for cost in costs)
    counter.draft += algorithm.draft_cost.forwards * len(plans)
    counter.decodes += leaves
    counter.reward_calls += leaves * len(context.rewards)
    if experience.latent_scores is not None:
        counter.reward_calls += len(experience.latent_scores)
        counter.latent += len(experience.latent_scores)
    return experience


def chunks_of(plans: Sequence[Plan], leaves: int, block: range) -> list[range]:
    """The prompt slots in `block`, a rank's, cut into chunks that are rolled out at once.

    The cuts are made over all plans: a chunk takes whole prompts while they have at most `leaves` leaves together, and
    one prompt at least. So a chunk is a function of the plans and of `leaves`, but for those that a rank's block cuts.
    """
    cuts, held = [0], 0
    for slot, plan in enumerate(plans):
        count = plan.cost().leaves
        if slot > cuts[-1] and held + count > leaves:
            cuts, held = [*cuts, slot], 0
        held += count
    chunks = [range(max(a, block.start), min(b, block.stop)) for a, b in pairwise([*cuts, len(plans)])]
    return [chunk for chunk in chunks if chunk]


def roll_out(
    context: Context,
    prompts: Sequence[Prompt],
    plans: Sequence[Plan],
    iteration: int,
    chunks: Sequence[Sequence[int]],
    clock: Clock,
) -> list[Rollouts]:
    """Those chunks of an iteration's prompt slots: rolled out, decoded, scored and observed; or laid out, where samples
    are given. One chunk is scored while the next is grown.

    prompts, plans: of all of the iteration's slots; chunks: slots that are neighbours. What comes of a chunk depends on
    the run, its weights and that chunk alone, not on the others nor on their order.
    """
    algorithm = context.algorithm
    schedule = algorithm.schedule(iteration, context.schedule)
    if algorithm.offline is not None:
        return [_laid_out(context, prompts, iteration, schedule, slots, clock) for slots in chunks]
    drafter, started = None, time.perf_counter()
    if context.drafter is not None:
        drafter = context.drafter.fresh()
        clock.add("draft", started)
    with Scoring(context.rewards, context.pause, context.overlap, context.compose or as_scored) as scoring:
        grower = _Grower(context, plans, prompts, iteration, schedule, scoring, clock, drafter)
        grown = [grower.grow(slots) for slots in chunks]
        started = time.perf_counter()
        parts = [grower.scored(part) for part in grown]
        clock.add("reward", started)
        return parts


def experience_of(context: Context, prompts: Sequence[Prompt], plans: Sequence[Plan], rollouts: Rollouts) -> Experience:
    """A rank's rollouts in the whole of all ranks: they exchange scores and observations.

    prompts, plans: of all of the iteration's slots. Raises ValueError where the slots are not the rank's.
    """
    algorithm, world = context.algorithm, context.world
    blocks = [world.block(len(plans), rank) for rank in range(world.size)]
    if rollouts.slots != tuple(blocks[world.rank]):
        raise ValueError(f"slots: {list(rollouts.slots)} of rank {world.rank}; nearest valid: {blocks[world.rank]}")
    prompted, leaves = [len(block) for block in blocks], [plan.cost().leaves for plan in plans]
    counts = [sum(leaves[slot] for slot in block) for block in blocks]
    forest, whole = rollouts.forest, skeleton(plans, range(len(plans)))
    if "edges" not in algorithm.keeps:
        whole = whole.select(NO_EDGES)
    edges, trained = (
        [sum(int((seen.edges.prompt == slot).sum()) for slot in block) for block in blocks]
        for seen in (whole, algorithm.first.view(whole))
    )
    pool = algorithm.pool

    def gathered(scores: Scores, counts: Sequence[int]) -> Scores:
        return Scores(world.gather(scores.value, counts), world.gather(scores.ok, counts), scores.names)

    return Experience(
        prompts=tuple(prompts),
        start=blocks[world.rank].start,
        forest=forest,
        whole=_with_traits(world, forest, whole, edges, counts),
        scores=gathered(rollouts.scores, counts),
        signals=Signals(*(world.gather(t, prompted) for t in rollouts.signals.columns)),
        latent_scores=None if rollouts.latent_scores is None else gathered(rollouts.latent_scores, trained),
        schedule=rollouts.schedule,
        iteration=rollouts.iteration,
        broken=world.gather(rollouts.broken, counts),
        fidelity=None if rollouts.fidelity is None else world.gather(rollouts.fidelity, prompted),
        drafts=None if rollouts.drafts is None else world.gather(rollouts.drafts, [n * pool for n in prompted]),
        layout=laid_out(context, prompts, blocks[world.rank]),
    )


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


def credit(context: Context, experience: Experience, phase: Phase | None = None) -> Advantages:
    """Of what that phase trains (None: the first), the same on every rank: it needs all scores, but no states."""
    algorithm = context.algorithm
    phase = phase or algorithm.first
    seen = experience.of(phase)
    advantage = seen.rule(algorithm.credit)(*seen.credited)
    seen.layout.check_advantages(advantage.streams)
    return Advantages(advantage, phase.weigh(seen.whole, seen.schedule, algorithm.dynamics))


@dataclass(frozen=True, eq=False)
class _Grown:
    """A chunk that is being scored. `drafted`: a draft's scores of the chosen noises, root by root; the others as in
    `Rollouts`, the failures apart."""

    slots: Sequence[int]
    forest: Forest
    signals: Signals
    broken: Tensor
    pending: Pending
    latent_scores: Scores | None
    drafted: Tensor | None = None
    drafts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Grower:
    """What the chunks of one rollout share. `drafter`: the network that drafts; None: the one that rolls out."""

    context: Context
    plans: Sequence[Plan]
    prompts: Sequence[Prompt]
    iteration: int
    schedule: Schedule
    scoring: Scoring
    clock: Clock
    drafter: nn.Module | None = None

    def grow(self, slots: Sequence[int]) -> _Grown:
        """A chunk of whole prompts: rolled out, decoded, measured, observed, and on its way to be scored."""
        context, algorithm = self.context, self.context.algorithm
        plans, drafted, drafts = [self.plans[s] for s in slots], None, None
        if algorithm.draft is not None:
            plans, drafted, drafts = self._drafted(algorithm.draft, slots, plans)
        forest, seen = self._drawn(slots, plans, self.schedule, self._sampler(slots), "rollout")
        pending, started = self._submit(seen, forest), time.perf_counter()
        latents = self.schedule.samples(forest.nodes[forest.leaves.node])
        pictures = seen.media.pictures()  # of a clip its middle frame
        signals = measure(latents, pictures, forest.leaves.prompt, None, context.figures)
        forest = observed(algorithm, forest, pictures, laid_out(context, self.prompts, slots))
        self.clock.add("signals", started)
        kept = algorithm.kept(forest)
        latent = _latent_scores(context, self.prompts, slots, kept, self.schedule)
        return _Grown(slots, kept, signals, seen.broken, pending, latent, drafted, drafts)

    def scored(self, grown: _Grown) -> Rollouts:
        """The chunk with its scores, once they are there."""
        algorithm, forest, signals = self.context.algorithm, grown.forest, grown.signals
        scores = grown.pending.scores()
        total, ok = scores.total(algorithm.credit.reward_weights)
        if self.context.latent_reward is None:
            # where a latent reward trains, the pictures' failures are to look at: no group is left out for them
            signals = signals.with_failures(forest.leaves.prompt, ok)
        fidelity = None
        if grown.drafted is not None and len(grown.drafted) == len(total):  # a root has one leaf
            fidelity = agreement(grown.drafted, total, forest.leaves.prompt.cpu(), grown.slots)
        return Rollouts(
            slots=tuple(grown.slots),
            iteration=self.iteration,
            schedule=self.schedule,
            forest=forest,
            scores=scores,
            signals=signals,
            broken=grown.broken,
            fidelity=fidelity,
            drafts=grown.drafts,
            latent_scores=grown.latent_scores,
        )

    def _drafted(self, draft: Draft, slots: Sequence[int], plans: Sequence[Plan]) -> tuple[list[Plan], Tensor, Tensor]:
        """The plans from the noises that the draft chose, the draft's scores of these, root by root, and which drafts
        broke. The scores are waited for: what is grown depends on them."""
        context = self.context
        schedule = context.model.schedule(draft.steps, context.size)
        predict = self._predictor(slots, self.drafter)
        forest, seen = self._drawn(slots, [draft.plan] * len(slots), schedule, predict, "draft")
        broken, pending, started = seen.broken, self._submit(seen, forest), time.perf_counter()
        del seen
        total = pending.scores().total(context.algorithm.credit.reward_weights)
        self.clock.add("reward", started)
        value, ok = (t.view(len(slots), draft.pool) for t in total)
        stream = Stream(context.seed, "draft.choice")
        starts = [
            draft.choose(v, o, plan.roots, stream, (self.iteration, slot))
            for v, o, plan, slot in zip(value, ok, plans, slots, strict=True)
        ]
        chosen = torch.cat([v[list(start)] for v, start in zip(value, starts, strict=True)])
        return [from_noises(plan, start) for plan, start in zip(plans, starts, strict=True)], chosen, broken

    def _drawn(
        self, slots: Sequence[int], plans: Sequence[Plan], schedule: Schedule, predict: Predict, phase: str
    ) -> tuple[Forest, Decoded]:
        """Those plans rolled out, on the clock as `phase`, and their leaves' pictures."""
        context, clock, started = self.context, self.clock, time.perf_counter()
        forest = self._rollout(slots, plans, schedule, predict)
        started = clock.add(phase, started)
        self.scoring.ready()
        started = clock.add("reward", started)
        seen = decoded(context.model, schedule.samples(forest.nodes[forest.leaves.node]), context.size)
        clock.add("decode", started)
        return forest, seen

    def _submit(self, seen: Decoded, forest: Forest) -> Pending:
        started, slot = time.perf_counter(), forest.leaves.prompt.tolist()
        owner = [self.prompts[s] for s in slot]
        texts, metadata = [p.text for p in owner], [p.told for p in owner]
        pending = self.scoring.submit(seen.media, texts, metadata, slot, seen.ok)
        self.clock.add("reward", started)
        return pending

    def _predictor(self, slots: Sequence[int], network: nn.Module | None) -> Predict:
        """That network (None: the one that rolls out) for a chunk's slots."""
        context = self.context
        network = context.sets.get(context.algorithm.sampler) if network is None else network
        return bound(context, self.prompts, range(slots[0], slots[-1] + 1))(network)

    def _sampler(self, slots: Sequence[int]) -> Predict:
        """The predictor that rolls out: as in training, or with the chunk's own conditions where there are some."""
        context, conditions = self.context, self.context.algorithm.conditions
        if conditions is None:
            return self._predictor(slots, None)
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
            keep_mean="means" in algorithm.keeps,
            layout=laid_out(context, self.prompts, slots),
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


def _latent_scores(
    context: Context, prompts: Sequence[Prompt], slots: Sequence[int], forest: Forest, schedule: Schedule
) -> Scores | None:
    """A latent reward's scores of a chunk's edges (or leaves), each at the σ of the state it reaches."""
    if context.latent_reward is None:
        return None
    score = context.latent_reward(encoded(context.model, [prompts[slot] for slot in slots], context.size))
    edges = context.algorithm.first.view(forest).edges
    sigma = schedule.after(edges.step.cpu()).to(forest.nodes)
    scores = score(forest.nodes[edges.child], sigma, edges.prompt - slots[0])
    return Scores(scores.value.cpu(), scores.ok.cpu(), scores.names)


def _laid_out(
    context: Context,
    prompts: Sequence[Prompt],
    iteration: int,
    schedule: Schedule,
    slots: Sequence[int],
    clock: Clock,
) -> Rollouts:
    """A chunk of whole prompts' offline samples, in the place of what is grown."""
    samples, started = context.algorithm.offline, time.perf_counter()
    assert samples is not None and context.pictures is not None
    context.pause()
    chosen = [prompts[s] for s in slots]
    forest, scores, signals = offline_forest(samples, context.pictures, context.model, context.size, chosen, slots)
    latent = _latent_scores(context, prompts, slots, forest, schedule)
    clock.add("encode", started)
    return Rollouts(
        slots=tuple(slots),
        iteration=iteration,
        schedule=schedule,
        forest=forest,
        scores=scores,
        signals=signals,
        broken=torch.where(scores.ok[:, 0].cpu(), WHOLE, GIVEN),
        latent_scores=latent,
    )


def bound(context: Context, prompts: Sequence[Prompt], slots: range) -> Callable[[nn.Module | None], Predict]:
    """Network (None: the policy's) -> predictor whose rows are prompt slots of the iteration, of those in `slots`. It
    says 0 of held elements."""
    model, first, layout = context.model, slots.start, laid_out(context, prompts, slots)
    condition = encoded(model, [prompts[slot] for slot in slots], context.size)

    def predictor(network: nn.Module | None) -> Predict:
        predict = model.predictor(condition, context.guidance, network=network)
        return lambda x, sigma, rows: layout.take(rows).silence(predict(x, sigma, rows - first))

    return predictor


def laid_out(context: Context, prompts: Sequence[Prompt], slots: Sequence[int]) -> StateLayout:
    """The layout of the states of neighbouring prompt slots of the iteration, by slot."""
    if not isinstance(context.model, LaysOut):
        return WHOLE_STATE
    condition = encoded(context.model, [prompts[slot] for slot in slots], context.size)
    return layout_of(context.model, condition, context.size, slots[0]).to(context.model.device)


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
    latents = torch.cat([encoded_media(model, read([prompt]), size) for prompt in prompts])
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
