"""Flow-GRPO and TempFlow-GRPO: costs, defaults, groups, reductions, and what cannot be composed."""

import inspect
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from fake import Bench
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_checks import second

from tempflow import algorithms
from tempflow.algorithms import (
    ALGORITHMS,
    branch_grpo,
    dance_grpo,
    drm_grpo,
    dynamic_treerpo,
    find,
    flash_grpo,
    flow_cps,
    flow_dppo,
    flow_grpo,
    flow_grpo_fast,
    gcpo,
    grpo_guard,
    mix_grpo,
    mix_grpo_flash,
    otca,
    slas,
    tempflow_grpo,
    vipo,
)
from tempflow.algorithms.base import Algorithm, some_steps
from tempflow.core import plan, weight
from tempflow.core.dynamics import CPS, DDIM, ODE, DanceSDE, FlowSDE, LinearSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.plan import Cost
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.core.scores import Scores


def grown(algorithm: Algorithm, prompts: int = 2, iteration: int = 0):
    """A forest on four-element latents with the velocity of a linear toy."""
    plans = [algorithm.plan(iteration, slot) for slot in range(prompts)]
    return rollout(
        plans,
        algorithm.dynamics,
        shifted(algorithm.steps),
        lambda x, s, r: 0.8 * x - 0.3,
        Noise(7, iteration),
        shape=(4,),
    )


def scored(forest, seed=0) -> Scores:
    value = torch.randn(len(forest.leaves), 1, generator=torch.Generator().manual_seed(seed))
    return Scores(value, torch.ones_like(value, dtype=torch.bool), ("r",))


# ------------------------------------------------------------------------------------------------------- costs
def test_costs_of_the_papers_settings():
    assert tempflow_grpo().plan(0, 0).cost() == Cost(1116, 216, 216)
    assert flow_grpo().plan(0, 0).cost() == Cost(240, 24, 216)
    assert tempflow_grpo().cost(0, 48) == Cost(48 * 1116, 48 * 216, 48 * 216)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(2, 9), seeds=st.integers(1, 4), branches=st.integers(2, 5), data=st.data())
def test_cost_formulas(steps, seeds, branches, data):
    t, s, k = steps, seeds, branches
    full = tempflow_grpo(steps=t, seeds=s, branches=k).plan(0, 0).cost()
    assert full == Cost(s * (t - 1) + s * k * t * (t - 1) // 2, s * k * (t - 1), s * k * (t - 1))
    n, iteration = data.draw(st.integers(1, t - 1)), data.draw(st.integers(0, 50))
    part = tempflow_grpo(steps=t, seeds=s, branches=k, branch_steps=n).plan(iteration, 3)
    at = sorted({i for i, noisy in zip(part.step, part.stochastic, strict=True) if noisy})
    assert len(at) == n and max(at) <= t - 2
    assert part.cost() == Cost(s * (max(at) + 1) + s * k * sum(t - 1 - i for i in at), s * k * n, s * k * n)
    chain = flow_grpo(steps=t, group=k, train_steps=n).plan(iteration, 0)
    assert chain.cost() == Cost(k * t, k, k * n) and all(chain.stochastic)


def test_drawn_steps_change_with_the_iteration_only_and_cover_all():
    algorithm = tempflow_grpo(branch_steps=3)
    assert algorithm.plan(4, 0) is algorithm.plan(4, 11)
    drawn = [some_steps("tempflow_grpo", 0, i, 3, 9) for i in range(300)]
    assert len(set(drawn)) > 60
    share = np.bincount([i for steps in drawn for i in steps], minlength=9) / 300
    assert share.sum() == pytest.approx(3) and np.all(np.abs(share - 1 / 3) < 0.1)


@pytest.mark.parametrize(
    "algorithm", [tempflow_grpo(), flow_grpo(), tempflow_grpo(branch_steps=9), flow_grpo(train_steps=9)]
)
def test_equal_plans_are_one_object(algorithm):
    assert algorithm.plan(0, 0) is algorithm.plan(17, 5)


def test_all_steps_drawn_is_the_default():
    assert tempflow_grpo(branch_steps=9).plan(3, 0) == tempflow_grpo().plan(0, 0)
    assert flow_grpo(train_steps=9).plan(3, 0) == flow_grpo().plan(0, 0)


# ---------------------------------------------------------------------------------------------------- defaults
def test_defaults_are_the_papers():
    def defaults(function):
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}

    common = {"steps": 10, "noise_level": 0.7, "clip": 1e-4, "clip_high": None, "eps": 1e-4, "advantage_clip": 5.0}
    tempflow = {"seeds": 4, "branches": 6, "branch_steps": None, "kl": 0.004, "std_group": "seed"}
    assert defaults(tempflow_grpo) == common | tempflow | {"weight": "noise_aware"}
    flow = {"group": 24, "train_steps": None, "kl": 0.04, "kl_form": "drift", "std": "global"}
    assert defaults(flow_grpo) == common | flow


