"""What SD 1.x and SDXL have beside the other families: predictions, schedulers, names, a checker that is not loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
    _maybe_map_sgm_blocks_to_diffusers,  # pyright: ignore[reportPrivateUsage]
)
from families import stable_diffusion as sd
from families.common import NEGATIVES, PROMPTS
from safetensors.torch import save_file
from torch import Tensor

import tempflow
from tempflow import models
from tempflow.config import Config
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.export import export_run
from tempflow.media import Size
from tempflow.models.lora import layer_shapes
from tempflow.models.lora_files import load_lora
from tempflow.models.quiet import quiet
from tempflow.models.stable_diffusion import original_names
from tempflow.models.tools import Tools
from tempflow.request import Prompt
from tempflow.rewards.function import from_function

NOISE = Noise(seed=5)
SIZE = sd.SIZES[0]


def saved(make: Callable[[], Any], folder: Path, scheduler: str = "", **settings: Any) -> Path:
    """A tiny folder; `scheduler` is the class that it names, and `settings` are changes of its configuration."""
    with quiet():
        make().save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    told = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not ...}))
    if scheduler:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", scheduler]}))
    return folder


def drawn(adapter: Any, negatives: list[str], steps: int = 4, guidance: float = 5.0) -> Tensor:
    size = Size(*SIZE)
    prompts = [Prompt(text, negative=n) for text, n in zip(PROMPTS[:2], negatives, strict=True)]
    predict = adapter.predictor(adapter.encode(prompts, size), guidance)
    grid, shape = adapter.schedule(steps, size), adapter.noise_shape(size)
    forest = rollout([plan.ode(steps, 1)] * 2, ODE(), grid, predict, NOISE, shape=shape)
    return grid.samples(forest.nodes[forest.leaves.node])


def theirs(folder: Path, negatives: list[str | None], steps: int = 4, guidance: float = 5.0) -> Tensor:
    import diffusers

    with quiet():
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(  # pyright: ignore[reportPrivateImportUsage]
            str(folder), use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)
    noise = NOISE.initial([(0, 0), (1, 0)], sd.noise_shape(pipe, SIZE))
    return sd.theirs(pipe, PROMPTS[:2], negatives, steps, SIZE, guidance, noise)


def close(a: Tensor, b: Tensor) -> bool:
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


# ----------------------------------------------------------------------------------------------------------- schedulers
ONES = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}
HONOURED: list[tuple[str, Mapping[str, Any]]] = [
    ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"prediction_type": "sample"}),
    ("DPMSolverMultistepScheduler", {"set_alpha_to_one": True, "beta_schedule": "linear"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", **ONES}),
    ("DDIMScheduler", {"trained_betas": list(np.linspace(0.001, 0.02, 1000))}),
]


@pytest.mark.parametrize(("kind", "settings"), HONOURED)
def test_schedulers_are_walked_by_ddim(kind: str, settings: Mapping[str, Any], tmp_path: Path) -> None:
    folder = saved(sd.sd15, tmp_path / "model", kind, **settings)
    adapter: Any = models.load(str(folder))
    assert close(drawn(adapter, NEGATIVES[:2]), theirs(folder, list(NEGATIVES[:2])))
    assert adapter.notes() == (
        () if kind == "DDIMScheduler" else (f"the folder names {kind}; it is drawn by DDIM with the same betas",)
    )


def test_a_grid_of_the_sampler_s_own_is_told(tmp_path: Path) -> None:
    folder = saved(sd.sdxl, tmp_path / "model", use_karras_sigmas=True)
    assert models.load(str(folder)).notes() == (  # pyright: ignore[reportAttributeAccessIssue]
        "the folder names EulerDiscreteScheduler; it is drawn by DDIM with the same betas, without use_karras_sigmas",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta_schedule": ...}, "which says no betas; nearest valid: 'DDIMScheduler'"),
        ({"clip_sample": True}, "clip_sample 'True'"),
        ({"thresholding": True}, "thresholding 'True'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas 'True'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction': known are epsilon"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr 'True'.*'v_prediction'"),
        ({"steps_offset": 0}, "set_alpha_to_one 'False': the last step would lead from time 0 to time 0"),
        ({"timestep_spacing": "linspace"}, "set_alpha_to_one 'False'.*steps_offset 1"),
    ],
)
def test_schedulers_that_cannot_be_honoured(
    settings: Mapping[str, Any], words: str, tmp_path: Path, sdxl: Path
) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    told = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not ...}))
    with pytest.raises(ValueError, match=rf"model\.path: '.*' has .*EulerDiscreteScheduler.*{words}.*scheduler_config"):
        models.local_folder(str(folder))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(sd.sdxl, tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(sd.sd15, tmp_path_factory.mktemp("sd15") / "model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"in_channels": 9}, "in_channels 9, and the autoencoder 4"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256: a consistency model"),
    ],
)
def test_networks_that_want_more_than_a_text(settings: Mapping[str, Any], words: str, sd15: Path) -> None:
    parts = {part: json.loads((sd15 / part / "config.json").read_text()) for part in ("unet", "vae")}
    parts["unet"] |= settings
    with pytest.raises(ValueError, match=f"model.path: unet/config.json has {words}"):
        models.adapter_of("it", sd15).family.latent_shape(lambda name: parts.get(name.split("/")[0]), Size(*SIZE))


def test_a_distilled_checkpoint_is_known_by_its_scheduler(sd15: Path) -> None:
    family = models.adapter_of("it", sd15).family
    assert (
        family.distilled(lambda name: {"scheduler": ["diffusers", "LCMScheduler"]}) == "its scheduler is LCMScheduler"
    )
    assert family.distilled(models.load(str(sd15)).settings) == ""  # pyright: ignore[reportAttributeAccessIssue]


# --------------------------------------------------------------------------------------------------------------- parts
def test_no_negative_text_is_the_pipelines_none(sdxl: Path) -> None:
    """Zeros, as its folder says, and not the embedding of an empty text; a prompt that is empty is encoded."""
    adapter: Any = models.load(str(sdxl))
    nothing = drawn(adapter, ["", ""])
    assert close(nothing, theirs(sdxl, [None, None])) and not close(nothing, theirs(sdxl, ["", ""]))
    encoded = adapter.encode([Prompt("", negative="")], Size(*SIZE))
    assert not bool(encoded.negative["embeds"].any()) and bool(encoded.tensors["embeds"].any())


def test_where_the_folder_does_not_say_zeros_it_is_the_empty_text(sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    assert close(drawn(models.load(str(folder)), ["", ""]), theirs(folder, [None, None]))


def test_statistics_of_the_autoencoder_are_honoured(sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "model")
    file = folder / "vae" / "config.json"
    told = {"latents_mean": [0.5, -0.5, 1.0, 0.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    adapter: Any = models.load(str(folder))
    x, size = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8), Size(*SIZE)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in told.values())
    asked = adapter.pipe.vae.decode(x * std / 0.4 + mean).sample  # the pipeline's own line
    assert torch.allclose(adapter.decode_latents(x), asked, atol=1e-5)
    pictures = torch.rand(1, 3, *SIZE)
    latents = adapter.pipe.vae.encode(pictures).latent_dist.mode()
    assert torch.allclose(adapter.encode_pictures(pictures), (latents - mean) * 0.4 / std, atol=1e-5)
    assert adapter.encode_media(adapter.decode(x, size), size).shape == x.shape


def test_a_safety_checker_is_never_loaded(sd15: Path, tmp_path: Path) -> None:
    """Though the index names it, with code of its own, and the only file of it is a pickle."""
    folder = shutil.copytree(sd15, tmp_path / "model")
    index = folder / "model_index.json"
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    adapter: Any = models.load(str(folder))
    assert adapter.pipe.safety_checker is None
    assert torch.equal(drawn(adapter, NEGATIVES[:2]), drawn(models.load(str(sd15)), NEGATIVES[:2]))
    adapter.save(str(tmp_path / "out"))
    models.load(str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_in_bfloat16_the_autoencoder_stays_in_float32(family: str, request: pytest.FixtureRequest) -> None:
    adapter: Any = models.load(str(request.getfixturevalue(family)), dtype="bfloat16")
    assert adapter.dtype == torch.bfloat16 and adapter.pipe.vae.dtype == torch.float32
    x = drawn(adapter, NEGATIVES[:2])
    assert x.dtype == torch.float32 and x.isfinite().all()
    assert adapter.decode(x, Size(*SIZE)).pictures().float().std() > 5


def test_blocks_are_units_without_one_another(sdxl: Path) -> None:
    adapter: Any = models.load(str(sdxl))
    blocks = adapter.blocks(adapter.network)
    kinds = {type(block).__name__ for block in blocks}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    inside = [id(module) for block in blocks for module in block.modules()]
    assert len(inside) == len(set(inside))
    within = sum(p.numel() for block in blocks for p in block.parameters())
    assert within > 0.75 * sum(p.numel() for p in adapter.network.parameters())


def test_checkpointing_gives_the_same_gradients(sdxl: Path) -> None:
    grads: list[list[Tensor]] = []
    for on in (False, True):
        adapter: Any = models.load(str(sdxl))
        adapter.equip(Tools(checkpointing=on))
        adapter.train_fully()
        predict = adapter.predictor(adapter.encode([Prompt(PROMPTS[0])], Size(*SIZE)), 1.0)
        noise = NOISE.initial([(0, 0)], adapter.noise_shape(Size(*SIZE)))
        predict(noise, torch.tensor([0.5]), torch.tensor([0])).square().mean().backward()
        grads.append([p.grad for p in adapter.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ----------------------------------------------------------------------------------------------------------------- LoRA
def test_names_of_compvis_are_those_of_diffusers_converter(sdxl: Path) -> None:
    """kohya's files of SDXL, as diffusers reads them. Its converter knows attention and residual blocks, time and ends;
    of the numbered blocks' layers those that halve and double sides too."""
    adapter: Any = models.load(str(sdxl))
    layers = layer_shapes(adapter.network)
    names = original_names(layers)
    assert sorted(part.layer for parts in names.values() for part in parts) == sorted(layers)  # each has one
    for name, (part,) in names.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        file = {f"{flat}.lora_down.weight": torch.ones(1), f"{flat}.lora_up.weight": torch.ones(1)}
        mapped = _maybe_map_sgm_blocks_to_diffusers(file, adapter.pipe.unet.config)
        theirs, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
        told = {key.removeprefix("unet.").replace(".processor", "").replace("_lora", ".lora") for key in theirs}
        layer = part.layer.replace(".to_out.0", ".to_out")
        assert told == {f"{layer}.lora.down.weight", f"{layer}.lora.up.weight"}, name


