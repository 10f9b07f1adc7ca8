"""The ratio is 1 at the first update whatever rollout and training round, and a guard that sees when they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, brightness, config, flow, same, tempflow, weights
from torch import Tensor, nn

from tempflow.algorithms import Algorithm, dapo, dynamic_treerpo, flow_cps, gcpo, grpo_guard, gspo, v_grpo, vipo
from tempflow.core.ema import Copy, Ema
from tempflow.request import asked
from tempflow.train.guards import GuardError
from tempflow.train.trainer import train

MAKE: dict[str, Callable[[], Algorithm]] = {
    "tempflow": lambda: tempflow(clip=1e-4, kl=0.1),
    "flow": lambda: flow(clip=1e-4),
    "cps": lambda: flow_cps(4, 6),
    "guard": lambda: grpo_guard(4, 6),
    "chunks": lambda: gcpo(4, 6, (1, 2), share=1.0),
    "paths": lambda: gspo(4, 6),
    "dapo": lambda: dapo(4, 6, clip=1e-4, clip_high=2e-4),
    "positions": lambda: vipo(4, 6, kind="flow", noise_level=0.7),
    "tree": lambda: dynamic_treerpo(4, 1, 2, 3, every=1),
}


def rounding(model: Fake, size: float = 2**-9) -> Fake:
    """From now on what the network says depends on how many rows it is asked for."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * (1 + size * (len(out) % 5))

    model.network.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("rows", [(24, 6), (7, 96)])
def test_it_is_1_where_kernels_round_by_the_batch(name: str, rows: tuple[int, int]) -> None:
    model = rounding(Fake(dtype=torch.bfloat16))
    bench = Bench(model, MAKE[name](), guidance=4.5, rollout_rows=rows[0], train_rows=rows[1])
    before = weights(model)
    seen = bench.iterate()
    assert seen["log_ratio_max"] == seen["clip_fraction"] == seen["outside_clip"] == 0
    assert 0 < seen["rollout_gap_max"] < 6, "the rollout's own log-probs are off, and it is rounding"
    assert bench.counter.old == 0 and seen["updates"] == 1 and not same(weights(model), before)


@pytest.mark.parametrize("name", MAKE)
def test_later_updates_compare_with_the_same_batches_before_any_weight_moved(name: str) -> None:
    """With rate 0 no weight ever moves: then every update's ratio is 1."""
    model = rounding(Fake(dtype=torch.bfloat16))
    bench = Bench(model, MAKE[name](), guidance=4.5, rollout_rows=24, train_rows=6, updates=3, rate=0.0)
    seen = bench.iterate()
    assert seen["updates"] == 3 and seen["log_ratio_max"] == seen["clip_fraction"] == 0
    algorithm, counter = bench.context.algorithm, bench.counter
    assert 0 < counter.old < counter.train and counter.old <= algorithm.old_forwards(counter.train, 3)
    others = len(algorithm.objective.weight_sets) - 1
    assert counter.forwards == counter.rollout + counter.train * (1 + others) + counter.old
    assert sum(model.rows) == 2 * counter.forwards, "guidance asks twice"


def test_later_updates_differ_from_the_start_of_the_iteration_not_from_the_last_update() -> None:
    """The recorded log-probs are those of the weights that rolled out, as the rollout's own are in float32."""
    bench = Bench(algorithm=flow(), updates=3)
    moved = bench.iterate()
    assert moved["rollout_gap_max"] < 4 and moved["log_ratio_max"] > 1e-3


def sampled(rule: Any) -> Algorithm:
    return replace(flow(clip=0.02), sampler="old", weight_sets={"old": rule})


def test_a_sampler_that_is_the_policy_costs_nothing() -> None:
    model = rounding(Fake(dtype=torch.bfloat16))
    bench = Bench(model, sampled(Copy()), rollout_rows=24, train_rows=6)
    assert all(bench.iterate(i)["log_ratio_max"] == 0 for i in range(2)) and bench.counter.old == 0
    two = Bench(rounding(Fake(dtype=torch.bfloat16)), sampled(Copy()), rollout_rows=24, train_rows=6, updates=2)
    two.iterate()
    assert two.counter.old == two.counter.train // 2


