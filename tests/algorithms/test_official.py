"""What the official codes and papers say, in numbers: each recomputed here by a formula of its own, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake import PROMPTS, SHAPE, SIZE, Bench, Fake
from loop_checks import two_rewards
from torch import Tensor, nn

from tempflow.algorithms import (
    advantage_flow,
    awm,
    branch_grpo,
    crd,
    dgpo,
    diffusion_nft,
    drm_grpo,
    e2po,
    elbo_pg,
    flow_grpo_fast,
    grpo_guard,
    sol_rl,
    tempflow_grpo,
)
from tempflow.algorithms.flow_cps import UnscaledRatio
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.objective.leaves import LeafBatch
from tempflow.core.objective.matching import SignedLeastSquares
from tempflow.core.objective.ratio import StepRatio
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.core.weight import inverse_step
from tempflow.request import asked
from tempflow.train.experience import credit
from tempflow.train.weights import Trainable, WeightSets


# ------------------------------------------------------------------------------------------------- moving averages
def return_decay(flat: float, slope: float, hold: float) -> Callable[[int], float]:
    """DiffusionNFT's and Sana's rule."""
    return lambda i: 0.0 if i < flat else min((i - flat) * slope, hold)


BLENDS: dict[str, tuple[Any, str, Callable[[int], float], bool]] = {
    "nft, type1": (diffusion_nft(), "old", return_decay(0, 0.001, 0.5), True),
    "nft, type2": (diffusion_nft(lag="type2"), "old", return_decay(75, 0.0075, 0.999), True),
    "rethinking, type3": (elbo_pg(lag="type3"), "old", return_decay(10, 0.01, 0.5), True),
    "awm": (awm(), "ema", lambda i: min(0.3, 0.001 * i), True),
    "crd, old": (crd(), "old", lambda i: min(0.25 + 0.005 * i, 0.999), True),
    "crd, sampling": (crd(), "sampling", return_decay(75, 0.0075, 0.999), True),
    "sol_rl, type3": (sol_rl(lag="type3", lag_steps=50), "old", return_decay(0, 0.9 / 50, 0.9), True),
    "dgpo": (dgpo(), "old", lambda i: min(0.3, 0.001 * i), False),
}
"""The algorithm, its set, the code's decay of its counter i, and whether the loop raises i before it blends."""


@pytest.mark.parametrize("name", BLENDS)
def test_a_set_blends_as_the_official_loop_does(name: str) -> None:
    """i starts at 0, and is raised once an update; the policy goes from 0 to n² in n updates."""
    algorithm, which, decay, raised_first = BLENDS[name]
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    trainable = Trainable(network)
    ours = WeightSets.of(algorithm, trainable).sets[which]
    want, i = 0.0, 0
    for update in range(1, 121):
        with torch.no_grad():
            trainable.masters[0].fill_(float(update**2))
        ours.update()
        i += raised_first
        want = want * decay(i) + update**2 * (1 - decay(i))
        i += not raised_first
        assert float(ours.values[0]) == pytest.approx(want, rel=2e-6), update


