"""Cheap copies: what is replaced, that they follow the weights with a LoRA too, and what each device can have."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worlds import SIZE

from tempflow.core.draft import Precision
from tempflow.media import Size
from tempflow.models import load, precision
from tempflow.models.precision import CheapCopy, cheap_copy, check_precision, lack, nearest, quantised
from tempflow.models.quantise import Int8Linear, torchao_converter
from tempflow.models.sd3 import SD3
from tempflow.request import asked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model(shapes_folder: Path) -> SD3:
    """One that the test may change."""
    return load(str(shapes_folder))


def inputs(model: SD3, rows: int = 6) -> dict[str, Tensor]:
    condition = model.encode(asked([f"a red circle {i}" for i in range(rows)]), SIZE)
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, *model.noise_shape(Size(32, 32)), generator=generator),
        "timestep": torch.linspace(3.3, 997.7, rows),
        "encoder_hidden_states": condition.tensors["embeds"],
        "pooled_projections": condition.tensors["pooled"],
    }


@torch.no_grad()
def output(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return network(**given, return_dict=False)[0]


def cast(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a bfloat16 model is called: times stay in float32."""
    return {name: t if name == "timestep" else t.bfloat16() for name, t in given.items()}


def stirred(model: SD3) -> None:
    """All that is trained moves, as if by an update."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.network.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


# ------------------------------------------------------------------------------------------------------------- the copy
def test_the_bfloat16_copy_is_the_network_cast(model: SD3) -> None:
    given = inputs(model)
    cheap = cheap_copy(model.network, model.blocks(model.network), "bfloat16")
    want = output(copy.deepcopy(model.network).to(dtype=torch.bfloat16), cast(given))
    got = output(cheap, given)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    assert not torch.equal(got.float(), output(model.network, given))


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_copy_follows_when_it_is_refreshed_and_only_then(model: SD3, name: Precision) -> None:
    given = inputs(model)
    model.train_fully()
    blocks = model.blocks(model.network)
    cheap = cheap_copy(model.network, blocks, name)
    before = output(cheap, given)
    stirred(model)
    assert torch.equal(output(cheap, given), before)
    cheap.refresh(model.network, {})
    after = output(cheap, given)
    assert torch.equal(after, output(cheap_copy(model.network, blocks, name), given)) and not torch.equal(after, before)


def test_values_stand_in_for_the_networks_own(model: SD3) -> None:
    given = inputs(model)
    model.train_fully()
    cheap = cheap_copy(model.network, model.blocks(model.network), "int8")
    kept = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    before = output(cheap, given)
    stirred(model)
    cheap.refresh(model.network, kept)
    assert torch.equal(output(cheap, given), before)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_lora_is_merged(model: SD3, name: Precision) -> None:
    """Against peft's own merge, of the same stirred weights."""
    given = inputs(model)
    base = cheap_copy(model.network, model.blocks(model.network), name)
    model.add_lora(4, 8)
    cheap = cheap_copy(model.network, model.blocks(model.network), name)
    assert torch.equal(output(cheap, given), output(base, given))  # B is zero
    assert cheap.layers == base.layers and not any("lora" in n or "base_layer" in n for n, _ in cheap.named_modules())
    stirred(model)
    cheap.refresh(model.network, {})
    peft = copy.deepcopy(model.network)
    for module in peft.modules():
        if "base_layer" in dict(module.named_children()):
            module.merge()  # type: ignore[operator]
    want = CheapCopy(unwrapped(peft), cheap.layers, cheap.dtype, cheap.convert)
    got = output(cheap, given).float()
    assert (got - output(base, given).float()).norm() / got.norm() > 0.1
    torch.testing.assert_close(got, output(want, given).float(), rtol=0, atol=0.02 * float(got.abs().max()))


def unwrapped(network: nn.Module) -> nn.Module:
    """Without what peft put around its (merged) layers."""
    for name, module in list(network.named_modules()):
        children = dict(module.named_children())
        if "base_layer" in children:
            network.set_submodule(name, children["base_layer"])
    return network


