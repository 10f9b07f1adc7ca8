"""Students, and what takes a reward's gradient, that are configured so that they cannot learn: by the command line,
one line with field, value and nearest valid value, before weights of a model or a reward are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import tempflow
from tempflow.cli import main
from tempflow.config import parse_config
from tempflow.strict import ConfigError
from tempflow.train import trainer

USEFUL = {"grid": [1.0, 0.75, 0.5, 0.25]}
SCORER, VERIFIER = {"name": "shapes_scorer"}, {"name": "shapes_strict"}
ABLE = "nearest valid: 'shapes_scorer' of aesthetic"

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # ------------------------------------------------------------------------------------------------------- the grid
    "steps above the grid": ({"name": "dmd2", "steps": 6}, {"model": USEFUL}, "algorithm.steps: 6 steps", "valid: 4"),
    "steps below it": ({"name": "rats", "steps": 3}, {"model": USEFUL}, "algorithm.steps: 3 steps", "valid: 4"),
    "evaluation above it": (
        {"name": "gdmd"},
        {"model": USEFUL, "evaluation": {"steps": 10}},
        "evaluation.steps: 10 steps",
        "valid: 4",
    ),
    "no step behind the first": ({"name": "dp_dmd", "steps": 1}, {}, "algorithm.steps: 1 must be", "valid: 2"),
    "gradients behind all steps": ({"name": "dmd2", "through": 9}, {}, "algorithm.through: 9 of 4 steps", "valid: 4"),
    "last steps of fewer": ({"name": "draft", "steps": 3, "last": 4}, {}, "algorithm.last: 4 of 3 steps", "valid: 3"),
    "late steps of fewer": ({"name": "refl", "steps": 6}, {}, "algorithm.late: 10 of 6 steps", "valid: 6"),
    "noisy steps of fewer": ({"name": "rtdmd", "train_steps": 4}, {}, "algorithm.train_steps: 4 must be", "valid: 3"),
    # ----------------------------------------------------------------------------------------------------- the teacher
    "taught above it": ({"name": "dp_dmd", "taught": 31}, {}, "algorithm.taught: 31 of 30 steps", "valid: 30"),
    "a teacher of fewer steps": (
        {"name": "dp_dmd", "teacher_steps": 3, "taught": 1},
        {},
        "algorithm.teacher_steps: 3 must be at least 4",
        "valid: 4",
    ),
    "a teacher of no part": ({"name": "rats", "parts": 0}, {}, "algorithm.parts: 0 must be at least 1", "valid: 1"),
    "a teacher that stands still": ({"name": "rats", "teacher_decay": 1.0}, {}, "algorithm.teacher_decay: 1.0", "0.99"),
    "guidance below 0": (
        {"name": "rtdmd", "teacher_guidance": -2.0},
        {},
        "algorithm.teacher_guidance: -2.0",
        "1 is no",
    ),
    "a student as its teacher": (
        {"name": "opd", "teacher_guidance": 1.0},
        {},
        "algorithm.teacher_guidance: 1 is the student's own",
        "valid: 4.5, or another model.reference",
    ),
    "the same of guided ones": (
        {"name": "opd", "teacher_guidance": 2.0},
        {"model": {"guidance": 2.0, "reference": "start"}},
        "algorithm.teacher_guidance: 2 is the student's own",
        "valid: 4.5, or another model.reference",
    ),
    "no such teacher": ({"name": "opd"}, {"model": {"reference": "nowhere"}}, "model.reference: 'nowhere' is no", ""),
    "no such teacher of a fake score": (
        {"name": "dmd2"},
        {"model": {"reference": "nowhere"}},
        "model.reference: 'nowhere' is no",
        "",
    ),
    # ----------------------------------------------------------------------------------------------------- the rewards
    "GDMD without a reward": ({"name": "gdmd"}, {"rewards": []}, "rewards: [] leaves nothing", "[{name: shapes}]"),
    "of weight 0": ({"name": "gdmd"}, {"rewards": [{"weight": 0.0}]}, "rewards: all weights are 0", "weight of 1.0"),
    "for a while": (
        {"name": "gdmd"},
        {"rewards": [{"schedule": {0: -1.0, 2: 1.0}}]},
        "rewards.0.schedule: all weights are 0 in iteration 1",
        "0.01",
    ),
    "neither term": (
        {"name": "gdmd", "matching_weight": 0.0, "reward_weight": 0.0},
        {},
        "algorithm.matching_weight, reward_weight: 0 and 0",
        "1.0 and 1.0",
    ),
    "nothing beside a gate": (
        {"name": "rats", "weight": 0.0, "reward_term": "none"},
        {},
        "algorithm.weight: 0 beside no reward's term",
        "valid: 1.0",
    ),
    "nobody to compare with": ({"name": "rats", "noises": 1}, {}, "algorithm.noises: 1 must be at least 2", "valid: 2"),
    "credit of a rollout": (
        {"name": "gdmd"},
        {"composition": {"how": "normalised"}},
        "composition.how: 'normalised', but gdmd",
        "valid: 'sum'",
    ),
    "no gradients": ({"name": "draft"}, {}, "rewards.0.name: 'shapes' is not differentiable", ABLE),
    "none of the strict one": (
        {"name": "refl"},
        {"rewards": [VERIFIER]},
        "rewards.0.name: 'shapes_strict' is not differentiable",
        ABLE,
    ),
    "none of the second": (
        {"name": "srpo"},
        {"rewards": [SCORER, VERIFIER]},
        "rewards.1.name: 'shapes_strict' is not differentiable",
        ABLE,
    ),
    "none through a gate": (
        {"name": "draft"},
        {"rewards": [{**SCORER, "at_least": 0.5}]},
        "rewards.0.at_least: 0.5, and draft",
        "valid: null",
    ),
}


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*given: object) -> None:
        raise AssertionError("weights are read")

    for name in ("prepare", "prepare_model"):
        monkeypatch.setattr(trainer, name, loads)


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_one_line_before_anything_is_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_loads: None
) -> None:
    algorithm, others, said, nearest = REFUSED[kind]
    monkeypatch.chdir(tmp_path)
    given = {"name": "bad", "iterations": 3, "algorithm": algorithm, **others}
    Path("bad.yaml").write_text(yaml.safe_dump(given))
    assert main(["train", "bad.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f" {said}" in line and nearest in line, line
    try:
        parse_config(given)
    except ConfigError as fault:
        assert str(fault).startswith(said) and line.endswith(str(fault))


def test_a_second_reward_of_weight_0_needs_no_gradients(nothing_loads: None, tmp_path: Path) -> None:
    given = {"name": "fine", "iterations": 1, "output": str(tmp_path / "run"), "algorithm": {"name": "draft"}}
    with pytest.raises(AssertionError, match="weights are read"):
        tempflow.train(parse_config({**given, "rewards": [SCORER, {**VERIFIER, "weight": 0.0}]}), quiet=True)


def test_a_number_of_updates_that_plays_no_part_is_said(
    nothing_loads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"optimizer": {"updates_per_iteration": 4}, "output": str(tmp_path / "run"), "name": "x", "iterations": 1}
    for name, heard in (("gdmd", True), ("rtdmd", False), ("v_grpo", False)):
        with pytest.raises(AssertionError, match="weights are read"):
            tempflow.train(parse_config({**asked, "algorithm": {"name": name}}))
        assert ("updates_per_iteration 4 plays no part: gdmd" in " ".join(capsys.readouterr().out.split())) == heard


def test_a_later_stage_s_teacher_is_looked_for_before_the_first_begins(
    nothing_loads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opd = {"name": "b", "algorithm": {"name": "opd"}, "model": {"reference": "nowhere"}}
    stages = [{"name": "a", "algorithm": {"name": "segment_matching"}}, opd]
    Path("bad.yaml").write_text(yaml.safe_dump({"name": "bad", "iterations": 1, "stages": stages}))
    assert main(["train", "bad.yaml"]) == 2
    assert " stages.1.model.reference: 'nowhere' is no" in capsys.readouterr().err
    assert not list(Path("runs").glob("*/1-*/metrics.jsonl"))
