"""Where an iteration's experience comes from: a rollout from the plan's noises or from drafted ones, samples that the
prompts name, or nowhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.core.draft import Begun
from tempflow.core.dynamics import ODE
from tempflow.core.forest import Forest
from tempflow.core.offline import OfflineSamples
from tempflow.core.plan import Plan
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE as WHOLE_STATE
from tempflow.core.state import StateLayout
from tempflow.models.conditions import perturbed_predictor
from tempflow.models.finite import GIVEN, WHOLE, Decoded, decoded, encoded, encoded_media, finite_rows
from tempflow.models.protocol import Predict
from tempflow.request import Prompt
from tempflow.rewards.scoring import Pending, Scoring, as_scored
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Advantages, Experience, bound, experience_of, laid_out
from tempflow.train.judged import ByPictures
from tempflow.train.rollouts import Rollouts
from tempflow.train.signals import Signals, measure, measure_given


@dataclass(frozen=True, eq=False)
class Collected:
    """An iteration's experience with what records tell of it, or nothing."""

    experience: Experience | None = None
    advantages: Sequence[Advantages] = ()
    skip: frozenset[int] = frozenset()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """Where an iteration's experience comes from. `prompts` are of all of its slots."""

    context: Context
    prompts: Sequence[Prompt]
    iteration: int
    clock: Clock

    def collected(self, credited: Callable[[], Collected]) -> Collected:
        """What comes of the iteration: what `roll_out` gives, once it is `credited`."""
        return credited()

    def roll_out(self, chunks: Sequence[Sequence[int]]) -> list[Rollouts]:
        """Those chunks of the prompt slots, which are neighbours in a chunk. What comes of a chunk depends on the run,
        its weights and that chunk alone, not on the others nor on their order."""
        return []

    @cached_property
    def plans(self) -> Sequence[Plan]:
        """Of all slots. Raises ValueError where nothing is rolled out."""
        return self.context.algorithm.plans(self.iteration, len(self.prompts))

    @cached_property
    def schedule(self) -> Schedule:
        """The grid that is walked."""
        return self.context.algorithm.schedule(self.iteration, self.context.schedule)

    def judged(self, slots: Sequence[int], forest: Forest) -> ByPictures:
        """Whose scores credit sees of a chunk. forest: with the states that phases need."""
        context, prompts = self.context, [self.prompts[slot] for slot in slots]
        condition = partial(encoded, context.model, prompts, context.size)
        return context.latent_reward(condition, context.algorithm.first.view(forest), slots[0], self.schedule)


def source_of(context: Context, prompts: Sequence[Prompt], iteration: int, clock: Clock) -> Source:
    """The only place where the loop looks at what an algorithm's experience is made of."""
    algorithm, asked = context.algorithm, (context, prompts, iteration, clock)
    if algorithm.offline is not None:
        return Given(*asked, algorithm.offline)
    return Grown(*asked) if algorithm.rolls_out else Nowhere(*asked)


class Nowhere(Source):
    """Phases learn from fresh noises alone."""

    def collected(self, credited: Callable[[], Collected]) -> Collected:
        return Collected()


@dataclass(frozen=True, eq=False)
class Given(Source):
    """Offline samples. A prompt is read and encoded by itself, so that its latents do not depend on its neighbours nor
    on the ranks. A sample whose latent is not finite has a failed score."""

    samples: OfflineSamples

    def roll_out(self, chunks: Sequence[Sequence[int]]) -> list[Rollouts]:
        return [self._laid_out(slots) for slots in chunks]

    def _laid_out(self, slots: Sequence[int]) -> Rollouts:
        context, started, begun = self.context, time.perf_counter(), Begun(())
        context.pause()
        model, size, read = context.model, context.size, context.pictures
        latents = torch.cat([encoded_media(model, read([self.prompts[slot]]), size) for slot in slots])
        plans, ok = [self.samples.plan(self.iteration, slot) for slot in slots], finite_rows(latents).cpu()
        forest = replace(skeleton(plans, slots), nodes=latents).to(model.device)
        scores, signals = self.samples.scored(ok), measure_given(latents, forest.leaves.prompt, ok)
        judged = self.judged(slots, forest)
        self.clock.add("encode", started)
        return Rollouts(
            slots=tuple(slots),
            iteration=self.iteration,
            schedule=self.schedule,
            forest=forest,
            scores=scores,
            signals=signals,
            broken=torch.where(ok, WHOLE, GIVEN),
            fidelity=begun.fidelity(scores.value, forest.leaves.prompt, slots),
            drafts=begun.broken,
            judged=judged,
        )