@pytest.mark.parametrize(
    ("function", "published"),
    [
        (
            flow_grpo_fast,
            {"steps": 10, "group": 24, "window": 3, "kind": "cps", "clip": 1e-5, "std": "global"},
        ),
        (flow_cps, {"steps": 10, "group": 24, "noise_level": 0.8, "log_prob": "unscaled", "kl": 0.0, "std": "global"}),
        (grpo_guard, {"steps": 10, "group": 24, "kind": "flow", "clip": 2e-6, "kl": 0.0, "std": "group"}),
        (flow_dppo, {"steps": 10, "group": 16, "noisy_steps": 3, "threshold": 1e-5, "scaled": True, "std": "global"}),
        (dance_grpo, {"steps": 16, "group": 12, "fraction": 0.6, "keep": None, "noise_level": 0.3, "clip": 1e-4}),
        (mix_grpo, {"steps": 25, "window": 4, "every": 25, "stride": 1, "noise_level": 0.7, "clip": 1e-4, "kl": 0.0}),
        (mix_grpo_flash, {"steps": 25, "every": 20, "compress": 0.4, "second_order": True, "clip": 1e-4, "kl": 0.0}),
        (branch_grpo, {"steps": 20, "splits": (0, 3, 6, 9), "split_scale": 4.0, "noise_level": 0.3, "clip": 1e-3}),
        (dynamic_treerpo, {"depth": 4, "branches": 2, "growth": 0.5, "sensitivity": 0.5, "imitation": 5e-4, "kl": 0.0}),
        (gcpo, {"steps": 17, "sizes": (2, 3, 4, 7), "largest": 4, "share": 0.5, "noise_level": 0.7, "clip": 5e-5}),
        (flash_grpo, {"steps": 20, "group": 8, "clip": 1e-3}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_defaults_are_the_sources(function, published):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in published} == published


def test_noise_follows_the_kind_where_it_is_not_given():
    assert (grpo_guard().dynamics, grpo_guard(kind="dance").dynamics) == (FlowSDE(0.7), DanceSDE(0.3))
    assert (flow_grpo_fast().dynamics, flow_grpo_fast(kind="sde").dynamics) == (CPS(0.8), FlowSDE(0.7))
    assert (otca().dynamics, otca(kind="flow").dynamics) == (DanceSDE(0.3), FlowSDE(0.7))
    assert (vipo().dynamics, vipo(kind="flow").dynamics) == (DanceSDE(0.25), FlowSDE(0.7))
    assert (slas().dynamics, slas(dynamics="flow").dynamics) == (DanceSDE(0.3), FlowSDE(0.7))
    assert (drm_grpo().dynamics, drm_grpo(dynamics="cps").dynamics) == (FlowSDE(0.7), CPS(0.8))


def test_what_the_defaults_compose():
    a = tempflow_grpo()
    assert (a.name, a.steps, a.dynamics, a.first.weight) == ("tempflow_grpo", 10, FlowSDE(0.7), weight.noise_aware)
    assert a.objective == clipped(1e-4, 1e-4, 0.004, "exact")
    assert (a.credit.by, a.credit.scale, a.credit.unbiased) == (("prompt", "root", "step"), "group", False)
    b = flow_grpo()
    assert (b.name, b.steps, b.dynamics, b.first.weight) == ("flow_grpo", 10, FlowSDE(0.7), weight.uniform)
    assert b.objective == clipped(1e-4, 1e-4, 0.04, "drift")
    assert (b.credit.by, b.credit.scale, b.credit.eps, b.credit.clip) == (("prompt", "step"), "global", 1e-4, 5.0)
    assert tempflow_grpo(clip_high=2e-4).objective.clip.high == 2e-4
    assert flow_grpo(clip=3e-4).objective.clip.high == 3e-4


# ------------------------------------------------------------------------------------------------------ credit
def test_seed_prompt_and_batch_groups_against_numpy():
    forest = grown(tempflow_grpo(steps=4, seeds=2, branches=3))
    scores = scored(forest)
    edges = forest.edges
    # a leaf's reward belongs to its one noisy edge, and both are listed in one order here
    value = np.full(len(edges), np.nan)
    value[forest.descent[0].numpy()] = scores.value[forest.descent[1], 0].double().numpy()
    prompt, root, step = (t.numpy() for t in (edges.prompt, edges.root, edges.step))
    for group in ("seed", "prompt", "batch"):
        got = tempflow_grpo(steps=4, seeds=2, branches=3, std_group=group).credit(scores, forest).value.numpy()
        for e in range(len(edges)):
            same_step = step == step[e]
            mine = same_step & (prompt == prompt[e])
            mine &= (root == root[e]) | (group != "seed")
            spread = value[same_step if group == "batch" else mine].std()
            assert got[e] == pytest.approx((value[e] - value[mine].mean()) / (spread + 1e-4), abs=1e-5)


def test_flow_grpo_gives_every_step_of_a_chain_its_leaf_advantage():
    forest = grown(flow_grpo(steps=4, group=5), prompts=3)
    scores = scored(forest)
    rewards = scores.value[:, 0].double().numpy().reshape(3, 5)
    for std, spread in (("global", rewards.std()), ("group", rewards.std(axis=1, keepdims=True))):
        expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-4)
        got = flow_grpo(steps=4, group=5, std=std).credit(scores, forest).value.numpy()
        want = expected[forest.edges.prompt.numpy(), forest.edges.root.numpy()]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_noise_aware_weights_of_the_paper():
    algorithm = tempflow_grpo()
    forest = grown(algorithm, prompts=1)
    weights = algorithm.first.weight(forest, shifted(10), algorithm.dynamics)
    by_step = [float(weights[forest.edges.step == i][0]) for i in range(9)]
    np.testing.assert_allclose(by_step, [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508], atol=6e-4)
    flat = tempflow_grpo(weight="uniform")
    assert torch.equal(flat.first.weight(forest, shifted(10), flat.dynamics), torch.ones(len(forest.edges)))


# -------------------------------------------------------------------------------------------------- reductions
def test_one_branch_at_one_step_reduces_to_a_window_of_one():
    """K = 1 from independent seeds, noise at one step only, prompt group: Flow-GRPO-Fast's single-step window."""
    algorithm = tempflow_grpo(steps=5, seeds=6, branches=1, branch_steps=1, std_group="prompt")
    part = algorithm.plan(2, 0)
    (at,) = {i for i, noisy in zip(part.step, part.stochastic, strict=True) if noisy}
    other = plan.one_step(5, 6, at)
    assert part.cost() == other.cost()
    assert part.stochastic == other.stochastic and part.trained == other.trained and part.step == other.step
    ours = tempflow_grpo(steps=4, seeds=6, branches=1, branch_steps=1, std_group="prompt", clip=0.02, kl=0.1)
    seeded = ours.seeded(Bench().context.seed)
    fast = flow_grpo_fast(steps=4, group=6, window=1, window_end=3, kind="sde", noise_level=0.7, clip=0.02, kl=0.1)

    def same_step(iteration: int, slot: int) -> plan.Plan:
        grown = seeded.plan(iteration, slot)
        return plan.one_step(4, 6, grown.step[grown.stochastic.index(True)])

    # the same noises by identity, and the only weight left is 1 but for rounding
    theirs = second(replace(fast, plan=same_step, credit=ours.credit))
    torch.testing.assert_close(second(ours), theirs, rtol=0, atol=2e-6)


def test_without_noise_children_are_equal_and_teach_nothing():
    algorithm = tempflow_grpo(steps=4, seeds=2, branches=3, noise_level=1e-12)
    forest = grown(algorithm)
    leaves = forest.nodes[forest.leaves.node]
    scores = Scores(leaves.sum(1, keepdim=True), torch.ones(len(leaves), 1, dtype=torch.bool), ("sum",))
    advantage = algorithm.credit(scores, forest)
    assert not advantage.live.any() and torch.equal(advantage.value, torch.zeros(len(forest.edges)))


def test_seed_group_advantages_sum_to_zero_by_seed_and_step():
    forest = grown(tempflow_grpo(steps=5, seeds=3, branches=4))
    advantage = tempflow_grpo(steps=5, seeds=3, branches=4).credit(scored(forest), forest).value
    groups = torch.stack([forest.edges.prompt, forest.edges.root, forest.edges.step], 1)
    index = torch.unique(groups, dim=0, return_inverse=True)[1]
    sums = torch.zeros(int(index.max()) + 1).index_add(0, index, advantage)
    assert sums.abs().max() < 1e-5 and advantage.abs().max() > 0.5


# ----------------------------------------------------------------------------------------------------- composing
def compose(objective=None, **changes) -> Algorithm:
    base = tempflow_grpo(steps=4, seeds=1, branches=2)
    phase = base.first if objective is None else base.first.taught(objective)
    return replace(base, name="own", phases=(phase,), **changes)


BAD_COMPOSITIONS = [
    (lambda: compose(dynamics=ODE()), ["dynamics: ODE()", "draws no noise", "nearest valid: FlowSDE(noise_level=0.7)"]),
    (lambda: compose(dynamics=FlowSDE(0.0)), ["dynamics: FlowSDE(noise_level=0.0)", "nearest valid: FlowSDE"]),
    (lambda: compose(steps=5), ["steps: 5, but the plan has 4; nearest valid: 4"]),
    (lambda: compose(plan=lambda i, s: plan.ode(4, 2)), ["plan: trains none of its edges"]),
    (
        lambda: compose(plan=lambda i, s: plan.chain(4, 2, train=[0, 3]), dynamics=CPS(0.8)),
        ["plan: trains step 3", "CPS", "nearest valid: train [0]"],
    ),
    (
        lambda: compose(plan=lambda i, s: plan.chain(4, 2, train=[1, 2, 3]), dynamics=DDIM()),
        ["plan: trains step 3", "nearest valid: train [1, 2]"],
    ),
    (
        lambda: compose(dynamics=CPS(0.8), objective=clipped(kl=0.1, kl_form="drift")),
        ["kl_form: 'drift' needs a diffusion rate", "CPS", "nearest valid: 'exact'"],
    ),
]


@pytest.mark.parametrize("make,parts", BAD_COMPOSITIONS)
def test_parts_that_do_not_fit(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("dynamics", [FlowSDE(), DanceSDE(), LinearSDE(), CPS(), DDIM()])
def test_every_noisy_kind_composes(dynamics):
    assert compose(dynamics=dynamics, objective=clipped(kl=0.1, kl_form="exact")).dynamics is dynamics
    assert compose(dynamics=dynamics, objective=clipped(kl=0.0, kl_form="drift")).objective.weight_sets == ("policy",)


BAD_ARGUMENTS = [
    (tempflow_grpo, {"steps": 1}, "steps: 1 must be at least 2, as the last one is not branched; nearest valid: 2"),
    (tempflow_grpo, {"seeds": 0}, "seeds: 0 must be at least 1; nearest valid: 1"),
    (tempflow_grpo, {"branches": 0}, "branches: 0 must be at least 1; nearest valid: 1"),
    (tempflow_grpo, {"branches": 1}, "branches: 1 must be at least 2, or a seed's group has nothing to compare with"),
    (tempflow_grpo, {"seeds": 1, "branches": 1, "std_group": "prompt"}, "branches: 1 with 1 seed leaves nothing"),
    (tempflow_grpo, {"branch_steps": 10}, "branch_steps: 10 must be in 1 … 9; nearest valid: 9"),
    (tempflow_grpo, {"branch_steps": 0}, "branch_steps: 0 must be in 1 … 9; nearest valid: 1"),
    (tempflow_grpo, {"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.7 is usual"),
    (tempflow_grpo, {"noise_level": float("nan")}, "noise_level: nan must be finite and above 0"),
    (tempflow_grpo, {"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
    (tempflow_grpo, {"clip_high": -1.0}, "clip_high: -1.0 must be"),
    (tempflow_grpo, {"kl": -1.0}, "kl: -1.0 must be"),
    (tempflow_grpo, {"std_group": "root"}, "std_group: 'root' is not one of 'seed', 'prompt', 'batch'"),
    (tempflow_grpo, {"weight": "noise"}, "weight: 'noise' is not one of noise_aware, uniform"),
    (tempflow_grpo, {"eps": -1.0}, "eps: -1.0 must be"),
    (tempflow_grpo, {"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0; 5.0 is usual"),
    (flow_grpo, {"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained"),
    (flow_grpo, {"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2"),
    (flow_grpo, {"train_steps": 12}, "train_steps: 12 must be in 1 … 9; nearest valid: 9"),
    (flow_grpo, {"std": "batch"}, "std: 'batch' is not one of 'global', 'group'; nearest valid: 'global'"),
    (flow_grpo, {"kl_form": "exac"}, "kl_form: 'exac' is not one of exact, drift, velocity"),
]


@pytest.mark.parametrize("function,arguments,message", BAD_ARGUMENTS)
def test_bad_arguments_name_field_value_and_valid_one(function, arguments, message):
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------- names
def test_our_algorithms_are_found_by_their_own_names():
    for name, function in ALGORITHMS.items():
        assert find(name) is function and function().name == name == function.__name__


def test_unknown_names_and_entry_points(monkeypatch):
    with pytest.raises(ValueError, match=r"name: 'tempflow' is no known algorithm; nearest valid: 'tempflow_grpo'"):
        find("tempflow")
    group, other = "tempflow.algorithms", "tempflow.core.schedule:shifted"
    points = EntryPoints(EntryPoint(name, other, group) for name in ("my_grpo", "flow_grpo"))
    monkeypatch.setattr(algorithms, "entry_points", points.select)
    assert find("my_grpo") is shifted
    assert find("flow_grpo") is flow_grpo  # ours stay ours
    with pytest.raises(ValueError, match=r"nearest valid: 'my_grpo'"):
        find("my_grop")
