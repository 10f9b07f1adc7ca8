"""A model of clips, and negative prompts, through whole runs: the loop knows neither of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config, flow
from PIL import Image
from torch import Tensor

from tempflow.evaluate.suite import draw, draw_strips, evaluate, sample_path
from tempflow.media import Kind, Media, Size
from tempflow.models.finite import encoded_media
from tempflow.models.protocol import Conditioning
from tempflow.request import Prompt, Source
from tempflow.rewards import from_function
from tempflow.train.trainer import train

FRAMES = 3


class Clips(Fake):
    """Its latent is shown for three frames, ever darker, with a sound as loud as they are light."""

    makes: Kind = "video and sound"

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        if (size.frames, size.fps) != (FRAMES, 4.0):
            raise ValueError(f"frames: {size.frames} at {size.fps} must be {FRAMES} at 4.0")
        return self.shape

    def decode(self, x: Tensor, size: Size) -> Media:
        first = super().decode(x, size).pictures()
        frames = torch.stack([first, first // 2, first // 4], 1)
        sound = frames.float().mean((1, 2, 3, 4)).view(-1, 1, 1).expand(-1, 1, 8) / 255
        return Media(frames, 4.0, sound.contiguous(), 8)


def lightness(clips: list[np.ndarray], prompts: list[str]) -> list[float]:
    assert all(clip.shape == (FRAMES, 2, 2, 3) and clip.dtype == np.uint8 for clip in clips)
    return [float(clip[0].mean()) / 255 for clip in clips]


def loudness(sounds: list[np.ndarray], prompts: list[str]) -> list[float]:
    return [float(np.abs(sound).mean()) for sound in sounds]


def test_a_model_of_clips_learns_and_its_clips_are_shown(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", model={"frames": FRAMES, "fps": 4.0})
    rewards = [from_function(lightness, takes="video"), from_function(loudness, takes="sound")]
    run = train(settings, model=Clips(), reward=rewards, prompts=PROMPTS, quiet=True)
    assert run.after.mean("reward") > run.before.mean("reward") + 0.1
    assert set(run.after.scores.names) == {"lightness", "loudness", "reward"}
    with Image.open(tmp_path / "run" / "before_after.png") as page:
        assert page.size[0] > 2 * FRAMES * 128  # frames side by side
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["diversity"]) for line in lines)


def test_a_reward_of_pictures_is_refused_before_any_forward(tmp_path: Path) -> None:
    model, settings = Clips(), config(tmp_path / "run", model={"frames": FRAMES, "fps": 4.0})
    with pytest.raises(ValueError, match=r"reward 'brightness' takes picture, and the model 'fake' makes video and"):
        train(settings, model=model, reward=brightness, prompts=PROMPTS, quiet=True)
    assert model.rows == [] and not (tmp_path / "run").exists()


def test_clips_are_sampled_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempflow.evaluate.suite.load_source", lambda source, device, grid: Clips())
    size = Size(2, 2, FRAMES, 4.0)
    how: dict[str, Any] = {"steps": 2, "guidance": 1.0, "seed": 1, "size": size, "device": "cpu", "out": tmp_path / "s"}
    files = sample_path("shapes", [Prompt("fog"), Prompt("snow")], **how)
    assert [f.name for f in files] == ["000.png", "001.png"]
    with Image.open(files[0]) as clip:
        assert clip.n_frames == FRAMES and clip.info["duration"] == 250  # type: ignore[attr-defined]
    assert (tmp_path / "s" / "001.wav").is_file()


def test_chunks_are_bounded_by_the_bytes_of_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rollout and of an evaluation: a prompt's clips stay together, and what comes of them is the same."""
    held = list[int]()

    class Counted(Clips):
        def decode(self, x: Tensor, size: Size) -> Media:
            held.append(len(x))
            return super().decode(x, size)

    size, reward = Size(2, 2, FRAMES, 4.0), from_function(lightness, takes="video")
    how: dict[str, Any] = {"steps": 2, "guidance": 1.0, "seed": 1, "size": size, "rows": 64}
    found = list[tuple[Tensor, Tensor, Tensor]]()
    for clips, parts, drawn in (
        (1000, [36], [6]),
        (13, [12, 12, 12], [6]),
        (4, [6] * 6, [4, 2]),
        (0, [6] * 6, [1] * 6),
    ):
        monkeypatch.setattr("tempflow.media.BYTES_AT_ONCE", clips * 3 * size.pixels)
        held.clear()
        scores = Bench(Counted(), flow(), reward, size=size).collect().scores
        assert held == parts
        held.clear()
        prompts = [Prompt(text) for text in PROMPTS]
        shown, judged = draw_strips(Counted(), prompts, **how), evaluate(Counted(), prompts, [reward], **how)
        assert held == drawn * 2
        found.append((scores.value, shown, judged.scores.value))
    for one in found[1:]:
        assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(one, found[0], strict=True))


