"""Prompts to conditions, sizes to shapes, and how guidance uses both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from worlds import SIZE, World

from tempflow import models
from tempflow.core.perturb import Perturbation
from tempflow.media import Size
from tempflow.models import Conditioning
from tempflow.models.conditions import Learned, blended, moved_conditions, perturbed
from tempflow.models.sd3 import SD3
from tempflow.request import Prompt, asked


def encoded(adapter: SD3) -> list[list[str]]:
    """Spies on the pipeline's encoder."""
    calls: list[list[str]] = []
    inner = adapter.pipe.encode_prompt

    def spy(prompt: list[str], *args: object, **options: object) -> object:
        calls.append(prompt)
        return inner(prompt, *args, **options)

    adapter.pipe.encode_prompt = spy
    return calls


def states(world: World, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, one σ, and rows."""
    x = torch.randn(count, *world.adapter.noise_shape(world.size), generator=torch.Generator().manual_seed(1))
    return x, torch.full((count,), 0.6), torch.arange(count) % len(world.prompts)


# ------------------------------------------------------------------------------------------------------------ encode
@torch.no_grad()
def test_encode_equals_encode_prompt(world: World) -> None:
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    assert condition.prompts == asked(world.prompts) and len(condition) == 3
    for row, prompt in enumerate(world.prompts):
        embeds, no_embeds, pooled, no_pooled = world.plain.encode_prompt(
            prompt, None, None, max_sequence_length=world.tokens
        )
        assert torch.equal(condition.tensors["embeds"][row], embeds[0])
        assert torch.equal(condition.tensors["pooled"][row], pooled[0])
        assert torch.equal(condition.negative["embeds"][row], no_embeds[0])
        assert torch.equal(condition.negative["pooled"][row], no_pooled[0])
    assert not any(t.requires_grad for t in condition.tensors.values())


def test_encode_keeps_order_and_duplicates(world: World) -> None:
    a, b, _ = world.prompts
    condition = world.adapter.encode(asked([b, a, b, ""]), SIZE)
    single = {p: world.adapter.encode(asked([p]), SIZE).tensors for p in (a, b, "")}
    assert condition.prompts == asked((b, a, b, ""))
    for name, tensor in condition.tensors.items():
        assert torch.equal(tensor, torch.cat([single[p][name] for p in (b, a, b, "")]))
        assert torch.equal(tensor[3:], condition.negative[name][:1])


def test_encode_runs_once_per_prompt(fresh: SD3, world: World) -> None:
    calls = encoded(fresh)
    a, b, c = world.prompts
    first = fresh.encode(asked([a, b, a]), SIZE)
    assert sorted(p for call in calls for p in call) == sorted(["", a, b])
    calls.clear()
    again = fresh.encode(asked([a, b, a]), SIZE)
    assert calls == []
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    fresh.encode(asked([c, a]), SIZE)
    assert calls == [[c]]


def test_encoding_does_not_depend_on_what_came_before(fresh: SD3, world: World) -> None:
    """Bitwise, or a resumed run, whose cache is empty, would drift from an uninterrupted one."""
    alone = fresh.encode(asked([world.prompts[2]]), SIZE)
    together = models.load(str(world.folder)).encode(asked(world.prompts), SIZE)
    assert torch.equal(alone.tensors["embeds"][0], together.tensors["embeds"][2])
    assert torch.equal(alone.tensors["pooled"][0], together.tensors["pooled"][2])


def test_cache_is_bounded(fresh: SD3, world: World) -> None:
    row = world.adapter.encode(asked(world.prompts[:1]), SIZE).tensors
    fresh.embeddings.memory = 2 * sum(tensor.nbytes for tensor in row.values())
    whole = fresh.encode(asked(world.prompts), SIZE)
    assert torch.equal(whole.tensors["embeds"], world.adapter.encode(asked(world.prompts), SIZE).tensors["embeds"])
    calls = encoded(fresh)
    fresh.encode(asked(world.prompts[-2:]), SIZE)
    assert calls == [[""]]  # the oldest was dropped


def test_encode_needs_a_prompt(world: World) -> None:
    with pytest.raises(ValueError, match="prompts: the list is empty"):
        world.adapter.encode(asked([]), SIZE)


# ------------------------------------------------------------------------------------------------------- noise_shape
def test_noise_shape_is_what_the_pipeline_draws(world: World) -> None:
    for size in (world.size, *world.others):
        expected = world.plain.prepare_latents(
            1,
            world.plain.transformer.config.in_channels,
            size.height,
            size.width,
            torch.float32,
            "cpu",
            torch.Generator(),
        )
        assert world.adapter.noise_shape(size) == expected.shape[1:]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(60, 64), r"^height: 60 must be a multiple of 16 up to 96; nearest is 64$"),
        (Size(64, 39), r"^width: 39 must be a multiple of 16 up to 96; nearest is 32$"),
        (Size(112, 64), r"^height: 112 must be a multiple of 16 up to 96; nearest is 96$"),
        (Size(64, 5), r"^width: 5 must be a multiple of 16 up to 96; nearest is 16$"),
        (Size(64, 64, frames=5), r"^frames: 5 of '.*', which makes pictures; nearest valid: 1$"),
    ],
)
def test_sizes_that_cannot_be_drawn(tiny_world: World, size: Size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_world.adapter.noise_shape(size)


def test_the_limit_is_the_transformers_own(world: World) -> None:
    """The largest size that we allow runs; one patch more is refused by the transformer itself."""
    unit = world.plain.vae_scale_factor * world.plain.transformer.config.patch_size
    largest = world.plain.transformer.config.pos_embed_max_size * unit
    predict = world.adapter.predictor(world.adapter.encode(asked(world.prompts), SIZE), 1.0)
    shape = world.adapter.noise_shape(Size(unit, largest))
    assert predict(torch.zeros(1, *shape), torch.ones(1), torch.zeros(1, dtype=torch.long)).shape == (1, *shape)
    with pytest.raises(ValueError, match=f"nearest is {largest}"):
        world.adapter.noise_shape(Size(unit, largest + unit))
    wider = (*shape[:2], shape[2] + world.plain.transformer.config.patch_size)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        predict(torch.zeros(1, *wider), torch.ones(1), torch.zeros(1, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------- guidance
def transformer_velocity(world: World, condition: Conditioning, which: str) -> Tensor:
    """The plain pipeline's transformer, called by hand."""
    x, sigma, rows = states(world)
    tensors = condition.tensors if which == "prompt" else condition.negative
    index = rows if which == "prompt" else torch.zeros_like(rows)
    with torch.no_grad():
        return world.plain.transformer(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=tensors["embeds"][index],
            pooled_projections=tensors["pooled"][index],
        ).sample


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 4.5])
def test_guidance_is_the_formula(world: World, guidance: float) -> None:
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    prompt = transformer_velocity(world, condition, "prompt")
    empty = transformer_velocity(world, condition, "empty")
    with torch.no_grad():
        v = world.adapter.predictor(condition, guidance)(*states(world))
    expected = empty.double() + guidance * (prompt.double() - empty.double())
    assert (v - expected).abs().max() <= 3e-6 * max(1.0, guidance) * prompt.abs().max()
    assert (prompt - empty).abs().mean() > 1e-2


