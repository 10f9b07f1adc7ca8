"""A pipeline folder loaded twice, by the adapter and by diffusers alone, and one ODE drawing by each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.request import asked

SIZE = Size(32, 32)

NOISE = Noise(seed=3)
SIZE = Size(32, 32)
"""Of no account to encodings."""


@dataclass(frozen=True)
class World:
    """One folder, loaded by the adapter and by diffusers alone; neither may be changed."""

    folder: Path
    adapter: SD3
    plain: StableDiffusion3Pipeline
    size: Size
    others: tuple[Size, ...]
    prompts: tuple[str, ...]
    tokens: int


def plain_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    with quiet():
        pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(adapter: SD3, prompts: list[str], steps: int, guidance: float, size: Size, roots: int = 1) -> torch.Tensor:
    """Latents of our ODE rollout, prompt by prompt."""
    forest = rollout(
        [plan.ode(steps, roots)] * len(prompts),
        ODE(),
        adapter.schedule(steps, size),
        adapter.predictor(adapter.encode(asked(prompts), size), guidance),
        NOISE,
        shape=adapter.noise_shape(size),
    )
    return forest.nodes[forest.leaves.node]


def theirs(
    pipe: StableDiffusion3Pipeline,
    prompts: list[str],
    steps: int,
    guidance: float,
    size: Size,
    tokens: int,
    roots: int = 1,
    output: str = "latent",
) -> torch.Tensor:
    """The same by the pipeline's `__call__`, from the same noise."""
    scale = pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, size.height // scale, size.width // scale)
    noise = NOISE.initial([(p, r) for p in range(len(prompts)) for r in range(roots)], shape)
    return pipe(
        prompts,
        height=size.height,
        width=size.width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=roots,
        latents=noise,
        output_type=output,
        max_sequence_length=tokens,
    ).images
