"""PickScore, CLIPScore, HPS v2, the aesthetic predictor and ImageReward, from tiny random weights in published layouts
that the converter made ours, against the architectures' arithmetic in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
import transformers
from convert_weights import affine, convert, write
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import REWARDS, build, clip, places
from tempflow.rewards.aesthetic import aesthetic
from tempflow.rewards.clip import cropped, cropped_pixels, load_clip, numbers_of, padded
from tempflow.rewards.clipscore import clipscore
from tempflow.rewards.clipscore_2_5 import clipscore_2_5
from tempflow.rewards.clipscore_100 import clipscore_100
from tempflow.rewards.hpsv2 import hpsv2
from tempflow.rewards.image_reward import image_reward
from tempflow.rewards.pickscore import pickscore
from tempflow.rewards.protocol import Reward, differentiable_of
from tempflow.rewards.scorer import Scorer
from tempflow.rewards.weights import read_tensors

N = 8
PICTURES = torch.randint(
    0, 256, (N, tiny.SIDE, tiny.SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)
PROMPTS = ["red cat", "green dog", "two", "a cat of a dog", "dog", "red red red", "a", "cat cat"]
OPEN_CLIP, BLIP, HEAD = tiny.open_clip(), tiny.image_reward(), tiny.head(20, 5)
PIXELS = tiny.pixels_of(PICTURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scorers")
    tiny.clip_tokenizer(place / "letters")
    tiny.bert_tokenizer(place / "pieces")
    write("hpsv2.1", convert("hpsv2.1", OPEN_CLIP, tiny.CLIP), "HPS_v2.1_compressed.pt", tiny.CLIP, place / "clip")
    write("image_reward", convert("image_reward", BLIP, tiny.BLIP), "ImageReward.pt", tiny.BLIP, place / "blip")
    save_file(affine(HEAD), place / "head.safetensors", metadata={"scorer": "aesthetic"})
    return place


def made(name: str, folder: Path, **options: Any) -> Scorer[Any]:
    clip, letters = str(folder / "clip"), str(folder / "letters")
    match name:
        case "pickscore":
            return pickscore(path=clip, tokenizer=letters, **options)
        case "clipscore":
            return clipscore(path=clip, tokenizer=letters, **options)
        case "hpsv2":
            return hpsv2(path=clip, tokenizer=letters, **options)
        case "aesthetic":
            return aesthetic(path=str(folder / "head.safetensors"), clip=clip, **options)
        case _:
            return image_reward(path=str(folder / "blip"), tokenizer=str(folder / "pieces"), **options)


ALL = ("pickscore", "clipscore", "hpsv2", "aesthetic", "image_reward")
READS = tuple(name for name in ALL if name != "aesthetic")
"""Those that look at the prompt."""


@pytest.fixture(scope="module")
def scorers(folder: Path) -> dict[str, Scorer[Any]]:
    return {name: made(name, folder, batch=3) for name in ALL}


def scored(reward: Reward, pictures: Tensor, prompts: list[str]) -> Scores:
    return reward.score(Media.of(pictures), prompts, [{}] * len(prompts))


def values(reward: Reward, pictures: Tensor, prompts: list[str]) -> Tensor:
    scores = scored(reward, pictures, prompts)
    assert bool(scores.ok.all()) and scores.names == (reward.name,)
    return scores.value[:, 0].double()


# -------------------------------------------------------------------------------------------------------- golden values
def golden(name: str) -> Tensor:
    if name == "image_reward":
        return tiny.blip_reward(BLIP, PIXELS, PROMPTS)
    if name == "aesthetic":
        feature = tiny.clip_picture(OPEN_CLIP, PIXELS)
        return tiny.layers(HEAD, feature / feature.norm(dim=1, keepdim=True))[:, 0]
    return tiny.clip_cosine(OPEN_CLIP, PIXELS, PROMPTS) * (100 if name == "pickscore" else 1)


@pytest.mark.parametrize("name", ALL)
def test_scores_are_those_of_the_published_architecture(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    found, expected = values(scorers[name], PICTURES, PROMPTS), golden(name)
    assert float(expected.std()) > 1e-3  # there is something to tell apart
    assert torch.allclose(found, expected, rtol=2e-5, atol=2e-5 * (100 if name == "pickscore" else 1) / 10)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 makes no causal mask in float64")
def test_in_float64_the_converted_clip_is_the_published_one(folder: Path) -> None:
    loaded = load_clip(str(folder / "clip"), None, (str(folder / "letters"), None), "cpu", "float32")
    loaded.model.double()
    with torch.inference_mode():
        found = loaded.cosine(PIXELS, PROMPTS)
    assert torch.allclose(found, tiny.clip_cosine(OPEN_CLIP, PIXELS, PROMPTS), atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_with_gradients_it_is_the_same_score(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    """Of pictures that need no resizing to the last bit but rounding; its slope is a difference's."""
    score = differentiable_of(scorers[name])
    assert score is not None
    pixels = numbers_of(PICTURES)[:, None].requires_grad_(True)
    found = score(pixels, PROMPTS, [{}] * len(PROMPTS))
    assert torch.allclose(found.detach().double(), values(scorers[name], PICTURES, PROMPTS), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), pixels)
    way, step = torch.sign(slope) * slope.abs().gt(slope.abs().median()), 1e-4
    with torch.no_grad():
        ends = [score(pixels + sign * step * way, PROMPTS, [{}] * len(PROMPTS)).double() for sign in (1, -1)]
    assert torch.allclose((ends[0] - ends[1]) / (2 * step), (slope * way).flatten(1).sum(1).double(), rtol=0.05)
    assert all(p.grad is None for p in _parameters(scorers[name]))


