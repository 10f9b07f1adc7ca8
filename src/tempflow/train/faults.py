"""What is wrong when there are no scores to learn from or to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.models.finite import ADVICE, WHOLE, WHY, told
from tempflow.rewards.patience import faults
from tempflow.rewards.protocol import Reward
from tempflow.train.guards import GuardError
from tempflow.train.setting import Setting
from tempflow.train.step import Credit, Experience


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


def check_credit(given: Credit, iteration: int) -> None:
    """Raises GuardError for an advantage or a weight that is to be trained on and is not finite."""
    ok = given.advantage.ok
    for name, value in (("advantage", given.advantage.value), ("weight", given.weight)):
        bad = ok & ~value.isfinite()
        if bool(bad.any()):
            raise GuardError(
                f"iteration {iteration}: the {name} of {int(bad.sum())} of {int(ok.sum())} edges is not finite. No "
                "weight was changed. Look at the size of this iteration's rewards, and what the algorithm observes"
            )


def check_scored(setting: Setting, experience: Experience, iteration: int) -> None:
    """Raises GuardError, with what the rewards or the model did, when no score that trains is valid.

    With a latent reward that is its own; the rewards of pictures are then to look at, and may all have failed.
    """
    scores = experience.credited[0]
    if scores.total(experience.rule(setting.algorithm.credit).reward_weights)[1].any():
        return
    broken = experience.broken
    if bool((broken != WHOLE).all()):
        why = [f"{WHY[code]}: {ADVICE}" for code in broken.unique().tolist()]
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
            rest = len(scores) - failed
            say(f"warn: {failed} of {len(scores)} scores of {name} failed; its mean is of the other {rest}")
        if failed == len(scores) and why and not training:
            raise GuardError(f"before training: all {failed} scores of {name} failed: " + "; ".join(why))
