"""Objectives on tokens: edges by log-probs, clean samples by their likelihood; what needs a velocity refuses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tempflow.core.corruption import GAUSSIAN_PATH, MixturePath, TokenLikelihood
from tempflow.core.dynamics import FlowSDE, MixtureJump
from tempflow.core.objective.clip import Clip, DivergenceMask, SoftGate
from tempflow.core.objective.edges import EdgeBatch, replay
from tempflow.core.objective.leaves import LeafBatch, noised, renoise_leaves
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate, PolicyGradient
from tempflow.core.objective.matching import NegativeAware, SignedLeastSquares
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.old import old_of, told
from tempflow.core.objective.preference import (
    CentredReward,
    GroupPreference,
    OnlinePairs,
    PreferencePairs,
    Supervised,
)
from tempflow.core.objective.ratio import ChunkRatio, NormRatio, PolicyRatio, PositionRatio, RegionRatio, StepRatio
from tempflow.core.objective.regularizer import Divergence, Imitation, LikelihoodKL, PredictionDistance, ToRollout
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.schedule import linear
from tempflow.core.state import StateLayout, streams_along
from tempflow.core.times import UniformTimes

V, SHAPE, ROWS = 7, (4, 8), 48
JUMP, PATH, GRID = MixtureJump(V), MixturePath(V), linear(4, 3.0)


class Table(nn.Module):
    def __init__(self, seed: int = 0, size: float = 1.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(size * torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return self.theta[x] * (2 - sigma.view(-1, 1, 1, 1))


def edges(noise: float = 0.0, layout: StateLayout | None = None, rows: int = ROWS) -> tuple[EdgeBatch, Tensor]:
    """Edges whose rollout had logits of another relative error than training has, and training's logits."""
    g = torch.Generator().manual_seed(5)
    step, x = torch.arange(rows) % 4, torch.randint(V, (rows, *SHAPE), generator=g)
    with torch.no_grad():
        said = Table()(x, GRID.at(step), step)
    size = said.square().mean((1, 2, 3), keepdim=True).sqrt()
    law = JUMP.transition(x, said + noise * size * torch.randn(said.shape, generator=g), GRID, step)
    y = law.sample(Stream(0, "y").uniform([(k,) for k in range(rows)], SHAPE))
    law, ones = law if layout is None else law.counted_by(layout), torch.ones(rows)
    fields = {"step": step, "scale": ones, "rows": step, "advantage": ones, "weight": ones}
    held = {} if layout is None else {"layout": layout}
    return EdgeBatch(x, y, log_prob=law.log_prob(y), schedule=GRID, dynamics=JUMP, **fields, **held), said


@pytest.mark.parametrize("ratio", [StepRatio(), ChunkRatio()])
def test_where_nothing_moved_the_ratio_is_one_to_the_last_bit(ratio: StepRatio) -> None:
    batch, said = edges(1e-2)
    said = said.requires_grad_()
    old = old_of(batch, said, 1e-3, keeps_mean=False)
    mine = replace(batch, log_prob=old.log_prob, unit=torch.arange(ROWS) // 2)
    log_ratio = ratio(replay({"policy": told(said, batch.x, Table())}, ("policy",), mine))
    assert bool((log_ratio == 0).all()) and log_ratio.requires_grad and old.mean is None
    assert float((old.log_prob - batch.log_prob).abs().max()) > 1e-4


def test_the_clipped_loss_is_the_one_written_by_hand() -> None:
    batch, _ = edges()
    batch = replace(batch, advantage=torch.randn(ROWS, generator=torch.Generator().manual_seed(1)))
    policy, reference = Table(1), Table(2)
    loss = PolicyRatio(Clip(0.2, 0.3), regularizers=(Divergence(0.5),))(
        {"policy": policy, "reference": reference}, batch
    )

    def law(table: Table) -> Tensor:
        sigma, below = GRID.at(batch.step), GRID.after(batch.step)
        share = ((sigma - below) / sigma).view(-1, 1, 1, 1)
        stay = (1 - share) * nn.functional.one_hot(batch.x, V)
        return stay + share * table(batch.x, sigma, batch.rows).softmax(-1)

    p, q = law(policy), law(reference).detach()
    r = (p.gather(-1, batch.y[..., None]).log().mean((1, 2, 3)) - batch.log_prob).exp()
    clipped = torch.maximum(-batch.advantage * r, -batch.advantage * r.clamp(0.8, 1.3))
    by_hand = (clipped + 0.5 * (p * (p / q).log()).sum(-1).mean((1, 2))).mean()
    torch.testing.assert_close(loss.value, by_hand, rtol=1e-4, atol=1e-6)
    got, want = (torch.autograd.grad(value, policy.theta)[0] for value in (loss.value, by_hand))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["exact", "k1", "k2", "k3"])