def test_merged_is_the_closed_form_in_float64() -> None:
    class Tuned(nn.Module):
        active_adapters, scaling = ("default",), {"default": 1.5}

    network = nn.Module()
    network.layer = Tuned()
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 7), (2, 7), (5, 2)))
    state = {
        "layer.base_layer.weight": base,
        "layer.lora_A.default.weight": a,
        "layer.lora_B.default.weight": b,
        "layer.base_layer.bias": base[:, 0],
        "other.weight": a,
    }
    want = base + 1.5 * torch.einsum("or,ri->oi", b, a)
    torch.testing.assert_close(precision.merged(network, state, "layer.weight"), want, rtol=0, atol=1e-14)
    assert precision.merged(network, state, "layer.bias") is state["layer.base_layer.bias"]
    assert precision.merged(network, state, "other.weight") is a


def test_a_copy_never_gets_gradients_or_random_numbers(model: SD3) -> None:
    given = inputs(model)
    model.train_fully()
    state = torch.get_rng_state()
    cheap = cheap_copy(model.network, model.blocks(model.network), "int8")
    cheap.refresh(model.network, {})
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in cheap.parameters()) and not any(m.training for m in cheap.modules())
    given = {name: t.requires_grad_() for name, t in given.items()}
    assert not cheap(**given, return_dict=False)[0].requires_grad
    mine = {p.data_ptr() for p in cheap.parameters()}
    assert not mine & {p.data_ptr() for p in model.network.parameters()}


# ----------------------------------------------------------------------------------------------------- what is replaced
def test_attention_and_feed_forward_of_the_blocks_are_replaced(model: SD3) -> None:
    network = model.network
    found = quantised(network, model.blocks(network))
    linear = {n for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    kept = linear - set(found)
    assert all(".attn." in n or ".ff." in n or ".ff_context." in n for n in found)
    assert {n.split(".")[0] for n in kept} >= {"time_text_embed", "context_embedder", "norm_out", "proj_out"}
    assert all(".norm" in n for n in kept if n.startswith("transformer_blocks"))
    cheap = cheap_copy(network, model.blocks(network), "int8")
    assert {n for n, m in cheap.inner.named_modules() if isinstance(m, Int8Linear)} == set(found)


def test_small_uneven_and_conditioning_layers_stay() -> None:
    block = nn.ModuleDict(
        {
            "good": nn.Linear(128, 256),
            "narrow": nn.Linear(256, 64),
            "odd": nn.Linear(136, 256),
            "img_mod": nn.Linear(128, 768),
            "AdaLN": nn.Linear(128, 768),
            "model": nn.Linear(128, 128),
        }
    )
    network = nn.ModuleDict({"embed": nn.Linear(128, 128), "block": block})
    assert quantised(network, [block]) == ("block.good", "block.model")


def test_nothing_to_replace_is_an_error_and_full_is_no_copy() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'int8' finds no linear layer .* nearest valid: 'bfloat16'"):
        cheap_copy(network, [network], "int8")
    with pytest.raises(ValueError, match="'full' is the network itself"):
        cheap_copy(network, [network], "full")


def test_a_converter_gets_each_layer_as_it_is_now_in_the_copys_dtype() -> None:
    """The wiring that float8 and nvfp4 use, with a converter that can run here."""
    given: list[nn.Linear] = []

    def convert(linear: nn.Linear) -> nn.Module:
        given.append(linear)
        return nn.Sequential(linear)

    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))
    cheap = CheapCopy(network, ("0",), torch.bfloat16, convert)
    with torch.no_grad():
        network[0].weight.fill_(3.0)
        network[1].weight.fill_(2.0)
    cheap.refresh(network, {"0.bias": torch.full((6,), 1 + 2**-12)})
    assert len(given) == 2 and given[1].weight.dtype == torch.bfloat16 and bool((given[1].weight == 3).all())
    assert bool((given[1].bias == 1).all()) and not given[1].weight.requires_grad
    x = torch.ones(2, 4)
    assert torch.equal(cheap(x), torch.full((2, 3), 2.0 * 6 * 13).bfloat16())
    assert bool((network[0].bias != 1).all())


