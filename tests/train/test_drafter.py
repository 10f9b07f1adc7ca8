"""The network that drafts: it follows the sampler, is never trained, and what it cannot do is said before a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config
from torch import nn

from tempflow.algorithms import sol_rl
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.precision import cheap_copy, check_precision
from tempflow.request import asked
from tempflow.train.trainer import train
from tempflow.train.update import predictors
from tempflow.train.weights import CopyDrafter, Drafter, Trainable, WeightSets

SIZE = Size(32, 32)

SMALL: dict[str, Any] = {"steps": 4, "group": 4, "pool": 8, "draft_steps": 2, "kl": 0.0, "draft_precision": "bfloat16"}


def drafter(bench: Bench) -> CopyDrafter:
    assert isinstance(bench.context.drafter, CopyDrafter)
    return bench.context.drafter


@pytest.mark.parametrize("lag", ["type0", "type2"])
def test_it_drafts_by_the_sampler_and_not_by_the_policy(lag: str) -> None:
    """Both lags copy the policy in their first iterations; for type2 old is then set apart by hand."""
    bench = Bench(algorithm=sol_rl(lag=lag, **SMALL), rate=0.1)  # type: ignore[arg-type]
    old = bench.weight_sets.sets["old"]
    bench.iterate()
    if lag == "type2":
        with torch.no_grad():
            for value in old.values:
                value.add_(0.5)
    first = {n: p.clone() for n, p in drafter(bench).copy.inner.named_parameters()}
    bench.collect(1)
    for name, p in drafter(bench).copy.inner.named_parameters():
        assert torch.equal(p, old.named()[name].bfloat16()) and not torch.equal(p, first[name])
        policy = bench.trainable.named()[name].bfloat16()
        assert torch.equal(p, policy) == (lag == "type0")


def test_it_is_never_trained_and_never_a_target() -> None:
    bench = Bench(algorithm=sol_rl(**SMALL))
    seen: list[int] = []
    drafter(bench).copy.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    experience = bench.collect()
    assert sum(seen) == len(PROMPTS) * 8 * 2  # the pool, and nothing of what is drawn again
    bench.update(experience)
    assert sum(seen) == len(PROMPTS) * 8 * 2
    assert set(predictors(bench.context, experience.prompts)) == {"policy", "old"}
    mine = set(map(id, drafter(bench).copy.parameters()))
    assert mine and all(p.grad is None and not p.requires_grad for p in drafter(bench).copy.parameters())
    assert not mine & set(map(id, bench.trainable.parameters + bench.trainable.masters))


def test_a_lora_is_drafted_with_and_follows() -> None:
    model = load("shapes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_lora(2, 4)
    trainable = Trainable(model.network)
    algorithm = sol_rl(**{**SMALL, "draft_precision": "int8"})
    sets = WeightSets.of(algorithm, trainable).sets
    made = Drafter.of(algorithm, model, trainable, sets)
    assert made.precision == "int8" and all(".lora_" in name for name in trainable.names)
    x, sigma, rows = torch.randn(3, 8, 8, 8), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.long)
    condition = model.encode(asked(["a red circle"]), SIZE)

    @torch.no_grad()
    def velocity(network: nn.Module | None) -> torch.Tensor:
        return model.predictor(condition, 1.0, network=network)(x, sigma, rows)

    before = velocity(made.fresh(None)).clone()
    with torch.no_grad():
        for value in sets["old"].values:
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    after, want = velocity(made.fresh(None)), velocity(sets["old"].network())
    moved = float((want - before).norm())
    assert float((after - want).norm()) < 0.2 * moved and moved > 0.1 * float(before.norm())
    trainable.load(sets["old"].named())
    again = velocity(cheap_copy(model.network, model.blocks(model.network), "int8"))
    assert torch.equal(again, after)


def test_the_sampler_may_be_the_policy() -> None:
    algorithm = sol_rl(**SMALL)
    bench = Bench(algorithm=replace(algorithm, sampler="policy"))
    bench.iterate()
    drafter(bench).fresh(None)
    for name, p in drafter(bench).copy.inner.named_parameters():
        assert torch.equal(p, bench.trainable.named()[name].bfloat16())


def test_replay_is_bit_exact_and_precision_only_touches_drafts() -> None:
    first, second = (Bench(algorithm=sol_rl(**SMALL)) for _ in range(2))
    a, b = first.collect(), second.collect()
    assert torch.equal(a.forest.nodes, b.forest.nodes) and torch.equal(a.scores.value, b.scores.value)
    full = Bench(algorithm=sol_rl(**{**SMALL, "pool": 4, "draft_precision": "full"})).collect()
    cheap = Bench(algorithm=sol_rl(**{**SMALL, "pool": 4})).collect()
    assert torch.equal(full.forest.nodes, cheap.forest.nodes)  # all four are kept: only the draft differs
    assert first.clock.seconds["draft"] > 0 and first.clock.seconds["rollout"] > 0


def test_a_setting_without_its_drafter_is_refused() -> None:
    context = Bench(algorithm=sol_rl(**SMALL)).context
    with pytest.raises(ValueError, match=r"drafter: 'full', but Draft\(.*bfloat16"):
        replace(context, drafter=Drafter("full"))


def test_a_run_with_low_precision_drafts_resumes_bitwise(tmp_path: Path) -> None:
    algorithm = {"name": "sol_rl", **SMALL}
    for name, iterations in (("whole", 4), ("cut", 2)):
        options = {"iterations": iterations, "algorithm": algorithm, "evaluation": {"every": 1}}
        train(config(tmp_path / name, **options), reward=brightness, prompts=PROMPTS, model=Fake(), quiet=True)
    longer = config(tmp_path / "cut", iterations=4, algorithm=algorithm, evaluation={"every": 1})
    train(longer, reward=brightness, prompts=PROMPTS, model=Fake(), quiet=True, resume=True, allow_changes=True)
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert a == b and '"draft/kendall"' in a


# ------------------------------------------------------------------------------------------------------ said beforehand
def test_what_the_device_lacks_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tempflow.train.build.load", loaded)
    settings = config(tmp_path / "run", algorithm={"name": "sol_rl", **SMALL, "draft_precision": "nvfp4"})
    with pytest.raises(ValueError, match=r"draft_precision: 'nvfp4' needs a CUDA device .* nearest valid: 'int8'"):
        train(settings, reward=brightness, prompts=PROMPTS, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_sharded_run_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"draft_precision: 'bfloat16' copies .* 'fsdp' .*nearest valid: 'full'"):
        check_precision("bfloat16", cpu, sharded=True)
    check_precision("bfloat16", cpu, sharded=False)
    check_precision("full", cpu, sharded=True)


def test_drafts_do_not_depend_on_chunks() -> None:
    whole = Bench(algorithm=sol_rl(**SMALL)).collect()
    parts = Bench(algorithm=sol_rl(**SMALL), rollout_rows=3).collect()
    assert torch.equal(whole.scores.value, parts.scores.value)