def test_rows_given_to_the_network(world: World, rows_seen: Callable[[SD3], list[int]]) -> None:
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    seen = rows_seen(world.adapter)
    with torch.no_grad():
        world.adapter.predictor(condition, 1.0)(*states(world))
        world.adapter.predictor(condition, 4.5)(*states(world))
    assert seen == [3, 6]
    seen.clear()
    world.adapter.predictor(condition, 4.5)(*states(world))  # with gradients: the empty branch apart, without any
    assert seen == [3, 3]


def test_rows_choose_the_prompt(world: World) -> None:
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    predict = world.adapter.predictor(condition, 3.0)
    x, sigma, _ = states(world)
    with torch.no_grad():
        turned = predict(x, sigma, torch.tensor([2, 0, 0]))
        other = world.adapter.predictor(world.adapter.encode(asked([world.prompts[i] for i in (2, 0, 0)]), SIZE), 3.0)
        straight = predict(x, sigma, torch.arange(3))
        assert torch.equal(turned, other(x, sigma, torch.arange(3)))
    assert (turned - straight).abs().mean() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_gradients_do_not_change_values(world: World, guidance: float) -> None:
    predict = world.adapter.predictor(world.adapter.encode(asked(world.prompts), SIZE), guidance)
    with torch.no_grad():
        without = predict(*states(world))
    assert (predict(*states(world)) - without).abs().max() <= 1e-5 * without.abs().max()


