"""LoRAs in every form that people have compute what the dense sum of weights computes, in float64.

The files are written by diffusers, by peft, or by hand; what they mean comes from peft's own deltas, or from diffusers'
converter of whole checkpoints given weights with the update added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from lora_world import (
    Update,
    assert_computes,
    converted,
    dense,
    merged,
    network_of,
    original,
    original_lora,
    original_shapes,
    output,
    own_model,
    own_pipeline,
    random,
    update,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from worlds import SIZE, World, plain_pipeline

from tempflow.models import load
from tempflow.models.lora import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE, lora_of, write_peft
from tempflow.models.lora_files import load_lora
from tempflow.request import asked

STYLES = {
    "kohya": ("lora_unet_", "flat", "lora_down", "lora_up"),
    "comfyui": ("diffusion_model.", "dotted", "lora_A", "lora_B"),
    "comfyui, down and up": ("diffusion_model.", "dotted", "lora_down", "lora_up"),
    "comfyui, whole checkpoint's prefix": ("model.diffusion_model.", "dotted", "lora_A", "lora_B"),
    "no prefix": ("", "dotted", "lora_A", "lora_B"),
}


def written(lora: Mapping[str, Update], style: str) -> dict[str, Tensor]:
    prefix, kind, down, up = STYLES[style]
    tensors: dict[str, Tensor] = {}
    for layer, (a, b, alpha) in lora.items():
        stem = prefix + (layer.replace(".", "_") if kind == "flat" else layer)
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


# ----------------------------------------------------------------------------------------------- kohya's and ComfyUI's
@pytest.mark.parametrize("style", STYLES)
def test_fused_layers_of_the_original_code(tiny_world: World, tmp_path: Path, style: str) -> None:
    """Every layer there is, qkv in one, of several ranks and alphas; against diffusers' converter of checkpoints."""
    lora = original_lora(lambda n: 2 + n % 3, lambda n: (1.0, 4.0, None)[n % 3])
    save_file(written(lora, style), tmp_path / "style.safetensors")
    base = original()
    model = own_model(tiny_world, converted(base))
    load_lora(model, tmp_path / "style.safetensors")
    assert_computes(model, converted(merged(base, lora)), converted(base))
    assert len(lora_of(model.network)) == len(original_shapes()) + 2 * sum(".qkv" in name for name in lora)


def test_a_third_of_a_fused_layer(tiny_world: World, tmp_path: Path) -> None:
    """OneTrainer writes qkv.0, qkv.1, qkv.2."""
    thirds = {f"joint_blocks.1.x_block.attn.qkv.{i}": update((32, 32), 3, 6.0, 40 + 2 * i) for i in (0, 2)}
    save_file(written(thirds, "kohya"), tmp_path / "x.safetensors")
    base = original()
    model = own_model(tiny_world, converted(base))
    load_lora(model, tmp_path / "x.safetensors")
    first, last = (dense(third) for third in thirds.values())
    whole = {**base}
    whole["joint_blocks.1.x_block.attn.qkv.weight"] = base["joint_blocks.1.x_block.attn.qkv.weight"] + torch.cat(
        [first, torch.zeros(32, 32), last]
    )
    assert_computes(model, converted(whole), converted(base))
    assert set(lora_of(model.network)) == {"transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_v"}


# -------------------------------------------------------------------------------------------------- peft's, diffusers'
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "scaled": {"r": 4, "lora_alpha": 12},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"to_q": 2, r"^transformer_blocks\.1\.attn\.to_k": 3},
        "alpha_pattern": {"to_v": 1, r"attn\.to_q": 5},
        "use_rslora": True,
    },
}
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn2.to_out.0", "ff.net.2"]


def tuned(world: World, config: Mapping[str, object]) -> StableDiffusion3Pipeline:
    """The plain pipeline with a LoRA that peft made, of random weights."""
    pipe = own_pipeline(world)
    pipe.transformer.add_adapter(LoraConfig(target_modules=TARGETS, **config))
    for n, parameter in enumerate(p for name, p in pipe.transformer.named_parameters() if "lora_" in name):
        parameter.data = 0.3 * random(*parameter.shape, seed=n)
    return pipe


