"""The forward-process family through the real loop: equal first gradients, costs, batches, old policies, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, TokenFake, brightness, weights
from loop_checks import phased
from PIL import Image
from torch import Tensor

from tempflow.algorithms.advantage_flow import advantage_flow
from tempflow.algorithms.awm import awm
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.crd import crd
from tempflow.algorithms.dgpo import dgpo
from tempflow.algorithms.diffusion_nft import LAGS, diffusion_nft, ode_plan
from tempflow.algorithms.elbo_pg import elbo_pg
from tempflow.algorithms.online_dpo import online_dpo
from tempflow.algorithms.rejection_sft import rejection_sft
from tempflow.algorithms.v_grpo import v_grpo
from tempflow.core.credit import GroupZScore
from tempflow.core.likelihood_proxy import Adaptive
from tempflow.core.plan import Cost
from tempflow.core.renoise import Renoise
from tempflow.core.solver import SOLVERS
from tempflow.core.times import GridTimes

SMALL: dict[str, Callable[[], Algorithm]] = {
    "nft": lambda: diffusion_nft(4, 5),
    "nft, .1": lambda: diffusion_nft(4, 5, mix_beta=0.1, mode="binary", lag="type2"),
    "awm": lambda: awm(8, 5, 3),
    "awm, off policy": lambda: awm(8, 5, 3, "discrete_with_init", "t", off_policy=True, clip=1e-2),
    "flow": lambda: advantage_flow(4, 5, 3),
    "flow, balanced": lambda: advantage_flow(4, 5, 2, 1.0, "balanced", adaptive=True, t_min=0.02),
    "v": lambda: v_grpo(4, 5, 3),
    "v, clip": lambda: v_grpo(4, 5, 3, clip=1e-2, kl=0.1),
    "epg": lambda: elbo_pg(4, 5),
    "par, sde": lambda: elbo_pg(4, 5, "par", "uniform", "sde", kl_form="k3"),
    "elbo grpo": lambda: elbo_pg(4, 5, "grpo", scale="global"),
    "dgpo": lambda: dgpo(4, 5),
    "dgpo, old": lambda: dgpo(4, 5, 2000.0, compare_to="old", share_noise=False),
    "crd": lambda: crd(4, 5),
    "crd, hard": lambda: crd(4, 5, temperature=0, form="bce", lagged_sampler=False),
    "dpo": lambda: online_dpo(4, 5, 2, kl=0.1),
    "sft": lambda: rejection_sft(4, 5, 2, 3),
}
SELECTING = {"dpo": 2 * 2, "sft": 2 * 3}
"""Trained pairs of a prompt where a credit keeps a part of its leaves."""
every = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
Images = list[Image.Image]


def gradient(algorithm: Algorithm, **context: Any) -> dict[str, Tensor]:
    bench = Bench(algorithm=algorithm, max_grad_norm=1e9, **context)
    bench.iterate()
    return {n: p.grad.clone() for n, p in bench.model.network.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    size = max(float(t.abs().max()) for t in b.values())
    assert a.keys() == b.keys() and size > 1e-6
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * size, name


def patchy(images: Images, prompts: list[str]) -> list[float | None]:
    """Groups of different sizes and worth: some fail, one has no spread."""
    values = brightness(images, prompts)
    return [
        None if p == "fog" and n % 3 else 0.5 if p == "snow" else v
        for n, (p, v) in enumerate(zip(prompts, values, strict=True))
    ]


# ------------------------------------------------------------------------------------------------ one first gradient
def alike(algorithm: Algorithm) -> Algorithm:
    """With the advantage and the pairs that all share here."""
    credit = GroupZScore(by=("prompt",), scale="pooled", eps=1e-8, clip=1.0)
    return phased(replace(algorithm, credit=credit), renoise=Renoise(GridTimes()))


def test_all_heads_have_one_first_gradient_through_the_loop() -> None:
    """§1.2: where the policy is old, methods differ by advantage and pairs alone (in float32, to 1e-5)."""
    heads = {
        "nft": diffusion_nft(4, 5, kl=0, solver="euler"),
        "nft .1": diffusion_nft(4, 5, mix_beta=0.1, advantage_max=2.0, kl=0, solver="euler"),
        "flow": advantage_flow(4, 5, reference=0, adaptive=True),
        "v": v_grpo(4, 5, soft_clip=None),
        "v, clip": v_grpo(4, 5, clip=0.01, soft_clip=None),
        "grpo": elbo_pg(4, 5, "grpo", kl=0, solver="euler"),
    } | {kind: elbo_pg(4, 5, kind, kl=0, solver="euler") for kind in ("epg", "pepg", "par")}  # type: ignore[arg-type]
    want = gradient(alike(heads.pop("epg")))
    for name, head in heads.items():
        assert_close(gradient(alike(head), train_rows=17), want, 1e-5), name
    other = alike(elbo_pg(4, 5, likelihood="uniform", kl=0, solver="euler"))
    with pytest.raises(AssertionError):
        assert_close(gradient(other), want, 1e-2)


def test_awm_with_the_adaptive_surrogate_is_the_same_too() -> None:
    want = gradient(alike(elbo_pg(4, 5, kl=0, solver="euler")))
    for off in (False, True):
        eight = awm(8, 5, likelihood="adaptive", kl=0, off_policy=off)
        four = replace(phased(eight, renoise=Renoise(GridTimes())), steps=4, plan=ode_plan(4, 5))
        assert_close(gradient(alike(four)), want, 1e-5)


# -------------------------------------------------------------------------------------------------------------- costs
def test_costs_of_the_papers_settings() -> None:
    assert diffusion_nft().cost(0, 1) == elbo_pg().cost(0, 1) == crd().cost(0, 1) == Cost(240, 24, 216)
    assert awm().cost(0, 1) == Cost(336, 24, 144)
    assert advantage_flow().cost(0, 1) == Cost(40, 4, 4)
    assert v_grpo().cost(0, 2) == Cost(1920, 48, 192)
    assert dgpo().cost(0, 1) == Cost(240, 24, 144)
    assert online_dpo().cost(0, 1) == Cost(80, 8, 32) and rejection_sft().cost(0, 1) == Cost(240, 24, 96)


@every
@pytest.mark.parametrize("kind", [Fake, TokenFake])
def test_counted_forwards_are_the_cost(make: Callable[[], Algorithm], kind: type[Fake]) -> None:
    """A rollout's N·T forwards, then pairs times weight sets, in batches no larger than allowed; ratios start at 1."""
    algorithm = make()
    bench = Bench(kind(), algorithm, train_rows=11, rollout_rows=13, max_grad_norm=1e9)
    metrics = bench.iterate()
    cost, counter = algorithm.cost(0, len(PROMPTS)), bench.counter
    kept = next((n * len(PROMPTS) for k, n in SELECTING.items() if SMALL[k] is make), cost.trained_edges)
    assert counter.rollout == cost.forwards and counter.decodes == cost.leaves
    assert counter.train == metrics["trained_edges"] == kept <= cost.trained_edges
    assert counter.reference == kept * len([s for s in algorithm.objective.weight_sets if s != "policy"])
    assert sum(bench.model.rows) == counter.forwards and max(bench.model.rows) <= 13
    assert metrics["log_ratio_max"] <= 1e-6 and metrics["grad_norm"] > 1e-6
    assert all(math.isfinite(v) for v in metrics.values())