def test_the_empty_branch_carries_no_gradient(world: World, fresh: SD3) -> None:
    """∂v/∂θ = g·∂v_c/∂θ: with the empty branch it would be g·∂v_c/∂θ + (1 − g)·∂v_∅/∂θ."""
    fresh.train_fully()
    condition = fresh.encode(asked(world.prompts), SIZE)

    def gradient(guidance: float) -> Tensor:
        fresh.network.zero_grad()
        fresh.predictor(condition, guidance)(*states(world)).sum().backward()
        return torch.cat([p.grad.flatten() for p in fresh.network.parameters() if p.grad is not None])

    alone, guided = gradient(1.0), gradient(4.5)
    assert alone.abs().max() > 0
    assert torch.allclose(guided, 4.5 * alone, rtol=1e-3, atol=1e-4 * alone.abs().max().item())


def test_guidance_needs_an_empty_prompt(world: World) -> None:
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    bare = Conditioning(condition.prompts, condition.tensors)
    with pytest.raises(ValueError, match=r"guidance: 4.5 needs conditions with negative prompts; without them only 1"):
        world.adapter.predictor(bare, 4.5)
    with torch.no_grad():
        v = world.adapter.predictor(bare, 1.0)(*states(world))
        assert torch.equal(v, world.adapter.predictor(condition, 1.0)(*states(world)))


