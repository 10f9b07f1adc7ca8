"""What one iteration brought, in the whole of all ranks: credit, metrics, and what stops it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from tempflow.algorithms.lesson import Phase
from tempflow.core.credit import Advantage, CreditRule
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.core.state import WHOLE as WHOLE_STATE
from tempflow.core.state import StateLayout
from tempflow.models.finite import ADVICE, WHOLE, WHY, encoded, told
from tempflow.models.protocol import LaysOut, Predict, layout_of
from tempflow.request import Prompt
from tempflow.train.context import Context
from tempflow.train.guards import GuardError
from tempflow.train.judged import ByPictures
from tempflow.train.parallel import World
from tempflow.train.rollouts import Rollouts
from tempflow.train.signals import Signals


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
    judged     whose scores credit sees; a latent reward's are of the whole's edges
    schedule   the grid that was walked
    iteration  which one it is, from 0
    fidelity   [P] how the draft ranked the chosen noises beside the regenerated pictures; NaN without a draft
    broken     LongTensor, which of the whole's leaves are no pictures, and why (`models.finite`)
    drafts     the same of the drafts, a pool for each prompt; none without a draft
    layout     of this rank's states, by prompt slot
    """

    prompts: tuple[Prompt, ...]
    start: int
    forest: Forest
    whole: Forest
    scores: Scores
    signals: Signals
    judged: ByPictures
    schedule: Schedule
    iteration: int
    broken: Tensor
    fidelity: Tensor
    drafts: Tensor
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
        return self.judged.credited(self.scores, self.whole)

    def rule(self, credit: CreditRule) -> CreditRule:
        """How these are credited."""
        return self.judged.rule(credit)


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
    forest, whole = rollouts.forest, algorithm.with_edges(skeleton(plans, range(len(plans))))
    edges, trained = (
        [sum(int((seen.edges.prompt == slot).sum()) for slot in block) for block in blocks]
        for seen in (whole, algorithm.first.view(whole))
    )

    def gathered(scores: Scores, counts: Sequence[int]) -> Scores:
        return Scores(world.gather(scores.value, counts), world.gather(scores.ok, counts), scores.names)

    return Experience(
        prompts=tuple(prompts),
        start=blocks[world.rank].start,
        forest=forest,
        whole=_with_traits(world, forest, whole, edges, counts),
        scores=gathered(rollouts.scores, counts),
        signals=Signals(*(world.gather(t, prompted) for t in rollouts.signals.columns)),
        judged=rollouts.judged.map(lambda said: gathered(said, trained)),
        schedule=rollouts.schedule,
        iteration=rollouts.iteration,
        broken=world.gather(rollouts.broken, counts),
        fidelity=world.gather(rollouts.fidelity, prompted),
        drafts=world.gather(rollouts.drafts, [n * algorithm.begins.pool for n in prompted]),
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
    for said in experience.judged.latent:
        metrics |= {"latent_reward": said.value[said.ok].mean().item()} if bool(said.ok.any()) else {}
    trained = experience.whole.edges.trained & seen.ok
    metrics["failed_rewards"] = int((~experience.credited[0].ok).any(1).sum())
    metrics["zero_variance"] = 1 - (trained & seen.live).sum().item() / max(1, int(trained.sum()))
    if bool(experience.fidelity.isfinite().any()):
        metrics["draft/kendall"] = experience.fidelity.nanmean().item()
    measured = {name: value for name, value in experience.signals.metrics().items() if math.isfinite(value)}
    return metrics | measured


def tell_broken(
    experience: Experience, prompts: Sequence[Prompt], say: Callable[[str], None], said: set[tuple[str, int]]
) -> None:
    """Says which samples of the rollout and of its drafts are no pictures, and why; each way of breaking once, which
    `said` keeps."""
    texts = [p.text for p in prompts]
    pool = len(experience.drafts) // len(texts)
    drawn = ("pictures", experience.broken, [texts[slot] for slot in experience.whole.leaves.prompt.tolist()])
    for what, broken, owner in (drawn, ("drafts", experience.drafts, [text for text in texts for _ in range(pool)])):
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
    else:
        why = experience.judged.why(context.rewards)
    raise GuardError(
        f"iteration {iteration}: all {len(scores)} rewards failed, so there is nothing to learn from: " + "; ".join(why)
    )