@pytest.mark.parametrize("updates", [1, 2])
def test_a_sampler_that_lags_is_asked_in_the_training_batch(updates: int) -> None:
    bench = Bench(algorithm=sampled(Ema(0.9)), rollout_rows=24, train_rows=7, updates=updates)
    first, trained = bench.iterate(0), bench.counter.train
    assert first["rollout_gap_max"] < 4
    assert bench.counter.old == (updates > 1) * trained // 2, "as yet it is the policy"
    old = bench.counter.old
    second = bench.iterate(1)
    assert bench.counter.old - old == bench.counter.train - trained
    assert second["rollout_gap_max"] < 4, "the guard compares with the set that rolled out"
    assert second["log_ratio_max"] > 1e-3, "the policy has left it"
    assert sum(bench.model.rows) == bench.counter.forwards


def test_a_sampler_that_the_loss_asks_anyway_is_asked_once() -> None:
    bench = Bench(algorithm=replace(flow(clip=0.02, kl=0.1), sampler="reference"), train_rows=7)
    bench.iterate(0)
    old = bench.counter.old
    assert bench.iterate(1)["rollout_gap_max"] < 4 and bench.counter.old == old == 0
    assert sum(bench.model.rows) == bench.counter.forwards


def test_likelihood_ratios_are_1_too() -> None:
    """Forward-process methods ask old in the same batch, on the path that the policy takes."""
    model = rounding(Fake(dtype=torch.bfloat16))
    bench = Bench(model, v_grpo(4, 6, 3), guidance=4.5, rollout_rows=24, train_rows=6)
    assert all(bench.iterate(i)["log_ratio_max"] == 0 for i in range(2))


# ---------------------------------------------------------------------------------------------------- planted faults
def faulty(bench: Bench, fault: str) -> Callable[[], object]:
    """An update after a rollout, with a fault between the two."""
    if fault == "weights":
        experience = bench.collect()
        with torch.no_grad():
            bench.model.network.mean.bias.add_(0.02)
        return lambda: bench.update(experience)
    experience, context, model = bench.collect(), bench.context, bench.model
    condition = model.encode(asked(PROMPTS), SIZE)
    right, bare = (model.predictor(condition, g) for g in (context.guidance, 1.0))
    after = {float(s): float(t) for s, t in zip(context.schedule.sigmas, context.schedule.sigmas[1:], strict=False)}
    ask: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "guidance": bare,
        "prompt": lambda x, sigma, rows: right(x, sigma, (rows + 1) % len(PROMPTS)),
        "sigma": lambda x, sigma, rows: right(x, torch.tensor([after[float(s)] for s in sigma]), rows),
        "dropout": lambda x, sigma, rows: nn.functional.dropout(right(x, sigma, rows), 0.1),
    }
    model.predictor = lambda condition, guidance, network=None: ask[fault]  # type: ignore[method-assign]
    return lambda: bench.update(experience)


@pytest.mark.parametrize("fault", ["guidance", "prompt", "sigma", "dropout", "weights"])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_planted_fault_stops_before_any_weight_moves(fault: str, updates: int) -> None:
    bench = Bench(algorithm=flow(), guidance=2.0, rollout_rows=24, train_rows=6, updates=updates)
    act = faulty(bench, fault)
    before = weights(bench.model)
    with pytest.raises(GuardError, match=r"first_ratio.*unequal rows \(rollout_rows 24, train_rows 6\).*guidance"):
        act()
    assert same(weights(bench.model), before) and not bench.optimizer.state


def test_it_is_looked_at_in_every_iteration() -> None:
    bench = Bench(algorithm=flow())
    bench.iterate(0)
    experience = bench.collect(1)
    with torch.no_grad():
        bench.model.network.mean.bias.add_(0.02)
    with pytest.raises(GuardError, match="iteration 2: first_ratio"):
        bench.update(experience, 1)


def test_a_run_says_what_old_log_probs_cost(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path / "run", iterations=1, optimizer={"updates_per_iteration": 2}, train_rows=5)
    run = train(settings, model=Fake(), reward=brightness, prompts=PROMPTS)
    edges = settings.algorithm.build().cost(0, 3).trained_edges
    assert f"old log-probs: at most {edges // 2} forwards an iteration" in capsys.readouterr().out
    assert run.counter.old == edges // 2
    assert f'"old_forwards": {edges // 2}' in (run.folder / "summary.json").read_text()