# ------------------------------------------------------------------------------------------------------ what is equal
@every
def test_batches_do_not_matter_whatever_the_groups_sizes(make: Callable[[], Algorithm]) -> None:
    want = gradient(make(), reward=patchy, train_rows=1000)
    for rows in (1, 7):
        assert_close(gradient(make(), reward=patchy, train_rows=rows, rollout_rows=9), want, 2e-5)


@every
def test_equal_rewards_teach_nothing(make: Callable[[], Algorithm]) -> None:
    """At old no head pulls: without spread the first gradient is 0, or nothing is trained at all."""
    bench = Bench(algorithm=make(), reward=lambda images, prompts: [0.5] * len(images), max_grad_norm=1e9)
    metrics = bench.iterate()
    assert metrics["grad_norm"] <= 1e-6 and metrics["zero_variance"] == 1
    if make in (SMALL["dpo"], SMALL["sft"]):
        assert metrics["updates"] == 0 and bench.counter.train == 0


def test_the_advantages_sign_is_the_gradients() -> None:
    def opposite(images: Images, prompts: list[str]) -> list[float | None]:
        return [-v for v in brightness(images, prompts) if v is not None]

    for make in (SMALL["nft"], SMALL["epg"], SMALL["v"], SMALL["awm"], SMALL["dgpo"], SMALL["crd"]):
        plain, flipped = gradient(make()), gradient(make(), reward=opposite)
        assert_close({n: -g for n, g in flipped.items()}, plain, 2e-4)


# ------------------------------------------------------------------------------------------------------- weight sets
@every
def test_other_sets_follow_their_rule_and_never_get_gradients(make: Callable[[], Algorithm]) -> None:
    algorithm = make()
    bench = Bench(algorithm=algorithm, updates=2)
    assert set(bench.weight_sets.sets) == set(algorithm.weight_sets)
    want = {name: weights(bench.model) for name in algorithm.weight_sets}
    for iteration in range(3):
        bench.iterate(iteration)
        now = weights(bench.model)
        for name, kept in bench.weight_sets.sets.items():
            decay = algorithm.weight_sets[name].decay(iteration + 1)
            want[name] = {n: decay * want[name][n] + (1 - decay) * now[n] for n in now}
            for n, value in kept.named().items():
                torch.testing.assert_close(value, want[name][n])
            assert all(not v.requires_grad and v.grad is None for v in kept.values)
    if "reference" in algorithm.sets:
        view = bench.context.sets["reference"]
        assert not list(view.parameters()), "a view owns no parameters"
        start = weights(Bench().model)
        (held,) = view.weights  # type: ignore[attr-defined]
        assert all(torch.equal(v, start[n]) for n, v in held.named().items())