@dataclass(frozen=True, eq=False)
class _Growing:
    """A chunk that is being scored; as in `Rollouts`, the failures apart."""

    slots: Sequence[int]
    forest: Forest
    signals: Signals
    broken: Tensor
    pending: Pending
    judged: ByPictures
    begun: Begun


class Grown(Source):
    """A rollout, from the plan's noises or from drafted ones. One chunk is scored while the next is grown."""

    def roll_out(self, chunks: Sequence[Sequence[int]]) -> list[Rollouts]:
        context = self.context
        with Scoring(context.rewards, context.pause, context.overlap, context.compose or as_scored) as scoring:
            growing = [self._grow(scoring, slots) for slots in chunks]
            started = time.perf_counter()
            parts = [self._scored(part) for part in growing]
            self.clock.add("reward", started)
            return parts

    @property
    def network(self) -> nn.Module | None:
        """The one that rolls out; None: the policy's."""
        return self.context.sets.get(self.context.algorithm.sampler)

    @cached_property
    def drafter(self) -> nn.Module | None:
        """The network that drafts; None: the policy's."""
        started = time.perf_counter()
        network = self.context.drafter.fresh(self.network)
        self.clock.add("draft", started)
        return network

    def _grow(self, scoring: Scoring, slots: Sequence[int]) -> _Growing:
        """A chunk of whole prompts: rolled out, decoded, measured, observed, and on its way to be scored."""
        context, algorithm, stream = self.context, self.context.algorithm, Stream(self.context.seed, "draft.choice")
        plans = [self.plans[slot] for slot in slots]
        begun = algorithm.begins.begin(plans, slots, stream, self.iteration, partial(self._draft, scoring, slots))
        forest, seen = self._drawn(scoring, slots, begun.plans, self.schedule, self._sampler(slots), "rollout")
        pending, started = self._submit(scoring, seen, forest), time.perf_counter()
        latents = self.schedule.samples(forest.nodes[forest.leaves.node])
        pictures = seen.media.pictures()  # of a clip its middle frame
        signals = measure(latents, pictures, forest.leaves.prompt, None, context.figures)
        forest = observed(algorithm, forest, pictures, laid_out(context, self.prompts, slots))
        self.clock.add("signals", started)
        kept = algorithm.kept(forest)
        return _Growing(slots, kept, signals, seen.broken, pending, self.judged(slots, kept), begun)

    def _scored(self, grown: _Growing) -> Rollouts:
        """The chunk with its scores, once they are there."""
        forest, scores = grown.forest, grown.pending.scores()
        total, ok = scores.total(self.context.algorithm.credit.reward_weights)
        return Rollouts(
            slots=tuple(grown.slots),
            iteration=self.iteration,
            schedule=self.schedule,
            forest=forest,
            scores=scores,
            signals=grown.judged.watched(grown.signals, forest.leaves.prompt, ok),
            broken=grown.broken,
            fidelity=grown.begun.fidelity(total, forest.leaves.prompt.cpu(), grown.slots),
            drafts=grown.begun.broken,
            judged=grown.judged,
        )

    def _draft(self, scoring: Scoring, slots: Sequence[int], plan: Plan, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `core.draft.Drawn`. The scores are waited for."""
        schedule = self.context.model.schedule(steps, self.context.size)
        predict = self._predictor(slots, self.drafter)
        forest, seen = self._drawn(scoring, slots, [plan] * len(slots), schedule, predict, "draft")
        broken, pending, started = seen.broken, self._submit(scoring, seen, forest), time.perf_counter()
        del seen
        value, ok = pending.scores().total(self.context.algorithm.credit.reward_weights)
        self.clock.add("reward", started)
        return value, ok, broken

    def _drawn(
        self,
        scoring: Scoring,
        slots: Sequence[int],
        plans: Sequence[Plan],
        schedule: Schedule,
        predict: Predict,
        phase: str,
    ) -> tuple[Forest, Decoded]:
        """Those plans rolled out, on the clock as `phase`, and their leaves' pictures."""
        context, clock, started = self.context, self.clock, time.perf_counter()
        forest = self._rollout(slots, plans, schedule, predict)
        started = clock.add(phase, started)
        scoring.ready()
        started = clock.add("reward", started)
        seen = decoded(context.model, schedule.samples(forest.nodes[forest.leaves.node]), context.size)
        clock.add("decode", started)
        return forest, seen

    def _submit(self, scoring: Scoring, seen: Decoded, forest: Forest) -> Pending:
        started, slot = time.perf_counter(), forest.leaves.prompt.tolist()
        owner = [self.prompts[s] for s in slot]
        texts, metadata = [p.text for p in owner], [p.told for p in owner]
        pending = scoring.submit(seen.media, texts, metadata, slot, seen.ok)
        self.clock.add("reward", started)
        return pending

    def _predictor(self, slots: Sequence[int], network: nn.Module | None) -> Predict:
        return bound(self.context, self.prompts, range(slots[0], slots[-1] + 1))(network)

    def _sampler(self, slots: Sequence[int]) -> Predict:
        """The predictor that rolls out: as in training, or with several conditions of a prompt."""
        context, prompts = self.context, [self.prompts[slot] for slot in slots]
        own = (prompts, context.size, slots[0], context.seed, context.guidance, self.network)
        return context.algorithm.sampled.sampler(
            lambda: self._predictor(slots, self.network),
            lambda several: perturbed_predictor(context.model, context.learned, several, *own),
        )

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
            keep_log_prob="edges" in algorithm.keeps,
            layout=laid_out(context, self.prompts, slots),
            device=context.model.device,
        )