# ----------------------------------------------------------------------------------------------------------------- int8
@pytest.mark.parametrize("bias", [True, False])
def test_int8_is_near_and_a_row_does_not_depend_on_its_neighbours(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(192, 160, bias)
    x = torch.randn(3, 11, 192, generator=generator)
    x[0, 0] *= 1000  # on one scale for all, the other rows would vanish
    with torch.no_grad():
        want, quantised_layer = linear(x), Int8Linear(linear)
        got = quantised_layer(x)
        error = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert 1e-4 < float(error.max()) < 0.05
        assert torch.equal(quantised_layer(x[1:2, 3:4]), got[1:2, 3:4])


def test_int8_errs_by_its_steps_and_no_more() -> None:
    """Largest sums of 8-bit products would overflow 16 bits: large inputs of one sign."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64)
    x = torch.rand(20, 256, generator=generator) + 0.5
    with torch.no_grad():
        linear.weight.copy_(linear.weight.abs() * torch.linspace(0.1, 3, 64)[:, None])
        error = (Int8Linear(linear)(x) - linear(x)).abs().double()
        w, x = linear.weight.abs().double(), x.abs().double()
        dw, dx = w.amax(1, keepdim=True).expand_as(w) / 254, (x.amax(1, keepdim=True) * 2 / 127).expand_as(x)
        assert bool((error <= dx @ w.T + x @ dw.T + dx @ dw.T).all()) and float(error.max()) > 0


def test_int8_of_zero_and_of_what_is_not_finite() -> None:
    layer = Int8Linear(linear := nn.Linear(128, 16))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 5], x[2, 7] = 0.0, float("nan"), float("inf")
    with torch.no_grad():
        got = layer(x)
        assert torch.equal(got[0], linear.bias) and not bool(got[1:3].isfinite().any())
        assert torch.equal(got[3:], layer(x[3:]))  # its neighbours take no harm


# ------------------------------------------------------------------------------------------------------ what works here
@pytest.mark.parametrize(
    ("name", "device", "has", "best"),
    [
        ("nvfp4", CPU, None, "int8"),
        ("float8", CPU, None, "int8"),
        ("nvfp4", CUDA, (9, 0), "float8"),
        ("nvfp4", CUDA, (8, 0), "int8"),
        ("float8", CUDA, (8, 0), "int8"),
        ("int8", CUDA, (7, 5), "bfloat16"),
        ("int8", torch.device("mps"), None, "bfloat16"),
    ],
)
def test_what_a_device_lacks_names_the_nearest(
    name: Precision,
    device: torch.device,
    has: tuple[int, int] | None,
    best: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "capability", lambda device: has)
    assert nearest(name, device) == best and not lack(best, device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"draft_precision: '{name}' needs .*; nearest valid: '{best}'"):
        check_precision(name, device)


@pytest.mark.parametrize(
    ("name", "has"), [("int8", (8, 0)), ("float8", (8, 9)), ("float8", (9, 0)), ("nvfp4", (10, 0)), ("nvfp4", (12, 0))]
)
def test_what_a_device_has_still_needs_torchao(
    name: Precision, has: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "capability", lambda device: has)
    monkeypatch.setattr(precision, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"'{name}' needs torchao: pip install 'tempflow\[quant\]'"):
        check_precision(name, CUDA)
    monkeypatch.setattr(precision, "find_spec", lambda module: object())
    check_precision(name, CUDA)


def test_a_cpu_has_bfloat16_and_int8_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda module: None)
    for name in ("full", "bfloat16", "int8"):
        check_precision(name, CPU)


def test_without_torchao_its_converter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="needs torchao: pip install"):
        torchao_converter("float8")


def test_torchaos_int8_quantises_one_layer_at_a_time() -> None:
    pytest.importorskip("torchao")
    linear = nn.Linear(192, 128).bfloat16().requires_grad_(False)
    weight, x = linear.weight.clone(), torch.randn(40, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    convert: Callable[[nn.Linear], nn.Module] = torchao_converter("int8")
    layer = convert(linear)
    want, got = nn.functional.linear(x, weight, linear.bias), layer(x)
    assert 1e-4 < float((got - want).norm() / want.norm()) < 0.05 and torch.equal(layer(x[:3]), got[:3])
