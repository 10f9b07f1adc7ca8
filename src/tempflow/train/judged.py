"""Whose scores credit sees: those of the leaves' pictures, or a latent reward's of the states that edges reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from tempflow.core.credit import CreditRule
from tempflow.core.forest import Forest
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.models.protocol import Conditioning
from tempflow.rewards.protocol import Reward
from tempflow.rewards.safe import faults

ScoreLatents = Callable[[Tensor, Tensor, Tensor], Scores]
"""score_latents(x [B, *S], sigma [B], rows long[B]) -> one score for each noisy latent."""


@dataclass(frozen=True, eq=False)
class ByPictures:
    """Credit sees the scores of the leaves' pictures.

    latent  what latent rewards say of the trained edges (or leaves): nothing here
    """

    latent: tuple[Scores, ...] = ()

    def credited(self, scores: Scores, whole: Forest) -> tuple[Scores, Forest]:
        """The scores that credit sees, and the forest whose leaves they are of. scores: of the whole's leaves."""
        return scores, whole

    def rule(self, credit: CreditRule) -> CreditRule:
        """How these are credited."""
        return credit

    def watched(self, signals: Any, prompt: Tensor, ok: Tensor) -> Any:
        """`train.signals.Signals` with the failures for which a group may be left out."""
        return signals.with_failures(prompt, ok)

    def why(self, rewards: Sequence[Reward]) -> list[str]:
        """What to look at when all that credit sees has failed."""
        return faults(rewards) or ["the rewards said so themselves (None, NaN or infinity)"]

    def map(self, change: Callable[[Scores], Scores]) -> Self:
        return replace(self, latent=tuple(change(scores) for scores in self.latent))

    @property
    def calls(self) -> int:
        """Rows that went through a latent reward."""
        return sum(map(len, self.latent))


@dataclass(frozen=True, eq=False)
class ByLatents(ByPictures):
    """Credit sees the latent reward's scores; those of pictures are only looked at, and so are their failures."""

    def credited(self, scores: Scores, whole: Forest) -> tuple[Scores, Forest]:
        return self.latent[0], whole.as_candidates()

    def rule(self, credit: CreditRule) -> CreditRule:
        """One column, without the weights of pictures' rewards."""
        return credit.weighted(None)

    def watched(self, signals: Any, prompt: Tensor, ok: Tensor) -> Any:
        return signals

    def why(self, rewards: Sequence[Reward]) -> list[str]:
        return ["the latent reward gave NaN or infinity for all of them"]


Judge = Callable[[Callable[[], Conditioning], Forest, int, Schedule], ByPictures]
"""judge(condition, forest, first, schedule): of prompts that are neighbours, of which the first has slot `first`. The
forest's edges are what is trained, with their states."""


def by_pictures(condition: Callable[[], Conditioning], forest: Forest, first: int, schedule: Schedule) -> ByPictures:
    """Without a latent reward."""
    return ByPictures()


@dataclass(frozen=True)
class LatentJudge:
    """Every edge (or leaf) is scored at the σ of the state it reaches. reward: prompts' conditions -> their scorer."""

    reward: Callable[[Conditioning], ScoreLatents]

    def __call__(
        self, condition: Callable[[], Conditioning], forest: Forest, first: int, schedule: Schedule
    ) -> ByPictures:
        edges = forest.edges
        sigma = schedule.after(edges.step.cpu()).to(forest.nodes)
        scores = self.reward(condition())(forest.nodes[edges.child], sigma, edges.prompt - first)
        return ByLatents((Scores(scores.value.cpu(), scores.ok.cpu(), scores.names),))
