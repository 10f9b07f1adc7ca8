"""Tools change how a network computes and never what: velocities, gradients, pictures, what a LoRA learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import flux
from families.common import NEGATIVES, PROMPTS
from torch import Tensor, nn

from tempflow import models
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.tools import Tools, quantised_loading
from tempflow.request import Prompt

SIZE = Size(*flux.SIZES[0])
ASKED = [Prompt(text, negative=n) for text, n in zip(PROMPTS, NEGATIVES, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tools") / "flux"
    with quiet():
        flux.pipeline().save_pretrained(place)
    return place


@pytest.fixture
def load(folder: Path) -> Callable[..., Any]:
    def loaded(tools: Tools, dtype: str = "float32", lora: bool = True) -> Any:
        model: Any = models.load(str(folder), dtype=dtype, tools=tools)
        if lora:
            torch.manual_seed(0)
            model.add_lora(2, 4)
            with torch.no_grad():
                for name, parameter in model.network.named_parameters():
                    if ".lora_B." in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
        else:
            model.train_fully()
        model.equip(tools)
        return model

    return loaded


def taught(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A velocity of three rows, and the gradient of its mean square."""
    x = torch.randn(3, *model.noise_shape(SIZE), generator=torch.Generator().manual_seed(2))
    predict = model.predictor(model.encode(ASKED, SIZE), 3.5)
    velocity = predict(x, torch.tensor([0.9, 0.5, 0.2]), torch.arange(3))
    velocity.float().square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None}
    return velocity.detach(), gradients


def agree(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], near: float) -> None:
    assert a[1].keys() == b[1].keys() and a[1]
    for x, y in ((a[0], b[0]), *((a[1][n], b[1][n]) for n in a[1])):
        assert (x - y).abs().max() <= near * y.abs().max().clamp(min=1e-6)


class Kept:
    """Bytes that a forward keeps for its backward."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor


def kept(model: Any) -> int:
    counter = Kept()
    x = torch.randn(3, *model.noise_shape(SIZE))
    predict = model.predictor(model.encode(ASKED, SIZE), 3.5)
    with torch.autograd.graph.saved_tensors_hooks(counter, lambda t: t):
        predict(x, torch.tensor([0.9, 0.5, 0.2]), torch.arange(3))
    return counter.bytes


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_gradients_for_less_memory(load: Any, dtype: str, lora: bool) -> None:
    """In bfloat16 on a CPU attention is another function, which the second forward must call too."""
    plain, less = (load(Tools(checkpointing=on), dtype, lora) for on in (False, True))
    agree(taught(less), taught(plain), 1e-6 if dtype == "float32" else 0)
    assert kept(less) < kept(plain) / 3


def test_checkpointing_serves_every_weight_set(load: Any) -> None:
    """A set computes through the same network with other parameters, and the policy's gradients stay its own."""
    from tempflow.core.ema import Frozen
    from tempflow.train.weights import Trainable, WeightSet

    model = load(Tools(checkpointing=True))
    trainable = Trainable(model.network)
    held = WeightSet(trainable, Frozen(), {n: t + 0.1 for n, t in trainable.named().items()})
    condition, x, sigma = model.encode(ASKED, SIZE), torch.randn(3, *model.noise_shape(SIZE)), torch.full((3,), 0.5)
    policy, other = (model.predictor(condition, 3.5, network) for network in (None, held.network()))
    a = policy(x, sigma, torch.arange(3))
    b = other(x, sigma, torch.arange(3)).detach()
    (a - b).square().mean().backward()
    again = {n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None}
    plain = load(Tools())
    a = plain.predictor(condition, 3.5)(x, sigma, torch.arange(3))
    (a - b).square().mean().backward()
    for name, gradient in again.items():
        assert (gradient - plain.network.get_parameter(name).grad).abs().max() <= 1e-6 * gradient.abs().max() + 1e-9


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and run as traced: making machine code of it takes a CPU minutes."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: whole(module, dynamic=dynamic, backend="eager"))
    monkeypatch.setattr("tempflow.models.compiled._missing", lambda device: "")
    compiled = load(Tools(compile=True, compile_rows=(3,)))
    assert all(block._compiled_call_impl is not None for block in compiled.blocks(compiled.network))
    agree(taught(compiled), taught(load(Tools())), 1e-4)


def test_attention_backends(load: Any) -> None:
    agree(taught(load(Tools(attention="native"))), taught(load(Tools())), 1e-5)
    with pytest.raises(ValueError, match=r"model.attention: 'nativ' is unknown; nearest valid: 'native'"):
        load(Tools(attention="nativ"))
    with pytest.raises(ValueError, match=r"model.attention: 'flash' cannot be used here .*nearest valid: 'native'"):
        load(Tools(attention="flash"))