# ------------------------------------------------------------------------------------------- what enters the encoders
WORDS = {
    "shapes": [("a red circle", 3), ("two squares", 2), ("a circle left of a blue cross", 7), ("", 0)],
    "tiny": [("a red cat on the house", 6), ("a small bird", 3), ("", 0)],
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def test_content_is_the_prompts_words_for_every_encoder(world: World) -> None:
    """By hand: a word is a token in both worlds; CLIP's tokens open with a mark of the beginning, T5's do not."""
    clip = world.plain.tokenizer_max_length
    for prompt, count in WORDS["shapes" if "circle" in world.prompts[0] else "tiny"]:
        content = world.adapter.text_inputs(Prompt(prompt)).content
        assert content.keys() == dict.fromkeys(ENCODERS).keys()
        for name in ENCODERS[:2]:
            assert content[name].tolist() == [1 <= place <= min(count, clip - 2) for place in range(clip)], prompt
        assert content[ENCODERS[2]].tolist() == [place < count for place in range(world.tokens)], prompt


def test_prompts_that_are_cut_are_content_up_to_the_cut(world: World) -> None:
    content, clip = world.adapter.text_inputs(Prompt("a red " * 40)).content, world.plain.tokenizer_max_length
    assert content[ENCODERS[0]].tolist() == [False, *[True] * (clip - 2), False]
    assert content[ENCODERS[2]].tolist() == [*[True] * (world.tokens - 1), False]


def test_a_prompts_own_tokens_give_its_own_condition(world: World) -> None:
    """The pipeline's encoding, of a batch of two; and each encoder's vector is what the encoder itself says of it."""
    prompt, pipe = world.prompts[0], world.plain
    inputs = world.adapter.text_inputs(Prompt(prompt))
    for name, own in inputs.tokens.items():
        encoder = getattr(pipe, name)
        assert own.shape[1] == encoder.get_input_embeddings().weight.shape[1]
    with torch.no_grad():
        twice = {name: own.expand(2, *own.shape) for name, own in inputs.tokens.items()}
        encoded = world.adapter.encode_inputs(Prompt(prompt), twice)
        ids = [
            t([prompt], padding="max_length", max_length=n, truncation=True, return_tensors="pt").input_ids
            for t, n in (
                (pipe.tokenizer, pipe.tokenizer_max_length),
                (pipe.tokenizer_2, pipe.tokenizer_max_length),
                (pipe.tokenizer_3, world.tokens),
            )
        ]
        want = [pipe.text_encoder(ids[0]).text_embeds[0], pipe.text_encoder_2(ids[1]).text_embeds[0]]
        want.append(pipe.text_encoder_3(ids[2])[0][0, inputs.content["text_encoder_3"]].mean(0))
    own = world.adapter.encode(asked([prompt]), SIZE).tensors
    for name, tensor in encoded.tensors.items():
        for row in tensor:
            torch.testing.assert_close(row, own[name][0], rtol=1e-5, atol=1e-5)
    for name, vector in zip(ENCODERS, want, strict=True):
        torch.testing.assert_close(encoded.vectors[name], vector.expand(2, -1), rtol=1e-5, atol=1e-5)
    # nothing of it is left behind
    again = models.load(str(world.folder)).encode(asked([prompt]), SIZE).tensors
    assert all(torch.equal(again[name], own[name]) for name in own)


def test_gradients_reach_what_enters_each_encoder_and_no_weight(world: World) -> None:
    prompt = world.prompts[1]
    inputs = world.adapter.text_inputs(Prompt(prompt))
    tokens = {name: own[None].clone().requires_grad_() for name, own in inputs.tokens.items()}
    vectors = world.adapter.encode_inputs(Prompt(prompt), tokens).vectors
    for name in ENCODERS:
        slopes = torch.autograd.grad(
            vectors[name].square().sum(), list(tokens.values()), materialize_grads=True, retain_graph=True
        )
        assert [bool(s.any()) for s in slopes] == [other == name for other in ENCODERS]
    assert not any(p.requires_grad for name in ENCODERS for p in getattr(world.adapter.pipe, name).parameters())


def test_perturbed_words_move_what_the_encoders_say_and_the_picture(world: World) -> None:
    given = Perturbation(3, 1.0, 0.5, 0.9, 0.05, 0.1, 12, 0.05)
    condition = world.adapter.encode(asked(world.prompts), SIZE)
    offsets = Learned().of(world.adapter, asked(world.prompts), given, 7)
    moved = moved_conditions(world.adapter, condition, offsets)
    assert moved.prompts[:4] == asked((world.prompts[0],) * 3 + (world.prompts[1],))
    assert all(torch.equal(moved.negative[n][::3], t) for n, t in condition.negative.items())
    none, full = blended(condition, moved, 0.0), blended(condition, moved, 1.0)
    for name, own in condition.tensors.items():
        repeated = own.repeat_interleave(3, 0)
        assert torch.equal(none.tensors[name], repeated) and torch.equal(full.tensors[name], moved.tensors[name])
        assert torch.equal(moved.tensors[name][::3], own)  # the first of a prompt is its own
        others = torch.arange(9) % 3 > 0
        assert (moved.tensors[name] - repeated)[others].abs().flatten(1).max(1).values.min() > 1e-3  # pooled ones too
    # CLIP's words are causal: what stands before the first word stays
    clip = moved.tensors["embeds"][:, 0]
    torch.testing.assert_close(clip, condition.tensors["embeds"][:, 0].repeat_interleave(3, 0), rtol=1e-5, atol=1e-5)
    for guidance in (1.0, 4.5):
        predict = perturbed(world.adapter, condition, moved, given.strength, guidance)
        x, sigma, _ = states(world)
        with torch.no_grad():
            plain = world.adapter.predictor(condition, guidance)(x, sigma, torch.tensor([0, 1, 2]))
            clean = predict(x, sigma, torch.tensor([0, 3, 6]))
            other = predict(x, sigma, torch.tensor([1, 5, 8]))
        assert torch.equal(clean, plain)
        assert (other - plain).abs().flatten(1).max(1).values.min() > 1e-4


def test_offsets_are_learned_for_what_each_encoder_says(world: World) -> None:
    """The learned vectors are as far from the prompt's own as asked, encoder by encoder, and apart from each other."""
    given = Perturbation(3, 1.0, 0.5, 0.8, 0.05, 0.1, 60, 0.05)
    (offsets,) = Learned().of(world.adapter, asked(world.prompts[:1]), given, 7)
    inputs = world.adapter.text_inputs(Prompt(world.prompts[0]))
    with torch.no_grad():
        tokens = {
            name: own + torch.zeros(3, *own.shape).index_copy(1, offsets.places[name], offsets.delta[name])
            for name, own in inputs.tokens.items()
        }
        vectors = world.adapter.encode_inputs(Prompt(world.prompts[0]), tokens).vectors
    for name, e in vectors.items():
        cosine = torch.cosine_similarity(e[1:], e[:1])
        assert float((cosine - 0.8).abs().max()) < 0.12, name
        assert float(torch.cosine_similarity(e[1], e[2], 0)) < float(cosine.min()), name