@torch.no_grad()
def peft_sum(pipe: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    """Dense float64 weights: peft's own delta of each layer added."""
    whole = {
        name.replace(".base_layer.", "."): value.double()
        for name, value in pipe.transformer.state_dict().items()
        if "lora_" not in name
    }
    for name, module in pipe.transformer.named_modules():
        if hasattr(module, "get_delta_weight"):
            factors = [getattr(module, f"lora_{side}")["default"].double() for side in "AB"]
            whole[f"{name}.weight"] += module.get_delta_weight("default")
            for factor in factors:
                factor.float()
    return whole


def write_form(
    world: World, pipe: StableDiffusion3Pipeline, config: Mapping[str, object], form: str, folder: Path
) -> None:
    layers = get_peft_model_state_dict(pipe.transformer)
    if form == "diffusers with metadata":
        metadata = _collate_lora_metadata({"transformer": pipe.transformer})
        StableDiffusion3Pipeline.save_lora_weights(folder, layers, **metadata)
    elif form == "the transformer's own":
        pipe.transformer.save_lora_adapter(str(folder))
    elif form == "peft":
        fresh = get_peft_model(own_pipeline(world).transformer, pipe.transformer.peft_config["default"])
        fresh.load_state_dict({f"base_model.model.{n}": v for n, v in pipe.transformer.state_dict().items()})
        fresh.save_pretrained(str(folder))
    elif form == "peft, by hand":  # as little as the two files need; what flow_grpo's folders hold at least
        folder.mkdir()
        save_file({f"base_model.model.{n}": v.contiguous() for n, v in layers.items()}, folder / ADAPTER_FILE)
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}))
    else:
        folder.mkdir()
        alphas = {
            f"transformer.{name}.alpha": torch.tensor(module.scaling["default"] * module.r["default"])
            for name, module in pipe.transformer.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        save_file({**{f"transformer.{n}": v.contiguous() for n, v in layers.items()}, **alphas}, folder / LORA_FILE)


FORMS = ("diffusers with metadata", "the transformer's own", "peft", "peft, by hand", "diffusers with alphas")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_what_peft_and_diffusers_write(tiny_world: World, tmp_path: Path, form: str, config: str) -> None:
    pipe = tuned(tiny_world, CONFIGS[config])
    write_form(tiny_world, pipe, CONFIGS[config], form, tmp_path / "lora")
    model = own_model(tiny_world)
    load_lora(model, tmp_path / "lora")
    ours, theirs = output(model.network), output(network_of(peft_sum(pipe)))
    base = output(tiny_world.plain.transformer)
    assert (theirs - base).abs().max() > 0.1 * base.abs().max()
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()  # peft's delta is rounded to float32
    if form != "diffusers with alphas":  # alpha is a float32 there
        assert torch.equal(ours, output(pipe.transformer))


# ------------------------------------------------------------------------------------------------------- text encoders
def test_text_encoders_parts_are_applied(tiny_world: World, tmp_path: Path) -> None:
    """As diffusers applies them, for both CLIPs; kohya's names of the same layers mean the same."""
    layer, shape = "text_model.encoder.layers.1.self_attn.q_proj", {"text_encoder": 16, "text_encoder_2": 20}
    updates = {part: update((width, width), 2, None, 60 + width) for part, width in shape.items()}
    forms: dict[str, dict[str, Tensor]] = {"diffusers": {}, "kohya": {}}
    for part, (a, b, _) in updates.items():
        forms["diffusers"] |= {f"{part}.{layer}.lora_A.weight": a, f"{part}.{layer}.lora_B.weight": b}
        stem = f"lora_te{1 if part == 'text_encoder' else 2}_{layer.replace('.', '_')}"
        forms["kohya"] |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": torch.tensor(2.0),
        }
    theirs = plain_pipeline(tiny_world.folder)
    before = encoded(theirs, tiny_world)
    save_file(forms["diffusers"], tmp_path / LORA_FILE)
    theirs.load_lora_weights(str(tmp_path))
    assert (encoded(theirs, tiny_world) - before).abs().max() > 1e-2
    for form, tensors in forms.items():
        save_file(tensors, tmp_path / f"{form}.safetensors")
        model = load(str(tiny_world.folder))
        model.encode(asked([tiny_world.prompts[0]]), SIZE)  # what was encoded before does not stay
        load_lora(model, tmp_path / f"{form}.safetensors")
        ours = model.encode(asked([tiny_world.prompts[0]]), SIZE).tensors["embeds"]
        assert torch.equal(ours, encoded(theirs, tiny_world))


@torch.no_grad()
def encoded(pipe: StableDiffusion3Pipeline, world: World) -> Tensor:
    return pipe.encode_prompt(
        world.prompts[0], None, None, do_classifier_free_guidance=False, max_sequence_length=world.tokens
    )[0]


