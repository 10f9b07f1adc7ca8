"""The memory of one training minibatch beside what `tempflow cost` counts of it, each case in a process of its own.

    python -m benchmarks.memory [--cases sd35 flux sdxl] [--sides 256 512] [--rows 1] [--tools none checkpointing int8]

A network of real widths and token counts, but of few blocks, with random weights drawn here (float32 on a CPU: at least
1.5 GB), a LoRA of rank 32 on it, one forward and its backward. Measured: on a CPU the most resident memory since before
the network was built, on CUDA torch's own count. The encoders are tiny, and texts' tensors are stand-ins of their real
shapes. Prints a line a case: measured, counted, their ratio, and the same of what the minibatch takes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tempflow.media import Size
from tempflow.models import adapter_of
from tempflow.models.memory import Asked, Lora, footprint, real
from tempflow.models.tools import Tools

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "vocab_size": 64,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
VAE = {
    "block_out_channels": [4, 4, 4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
EULER = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
TEXT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP),
    "text_encoder_3": ("T5EncoderModel", T5),
}

Parts = Mapping[str, tuple[str, Mapping[str, Any]]]

CASES: Mapping[str, tuple[str, Parts]] = {
    "sd35": (  # SD 3.5 medium: 24 blocks, 13 of them with two attentions; 333 tokens of text
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "num_layers": 5,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "out_channels": 16,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": [0, 1, 2],
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("AutoencoderKL", {**VAE, "latent_channels": 16}),
            "scheduler": EULER,
            **TEXT,
        },
    ),
    "flux": (  # FLUX.1: 19 double blocks and 38 single ones; 512 tokens of text
        "FluxPipeline",
        {
            "transformer": (
                "FluxTransformer2DModel",
                {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
            ),
            "vae": ("AutoencoderKL", {**VAE, "latent_channels": 16}),
            "scheduler": EULER,
            "text_encoder": ("CLIPTextModel", CLIP),
            "text_encoder_2": ("T5EncoderModel", T5),
        },
    ),
    "sdxl": (  # SDXL has 1, 2 and 10 transformer blocks at its three sizes; 77 tokens of text
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "layers_per_block": 2,
                    "transformer_layers_per_block": [1, 1, 1],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                    "use_linear_projection": True,
                },
            ),
            "vae": ("AutoencoderKL", {**VAE, "latent_channels": 4}),
            "scheduler": (
                "DDIMScheduler",
                {
                    "beta_start": 0.00085,
                    "beta_end": 0.012,
                    "beta_schedule": "scaled_linear",
                    "clip_sample": False,
                    "set_alpha_to_one": False,
                    "steps_offset": 1,
                },
            ),
            **{name: part for name, part in TEXT.items() if name != "text_encoder_3"},
        },
    ),
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "sd35": {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16},
    "flux": {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": [2, 2, 4]},
    "sdxl": {"block_out_channels": [32, 32, 64], "attention_head_dim": [2, 2, 4]},
}
"""What a test has in place of real widths."""

TEXTS = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}


def write(case: str, folder: Path, tiny: bool) -> None:
    """A pipeline's folder without weights."""
    kind, parts = CASES[case]
    index: dict[str, Any] = {"_class_name": kind}
    for name, (what, settings) in parts.items():
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, what]
        told = {**settings, **(TINY[case] if tiny and name in ("transformer", "unet") else {})}
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps({"_class_name": what, **told}))
        if name in TEXTS:
            tokenizer = name.replace("text_encoder", "tokenizer")
            most = 512 if case == "flux" and name == "text_encoder_2" else TEXTS[name]
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            (folder / tokenizer).mkdir()
            (folder / tokenizer / "tokenizer_config.json").write_text(json.dumps({"model_max_length": most}))
    (folder / "model_index.json").write_text(json.dumps(index))


def resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(case: str, side: int, rows: int, tool: str, device: str, dtype: str, tiny: bool) -> dict[str, float]:
    """In GB: the most memory, of it the minibatch's alone, and both as they are counted."""
    asked = Asked(
        size=Size(side, side),
        guidance=1.0,
        guidance_options={},
        dtype=getattr(torch, dtype),
        device=device,
        tools=Tools(checkpointing="checkpointing" in tool, quantise="int8" if "int8" in tool else "none"),
        lora=Lora(32),
        sampled=rows,
        trained=rows,
        leaves=1,
    )
    with TemporaryDirectory() as place:
        folder = Path(place)
        write(case, folder, tiny)
        adapter = adapter_of(case, folder)
        counted = footprint(adapter, folder, case, asked)
        assert counted is not None
        cuda = device.startswith("cuda")
        torch.nn.functional.linear(torch.randn(512, 512, device=device), torch.randn(512, 512, device=device))
        before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
        _, minibatch = real(adapter, folder, case, asked)
    held = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    minibatch()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    gradients = 4 * counted.trainable
    encoders = counted.encoders + counted.vae
    return {
        "weights": (held - before) / 1e9,
        "weights_counted": (counted.network + encoders) / 1e9,
        "minibatch": (peak - held) / 1e9,
        "minibatch_counted": (counted.training + gradients) / 1e9,
        "peak": (peak - before) / 1e9,
        "peak_counted": (counted.network + encoders + counted.training + gradients) / 1e9,
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tools", nargs="+", default=["none"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true", help="widths of a test")
    parser.add_argument("--here", action="store_true", help="the one case, in this process")
    a = parser.parse_args(args)
    if a.here:
        one = measured(a.cases[0], a.sides[0], a.rows, a.tools[0], a.device, a.dtype, a.tiny)
        print(json.dumps(one))
        return
    print("| case | side | tools | GB measured | counted | ratio | the minibatch's | counted | ratio |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in a.cases:
        for side in a.sides:
            for tool in a.tools:
                line(case, side, tool, a)


def line(case: str, side: int, tool: str, a: argparse.Namespace) -> None:
    """One row of the table, from a process of its own whose memory goes back to the kernel as soon as it is free."""
    words = ["--cases", case, "--sides", str(side), "--rows", str(a.rows), "--tools", tool]
    words += ["--device", a.device, "--dtype", a.dtype, "--here", *(["--tiny"] if a.tiny else [])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    m = json.loads(done.stdout.splitlines()[-1])
    cells = [f"{m['peak']:.3f}", f"{m['peak_counted']:.3f}", f"{m['peak'] / m['peak_counted']:.3f}"]
    cells += [f"{m['minibatch']:.3f}", f"{m['minibatch_counted']:.3f}"]
    cells += [f"{m['minibatch'] / m['minibatch_counted']:.3f}"]
    print(f"| {case} | {side} | {tool} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