def test_sol_rls_third_lag_is_its_own() -> None:
    """custom_decay_value · min(i / custom_decay_step, 1); the name means another rule in "Rethinking"."""
    rule = sol_rl(lag="type3", lag_steps=200, lag_hold=0.8).weight_sets["old"]
    assert [rule.decay(i) for i in (1, 100, 200, 10**6)] == pytest.approx([0.004, 0.4, 0.8, 0.8])
    assert sol_rl(lag="type2").weight_sets == diffusion_nft(lag="type2").weight_sets
    for fields, message in (
        ({}, "lag_steps: None, and 'type3' rises over a number of iterations; nearest valid: 100"),
        ({"lag_steps": 0}, "lag_steps: 0 must be at least 1"),
        ({"lag_steps": 5, "lag_hold": 1.5}, r"lag_hold: 1.5 is a decay, in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sol_rl(lag="type3", **fields)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- settings, by their values
def test_the_slide_of_pruned_steps_ends_where_the_child_is_at_the_last_split() -> None:
    """The code stops at depth max(splits), and counts the child's: with 0, 3, 6, 9 step 8 is the last to be pruned."""
    last = branch_grpo(prune_steps=(15,), prune_every=1).plan(10_000, 0)
    noisy = {i for i, stochastic in zip(last.step, last.stochastic, strict=True) if stochastic}
    trained = {i for i, use in zip(last.step, last.trained, strict=True) if use}
    assert noisy - trained == {max((0, 3, 6, 9)) - 1} == {8}
    assert {i for i, use in zip(last.step, last.trained, strict=True) if use} == noisy - {8}
    first = branch_grpo(splits=(0,), prune_steps=(4,), prune_every=1).plan(10_000, 0)
    assert not any(use for i, use in zip(first.step, first.trained, strict=True) if i == 0)  # not below 0


def test_grpo_guard_is_its_authors_configuration() -> None:
    """config/grpo_guard.py: T 10, 24 a prompt, clip 2e-6 both ways, std of the group, β 0; the loss over sqrt_dt²."""
    a = grpo_guard()
    assert (a.steps, a.plan(0, 0).roots, a.credit.scale, a.objective.weight_sets) == (10, 24, "group", ("policy",))
    assert (a.objective.clip.low, a.objective.clip.high, a.first.weight) == (2e-6, 2e-6, inverse_step)


def test_tempflows_default_clip_is_flow_grpos() -> None:
    assert tempflow_grpo().objective.clip.low == tempflow_grpo().objective.clip.high == 1e-4


def test_fast_has_the_official_cps_log_prob_unless_told() -> None:
    ratio = {name: flow_grpo_fast(**fields).objective.ratio for name, fields in FAST.items()}
    assert ratio == {"cps": UnscaledRatio(), "density": StepRatio(), "sde": StepRatio()}
    plans = [flow_grpo_fast().plan(i, 0) for i in range(60)]
    starts = {p.step[p.stochastic.index(True)] for p in plans}
    assert starts == {0, 1, 2}  # three steps that end inside the first half of ten
    with pytest.raises(ValueError, match="log_prob: 'unscaled' is of the step \"cps\", not 'sde'; nearest valid"):
        flow_grpo_fast(kind="sde", log_prob="unscaled")
    with pytest.raises(ValueError, match="log_prob: 'mean' is not one of 'unscaled', 'density'"):
        flow_grpo_fast(log_prob="mean")  # type: ignore[arg-type]


FAST: dict[str, dict[str, Any]] = {"cps": {}, "density": {"log_prob": "density"}, "sde": {"kind": "sde"}}


# ------------------------------------------------------------------------------------------------------------- dpm2
@pytest.mark.parametrize("make", [diffusion_nft, elbo_pg, sol_rl, e2po])
def test_the_released_solver_walks_by_default(make: Any) -> None:
    """DPM-Solver++(2M) as DiffusionNFT's diffusers_patch/solver.py has it, step by step in float64."""
    model, solver = Fake(), make(steps=6).solver
    predict, grid = model.predictor(model.encode(asked(PROMPTS[:1]), SIZE), 1.0), model.schedule(6, SIZE)
    rows, x, data = torch.zeros(3, dtype=torch.long), Noise(0).initial([(0, k) for k in range(3)], SHAPE).double(), []
    sigma = [float(s) for s in grid.sigmas]
    lam = [math.inf if s == 0 else -math.inf if s == 1 else math.log((1 - s) / s) for s in sigma]
    for i in range(6):
        with torch.no_grad():
            v = predict(x.float(), torch.full((3,), sigma[i]), rows).double()
        data.append(x - sigma[i] * v)
        ratio = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1]) if 0 < i < 5 else 0.0  # first and last step: order 1
        clean = data[-1] + ratio / 2 * (data[-1] - data[i - 1])
        x = sigma[i + 1] / sigma[i] * x + (1 - sigma[i + 1] - sigma[i + 1] / sigma[i] * (1 - sigma[i])) * clean
    with torch.no_grad():
        walked = rollout([plan.ode(6, 3)], ODE(), grid, predict, Noise(0), shape=SHAPE, solver=solver)
        euler = rollout([plan.ode(6, 3)], ODE(), grid, predict, Noise(0), shape=SHAPE)
    torch.testing.assert_close(walked.nodes[walked.leaves.node].double(), x, rtol=1e-4, atol=1e-4)
    assert float((euler.nodes[euler.leaves.node] - walked.nodes[walked.leaves.node]).abs().max()) > 1e-2


# ---------------------------------------------------------------------------------------------------- AdvantageFlow
def test_advantage_flow_has_the_papers_settings() -> None:
    a = advantage_flow()
    assert (a.steps, a.plan(0, 0).roots, a.first.renoise.times.count(10), a.credit.scale, a.credit.clip) == (
        10,
        4,
        1,
        "pooled",
        1,
    )
    assert a.objective == SignedLeastSquares(1.1, "constant", 1e-3, 1.0) and not a.objective.adaptive


def test_advantage_flow_trains_on_the_plain_sum_of_its_rewards() -> None:
    """A = clip((S − mean of the prompt)/Z, ±1), S = Σ R, Z² = mean of (S − mean)², whatever each one's scale."""
    bench = Bench(algorithm=advantage_flow(4, 4, reference=0.0), rewards=two_rewards())
    experience = bench.collect()
    total = experience.scores.value.double().sum(1).view(len(PROMPTS), 4)
    assert float(experience.scores.value.std(0).min()) > 0
    centred = total - total.mean(1, keepdim=True)
    want = (centred / centred.square().mean().sqrt()).clamp(-1, 1).flatten()
    torch.testing.assert_close(credit(bench.context, experience).advantage.value.double(), want, rtol=1e-4, atol=1e-5)


V = torch.Generator().manual_seed(3)
X0, NOISE = torch.randn(5, 6, generator=V, dtype=torch.float64), torch.randn(5, 6, generator=V, dtype=torch.float64)
SETS = {name: torch.randn(5, 6, generator=V, dtype=torch.float64) for name in ("policy", "old", "reference")}
TIME = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
A = torch.tensor([1.0, -1.0, 0.3, -0.6, 0.0], dtype=torch.float64)