@pytest.mark.parametrize(
    ("make", "name"),
    [(diffusion_nft, "old"), (advantage_flow, "old"), (elbo_pg, "old"), (crd, "sampling"), (v_grpo, "policy")],
)
def test_the_lagged_copy_rolls_out(make: Any, name: str) -> None:
    algorithm = make(4, 5)
    assert algorithm.sampler == name
    bench, still = Bench(algorithm=algorithm), Bench(algorithm=algorithm)
    with torch.no_grad():
        bench.model.network.mean.bias.add_(1.0)
    moved, kept = bench.collect().forest.nodes, still.collect().forest.nodes
    assert torch.equal(moved, kept) == (name != "policy")


def test_lags_are_the_published_schedules() -> None:
    """T14, by update i; a set's first update is i = 1."""
    at = (0, 1, 75, 76, 100, 500, 10**6)
    table = {
        "type0": (0, 0, 0, 0, 0, 0, 0),
        "type1": (0, 0.001, 0.075, 0.076, 0.1, 0.5, 0.5),
        "type2": (0, 0, 0, 0.0075, 0.1875, 0.999, 0.999),
        "type3": (0, 0, 0.5, 0.5, 0.5, 0.5, 0.5),
    }
    assert table.keys() == LAGS.keys()
    for name, values in table.items():
        assert [LAGS[name].decay(i) for i in at] == pytest.approx(values)
    rules = crd().weight_sets  # "0-0.25-0.005-0.999" and "75-0.0-0.0075-0.999"
    assert [rules["old"].decay(i) for i in (0, 10, 10**4)] == pytest.approx([0.25, 0.3, 0.999])
    assert [rules["sampling"].decay(i) for i in (0, 75, 76, 10**4)] == pytest.approx([0, 0, 0.0075, 0.999])
    assert [awm().weight_sets["ema"].decay(i) for i in (1, 10, 300, 10**6)] == pytest.approx([0.001, 0.01, 0.3, 0.3])
    # DGPO's code blends before it raises its counter
    assert [dgpo().weight_sets["old"].decay(i) for i in (1, 11, 301, 10**6)] == pytest.approx([0, 0.01, 0.3, 0.3])


def test_which_sets_are_asked() -> None:
    def asked(algorithm: Algorithm) -> set[str]:
        return set(algorithm.objective.weight_sets) - {"policy"}

    assert asked(diffusion_nft()) == asked(elbo_pg()) == asked(crd()) == asked(dgpo()) == {"old", "reference"}
    assert asked(diffusion_nft(kl=0)) == asked(elbo_pg(kl=0)) == asked(crd(kl=0)) == {"old"}
    assert asked(awm()) == {"reference", "ema"} and asked(awm(kl=0, ema_kl=0)) == set()
    assert asked(awm(off_policy=True)) == {"reference", "old"} and awm(off_policy=True).sampler == "old"
    assert asked(v_grpo()) == set() and asked(v_grpo(clip=0.01)) == asked(v_grpo(kl=0.1)) == {"old"}
    assert asked(dgpo(clip=None)) == {"reference"} and asked(dgpo(compare_to="old")) == {"old"}
    assert asked(online_dpo()) == {"reference"} and asked(rejection_sft()) == set()


# ------------------------------------------------------------------------------------------------------------ details
def test_awm_advantages_are_within_its_bound() -> None:
    bench = Bench(algorithm=awm(8, 5, advantage_max=0.5))
    from tempflow.train.experience import credit

    experience = bench.collect()
    value = credit(bench.context, experience).advantage.value
    reward = experience.scores.value[:, 0].double()
    centred = (reward.view(6, 5) - reward.view(6, 5).mean(1, keepdim=True)).flatten()
    want = (centred / (reward.std(unbiased=False) + 1e-4)).clamp(-5, 5) / 5 * 0.5
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)


def test_elbo_pg_on_a_noisy_sampler_trains_the_same_leaf_loss() -> None:
    noisy = elbo_pg(4, 5, rollout="sde")
    assert all(noisy.plan(0, 0).stochastic) and not any(elbo_pg(4, 5).plan(0, 0).stochastic)
    assert noisy.cost(0, 1) == elbo_pg(4, 5).cost(0, 1)
    assert noisy.objective == elbo_pg(4, 5).objective and noisy.objective.estimate.proxy == Adaptive()  # type: ignore