def _parameters(scorer: Scorer[Any]) -> list[torch.nn.Parameter]:
    network = scorer._there()  # pyright: ignore[reportPrivateUsage]
    parts = [getattr(network, name, None) for name in ("model", "blip", "head")]
    return [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()]


def test_forms_of_clipscore(folder: Path, scorers: dict[str, Scorer[Any]]) -> None:
    cosine = values(scorers["clipscore"], PICTURES, PROMPTS)
    assert bool((cosine < 0).any()) and bool((cosine > 0).any())
    hundred, two = (
        make(path=str(folder / "clip"), tokenizer=str(folder / "letters")) for make in (clipscore_100, clipscore_2_5)
    )
    expected = torch.tensor([max(float(c), 0.0) for c in cosine], dtype=torch.float64)
    assert torch.allclose(values(hundred, PICTURES, PROMPTS), 100 * expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(values(two, PICTURES, PROMPTS), 2.5 * expected, rtol=1e-5, atol=1e-6)


def test_a_smaller_dtype_does_not_round_the_logit_scale(folder: Path, scorers: dict[str, Scorer[Any]]) -> None:
    """100 in bfloat16 by way of its logarithm is 98.9."""
    half = made("pickscore", folder, dtype="bfloat16")
    assert torch.allclose(values(half, PICTURES, PROMPTS), golden("pickscore"), atol=2.0)
    assert math.isclose(half._there().scale, 100, rel_tol=1e-6)


def test_transformers_of_both_kinds(scorers: dict[str, Scorer[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 returns the features themselves, version 5 an object around them."""
    reward = scorers["clipscore"]
    model, expected = reward._there().model, values(reward, PICTURES, PROMPTS)
    for name in ("get_image_features", "get_text_features"):
        method = getattr(model, name)

        def other(method: Callable[..., Any] = method, **inputs: Tensor) -> Any:
            found = method(**inputs)
            return found.pooler_output if hasattr(found, "pooler_output") else type("", (), {"pooler_output": found})()

        monkeypatch.setattr(model, name, other)
    assert torch.equal(values(reward, PICTURES, PROMPTS), expected)


# --------------------------------------------------------------------------------------------------------- what rows do
@pytest.mark.parametrize("name", ALL)
def test_rows_stay_in_order_and_do_not_depend_on_their_neighbours(
    name: str, folder: Path, scorers: dict[str, Scorer[Any]]
) -> None:
    together = values(scorers[name], PICTURES, PROMPTS)
    alone = torch.cat([values(scorers[name], PICTURES[i : i + 1], [PROMPTS[i]]) for i in range(N)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-6)
    backwards = values(scorers[name], PICTURES.flip(0), PROMPTS[::-1]).flip(0)
    assert torch.allclose(together, backwards, rtol=1e-5, atol=1e-6)
    assert len(values(scorers[name], PICTURES[:0], [])) == 0


@pytest.mark.parametrize("name", ALL)
def test_swapped_prompts_are_other_scores(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    right, swapped = (values(scorers[name], PICTURES, prompts) for prompts in (PROMPTS, PROMPTS[1:] + PROMPTS[:1]))
    if name in READS:
        assert bool(((right - swapped).abs() > 1e-4).all())
    else:
        assert torch.equal(right, swapped)


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_picture_or_no_prompt_is_refused(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    score: Any = scorers[name].score
    with pytest.raises(ValueError, match="media is a list"):
        score(PROMPTS, PICTURES, [{}] * N)
    for wrong in (PICTURES.float() / 255, PICTURES.float(), PICTURES.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"nearest valid: torch\.uint8"):
            score(wrong, PROMPTS, [{}] * N)
    for prompts in ("a dog or ", list(PICTURES), [b"cat"] * N, [None] * N):
        with pytest.raises(ValueError, match="prompts has"):
            score(PICTURES if len(prompts) == N else PICTURES[:0], prompts, [{}] * N)


@pytest.mark.parametrize("name", ALL)
def test_odd_prompts_and_pictures_are_scored(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    odd = ["", " \n\t", "cat " * 2500, "🐱 猫 ✨", "<|endoftext|> [SEP] red", "\0"]
    values(scorers[name], PICTURES[: len(odd)], odd)
    for height, width in ((1, 1), (4096, 16), (16, 512), (33, 31)):
        picture = torch.arange(height * width * 3).reshape(1, height, width, 3).remainder(251).to(torch.uint8)
        values(scorers[name], picture, ["cat"])


@pytest.mark.parametrize("name", READS)
def test_a_prompt_is_cut_where_the_model_ends(name: str, scorers: dict[str, Scorer[Any]]) -> None:
    long = "cat " * 40
    one, other = (values(scorers[name], PICTURES[:2], [prompt, "dog"]) for prompt in (long + "dog", long + "red"))
    assert torch.equal(one, other)


def test_a_score_that_is_no_number_is_failed(folder: Path) -> None:
    reward = made("aesthetic", folder)
    with torch.no_grad():
        reward._there().head.bias.fill_(math.nan)
    scores = scored(reward, PICTURES, PROMPTS)
    assert not bool(scores.ok.any())


# -------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("name", ALL)
def test_weights_are_loaded_when_they_are_needed_and_once(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, loads, both, found = made(name, folder), [], Barrier(2), []
    load = reward._load
    monkeypatch.setattr(reward, "_load", lambda at: (loads.append(at), load(at))[1])

    def score() -> None:
        both.wait()
        found.append(values(reward, PICTURES[:1], ["cat"]))

    threads = [Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reward.prepare()
    assert loads == ["cpu"] and torch.equal(*found)


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for reward in (pickscore(path=missing), hpsv2(path=missing), aesthetic(path=missing, clip=missing)):
        with pytest.raises(ValueError, match="missing"):
            reward.prepare()


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
def test_weights_that_do_not_fit_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    own = {"aesthetic": folder / "head.safetensors", "image_reward": folder / "blip"}.get(name, folder / "clip")
    tensors = read_tensors(own)
    first = sorted(tensors)[0]
    options = {"aesthetic": {"clip": str(folder / "clip")}, "image_reward": {"tokenizer": str(folder / "pieces")}}
    make: Any = {"hpsv2": hpsv2, "aesthetic": aesthetic, "image_reward": image_reward}[name]
    config = tiny.BLIP if name == "image_reward" else tiny.CLIP
    (tmp_path / "config.json").write_text(json.dumps(config))
    for change, told in (
        ({first: None}, f"lacks {first}"),
        ({"extra.weight": torch.zeros(1)}, "has unexpected extra.weight"),
        ({first: torch.zeros(1, 2, 3, 4)}, rf"has other shapes: {first} \[1, 2, 3, 4\] for"),
    ):
        changed = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors")
        reward = make(path=str(tmp_path), **options.get(name, {"tokenizer": str(folder / "letters")}))
        with pytest.raises(ValueError, match=told):
            reward.prepare()


def test_what_older_versions_of_transformers_saved_is_the_same(
    folder: Path, scorers: dict[str, Scorer[Any]], tmp_path: Path
) -> None:
    """Positions among the weights, 2 for the end of a text, and a dtype that the network would be made in."""
    positions = {
        "text_model.embeddings.position_ids": torch.arange(tiny.LENGTH)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    save_file(read_tensors(folder / "clip") | positions, tmp_path / "model.safetensors")
    parts = {part: tiny.CLIP[part] | {"torch_dtype": "float16"} for part in ("text_config", "vision_config")}
    parts["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(tiny.CLIP | parts | {"torch_dtype": "float16"}))
    old = pickscore(path=str(tmp_path), tokenizer=str(folder / "letters"))
    assert torch.allclose(values(old, PICTURES, PROMPTS), values(scorers["pickscore"], PICTURES, PROMPTS), atol=1e-4)


def test_weights_of_another_scorer_are_refused(folder: Path) -> None:
    other = hpsv2(path=str(folder / "clip"), version="2.0", tokenizer=str(folder / "letters"))
    with pytest.raises(ValueError, match=r"converted for hpsv2\.1; nearest valid: one for hpsv2\.0"):
        other.prepare()
    with pytest.raises(ValueError, match="is a 'blip'; nearest valid: 'clip'"):
        pickscore(path=str(folder / "blip"), tokenizer=str(folder / "letters")).prepare()
    with pytest.raises(ValueError, match=r"converted for hpsv2\.1; nearest valid: one for aesthetic"):
        aesthetic(path=str(folder / "clip"), clip=str(folder / "clip")).prepare()


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: .*nearest valid: the tokenizer that the model was trained with"):
        pickscore(path=str(folder / "clip"), tokenizer=str(folder / "pieces")).prepare()
    with pytest.raises(ValueError, match=r"tokenizer: .*nearest valid: BERT's, uncased"):
        image_reward(path=str(folder / "blip"), tokenizer=str(folder / "letters")).prepare()
    few = tiny.bert_tokenizer(tmp_path)
    (few / "vocab.txt").write_text("\n".join(tiny.PIECES[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"has 11 tokens, the model 14; nearest valid: BERT's, uncased"):
        image_reward(path=str(folder / "blip"), tokenizer=str(few)).prepare()
    (few / "vocab.txt").unlink()  # of which transformers would make a tokenizer of five tokens
    with pytest.raises(ValueError, match=r"tokenizer: .*has no vocabulary"):
        image_reward(path=str(folder / "blip"), tokenizer=str(few)).prepare()


def test_options_of_a_configuration(folder: Path) -> None:
    """Which of them name weights, and so belong to what a run is."""
    given = {"path": "x"}
    for name in ("pickscore", "clipscore", "clipscore_100", "clipscore_2_5", "hpsv2", "image_reward"):
        named = places(REWARDS[name], given | {"tokenizer": "y"})
        assert named == {"path": "x", "tokenizer": "y"}
    assert places(REWARDS["aesthetic"], given) == {"path": "x", "clip": clip.OPENAI_L}
    with pytest.raises(ValueError, match=r"options\.path: missing"):
        build("hpsv2")
    with pytest.raises(ValueError, match=r"options\.dtype: 'fp16' is not one of .*nearest valid: 'float16'"):
        build("pickscore", options={"dtype": "fp16"})
    options = {"path": str(folder / "clip"), "tokenizer": str(folder / "letters"), "version": "2.1", "batch": 2}
    scores = build("taste", "hpsv2", options).score(Media.of(PICTURES), PROMPTS, [{}] * N)
    assert scores.names == ("taste",)
    assert torch.allclose(scores.value[:, 0].double(), golden("hpsv2"), rtol=2e-5, atol=2e-6)


def test_options_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="batch: 0 is too small; nearest valid: 1"):
        made("pickscore", folder, batch=0)
    with pytest.raises(ValueError, match="device: 'cuda:99'"):
        made("pickscore", folder, device="cuda:99")
    monkeypatch.setattr("tempflow.rewards.scorer.find_spec", lambda name: None if name == "transformers" else object())
    for name in ALL:
        with pytest.raises(ImportError, match=r"needs transformers: pip install 'tempflow\[scorers\]'"):
            made(name, folder)


# -------------------------------------------------------------------------------------------------------- preprocessing
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32), (33, 70), (96, 41), (7, 5)])
def test_a_crop_with_gradients_is_pils_but_for_what_that_rounds(height: int, width: int) -> None:
    drawn = torch.Generator().manual_seed(height)  # within what the filter overshoots by
    picture = torch.randint(60, 196, (2, height, width, 3), generator=drawn, dtype=torch.uint8)
    for half in (math.floor, round):
        away = cropped(picture, 32, half) - cropped_pixels(numbers_of(picture), 32, half)
        levels = away * torch.tensor(clip.STD).view(3, 1, 1) * 255
        assert float(levels.abs().max()) <= (1e-3 if (height, width) == (32, 32) else 1.1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32), (33, 70), (96, 41), (7, 5), (1, 1)])
def test_cropped_is_what_transformers_processor_makes(height: int, width: int) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")  # of transformers 5
    processor = module.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    expected = processor([Image.fromarray(p) for p in pictures.numpy()], return_tensors="pt")["pixel_values"]
    assert torch.allclose(cropped(pictures, 32), expected, atol=1e-5)


def test_half_a_pixel_goes_where_it_is_asked() -> None:
    """The middle of 35 pixels is 1.5 from the side: transformers begins at 1, torchvision at 2."""
    picture = torch.arange(35, dtype=torch.uint8).view(1, 35, 1, 1).expand(1, 35, 32, 3).contiguous()
    floor, rounded = (cropped(picture, 32, half)[0, 0, 0, 0] for half in (math.floor, round))
    raw = (torch.tensor([1.0, 2.0]) / 255 - clip.MEAN[0]) / clip.STD[0]
    assert torch.allclose(torch.stack([floor, rounded]), raw, atol=1e-5)


@pytest.mark.parametrize(("name", "left"), [("pickscore", 1), ("clipscore", 1), ("aesthetic", 2), ("image_reward", 2)])
def test_what_each_sees_of_a_wide_picture(name: str, left: int, scorers: dict[str, Scorer[Any]]) -> None:
    wide = torch.randint(0, 256, (2, 32, 35, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    seen = wide[:, :, left : left + 32].contiguous()
    assert torch.equal(values(scorers[name], wide, PROMPTS[:2]), values(scorers[name], seen, PROMPTS[:2]))


def test_hpsv2_sees_the_whole_of_a_wide_picture(folder: Path, scorers: dict[str, Scorer[Any]]) -> None:
    framed = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    framed[:, 8:24] = PICTURES[:2, :16]
    wide = values(scorers["hpsv2"], PICTURES[:2, :16].contiguous(), PROMPTS[:2])
    assert torch.equal(wide, values(scorers["hpsv2"], framed, PROMPTS[:2]))
    large = PICTURES[:2].repeat(1, 2, 2, 1)
    smooth, sharp = (values(made("hpsv2", folder, antialias=on), large, PROMPTS[:2]) for on in (True, False))
    assert torch.equal(smooth, values(scorers["hpsv2"], large, PROMPTS[:2])) and bool((smooth != sharp).all())


@pytest.mark.parametrize(("height", "width"), [(64, 48), (50, 90), (5, 9)])
def test_padded_is_the_whole_picture_between_black(height: int, width: int) -> None:
    """Against PIL's bicubic of numbers, which smooths when it makes smaller."""
    picture = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    scale = 32 / max(height, width)
    high, wide = round(height * scale), round(width * scale)
    top, left = (32 - high) // 2, (32 - wide) // 2
    expected = np.zeros((32, 32, 3))
    for channel in range(3):
        plane = Image.fromarray(picture[0, ..., channel].numpy().astype(np.float32) / 255)
        expected[top : top + high, left : left + wide, channel] = plane.resize((wide, high), Image.Resampling.BICUBIC)
    expected = (torch.tensor(expected) - tiny.MEAN) / tiny.STD
    assert torch.allclose(
        padded(numbers_of(picture), 32, antialias=True)[0].permute(1, 2, 0).double(), expected, atol=1e-4
    )
    sharp = padded(numbers_of(picture), 32, antialias=False)
    assert bool((sharp != padded(numbers_of(picture), 32, antialias=True)).any()) == (
        max(height, width) > 32 or height < 9
    )


def test_padded_leaves_a_picture_of_the_right_size() -> None:
    picture = PICTURES[:1, :16]
    made = padded(numbers_of(picture), 32, antialias=True)[0].permute(1, 2, 0).double()
    assert torch.allclose(made[8:24], ((picture[0].double() / 255) - tiny.MEAN) / tiny.STD, atol=1e-6)
    assert torch.allclose(made[:8], (-tiny.MEAN / tiny.STD).expand(8, 32, 3), atol=1e-6)
