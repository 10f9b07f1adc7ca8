"""`tempflow check-reward`: a sound reward passes; each planted fault is named."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from tempflow.cli import main
from tempflow.core.scores import Scores
from tempflow.doctor.reward import Sample, reward_checks, sample_of
from tempflow.media import Media
from tempflow.rewards import build, from_function


def states(checks: Sequence[object]) -> dict[str, str]:
    return {c.name: c.state for c in checks}  # type: ignore[attr-defined]


def test_the_shapes_verifier_passes_and_its_golden_scores_hold(tmp_path: Path) -> None:
    file = tmp_path / "golden.json"
    assert main(["check-reward", "shapes", "--count", "6", "--write", str(file)]) == 0
    assert main(["check-reward", "shapes", "--count", "6", "--golden", str(file)]) == 0
    held = json.loads(file.read_text())
    assert held["columns"] == ["shapes"] and [row["scores"] == [1.0] for row in held["pictures"]] == [
        n != 3 for n in range(6)
    ]
    held["pictures"][2]["scores"] = [0.5]
    file.write_text(json.dumps(held))
    checks, _ = reward_checks(build("shapes"), sample_of("", 6), file)
    found = states(checks)
    assert found.pop("golden scores") == "fails" and set(found.values()) == {"ok"}


class Faulty:
    """A reward with one fault."""

    name, groupwise = "faulty", False

    def __init__(self, fault: str) -> None:
        self.fault, self.draws = fault, random.Random(0)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        frames = media.frames if isinstance(media, Media) else torch.as_tensor(media)
        light = frames.float().flatten(1).mean(1)
        if self.fault == "batch":
            light = light / light.sum()
        if self.fault == "order":
            light = light.sort().values
        if self.fault == "chance":
            light = light + torch.tensor([self.draws.random() for _ in light])
        ok = torch.ones(len(light), dtype=torch.bool)
        if self.fault == "fails":
            ok[0] = False
        return Scores(light[:, None], ok[:, None], (self.name,))


@pytest.mark.parametrize(
    ("fault", "check", "state"),
    [
        ("batch", "one at a time", "fails"),
        ("order", "another order", "fails"),
        ("chance", "asked twice", "fails"),
        ("fails", "scores", "warning"),
        ("", "other prompts", "warning"),
        ("", "pictures in [0, 1]", "warning"),
        ("", "one at a time", "ok"),
    ],
)
def test_a_planted_fault_is_named(fault: str, check: str, state: str) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 1, 6, 5, 3), generator=generator).to(torch.uint8)
    sample = Sample(Media(frames), ["a", "b", "a", "c"], [{}] * 4)
    assert states(reward_checks(Faulty(fault), sample)[0])[check] == state


def test_a_reward_that_fails_on_everything_fails() -> None:
    checks, _ = reward_checks(from_function(lambda images, prompts: [None] * len(images), "none"), sample_of("", 2))
    assert states(checks)["scores"] == "fails"


def test_pictures_of_a_file(tmp_path: Path) -> None:
    for name, shade in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (9, 7), (shade, 0, 0)).save(tmp_path / name)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "dark", "image": "a.png"}\n{"prompt": "light", "image": "b.png"}\n')
    assert main(["check-reward", "jpeg_compressibility", "--pictures", str(file)]) == 0
    sample = sample_of(str(file), 8)
    assert sample.names == ["a.png", "b.png"] and sample.media.frames.shape == (2, 1, 7, 9, 3)


def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["shape"], "name: 'shape' is no known reward; nearest valid: 'shapes'"),
        (["shapes", "--pictures", str(tmp_path / "no.jsonl")], "no.jsonl"),
        (["shapes", "--golden", str(tmp_path / "no.json")], "golden: "),
        (["shapes:size=3"], "name: options.size: unknown field; there are none"),
    ):
        assert main(["check-reward", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
