"""UDM-GRPO: its loss as written in the released code, counts, the loop with tokens of a model, a toy, faults."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import Fake, from_function
from loop_checks import bench_of, check_counts, check_first_ratio, gradient
from torch import Tensor, nn

from tempflow.algorithms import ALGORITHMS, tempflow_grpo, udm_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.corruption import TokenLikelihood
from tempflow.core.dynamics import Dynamics, ModelJump
from tempflow.core.metric_path import MetricJump, MetricPath
from tempflow.core.objective.leaves import renoise_leaves
from tempflow.core.objective.ratio import clipped
from tempflow.core.objective.regularizer import LikelihoodKL, TokenKL
from tempflow.core.schedule import linear
from tempflow.core.weight import rectified
from tempflow.media import Media, Size
from tempflow.models.guidance import Guidance
from tempflow.models.protocol import Conditioning, Predict, sampler_of

CODES = torch.tensor([[1.0, 0.2], [0.3, 1.0], [-0.8, 0.4], [-0.5, -0.9], [0.6, -1.0]], dtype=torch.float64)
JUMP, V = MetricJump(MetricPath(CODES)), len(CODES)


class Logits(nn.Module):
    """Logits of the clean tokens: a bias for each place by the prompt, and a table of the token that is seen there."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.own = nn.Linear(2, 4 * V), nn.Embedding(V, V)
        for weight in (self.mean.weight, self.mean.bias, self.own.weight):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return self.mean(condition).view(-1, 2, 2, V) + self.own(x)


