"""Objectives that regress the velocity at re-noised clean samples: negative-aware fine-tuning, signed least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.corruption import Corruption, check_velocity
from tempflow.core.likelihood_proxy import adaptive_error, adaptive_scale, square_error, x0_of_velocity
from tempflow.core.objective import regularizer
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.leaves import NEEDS_NO_VELOCITY, LeafBatch, Noised, noised
from tempflow.core.objective.regularizer import LeafRegularizer
from tempflow.core.state import Reduce

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
Anchor = Literal["constant", "balanced"]
Form = Literal["sum", "target"]


def optimality(advantage: Tensor, maximum: float, mode: Mode = "all") -> Tensor:
    """r = clip(A/(2·maximum) + ½, 0, 1): how likely a sample is one to keep. Same shape as `advantage`.

    `mode`, of A before that: "all" as it is; "positive_only", "negative_only" the other sign set to 0; "one_only" 1
    where A > 0, else 0; "binary" its sign. DiffusionNFT (certain: read in code). Raises ValueError for an unknown mode
    or a maximum that is not finite and positive.
    """
    positive("advantage_max", maximum, 5.0)
    if mode == "positive_only":
        advantage = advantage.clamp(min=0)
    elif mode == "negative_only":
        advantage = advantage.clamp(max=0)
    elif mode == "one_only":
        advantage = (advantage > 0).to(advantage)
    elif mode == "binary":
        advantage = advantage.sign()
    elif mode != "all":
        raise ValueError(f"mode: {mode!r} is not one of {', '.join(get_args(Mode))}")
    return (advantage / (2 * maximum) + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class NegativeAware:
    """DiffusionNFT: L = mean[ M·(r·ℓ⁺ + (1−r)·ℓ⁻)/β ] + regularizers, over samples and their (t, ε).

    With β = `mix_beta`, M = `advantage_max` and r = `optimality` of A:
    v⁺ = β·v + (1−β)·v_old and v⁻ = (1+β)·v_old − β·v, a blend of the policy with old and its reflection about it;
    ℓ± = mean (x̂0± − x0)² / w±, with w± = sg max(mean |x̂0± − x0|, 1e-5), each branch its own (`adaptive`; else w = 1).

    Where the policy is old, the gradient is A·∇ℓ whatever β. Without w it is M times signed least squares with
    A' = 2r−1 and the balanced anchor β−A', so it is convex for every sample. r = ½ is not "no loss", it pulls to old.
    Published: β 1 or 0.1, M 5, a velocity penalty of 1e-4 to the reference (called train.beta there). Certain: read in
    code. Raises ValueError for a `mix_beta` or `advantage_max` that is not finite and positive, or an unknown mode.

    With `kl` · mean (v − v_ref)² as the regularizer::

        x = (1 - t) * x0 + t * noise
        u, u_old, u_ref = v(x, t, c), v_old(x, t, c), v_ref(x, t, c)
        implicit = mix_beta * u + (1 - mix_beta) * u_old, (1 + mix_beta) * u_old - mix_beta * u
        gaps = [x - t * branch - x0 for branch in implicit]
        scales = [gap.abs().mean(D, True).clamp(min=1e-5).detach() if adaptive else 1 for gap in gaps]
        positive, negative = ((gap**2).mean(D, True) / scale for gap, scale in zip(gaps, scales))
        r = (A / (2 * advantage_max) + 0.5).clamp(0, 1)
        loss = advantage_max * (r * positive + (1 - r) * negative) / mix_beta
        loss = (loss + kl * ((u - u_ref) ** 2).mean(D, True)).mean()
    """

    mix_beta: float = 1.0
    advantage_max: float = 5.0
    mode: Mode = "all"
    adaptive: bool = True
    regularizers: tuple[LeafRegularizer, ...] = ()
    unit = "pair"
    by_stream = True

    def __post_init__(self) -> None:
        positive("mix_beta", self.mix_beta, 1.0)
        optimality(torch.zeros(1), self.advantage_max, self.mode)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return regularizer.named(("policy", "old"), self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for tokens, which have no velocity."""
        check_velocity(corruption, "NegativeAware", NEEDS_NO_VELOCITY)
        regularizer.check(corruption, self.regularizers)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        v, old, beta = at.policy, at.velocity["old"], self.mix_beta
        error = adaptive_error if self.adaptive else square_error
        near = x0_of_velocity(at.x, beta * v + (1 - beta) * old, at.t)
        far = x0_of_velocity(at.x, (1 + beta) * old - beta * v, at.t)
        positive = at.measured(lambda mean: error(near, at.x0, mean))
        negative = at.measured(lambda mean: error(far, at.x0, mean))
        keep = optimality(batch.advantage, self.advantage_max, self.mode)
        r = at.by_pair(keep)
        loss = at.merged(self.advantage_max * (r * positive + (1 - r) * negative) / beta)
        loss, metrics = regularizer.add(loss, self.regularizers, at)
        with torch.no_grad():
            metrics |= {
                "optimality": batch.merged(keep),
                "positive_error": at.by_sample(at.merged(positive.detach())).mean(1),
                "negative_error": at.by_sample(at.merged(negative.detach())).mean(1),
                "old_gap": at.by_sample(square_error(v.detach(), old, at.layout.mean)).mean(1),
            }
        return Loss(loss.mean(), metrics)