BAD: list[tuple[Callable[..., Algorithm], dict[str, Any], str]] = [
    (diffusion_nft, {"group": 1}, "group: 1 must be at least 2"),
    (diffusion_nft, {"steps": 0}, "steps: 0 must be at least 1"),
    (diffusion_nft, {"mix_beta": 0.0}, "mix_beta: 0.0 must be finite and above 0; 1.0 is usual"),
    (diffusion_nft, {"advantage_max": -1.0}, "advantage_max: -1.0 must be finite and above 0; 5.0 is usual"),
    (diffusion_nft, {"mode": "some"}, "mode: 'some' is not one of all"),
    (diffusion_nft, {"lag": "type9"}, "lag: 'type9' is not one of 'type0'"),
    (diffusion_nft, {"fraction": 0.01}, "fraction: 0.01 of 10 steps leaves none; nearest valid: 0.1"),
    (diffusion_nft, {"kl": math.nan}, "kl: nan must be finite and ≥ 0"),
    (diffusion_nft, {"std": "batch"}, "std: 'batch' is not one of 'global', 'group'"),
    (awm, {"pairs": 12}, "pairs: 12 do not fit the 11 times of 14 steps; nearest valid: 11"),
    (awm, {"times": "discrete_with_init", "pairs": 1}, "pairs: 1 must be at least 2"),
    (awm, {"times": "now"}, "times: 'now' is not one of 'discrete_wo_init'"),
    (awm, {"clip": 1.5}, "clip: 1.5 must be at most 1"),
    (awm, {"ema_hold": 2.0}, "ema_hold: 2.0 is a decay, at most 1; nearest valid: 1"),
    (awm, {"ema_kl": -1.0}, "ema_kl: -1.0 must be finite and ≥ 0; nearest valid: 0"),
    (awm, {"likelihood": "x"}, "likelihood: 'x' is not one of adaptive"),
    (advantage_flow, {"gamma": 0.9}, "gamma: 0.9 leaves a sample of advantage −1.0 without a minimum"),
    (advantage_flow, {"t_min": 1.0}, "t_min: 1.0 must be in [0, 1); nearest valid: 0"),
    (advantage_flow, {"t_min": 0.5, "t_max": 0.5}, "t_max: 0.5 must be above t_min, 0.5, and at most 1; nearest"),
    (advantage_flow, {"pairs": 0}, "pairs: 0 must be at least 1; nearest valid: 1"),
    (v_grpo, {"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.01 is usual"),
    (v_grpo, {"pairs": 50}, "pairs: 50 do not fit the 40 times of 40 steps; nearest valid: 40"),
    (v_grpo, {"soft_clip": 0.0}, "soft_clip: 0.0 must be finite and above 0"),
    (elbo_pg, {"kind": "ppo"}, "kind: 'ppo' is not one of 'epg'"),
    (elbo_pg, {"rollout": "ddim"}, "rollout: 'ddim' is not one of 'ode', 'sde'"),
    (elbo_pg, {"gain": 0.0}, "gain: 0.0 must be finite and above 0; 0.1 is usual"),
    (elbo_pg, {"kl_form": "k4"}, "kl_form: 'k4' is not one of 'velocity'"),
    (elbo_pg, {"scale": "std"}, "scale: 'std' is not one of 'none'"),
    (dgpo, {"fraction": 0.05}, "fraction: 0.05 of 10 steps is no share of them; nearest valid: 0.1"),
    (dgpo, {"fraction": 1.5}, "nearest valid: 1"),
    (dgpo, {"compare_to": "ema"}, "compare_to: 'ema' is not one of reference, old"),
    (dgpo, {"old_hold": 1.2}, "old_hold: 1.2 is a decay, in 0 … 1"),
    (crd, {"temperature": -1.0}, "temperature: -1.0 must be finite and ≥ 0"),
    (crd, {"form": "l1"}, "form: 'l1' is not one of mse, bce"),
    (online_dpo, {"beta": 0.0}, "beta: 0.0 must be finite and above 0; 2000.0 is usual"),
    (rejection_sft, {"best": 24}, "best: 24 must be in 1 … 23; nearest valid: 23"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_bad_arguments(make: Callable[..., Algorithm], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [diffusion_nft, awm, v_grpo, elbo_pg])
def test_a_solver_walks_the_rollout(make: Callable[..., Algorithm]) -> None:
    ends = {name: Bench(algorithm=make(10, 3, solver=name)).collect().forest.nodes for name in SOLVERS}
    assert all(len(nodes) == len(ends["euler"]) for nodes in ends.values())
    assert len({nodes.sum().item() for nodes in ends.values()}) == len(SOLVERS)
    with pytest.raises(ValueError, match="solver: 'heun' is not one of euler, dpm2, unipc2; nearest valid: 'euler'"):
        make(10, 3, solver="heun")
