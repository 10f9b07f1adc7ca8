"""Terms beside an objective that hold the policy near something.

Of edges: KL to the reference or to the rollout's policy, and imitation of the best path. Of re-noised clean samples: a
distance or a KL to another weight set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from torch import Tensor

from tempflow.core.checks import not_negative
from tempflow.core.corruption import Corruption, TokenLikelihood, check_velocity
from tempflow.core.distribution import Categorical, drift_kl, gaussian, velocity_kl
from tempflow.core.dynamics import Diffusion, Dynamics
from tempflow.core.likelihood_proxy import Adaptive, LikelihoodProxy
from tempflow.core.objective.edges import Replayed, velocity_of
from tempflow.core.objective.leaves import Noised, check_proxy
from tempflow.core.state import to_rows

KLForm = Literal["exact", "drift", "velocity", "k1", "k2", "k3"]
Space = Literal["velocity", "x0", "path"]
Estimator = Literal["k1", "k2", "k3", "k3_reversed"]


class EdgeRegularizer(Protocol):
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
        """Whether it reads the batch's `mean`."""
        ...

    @property
    def keeps_peers(self) -> bool:
        """Whether it reads the batch's `peers`."""
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

    Steps of tokens have the exact form and k1 to k3. Raises ValueError for a coefficient that is negative or not
    finite, and for an unknown form.
    """

    coefficient: float
    form: KLForm = "exact"
    name = "kl"
    keeps_mean = False
    keeps_peers = False
    weight_sets = ("reference",)

    def __post_init__(self) -> None:
        not_negative("kl", self.coefficient)
        if self.form not in get_args(KLForm):
            raise ValueError(f"kl_form: {self.form!r} is not one of {', '.join(get_args(KLForm))}")

    def check(self, dynamics: Dynamics) -> None:
        """Raises ValueError for the drift form with dynamics that have no diffusion rate, or the velocity form of
        tokens."""
        if self.form == "velocity":
            check_velocity(dynamics.corruption, "kl_form: 'velocity'", "'exact'")
        if self.form == "drift" and not isinstance(dynamics, Diffusion):
            raise ValueError(
                f"kl_form: 'drift' needs a diffusion rate, which {dynamics} has not; nearest valid: 'exact'"
            )

    def __call__(self, at: Replayed) -> Tensor:
        if self.form == "velocity":
            return velocity_kl(at.velocity["policy"], at.velocity["reference"], at.batch.layout)
        reference, batch = at.transition("reference"), at.batch
        if self.form == "exact":
            return at.law.kl(reference)
        if self.form == "drift":
            self.check(batch.dynamics)
            assert isinstance(batch.dynamics, Diffusion)
            rate = batch.dynamics.rate(batch.schedule, batch.step, batch.scale)
            return drift_kl(at.policy, gaussian(reference), rate)
        d = at.law.log_density(batch.y_of(at.law)) - reference.log_density(batch.y_of(reference))
        if self.form == "k1":
            return batch.layout.mean(d)
        if self.form == "k2":
            return batch.layout.mean(d.square() / 2)
        return batch.layout.mean((-d).expm1() + d)


class LogRatio(Protocol):
    """log r of a replayed batch, [B] or by stream [B, K]: a form of the ratio (`ratio.Ratio`)."""

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
    keeps_peers = False

    def __post_init__(self) -> None:
        not_negative("rollout_kl", self.coefficient)

    @property
    def keeps_mean(self) -> bool:
        return self.log_ratio.keeps_mean

    def check(self, dynamics: Dynamics) -> None:
        """Any dynamics will do."""

    def __call__(self, at: Replayed) -> Tensor:
        log_ratio = self.log_ratio(at)
        return at.batch.merged((-log_ratio).expm1() + log_ratio)


@dataclass(frozen=True)
class Imitation:
    """mean (v_θ(x) − sg V*)²: V* is the velocity predicted in the rollout at the same step of the group's best path.

    Dynamic-TreeRPO's layer-wise supervised term (its weights ω_t are not known; here they are 1). It is 0 on the best
    path itself before an update, but for the rollout's rounding. Needs `peers`. Raises ValueError for a coefficient
    that is negative or not finite.
    """

    coefficient: float
    name = "imitation"
    keeps_mean = False
    keeps_peers = True
    weight_sets = ()

    def __post_init__(self) -> None:
        not_negative("imitation", self.coefficient)

    def check(self, dynamics: Dynamics) -> None:
        """Any dynamics will do."""

    def __call__(self, at: Replayed) -> Tensor:
        peers = at.batch.peers
        if peers is None:
            raise ValueError("peers: are missing, and imitation needs the best path's edges; give them by the credit")
        best = velocity_of(peers.mean, peers.x, at.batch, peers.scale)
        return velocity_kl(at.velocity["policy"], best.detach(), at.batch.layout)


class LeafRegularizer(Protocol):
    """`coefficient` · divergence from the weight set `to`."""

    @property
    def to(self) -> str: ...

    @property
    def coefficient(self) -> float: ...

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError where it needs of what is predicted what the corruption has not."""
        ...

    def __call__(self, at: Noised) -> Tensor:
        """The divergence without its coefficient, [B·M], gradients through the policy."""
        ...


