"""CLAP: mono, resampled, cut into windows, a cosine; on a tiny model of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import drawn, tokenizer_of
from tokenizers.processors import TemplateProcessing

from tempflow.media import Media
from tempflow.rewards import Reward, score_all
from tempflow.rewards.clap import _unit, clap, mono, windows
from tempflow.rewards.protocol import takes_of

RATE = 8000
"""Of the tiny extractor; its windows are a second."""

RATES: Any = {
    "sampling_rate": RATE,
    "max_length_s": 1,
    "hop_length": 80,
    "fft_window_size": 256,
    "frequency_max": 3500,
}
PROMPTS = ["a red cat", "motion errors", ""]
META: list[dict[str, object]] = [{}] * 3


def media_of(sound: torch.Tensor, rate: int) -> Media:
    return Media(torch.zeros(len(sound), 2, 4, 4, 3, dtype=torch.uint8), 8.0, sound, rate)


def tones(rate: int, seconds: float = 0.5) -> torch.Tensor:
    """float32 [3, 1, S]: three tones."""
    time = torch.arange(round(rate * seconds)) / rate
    return torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (220.0, 880.0, 1500.0)])[:, None] * 0.5


SOUND = tones(RATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    place = tmp_path_factory.mktemp("clap")
    tokenizer = tokenizer_of()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    single = f"{ends[0][0]} $A {ends[1][0]}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    tokenizer.save_pretrained(place)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 24, "max_position_embeddings": 66, "pad_token_id": 0, "projection_dim": 12}
    audio = {"depths": [1, 1], "num_attention_heads": [1, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16}
    audio |= {"num_hidden_layers": 2, "projection_dim": 12, "num_classes": 3}
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12))
    drawn(model, 0)
    model.save_pretrained(place)
    extractor = ClapFeatureExtractor(truncation="rand_trunc", **RATES)
    extractor.save_pretrained(place)
    yield place


@torch.no_grad()
def test_fused_weights_are_not_left_to_chance(folder: Path, tmp_path: Path) -> None:
    """Their extractor marks a row of a batch by chance as longer than a window, and mixes windows by chance."""
    from transformers import AutoConfig, ClapFeatureExtractor, ClapModel

    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(folder)
    config.audio_config.enable_fusion = True
    model = ClapModel(config).eval()
    drawn(model, 1)
    model.save_pretrained(tmp_path)
    extractor = ClapFeatureExtractor(truncation="fusion", **RATES)
    extractor.save_pretrained(tmp_path)
    reward, media = reward_of(tmp_path), media_of(torch.cat([SOUND] * 2, 2), RATE)
    first = reward.score(media, PROMPTS, META).value
    assert all(torch.equal(reward.score(media, PROMPTS, META).value, first) for _ in range(3))
    single = torch.cat([reward.score(media[[k]], [PROMPTS[k]], [{}]).value for k in range(3)])
    assert torch.allclose(single, first, atol=1e-5)


def reward_of(folder: Path, **options: Any) -> Any:
    return clap(path=str(folder), **options)


@torch.no_grad()
def want(folder: Path, wave: np.ndarray, prompt: str) -> float:
    """One window's cosine, by transformers' whole model in float64."""
    from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

    model = ClapModel.from_pretrained(folder).double().eval()
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    heard = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_features"].double()
    asked = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=65)
    out = model(input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], input_features=heard)
    return float((out.text_embeds * out.audio_embeds).sum())


def test_it_is_the_cosine_of_text_and_sound(folder: Path) -> None:
    reward = reward_of(folder)
    assert isinstance(reward, Reward) and takes_of(reward) == "sound"
    scores = reward.score(media_of(SOUND, RATE), PROMPTS, META)
    assert scores.ok.all() and scores.names == ("clap",)
    told = [want(folder, wave[0].numpy(), prompt) for wave, prompt in zip(SOUND, PROMPTS, strict=True)]
    assert scores.value[:, 0].tolist() == pytest.approx(told, abs=1e-4)
    assert min(abs(a - b) for i, a in enumerate(told) for b in told[:i]) > 1e-3
    single = reward_of(folder, batch=1).score(media_of(SOUND, RATE), PROMPTS, META)
    assert torch.allclose(single.value, scores.value, atol=1e-5)
    backwards = reward.score(media_of(SOUND.flip(0), RATE), PROMPTS[::-1], META)
    assert torch.allclose(backwards.value.flip(0), scores.value, atol=1e-5)
    swapped = reward.score(media_of(SOUND, RATE), PROMPTS[::-1], META)
    assert (swapped.value - scores.value)[[0, 2]].abs().min() > 1e-3


def test_a_long_sound_is_the_mean_over_windows_and_not_left_to_chance(folder: Path) -> None:
    long = tones(RATE, 2.5)[:1]
    reward = reward_of(folder)
    told = [want(folder, long[0, 0, start : start + RATE].numpy(), PROMPTS[0]) for start in (0, 6000, 12000)]
    for _ in range(2):
        scores = reward.score(media_of(long, RATE), PROMPTS[:1], META[:1])
        assert scores.value.item() == pytest.approx(float(np.mean(told)), abs=1e-4)


def test_windows_cover_a_sound() -> None:
    for length, most, want in ((5, 5, 1), (4, 5, 1), (6, 5, 2), (10, 5, 2), (11, 5, 3), (23, 5, 5)):
        cut = windows(np.arange(length), most)
        assert len(cut) == want and {int(i) for part in cut for i in part} == set(range(length))
        assert all(len(part) == min(most, length) for part in cut)


def test_sounds_are_made_mono_and_resampled_with_a_filter() -> None:
    """A tone that the lower rate can hold stays; one that it cannot is gone, where picking samples would fold it."""
    time = np.arange(48_000) / 48_000
    low, high = (np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (440, 7000))
    kept, gone = mono(low[None], 48_000, RATE), mono(high[None], 48_000, RATE)
    assert kept.shape == gone.shape == (RATE,) and kept.dtype == np.float32
    inner = slice(500, -500)
    assert np.abs(kept - low[::6])[inner].max() < 0.01
    assert np.abs(gone)[inner].max() < 0.01 < np.abs(high[::6]).max()
    up = mono(kept[None], RATE, 44_100)
    assert (
        len(up) == 44_100 and np.abs(up - np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100))[3000:-3000].max() < 0.02
    )
    assert np.allclose(mono(np.stack([low, high]), RATE, RATE), (low + high) / 2, atol=1e-6)


def test_another_rate_hears_the_same(folder: Path) -> None:
    reward = reward_of(folder)
    one, other = (reward.score(media_of(tones(rate), rate), PROMPTS, META).value for rate in (RATE, 48_000))
    assert torch.allclose(one, other, atol=0.05)


def test_what_cannot_be_heard_is_failed_or_refused(folder: Path) -> None:
    reward = reward_of(folder)
    broken = SOUND.clone()
    broken[1, 0, 7] = torch.nan
    scores = reward.score(media_of(broken, RATE), PROMPTS, META)
    assert scores.ok[:, 0].tolist() == [True, False, True]
    silent = torch.zeros(3, 2, 1, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="media without sound for a reward that takes sound"):
        reward.score(Media(silent), PROMPTS, META)
    assert not score_all([reward], Media(silent), PROMPTS, META, [0, 1, 2]).ok.any()
    with pytest.raises(ValueError, match="parts: 2 kinds of media"):
        Media.cat([media_of(SOUND, RATE), media_of(SOUND, 2 * RATE)])


def test_features_come_as_a_tensor_or_in_an_object() -> None:
    """Of transformers 4, and of 5."""
    features = torch.tensor([[3.0, 4.0]])
    assert torch.equal(_unit(features), _unit(SimpleNamespace(pooler_output=features)))
    assert torch.allclose(_unit(features), torch.tensor([[0.6, 0.8]]))


def test_odd_prompts_and_sounds_are_judged(folder: Path) -> None:
    sounds = torch.stack([torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), -1.0)])
    scores = reward_of(folder).score(media_of(sounds, 44_100), ["x" * 10_000, "🙂", ""], META)
    assert scores.ok.all()


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for change, fault in (
        ({"text_projection.linear1.weight": None}, "lacks text_projection.linear1.weight"),
        ({"extra": torch.zeros(1)}, "has unexpected extra"),
    ):
        wrong = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"^path: .* does not fit ClapModel: it {fault}"):
            reward_of(tmp_path).prepare()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^path: .* is no ClapModel's folder"):
        reward_of(tmp_path).prepare()