def test_tiles_of_an_autoencoder(load: Any) -> None:
    model = load(Tools(vae_tiling=True))
    assert model.pipe.vae.use_tiling
    x = torch.randn(1, *model.noise_shape(SIZE))
    assert model.decode(x, SIZE).pictures().shape == (1, *flux.SIZES[0], 3)


class Moves:
    """Where a module was sent."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[str] = []
        to = module.to
        module.to = lambda *a, **k: (self.seen.append(str(a[0])), to(*a, **k))[1]  # type: ignore[method-assign]


def test_what_is_offloaded_comes_when_it_is_used_and_goes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(Tools(offload=True))
    encoder, vae = Moves(model.pipe.text_encoder_2), Moves(model.pipe.vae)
    model.encode(ASKED, SIZE)
    assert encoder.seen == ["cpu", "cpu"] and vae.seen == []
    model.decode(torch.randn(1, *model.noise_shape(SIZE)), SIZE)
    assert vae.seen == ["cpu", "cpu"]
    model.encode(ASKED, SIZE)
    assert encoder.seen == ["cpu", "cpu"]  # all of it was there


def test_encoding_names_its_device(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own guess is where its first part lies, which may be waiting on the CPU."""
    model = load(Tools(offload=True))

    def guess(pipe: object) -> torch.device:
        raise AssertionError("the pipeline guesses where to compute")

    monkeypatch.setattr(type(model.pipe), "_execution_device", property(guess))
    model.encode(ASKED, SIZE)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_quantised_base_under_a_lora(load: Any, kind: str) -> None:
    pytest.importorskip("torchao")
    plain, small = load(Tools()), load(Tools(quantise=kind))  # type: ignore[arg-type]
    (v, g), (w, h) = taught(plain), taught(small)
    assert g.keys() == h.keys()
    assert 0 < (v - w).abs().mean() <= 0.1 * v.abs().mean()
    near = torch.nn.functional.cosine_similarity(
        torch.cat([t.flatten() for t in g.values()]), torch.cat([t.flatten() for t in h.values()]), dim=0
    )
    assert near > 0.98
    assert small.network.transformer_blocks[0].attn.to_q.base_layer.weight.shape == (32, 32)


def test_4_bits_are_asked_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU, so only what diffusers is asked for can be looked at here."""
    import diffusers

    monkeypatch.setattr(diffusers, "BitsAndBytesConfig", dict, raising=False)
    monkeypatch.setattr(diffusers, "PipelineQuantizationConfig", dict, raising=False)
    told = quantised_loading(("transformer",), "nf4", torch.bfloat16)["quant_mapping"]["transformer"]
    assert told == {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tools", "training", "device", "sharded", "message"),
    [
        (Tools(quantise="int8"), "full", "cpu", False, "holds frozen weights, and model.training is 'full'"),
        (Tools(quantise="int8"), "lora", "cuda", True, "cannot be sharded"),
        (Tools(quantise="nf4"), "lora", "cpu", False, "'nf4' needs a CUDA device, and this is cpu"),
        (Tools(quantise="int4"), "lora", "cpu", False, "'int4' is unknown; nearest valid: 'int8'"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_go_together(tools: Tools, training: str, device: str, sharded: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"model.quantise: .*{message}"):
        tools.check(training, device, sharded)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempflow.models.tools.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'int8' needs torchao: pip install 'tempflow\[quant\]'"):
        Tools(quantise="int8").check("lora", "cpu", False)
    with pytest.raises(ImportError, match=r"'nf4' needs bitsandbytes: pip install 'tempflow\[bits\]'"):
        Tools(quantise="nf4").check("lora", "cuda", False)


def test_targets_of_a_lora_may_be_expressions(folder: Path) -> None:
    model: Any = models.load(str(folder))
    model.add_lora(2, 4, [r"transformer_blocks\.1\..*to_[qk]", "proj_out"])
    layers = {n.split(".lora_A")[0] for n, p in model.network.named_parameters() if ".lora_A." in n}
    assert {n for n in layers if n.startswith("transformer_blocks")} == {
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
    }
    assert "proj_out" in layers and not any(n.startswith("transformer_blocks.0") for n in layers)
    with pytest.raises(ValueError, match=r"lora targets: 'blocks\\\\.9' is no linear layer; nearest"):
        models.load(str(folder)).add_lora(2, 4, [r"blocks\.9"])  # type: ignore[attr-defined]


def test_float16_keeps_the_autoencoder_in_float32(load: Any) -> None:
    model = load(Tools(), "float16")
    assert model.dtype == torch.float16 and model.pipe.vae.dtype == torch.float32
    velocity, gradients = taught(model)
    assert velocity.isfinite().all() and all(g.isfinite().all() for g in gradients.values())


def test_a_network_that_takes_no_attention_backend_is_refused() -> None:
    """diffusers itself passes over it in silence."""
    model: Any = models.load("shapes")
    with pytest.raises(ValueError, match=r"model.attention: SD3Transformer2DModel takes no backend in this diffusers"):
        model.equip(Tools(attention="native"))