def test_kls_of_steps(form: str) -> None:
    batch, _ = edges()
    policy, held = Table(), Divergence(1.0, form)  # type: ignore[arg-type]
    objective = PolicyRatio(regularizers=(held, ToRollout(0.1, StepRatio())))
    objective.check(JUMP)
    loss = objective({"policy": policy, "reference": Table(3)}, batch)
    assert bool(loss.metrics["kl"].isfinite().all()) and (form in ("k1",) or float(loss.metrics["kl"].min()) >= -1e-6)
    same = objective({"policy": policy, "reference": Table()}, batch)
    assert float(same.metrics["kl"].abs().max()) < 1e-6


# ------------------------------------------------------------------------------------------ the gap to the rollout's
@pytest.mark.parametrize("errors", [1, 30, 300])
def test_the_gap_is_an_error_of_logits_from_below(errors: int) -> None:
    batch, said = edges(errors * 2**-12)
    gap = old_of(batch, said, 2**-12, keeps_mean=False).gap
    assert float(gap.max()) <= 1.1 * errors
    assert float(gap.max()) >= errors * 0.3


def test_rounding_to_bfloat16_is_about_one_rounding_and_other_guidance_is_many() -> None:
    batch, said = edges()
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert 0 < float(old_of(batch, said.bfloat16(), unit, keeps_mean=False).gap.max()) < 1
    assert float(old_of(batch, 1.2 * said, unit, keeps_mean=False).gap.max()) > 10


def test_no_gap_of_what_is_the_same_nor_of_an_untrained_head_and_a_nan_is_one() -> None:
    batch, said = edges()
    assert bool((old_of(batch, said, 2**-24, keeps_mean=False).gap == 0).all())
    # another offset of all logits is the same law: what is left is arithmetic
    assert float(old_of(batch, said + 3.0, 2**-20, keeps_mean=False).gap.max()) < 1
    zeros = torch.zeros_like(said)
    law = JUMP.transition(batch.x, zeros, GRID, batch.step)
    untrained = replace(batch, log_prob=law.log_prob(batch.y))
    assert bool((old_of(untrained, zeros, 2**-24, keeps_mean=False).gap == 0).all())
    assert bool((old_of(batch, zeros, 2**-24, keeps_mean=False).gap > 100).any()), "nor is it off there"
    broken = replace(batch, log_prob=batch.log_prob.clone().index_fill(0, torch.tensor([5]), math.nan))
    gap = old_of(broken, said, 2**-24, keeps_mean=False).gap
    assert bool(gap[5].isnan()) and bool((gap[:5] == 0).all())
    impossible = said.clone()
    impossible.scatter_(-1, batch.y[:, :1, :1, None], -math.inf)
    gap = old_of(batch, impossible, 2**-24, keeps_mean=False).gap
    assert not bool(gap.isnan().any()) and float(gap.max()) == math.inf, "what was drawn cannot be"


def test_the_gap_counts_what_the_layout_counts() -> None:
    free = torch.ones(1, *SHAPE, dtype=torch.bool)
    free[:, 0] = False
    layout = StateLayout(free, torch.zeros(1, *SHAPE), streams_along(SHAPE, 0, {"a": 2, "b": 2}))
    batch, said = edges(30 * 2**-12, layout)
    noise = torch.zeros_like(said)
    noise[:, 0] = math.nan
    gap = old_of(batch, said + noise, 2**-12, keeps_mean=False).gap
    assert 9 <= float(gap.max()) <= 33


