"""LoRA and full training through the adapter, what is saved of them, bfloat16, and the ratio being 1."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from worlds import NOISE, SIZE, World, ours, plain_pipeline, theirs

from tempflow import models
from tempflow.core import plan
from tempflow.core.cost import equivalents
from tempflow.core.dynamics import Dynamics, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.rollout import rollout
from tempflow.core.schedule import Schedule
from tempflow.models import Predict
from tempflow.models.sd3 import LORA_TARGETS, SD3
from tempflow.request import asked

STEPS, ROOTS = 3, 4


def trainable(adapter: SD3) -> set[str]:
    return {n for n, p in adapter.network.named_parameters() if p.requires_grad}


def train_a_little(adapter: SD3, world: World) -> None:
    """Moves every trained parameter that the output depends on."""
    moved = [p for p in adapter.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moved, lr=0.02)  # the size of a step does not depend on the gradient's
    x = NOISE.initial([(p, 0) for p in range(3)], adapter.noise_shape(world.size))
    predict = adapter.predictor(adapter.encode(asked(world.prompts), SIZE), 1.0)
    for _ in range(2):  # LoRA's A has a gradient only once B has moved
        optimizer.zero_grad()
        predict(x, torch.full((3,), 0.7), torch.arange(3)).float().square().mean().backward()
        optimizer.step()


def drawn(adapter: SD3, world: World, guidance: float = 3.0) -> Tensor:
    return ours(adapter, [world.prompts[0]], 3, guidance, world.size)


# -------------------------------------------------------------------------------------------------------------- LoRA
def test_lora_starts_as_the_base(fresh: SD3, world: World) -> None:
    before = drawn(fresh, world)
    fresh.add_lora(4, 8)
    assert torch.equal(drawn(fresh, world), before)
    assert torch.equal(before, theirs(world.plain, [world.prompts[0]], 3, 3.0, world.size, world.tokens))


def test_only_the_loras_parameters_are_trained(fresh: SD3) -> None:
    fresh.add_lora(4, 8)
    names = trainable(fresh)
    assert names == {n for n, _ in fresh.network.named_parameters() if "lora_" in n}
    sites = {n.split(".lora_")[0] for n in names}
    assert {s.split(".", 2)[2] for s in sites} == set(LORA_TARGETS)
    assert len(names) == 2 * len(sites)
    for other in (fresh.pipe.vae, fresh.pipe.text_encoder, fresh.pipe.text_encoder_2, fresh.pipe.text_encoder_3):
        assert not any(p.requires_grad for p in other.parameters())
    assert not fresh.network.training


def test_lora_follows_torchs_generator(world: World) -> None:
    def weights(seed: int) -> list[Tensor]:
        adapter = models.load(str(world.folder))
        torch.manual_seed(seed)
        adapter.add_lora(2, 2)
        return [p.clone() for p in adapter.network.parameters() if p.requires_grad]

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (4, 4), (3, 7)])
def test_a_saved_lora_draws_the_same_in_diffusers(
    fresh: SD3, world: World, tmp_path: Path, rank: int, alpha: int
) -> None:
    base = drawn(fresh, world)
    fresh.add_lora(rank, alpha)
    train_a_little(fresh, world)
    after = drawn(fresh, world)
    assert (after - base).abs().max() > 1e-2
    fresh.save(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["licence.json", "pytorch_lora_weights.safetensors"]
    assert {t.dtype for t in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    pipe = plain_pipeline(world.folder)
    pipe.load_lora_weights(str(tmp_path))
    there = theirs(pipe, [world.prompts[0]], 3, 3.0, world.size, world.tokens)
    if alpha / rank in (1, 2):  # a power of two: multiplying it into B rounds nothing
        assert torch.equal(there, after)
    assert torch.allclose(there, after, rtol=0, atol=1e-5 * after.abs().max().item())
    assert torch.equal(drawn(fresh, world), after)


def test_saving_a_lora_does_not_move_it(fresh: SD3, tmp_path: Path) -> None:
    fresh.add_lora(2, 8)
    before = {n: p.clone() for n, p in fresh.network.named_parameters()}
    fresh.save(str(tmp_path))
    assert all(torch.equal(p, before[n]) for n, p in fresh.network.named_parameters())


def test_a_copy_with_lora_is_a_reference(fresh: SD3, world: World) -> None:
    fresh.add_lora(4, 8)
    reference = copy.deepcopy(fresh.network).requires_grad_(False)
    assert not any(p.requires_grad for p in reference.parameters())
    condition = fresh.encode(asked(world.prompts), SIZE)
    x = NOISE.initial([(p, 0) for p in range(3)], fresh.noise_shape(world.size))
    arguments = (x, torch.full((3,), 0.5), torch.arange(3))
    with torch.no_grad():
        start = fresh.predictor(condition, 3.0)(*arguments)
    train_a_little(fresh, world)
    with torch.no_grad():
        assert torch.equal(fresh.predictor(condition, 3.0, network=reference)(*arguments), start)
        assert (fresh.predictor(condition, 3.0)(*arguments) - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attn.to_qq",), r"lora targets: 'attn.to_qq' is no linear layer; nearest is 'attn.to_q' of .*attn.to_out.0"),
        (("attn.to_q", "o_k"), r"lora targets: 'o_k' is no linear layer; nearest is '"),
        ((), r"lora targets: the list is empty; there are .*attn.to_q"),
    ],
)
def test_wrong_targets(fresh: SD3, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh.add_lora(4, 8, targets)
    assert trainable(fresh) == set()


def test_wrong_lora_sizes(fresh: SD3) -> None:
    with pytest.raises(ValueError, match=r"lora rank: 0 is too small; the nearest valid value is 1"):
        fresh.add_lora(0, 8)
    with pytest.raises(ValueError, match=r"lora alpha: -1 is too small; the nearest valid value is 1"):
        fresh.add_lora(4, -1)
    fresh.add_lora(4, 8)
    with pytest.raises(ValueError, match=r"lora: the model has one already"):
        fresh.add_lora(4, 8)


# -------------------------------------------------------------------------------------------------------------- full
def test_full_training_is_of_the_transformer_alone(fresh: SD3) -> None:
    assert trainable(fresh) == set()
    fresh.train_fully()
    assert trainable(fresh) == {n for n, _ in fresh.network.named_parameters()}
    for other in (fresh.pipe.vae, fresh.pipe.text_encoder, fresh.pipe.text_encoder_2, fresh.pipe.text_encoder_3):
        assert not any(p.requires_grad for p in other.parameters()) and not other.training


def test_a_saved_pipeline_draws_the_same_in_diffusers(fresh: SD3, world: World, tmp_path: Path) -> None:
    before = drawn(fresh, world)
    fresh.train_fully()
    train_a_little(fresh, world)
    after = drawn(fresh, world)
    assert (after - before).abs().max() > 1e-3
    fresh.save(str(tmp_path / "run"))
    there = theirs(plain_pipeline(tmp_path / "run"), [world.prompts[0]], 3, 3.0, world.size, world.tokens)
    assert torch.equal(there, after)
    again = models.load(str(tmp_path / "run"))
    assert torch.equal(drawn(again, world), after)
    assert again.licence == fresh.licence
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_the_licence_travels(fresh: SD3, tmp_path: Path) -> None:
    fresh.licence = "stabilityai-ai-community"
    fresh.save(str(tmp_path / "run"))
    assert models.load(str(tmp_path / "run")).licence == "stabilityai-ai-community"


# ---------------------------------------------------------------------------------------------------------- bfloat16
@pytest.fixture
def half(world: World) -> SD3:
    return models.load(str(world.folder), dtype="bfloat16")


def test_bfloat16_computes_in_bfloat16_and_keeps_latents(half: SD3, world: World) -> None:
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    condition = half.encode(asked(world.prompts), SIZE)
    assert {t.dtype for t in (*condition.tensors.values(), *condition.negative.values())} == {torch.bfloat16}
    x = NOISE.initial([(p, 0) for p in range(3)], half.noise_shape(world.size))
    with torch.no_grad():
        v = half.predictor(condition, 1.0)(x, torch.full((3,), 0.5), torch.arange(3))
        guided = half.predictor(condition, 3.0)(x, torch.full((3,), 0.5), torch.arange(3))
    assert v.dtype == torch.bfloat16 and guided.dtype == torch.float32
    grid = half.schedule(4, world.size)
    law = FlowSDE(0.7).transition(x, v, grid, torch.tensor([1, 1, 1]))
    assert grid.sigmas.dtype == law.mean.dtype == law.log_prob(x).dtype == torch.float32
    assert drawn(half, world).dtype == torch.float32


def test_bfloat16_stays_near_float32(half: SD3, world: World) -> None:
    exact, rough = drawn(world.adapter, world, 1.0), drawn(half, world, 1.0)
    assert 0 < (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_bfloat16_decodes_like_float32(half: SD3, world: World) -> None:
    """The autoencoder too is bfloat16, as diffusers loads it; the trained one is then off by at most 2 of 255."""
    assert half.pipe.vae.dtype == torch.bfloat16
    x = drawn(world.adapter, world, 1.0)
    exact, rough = (m.decode(x, world.size).pictures() for m in (world.adapter, half))
    assert rough.dtype == torch.uint8 and rough.shape == exact.shape
    assert (exact.int() - rough.int()).abs().float().mean() < 3


def test_bfloat16_draws_what_diffusers_draws_in_train_a_little(half: SD3, world: World) -> None:
    """Only one: then diffusers rounds the latents to bfloat16 after each, and we keep float32."""
    pipe = plain_pipeline(world.folder, torch.bfloat16)
    x = NOISE.initial([(0, 0)], half.noise_shape(world.size)).bfloat16()
    seen: list[Tensor] = []
    pipe.transformer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    pipe(
        world.prompts[0],
        height=world.size.height,
        width=world.size.width,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=x,
        output_type="latent",
        max_sequence_length=world.tokens,
    )
    sigma = half.schedule(1, world.size).sigmas[:1]
    with torch.no_grad():
        v = half.predictor(half.encode(asked([world.prompts[0]]), SIZE), 1.0)(x.float(), sigma, torch.tensor([0]))
    assert (v - seen[0]).abs().max() <= 0.05 * v.abs().max()  # another attention kernel


def test_bfloat16_trains_lora_in_its_own_dtype_and_saves_float32(half: SD3, world: World, tmp_path: Path) -> None:
    base = drawn(half, world)
    half.add_lora(4, 8)
    assert torch.equal(drawn(half, world), base)
    train_a_little(half, world)
    after = drawn(half, world)
    assert not torch.equal(after, base)
    half.save(str(tmp_path))
    assert {t.dtype for t in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    again = models.load(str(world.folder), dtype="bfloat16")
    again.pipe.load_lora_weights(str(tmp_path))
    assert (drawn(again, world) - after).abs().mean() < 0.05 * after.abs().mean()


# ------------------------------------------------------------------------------------------------------------- ratio
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_forward_equivalents_are_the_rows_that_the_network_sees(fresh: SD3, world: World, guidance: float) -> None:
    fresh.add_lora(2, 4)
    seen = [0, 0]  # rows without gradient, with
    hook = fresh.network.register_forward_hook(
        lambda module, args, kwargs, out: seen.__setitem__(
            out[0].requires_grad, seen[out[0].requires_grad] + len(kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    try:
        predict = fresh.predictor(fresh.encode(asked(world.prompts[:1]), SIZE), guidance)
        x, rows = torch.zeros(3, *fresh.noise_shape(world.size)), torch.zeros(3, dtype=torch.long)
        sigma = torch.full((3,), 0.5)
        with torch.no_grad():
            predict(x, sigma, rows)
        predict(x, sigma, rows)
    finally:
        hook.remove()
    assert seen[0] + 3 * seen[1] == equivalents(3, 3, guided=guidance != 1)


def grown(adapter: SD3, world: World, guidance: float) -> tuple[Forest, Dynamics, Schedule, Predict]:
    dynamics, grid = FlowSDE(0.7), adapter.schedule(STEPS, world.size)
    predict = adapter.predictor(adapter.encode(asked(world.prompts), SIZE), guidance)
    shape = adapter.noise_shape(world.size)
    return rollout([plan.chain(STEPS, ROOTS)] * 3, dynamics, grid, predict, NOISE, shape=shape), dynamics, grid, predict


def log_ratio(world: World, adapter: SD3, guidance: float, parts: str | int) -> float:
    """The largest |log ratio| of a fresh rollout replayed with gradients, in its own batches or in others."""
    forest, dynamics, grid, predict = grown(adapter, world, guidance)
    edges = forest.edges
    every = torch.arange(len(edges))
    batches = [every[edges.step == i] for i in range(STEPS)] if parts == "equal" else every.split(int(parts))
    worst = 0.0
    for rows in batches:
        x, step = forest.nodes[edges.parent[rows]], edges.step[rows]
        law = dynamics.transition(x, predict(x, grid.at(step), edges.prompt[rows]), grid, step, edges.scale[rows])
        new = law.log_prob(forest.nodes[edges.child[rows]])
        assert new.requires_grad
        worst = max(worst, (new - edges.log_prob[rows]).abs().max().item())
    return worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_in_equal_batches(world: World, dtype: str) -> None:
    adapter = models.load(str(world.folder), dtype=dtype)
    adapter.add_lora(4, 8)
    assert log_ratio(world, adapter, 1.0, "equal") == 0.0


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("rows", [1, 36])
def test_the_ratio_in_other_batches(fresh: SD3, world: World, rows: int, guidance: float) -> None:
    """Measured: about 1e-6; SD 3.5 is trained with a clip range of 1e-4."""
    fresh.train_fully()
    assert log_ratio(world, fresh, guidance, rows) <= 3e-6


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_ratio_in_bfloat16(half: SD3, world: World, guidance: float) -> None:
    """Where kernels agree (here from twelve rows on) it is exactly 1, guided or not; nowhere may it be far from it."""
    half.train_fully()
    assert log_ratio(world, half, guidance, 36) <= 1e-3
