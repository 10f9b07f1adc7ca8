"""Terms beside the policy ratio: KL to the reference in six forms, KL to the rollout's policy, the best path's pull."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from tempflow.core.distribution import drift_kl, mean_dims, velocity_kl
from tempflow.core.dynamics import Diffusion, Dynamics
from tempflow.core.objective.edges import Replayed, velocity_of

KLForm = Literal["exact", "drift", "velocity", "k1", "k2", "k3"]


class Pull(Protocol):
    """coefficient · a term of each edge."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        ...

    @property
    def coefficient(self) -> float: ...

    @property
    def weight_sets(self) -> tuple[str, ...]: ...

    @property
    def keeps_mean(self) -> bool:
        """Whether it needs the means that edges were drawn from."""
        ...

    def check(self, dynamics: Dynamics) -> None:
        """Raises ValueError where it needs of the dynamics what they have not."""
        ...

    def __call__(self, at: Replayed) -> Tensor:
        """The term without its coefficient, [B]."""
        ...


@dataclass(frozen=True)
class Divergence:
    """KL(policy ‖ reference) of a step, mean-reduced over latent elements.

    "exact"     mean (μ−μ_ref)²/(2S²) (TempFlow-GRPO)
    "drift"     the same without Δ, mean (μ−μ_ref)²/(2s²), as Flow-GRPO's code has it (its β is about ten times the
                exact form's on a ten-step grid)
    "velocity"  mean (v−v_ref)²
    "k1" "k2" "k3"  Schulman's estimators at the sampled child, element by element and then their mean, with
                d = log p − log p_ref: d, d²/2, e^(−d) − 1 + d. The mean of k1 and k3 over samples of the policy is the
                exact form; as losses on fixed samples k1's gradient is that of log p (0 on average), k2's is the KL's.

    Raises ValueError for a coefficient that is negative or not finite, and for an unknown form.
    """

    coefficient: float
    form: KLForm = "exact"
    name = "kl"
    keeps_mean = False
    weight_sets = ("reference",)

    def __post_init__(self) -> None:
        _check("kl", self.coefficient)
        if self.form not in get_args(KLForm):
            raise ValueError(f"kl_form: {self.form!r} is not one of {', '.join(get_args(KLForm))}")

    def check(self, dynamics: Dynamics) -> None:
        """Raises ValueError for the drift form with dynamics that have no diffusion rate."""
        if self.form == "drift" and not isinstance(dynamics, Diffusion):
            raise ValueError(
                f"kl_form: 'drift' needs a diffusion rate, which {dynamics} has not; nearest valid: 'exact'"
            )

    def __call__(self, at: Replayed) -> Tensor:
        if self.form == "velocity":
            return velocity_kl(at.velocity["policy"], at.velocity["reference"])
        reference, batch = at.transition("reference"), at.batch
        if self.form == "exact":
            return at.policy.kl(reference)
        if self.form == "drift":
            self.check(batch.dynamics)
            assert isinstance(batch.dynamics, Diffusion)
            return drift_kl(at.policy, reference, batch.dynamics.rate(batch.schedule, batch.step, batch.scale))
        d = at.policy.log_density(batch.y.to(at.policy.mean)) - reference.log_density(batch.y.to(reference.mean))
        if self.form == "k1":
            return mean_dims(d)
        if self.form == "k2":
            return mean_dims(d.square() / 2)
        return mean_dims((-d).expm1() + d)


class LogRatio(Protocol):
    """log r of a replayed batch, [B]: a form of the ratio (`ratio.Ratio`)."""

    @property
    def keeps_mean(self) -> bool: ...

    def __call__(self, at: Replayed) -> Tensor: ...


@dataclass(frozen=True)
class ToRollout:
    """k3 to the policy that rolled out, e^(−log r) − 1 + log r, of that form of the ratio: GCPO's code has it of a
    chunk's.

    0 at the first update, where r = 1, and so is its gradient. Raises ValueError for a bad coefficient.
    """

    coefficient: float
    log_ratio: LogRatio
    name = "rollout_kl"
    weight_sets = ()

    def __post_init__(self) -> None:
        _check("rollout_kl", self.coefficient)

    @property
    def keeps_mean(self) -> bool:
        return self.log_ratio.keeps_mean

    def check(self, dynamics: Dynamics) -> None:
        """Any dynamics will do."""

    def __call__(self, at: Replayed) -> Tensor:
        log_ratio = self.log_ratio(at)
        return (-log_ratio).expm1() + log_ratio


@dataclass(frozen=True)
class Imitation:
    """mean (v_θ(x) − sg V*)²: V* is the velocity predicted in the rollout at the same step of the group's best path.

    Dynamic-TreeRPO's layer-wise supervised term (its weights ω_t are not known; here they are 1). It is 0 on the best
    path itself before an update. Needs the edges' means and `peers`. Raises ValueError for a bad coefficient.
    """

    coefficient: float
    name = "imitation"
    keeps_mean = True
    weight_sets = ()

    def __post_init__(self) -> None:
        _check("imitation", self.coefficient)

    def check(self, dynamics: Dynamics) -> None:
        """Any dynamics will do."""

    def __call__(self, at: Replayed) -> Tensor:
        peers = at.batch.peers
        if peers is None:
            raise ValueError("peers: are missing, and imitation needs the best path's edges; give them by the credit")
        best = velocity_of(peers.mean, peers.x, at.batch, peers.scale)
        return velocity_kl(at.velocity["policy"], best.detach())


def _check(name: str, coefficient: float) -> None:
    if not (math.isfinite(coefficient) and coefficient >= 0):
        raise ValueError(f"{name}: {coefficient} must be finite and ≥ 0; 0 turns it off")