# ---------------------------------------------------------------------------------------------------- clean samples
def leaves(samples: int = 6, corruption: MixturePath = PATH, vocabulary: int = V) -> LeafBatch:
    x0 = torch.randint(vocabulary, (samples, *SHAPE), generator=torch.Generator().manual_seed(2))
    group, advantage = torch.arange(samples) // 3, torch.tensor([0.9, -0.5, -0.4] * (samples // 3))
    ids = [(0, int(g)) for g in group]
    renoise = Renoise(UniformTimes(3), 2, 2)
    return renoise_leaves(x0, advantage, group, ids, renoise, 0, GRID, corruption=corruption)


def sets() -> dict[str, nn.Module]:
    return {name: Table(seed) for seed, name in enumerate(("policy", "old", "reference"))}


PROXY = TokenLikelihood()
HELD = (LikelihoodKL("reference", 0.05, proxy=PROXY),)
ON_TOKENS = [
    ClippedLikelihood(estimate=Estimate(PROXY), regularizers=HELD),
    ClippedLikelihood(estimate=Estimate(PROXY, pooled=True, on_policy=True), soft_clip=3.0),
    *(PolicyGradient(kind, Estimate(PROXY), regularizers=HELD) for kind in ("epg", "pepg", "par")),  # type: ignore[arg-type]
    Supervised(PROXY, HELD),
    OnlinePairs(PreferencePairs(2.0, PROXY, HELD)),
    GroupPreference(2.0, proxy=PROXY, regularizers=HELD),
    CentredReward(kl=0.0, proxy=PROXY),
]


@pytest.mark.parametrize("objective", ON_TOKENS, ids=lambda o: type(o).__name__)
def test_objectives_on_a_likelihood_train_tokens(objective: ClippedLikelihood) -> None:
    batch, models = leaves(), sets()
    objective.check(PATH)
    loss = objective(models, batch)
    loss.value.backward()
    policy = models["policy"].get_parameter("theta")
    assert policy.grad is not None and float(policy.grad.abs().max()) > 0 and bool(policy.grad.isfinite().all())
    assert all(m.get_parameter("theta").grad is None for n, m in models.items() if n != "policy")
    assert torch.equal(with_velocity_norm(objective, models, batch, 6).value, loss.value)


def test_the_clean_tokens_loss_is_the_one_written_by_hand() -> None:
    """UDM-GRPO's: the ratio of mean log-probs of the clean tokens, and k3 of those to the reference."""
    batch, models = leaves(), sets()
    at = noised(models, ("policy", "reference"), batch)
    t = batch.t.flatten().view(-1, 1, 1)
    u, x0 = batch.noise.flatten(0, 1), batch.x0.repeat_interleave(3, 0)
    x = torch.where(u < t, (u / t * V).long(), x0)
    assert torch.equal(at.x, x) and at.x.dtype == torch.int64 and batch.noise.dtype == torch.float64

    def log_p(name: str) -> Tensor:
        said = models[name](x, batch.t.flatten(), torch.zeros(len(x)))
        return said.log_softmax(-1).gather(-1, x0[..., None]).mean((1, 2, 3))

    mine, held = log_p("policy"), log_p("reference").detach()
    advantage = batch.advantage.repeat_interleave(3)
    want = (-advantage * (mine - mine.detach()).exp() + 0.05 * ((held - mine).exp() - 1 - (held - mine))).mean()
    objective = ClippedLikelihood(1e-4, 1e-4, Estimate(PROXY, on_policy=True), regularizers=HELD)
    loss = objective(models, batch).value
    torch.testing.assert_close(loss, want)
    policy = models["policy"].get_parameter("theta")
    got, hand = (torch.autograd.grad(value, policy)[0] for value in (loss, want))
    torch.testing.assert_close(got, hand)


