"""HPSv3 and what it shares with VideoReward: pixels, templates, and the hidden state at a token through a head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import WIDTH, base_in, config_of, drawn, old_names, tokenizer_of
from torch import nn

from tempflow.rewards import Reward, score_all
from tempflow.rewards.hpsv3 import PIXELS, TEMPLATE, TOKENS, hpsv3
from tempflow.rewards.vlm import Template, fitted, patches

PICTURES = torch.randint(0, 256, (3, 40, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PROMPTS = ["a red cat", "", "🙂 two {prompt} dogs, {text_prompt}"]
META: list[dict[str, object]] = [{}] * 3


# -------------------------------------------------------------------------------------------------------- the pixels
@pytest.mark.parametrize(
    ("height", "width", "want"),
    [
        (512, 512, (448, 448)),
        (1024, 1024, (448, 448)),
        (448, 448, (448, 448)),
        (1, 1, (448, 448)),
        (512, 768, (364, 532)),
        (4096, 16, (7168, 28)),
        (16, 4096, (28, 7168)),
    ],
)
def test_sizes_of_pictures_golden_values(height: int, width: int, want: tuple[int, int]) -> None:
    assert fitted(height, width, PIXELS, PIXELS) == want


@settings(max_examples=200, deadline=None)
@given(st.integers(30, 3000), st.integers(30, 3000), st.integers(10, 300), st.integers(0, 300))
def test_sizes_are_those_of_the_networks_own_rule(height: int, width: int, least: int, more: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    low, high = least * 784, (least + more) * 784
    want = smart_resize(height, width, 28, low, high)
    assert fitted(height, width, low, high) == tuple(max(28, side) for side in want)


def test_patches_of_a_picture_are_the_networks_own() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    own = Qwen2VLImageProcessorPil()(images=[Image.fromarray(PICTURES[0].numpy())], return_tensors="pt")
    height, width = (14 * int(side) for side in own["image_grid_thw"][0, 1:])
    pixels, grid = patches(PICTURES[:1], height, width)
    assert list(grid) == own["image_grid_thw"][0].tolist()
    assert torch.allclose(pixels, own["pixel_values"], atol=2e-6)


def test_patches_of_a_clip_by_hand() -> None:
    """Three frames, the last of which comes twice; a patch is looked up by its place."""
    pixels, grid = patches(PICTURES, 28, 56)
    assert grid == (2, 2, 4) and pixels.shape == (16, 3 * 2 * 14 * 14)
    frames = [np.asarray(Image.fromarray(p.numpy()).resize((56, 28), Image.Resampling.BICUBIC)) for p in PICTURES]
    places = [(y, x) for big in (0, 2) for y in (0, 1) for x in (big, big + 1)]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for time, shown in enumerate(((0, 1), (2, 2))):
        for row, (y, x) in enumerate(places):
            patch = pixels[8 * time + row].view(3, 2, 14, 14)
            for half, frame in enumerate(shown):
                cell = frames[frame][14 * y : 14 * y + 14, 14 * x : 14 * x + 14] / 255
                want = torch.from_numpy((cell - mean) / deviation).permute(2, 0, 1)
                assert torch.allclose(patch[:, half].double(), want, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the template
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<|Reward|>", "has 0 places for the prompt; nearest valid: one {prompt}"),
        ("{prompt} {text_prompt} <|Reward|>", "has 2 places for the prompt"),
        ("{prompt}", r"has the tokens none; nearest valid: <|Reward|>, each once"),
        ("{prompt} <|Reward|> <|Reward|>", r"has the tokens <|Reward|>, <|Reward|>; nearest"),
        ("{prompt} <|im_end|> <|Reward|>", r"has the tokens <|im_end|>, <|Reward|>; nearest"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_before_anything_is_loaded(
    text: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        hpsv3(path="nowhere", template=str(tmp_path / "t.txt"))
    assert fault in str(error.value) and str(error.value).startswith("template: ") and "\n" not in str(error.value)


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9 {prompt}")
    for name in ("nothing", "latin"):
        with pytest.raises(ValueError, match=rf"^template: '.*{name}' cannot be read"):
            hpsv3(path="nowhere", template=str(tmp_path / name))


def test_a_prompt_is_put_in_once() -> None:
    assert Template.of("a {text_prompt} b <|Reward|>", TOKENS, "t").filled("{prompt}{text_prompt}\\1") == (
        "a {prompt}{text_prompt}\\1 b <|Reward|>"
    )


# ------------------------------------------------------------------------------------------------------------- HPSv3
class World:
    """A tiny checkpoint of HPSv3's kind, and the network that it was written from."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2VLModel

        self.base, self.folder = base_in(folder / "base"), folder / "weights"
        self.folder.mkdir()
        self.tokenizer = tokenizer_of(TOKENS)
        self.network = Qwen2VLModel(config_of(self.tokenizer, len(self.tokenizer))).eval()
        self.head = nn.Sequential(
            nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        drawn(self.network, 1)
        drawn(self.head, 2)
        heads = {f"rm_head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        words = {"lm_head.weight": torch.zeros(len(self.tokenizer), WIDTH)}
        self.file = self.folder / "HPSv3.safetensors"
        save_file({**old_names(self.network.state_dict()), **heads, **words}, self.file)

    def reward(self, path: Path | None = None, **options: Any) -> Any:
        return hpsv3(path=str(path or self.folder), base=str(self.base), dtype="float32", **options)

    @torch.no_grad()
    def want(self, picture: torch.Tensor, prompt: str, template: str = TEMPLATE) -> float:
        """One row, written out: transformers' preparation of the pixels, its network, and the head in float64."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        height, width = fitted(*picture.shape[:2], PIXELS, PIXELS)
        sized = Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        pixels = Qwen2VLImageProcessorPil(do_resize=False)(images=[sized], return_tensors="pt")
        tokens = "<|image_pad|>" * (height * width // 784)
        before, after = template.split("{prompt}")
        ids = self.tokenizer(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{tokens}<|vision_end|>{before}{prompt}{after}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        )["input_ids"]
        image = ids == self.network.config.image_token_id
        states = self.network(input_ids=ids, mm_token_type_ids=image.int(), **pixels).last_hidden_state[0]
        place = ids[0].tolist().index(self.tokenizer.convert_tokens_to_ids(TOKENS[0]))
        x = states[place].double().numpy()
        for layer in (0, 3, 5):
            weight, bias = (getattr(self.head[layer], name).double().numpy() for name in ("weight", "bias"))
            x = weight @ np.maximum(x, 0 if layer else -math.inf) + bias
        return float(x[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("hpsv3"))


def test_hpsv3_is_the_head_at_the_rewards_token(world: World) -> None:
    """Rows of different lengths in one batch, against each by itself and written out."""
    reward = world.reward(batch=8)
    assert isinstance(reward, Reward)
    scores = reward.score(PICTURES, PROMPTS, META)
    want = [world.want(picture, prompt) for picture, prompt in zip(PICTURES, PROMPTS, strict=True)]
    assert scores.names == ("hpsv3",) and scores.ok.all()
    assert scores.value[:, 0].tolist() == pytest.approx(want, abs=1e-4)
    assert min(abs(a - b) for i, a in enumerate(want) for b in want[:i]) > 1e-2  # the prompts and pictures do count
    single = world.reward(batch=1).score(PICTURES, PROMPTS, META)
    assert torch.allclose(single.value, scores.value, atol=1e-5)
    backwards = reward.score(PICTURES.flip(0), PROMPTS[::-1], META)
    assert torch.allclose(backwards.value.flip(0), scores.value, atol=1e-5)
    swapped = reward.score(PICTURES, PROMPTS[::-1], META)
    assert (swapped.value - scores.value)[[0, 2]].abs().min() > 1e-3


def test_hpsv3_takes_a_template(world: World, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Prompt: {prompt}\nEND <|Reward|>\n\nrating")
    reward = world.reward(template=str(tmp_path / "text"))
    got = reward.score(PICTURES[:1], PROMPTS[:1], META[:1]).value.item()
    assert got == pytest.approx(
        world.want(PICTURES[0], PROMPTS[0], "Prompt: {prompt}\nEND <|Reward|>\n\nrating"), abs=1e-4
    )
    assert abs(got - world.reward().score(PICTURES[:1], PROMPTS[:1], META[:1]).value.item()) > 1e-3


def test_hpsv3_reads_names_of_both_versions_of_transformers(world: World, tmp_path: Path) -> None:
    tensors = load_file(world.file)
    new = {f"model.{name}": tensor for name, tensor in world.network.state_dict().items()}
    new |= {name: tensor for name, tensor in tensors.items() if name.startswith(("rm_head", "lm_head"))}
    assert not {name for name in new if name.startswith("visual.")}
    save_file(new, tmp_path / "new.safetensors")
    one, other = (
        world.reward(path).score(PICTURES[:1], PROMPTS[:1], META[:1]).value
        for path in (None, tmp_path / "new.safetensors")
    )
    assert torch.equal(one, other)


def test_hpsv3_refuses_weights_that_do_not_fit(world: World, tmp_path: Path) -> None:
    tensors = load_file(world.file)
    first = "model.layers.0.mlp.up_proj.weight"
    short = "model.embed_tokens.weight"
    for change, fault in (
        ({first: None}, "lacks language_model.layers.0.mlp.up_proj.weight"),
        ({"rm_head.3.bias": None}, "lacks 3.bias"),
        ({"extra.weight": torch.zeros(1)}, "has unexpected extra.weight"),
        ({"rm_head.6.weight": torch.zeros(1)}, "has unexpected 6.weight"),
        ({first: torch.zeros(1, 1)}, "has other shapes: language_model.layers.0.mlp.up_proj.weight"),
        ({short: tensors[short][:-1]}, r"'<|Reward|>' is token"),
        ({short: None}, "its vocabulary has 0 rows"),
    ):
        wrong = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError) as error:
            world.reward(tmp_path / "w.safetensors").prepare()
        assert fault in str(error.value) and str(error.value).startswith("path: ") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^base: '.*' has no configuration or tokenizer"):
        hpsv3(path=str(world.file), base=str(tmp_path), dtype="float32").prepare()


def test_hpsv3_fails_prompts_that_would_steer_it(world: World) -> None:
    reward = world.reward()
    for token in ("<|im_end|>", "<|Reward|>", "<|image_pad|>"):
        with pytest.raises(
            ValueError, match=r"^prompts: 'a cat<\|.*' has '<\|.*', a control token; nearest valid: none$"
        ):
            reward.check_prompts(["a cat", f"a cat{token}"], META[:2])
    reward.check_prompts([*PROMPTS, "a <| b |> c", "|>"], [{}] * 5)
    scores = score_all([reward], PICTURES, ["a", "<|Reward|>", "a"], META, [0, 1, 2])
    assert scores.ok[:, 0].tolist() == [True, False, True]


def test_hpsv3_takes_odd_pictures_and_prompts(world: World) -> None:
    reward = world.reward()
    for sides in ((1, 1), (4096, 16), (16, 4096)):
        scores = reward.score(torch.full((1, *sides, 3), 9, dtype=torch.uint8), ["a red cat " * 1000], [{}])
        assert scores.ok.all()
    with pytest.raises(ValueError, match=r"torch\.float32"):
        reward.score(PICTURES / 255, PROMPTS, META)
    with pytest.raises(ValueError, match="media is a list"):
        reward.score(PROMPTS, PICTURES, META)
    assert len(reward.score(PICTURES[:0], [], [])) == 0
