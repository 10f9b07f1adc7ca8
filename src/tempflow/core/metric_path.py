"""Tokens whose noise knows which codes are near each other: the metric path, its jumps, and their law.

With d(x, y) the squared distance of two codes scaled to length 1, and σ = 1 noise, σ = 0 data,

    p_σ(x | x0) ∝ exp(−β_σ·d(x, x0)),   β_σ = c·((1−σ)/σ)^α

goes from uniform tokens (β = 0) to x0 alone (β = ∞). Tokens that flow along it jump towards x0 only, from z to x at
rate

    u_σ(x | z, x0) = p_σ(x | x0)·β̇_σ·max(d(z, x0) − d(x, x0), 0),   β̇_σ = c·α·(1−σ)^(α−1) / σ^(α+1)

by s = 1 − σ, which solves Kolmogorov's forward equation for p exactly (kinetic optimal, arXiv 2412.03487; URSA, arXiv
2510.24717, has c = 3, α = .9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tempflow.core.checks import positive
from tempflow.core.corruption import MixturePath, Prediction, check_prediction
from tempflow.core.distribution import AT_ONCE, Categorical, Counted, check_kind, check_tokens, inverse
from tempflow.core.dynamics import TokenJump, no_scale
from tempflow.core.rng import NoiseKind
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, StateLayout, double, to_rows, upcast

EXACT = 2048
"""Up to so many codes a jump's log-prob is known: it sums over V clean tokens what takes V² distances."""

_SURE = 1e30
"""A β beyond which no code but the nearest is left."""

_SHORTEST = 1e-5
"""Codes shorter than this are not stretched to length 1, as in the released code."""