def collect(context: Context, prompts: Sequence[Prompt], iteration: int, counter: Counter, clock: Clock) -> Experience:
    """This rank's part of the iteration's forest, chunk by chunk, in the whole of all ranks. The counter counts all
    ranks' work. Raises ValueError where nothing is rolled out."""
    algorithm, source = context.algorithm, source_of(context, prompts, iteration, clock)
    plans = source.plans
    chunks = chunks_of(plans, context.size.at_once(context.rollout_leaves), context.world.block(len(prompts)))
    with context.in_step():
        parts = source.roll_out(chunks)
    experience = experience_of(context, prompts, plans, Rollouts.join(parts))
    costs = [algorithm.cost_of(plan) for plan in plans]
    leaves = sum(cost.leaves for cost in costs)
    counter.rollout += sum(cost.forwards for cost in costs)
    counter.draft += algorithm.begins.cost().forwards * len(plans)
    counter.decodes += leaves
    counter.reward_calls += leaves * len(context.rewards) + experience.judged.calls
    counter.latent += experience.judged.calls
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


def observed(algorithm: Algorithm, forest: Forest, pictures: Tensor, layout: StateLayout = WHOLE_STATE) -> Forest:
    """The forest with what the algorithm wants to know of it as traits; of held elements observations see 0."""
    shown = forest if layout.free is None else replace(forest, nodes=layout.take(forest.slots).silence(forest.nodes))
    seen = {o.name: (o.of, o(shown, pictures)) for o in algorithm.observe}
    of_edges = {name: value for name, (of, value) in seen.items() if of == "edge"}
    of_leaves = {name: value for name, (of, value) in seen.items() if of == "leaf"}
    return replace(
        forest, edges=replace(forest.edges, traits=of_edges), leaves=replace(forest.leaves, traits=of_leaves)
    )
