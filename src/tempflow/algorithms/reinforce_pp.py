"""REINFORCE++ for flows: one baseline and one scale for the whole batch (arXiv 2501.03262).

Claim. A prompt's few rewards give a noisy mean and a noisier standard deviation; those of the whole batch are steady,
and no prompt is easier to overfit than another.

    advantage   baseline "batch":  A = (R − mean of the iteration) / (std of the iteration + eps)
                baseline "group":  d = R − mean of the prompt's group, A = d / (root mean square of d + eps)
    loss        Flow-GRPO's, with the k2 estimate of the KL

With "batch" a prompt whose pictures are all equally good still moves the policy, towards or away from all of them;
"group" is the paper's variant for many samples a prompt ("REINFORCE++-baseline"). With "group" it is SLAS at γ = 0.

Cost and plan: Flow-GRPO's. Defaults: Flow-GRPO's; β 0.004 as k2's gradient is the exact KL's (general knowledge of the
method; no code for flows is known). The published form puts a k1 KL into the reward, the variant k2 into the loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tempflow.algorithms.base import Algorithm, one_of, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.core.credit import GroupZScore
from tempflow.core.objective.regularizer import KLForm


@texts_of(flow_grpo)
def reinforce_pp(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    baseline: Literal["batch", "group"] = "batch",
    kl: float = 0.004,
    kl_form: KLForm = "k2",
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """REINFORCE++ (arXiv 2501.03262) on Flow-GRPO's chains: advantages are normalised over the whole iteration.

    Args:
        group: pictures per prompt; compared with each other where `baseline` is "group".
        baseline: what is taken from a reward: the mean of the "batch", or of the prompt's "group".
        kl_form: "k2", "k1", "k3", "exact", "drift" or "velocity".
        eps: added to the batch's scale.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("baseline", baseline, ("batch", "group"))
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    base = flow_grpo(steps, group, train_steps, noise_level, clip, kl=kl, kl_form=kl_form)
    credit = GroupZScore(by=("prompt", "step"), center=baseline, scale="pooled", eps=eps, clip=advantage_clip)
    return replace(base, name="reinforce_pp", credit=credit)
