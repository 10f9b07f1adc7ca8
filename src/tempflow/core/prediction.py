"""What networks predict, as velocities: models that predict the noise, x0 or DDPM's v run in flow coordinates.

A variance-preserving model has states x = a·x0 + b·ε with a = √ᾱ, b = √(1−ᾱ) at whole times t. With

    σ = b/(a+b),   z = x/(a+b) = (1−σ)·x0 + σ·ε,   a+b = 1/√((1−σ)² + σ²)

its states are those of a flow model, whose velocity is ε − x0; DDIM at eta = 0 is then exactly the Euler step in z. So
plans, dynamics, credits and losses need not know which kind a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.schedule import Schedule
from tempflow.core.state import double, to_rows, upcast

Kind = Literal["velocity", "epsilon", "v", "x0"]
"""What a network says: ε − x0; ε; a·ε − b·x0 ("v_prediction" of DDPM codes); x0."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""net(x [B, *S] in variance-preserving coordinates, t [B], rows LongTensor[B]) -> what its kind is, [B, *S]."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z [B, *S], sigma [B], rows LongTensor[B]) -> velocity [B, *S]."""

NEAR = 2e-3
"""σ in float32 fixes t to some thousandths: a time this near to a whole one is that one."""


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """A model's noise levels by its table ᾱ_0 > ᾱ_1 > …, [N] in float32 or float64: between times and σ.

    Between whole times log(a/b) = log((1−σ)/σ), half the log-SNR, is linear in t; so σ of any t and t of any σ are
    those of a model that was trained at all times. A σ beyond the table's ends takes the nearest time.

    Raises ValueError unless the table is one-dimensional with two entries at least, within (0, 1), and decreases.
    """

    alphas_cumprod: Tensor
    _logit: Tensor = field(init=False, repr=False)  # float64 [N] on the CPU, descending

    def __post_init__(self) -> None:
        given = self.alphas_cumprod
        if given.dtype not in (torch.float32, torch.float64) or given.dim() != 1 or len(given) < 2:
            raise ValueError(f"alphas_cumprod: {given.dtype} {list(given.shape)} must be float32 [N] with N ≥ 2")
        table = given.detach().to("cpu", torch.float64)
        inside = (table > 0) & (table < 1)
        if not bool(inside.all()):
            bad = float(table[~inside][0])
            raise ValueError(f"alphas_cumprod: {bad} must be above 0 and below 1; nearest valid: 1e-6 … 1 − 1e-6")
        if not bool((table.diff() < 0).all()):
            at = int((table.diff() >= 0).int().argmax()) + 1
            raise ValueError(f"alphas_cumprod[{at}]: {float(table[at])} is not below the one before; it must decrease")
        object.__setattr__(self, "_logit", (table / (1 - table)).log() / 2)

    @property
    def times(self) -> int:
        """N, the number of whole times 0 … N − 1."""
        return len(self.alphas_cumprod)

    def sigma(self, t: Tensor) -> Tensor:
        """σ at times t, whole or fractional, in float64 and the shape of ``t`` (`core.state.double`).

        Raises ValueError where looking is free (on the CPU) for a time outside [0, N − 1].
        """
        self._check("t", t)
        t = double(t).clamp(0, self.times - 1)
        low = t.floor().clamp(max=self.times - 2)
        logit, place = self._logit.to(t.device), low.long()
        return torch.lerp(logit[place], logit[place + 1], t - low).neg().sigmoid()

    def time(self, sigma: Tensor) -> Tensor:
        """t at σ, in float64 and the shape of ``sigma`` (`core.state.double`); a whole number where σ is one's, up to
        `NEAR`."""
        s = double(sigma)
        logit = self._logit.to(s.device)
        wanted = ((1 - s) / s).log().clamp(logit[-1], logit[0])
        place = torch.searchsorted(-logit, -wanted.contiguous(), right=True).clamp(1, self.times - 1) - 1
        t = place + (logit[place] - wanted) / (logit[place] - logit[place + 1])
        whole = t.round()
        return torch.where((t - whole).abs() < NEAR, whole, t)

    def schedule(self, times: Sequence[float], last: float | None = None) -> Schedule:
        """The float32 grid of a sampler that visits those times, noisiest first, and ends at σ = `last`.

        last  0, as DDIM with `set_alpha_to_one`; None: the σ of time 0, as without

        States start at variance (1−σ_0)² + σ_0², as x starts at 1, and samples are the x of the last σ. Raises
        ValueError for a time outside [0, N − 1], and as `Schedule` does.
        """
        visited = torch.tensor(list(times), dtype=torch.float64, device="cpu")
        self._check("times", visited)
        sigmas = self.sigma(visited)
        end = self.sigma(torch.zeros(1)) if last is None else torch.tensor([last], dtype=torch.float64)
        spread = float(1 / scale(sigmas[:1])) if len(sigmas) else 1.0
        return Schedule(torch.cat([sigmas, end]).float(), spread, float(scale(end)))

    def _check(self, name: str, t: Tensor) -> None:
        if t.device.type != "cpu":
            return
        bad = ~((t >= 0) & (t <= self.times - 1))
        if bool(bad.any()):
            given, last = float(t[bad][0]), self.times - 1
            raise ValueError(f"{name}: {given:g} is outside [0, {last}]; nearest valid: {last if given > last else 0}")


def scale(sigma: Tensor) -> Tensor:
    """a + b at σ, of its shape and dtype: x = (a+b)·z. A decoder of such a model takes x, not z."""
    return ((1 - sigma).square() + sigma.square()).rsqrt()


def velocity_of(said: Tensor, z: Tensor, sigma: Tensor, kind: Kind) -> Tensor:
    """The velocity ε − x0, [B, *S], that a network means by `said` at z, in at least float32 (float64 stays).

    Args:
        said, z: [B, *S].
        sigma: [B], in [0, 1]; below 1 for "epsilon" and above 0 for "x0", which there say what z does and no more.
        kind: what `said` is.

    "epsilon" (ε − z)/(1−σ); "x0" (z − x0)/σ; "v" with s = a+b: s·(v + s·(2σ−1)·z). Raises ValueError for an unknown
    kind, another shape than that of z or, where looking is free (on the CPU), such a σ; "velocity" does not read it.
    """
    if said.shape != z.shape:
        raise ValueError(f"prediction: shape {list(said.shape)} must be {list(z.shape)}, that of the state")
    dtype = torch.promote_types(upcast(said).dtype, upcast(z).dtype)
    said, z = said.to(dtype), z.to(dtype)
    if kind == "velocity":
        return said
    _check_level(sigma, kind)
    level = double(sigma)  # 1 − σ loses digits near 1
    if kind == "epsilon":
        return (said - z) / to_rows(1 - level, z)
    if kind == "x0":
        return (z - said) / to_rows(level, z)
    if kind == "v":
        s = scale(level)
        return to_rows(s, z) * (said + to_rows(s * (2 * level - 1), z) * z)
    raise ValueError(f"kind: {kind!r} is not one of {', '.join(get_args(Kind))}; nearest valid: 'epsilon'")


def _check_level(sigma: Tensor, kind: Kind) -> None:
    """Raises ValueError for a σ at which what the network says fixes no velocity: 0/0, which has no limit."""
    if sigma.device.type != "cpu":
        return
    bad = ~((sigma >= 0) & (sigma <= 1)) | (sigma == {"epsilon": 1.0, "x0": 0.0}.get(kind, -1.0))
    if bool(bad.any()):
        near = {"epsilon": "below 1, where z is more than ε", "x0": "above 0, where z is more than x0"}
        given = float(sigma[bad][0])
        raise ValueError(f"sigma: {given:g} gives {kind!r} no velocity; nearest valid: {near.get(kind, '0 to 1')}")


def predictor(network: Network, path: VariancePreserving, kind: Kind) -> Predict:
    """`network`, which sees x = (a+b)·z and t, as a predictor of velocities at z and σ.

    t is float, in the dtype of sigma and fractional off the table. Guidance that is linear in what the network says is
    the same in velocities. Raises ValueError for an unknown kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(get_args(Kind))}; nearest valid: 'epsilon'")

    def predict(z: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        state = upcast(z)
        x = to_rows(scale(double(sigma)), state) * state
        return velocity_of(network(x, path.time(sigma).to(sigma), rows), state, sigma, kind)

    return predict