# --------------------------------------------------------------------------------------------------------- there again
@pytest.mark.parametrize("config", ["scaled", "patterns"])
def test_what_is_written_for_peft_is_read_by_peft(tiny_world: World, tmp_path: Path, config: str) -> None:
    pipe = tuned(tiny_world, CONFIGS[config])
    write_peft(lora_of(pipe.transformer), tmp_path, "tiny")
    theirs = PeftModel.from_pretrained(own_pipeline(tiny_world).transformer, str(tmp_path))
    model = own_model(tiny_world)
    load_lora(model, tmp_path)
    wanted = output(pipe.transformer)
    assert torch.equal(output(theirs.base_model.model), output(model.network))
    assert (output(model.network) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_one_of_our_own_is_read_as_it_was_written(tiny_world: World, tmp_path: Path) -> None:
    model = own_model(tiny_world)
    load_lora(model, whole_file(tmp_path))
    model.save(str(tmp_path / "first"))
    again = own_model(tiny_world)
    load_lora(again, tmp_path / "first")
    again.save(str(tmp_path / "second"))
    first, second = (load_file(tmp_path / name / LORA_FILE) for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def whole_file(folder: Path) -> Path:
    save_file(written(original_lora(lambda n: 4, lambda n: 3.0), "kohya"), folder / "whole.safetensors")
    return folder / "whole.safetensors"


# ----------------------------------------------------------------------------------------------------- what is refused
Q, QKV = "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.joint_blocks.0.x_block.attn.qkv"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
PAIR = {A: torch.ones(2, 32), B: torch.ones(32, 2)}
FUSED = {f"{QKV}.lora_A.weight": torch.ones(2, 32), f"{QKV}.lora_B.weight": torch.ones(96, 2)}
ONE = torch.ones(1)


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new, 1): value for name, value in PAIR.items()}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA, kohya": ({**PAIR, f"{Q}.dora_scale": ONE}, "to_q.dora_scale', which is not read: DoRA; merge it"),
    "DoRA, peft": ({**PAIR, f"{Q}.lora_magnitude_vector": ONE}, "magnitude_vector', which is not read: DoRA"),
    "LoHa": ({"lora_unet_x.hada_w1_a": ONE}, "'lora_unet_x.hada_w1_a', which is not read: LoHa; merge it"),
    "LoKr": ({"lycoris_x.lokr_w1": ONE}, "'lycoris_x.lokr_w1', which is not read: LoKr"),
    "LoCon": ({**PAIR, "lora_unet_x.lora_mid.weight": ONE}, "is not read: a Tucker decomposition"),
    "full difference": ({**PAIR, "diffusion_model.x.diff": ONE}, "is not read: a full difference of weights"),
    "biases": ({**PAIR, f"{Q}.lora_B.bias": ONE}, "lora_B.bias', which is not read: a LoRA with biases"),
    "whole weights": ({"transformer_blocks.0.attn.to_q.weight": ONE}, "a tensor is called like 'transformer."),
    "something else": ({**PAIR, "note": ONE}, "it has 'note', which is not read"),
    "no partner": ({A: PAIR[A]}, f"'{Q}' has no lora_B"),
    "an alpha alone": ({**PAIR, "lora_unet_x.alpha": ONE}, "'lora_unet_x' has no lora_A"),
    "alphas": ({**PAIR, f"{Q}.alpha": torch.ones(2)}, f"'{Q}.alpha' is [2], no single number"),
    "adapters": (
        {A.replace(".weight", ".one.weight"): PAIR[A], B.replace(".weight", ".two.weight"): PAIR[B]},
        "it holds two adapters, one and two",
    ),
    "adapters of a layer": ({**renamed(".weight", ".i.weight"), **renamed(".weight", ".j.weight")}, "two adapters"),
    "twice": ({**PAIR, A.replace("lora_A", "lora_down"): PAIR[A]}, "twice, in two ways of writing"),
    "no such layer": (renamed("to_q", "to_u"), "attn.to_u' is no layer of tiny; nearest is"),
    "no such block": (renamed("transformer_blocks.0", "joint_blocks.7"), "'joint_blocks.7.attn.to_q' is no layer of"),
    "another part": (renamed("transformer.", "text_encoder_2."), "'transformer_blocks.0.attn.to_q' is no layer"),
    "another width": ({**PAIR, A: torch.ones(2, 31)}, "lora_A (lora_down) of [2, 31], but tiny needs [rank, 32]"),
    "another rank": ({**PAIR, B: torch.ones(32, 3)}, "lora_B (lora_up) of [32, 3], but tiny needs [32, 2]"),
    "two names": ({**PAIR, **FUSED}, f"'{QKV}' and '{Q}' are both of 'transformer_blocks.0.attn.to_q'"),
    "not finite": ({**PAIR, A: torch.full((2, 32), torch.nan)}, "holds something that is no finite number"),
    "whole numbers": ({**PAIR, A: torch.ones(2, 32).long()}, "holds something that is no finite number"),
    "empty": ({}, "has no tensors"),
    "peft without its config": (renamed("transformer.", "base_model.model."), "no adapter_config.json beside it gives"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_in_a_file_is_dropped(tiny_world: World, tmp_path: Path, case: str) -> None:
    tensors, message = REFUSED[case]
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
    text = refusal(tiny_world, tmp_path / "x.safetensors")
    assert message in text and text.startswith("lora: ") and len(text.splitlines()) == 1


def refusal(world: World, path: Path) -> str:
    """What is said of a file; the model is left as it was."""
    model = own_model(world)
    with pytest.raises(ValueError) as error:
        load_lora(model, path)
    assert not lora_of(model.network)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: 'True' makes it more than a plain LoRA; merge it"),
        ({"bias": "all"}, "bias: 'all' makes it more"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save: "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: "),
        ({"layer_replication": [[0, 1]]}, "layer_replication: "),
        ({"something_new": {"x": 1}}, "something_new: "),
        ({"peft_type": "LOKR"}, "peft_type: 'LOKR' is no LoRA; nearest valid: 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base too"),
        ({"r": 3}, "r: 3 for 'transformer_blocks.0.attn.to_q', whose tensors have rank 2"),
        ({"lora_alpha": "x"}, "lora_alpha: 'x' is no number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: not a regular expression"),
    ],
)
@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_a_configuration_that_means_more(
    tiny_world: World, tmp_path: Path, config: dict[str, object], message: str, form: str
) -> None:
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    if form == "peft":
        name = tmp_path / ADAPTER_FILE
        save_file(renamed("transformer.", "base_model.model."), name)
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(told))
    else:
        name = tmp_path / LORA_FILE
        packed = {f"transformer.{field}": value for field, value in told.items()}
        save_file(PAIR, name, metadata={"lora_adapter_metadata": json.dumps(packed)})
    assert message in refusal(tiny_world, name)


