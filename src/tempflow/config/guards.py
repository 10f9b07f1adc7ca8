"""What a run left alone watches, and what it does when a figure leaves its range (docs/guards.md).

Actions: "off"; "warn" says it; "skip" leaves out what is bad (an update, or the groups of some prompts) and goes on;
"stop" ends the run with the weights of the last good update.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field

from tempflow.strict import Strict

WarnOrStop = Literal["off", "warn", "stop"]
AnyAction = Literal["off", "warn", "skip", "stop"]


class NonFiniteGuard(Strict):
    """A loss or gradient that is NaN or infinite; it never reaches the weights."""

    action: Literal["skip", "stop"] = Field(
        default="stop", description="skip: drop that optimizer step; stop: end the run"
    )
    patience: int = Field(default=3, ge=1, description="with skip: more dropped steps in a row than this end the run")


class FirstRatioGuard(Strict):
    """Training sees the log-probs of the rollout, up to rounding, as long as no weight has moved."""

    action: WarnOrStop = Field(default="stop", description="what to do above the limit")
    limit: float = Field(
        default=12.0,
        ge=1,
        description="how far rollout and training may be apart, in roundings of a velocity in the model's dtype",
    )


class ClipFractionGuard(Strict):
    """Edges whose ratio is clipped teach nothing."""

    action: WarnOrStop = Field(default="warn", description="what to do above the limit")
    limit: float = Field(default=0.5, gt=0, le=1, description="share of an iteration's trained edges that are clipped")


class ZeroVarianceGuard(Strict):
    """Groups whose rewards are all equal teach nothing."""

    action: WarnOrStop = Field(default="warn", description="what to do above the limit")
    limit: float = Field(default=0.9, gt=0, le=1, description="share of edges in groups without spread, window's mean")
    window: int = Field(default=20, ge=1, description="iterations over which the share is averaged")


class KLGuard(Strict):
    """Trip-wire on the distance to the reference; there is none where algorithm.kl is 0."""

    action: WarnOrStop = Field(default="stop", description="what to do above the limit")
    limit: float = Field(default=1.0, gt=0, description="an iteration's mean KL per latent element, in nats")


class RewardFailuresGuard(Strict):
    """A budget for scores that failed. They are left out of statistics in any case."""

    action: AnyAction = Field(default="warn", description="above the limit; skip: leave out groups with failures")
    limit: float = Field(default=0.05, ge=0, lt=1, description="share of an iteration's leaves without a valid score")


class GoldGuard(Strict):
    """A reward that is only looked at falls while the trained one rises: the trained one is being gamed."""

    action: WarnOrStop = Field(default="warn", description="what to do when it falls further")
    drop: float = Field(default=0.2, gt=0, description="fall below the best validation so far, share of that best")
    patience: int = Field(default=2, ge=1, description="validations in a row that must be that low")


class DiversityGuard(Strict):
    """Pictures of one prompt become alike."""

    action: AnyAction = Field(default="warn", description="below the limit; skip: leave out the groups that are")
    limit: float = Field(default=0.3, gt=0, lt=1, description="mean pairwise distance in a group, share of baseline")
    baseline: int = Field(default=5, ge=1, description="first iterations, which the mean of as many last is held to")


class LatentNormGuard(Strict):
    """Final latents grow or shrink."""

    action: WarnOrStop = Field(default="warn", description="outside the limits")
    limit: float = Field(default=2.0, gt=1, description="RMS of final latents stays in [1/limit, limit] × baseline")
    baseline: int = Field(default=5, ge=1, description="first iterations, which the mean of as many last is held to")


class ArtefactsGuard(Strict):
    """Fine texture, or a pattern in step with the latent grid, gains weight in the pictures."""

    action: WarnOrStop = Field(default="warn", description="what to do above the limit")
    limit: float = Field(default=3.0, gt=1, description="share of picture energy stays below limit × baseline")
    baseline: int = Field(default=5, ge=1, description="first iterations, which the mean of as many last is held to")


class VelocityNormGuard(Strict):
    """The policy's velocities grow beside the starting model's; only where the loss asks both."""

    action: WarnOrStop = Field(default="off", description="outside the limits; off: it is not measured either")
    limit: float = Field(default=1.5, gt=1, description="an iteration's mean RMS ratio stays in [1/limit, limit]")


class GuardsConfig(Strict):
    """Guards of a run. The defaults stay silent in a healthy one."""

    non_finite: NonFiniteGuard = Field(default=NonFiniteGuard(), description="losses and gradients")
    first_ratio: FirstRatioGuard = Field(default=FirstRatioGuard(), description="log-probs of rollout and training")
    clip_fraction: ClipFractionGuard = Field(default=ClipFractionGuard(), description="clipped edges")
    zero_variance: ZeroVarianceGuard = Field(default=ZeroVarianceGuard(), description="groups without spread")
    kl: KLGuard = Field(default=KLGuard(), description="distance to the reference")
    reward_failures: RewardFailuresGuard = Field(default=RewardFailuresGuard(), description="failed scores")
    gold: GoldGuard = Field(default=GoldGuard(), description="untrained validation rewards")
    diversity: DiversityGuard = Field(default=DiversityGuard(), description="likeness within a prompt's group")
    latent_norm: LatentNormGuard = Field(default=LatentNormGuard(), description="size of final latents")
    artefacts: ArtefactsGuard = Field(default=ArtefactsGuard(), description="texture and grid patterns")
    velocity_norm: VelocityNormGuard = Field(default=VelocityNormGuard(), description="size of velocities")
    repeat: int = Field(default=50, ge=1, description="iterations before a warning that stands is said again")
    idle: int = Field(default=20, ge=1, description="more iterations in a row with all groups skipped end the run")

    def check(self, algorithm: str, asked: Collection[str]) -> None:
        """Raises ValueError where a guard needs a weight set that the algorithm's loss does not ask for."""
        action = self.velocity_norm.action
        if action != "off" and "reference" not in asked:
            raise ValueError(
                f"guards.velocity_norm.action: {action!r} compares with the starting model, which the loss of "
                f"{algorithm} does not ask here (its KL may be 0); nearest valid: 'off'"
            )
