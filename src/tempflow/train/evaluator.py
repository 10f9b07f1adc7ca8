"""Evaluation while training: scored pictures of fixed prompts from fixed noise, by the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tempflow.config import Config
from tempflow.core.scores import Scores
from tempflow.evaluate.suite import Report, Stream, draw_strips, evaluate
from tempflow.request import Prompt
from tempflow.rewards.protocol import Reward
from tempflow.rewards.safe import faults
from tempflow.train.context import Context
from tempflow.train.guards import GuardError
from tempflow.train.state import Yardstick


@dataclass(frozen=True)
class Evaluator:
    """Draws and scores with the network as it stands when asked."""

    config: Config
    context: Context
    rewards: Sequence[Reward]
    say: Callable[[str], None]

    def evaluate(
        self, prompts: Sequence[Prompt], stream: Stream, training: bool, guidance: float | None = None
    ) -> Report:
        """Judges fixed prompts from the noise of a test or of a validation; every rank draws and scores a block.

        `training`: whether training has begun, when rewards that all fail are no longer a reason to stop.
        """
        e, context, world = self.config.evaluation, self.context, self.context.world
        block = world.block(len(prompts))
        with context.in_step():
            part = evaluate(
                context.model,
                prompts[block.start : block.stop],
                self.rewards,
                total=context.reward_weights or dict.fromkeys((r.name for r in context.rewards), 1.0),
                compose=None if context.compose is None else context.compose.judging(context.reward_weights),
                steps=e.steps,
                guidance=context.guidance.at(e.guidance if guidance is None else guidance),
                seed=e.seed,
                size=context.size,
                rows=context.rollout_rows,
                gold=e.gold,
                first=block.start,
                pause=context.pause,
                stream=stream,
            )
        counts = [len(world.block(len(prompts), rank)) for rank in range(world.size)]
        value, ok = (world.gather(t, counts) for t in (part.scores.value, part.scores.ok))
        kinds = tuple(p.kind for p in prompts)
        scores = Scores(value, ok, part.scores.names)
        broken = None if part.broken is None else world.gather(part.broken, counts)
        report = replace(part, scores=scores, prompts=tuple(p.text for p in prompts), kinds=kinds, broken=broken)
        for line in report.faults:
            self.say(f"warn: {line}")
        check_evaluated(self.rewards, scores, self.say, training)
        return report

    def yardstick(self, prompts: Mapping[str, Sequence[Prompt]]) -> Yardstick | None:
        """The untrained model with the guidance that suits it best on validation, and its test report."""
        values = self.config.evaluation.yardstick
        if not values:
            return None
        metric = self.config.evaluation.metric
        best = max(values, key=lambda g: self.evaluate(prompts["validation"], "validation", False, g).mean(metric))
        return best, self.evaluate(prompts["test"], "test", False, best)

    def strips(self, prompts: Sequence[Prompt]) -> Tensor:
        """A picture of each prompt, of a clip some frames side by side, uint8 [N, H, K·W, 3]."""
        e, context = self.config.evaluation, self.context
        return draw_strips(
            context.model,
            prompts,
            steps=e.steps,
            guidance=context.guidance.at(e.guidance),
            seed=e.seed,
            size=context.size,
            rows=context.rollout_rows,
        )


def check_evaluated(rewards: Sequence[Reward], scores: Scores, say: Callable[[str], None], training: bool) -> None:
    """Says which scores failed. Raises GuardError when a reward that is at fault has none, before any training."""
    why = faults(rewards)
    for name, failed in zip(scores.names, (~scores.ok).sum(0).tolist(), strict=True):
        if failed:
            rest = len(scores) - failed
            say(f"warn: {failed} of {len(scores)} scores of {name} failed; its mean is of the other {rest}")
        if failed == len(scores) and why and not training:
            raise GuardError(f"before training: all {failed} scores of {name} failed: " + "; ".join(why))