def test_alphas_and_a_configuration_must_agree(tiny_world: World, tmp_path: Path) -> None:
    told = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})
    metadata = {"lora_adapter_metadata": told}
    save_file({**PAIR, f"{Q}.alpha": torch.tensor(4.0)}, tmp_path / "same.safetensors", metadata=metadata)
    save_file({**PAIR, f"{Q}.alpha": torch.tensor(1.0)}, tmp_path / "other.safetensors", metadata=metadata)
    load_lora(own_model(tiny_world), tmp_path / "same.safetensors")
    assert "has scale 0.5 by its alpha and 2 by the configuration" in refusal(
        tiny_world, tmp_path / "other.safetensors"
    )


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "last.ckpt", "lora.pt"])
def test_pickles_are_not_read(tiny_world: World, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path, tmp_path / name):
        text = refusal(tiny_world, path)
        assert "is a pickle" in text and "safetensors.torch.save_file(torch.load(" in text


def test_a_checkpoint_folder_names_the_lora_inside(tiny_world: World, tmp_path: Path) -> None:
    """flow_grpo's checkpoint-N holds lora/, and DiffusionNFT's lora/ holds old/ beside its own files."""
    inside = tmp_path / "checkpoint-9" / "lora"
    (inside / "old").mkdir(parents=True)
    for folder in (inside, inside / "old"):
        save_file(
            {n.replace("transformer.", "base_model.model.", 1): v for n, v in PAIR.items()}, folder / ADAPTER_FILE
        )
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    assert refusal(tiny_world, inside.parent).endswith(f"nearest valid: {str(inside)!r}")
    model = own_model(tiny_world)
    load_lora(model, inside)
    assert lora_of(model.network)["transformer_blocks.0.attn.to_q"].scale == 2.0


def test_a_model_takes_one(tiny_world: World, tmp_path: Path) -> None:
    model = own_model(tiny_world)
    save_file(PAIR, tmp_path / LORA_FILE)
    load_lora(model, tmp_path)
    with pytest.raises(ValueError, match="has a LoRA already; load it afresh"):
        load_lora(model, tmp_path)
