"""LoRAs of the tiny transformer, built without the code under test, and what the network then has to compute.

A LoRA is a dictionary {layer: (a, b, alpha)} of float32 factors; what it means is the dense sum in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor, nn
from worlds import World

from tempflow.models.sd3 import SD3

Update = tuple[Tensor, Tensor, float | None]
"""a [rank, in, …], b [out, rank, …], alpha (None: as the rank)."""

BLOCKS, DUAL, WIDTH, PATCH = 3, (0, 1), 32, 2


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(shape: tuple[int, ...], rank: int, alpha: float | None, seed: int) -> Update:
    """For a weight of `shape`, of a size that shows in the output."""
    ones = (1,) * (len(shape) - 2)
    return 0.2 * random(rank, *shape[1:], seed=seed), 0.2 * random(shape[0], rank, *ones, seed=seed + 1), alpha


def dense(update: Update) -> Tensor:
    """alpha / rank · b · a in float64."""
    a, b, alpha = update
    whole = torch.einsum("or,r...->o...", b.double().flatten(1), a.double())
    return whole * (1.0 if alpha is None else alpha / a.shape[0])


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Update]) -> dict[str, Tensor]:
    """float64 weights with the updates of `lora` added; its layers must be there."""
    whole = {name: value.double() for name, value in state.items()}
    for layer, change in lora.items():
        whole[f"{layer}.weight"] = whole[f"{layer}.weight"] + dense(change)
    return whole


@torch.no_grad()
def output(network: nn.Module) -> Tensor:
    """In float64, for fixed inputs."""
    result = network.double()(
        hidden_states=random(2, 16, 8, 8, seed=1).double(),
        timestep=torch.tensor([300.0, 700.0], dtype=torch.float64),
        encoder_hidden_states=random(2, 28, 40, seed=2).double(),
        pooled_projections=random(2, 20, seed=3).double(),
        return_dict=False,
    )[0]
    network.float()
    return result


def network_of(state: Mapping[str, Tensor]) -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        network = tiny.transformer().double()
    network.load_state_dict(state)
    return network.eval()


def assert_computes(model: SD3, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """The model's network is the one with the dense weights `state`, and clearly not the one with `base`."""
    ours, theirs = output(model.network), output(network_of(state))
    plain = output(network_of({name: value.double() for name, value in base.items()}))
    assert (theirs - plain).abs().max() > 0.1 * plain.abs().max()
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def own_pipeline(world: World, state: Mapping[str, Tensor] | None = None) -> StableDiffusion3Pipeline:
    """A pipeline with a transformer of its own, that shares the rest with the world's."""
    network = copy.deepcopy(world.plain.transformer)
    if state is not None:
        network.load_state_dict(state)
    return StableDiffusion3Pipeline(**{**world.plain.components, "transformer": network})


def own_model(world: World, state: Mapping[str, Tensor] | None = None) -> SD3:
    return SD3(own_pipeline(world, state), "tiny", "unknown")


# ------------------------------------------------------------------------------------------------- the original's names
def original_shapes() -> dict[str, tuple[int, ...]]:
    """Weights of the tiny transformer in Stability's own names, written down by hand."""
    d, p = WIDTH, PATCH
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (d, 16, p, p),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "y_embedder.mlp.0": (d, 20),
        "y_embedder.mlp.2": (d, d),
        "context_embedder": (d, 40),
        "final_layer.linear": (16 * p * p, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(BLOCKS):
        last, x, context = i == BLOCKS - 1, f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for side in (x, context):
            shapes[f"{side}.attn.qkv"] = (3 * d, d)
            if side == x or not last:
                shapes[f"{side}.attn.proj"] = (d, d)
                shapes[f"{side}.mlp.fc1"] = (4 * d, d)
                shapes[f"{side}.mlp.fc2"] = (d, 4 * d)
        shapes[f"{x}.adaLN_modulation.1"] = ((9 if i in DUAL else 6) * d, d)
        shapes[f"{context}.adaLN_modulation.1"] = ((2 if last else 6) * d, d)
        if i in DUAL:
            shapes[f"{x}.attn2.qkv"] = (3 * d, d)
            shapes[f"{x}.attn2.proj"] = (d, d)
    return shapes


def original() -> dict[str, Tensor]:
    """A whole checkpoint in those names, random, in float64."""
    state: dict[str, Tensor] = {"pos_embed": random(1, 36, WIDTH, seed=5).double()}
    for n, (layer, shape) in enumerate(original_shapes().items()):
        state[f"{layer}.weight"] = (0.2 * random(*shape, seed=100 + n)).double()  # float32 holds it exactly
        state[f"{layer}.bias"] = (0.1 * random(shape[0], seed=200 + n)).double()
    for i in range(BLOCKS):
        attentions = ["x_block.attn", "context_block.attn"] + (["x_block.attn2"] if i in DUAL else [])
        for place in attentions:
            for which in ("ln_q", "ln_k"):
                state[f"joint_blocks.{i}.{place}.{which}.weight"] = torch.ones(16, dtype=torch.float64)
    return state


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In diffusers' names, by diffusers' own converter of checkpoints."""
    return {
        name: value.contiguous() for name, value in convert_sd3_transformer_checkpoint_to_diffusers({**state}).items()
    }


def original_lora(rank: Callable[[int], int], alpha: Callable[[int], float | None]) -> dict[str, Update]:
    """An update of every layer, layer n of rank(n) and alpha(n)."""
    shapes = original_shapes()
    return {layer: update(shape, rank(n), alpha(n), 300 + 2 * n) for n, (layer, shape) in enumerate(shapes.items())}
