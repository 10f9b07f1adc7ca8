"""What is Qwen-Image's own; that it draws what its pipeline draws is in test_family_adapters.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import qwen_image

from tempflow import models
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.qwen_image import QwenGuidance, QwenImage
from tempflow.request import Prompt

SIZE = Size(*qwen_image.SIZES[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    with quiet():
        qwen_image.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Any:
    with quiet():
        return models.load(str(folder))


def test_guidance_keeps_the_norm_of_each_token() -> None:
    positive, negative = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    drawn = QwenGuidance(4.0)(positive, negative)
    assert QwenGuidance(4.0).rows == 2 and QwenGuidance(1.0).rows == 1
    mixed = negative + 4 * (positive - negative)
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            token = (slice(None), slice(None), slice(row, row + 2), slice(column, column + 2))
            norms = [part[token].flatten(1).norm(dim=1) for part in (positive, mixed)]
            expected = mixed[token] * (norms[0] / norms[1]).view(-1, 1, 1, 1)
            torch.testing.assert_close(drawn[token], expected)


def test_an_empty_negative_prompt_is_a_space(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model card has it; an empty prompt stays as it is."""
    read: list[str] = []
    kept = adapter.pipe.encode_prompt

    def encode_prompt(prompt: list[str], **options: Any) -> Any:
        read.extend(prompt)
        return kept(prompt, **options)

    monkeypatch.setattr(adapter.pipe, "encode_prompt", encode_prompt)
    adapter.embeddings.clear()
    adapter.encode([Prompt(""), Prompt("a bird", negative="blue"), Prompt(" ")], SIZE)
    assert read == [" ", "blue", "", "a bird"]  # negatives first, each text once


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_step_is_refused_as_its_grid_ends_above_zero(adapter: Any) -> None:
    with pytest.raises(ValueError, match=r"no falling grid for 1 steps .*nearest valid: other steps"):
        adapter.schedule(1, SIZE)


def test_a_checkpoint_that_takes_its_guidance_in_is_refused() -> None:
    pipe = qwen_image.pipeline()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"model\.path: 'mine' has guidance_embeds true"):
        QwenImage(pipe, "mine", "unknown")