@dataclass(frozen=True)
class PredictionDistance:
    """coefficient · c(t) · mean (v_θ − v_to)².

    `space`: "velocity" c = 1 (DiffusionNFT, AWM, "Rethinking"'s "girsanov"); "x0" c = t², mean (x̂0_θ − x̂0_to)² (V-GRPO,
    Eq. 16, to old; OmniNFT, to reference); "path" c = 1/(2s²) with s = 0.7·√(t / (1 − min(t, 0.99))), the KL rate of
    Flow-GRPO's SDE (AWM's "ELBO"). Certain: read in code, V-GRPO's second-hand.

    Raises ValueError for an unknown space, or a coefficient that is negative or not finite.
    """

    to: str
    coefficient: float
    space: Space = "velocity"

    def __post_init__(self) -> None:
        not_negative("coefficient", self.coefficient)
        if self.space not in get_args(Space):
            raise ValueError(f"space: {self.space!r} is not one of {', '.join(get_args(Space))}")

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for tokens."""
        check_velocity(corruption, "PredictionDistance", "LikelihoodKL(to, coefficient, proxy=TokenLikelihood())")

    def __call__(self, at: Noised) -> Tensor:
        gap = velocity_kl(at.policy, at.velocity[self.to], at.layout)
        t = to_rows(at.t, gap)
        if self.space == "x0":
            return t.square() * gap
        if self.space == "path":
            return gap * (1 - t.clamp(max=0.99)) / (2 * 0.7**2 * t)
        return gap


@dataclass(frozen=True)
class LikelihoodKL:
    """coefficient · an estimate of the KL from the log-ratio d = log p_θ − log p_to of a proxy, per (t, ε).

    "k1" d; "k2" d²/2; "k3" e^(−d) − 1 + d, right for samples of the policy (Schulman, "Approximating KL divergence");
    "k3_reversed" e^d − 1 − d, as the code of "Rethinking the design space" has it. Certain.

    Raises ValueError for an unknown form, or a coefficient that is negative or not finite.
    """

    to: str
    coefficient: float
    form: Estimator = "k3"
    proxy: LikelihoodProxy = field(default_factory=Adaptive)

    def __post_init__(self) -> None:
        not_negative("coefficient", self.coefficient)
        if self.form not in get_args(Estimator):
            raise ValueError(f"form: {self.form!r} is not one of {', '.join(get_args(Estimator))}")

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy of another kind of prediction."""
        check_proxy(self.proxy, corruption)

    def __call__(self, at: Noised) -> Tensor:
        policy, other = (at.likelihood(self.proxy, name) for name in ("policy", self.to))
        return at.merged(kl_estimate(policy - other, self.form))


@dataclass(frozen=True)
class TokenKL:
    """coefficient · mean over tokens of e^(−d) − 1 + d, d = log p_θ − log p_to of each clean token: their k3, where
    `LikelihoodKL` takes that of their mean d, which is at most this.

    Raises ValueError for a coefficient that is negative or not finite.
    """

    to: str
    coefficient: float

    def __post_init__(self) -> None:
        not_negative("coefficient", self.coefficient)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for states that are no tokens."""
        check_proxy(TokenLikelihood(), corruption)

    def __call__(self, at: Noised) -> Tensor:
        policy, other = (Categorical(at.prediction[name]).log_density(at.x0) for name in ("policy", self.to))
        d = policy - other
        return at.merged(at.measured(lambda mean: mean((-d).expm1() + d)))


def kl_estimate(log_ratio: Tensor, form: Estimator) -> Tensor:
    """KL(θ ‖ other) from d = log p_θ − log p_other at samples of θ; the forms are `LikelihoodKL`'s."""
    if form == "k1":
        return log_ratio
    if form == "k2":
        return log_ratio.square() / 2
    signed = log_ratio if form == "k3_reversed" else -log_ratio
    return signed.expm1() - signed


def check(corruption: Corruption, regularizers: Sequence[LeafRegularizer], *proxies: LikelihoodProxy) -> None:
    """Raises ValueError where a proxy or a regularizer needs of what is predicted what the corruption has not."""
    for proxy in proxies:
        check_proxy(proxy, corruption)
    for regularizer in regularizers:
        if regularizer.coefficient > 0:
            regularizer.check(corruption)


def named(required: Sequence[str], regularizers: Sequence[LeafRegularizer]) -> tuple[str, ...]:
    """The weight sets of an objective that needs `required` and bears `regularizers`, each once."""
    return tuple(dict.fromkeys((*required, *(p.to for p in regularizers if p.coefficient > 0))))


def add(loss: Tensor, regularizers: Sequence[LeafRegularizer], at: Noised) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` [B·M] with all regularizers added, and each one's divergence by name, detached [B]."""
    metrics: dict[str, Tensor] = {}
    for regularizer in regularizers:
        if regularizer.coefficient > 0:
            divergence = regularizer(at)
            loss = loss + regularizer.coefficient * divergence
            metrics[f"kl_{regularizer.to}"] = at.by_sample(divergence.detach()).mean(1)
    return loss, metrics
