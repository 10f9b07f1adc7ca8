"""What bfloat16 does to surrogates of the likelihood, and to differences of two of them, on `shapes`.

    python -m benchmarks.precision [--samples 12] [--noises 4] [--updates 3] [--rates 2e-4 2e-5]

ℓ is the adaptive x0 error (V-GRPO, DiffusionNFT), δ = ℓ_θ − ℓ_old what ratios and proximal objectives are made of. θ is
the untrained model after a few V-GRPO updates (AdamW, on-policy, pairs drawn anew) in float32, at the recipes' rate
and at about that of their first iteration of warm-up. The shipped weights have bfloat16's digits, so old's are exact.
Old and θ are then asked at the same (t, ε), the times of ten steps, in these ways:

    float32           the yardstick
    x_t rounded       float32 weights; x_t is rounded before it is given to the network, and only there
    weights rounded   float32 arithmetic with weights that were rounded to bfloat16
    bfloat16          weights and arithmetic of the network; its velocity is widened before anything is subtracted
    x_t in bfloat16   the same, and x̂0 = x_t − t·v is computed from the rounded x_t, in float32
    all in bfloat16   the same, and x̂0 and x̂0 − x0 are computed in bfloat16 (the mean in float32)

Each t: median of |ℓ − ℓ32| / ℓ32, and the root mean square of δ32 and of δ − δ32. Then of a sample's four pairs
averaged, as V-GRPO has them: the error of a log ratio beside clip ranges. Prints Markdown. A CPU without bfloat16
arithmetic emulates it: slow, of the same rounding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.likelihood import Group, group_of
from tempflow.core.likelihood_proxy import adaptive_error, corrupt, x0_of_velocity
from tempflow.core.objective.leaves import renoise_leaves
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.times import StratifiedGridTimes
from tempflow.media import Size
from tempflow.request import asked

SIZE = Size(32, 32)

STEPS = 10
CLIPS = (1e-5, 1e-3, 6e-3, 1e-2)
"""Flow-Factory's for AWM, the grpo kind of "Rethinking", V-GRPO's two ends."""


class Asked:
    """The network's velocities at rows of one batch. Conditions are the float32 ones, rounded to its arithmetic."""

    def __init__(self, group: Group, network: nn.Module, weights: torch.dtype, dtype: torch.dtype) -> None:
        self.network = copy.deepcopy(network).to(weights).to(dtype)
        condition = group.model.encode(asked(group.texts), SIZE)
        self.embeds, self.pooled = (condition.tensors[n].to(dtype) for n in ("embeds", "pooled"))
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self.network(
            hidden_states=x.to(self.dtype),
            timestep=t * 1000,
            encoder_hidden_states=self.embeds[rows],
            pooled_projections=self.pooled[rows],
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class Way:
    """In what precision the weights are, the network computes, x_t is given to it and used, and is subtracted."""

    weights: torch.dtype = torch.float32
    arithmetic: torch.dtype = torch.float32
    given: torch.dtype = torch.float32
    used: torch.dtype = torch.float32
    difference: torch.dtype = torch.float32

    def error(self, network: Asked, x0: Tensor, noise: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """ℓ of each row."""
        x = corrupt(x0, noise, t)
        v, x = network(x.to(self.given), t, rows), x.to(self.used)
        if self.difference == torch.float32:
            return adaptive_error(x0_of_velocity(x.float(), v.float(), t), x0)
        s = t.view(-1, 1, 1, 1).to(self.difference)
        gap = (x.to(self.difference) - s * v) - x0.to(self.difference)
        return adaptive_error(gap.float(), torch.zeros_like(x0))


HALF = torch.bfloat16
WAYS: Mapping[str, Way] = {
    "float32": Way(),
    "x_t rounded": Way(given=HALF),
    "weights rounded": Way(HALF),
    "bfloat16": Way(HALF, HALF, HALF),
    "x_t in bfloat16": Way(HALF, HALF, HALF, HALF),
    "all in bfloat16": Way(HALF, HALF, HALF, HALF, HALF),
}


def trained(group: Group, updates: int, rate: float) -> nn.Module:
    """A copy of the network after V-GRPO's updates on the group."""
    network = copy.deepcopy(group.model.network)
    condition = group.model.encode(asked(group.texts), SIZE)
    predict = group.model.predictor(condition, 1.0, network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)
    objective = ClippedLikelihood(estimate=Estimate(pooled=True, on_policy=True), soft_clip=3.0)
    for update in range(updates):
        optimizer.zero_grad()
        draws = Renoise(StratifiedGridTimes(4), 2, 2)
        batch = renoise_leaves(group.x0, group.advantage, group.rows, group.ids(update), draws, 50, group.schedule)
        for start in range(0, len(batch), 24):
            part = batch.take(slice(start, start + 24))
            (objective({"policy": predict}, part).value * len(part) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network


@torch.no_grad()
def errors(group: Group, networks: Mapping[str, nn.Module], noises: int) -> dict[str, dict[str, Tensor]]:
    """ℓ [N, noises, T] by way and network; times are the grid's, noisiest first."""
    times = group.schedule.sigmas[:-1]
    rows = group.rows.repeat_interleave(noises * len(times))
    t = times.repeat(len(group.x0) * noises)
    x0 = group.x0.repeat_interleave(noises * len(times), 0)
    ids = [(k, *i) for i in group.ids(0) for k in range(noises * len(times))]
    noise = Stream(0, "precision").normal(ids, group.x0.shape[1:])
    kinds = {(how.weights, how.arithmetic) for how in WAYS.values()}
    asked = {(name, *kind): Asked(group, net, *kind) for name, net in networks.items() for kind in kinds}
    found: dict[str, dict[str, Tensor]] = {}
    for way, how in WAYS.items():
        found[way] = {}
        for name in networks:
            net = asked[name, how.weights, how.arithmetic]
            parts = [how.error(net, x0[p], noise[p], t[p], rows[p]) for p in torch.arange(len(t)).split(60)]
            found[way][name] = torch.cat(parts).view(len(group.x0), noises, len(times)).double()
    return found


def rms(x: Tensor) -> Tensor:
    return x.square().mean((0, 1)).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--noises", type=int, default=4)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 2e-5])
    a = parser.parse_args()
    torch.set_num_threads(1)
    whole = group_of(2, STEPS)
    networks: dict[str, nn.Module] = {"old": whole.model.network}
    for rate in a.rates:
        name = f"rate {rate:g}"
        networks[name] = trained(whole, a.updates, rate)
        old, new = (weights(networks[n]) for n in ("old", name))
        differ = float((old.to(HALF) != new.to(HALF)).float().mean())
        change = float((new - old).square().mean().sqrt())
        print(
            f"θ after {a.updates} updates at {name}: RMS change {change:.2e}, {differ:.0%} of its bfloat16 weights move"
        )
    group = whole.every(len(whole.x0) // a.samples)
    found = errors(group, networks, a.noises)
    print(f"\n{len(group.x0)} samples × {a.noises} noises\n")
    report(group.schedule.sigmas[:-1], found)
    ratios(found)


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])


def report(times: Tensor, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    exact = found["float32"]
    print("| t | " + " | ".join(f"{t:.3f}" for t in times.tolist()) + " |")
    print("|---|" + "---|" * len(times))

    def line(name: str, values: Tensor) -> None:
        print(f"| {name} | " + " | ".join(f"{v:.1e}" for v in values.tolist()) + " |")

    line("ℓ", exact["old"].mean((0, 1)))
    for way in list(WAYS)[1:]:
        gap = ((found[way]["old"] - exact["old"]) / exact["old"]).abs().flatten(0, 1)
        line(f"median error of ℓ / ℓ, {way}", gap.median(0).values)
        line(f"95th percentile, {way}", gap.quantile(0.95, 0))
    for name in list(exact)[1:]:
        delta = exact[name] - exact["old"]
        line(f"RMS δ, {name}", rms(delta))
        for way in list(WAYS)[1:]:
            line(f"RMS error of δ, {way}", rms(found[way][name] - found[way]["old"] - delta))


def ratios(found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A log ratio of four pairs (strata of the grid), against clip ranges."""
    picked = [low + 1 for low in StratifiedGridTimes(4).edges(STEPS)[:-1]]

    def pooled(way: str, name: str) -> Tensor:
        return -(found[way][name] - found[way]["old"])[:, :, picked].mean(2)

    print("\n| θ, way | RMS log ratio | RMS error | " + " | ".join(f"of clip {c:g}" for c in CLIPS) + " | wrong sign |")
    print("|---|---|---|" + "---|" * (len(CLIPS) + 1))
    for name in list(found["float32"])[1:]:
        true = pooled("float32", name)
        for way in list(WAYS)[1:]:
            seen = pooled(way, name)
            size, error = (float(v.square().mean().sqrt()) for v in (true, seen - true))
            wrong = float((seen.sign() != true.sign()).float().mean())
            shares = " | ".join(f"{error / c:.2g}" for c in CLIPS)
            print(f"| {name}, {way} | {size:.1e} | {error:.1e} | {shares} | {wrong:.1%} |")


if __name__ == "__main__":
    main()