def test_parts_of_a_batch_and_several_streams() -> None:
    batch, models = leaves(), sets()
    objective = Supervised(PROXY)
    whole = objective(models, batch).value
    parts = [objective(models, batch.take(slice(k, k + 2)).only(slice(0, 3))).value for k in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    layout = StateLayout(streams=streams_along(SHAPE, 0, {"a": 1, "b": 3}))
    split = replace(batch, layout=layout, advantage=batch.advantage[:, None].expand(-1, 2))
    loss = ClippedLikelihood(estimate=Estimate(PROXY))(models, split)
    assert bool(loss.value.isfinite())


def refused(objective: ClippedLikelihood, words: str) -> None:
    """By check, and before any network is asked."""

    def asked(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        raise AssertionError("a network was asked")

    with pytest.raises(ValueError, match=words):
        objective.check(PATH)
    with pytest.raises(ValueError, match=words):
        objective(dict.fromkeys(("policy", "old", "reference"), asked), leaves())


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (NegativeAware(), "NegativeAware: needs a velocity, and of MixturePath.*nearest valid: one on a likelihood"),
        (SignedLeastSquares(), "SignedLeastSquares: needs a velocity"),
        (ClippedLikelihood(), r"proxy: Adaptive.* reads velocity, .* predicts logits; nearest valid: TokenLikelihood"),
        (PolicyGradient(), "proxy: Adaptive"),
        (Supervised(), "proxy: Matching"),
        (OnlinePairs(), "proxy: Matching"),
        (GroupPreference(), "proxy: Matching"),
        (CentredReward(proxy=PROXY), "PredictionDistance: needs a velocity"),
        (Supervised(PROXY, (PredictionDistance("reference", 0.1),)), "PredictionDistance: needs a velocity"),
        (Supervised(PROXY, (LikelihoodKL("reference", 0.1),)), "proxy: Adaptive"),
    ],
)
def test_what_needs_a_velocity_refuses_tokens(objective: ClippedLikelihood, words: str) -> None:
    refused(objective, words)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (PolicyRatio(ratio=NormRatio()), "NormRatio: reads means of steps: needs a velocity"),
        (PolicyRatio(ratio=PositionRatio()), "PositionRatio: reads means"),
        (PolicyRatio(ratio=RegionRatio()), "RegionRatio: reads means"),
        (PolicyRatio(ratio=ChunkRatio(NormRatio())), "ChunkRatio: reads means"),
        (PolicyRatio(DivergenceMask()), "DivergenceMask: reads means"),
        (PolicyRatio(regularizers=(ToRollout(0.1, NormRatio()),)), "ToRollout: reads means"),
        (PolicyRatio(regularizers=(Imitation(0.1),)), "peers: have means of steps"),
        (PolicyRatio(regularizers=(Divergence(0.1, "velocity"),)), "kl_form: 'velocity': needs a velocity"),
        (PolicyRatio(regularizers=(Divergence(0.1, "drift"),)), "'drift' needs a diffusion rate"),
    ],
)
def test_what_reads_means_of_steps_refuses_tokens(objective: PolicyRatio, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        objective.check(JUMP)
    if "drift" not in words:
        objective.check(FlowSDE())


def test_what_serves_tokens_passes_the_check() -> None:
    for objective in (PolicyRatio(), PolicyRatio(SoftGate(), regularizers=(Imitation(0.0), Divergence(0.1, "k3")))):
        objective.check(JUMP)
    NegativeAware().check(GAUSSIAN_PATH)
    with pytest.raises(ValueError, match="reads logits, and of GaussianPath"):
        Supervised(PROXY).check(GAUSSIAN_PATH)


BATCH, _SAID = edges(rows=4)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: replace(leaves(), x0=leaves().x0.float()), "x0: torch.float32 is no state of MixturePath.*int64"),
        (lambda: replace(leaves(), corruption=GAUSSIAN_PATH), "x0: torch.int64 is no state of GaussianPath"),
        (
            lambda: Supervised(PROXY)({"policy": lambda x, t, r: torch.zeros(*x.shape, V + 1)}, leaves()),
            r"18, 4, 8, 7\]",
        ),
        (lambda: Supervised(PROXY)({"policy": lambda x, t, r: x.float()}, leaves()), "policy: predicts logits"),
        (lambda: Supervised(PROXY)({"policy": Table()}, leaves(corruption=MixturePath(4))), "x0: token"),
        (lambda: PolicyRatio()({"policy": lambda x, t, r: x.float()}, BATCH), r"policy: predicts logits \[4, 4, 8\]"),
        (lambda: replay({"policy": Table()}, ("policy",), BATCH).velocity, "objective: needs a velocity"),
        (lambda: replay({"policy": Table()}, ("policy",), BATCH).policy, "law: a Categorical is of another kind"),
        (lambda: noised({"policy": Table()}, ("policy",), leaves()).target, "target: needs a velocity"),
        (lambda: noised({"policy": Table()}, ("policy",), leaves()).policy, "objective: needs a velocity"),
    ],
)
def test_bad_batches(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()
