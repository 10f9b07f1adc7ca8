"""GDMD's loss: targets, what a score does to them, who bears gradients, and where it comes to rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_distill_objectives import GRID, Affine, batch, bearing, noised, roles, sample
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.objective.distill import DistributionMatching
from tempflow.core.objective.guided_targets import LEAST_SPREAD, GuidedTargets
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.schedule import explicit
from tempflow.core.times import UniformTimes


def with_old(moved: float = 0.0) -> dict[str, Affine]:
    """The roles, and the student as it was before its mean moved."""
    models = roles()
    before = Affine(float(models["policy"].mean.detach()) - moved, float(models["policy"].std.detach()))
    return models | {"old": before}


Heard = list[Tensor]


def judged(rule: Callable[[Tensor], Tensor], ok: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Heard]:
    """A judge, and all that it was given."""
    heard: Heard = []

    def judge(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        heard.append(x)
        value = rule(x.flatten(1).mean(1))
        fine = torch.ones_like(value, dtype=torch.bool) if ok is None else ok(value)
        return torch.where(fine, value, torch.nan), fine

    return judge, heard


def given(rule: Callable[[Tensor], Tensor], size: int = 6, spread: float | None = 1.0, **options: Any) -> NoiseBatch:
    return replace(batch(size), judge=judged(rule, **options)[0], spread=spread)


def by_gap(better: float) -> Any:
    """The first sample that is scored is worth 0 and the second `better`: own sample, then target."""
    calls = iter(range(10**6))

    def judge(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_full((len(x),), (next(calls) % 2) * better), torch.ones(len(x), dtype=torch.bool)

    return judge


def gradient(loss: GuidedTargets | DistributionMatching, models: dict[str, Affine], on: NoiseBatch) -> Tensor:
    policy = models["policy"]
    return torch.stack(torch.autograd.grad(loss(models, on).value, [policy.mean, policy.std]))


# ------------------------------------------------------------------------------------------------------------ targets
@pytest.mark.parametrize("head", ["nft", "signed"])
def test_own_sample_and_target_are_what_is_scored_and_the_student_alone_bears_gradients(head: Any) -> None:
    models = with_old(0.3)
    judge, heard = judged(torch.tanh)
    at = replace(batch(), judge=judge, spread=0.4)
    loss = GuidedTargets(head=head)(models, at)
    (asked_at,), of_old = models["policy"].seen, models["old"].seen[-1]
    with torch.no_grad():
        own = sample(models["old"], at)
        state, _, t = noised(own, at, "matching", 0.02, 0.98)
        s = t.view(-1, 1, 1)
        real, fake = (state - s * models[name](state, t, at.rows) for name in ("reference", "fake"))
        g = (fake - real) / (own - real).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(heard[0], own)
    torch.testing.assert_close(heard[1], own - g)
    assert not any(x.requires_grad for x in heard) and len(heard) == 2
    r = 0.5 + 0.5 * ((torch.tanh(heard[1].mean((1, 2))) - torch.tanh(heard[0].mean((1, 2)))) / 0.4).clamp(-1, 1)
    torch.testing.assert_close(loss.metrics["optimality"], r)
    # the student is asked where the old one stood when it made its sample
    x, sigma = asked_at
    assert torch.equal(x, of_old[0]) and torch.equal(sigma, of_old[1])
    student = x - sigma.to(x).view(-1, 1, 1) * models["policy"](x, sigma, at.rows)
    pull = 0.5 * (student - (own - g)).square().mean((1, 2))
    if head == "nft":
        minus = 0.5 * (2 * own - student - (own - g)).square().mean((1, 2))
        term = r * pull + (1 - r) * minus
    else:
        term = (2 * r - 1) * pull + 1.1 * 0.5 * (student - own).square().mean((1, 2))
    torch.testing.assert_close(loss.value, (pull + term).mean())
    assert bearing(models, loss.value) == {"policy"}


@pytest.mark.parametrize("head", ["nft", "signed"])
@pytest.mark.parametrize(
    ("better", "factor"), [(9.0, 2.0), (1.0, 2.0), (0.5, 1.5), (0.0, 1.0), (-0.5, 0.5), (-9.0, 0.0)]
)
def test_at_the_old_student_a_score_weighs_the_matching_gradient(head: Any, better: float, factor: float) -> None:
    """λ + γ·(2r−1) times DMD's: plain DMD (twice) for r ≡ 1, λ's alone for equal scores."""
    models = with_old()
    at = replace(batch(), judge=by_gap(better), spread=1.0)
    plain = gradient(DistributionMatching(), models, at)
    torch.testing.assert_close(gradient(GuidedTargets(head=head), models, at), factor * plain, rtol=1e-9, atol=1e-12)
    alone = gradient(GuidedTargets((0.0, 1.0), head), models, at)
    torch.testing.assert_close(alone, (factor - 1) * plain, rtol=1e-9, atol=1e-12)
    if factor == 1:
        assert alone.abs().max() < 1e-15


@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_equal_scores_hold_a_moved_student(mix: float) -> None:
    """Each head's own pull to the old student: β·½·mean (x − x0)² beside ½·mean g²/β, and 1.1·½·mean (x − x0)²."""
    models, at = with_old(0.3), replace(batch(), judge=by_gap(0.0), spread=1.0)
    found = GuidedTargets((0.0, 1.0), "nft", mix)(models, at)
    moved, size = found.metrics["moved"], found.metrics["gradient"]
    torch.testing.assert_close(found.value, (0.5 * mix * moved**2 + 0.5 * size**2 / mix).mean())
    signed = GuidedTargets((0.0, 1.0), "signed")(models, replace(at, judge=by_gap(0.0)))
    torch.testing.assert_close(signed.value, (1.1 * 0.5 * moved**2).mean())
    assert moved.min() > 0.01


