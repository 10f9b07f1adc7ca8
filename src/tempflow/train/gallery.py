"""Looking at the model as it is: judged pictures of fixed prompts from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tempflow.config import Config
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.evaluate.suite import Report, Stream, draw, evaluate
from tempflow.rewards.protocol import Reward
from tempflow.train.faults import check_look
from tempflow.train.kept import Yardstick
from tempflow.train.setting import Setting


@dataclass(frozen=True)
class Gallery:
    """Draws and judges with the network as it stands when asked; a sharded one is gathered first."""

    config: Config
    setting: Setting
    judges: Sequence[Reward]
    say: Callable[[str], None]

    def look(self, prompts: Sequence[Prompt], stream: Stream, training: bool, guidance: float | None = None) -> Report:
        """Judges fixed prompts from the noise of a test or of a validation; every rank draws and scores a block.

        `training`: whether training has begun, when rewards that all fail are no longer a reason to stop.
        """
        e, setting, world = self.config.evaluation, self.setting, self.setting.world
        self._gathered()
        block = world.block(len(prompts))
        part = evaluate(
            setting.model,
            prompts[block.start : block.stop],
            self.judges,
            total=dict.fromkeys((r.name for r in setting.rewards), 1.0) if setting.total is None else setting.total,
            steps=e.steps,
            guidance=e.guidance if guidance is None else guidance,
            seed=e.seed,
            size=setting.size,
            rows=setting.rollout_rows,
            gold=e.gold,
            first=block.start,
            pause=setting.pause,
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
        check_look(self.judges, scores, self.say, training)
        return report

    def yardstick(self, prompts: Mapping[str, Sequence[Prompt]]) -> Yardstick | None:
        """The untrained model with the guidance that suits it best on validation, and its test report."""
        values = self.config.evaluation.yardstick
        if not values:
            return None
        metric = self.config.evaluation.metric
        best = max(values, key=lambda g: self.look(prompts["validation"], "validation", False, g).mean(metric))
        return best, self.look(prompts["test"], "test", False, best)

    def drawn(self, prompts: Sequence[Prompt]) -> Tensor:
        """Pictures, uint8 [N, H, W, 3]."""
        e = self.config.evaluation
        self._gathered()
        return draw(
            self.setting.model,
            [p.text for p in prompts],
            steps=e.steps,
            guidance=e.guidance,
            seed=e.seed,
            size=self.setting.size,
            rows=self.setting.rollout_rows,
        )

    def _gathered(self) -> None:
        if self.setting.shards is not None:
            self.setting.shards.gather()