class Slower(Clips):
    """At half the rate that it is asked for."""

    def decode(self, x: Tensor, size: Size) -> Media:
        return replace(super().decode(x, size), fps=2.0)


def test_what_a_model_makes_is_of_the_size_that_was_asked_for() -> None:
    size = Size(2, 2, FRAMES, 4.0)
    told = "fake decoded media of 2×2, 3 frames at 2 a second, 1 s of sound, and 2×2, 3 frames at 4 a second is asked"
    reward = from_function(lightness, takes="video")
    with pytest.raises(ValueError, match=told):
        Bench(Slower(), flow(), reward, size=size).collect()
    with pytest.raises(ValueError, match=told):
        draw(Slower(), [Prompt("fog")], steps=2, guidance=1.0, seed=1, size=size, rows=4)


def test_what_a_model_encodes_is_of_the_size_that_was_asked_for() -> None:
    made = Clips().decode(torch.zeros(1, 2, 2, 2), Size(2, 2, FRAMES, 4.0))
    assert encoded_media(Clips(), made, Size(2, 2, FRAMES, 4.0)).shape == (1, *Clips.shape)
    with pytest.raises(ValueError, match="media: 2×2, 3 frames at 4 a second, 1 s of sound, and 2×2, 3 frames at 8"):
        encoded_media(Clips(), made, Size(2, 2, FRAMES, 8.0))


# ------------------------------------------------------------------------------------------------------------ requests
class Guided(Fake):
    """Keeps the conditions that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Prompt, ...]] = []

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        self.asked.append(tuple(prompts))
        return super().encode(prompts, size)


def moved(negatives: Sequence[str], guidance: float) -> Tensor:
    """The weights after one iteration."""
    bench = Bench(Fake(), flow(), guidance=guidance)
    prompts = [Prompt(text, {}, negative) for text, negative in zip(PROMPTS, negatives, strict=True)]
    bench.update(bench.collect(prompts=prompts))
    return torch.cat([p.detach().flatten() for p in bench.model.network.parameters()])


def test_negative_prompts_reach_rollout_and_training() -> None:
    none, all_alike, one = [""] * 6, ["a dim and blurry thing"] * 6, ["a dim and blurry thing", *[""] * 5]
    base = moved(none, 2.0)
    assert not torch.equal(moved(all_alike, 2.0), base) and not torch.equal(moved(one, 2.0), base)
    assert torch.equal(moved(all_alike, 1.0), moved(none, 1.0))  # no guidance, no negative branch


def test_the_ratio_is_1_with_negative_prompts() -> None:
    """Rollout and training see the same negative branch: the guard compares them, and a planted fault stops it."""
    bench = Bench(Fake(), flow(), guidance=2.0)
    prompts = [Prompt(text, {}, f"no {text}") for text in PROMPTS]
    metrics = bench.update(bench.collect(prompts=prompts))
    assert metrics["rollout_gap_max"] < 4


def test_a_run_evaluates_with_its_negative_prompts(tmp_path: Path) -> None:
    lines = [{"prompt": text, "negative_prompt": "blurry"} for text in PROMPTS]
    model = Guided()
    settings = config(tmp_path / "run", iterations=1, evaluation={"guidance": 2.0}, model={"guidance": 2.0})
    run = train(settings, model=model, reward=brightness, prompts=lines, quiet=True)
    assert all(prompt.negative == "blurry" for prompts in model.asked for prompt in prompts) and len(model.asked) > 3
    plain = train(
        settings.replace(name="plain", output=str(tmp_path / "plain")),
        model=Guided(), reward=brightness, prompts=list(PROMPTS), quiet=True,
    )  # fmt: skip
    assert run.before.mean("reward") != plain.before.mean("reward")


def test_negative_prompts_without_guidance_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": text, "negative_prompt": "blurry"} for text in PROMPTS[:2]] + [{"prompt": PROMPTS[2]}]
    train(config(tmp_path / "run", iterations=1), model=Fake(), reward=brightness, prompts=lines)
    said = " ".join(capsys.readouterr().out.split())
    assert 'warn: prompts: 2 of 3 prompts have a "negative_prompt", which this guidance makes no use of' in said


class Editor(Guided):
    takes_sources = True


def test_pictures_reach_a_model_that_draws_from_them(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "fog", "image": "a.png"}))
    model, data = Editor(), dict.fromkeys(("train", "validation", "test"), str(tmp_path / "p.jsonl"))
    settings = config(tmp_path / "run", iterations=1, data={**data, "prompts_per_iteration": 2})
    train(settings, model=model, reward=brightness, quiet=True)
    want = (Source.of(tmp_path / "a.png"),)
    assert model.asked and all(prompt.sources == want for prompts in model.asked for prompt in prompts)
    with pytest.raises(ValueError, match=r"data.train: .*p\.jsonl:1: \"image\": pictures would change what is drawn"):
        train(settings.replace(output=str(tmp_path / "b")), model=Fake(), reward=brightness, quiet=True)