def test_r_of_one_is_plain_matching_averaged_over_targets() -> None:
    """Also away from the old student: β = 1 makes the head the regression itself."""
    models, at = with_old(0.3), replace(batch(), judge=by_gap(5.0), spread=1.0)
    whole = GuidedTargets((0.25, 0.75))(models, at).value
    torch.testing.assert_close(whole, GuidedTargets((1.0, 0.0))(models, at).value)


# ------------------------------------------------------------------------------------------------- failures and spread
def test_a_failed_score_leaves_the_regression_and_nan_reaches_no_gradient() -> None:
    models, at = with_old(0.3), given(lambda value: value, ok=lambda value: (100 * value).floor() % 4 > 0)
    loss = GuidedTargets()(models, at)
    failed = loss.metrics["failed_rewards"].bool()
    assert 0 < int(failed.sum()) < 6
    told = loss.sums()
    assert all(math.isfinite(total) and (count == 6 or name in loss.counts) for name, (total, count) in told.items())
    for name in ("reward", "target_reward"):
        ok = loss.counts[name]
        assert 0 < int(ok.sum()) < 6 and told[name] == (loss.metrics[name][ok].sum().item(), int(ok.sum()))
    assert torch.equal(loss.metrics["optimality"][failed], torch.full((int(failed.sum()),), 0.5).double())
    whole, plain = (GuidedTargets((1.0, gamma)) for gamma in (1.0, 0.0))
    for row in range(6):
        one = replace(at, x=at.x[row : row + 1], rows=at.rows[row : row + 1], ids=at.ids[row : row + 1])
        same = torch.equal(gradient(whole, models, one), gradient(plain, models, one))
        assert same == bool(failed[row])
    lost = given(lambda value: value, ok=lambda value: value > 1e9)
    torch.testing.assert_close(gradient(whole, models, lost), gradient(plain, models, lost))


def test_without_a_spread_the_reward_waits_and_equal_scores_so_far_do_not_divide_by_zero() -> None:
    models = with_old(0.3)
    waits = replace(batch(), judge=by_gap(1.0), spread=None)
    assert torch.equal(gradient(GuidedTargets(), models, waits), gradient(GuidedTargets((1.0, 0.0)), models, waits))
    assert GuidedTargets()(models, waits).metrics["optimality"].eq(0.5).all()
    flat = replace(batch(), judge=by_gap(LEAST_SPREAD / 2), spread=0.0)
    torch.testing.assert_close(GuidedTargets()(models, flat).metrics["optimality"].mean().item(), 0.75)
    own = GuidedTargets(spread=4.0)(models, replace(batch(), judge=by_gap(1.0), spread=1.0))
    torch.testing.assert_close(own.metrics["optimality"].mean().item(), 0.5 + 0.5 / 4)


def test_rows_depend_on_their_ids_alone_and_rows_are_counted() -> None:
    models, at = with_old(0.3), given(torch.tanh)
    objective = GuidedTargets()
    whole, part = objective(models, at), slice(2, 5)
    some = objective(models, replace(at, x=at.x[part], rows=at.rows[part], ids=at.ids[part]))
    for name in ("optimality", "gradient", "gap", "moved", "reward", "target_reward"):
        torch.testing.assert_close(whole.metrics[name][part], some.metrics[name])
    for model in models.values():
        model.seen.clear()
    objective(models, at)
    asked = {name: sum(len(x) for x, _ in model.seen) for name, model in models.items()}
    assert asked["policy"] == asked["fake"] == asked["reference"] == 6 and 6 < asked["old"] <= 6 * 4
    assert objective.cost(4) == Cost(6, 2, 1) and GuidedTargets(strength=2.0).cost(4) == Cost(5, 2, 1, alone=2)
    assert GuidedTargets(strength=2.0).guidance == {"reference": 2.0} and objective.guidance == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "grpo"}, "head: 'grpo' is not one of nft, signed; nearest valid: 'nft'"),
        ({"weights": (1.0, -1.0)}, r"weights\[1\]: -1.0 must be finite and ≥ 0"),
        ({"mix": 0.0}, "mix: 0.0 must be finite and above 0"),
        ({"anchor": 1.0}, "anchor: 1.0 must be finite and above 1"),
        ({"spread": 0.0}, "spread: 0.0 must be finite and above 0"),
        ({"normaliser": "x"}, "normaliser: 'x' is not one of clean, noisy, none"),
    ],
)
def test_bad_fields_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GuidedTargets(**fields)
    assert "\n" not in str(caught.value)


