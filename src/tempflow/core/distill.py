"""What few-step generators are taught by: gradients of distribution matching, paths and targets of a teacher, gates.

Pure functions of states, predictions and scores. x is the student's own sample, x_t = (1−t)·x + t·ε its re-noised
state, x̂_real and x̂_fake the clean samples that the teacher (with its guidance: the caller's) and the model of the
student's own samples predict there. By Tweedie's formula

    x̂_fake − x̂_real = t²/(1−t) · (s_fake − s_real),

a difference of scores: to move x against it is to descend KL(student ‖ teacher) of the noised laws (DMD, arXiv
2311.18828). Tensors are [B, *S]; arithmetic is in at least float32. `layout` says what counts in a mean; each stream
is normalised and averaged by itself. Tensors whose shapes do not fit raise ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.likelihood_proxy import FLOOR
from tempflow.core.rollout import Predict
from tempflow.core.schedule import Schedule, refined
from tempflow.core.state import WHOLE, Reduce, StateLayout, to_rows, upcast
from tempflow.core.unroll import unroll

TINY = 1e-12
"""The smallest mean square that a direction is taken of."""


def matching_gradient(fake: Tensor, real: Tensor, anchor: Tensor | None = None, layout: StateLayout = WHOLE) -> Tensor:
    """g = (x̂_fake − x̂_real) / mean |anchor − x̂_real|, [B, *S], detached: what a student's sample should move against.

    Args:
        fake, real: x̂_fake and x̂_real at one x_t.
        anchor: the student's sample x (DMD, DMD2) or the noisy x_t (DP-DMD's code); None: no normaliser.

    The mean is each sample's own and at least 1e-5: where t goes to 0 both differences vanish, and so does g (the
    codes replace the NaN of 0/0). With x_t as anchor g is (v_real − v_fake)/mean |v_real| at every t. A NaN of a
    network stays one, for a guard to see. g is 0 at held elements.
    """
    fake, real = _alike("real", fake.detach(), real.detach())
    gap = fake - real
    if anchor is not None:
        real, anchor = _alike("anchor", real, anchor.detach())
        scale = layout.by_stream((anchor - real).abs())
        gap = gap / layout.spread(torch.where(scale < FLOOR, FLOOR, scale), gap)
    return layout.silence(gap)


def implicit_target(x: Tensor, gradient: Tensor) -> Tensor:
    """y = x − g, [B, *S], detached: the sample that a step of distribution matching asks for. It can be decoded and
    scored (GDMD)."""
    x, gradient = _alike("gradient", x.detach(), gradient.detach())
    return x - gradient


def surrogate(x: Tensor, gradient: Tensor, layout: StateLayout = WHOLE) -> Tensor:
    """½·mean (x − sg[x − g])², [B]: its gradient on each row of x is g/D, D the elements that count.

    It is computed as ½·mean (x − sg[x] + g)²: the same number, without the rounding of x − g, which is as large as a
    small g in half precision. The mean over B has the codes' gradient, g over all elements of the batch.
    """
    x, gradient = _alike("gradient", x, gradient.detach())
    return layout.mean((x - x.detach() + gradient).square()) / 2


def pull(x: Tensor, target: Tensor, layout: StateLayout = WHOLE) -> Tensor:
    """½·mean (x − sg y)², [B]: regression to a target that was made earlier."""
    x, target = _alike("target", x, target.detach())
    return layout.mean((x - target).square()) / 2


def mean_velocity(x: Tensor, reached: Tensor, sigma: Tensor, below: Tensor) -> Tensor:
    """(x − y)/(σ − σ'), [B, *S], detached: by this velocity one Euler step from x at σ lands on y at σ'.

    sigma, below: [B], σ > σ'. It is what a student regresses on each segment of a teacher's path, and DP-DMD's target
    of the first step, ṽ = (ε − z̃)/(1 − t̃). Raises ValueError where looking is free (on the CPU) unless σ > σ'.
    """
    x, reached = _alike("reached", x.detach(), reached.detach())
    if sigma.device.type == "cpu" and below.device.type == "cpu" and not bool((sigma > below).all()):
        at = int((sigma > below).int().argmin())
        raise ValueError(f"below: {float(below[at])} must be below sigma, {float(sigma[at])}; nearest valid: 0.0")
    return (x - reached) / to_rows(sigma.to(x) - below.to(x), x)


def velocity_error(velocity: Tensor, target: Tensor, layout: StateLayout = WHOLE) -> Tensor:
    """mean (v − sg v*)², [B]: the loss of segment matching, of DP-DMD's first step and of a fake score."""
    velocity, target = _alike("target", layout.silence(velocity), target.detach())
    return layout.mean((velocity - target).square())


def teacher_path(
    x: Tensor,
    schedule: Schedule,
    predict: Predict,
    rows: Tensor,
    parts: int,
    shift: float = 1.0,
    layout: StateLayout = WHOLE,
) -> Tensor:
    """States [T+1, B, *S] at the student's nodes of the teacher's Euler path from x, without gradients.

    schedule  the student's grid. The teacher walks it with every step cut into `parts` (`schedule.refined`, `shift`)
    predict   the teacher with its guidance

    Of a part of a path, `unroll` with `first`, `stop`, look=False and last=0 gives the end.
    """
    walked = unroll(x, refined(schedule, parts, shift), predict, rows, look=False, last=0, layout=layout)
    nodes = [visit.x for visit in walked.visits[::parts]]
    return torch.stack([*nodes, walked.x])


def segment_targets(path: Tensor, schedule: Schedule) -> Tensor:
    """Velocities [T, B, *S] by which a student steps from node to node of a path [T+1, B, *S] on its own grid."""
    if len(path) != schedule.steps + 1:
        raise ValueError(f"path: {len(path)} nodes; nearest valid: {schedule.steps + 1}, those of the schedule")
    step = torch.arange(schedule.steps, device=path.device)
    return mean_velocity(path[:-1], path[1:], schedule.at(step), schedule.after(step))


def nearest_nodes(student: Schedule, teacher: Schedule) -> Tensor:
    """For each node of the student's grid that of the teacher's whose σ is nearest, LongTensor [T+1], on the CPU.

    Of two as near it is the noisier. Where the student's nodes are among the teacher's, they are found.
    """
    mine, theirs = (schedule.sigmas.double().cpu() for schedule in (student, teacher))
    return (mine[:, None] - theirs[None, :]).abs().argmin(1)


def reward_gate(gap: Tensor, temperature: float = 1.0, least: float = 0.0) -> Tensor:
    """sigmoid((R_teacher − R_student)/τ), [B], detached and at least `least`: how much a teacher is followed.

    gap: [B], R_teacher − R_student of one prompt and noise, best in units of the reward's own spread. Equal rewards
    give ½; a worse teacher little, never 0 but by underflow. A NaN, the gap of a failed score, gives 0: that sample is
    not shaped. RATS (arXiv 2604.14910): the sigmoid is the paper's by a second-hand text; τ and `least` are ours.
    """
    positive("temperature", temperature, 1.0)
    if not 0 <= least <= 1:
        raise ValueError(f"least: {least} must be in [0, 1]; 0 turns it off")
    gate = torch.sigmoid(upcast(gap.detach()) / temperature).clamp(min=least)
    return torch.where(gap.isnan(), 0.0, gate)


def shaping(student: Tensor, teacher: Tensor, square: float = 1.0, layout: StateLayout = WHOLE) -> Tensor:
    """1 − cos(x̂_S, sg x̂_T) + c·mean (x̂_S − sg x̂_T)², [B], of clean samples predicted at matched σ (RATS).

    square: c, ≥ 0; its size is ours. The cosine is taken over the elements that count. A sample of zeros has no
    direction: 1 − cos is ½ beside another, and 0 between two of them.
    """
    not_negative("square", square, "0 turns it off")
    student, teacher = _alike("teacher", student, teacher.detach())

    def measure(mean: Reduce) -> Tensor:
        mine, theirs = mean(student.square()), mean(teacher.square())
        of_mine, of_theirs = mine.clamp(min=TINY), theirs.clamp(min=TINY)
        # ½·‖a − b‖² of both directions: 1 − cos, and 0 of two zeros
        cosine = mean(student * teacher) / (of_mine * of_theirs).sqrt()
        apart = (mine / of_mine + theirs / of_theirs) / 2 - cosine
        return apart + square * mean((student - teacher).square())

    return layout.measured(measure)


def target_optimality(target: Tensor, own: Tensor, scale: float | Tensor) -> Tensor:
    """r = ½ + ½·clip((R(y) − R(x))/Z, −1, 1), [B], detached: how likely a target is one to keep (GDMD, Eq. 5).

    Args:
        target, own: [B], scores of the implicit target and of the student's own sample, the baseline. There is no
            group mean: where matching helps, r is above ½ for all.
        scale: Z, above 0: a number or [B] (the paper: "could be the global reward std").

    A NaN (a failed score) stays one: heads take it for ½, and `guided` leaves such a target's reward term out.
    """
    if isinstance(scale, float | int):
        positive("scale", scale, "the rewards' standard deviation")
    elif scale.device.type == "cpu" and not bool((scale > 0).all()):
        raise ValueError(f"scale: {float(scale.min())} must be above 0; the rewards' standard deviation is usual")
    if target.shape != own.shape:
        raise ValueError(f"own: shape {list(own.shape)} must be {list(target.shape)}, one score for each target")
    gap = upcast(target.detach()) - upcast(own.detach())
    return 0.5 + 0.5 * (gap / scale).clamp(-1, 1)


def negative_aware(
    x: Tensor, old: Tensor, target: Tensor, optimality: Tensor, mix: float = 1.0, layout: StateLayout = WHOLE
) -> Tensor:
    """[r·½·mean (x⁺ − y)² + (1−r)·½·mean (x⁻ − y)²]/β, [B], with x± = x_old ± β·(x − x_old): DiffusionNFT's head on a
    target (GDMD, Eq. 6, where x is what the student's velocity leads to).

    mix: β. r = 1 with β = 1 is `pull`. With student = old its gradient is (2r−1)·(x − y)/D, exactly 0 where r = ½.
    """
    positive("mix", mix, 1.0)
    x, old = _alike("old", x, old.detach())
    move = mix * (x - old)
    positive_part, negative_part = pull(old + move, target, layout), pull(old - move, target, layout)
    r = _known(optimality).to(positive_part)
    return (r * positive_part + (1 - r) * negative_part) / mix


def signed_squares(
    x: Tensor, old: Tensor, target: Tensor, optimality: Tensor, anchor: float = 1.1, layout: StateLayout = WHOLE
) -> Tensor:
    """A·½·mean (x − y)² + γ·½·mean (x − x_old)², [B], with A = 2r − 1: AdvantageFlow's head on a target.

    anchor: γ > 1, so that every sample has a minimum. Equal scores (r = ½) leave the anchor alone, whose gradient is
    exactly 0 while student = old. GDMD has no such head; this one is ours.
    """
    if not (math.isfinite(anchor) and anchor > 1):
        raise ValueError(f"anchor: {anchor} leaves a target of r = 0 without a minimum; nearest valid: above 1")
    own = pull(x, target, layout)
    return (2 * _known(optimality).to(own) - 1) * own + anchor * pull(x, old, layout)


def guided(matching: Tensor, reward: Tensor, optimality: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """λ·L_DMD + γ·L_RL, [B] (GDMD, Eq. 7): `matching` is each target's `pull`, `reward` its head.

    weights: (λ, γ), unknown in the paper. Where the optimality is NaN, as a score failed, the first term is left.
    """
    share, gamma = weights
    not_negative("weights[0]", share, "0 leaves the reward term alone")
    not_negative("weights[1]", gamma, "0 is plain distribution matching")
    return share * matching + gamma * torch.where(optimality.isnan(), 0.0, reward)


def _known(optimality: Tensor) -> Tensor:
    """Detached, and ½ where it is NaN: a NaN factor would reach the gradient through any mask that comes later."""
    return torch.where(optimality.isnan(), 0.5, optimality).detach()


def _alike(name: str, t: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32."""
    if t.shape != other.shape:  # they would broadcast without a word
        raise ValueError(f"{name}: shape {list(other.shape)} must be {list(t.shape)}")
    dtype = torch.promote_types(upcast(t).dtype, upcast(other).dtype)
    return t.to(dtype), other.to(dtype)
