"""Nothing asks Apple's MPS, which has no float64, for float64. There is none here: torch's "meta" device, whose tensors
have shapes and no numbers, stands in for it, and what makes a wide tensor there is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake import SHAPE, flow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tempflow.algorithms import Algorithm, awm, crd, diffusion_nft, flow_cps, grpo_guard, v_grpo
from tempflow.core import likelihood_proxy, prediction, state
from tempflow.core.likelihood_proxy import adaptive_scale
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.objective.leaves import LeafBatch
from tempflow.core.objective.old import old_of
from tempflow.core.plan import chain
from tempflow.core.prediction import VariancePreserving, predictor, velocity_of
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear

WIDE = (torch.float64, torch.complex128)
ROWS = 4


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.device.type == "meta" and t.dtype in WIDE:
                raise TypeError(f"{func} makes {t.dtype}, which MPS does not have")
        return out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device lacks float64, as `has_double` says of MPS; what `double` brings to the CPU is zeros."""

    def has_double(device: torch.device) -> bool:
        return device.type != "meta"

    def double(t: Tensor) -> Tensor:
        return t.double() if has_double(t.device) else torch.full(t.shape, 0.5, dtype=torch.float64)

    for module in (state, likelihood_proxy):
        monkeypatch.setattr(module, "has_double", has_double)
    for module in (state, prediction):
        monkeypatch.setattr(module, "double", double)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device="meta")


def test_the_real_device_is_known_by_its_name_and_the_stand_in_refuses_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not state.has_double(torch.device("mps")) and state.has_double(torch.device("cuda"))
    assert state.double(torch.ones(1)).dtype == torch.float64
    with NoFloat64(), pytest.raises(TypeError, match="which MPS does not have"):
        ones(3).double()


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "x0", "v"])
def test_what_networks_predict_is_read_there(kind: Any) -> None:
    path = VariancePreserving(torch.linspace(0.99, 0.01, 10))
    with NoFloat64():
        assert velocity_of(ones(2, 4), ones(2, 4), ones(2), kind).device.type == "meta"
        said = predictor(lambda x, t, rows: x * t[:, None], path, kind)(ones(2, 4), ones(2), torch.arange(2))
        assert said.device.type == "meta" and said.dtype == torch.float32


@pytest.mark.parametrize("dynamics", [flow().dynamics, flow_cps(steps=4, group=2).dynamics])
def test_a_rollout_runs_there(dynamics: Any) -> None:
    with NoFloat64():
        forest = rollout(
            [chain(4, 2)], dynamics, linear(4, 2.0), lambda x, s, r: x, Noise(0), shape=SHAPE, device="meta"
        )
    assert forest.nodes.device.type == forest.edges.log_prob.device.type == "meta"


EDGES = {"flow_grpo": flow(kl=0.1), "grpo_guard": grpo_guard(steps=4, group=2), "flow_cps": flow_cps(steps=4, group=2)}


@pytest.mark.parametrize("name", EDGES)
def test_losses_of_edges_are_computed_there(name: str) -> None:
    algorithm, gain = EDGES[name], nn.Parameter(ones(1))
    assert algorithm.dynamics is not None
    with NoFloat64():
        step, index = torch.arange(ROWS) % 3, torch.zeros(ROWS, dtype=torch.long, device="meta")
        state, one = ones(ROWS, *SHAPE), ones(ROWS)
        edges = EdgeBatch(
            state, state, step, torch.ones(ROWS), index, one, one, one, linear(4, 2.0), algorithm.dynamics, state, index
        )
        old_of(edges, state, 1e-6, keeps_mean=False)
        loss = algorithm.objective({n: lambda x, s, r: x * gain for n in ("policy", "reference")}, edges)
        loss.value.backward()
    assert loss.value.device.type == "meta" and gain.grad is not None


LEAVES: dict[str, Algorithm] = {
    "diffusion_nft": diffusion_nft(steps=10, group=2),
    "awm": awm(steps=10, group=2),
    "v_grpo": v_grpo(steps=10, group=2),
    "crd": crd(steps=10, group=2),
}


@pytest.mark.parametrize("name", LEAVES)
def test_losses_of_clean_samples_are_computed_there(name: str) -> None:
    objective, pairs, gain = LEAVES[name].objective, 2, nn.Parameter(ones(1))
    with NoFloat64():
        index = torch.zeros(ROWS, dtype=torch.long, device="meta")
        noise = ones(ROWS, pairs, *SHAPE)
        batch = LeafBatch(ones(ROWS, *SHAPE), ones(ROWS), index, index, ones(ROWS, pairs) / 2, noise)
        loss = objective({n: lambda x, t, r: x * gain for n in objective.weight_sets}, batch)
        loss.value.backward()
    assert loss.value.device.type == "meta" and gain.grad is not None


def test_the_adaptive_weight_is_float32_there() -> None:
    with NoFloat64():
        assert adaptive_scale(ones(2, 3), ones(2, 3)).dtype == torch.float32
