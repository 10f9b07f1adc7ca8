"""The untrained model's test, taken over from another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake import PROMPTS, Fake, brightness

from tempflow.config import Config, parse_config
from tempflow.recipes import RECIPES
from tempflow.train import trainer
from tempflow.train.checkpoint import CheckpointError
from tempflow.train.records import Run
from tempflow.train.state import run_baseline
from tempflow.train.trainer import train


def tiny(output: Path, *, before: str = "", seed: int = 0, **evaluation: Any) -> Config:
    whole = RECIPES["shapes_flow"]().model_dump()
    whole |= {"iterations": 1, "output": str(output), "threads": 1, "seed": seed}
    whole["model"] |= {"dtype": "float32"}
    whole["algorithm"] |= {"group": 3, "steps": 2}
    whole["data"] |= {"prompts_per_iteration": 2}
    whole["evaluation"] |= {"validation_prompts": 2, "test_prompts": 3, "steps": 2, "every": 0, "before": before}
    whole["evaluation"] |= evaluation
    return parse_config(whole)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(tmp_path_factory.mktemp("borrow") / "first"), quiet=True)


def written(run: Run, name: str) -> Any:
    return json.loads((run.folder / name).read_text())


def test_a_borrowed_test_is_the_one_it_would_have_made(
    first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train(tiny(tmp_path / "alone", seed=5), quiet=True)
    looked = list[bool]()
    look = trainer.Evaluator.evaluate

    def seen(*args: Any, training: bool) -> Any:
        looked.append(training)
        return look(*args, training=training)

    monkeypatch.setattr(trainer.Evaluator, "evaluate", seen)
    mine = train(tiny(tmp_path / "mine", seed=5, before=str(first.folder)), quiet=True)
    assert all(looked) and looked  # never untrained
    assert written(mine, "samples.json") == written(alone, "samples.json")
    told, want = written(mine, "summary.json"), written(alone, "summary.json")
    assert {k: v for k, v in told.items() if k != "seconds"} == {k: v for k, v in want.items() if k != "seconds"}
    for name in ("before_after.png", "evaluation.jsonl", "metrics.jsonl"):
        assert (mine.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_run_that_borrowed_can_be_borrowed_from_and_resumed_without_the_lender(first: Run, tmp_path: Path) -> None:
    lender = tmp_path / "lender"
    shutil.copytree(first.folder, lender)
    config = tiny(tmp_path / "mine", before=str(lender))
    mine = train(config, quiet=True)
    shutil.rmtree(lender)
    again = train(config.replace(iterations=2), resume=True, allow_changes=True, quiet=True)
    assert again.before.scores.value.equal(mine.before.scores.value)
    one, other = (run_baseline(tiny(tmp_path, before=str(run.folder))) for run in (mine, first))
    assert one.grid.equal(other.grid) and one.before.scores.value.equal(other.before.scores.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"test_prompts": 4}}, r"evaluation.test_prompts: 3 → 4"),
        ({"evaluation": {"seed": 4}}, "evaluation.seed: 4321 → 4"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype: 'float32' → 'bfloat16'"),
        ({"model": {"start": "elsewhere"}}, "model.start: '' → 'elsewhere'"),
        ({"data": {"test": "shapes:validation"}}, "data.test: 'shapes:test' → 'shapes:validation'"),
        ({"rewards": [{"name": "shapes_strict"}]}, "rewards: "),
    ],
)
def test_a_run_that_was_set_otherwise_is_refused_before_any_work(
    first: Run, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "prepare_model", None)
    whole = yaml.safe_load(yaml.safe_dump(tiny(tmp_path / "run", before=str(first.folder)).model_dump(mode="json")))
    for name, value in changes.items():
        whole[name] = whole[name] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=rf"evaluation.before: the run in .* was set otherwise: .*{message}"):
        train(parse_config(whole), quiet=True)


def test_what_training_alone_depends_on_may_differ(first: Run, tmp_path: Path) -> None:
    whole = tiny(tmp_path / "run", before=str(first.folder), every=7).model_dump(mode="json")
    whole["model"] |= {"training": "lora", "lora_rank": 4, "reference": "start"}
    whole |= {"algorithm": {"name": "diffusion_nft"}, "seed": 9, "iterations": 3}
    whole["optimizer"] |= {"learning_rate": 1e-3}
    assert run_baseline(parse_config(whole)).before.scores.value.equal(first.before.scores.value)


def test_without_a_checkpoint_or_with_objects_it_is_refused(first: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none"):
        train(tiny(tmp_path / "run", before=str(tmp_path / "none")), quiet=True)
    config = tiny(tmp_path / "run", before=str(first.folder))
    with pytest.raises(ValueError, match=r"evaluation.before: .* given as objects cannot be"):
        train(config, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