@dataclass(frozen=True)
class SignedLeastSquares:
    """AdvantageFlow: L = mean[ A·‖x̂0 − x0‖² + γ·‖x̂0 − x̂0_old‖² + λ·‖x̂0 − x̂0_ref‖² ] + regularizers, ‖·‖² a mean.

    γ = `gamma` ("constant" anchor) or γ = `gamma` − A ("balanced"); λ = `reference`. κ = A + γ + λ is the curvature: a
    sample with κ ≤ 0 has no minimum, so |A| must stay at most `advantage_max` and κ positive up to there. The optimum
    over free functions (λ = 0) is the exact velocity of q ∝ (γ + A)·π_old.

    `form`: "sum" as above; "target" κ·‖x̂0 − sg y‖² with y = (A·x0 + γ·x̂0_old + λ·x̂0_ref)/κ, of the same gradient,
    rounds better, and its value is never negative: regression to a detached target, beyond old where A < 0. `concave`
    lets κ reach 0 and below, where there is no such target: the form is then the sum, which has no lower bound.
    `adaptive`: divide each sample by sg max(mean |x̂0 − x0|, 1e-5), as DiffusionNFT and not as the paper does.

    γ 1.1 or 1−A with |A| ≤ 1, λ 1e-3: the paper's (arXiv 2605.26013, Eq. 5–7; sure). Raises ValueError for an unknown
    form or anchor, numbers that are negative or not finite, or κ that can reach 0 without `concave`.

    ::

        x = (1 - t) * x0 + t * noise
        mine, before, start = x - t * v(x, t, c), x - t * v_old(x, t, c), x - t * v_ref(x, t, c)
        g = gamma - A if anchor == "balanced" else gamma
        kappa = A + g + reference
        y = (A * x0 + g * before + reference * start) / kappa
        target = kappa * ((mine - y) ** 2).mean(D, True)
        total = (A * (mine - x0) ** 2 + g * (mine - before) ** 2 + reference * (mine - start) ** 2).mean(D, True)
        scale = (mine - x0).abs().mean(D, True).clamp(min=1e-5).detach() if adaptive else 1
        loss = ((total if form == "sum" or concave else target) / scale).mean()
    """

    gamma: float = 1.1
    anchor: Anchor = "constant"
    reference: float = 1e-3
    advantage_max: float = 1.0
    form: Form = "target"
    concave: bool = False
    adaptive: bool = False
    regularizers: tuple[LeafRegularizer, ...] = ()
    unit = "pair"
    by_stream = True

    def __post_init__(self) -> None:
        positive("advantage_max", self.advantage_max, 1.0)
        positive("gamma", self.gamma, 1.1)
        not_negative("reference", self.reference, "0 turns the anchor off")
        if self.anchor not in get_args(Anchor):
            raise ValueError(f"anchor: {self.anchor!r} is not one of {', '.join(get_args(Anchor))}")
        if self.form not in get_args(Form):
            raise ValueError(f"form: {self.form!r} is not one of {', '.join(get_args(Form))}")
        least = self.advantage_max - self.reference
        if self.anchor == "constant" and not self.concave and not self.gamma > least:
            raise ValueError(
                f"gamma: {self.gamma} leaves a sample of advantage −{self.advantage_max} without a minimum; "
                f"nearest valid: above {least:g}, or `concave` to run it all the same"
            )

    @property
    def weight_sets(self) -> tuple[str, ...]:
        required = ("policy", "old", "reference") if self.reference > 0 else ("policy", "old")
        return regularizer.named(required, self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for tokens, which have no velocity."""
        check_velocity(corruption, "SignedLeastSquares", NEEDS_NO_VELOCITY)
        regularizer.check(corruption, self.regularizers)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only.

        Raises ValueError for an advantage beyond ±advantage_max.
        """
        widest = float(batch.advantage.abs().max())
        if widest > self.advantage_max * (1 + 1e-6):
            raise ValueError(
                f"advantage: {widest:g} is beyond ±{self.advantage_max:g}, where a sample may have no minimum; "
                f"nearest valid: {self.advantage_max:g}"
            )
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        parts = self._parts(at, at.by_pair(batch.advantage))
        x0 = x0_of_velocity(at.x, at.policy, at.t)
        loss = at.merged(at.measured(lambda mean: self._quadratic(x0, at, parts, mean)))
        loss, metrics = regularizer.add(loss, self.regularizers, at)
        with torch.no_grad():
            metrics |= {
                "error": at.by_sample(square_error(x0.detach(), at.x0, at.layout.mean)).mean(1),
                "old_gap": at.by_sample(square_error(at.policy.detach(), at.velocity["old"], at.layout.mean)).mean(1),
            }
        return Loss(loss.mean(), metrics)

    def _quadratic(self, x0: Tensor, at: Noised, parts: list[tuple[Tensor, Tensor]], mean: Reduce) -> Tensor:
        """The loss of every state but for regularizers, in the shape of the mean."""
        if self.form == "sum" or self.concave:
            errors = [(weight, square_error(x0, target, mean)) for weight, target in parts]
            loss = torch.stack([_columns(weight, error) * error for weight, error in errors]).sum(0)
        else:
            curvature = torch.stack([weight for weight, _ in parts]).sum(0)
            drawn = [at.layout.spread(weight / curvature, target) * target for weight, target in parts]
            error = square_error(x0, torch.stack(drawn).sum(0), mean)
            loss = _columns(curvature, error) * error
        return loss / adaptive_scale(x0, at.x0, mean) if self.adaptive else loss

    def _parts(self, at: Noised, advantage: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each quadratic's weight, [B·M] or by stream [B·M, K], and detached centre [B·M, *S]."""
        gamma = torch.full_like(advantage, self.gamma)
        if self.anchor == "balanced":
            gamma = gamma - advantage
        parts = [(advantage, at.x0), (gamma, x0_of_velocity(at.x, at.velocity["old"], at.t))]
        if self.reference > 0:
            weight = torch.full_like(advantage, self.reference)
            parts.append((weight, x0_of_velocity(at.x, at.velocity["reference"], at.t)))
        return parts


def _columns(weight: Tensor, like: Tensor) -> Tensor:
    """[B·M] weights that fit results by stream, [B·M, K]; others as they are."""
    return weight[:, None] if weight.dim() < like.dim() else weight