class Tiles(Fake):
    """A picture of four grey tiles, the lighter the larger the token."""

    name, shape = "tiles", (2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.network = Logits()

    @property
    def jump(self) -> Dynamics:
        return JUMP

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        module, tokens = self.network if network is None else network, condition.tensors["embeds"][:, 0]

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            self.rows.append(len(x))
            return module(x, sigma, tokens[rows])

        return predict

    def decode(self, x: Tensor, size: Size) -> Media:
        return Media.of((x * 60).to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous())


def bright(images: list[Any], prompts: list[str]) -> list[float]:
    return [sum(image.convert("L").tobytes()) / (4 * 240) for image in images]


def made(**fields: Any) -> Any:
    return udm_grpo(**{"steps": 5, "group": 12, **fields}).on(JUMP, "tiles")


CASES = {
    "clean": {},
    "every token": {"kl_of": "token", "kl": 0.5},
    "jumps": {"actions": "jumps"},
    "branches": {"actions": "branches"},
}


@pytest.mark.parametrize("of", ["sequence", "token"])
def test_the_loss_is_the_released_one(of: str) -> None:
    g = torch.Generator().manual_seed(0)
    x0, advantage = torch.randint(V, (4, 2, 2), generator=g), torch.tensor([1.5, -0.5, 0.2, -1.0])
    phase = made(kl=0.05, kl_of=of).phases[0]
    ids = [(0, 0, n) for n in range(4)]
    batch = renoise_leaves(
        x0, advantage, torch.zeros(4).long(), ids, phase.renoise, 3, linear(5), corruption=JUMP.corruption
    )
    steps = (5 * (1 - batch.t.double())).round()
    assert batch.t.shape == (4, 3) and torch.equal(batch.t, (1 - steps / 5).float())
    assert bool((steps.diff() == 1).all()) and set(steps[:, 0].tolist()) <= {0.0, 1.0, 2.0}
    theta = torch.randn(2, V, V, generator=g, dtype=torch.float64)
    theta[1] = theta[0] + theta[1] / 10  # the reference is near
    policy = theta[0].clone().requires_grad_()
    said = {"policy": lambda x, t, r: policy[x], "reference": lambda x, t, r: theta[1][x]}
    loss = phase.objective(said, batch).value

    x = JUMP.path.corrupt(x0.repeat_interleave(3, 0), batch.noise.flatten(0, 1), batch.t.flatten())
    want = x0.repeat_interleave(3, 0)
    mine, theirs = (
        table[x].log_softmax(-1).gather(-1, want[..., None])[..., 0].flatten(1) for table in (policy, theta[1])
    )
    logps, ref = mine.mean(1), theirs.mean(1)
    ratio, a = (logps - logps.detach()).exp(), advantage.double().repeat_interleave(3)
    surrogate = -torch.minimum(a * ratio, a * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
    d = ref - logps if of == "sequence" else theirs - mine
    k3 = d.exp() - d - 1
    written = surrogate + 0.05 * k3.mean()
    torch.testing.assert_close(loss.double(), written, rtol=1e-6, atol=1e-6)
    got, right = (torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (loss, written))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7)
    assert bool((k3 >= 0).all()) and float(k3.detach().mean()) > 1e-4 and float(got.abs().max()) > 1e-2


def test_k3_of_tokens_is_at_least_that_of_their_mean_and_0_for_equals() -> None:
    g = torch.Generator().manual_seed(1)
    x0 = torch.randint(V, (6, 2, 2), generator=g)
    one, other = torch.randn(2, V, V, generator=g)
    ids = [(0, 0, n) for n in range(6)]
    phase = made().phases[0]
    batch = renoise_leaves(
        x0, torch.ones(6), torch.zeros(6).long(), ids, phase.renoise, 0, linear(5), corruption=JUMP.corruption
    )

    def divergence(regularizer: Any, reference: Tensor) -> float:
        objective = replace(phase.objective, regularizers=(regularizer,))
        sets = {"policy": lambda x, t, r: one[x], "reference": lambda x, t, r: reference[x]}
        return float(objective(sets, batch).metrics["kl_reference"].mean())

    tokens, mean = TokenKL("reference", 1.0), LikelihoodKL("reference", 1.0, "k3", TokenLikelihood())
    assert divergence(tokens, other) > divergence(mean, other) > 0
    assert divergence(tokens, one) == divergence(mean, one) == 0


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_the_loop_counts_and_starts_at_a_ratio_of_one(fields: dict[str, Any]) -> None:
    reward = from_function(bright)
    check_counts(made(**fields), model=Tiles(), reward=reward)
    check_first_ratio(made(**fields), model=Tiles(), reward=reward)
    one, other = (gradient(made(**fields), model=Tiles(), reward=reward, train_rows=rows) for rows in (1000, 7))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def jumping(name: str) -> Any:
    """An algorithm of numbers that reads no means of steps and draws all of them, on tokens."""
    return replace(ALGORITHMS[name](steps=5, group=12, kl=0.0), dynamics=ModelJump()).on(JUMP, "tiles")


LEARN = {
    "clean": lambda: made(kl=0.0),
    "clean, at all steps": lambda: made(kl=0.0, window=5, starts=1),
    "jumps": lambda: made(kl=0.0, actions="jumps"),
    "branches": lambda: made(kl=0.0, actions="branches"),
    "dapo": lambda: jumping("dapo"),
}


@pytest.mark.parametrize("make", LEARN.values(), ids=LEARN)
def test_half_the_gap_is_closed_on_four_tiles(make: Callable[[], Any]) -> None:
    """Untrained, a tile is worth .5; the lightest is worth 1."""
    bench = bench_of(make(), model=Tiles(), reward=from_function(bright), rate=0.1)
    started = time.process_time()
    seen = [bench.iterate(iteration)["reward/bright"] for iteration in range(15)]
    print(f"{seen[0]:.2f} to {seen[-1]:.2f} in {time.process_time() - started:.1f} s of CPU")
    assert seen[0] == pytest.approx(0.5, abs=0.1) and seen[-1] > 0.75


def test_what_a_model_is_drawn_by() -> None:
    assert sampler_of(Tiles()) is JUMP and not sampler_of(Fake()).stochastic
    assert isinstance(udm_grpo().dynamics, ModelJump) and made().dynamics is JUMP
    assert {udm_grpo(actions="jumps").seeded(seed).plan(0, 0).trained for seed in range(9)} == {
        udm_grpo(actions="jumps").seeded(0).plan(i, 0).trained for i in range(9)
    }, "three windows"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: udm_grpo(window=9), "window: 9 from the last of 3 starts leaves the grid of 10 steps; .* valid: 8"),
        (lambda: udm_grpo(group=1), "group: 1 .*nothing to compare with"),
        (lambda: udm_grpo(actions="words"), "actions: 'words' is not one of 'clean', 'jumps'"),
        (lambda: udm_grpo(kl_of="all"), "kl_of: 'all'"),
        (lambda: replace(tempflow_grpo(), dynamics=ModelJump()), "plan: tempflow_grpo walks steps that draw no noise"),
        (
            lambda: replace(udm_grpo(actions="jumps"), phases=(EdgePhase(clipped(), rectified),)),
            "ModelJump.* moves tokens, which have no mean and no std",
        ),
        (lambda: udm_grpo().on(None, "shapes"), "udm_grpo trains tokens, and the states of 'shapes' are numbers"),
        (lambda: tempflow_grpo().on(JUMP, "tiles"), "tempflow_grpo moves real numbers.* 'tiles' are tokens.*udm_grpo"),
        (lambda: udm_grpo().dynamics.transition(*[torch.zeros(1)] * 5), "no model has said how its tokens jump"),
        (
            lambda: udm_grpo(actions="jumps").on(MetricJump(MetricPath(torch.randn(2049, 2))), "large"),
            r"plan: trains step \d+, where .* has no noise",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ask()
    assert "\n" not in str(caught.value)