@pytest.mark.parametrize("names", ["diffusers", "compvis"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_files_move_network_and_text_as_diffusers_has_it(
    family: str, names: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    ours: Any = models.load(str(folder))
    shapes = {name: shape for name, shape in layer_shapes(ours.network).items() if "attn" in name}
    if names == "compvis":
        shapes = {
            name: shapes[p.layer]
            for name, (p,) in original_names(layer_shapes(ours.network)).items()
            if p.layer in shapes
        }
    called = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in shapes.items()}
    text = "lora_te_" if family == "sd15" else "lora_te1_"
    called[f"{text}text_model_encoder_layers_0_self_attn_q_proj"] = (16, 16)
    draw = torch.Generator().manual_seed(0)
    file: dict[str, Tensor] = {}
    for name, (out, into) in called.items():
        file[f"{name}.lora_down.weight"] = torch.randn(2, into, generator=draw)
        file[f"{name}.lora_up.weight"] = 0.1 * torch.randn(out, 2, generator=draw)
        file[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(file, tmp_path / "kohya.safetensors")
    base = drawn(ours, NEGATIVES[:2])
    load_lora(ours, tmp_path / "kohya.safetensors")
    by_hand: Any = models.load(str(folder))
    layers = {"unet": layer_shapes(by_hand.network), "text_encoder": layer_shapes(by_hand.pipe.text_encoder)}
    flat = {name.replace(".", "_"): name for name in layers["unet"]}
    flat |= {name.replace(".", "_"): part.layer for name, (part,) in original_names(layers["unet"]).items()}
    with torch.no_grad():
        for name in called:
            update = 0.5 * file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
            if name.startswith("lora_unet_"):
                by_hand.network.get_submodule(flat[name.removeprefix("lora_unet_")]).weight += update
            else:
                layer = next(n for n in layers["text_encoder"] if n.endswith("layers.0.self_attn.q_proj"))
                by_hand.pipe.text_encoder.get_submodule(layer).weight += update
    moved = drawn(ours, NEGATIVES[:2])
    assert close(moved, drawn(by_hand, NEGATIVES[:2])) and float((moved - base).abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "ddpo", "steps": 4, "group": 3},
        {"name": "flow_grpo", "steps": 4, "group": 3},
        {"name": "dance_grpo", "steps": 4, "group": 3, "fraction": 1.0},
        {"name": "flow_cps", "steps": 4, "group": 3},
        {"name": "grpo_guard", "steps": 4, "group": 3},
        {"name": "flash_grpo", "steps": 4, "group": 3},
        {"name": "mix_grpo", "steps": 4, "group": 3, "window": 2},
    ],
    ids=lambda algorithm: algorithm["name"],
)
def test_rollout_and_training_agree_at_the_first_update(
    algorithm: Mapping[str, Any], sd15: Path, tmp_path: Path
) -> None:
    config = Config.model_validate(
        {
            "name": "first",
            "iterations": 1,
            "output": str(tmp_path / "run"),
            "rollout_rows": 6,
            "train_rows": 4,
            "algorithm": algorithm,
            "model": {"path": str(sd15), "height": SIZE[0], "width": SIZE[1], "guidance": 5.0},
            "data": {"prompts_per_iteration": 2},
            "evaluation": {"validation_prompts": 2, "test_prompts": 2, "steps": 2, "metric": "reward"},
        }
    )
    prompts = [Prompt(text, negative=n) for text, n in zip(PROMPTS, NEGATIVES, strict=True)]
    reward = from_function(lambda images, prompts: [float(np.asarray(image).mean() / 255) for image in images])
    tempflow.train(config, reward=reward, prompts=prompts, test_prompts=prompts)
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    print(algorithm["name"], told["log_ratio_max"], told["rollout_gap_max"])
    assert told["log_ratio_max"] <= 1e-6
    assert told["rollout_gap_max"] <= 4  # roundings
    if algorithm["name"] == "ddpo":
        export_run(tmp_path / "run", tmp_path / "out", weights="policy")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)" in card
