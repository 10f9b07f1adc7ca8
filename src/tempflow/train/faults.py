"""What is wrong when there are no scores to learn from or to judge by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tempflow.core.scores import Scores
from tempflow.rewards.patience import faults
from tempflow.rewards.protocol import Reward
from tempflow.train.guards import GuardError
from tempflow.train.setting import Setting
from tempflow.train.step import Experience


def check_scored(setting: Setting, experience: Experience, iteration: int) -> None:
    """Raises GuardError, with what the rewards or the model did, when no score that trains is valid.

    With a latent reward that is its own; the rewards of pictures are then to look at, and may all have failed.
    """
    scores = experience.credited[0]
    if scores.total(experience.rule(setting.algorithm.credit).reward_weights)[1].any():
        return
    if not math.isfinite(experience.signals.metrics()["latent_rms"]):
        why = ["the model's final latents are not finite: try model.dtype float32, other weights or less guidance"]
    elif experience.judged is not None:
        why = ["the latent reward gave NaN or infinity for all of them"]
    else:
        why = faults(setting.rewards) or ["the rewards said so themselves (None, NaN or infinity)"]
    raise GuardError(
        f"iteration {iteration}: all {len(scores)} rewards failed, so there is nothing to learn from: " + "; ".join(why)
    )


def check_look(judges: Sequence[Reward], scores: Scores, say: Callable[[str], None], training: bool) -> None:
    """Says which scores failed. Raises GuardError when a reward that is at fault has none, before any training."""
    why = faults(judges)
    for name, failed in zip(scores.names, (~scores.ok).sum(0).tolist(), strict=True):
        if failed:
            say(f"warn: {failed} of {len(scores)} scores of {name} failed; its mean is that of the others")
        if failed == len(scores) and why and not training:
            raise GuardError(f"before training: all {failed} scores of {name} failed: " + "; ".join(why))
