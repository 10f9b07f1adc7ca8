from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tempflow.media import Size
from tempflow.models import compiled, load
from tempflow.models.compiled import RowCounts, compile_blocks, compile_seconds
from tempflow.models.tools import Tools
from tempflow.request import asked
from tempflow.train.context import Clock

CPU, SIZE = torch.device("cpu"), Size(32, 32)


def test_a_batch_takes_the_next_row_count_where_it_is_nearly_full() -> None:
    rows = RowCounts((96, 192))
    assert [rows.of(n) for n in (96, 95, 72, 71, 97, 143, 144, 192, 193)] == [96, 96, 96, 71, 97, 143, 192, 192, 193]
    assert RowCounts().of(5) == 5


@pytest.mark.parametrize(("rows", "asked"), [(8, 8), (6, 8), (5, 5), (9, 9)])
def test_rows_are_filled_up_and_cut_off_again(rows: int, asked: int) -> None:
    seen: list[int] = []

    def velocity(x: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        assert len(x) == len(sigma) == len(conditions["text"])
        seen.append(len(x))
        return x * sigma[:, None] + conditions["text"]

    x, sigma, text = torch.randn(rows, 3, requires_grad=True), torch.rand(rows), torch.randn(1, 3).expand(rows, 3)
    out = RowCounts((8,))(velocity, x, sigma, {"text": text})
    assert seen == [asked]
    assert torch.equal(out, x * sigma[:, None] + text)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, sigma[:, None].expand(rows, 3))


def test_odd_batches_are_computed_without_compilation() -> None:
    """Nothing is compiled for them: torch would give up in silence after so many row counts."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        made.append(len(inputs))
        return graph.forward

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * 2

    block = Block()
    block.compile(backend=backend, dynamic=False)
    rows = RowCounts((8,))
    for count in (5, 3, 4, 8, 7, 8, 5):
        rows(lambda x, sigma, conditions: block(x), torch.randn(count, 3), torch.rand(count), {})
    assert len(made) == 1


def test_without_a_compiler_a_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++\ncompiler was found")

    monkeypatch.setattr(torch, "compile", broken)
    block = nn.Linear(2, 2)
    assert compile_blocks([block], CPU, (8,)) == "no C++ compiler was found"
    assert block._compiled_call_impl is None
    model = load("shapes", dtype="float32")
    told = model.equip(Tools(compile=True, compile_rows=(8,)))
    assert told == ("warn: model.compile: goes on uncompiled, as no C++ compiler was found",)
    assert model.equip(Tools()) == ()


def test_the_time_of_compiling_stands_beside_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = [0.0]
    monkeypatch.setattr("tempflow.train.context.compile_seconds", lambda: spent[0])
    clock, since = Clock(compiled=0.0), time.perf_counter() - 10
    spent[0] = 4.0
    since = clock.add("rollout", since)
    clock.add("train", since - 1)
    assert clock.seconds["compile"] == 4
    assert clock.seconds["rollout"] == pytest.approx(6, abs=0.5)
    assert clock.seconds["train"] == pytest.approx(1, abs=0.5)
    quiet = Clock(compiled=4.0)
    quiet.add("rollout", time.perf_counter())
    assert set(quiet.seconds) == {"rollout"}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["shapes", "shapes_tokens"])
def test_traced_blocks_compute_the_same(name: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and run as traced: one graph for each kind of block and of pass, and the same numbers."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: whole(module, dynamic=dynamic, backend="eager"))
    monkeypatch.setattr(compiled, "_missing", lambda device: "")

    def taught(tools: Tools) -> list[Tensor]:
        model = load(name, dtype="float32")
        torch.manual_seed(0)
        model.add_lora(4, 8) if lora else model.train_fully()
        model.equip(tools)
        predict = model.predictor(model.encode(asked(["a red circle"]), SIZE), 1.0)
        shape, rng = (4, *model.noise_shape(SIZE)), torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=rng) if name == "shapes" else torch.randint(0, 512, shape, generator=rng)
        rows, sigma = torch.zeros(4, dtype=torch.long), torch.full((4,), 0.5)
        with torch.no_grad():
            full = predict(x, sigma, rows)
        short = predict(x[:3], sigma[:3], rows[:3])
        short.logsumexp(-1).mean().backward()
        gradients = [p.grad.flatten() for p in model.network.parameters() if p.grad is not None]
        return [full, short.detach(), torch.cat(gradients)]

    for a, b in zip(taught(Tools(compile=True, compile_rows=(4,))), taught(Tools()), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_checkpointed_blocks_are_computed_again_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is not compiled for is not compiled for in the backward either."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        made.append(len(inputs))
        return graph.forward

    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: whole(module, dynamic=dynamic, backend=backend))
    monkeypatch.setattr(compiled, "_missing", lambda device: "")

    def gradient(tools: Tools, rows: int) -> Tensor:
        model = load("shapes", dtype="float32")
        model.train_fully()
        model.equip(tools)
        predict = model.predictor(model.encode(asked(["a red circle"]), SIZE), 1.0)
        x = torch.randn(rows, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(0))
        predict(x, torch.full((rows,), 0.5), torch.zeros(rows, dtype=torch.long)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])

    both = Tools(checkpointing=True, compile=True, compile_rows=(4,))
    odd = gradient(both, 2)
    assert made == []
    assert torch.equal(odd, gradient(Tools(checkpointing=True), 2))
    a, b = gradient(both, 4), gradient(Tools(), 4)
    assert made and (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_computes_the_same(dtype: str) -> None:
    """Of a CPU: velocities and gradients of the shapes model, a full batch and one that is filled up."""
    before = compile_seconds()

    def taught(tools: Tools, rows: int) -> tuple[Tensor, Tensor]:
        model = load("shapes", dtype=dtype)
        model.train_fully()
        assert model.equip(tools) == ()
        x = torch.randn(rows, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(0))
        predict = model.predictor(model.encode(asked(["a red circle"]), SIZE), 1.0)
        velocity = predict(x, torch.full((rows,), 0.5), torch.zeros(rows, dtype=torch.long)).float()
        velocity.square().mean().backward()
        return velocity.detach(), torch.cat([p.grad.flatten() for p in model.network.parameters()]).float()

    for rows in (4, 3):
        for a, b in zip(taught(Tools(compile=True, compile_rows=(4,)), rows), taught(Tools(), rows), strict=True):
            assert (a - b).norm() <= (1e-5 if dtype == "float32" else 3e-2) * b.norm()
    assert compile_seconds() > before
    assert torch._dynamo.config.recompile_limit >= compiled.COUNTS