@dataclass(frozen=True, eq=False, repr=False)
class MetricPath:
    """The forward process p_σ above. Networks predict logits [B, *S, V] of x0's tokens.

    codes  [V, d], the codebook of the autoencoder
    c, α   how fast β grows

    Raises ValueError for codes that are no such tensor or not finite, and for c or α that is not positive.
    """

    codes: Tensor
    c: float = 3.0
    alpha: float = 0.9
    units: Tensor = field(init=False)
    """[V, d], the codes at length 1, in at least float32."""

    def __post_init__(self) -> None:
        codes = self.codes
        if codes.dim() != 2 or not codes.is_floating_point() or not bool(codes.isfinite().all()):
            raise ValueError(f"codes: {codes.dtype} {list(codes.shape)} must be finite floats [V, d]")
        MixturePath(len(codes))
        positive("c", self.c, 3.0)
        positive("alpha", self.alpha, 0.9)
        wide = upcast(codes.detach())
        object.__setattr__(self, "units", normalize(wide, dim=-1, eps=_SHORTEST))

    def __repr__(self) -> str:
        return f"MetricPath({self.vocabulary} codes, c={self.c}, alpha={self.alpha})"

    @property
    def vocabulary(self) -> int:
        return len(self.units)

    @property
    def noise(self) -> NoiseKind:
        return "uniform"

    @property
    def prediction(self) -> Prediction:
        return "logits"

    def predicted(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, *S, V]."""
        return (*shape, self.vocabulary)

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """Uniform tokens, LongTensor [B, *S], of uniforms in (0, 1)."""
        return MixturePath(self.vocabulary).start(noise, schedule)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ~ p_t(· | x0), LongTensor [B, *S]: the first tokens whose cumulated probability exceeds the noise; x0 at
        t = 0.

        Raises ValueError where shapes do not fit, or for what are no tokens of the vocabulary.
        """
        check_tokens("x0", x0, tuple(noise.shape), self.vocabulary)
        units = self.units.to(x0.device)
        beta = self.beta(double(t)).clamp(max=_SURE)  # at t = 0 it is ∞, and ∞·0 would be no number
        beta = to_rows(beta, double(noise)).expand(noise.shape).reshape(-1).to(units)
        tokens, u = x0.reshape(-1), double(noise).reshape(-1)
        out = torch.empty_like(tokens)
        at_once = max(1, AT_ONCE // self.vocabulary)
        for first in range(0, len(tokens), at_once):
            some = slice(first, first + at_once)
            law = double(-beta[some, None] * self.distances(tokens[some]))
            out[some] = inverse(law, u[some, None].to(law.device))[0].to(out.device)
        return out.view(x0.shape)

    def distances(self, tokens: Tensor) -> Tensor:
        """d of each token to all codes, [*tokens, V], in 0 … 4."""
        units = self.units.to(tokens.device)
        size = units.square().sum(-1)
        return (size[tokens][..., None] + size - 2 * units[tokens] @ units.T).clamp(min=0)

    def beta(self, sigma: Tensor) -> Tensor:
        """β of each σ: 0 at σ = 1, ∞ at σ = 0."""
        return self.c * ((1 - sigma) / sigma) ** self.alpha

    def beta_rate(self, sigma: Tensor) -> Tensor:
        """β̇ = −dβ/dσ of each σ in (0, 1)."""
        return self.c * self.alpha * (1 - sigma) ** (self.alpha - 1) / sigma ** (self.alpha + 1)

    def rates(self, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """u_σ(· | x, x0), [N, V] for tokens x and x0 [N], at σ [N] in (0, 1)."""
        return self._rates(self.distances(x0), x, sigma)

    def _rates(self, d: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The same by the distances d [N, V] to x0."""
        path = torch.softmax(-self.beta(sigma).to(d)[:, None] * d, -1)
        return path * self.beta_rate(sigma).to(d)[:, None] * (d.gather(-1, x[:, None]) - d).clamp(min=0)

    def jumped(self, z: Tensor, x0: Tensor, u: Tensor, sigma: Tensor, below: Tensor) -> Tensor:
        """Where tokens z [N] are after a step of `MetricJump` towards x0 [N], by uniforms u [N]; σ, σ' float64 [N]."""
        first, last = sigma == 1, below == 0
        out = torch.where(last, x0, z)
        if bool(last.all()):
            return out
        d = self.distances(x0)
        rate = self._rates(d, z, torch.where(first, 0.5, sigma))
        chance = -torch.expm1(-(sigma - below) * rate.double().sum(-1))
        at = (((u < chance) | first) & ~last).nonzero()[:, 0]
        if len(at):
            path = -self.beta(torch.where(first, below, 0.5)[at])[:, None] * d[at].double()
            weights = torch.where(first[at, None], path, rate[at].double().log())
            place = torch.where(first, u, u / chance)[at, None]
            out[at] = inverse(weights, place)[0]
        return out


@dataclass(frozen=True, eq=False)
class MetricJump(TokenJump):
    """The released sampler of the metric path, a step from σ to σ': tokens x̂0 are drawn from softmax(logits), and then
    every token jumps with probability 1 − exp(−(σ−σ')·Σ_x u_σ(x | z, x̂0)) to an end that it draws from u.

    Two steps are apart. Into σ' = 0 the end is x̂0 itself, as released. From σ = 1, where β = 0 and β̇ is infinite (for
    α < 1), the end is drawn from the path at σ' around x̂0, which is what the exact solution from uniform tokens is; the
    released code takes the rate for 0 there, so that its first step moves nothing.

    Rates are frozen over a step, so it is exact to first order in the step's length. Tokens jump by themselves.

    path  whose codes and β it has
    """

    path: MetricPath

    @property
    def vocabulary(self) -> int:
        return self.path.vocabulary

    @property
    def corruption(self) -> MetricPath:
        return self.path

    def spreads(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Whether a step's log-prob is known, bool [B]: up to `EXACT` codes."""
        no_scale(scale)
        return torch.full_like(schedule.after(step), self.vocabulary <= EXACT, dtype=torch.bool)

    def transition(
        self, x: Tensor, logits: Tensor, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> JumpLaw:
        """The law of the next tokens; arguments and errors as for `MixtureJump.transition`."""
        no_scale(scale)
        check_tokens("x", x, tuple(x.shape), self.vocabulary)
        check_prediction(logits, x, self.path, "logits")
        return JumpLaw(logits, x, self.path, double(schedule.at(step)), double(schedule.after(step)))


@dataclass(frozen=True, eq=False)
class JumpLaw(Counted):
    """The law of the end of a `MetricJump`: of tokens y, all that lead there through any x̂0,

        p(y | z) = Σ_k softmax(logits)_k · K(y | z, k)

    logits       [B, *S, V], of the clean tokens
    x            LongTensor [B, *S]
    sigma, below  σ and σ' of each row, float64 [B]
    """

    logits: Tensor
    x: Tensor
    path: MetricPath
    sigma: Tensor
    below: Tensor
    layout: StateLayout = WHOLE

    @property
    def noise(self) -> NoiseKind:
        return "uniform"

    @property
    def clean(self) -> Categorical:
        """The law of x̂0."""
        return Categorical(self.logits, self.layout)

    @property
    def mode(self) -> Tensor:
        """Raises ValueError: it would take V² terms a token, and nothing walks it."""
        raise ValueError("mode: the likeliest end of a jump is not known; nearest valid: the mode of `clean`")

    def counted_by(self, layout: StateLayout) -> JumpLaw:
        """The same law; log-probs and KLs are means by that layout."""
        return replace(self, layout=layout)

    def sample(self, noise: Tensor) -> Tensor:
        """Ends, LongTensor [B, *S], of uniforms in (0, 1) of that shape, one for each token.

        A uniform draws x̂0; its place within the share of that token is a uniform again, and draws whether and where to
        jump. Raises ValueError for another shape, or where there is no law.
        """
        if noise.shape != self.x.shape:
            raise ValueError(f"noise: shape {tuple(noise.shape)} must be {tuple(self.x.shape)}")
        self.clean.check_law()
        size = self.path.vocabulary
        logits, z, u = self.logits.detach().reshape(-1, size), self.x.reshape(-1), double(noise).reshape(-1)
        sigma, below = (to_rows(s, self.x.double()).expand(self.x.shape).reshape(-1) for s in (self.sigma, self.below))
        out = torch.empty_like(z)
        at_once = max(1, AT_ONCE // size // 4)
        for first in range(0, len(z), at_once):
            some = slice(first, first + at_once)
            clean, place = inverse(double(logits[some]), u[some, None].to(logits.device))
            out[some] = self.path.jumped(z[some], clean, place, sigma[some], below[some])
        return out.view(noise.shape)

    def log_density(self, y: Tensor) -> Tensor:
        """log p(y | z) of each token, [B, *S], in at least float32.

        Raises ValueError for another shape, what are no tokens, or a codebook of more than `EXACT` codes.
        """
        size = self.path.vocabulary
        if size > EXACT:
            raise ValueError(
                f"codes: {size} are too many for a jump's log-prob, which sums over pairs of codes; nearest valid: "
                f"{EXACT} codes, or an algorithm that trains on clean tokens"
            )
        check_tokens("y", y, tuple(self.x.shape), size)
        log_p = upcast(self.logits).log_softmax(-1)
        out = torch.empty(self.x.shape, dtype=log_p.dtype, device=log_p.device)
        edges = [(float(s), float(b)) for s, b in zip(self.sigma, self.below, strict=True)]
        parts: list[Tensor] = []
        rows: list[Tensor] = []
        for edge in dict.fromkeys(edges):
            row = torch.tensor([n for n, own in enumerate(edges) if own == edge], device=log_p.device)
            kernel = self._kernel(self.x[row], y[row], *edge, log_p.dtype)
            parts.append((log_p[row] + kernel).logsumexp(-1))
            rows.append(row)
        return out.index_copy(0, torch.cat(rows), torch.cat(parts))

    def _kernel(self, z: Tensor, y: Tensor, sigma: float, below: float, dtype: torch.dtype) -> Tensor:
        """log K(y | z, k) of all clean tokens k, [B, *S, V]; what V² numbers make is computed in float64."""
        size, path = self.path.vocabulary, self.path
        every = torch.arange(size, device=z.device)
        if below == 0:
            return torch.where(every == y[..., None], 0.0, -math.inf).to(dtype)
        d = path.distances(every).double()  # [k, x]
        at = torch.tensor(below if sigma == 1 else sigma, dtype=torch.float64)
        law = torch.log_softmax(-float(path.beta(at)) * d, -1)
        if sigma == 1:
            return law.T.to(dtype)[y]
        towards, order = d.sort(-1)
        share = law.exp().gather(-1, order)
        # Σ_x p(x|k)·max(d(z,k) − d(x,k), 0) of every z: the terms before z in order of distance
        near, far = share.cumsum(-1), (share * towards).cumsum(-1)
        pull = torch.empty_like(d).scatter(-1, order, (towards * near - far).clamp(min=0))  # [k, z]
        rate = float(path.beta_rate(at)) * pull
        chance = -torch.expm1(-(sigma - below) * rate)
        scale = torch.where(pull > 0, chance / pull.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        leaves, stays = scale.T.log().to(dtype), (-(sigma - below) * rate.T).to(dtype)
        path, far_off = law.T.to(dtype), d.T.to(dtype)
        jump = leaves[z] + path[y] + (far_off[z] - far_off[y]).clamp(min=0).log()
        return torch.where((y == z)[..., None], stays[z], jump)

    def kl(self, other: JumpLaw) -> Tensor:
        """KL of the laws of x̂0, mean over tokens, [B]: at least the KL of the ends, and that of the last step.

        Raises ValueError for another shape or a law of another kind.
        """
        check_kind(other, JumpLaw)
        return self.clean.kl(other.clean)
