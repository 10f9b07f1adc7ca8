"""What is asked of a model is checked by its folder, before anything is loaded, alike by every verb."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from tempflow import models
from tempflow.cli import main
from tempflow.cli.parse import configured
from tempflow.config import Config
from tempflow.cost import latent_shape
from tempflow.doctor.run import asked_check
from tempflow.export.card import Export, card
from tempflow.media import Size
from tempflow.models.family import Family, check_size
from tempflow.models.guidance import Guidance, guidance_of
from tempflow.models.sd3 import SD3

TINY = ["--iterations", "1", "--data.prompts-per-iteration", "2", "--algorithm.group", "2", "--threads", "1"]
WRONG = [
    (["--model.frames", "4"], "model.frames: 4 of 'shapes', which makes pictures; nearest valid: 1"),
    (["--model.fps", "24"], "model.fps: 24.0 of 'shapes', which makes pictures; nearest valid: null"),
    (["--model.seconds", "3"], "model.seconds: 3.0 of 'shapes', which makes pictures; nearest valid: null"),
    (["--model.height", "33"], "model.height: 33 must be a multiple of 8 up to"),
    (
        ["--model.guidance-options", "{rescale: 0.7}"],
        "model.guidance_options: 'rescale' is unknown; this family",
    ),
]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object, **named: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SD3, "load", load)


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_training_refuses_it(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "train", "shapes_flow", *TINY, *words, "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_doctor_sees_it(words: list[str], message: str) -> None:
    config = configured("train", ["shapes_flow", *words])
    (check,) = asked_check(config, models.shapes_folder())
    assert check.state == "fails" and message.rpartition("; ")[0] in f"{check.found}"
    assert asked_check(configured("train", ["shapes_flow"]), models.shapes_folder())[0].state == "ok"


@pytest.mark.parametrize(("words", "message"), WRONG[:4])
def test_cost_refuses_it(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "cost", "shapes_flow", *words)


def test_samples_and_evaluations_refuse_options_that_no_family_has(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["sample", "--prompt", "a red circle"], ["eval", "shapes", "--count", "1"]):
        assert "'rescale' is unknown" in refused(capsys, *verb, "--guidance-options", "{rescale: 0.7}")


def test_a_prompt_file_is_looked_at_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*given: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(models, "_download", fetch)
    missing = str(tmp_path / "missing.jsonl")
    assert "missing.jsonl" in refused(capsys, "sample", "some/model", "--prompts", missing)
    assert "missing.jsonl" in refused(capsys, "eval", "some/model", "--prompts", missing)
    words = ["train", "shapes_flow", "--model.path", "some/model", "--data.train", missing]
    assert "missing.jsonl" in refused(capsys, *words, "--output", str(tmp_path / "run"))


def test_latent_shapes_are_those_that_can_be_drawn() -> None:
    config = configured("cost", ["shapes_flow", "--model.height", "64"])
    assert latent_shape(config) == (8, 16, 8)


def test_an_option_of_guidance_that_is_refused_is_named_with_its_place() -> None:
    @dataclass(frozen=True)
    class Late(Guidance):
        until: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.until <= 1:
                raise ValueError(f"until: {self.until} must be in [0, 1]; nearest valid: 1")

    assert guidance_of(Late, 4.0, {"until": 0.5}) == Late(4.0, 0.5)
    with pytest.raises(ValueError, match=r"^model\.guidance_options\.until: 2 must be in \[0, 1\]; nearest valid: 1"):
        guidance_of(Late, 4.0, {"until": 2})
    with pytest.raises(ValueError, match=r"^guidance: inf is no number"):
        guidance_of(Late, math.inf, {})


def test_doctor_sees_a_stream_that_is_not_there() -> None:
    config = configured("train", ["shapes_flow", "--rewards.0.stream", "video"])
    (check,) = asked_check(config, models.shapes_folder())
    assert check.state == "fails" and check.found.startswith("rewards.0.stream: 'video' of 'shapes', but 'shapes'")


def test_sizes_by_what_is_made() -> None:
    check_size(Size(8, 8, 4, 8.0), "video", "m")
    check_size(Size(8, 8, 4, 8.0, 2.0), "video and sound", "m")
    with pytest.raises(ValueError, match=r"seconds: 2\.0 of 'm', which makes videos; nearest valid: null"):
        check_size(Size(8, 8, 4, 8.0, 2.0), "video", "m")


@dataclass(frozen=True)
class Rescaled(Guidance):
    rescale: float = 0.0


def test_the_card_of_a_clips_model_draws_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(title="clips", needed=("transformer",), task="text-to-video", makes="video", guidance=Rescaled)
    monkeypatch.setattr("tempflow.export.card.family_of", lambda config: family)
    asked = {"frames": 81, "fps": 16.0, "guidance_options": {"rescale": 0.7}}
    base = configured("train", ["shapes_flow"]).model_dump(mode="json")
    config = Config.model_validate({**base, "model": {**base["model"], **asked}})
    text = card(tmp_path, config, Export("out", "merged", "float32", None))
    assert "pipeline_tag: text-to-video" in text and "num_frames=81" in text and ".frames[0]" in text
    assert 'export_to_video(frames, "clip.mp4", fps=16)' in text and json.dumps({"rescale": 0.7}) in text