def test_a_missing_network_and_a_missing_judge_are_named() -> None:
    models = with_old()
    with pytest.raises(ValueError, match="judge: None, and the loss has samples scored"):
        GuidedTargets()(models, batch())
    del models["fake"]
    with pytest.raises(ValueError, match="models: 'fake' is missing"):
        GuidedTargets()(models, batch())


# -------------------------------------------------------------------------------------------------------- fixed points
class OneStep(torch.nn.Module):
    """A student of one step on a line: its sample of noise z is mean + std·z."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = std

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return x - (self.mean + self.std * x)


TIME, TEACHER_STD = 0.6, 0.5
COUNT = 4000


def pushed(mean: float, std: float, sharpness: float, reward: Callable[[Tensor], Tensor]) -> float:
    """The gradient on the student's mean, of a student N(mean, std²) with an exact fake and the teacher N(0, .5²);
    λ = 1, γ/Z = `sharpness`, small enough that no difference is clipped."""
    student = OneStep(mean, std)
    models: dict[str, Any] = {
        "policy": student,
        "old": OneStep(mean, std),
        "fake": Affine(mean, std),
        "reference": Affine(0.0, TEACHER_STD),
    }
    ids = tuple((0, 0, 0, n) for n in range(COUNT))
    # noises of both signs, so that the sample's own mean is exact
    half = torch.randn(COUNT // 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = NoiseBatch(torch.cat([half, -half]), torch.zeros(COUNT).long(), ids, 3, explicit((1.0,)))
    at = replace(at, judge=judged(reward)[0])
    times = UniformTimes(low=TIME, high=TIME + 1e-9)
    objective = GuidedTargets((1.0, 50.0 * sharpness), spread=50.0, times=times, normaliser="none")
    return float(torch.autograd.grad(objective(models, at).value, student.mean)[0])


@pytest.mark.parametrize("reward", [lambda x: x, lambda x: -x.square(), torch.ones_like])
def test_with_an_exact_fake_the_teacher_s_law_is_a_fixed_point_of_any_reward(reward: Any) -> None:
    """There g = 0, so each target is the sample itself, and r = ½."""
    assert abs(pushed(0.0, TEACHER_STD, 0.5, reward)) < 1e-12
    assert pushed(0.2, TEACHER_STD, 0.1, reward) > 0.01 > -0.01 > pushed(-0.2, TEACHER_STD, 0.1, reward)


def test_a_reward_tilts_a_student_that_cannot_be_its_teacher() -> None:
    """Of width b ≠ s the gradient is g = c·d + k·u at t, with d the distance of the means, u ~ N(0, V) and
    c = 1 − (1−t)K_s, k = K_b − K_s. For R(x) = x the pull E[(λ − γ·g/Z)·g] is 0 at c·d = γ/Z·(c²d² + k²V): above the
    teacher."""
    t, s, b, sharpness = TIME, TEACHER_STD, 0.9, 0.5
    gain = [(1 - t) * w**2 / ((1 - t) ** 2 * w**2 + t**2) for w in (s, b)]
    c, k, variance = 1 - (1 - t) * gain[0], gain[1] - gain[0], (1 - t) ** 2 * b**2 + t**2
    rest = (1 - math.sqrt(1 - 4 * sharpness**2 * k**2 * variance)) / (2 * sharpness * c)
    error = 4 * k * math.sqrt(variance / COUNT)  # of the mean of COUNT draws, four deviations of it
    assert rest * c > 2 * error, "the tilt is larger than what the draws cannot tell"
    assert abs(pushed(rest, b, sharpness, lambda x: x)) < error
    assert pushed(2 * rest, b, sharpness, lambda x: x) > error and pushed(0.0, b, sharpness, lambda x: x) < -error / 2
    # and the other way round for what asks for less; a constant reward leaves matching's own fixed point
    assert abs(pushed(-rest, b, sharpness, lambda x: -x)) < error
    assert abs(pushed(0.0, b, sharpness, torch.ones_like)) < error


def test_the_grid_of_the_tests_is_the_student_s() -> None:
    assert [round(float(s), 6) for s in GRID.sigmas] == [1.0, 0.9, 0.75, 0.5, 0.0]
