"""What must hold before weights move. Each guard stops the run with a message that says what to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

RATIO_SHARE = 0.1
"""How much of the clip range the log ratio of a first update may use: at that point policy and sampler are equal."""


class GuardError(RuntimeError):
    """A guard stopped the run; weights are those of the last good update."""


def check_finite_loss(loss: Tensor, iteration: int) -> None:
    """Raises GuardError for a NaN or infinite loss, before its backward."""
    if not torch.isfinite(loss):
        raise GuardError(
            f"iteration {iteration}: the loss is {loss.item()}. No weight was changed. Look at log_ratio_abs and the "
            "rewards of this iteration in metrics.jsonl; a lower learning rate or float32 usually helps"
        )


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, iteration: int) -> float:
    """Clips to `max_norm` and returns the norm before; raises GuardError for a NaN or infinite norm."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not math.isfinite(norm):
        raise GuardError(
            f"iteration {iteration}: the gradient norm is {norm}. No weight was changed. Look at the last steps of the "
            "schedule (tiny σ), at half precision, and at the learning rate"
        )
    return norm


def check_first_ratio(log_ratio: float, clip: float) -> None:
    """Raises GuardError when the first update's largest |log ratio| exceeds a tenth of the clip range.

    Policy and sampler have equal weights then, so the ratio must be 1 up to rounding.
    """
    if not log_ratio <= RATIO_SHARE * clip:
        raise GuardError(
            f"first update: |log ratio| is {log_ratio:.2e}, above a tenth of the clip range {clip:.2e}, although "
            "policy and sampler have the same weights. Look at: dropout or train-mode layers, guidance or prompts that "
            "differ between rollout and training, latents stored in a lower precision than they were scored in, "
            "batch-size-dependent kernels in half precision (try model.dtype float32, or a wider algorithm.clip)"
        )


def check_rewards(valid: int, total: int, iteration: int) -> None:
    """Raises GuardError when not one reward of an iteration is valid."""
    if valid == 0:
        raise GuardError(
            f"iteration {iteration}: all {total} rewards failed, so there is nothing to learn from. Look at the "
            "warnings above: the reward function's own exception is printed there"
        )
