"""The rewards that ship: the verifier's two faces and JPEG compressibility."""

from __future__ import annotations

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image

from tempflow.rewards import Reward
from tempflow.rewards.jpeg_compressibility import JPEGCompressibility
from tempflow.rewards.shapes import ShapesReward
from tempflow.shapes import verify
from tempflow.shapes.prompts import Spec, balanced
from tempflow.shapes.render import scene
from tempflow.shapes.verify import Verdict, judge

SPECS = balanced("train", 12)
PICTURES = [scene(s, np.random.default_rng(i)) for i, s in enumerate(SPECS)]
MEDIA = torch.from_numpy(np.stack(PICTURES))
PROMPTS = [s.prompt for s in SPECS]
META: list[dict[str, object]] = [{}] * len(SPECS)


# ------------------------------------------------------------------------------------------------------------ shapes
def test_shapes_scores_are_the_judges() -> None:
    asked = PROMPTS[1:] + PROMPTS[:1]
    for prompts in (PROMPTS, asked):
        specs = SPECS if prompts is PROMPTS else SPECS[1:] + SPECS[:1]
        verdicts = [judge(p, s) for p, s in zip(PICTURES, specs, strict=True)]
        graded, strict = (
            ShapesReward().score(MEDIA, prompts, META),
            ShapesReward(graded=False).score(MEDIA, prompts, META),
        )
        assert graded.names == ("shapes",) and strict.names == ("shapes_strict",)
        assert graded.ok.all() and strict.ok.all()
        assert graded.value.flatten().tolist() == pytest.approx([v.graded for v in verdicts])
        assert strict.value.flatten().tolist() == [float(v.strict) for v in verdicts]
    assert strict.value.sum() < len(SPECS) / 2 < ShapesReward(graded=False).score(MEDIA, PROMPTS, META).value.sum()


def test_shapes_judges_the_picture_not_the_row() -> None:
    reward = ShapesReward()
    whole = reward.score(MEDIA, PROMPTS, META)
    backwards = reward.score(MEDIA.flip(0), PROMPTS[::-1], META)
    assert torch.equal(whole.value, backwards.value.flip(0))
    assert len(reward.score(MEDIA[:0], [], [])) == 0


def test_the_two_rewards_judge_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(verify, "judge", lambda picture, spec: seen.append(picture.tobytes()) or judge(picture, spec))
    media = MEDIA.clone()
    media[1] = media[0]
    for reward in (ShapesReward(), ShapesReward(graded=False), ShapesReward()):
        reward.score(media, PROMPTS, META)
    assert len(seen) == len(MEDIA)  # equal pictures of two prompts are two
    assert ShapesReward().score(media[:1], PROMPTS[:1], META[:1]).value.item() == judge(PICTURES[0], SPECS[0]).graded


def test_two_threads_judge_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run scores: each reward in a thread of its own, at the same time."""
    seen: list[bytes] = []

    def slowly(picture: np.ndarray, spec: Spec) -> Verdict:
        time.sleep(0.001)
        seen.append(picture.tobytes())
        return judge(picture, spec)

    monkeypatch.setattr(verify, "judge", slowly)
    media, both = MEDIA.flip(1), Barrier(2)

    def score(reward: ShapesReward) -> torch.Tensor:
        both.wait()
        return reward.score(media, PROMPTS, META).value

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(score, (ShapesReward(), ShapesReward(graded=False))))
    assert len(seen) == len(MEDIA)


def test_shapes_takes_media_that_are_views() -> None:
    wide = torch.zeros(len(SPECS), 3, 32, 32, dtype=torch.uint8)
    wide.copy_(MEDIA.permute(0, 3, 1, 2))
    assert ShapesReward(graded=False).score(wide.permute(0, 2, 3, 1), PROMPTS, META).value.all()


def test_shapes_refuses_other_prompts_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"prompts: 'a red circel' is not a prompt .*; nearest valid: 'a red circle'"):
        ShapesReward().score(MEDIA[:1], ["a red circel"], META[:1])
    with pytest.raises(ValueError, match=r"media is 64×64; .* 32×32\. Nearest valid: height=32, width=32"):
        ShapesReward().score(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), PROMPTS[:1], META[:1])


def test_without_opencv_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tempflow.shapes.render", "tempflow.shapes.verify"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'tempflow\[shapes\]'"):
        ShapesReward()


# -------------------------------------------------------------------------------------------------------------- jpeg
def test_jpeg_golden_values() -> None:
    """Flat pictures hold a JPEG's header and nearly nothing else; noise is incompressible."""
    flat = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    noise = torch.randint(0, 256, (1, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    ramp = (torch.arange(64) * 4).byte().expand(1, 64, 64)[..., None].repeat(1, 1, 1, 3)
    scores = JPEGCompressibility().score(torch.cat([flat, noise, ramp]), ["", "", ""], [{}, {}, {}])
    assert scores.names == ("jpeg_compressibility",) and scores.ok.all()
    assert scores.value.flatten().tolist() == pytest.approx([-0.689, -5.424, -1.181], abs=0.01)


def test_jpeg_is_minus_the_files_size_in_kilobytes() -> None:
    for quality in (30, 95):
        file = io.BytesIO()
        Image.fromarray(PICTURES[0]).save(file, "JPEG", quality=quality)
        value = JPEGCompressibility(quality).score(MEDIA[:1], PROMPTS[:1], META[:1]).value
        assert value.item() == pytest.approx(-len(file.getvalue()) / 1000)


@pytest.mark.parametrize(("quality", "nearest"), [(0, 1), (96, 95), (1000, 95)])
def test_jpeg_quality_out_of_range(quality: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=f"quality = {quality}; nearest valid: {nearest}"):
        JPEGCompressibility(quality)


def test_both_are_rewards() -> None:
    assert isinstance(ShapesReward(), Reward) and isinstance(JPEGCompressibility(), Reward)
