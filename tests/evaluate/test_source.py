"""What `tempflow eval` may be given; a run's evaluation is the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tempflow.cli.judge import EvalOptions, chosen, run_eval
from tempflow.config import Config, ScorerConfig, to_yaml
from tempflow.evaluate.source import Settings, Source, check_rewards, find, settings
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.lora import LORA_FILE
from tempflow.recipes.shapes import shapes_flow
from tempflow.train.trainer import Run, train


def tiny(output: Path, **model: Any) -> Config:
    """A run of the least size that unlearns, which one update manages for sure; shapes_strict is no reward of it."""
    given = shapes_flow().model_dump()
    given["algorithm"] |= {"group": 3, "steps": 3}
    given["rewards"] = [{"name": "shapes", "weight": -1.0}]
    given["data"] |= {"prompts_per_iteration": 2}
    given["model"] |= {"training": "full", "lora_rank": 4, "lora_alpha": 8, **model}
    given["optimizer"] |= {
        "learning_rate": 0.01 if model.get("training") == "full" else 0.2,
        "warmup_iterations": 0,
        "ema_decay": 0.0,
    }
    given["evaluation"] |= {"every": 0, "validation_prompts": 6, "test_prompts": 12, "steps": 3, "seed": 77}
    given["evaluation"] |= {"metric": "reward", "gold": ("shapes_strict",), "yardstick": (), "guidance": 1.5}
    return Config.model_validate({**given, "iterations": 1, "output": str(output), "threads": 1, "rollout_rows": 7})


# -------------------------------------------------------------------------------------------------------------- a run
@pytest.mark.parametrize(
    "training,dtype",
    [
        ("full", "float32"),
        ("lora", "bfloat16"),
        pytest.param("full", "bfloat16", marks=pytest.mark.slow),
        pytest.param("lora", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_runs_evaluation_is_its_own(tmp_path: Path, training: str, dtype: str) -> None:
    config = tiny(tmp_path / "run", training=training, dtype=dtype)
    run: Run = train(config, quiet=True)
    summary = json.loads((run.folder / "summary.json").read_text())
    samples = json.loads((run.folder / "samples.json").read_text())
    assert run.best_iteration == 1 and samples["shapes"][0] != samples["shapes"][1]
    report = run_eval(EvalOptions(what=str(run.folder)))
    told = report.to_json()
    assert told["mean"] == summary["after"]["mean"] and told["by_kind"] == summary["after"]["by_kind"]
    assert {n: report.values(n).tolist() for n in report.scores.names} == {
        n: after for n, (_, after) in samples.items()
    }
    assert (told["count"], told["steps"], told["guidance"], told["seed"]) == (12, 3, 1.5, 77)
    assert report.gold == ("shapes_strict",) and report.scores.names == ("shapes", "shapes_strict", "reward")


def test_a_peft_folder_is_evaluated(tmp_path: Path) -> None:
    """As flow_grpo and DiffusionNFT write them; a pickled one is told what to do."""
    lora = tmp_path / "checkpoint-9" / "lora"
    lora.mkdir(parents=True)
    name, width = (
        "base_model.model.transformer_blocks.0.attn.to_q",
        load("shapes").network.config.caption_projection_dim,
    )
    tensors = {f"{name}.lora_A.weight": torch.ones(4, width), f"{name}.lora_B.weight": torch.ones(width, 4)}
    save_file(tensors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    options = {"count": 2, "steps": 1, "rewards": ("jpeg_compressibility",)}
    changed = run_eval(EvalOptions(what=str(lora), base="shapes", **options))
    plain = run_eval(EvalOptions(what="shapes", **options))
    assert changed.values("jpeg_compressibility").tolist() != plain.values("jpeg_compressibility").tolist()
    with pytest.raises(ValueError, match=f"nearest valid: '{lora}'"):
        find(str(lora.parent), "shapes")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"^lora: '.*adapter_model.bin' is a pickle, .*; only safetensors are read here"
    ):
        find(str(lora), "shapes")


# ---------------------------------------------------------------------------------------------------- folders by hand
def folder(place: Path, *files: str, config: Config | None = None) -> Path:
    for name in files:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, place / name)
        else:
            (place / name).write_text(to_yaml(config) if config and name == "config.yaml" else "{}")
    return place


def run_folder(place: Path, *files: str, **model: Any) -> Path:
    return folder(place, "config.yaml", *files, config=tiny(place, **model))


def test_each_kind_of_source_is_found(tmp_path: Path) -> None:
    pipe = folder(tmp_path / "pipe", "model_index.json", "sd3.safetensors")  # such files lie beside real pipelines too
    full = run_folder(tmp_path / "full", "model/model_index.json")
    lora = run_folder(tmp_path / "lora", f"model/{LORA_FILE}", training="lora", path="some/base", revision="abc")
    lone = folder(tmp_path / "mine", "style.safetensors")
    assert find("shapes") == Source("shapes") and find(str(pipe)) == Source(str(pipe))
    assert find("stabilityai/stable-diffusion-3.5-medium") == Source("stabilityai/stable-diffusion-3.5-medium")
    found = find(str(full))
    assert (found.base, found.lora, found.run) == (str(full / "model"), None, full) and found.config is not None
    assert find(str(full / "model")) == Source(str(full / "model"))
    found = find(str(lora))
    assert (found.base, found.revision, found.lora) == ("some/base", "abc", lora / "model" / LORA_FILE)
    found = find(str(lora), base="shapes")  # the base may have moved; a revision is the old one's
    assert (found.base, found.revision, found.lora) == ("shapes", None, lora / "model" / LORA_FILE)
    assert find(str(lone), base="shapes") == find(str(lone / "style.safetensors"), base="shapes")
    assert find(str(lone), base="shapes") == Source("shapes", lora=lone / "style.safetensors")


WRONG: list[tuple[str, str, str]] = [
    ("runs/fist", "", "'runs/fist' is no pipeline, run or LoRA; nearest valid: 'runs/first'"),
    ("runs", "", "'runs' is no pipeline, run or LoRA; nearest valid: 'runs/"),
    ("shape", "", "'shape' is no pipeline, run or LoRA; nearest valid: 'pipe'"),
    ("empty", "", "'empty' is no pipeline, run or LoRA; nearest valid: 'pipe'"),
    ("runs/first/config.yaml", "", "is no pipeline, run or LoRA; nearest valid: 'runs/first/model'"),
    ("weights.pt", "", "lora: .weights.pt. is a pickle, which may run code when it is read; only safetensors"),
    ("none.safetensors", "", "'none.safetensors' is no file"),
    ("shapes", "shapes", "base: 'shapes' is for a LoRA, and 'shapes' is none; nearest valid: no base"),
    ("runs/first", "shapes", "base: 'shapes' is for a LoRA, and 'runs/first' trained all of it"),
    ("runs/lora/model", "", "base: none given, .* is a LoRA, .* nearest valid: the run's folder, 'runs/lora'"),
    ("mine", "", "base: none given, and 'mine' is a LoRA, which needs one; nearest valid: --base shapes"),
    ("runs/going", "", "'runs/going' is a run without .* it has not finished; nearest valid: its base, 'shapes'"),
    ("broken", "", "broken/config.yaml: name: missing"),
]  # fmt: skip


@pytest.mark.parametrize("what,base,message", WRONG)
def test_anything_else_is_refused_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, base: str, message: str
) -> None:
    run_folder(tmp_path / "runs" / "first", "model/model_index.json")
    run_folder(tmp_path / "runs" / "lora", f"model/{LORA_FILE}", training="lora")
    run_folder(tmp_path / "runs" / "going")
    folder(tmp_path / "pipe", "model_index.json")
    folder(tmp_path / "mine", "style.safetensors")
    folder(tmp_path / "broken", "config.yaml")
    folder(tmp_path, "weights.pt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find(what, base)


# ------------------------------------------------------------------------------------------------------------ settings
def test_a_runs_settings_are_its_tests(tmp_path: Path) -> None:
    config = tiny(tmp_path, dtype="bfloat16", height=64, width=48)
    how = settings(Source("x", run=tmp_path, config=config))
    assert how == Settings(
        prompts="shapes:test", count=12, rewards=(*config.rewards, ScorerConfig(name="shapes_strict")),
        gold=("shapes_strict",), total={"shapes": -1.0}, steps=3,
        guidance=1.5, seed=77, size=Size(64, 48), dtype="bfloat16", device="cpu",
        rows=7, threads=1,
    )  # fmt: skip
    assert settings(Source("shapes")) == Settings()


def names(how: Settings) -> tuple[str, ...]:
    return tuple(scorer.name for scorer in how.rewards)


def test_a_reward_is_named_with_options_or_as_the_run_has_it(tmp_path: Path) -> None:
    plain = chosen(EvalOptions(rewards=("jpeg_compressibility",)), Settings())
    assert plain.rewards == (ScorerConfig(name="jpeg_compressibility"),)
    given = ScorerConfig(name="mine", kind="jpeg_compressibility")
    assert chosen(EvalOptions(rewards=("mine",)), Settings(rewards=(given,))).rewards == (given,)
    for text, said in (
        ("jpeg_compressibility:qualty=3", "rewards: options.qualty: unknown field"),
        ("shape:quality=3", "rewards: 'shape' is no known reward; nearest valid: 'shapes'"),
        ("os:system", "rewards: 'os:system': a configuration names known rewards only"),
    ):
        with pytest.raises(ValueError) as error:
            chosen(EvalOptions(rewards=(text,)), Settings())
        assert str(error.value).startswith(said)


def test_the_command_line_goes_before_the_run(tmp_path: Path) -> None:
    usual = settings(Source("x", run=tmp_path, config=tiny(tmp_path)))
    assert chosen(EvalOptions(), usual) == usual
    how = chosen(EvalOptions(steps=9, seed=0, width=64, dtype="bfloat16", prompts="p.txt", guidance=2.0), usual)
    assert (how.steps, how.seed, how.size, how.dtype, how.prompts, how.guidance) == (
        9,
        0,
        Size(32, 64),
        "bfloat16",
        "p.txt",
        2,
    )
    assert how.count == 12
    how = chosen(EvalOptions(gold=("jpeg_compressibility",)), usual)
    assert names(how) == ("shapes", "shapes_strict", "jpeg_compressibility") and how.total == {"shapes": -1.0}
    assert how.gold == ("shapes_strict", "jpeg_compressibility")
    how = chosen(EvalOptions(rewards=("jpeg_compressibility",)), usual)
    assert how.gold == ("jpeg_compressibility",) and how.total is None  # the sum needs what was trained on
    how = chosen(EvalOptions(rewards=("shapes",), gold=("shapes_strict",)), Settings())
    assert names(how) == ("shapes", "shapes_strict") and how.gold == ("shapes_strict",)
    with pytest.raises(ValueError, match="gold: 'shapes' is what this run trained on"):
        chosen(EvalOptions(gold=("shapes",)), usual)


def test_a_reward_without_a_name_is_named(tmp_path: Path) -> None:
    source = Source("x", run=tmp_path, config=tiny(tmp_path))
    check_rewards(source)  # no summary: an unfinished run
    (tmp_path / "summary.json").write_text(json.dumps({"after": {"mean": {"redness": 1.0, "reward": 1.0}}}))
    with pytest.raises(ValueError, match=r"rewards: this run was scored by 'redness', .* nearest valid: --rewards"):
        check_rewards(source)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="is no run's summary"):
        check_rewards(source)


def test_what_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output: .* is no place for a file; nearest valid: 'x.json'"):
        run_eval(EvalOptions(output=str(tmp_path / "no" / "x.json")))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"pictures: .* is a file; nearest valid"):
        run_eval(EvalOptions(pictures=str(tmp_path / "file")))


def test_figures_and_pictures_are_written(tmp_path: Path) -> None:
    options = EvalOptions(
        count=2, steps=1, samples_per_prompt=2, output=str(tmp_path / "o.json"), pictures=str(tmp_path / "grids")
    )
    report = run_eval(options)
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["what"] == "shapes" and told["mean"] == report.to_json()["mean"] and told["count"] == 4
    assert told["diversity"]["mean"] > 0 and np.isfinite(told["diversity"]["interval"]).all()
    assert (tmp_path / "grids" / "grid.png").stat().st_size > 1000