def least_squares(coefficient: Tensor, anchor: Tensor, reference: float) -> Tensor:
    """The gradient in v of mean(c·|x̂0 − x0|² + γ·|x̂0 − x̂0_old|² + λ·|x̂0 − x̂0_ref|²), as the paper writes it."""
    v = SETS["policy"].clone().requires_grad_()
    t = TIME[:, None]
    noisy = (1 - t) * X0 + t * NOISE
    clean, old, ref = (noisy - t * w for w in (v, SETS["old"], SETS["reference"]))
    parts = ((coefficient, X0), (anchor, old), (torch.full_like(A, reference), ref))
    loss = sum((c * (clean - target).square().mean(1)).mean() for c, target in parts)
    return torch.autograd.grad(loss, [v])[0]  # type: ignore[arg-type]


def ours(objective: SignedLeastSquares) -> Tensor:
    v = SETS["policy"].clone().requires_grad_()
    models = {name: (lambda x, sigma, rows, kept=kept: kept) for name, kept in {**SETS, "policy": v}.items()}
    rows = torch.arange(5)
    batch = LeafBatch(X0, A, rows, rows, TIME[:, None], NOISE[:, None])
    return torch.autograd.grad(objective(models, batch).value, [v])[0]


@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.1, 5.0])
def test_the_papers_sweep_of_anchors_runs(gamma: float) -> None:
    """γ .2 and .5 leave the worst samples without a minimum, and the paper ran them: the gradient is its loss's."""
    torch.testing.assert_close(ours(SignedLeastSquares(gamma, concave=True)), least_squares(A, A * 0 + gamma, 1e-3))
    if gamma < 1:
        with pytest.raises(ValueError, match=r"nearest valid: above 0\.999, or `concave` to run it all the same"):
            advantage_flow(gamma=gamma)


@pytest.mark.parametrize("anchor", ["balanced", "constant"])
def test_the_papers_ocr_setting_is_within_reach(anchor: Any) -> None:
    """β .1: β·A on the data, γ = β(β − A) or .01, λ 1e-3; divided by β it is gamma .1, reference .01."""
    beta = 0.1
    got = ours(SignedLeastSquares(0.1, anchor, 0.01, concave=anchor == "constant"))
    gamma = beta * (beta - A) if anchor == "balanced" else torch.full_like(A, 0.01)
    torch.testing.assert_close(beta * got, least_squares(beta * A, gamma, 1e-3))


# -------------------------------------------------------------------------------------------------------------- DRM
def test_drms_candidates_hang_off_a_chain_of_ode_steps() -> None:
    """Figure 4: what goes on is the step without noise, and every candidate ends where it is."""
    grown = drm_grpo(steps=5, chains=2, candidates=3).plan(0, 0)
    assert grown.cost() == plan.candidates(5, 2, 3, "candidate").cost() == plan.Cost(10, 2, 24)
    parents = set(grown.parent)
    goes_on = [e for e in range(len(grown.parent)) if grown.roots + e in parents or grown.step[e] == 4]
    assert len(goes_on) == 2 * 5 and not any(grown.stochastic[e] for e in goes_on)
    model = Fake()
    predict = model.predictor(model.encode(asked(PROMPTS[:1]), SIZE), 1.0)
    with torch.no_grad():
        tree = rollout([grown], drm_grpo().dynamics, model.schedule(5, SIZE), predict, Noise(1), shape=SHAPE)
        chain = rollout([plan.ode(5, 2)], ODE(), model.schedule(5, SIZE), predict, Noise(1), shape=SHAPE)
    assert torch.equal(tree.nodes[tree.leaves.node], chain.nodes[chain.leaves.node])
    with pytest.raises(ValueError, match="carry: 'best' is not one of 'ode', 'candidate'"):
        drm_grpo(carry="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("carry", ["ode", "candidate"])
def test_how_much_noisier_a_candidate_is_than_its_sigma(carry: Any) -> None:
    """Of one known picture: off an ODE chain only the step's own excess, √((σ' − S²/2σ)² + S²)/σ', in float64; down an
    SDE chain it adds up."""
    picture, grid = torch.linspace(-1, 1, 1 << 18), shifted(6)
    a = drm_grpo(steps=6, noise_level=0.9, carry=carry)

    def known(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return (x - picture) / sigma.view(-1, 1)

    forest = rollout([a.plan(0, 0)], a.dynamics, grid, known, Noise(3), shape=(1 << 18,))
    sigma = [float(s) for s in grid.sigmas.double()]
    for i in range(5):
        left = forest.nodes[forest.edges.child[forest.edges.step == i]] - (1 - sigma[i + 1]) * picture
        found = float(left.std() / sigma[i + 1])
        s2 = 0.9**2 * sigma[i] / (1 - (sigma[1] if i == 0 else sigma[i])) * (sigma[i] - sigma[i + 1])
        own = math.sqrt((sigma[i + 1] - s2 / (2 * sigma[i])) ** 2 + s2) / sigma[i + 1]
        if carry == "ode":
            assert found == pytest.approx(own, rel=0.02)
        elif i > 1:
            assert found > own * 1.015
