"""Whatever is wrong with a command line: one line on the error stream, with the field and the nearest valid value."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempflow import cli
from tempflow.algorithms import ALGORITHMS
from tempflow.cli import VERBS, main
from tempflow.cli.draw import SampleOptions
from tempflow.cli.export import ExportOptions
from tempflow.cli.judge import EvalOptions
from tempflow.cli.parse import configured, runs_of
from tempflow.cli.report import ReportOptions
from tempflow.cli.train import CostOptions, TrainOptions
from tempflow.config import Config, Stages, algorithm_config, load_config, read_config
from tempflow.names import FIELDS, VALUES, cut, likeliest, nearest
from tempflow.recipes import RECIPES
from tempflow.strict import ConfigError, leaves, shown

LONG = "x" * 5000
HUGE = "9" * 5000

FAULTS = [
    # verbs and arguments
    ("trian", "'trian' is no verb", "'train'"),
    ("--seed 3 train", "'--seed' is no verb, and the verb comes first", "`tempflow --help`"),
    (f"{LONG} a", "is no verb", "nearest valid"),
    ("train demo extra", "train demo: 'extra' is one argument too many", "tempflow train demo"),
    ("train demo.yaml", "demo.yaml is no file", "nearest valid: mine.yaml"),
    ("train nowhere/mine.yaml", "nowhere/mine.yaml is no file", "the folder nowhere does not exist either"),
    (f"train {LONG}", "is neither a recipe nor a .yaml file", "nearest valid: "),
    (f"train {LONG}.yaml", "cannot be read (File name too long)", ".yaml"),
    ("train mine", "'mine' is neither a recipe nor a .yaml file", "nearest valid: 'mine.yaml'"),
    ("sample shapes a --prompt x", "sample: 'a' is one argument too many", "tempflow sample shapes"),
    ("sample --path shapes", "--path: no such option", "without a name: tempflow sample PATH"),
    ("algorithms now", "algorithms: 'now' is one argument too many", "tempflow algorithms"),
    ("report", "runs: none given", "a folder that `tempflow train` wrote"),
    ("export", "run: none given", "tempflow export runs/NAME --output FOLDER"),
    ("train --", "--: no such option", "tempflow train --help"),
    ("train -x", "-x: no such option", "tempflow train --help"),
    ("train --helpp", "--helpp: no such option", "tempflow train --help"),
    ("train --frobnicate 3", "--frobnicate: no such option", "tempflow train --help"),
    (f"train --{LONG} 3", "no such option", "tempflow train --help"),
    # options without a value, with two, or given twice
    ("train --iterations", "--iterations: no value is given", "--iterations 100"),
    ("train --iterations --seed 3", "--iterations: no value is given", "--iterations 100"),
    ("train --algorithm.name", "--algorithm.name: no value is given", "--algorithm.name v_grpo"),
    ("train --resume", "--resume: no value is given", "--resume TEXT"),
    ("train --resume=", "--resume: is empty", "--resume TEXT"),
    ("train --name=", "--name: is empty", "--name demo"),
    ("sample --prompt", "--prompt: no value is given", "--prompt TEXT"),
    ("sample --prompt=", "--prompt: is empty", "--prompt TEXT"),
    ("train --seed 3 --seed 4", "--seed: is given twice, 3 and 4", "--seed 4 alone"),
    ("train --model.path a --name x --model.path=b", "--model.path: is given twice, a and b", "--model.path b alone"),
    ("train --allow-changes --allow-changes no", "--allow-changes: is given twice, true and no", ""),
    ("train --threads none --threads 2", "--threads: is given twice, none and 2", "--threads 2 alone"),
    ("train --algorithm.name vipo --algorithm.name rloo", "--algorithm.name: is given twice, vipo and rloo", ""),
    ("train --evaluation.yardstick 1 2 --evaluation.yardstick none", "is given twice, 1 2 and none", ""),
    ("train --rewards.0.weight 2 --rewards [{}]", "--rewards: would take back --rewards.0.weight", "first"),
    ("doctor --json a.json --seed 3 --json=b.json", "--json: is given twice, a.json and b.json", "--json b.json alone"),
    ("train --seed 3 4", "'4' is one argument too many", "tempflow train"),
    ("eval --count 1 --count=2", "--count: is given twice, 1 and 2", "--count 2 alone"),
    ("train --allow-changes", "allow_changes: nothing is resumed", "--resume RUN --allow-changes"),
    ("doctor --json", "json: no file given", "--json doctor.json"),
    # values
    ("train --iterations ten", "iterations: 'ten' is not a whole number", ""),
    ("train --iterations 0", "iterations: 0 must be ≥ 1", "nearest valid: 1"),
    ("train --iterations -3", "iterations: -3 must be ≥ 1", "nearest valid: 1"),
    ("train --threads 0.5", "threads: 0.5 is not a whole number", ""),
    ("train --optimizer.learning-rate -1", "optimizer.learning_rate: -1.0 must be above 0.0", "default is 0.0001"),
    ("train --optimizer.learning-rate nan", "optimizer.learning_rate: nan is not a finite number", "0.0001"),
    ("train --optimizer.learning-rate=-inf", "optimizer.learning_rate: -inf is not a finite number", "0.0001"),
    ("train --optimizer.learning-rate 1e999", "optimizer.learning_rate: inf is not a finite number", "0.0001"),
    ("train --optimizer.learning-rate fast", "optimizer.learning_rate: 'fast' is not a number", "0.0001"),
    ("train --rewards.0.weight nan", "rewards.0.weight: nan is not a finite number", "the default is 1.0"),
    ("train --seed 99999999999999999999", "seed: 99999999999999999999 is too large", "9223372036854775807"),
    (f"train --seed {HUGE}", "seed: '9999", "nearest valid: at most 4,096"),
    ("train --iterations 9999999999", "iterations: 9999999999 must be ≤ 1000000", "nearest valid: 1000000"),
    ("cost --algorithm.steps 1000000", "algorithm.steps: 1000000 must be ≤ 1000", "nearest valid: 1000"),
    ("train --data.prompts-per-iteration 1e3", "data.prompts_per_iteration: 1000.0 is not a whole number", ""),
    ("train --model.height 1000000", "model.height: 1000000 must be ≤ 16384", "nearest valid: 16384"),
    (
        "train shapes_tempflow --algorithm.noise-level 0",
        "algorithm.noise_level: 0.0 must be finite and above 0",
        "0.7 is usual",
    ),
    ("train shapes_tempflow --algorithm.branches 1", "algorithm.branches: 1 must be at least 2", ""),
    ("train --model.dtype fp16", "model.dtype: 'fp16' is not one of auto, float32, bfloat16", "valid: 'float16'"),
    ("train --model.dtype half", "model.dtype: 'half' is not one of", "nearest valid: 'float16'"),
    ("train --model.dtype int8", "model.dtype: 'int8' is not one of", "nearest valid: "),
    ("train --model.dtype fp32", "model.dtype: 'fp32' is not one of", "nearest valid: 'float32'"),
    ("train --model.dtype True", "model.dtype: 'True' is not one of", "nearest valid: "),
    ("eval --dtype fp16", "dtype: 'fp16' is not one of float32, bfloat16", "nearest valid: 'bfloat16'"),
    ("train --model.training peft", "model.training: 'peft' is not one of full, lora", "nearest valid: 'lora'"),
    ("train --device gpu", "device: 'gpu' is no device", "nearest valid: 'cuda'"),
    ("sample --prompt x --device gpu", "device: 'gpu' is no device", "nearest valid: "),
    ("train --algorithm.name tempflow", "algorithm.name: 'tempflow' is no known algorithm", "'tempflow_grpo'"),
    ("train --algorithm.name nft --algorithm.group 3", "algorithm.name: 'nft' is no known", "'diffusion_nft'"),
    ("train --rewards.0.name shap", "rewards.0.name: 'shap' is no known reward", "nearest valid: 'shapes'"),
    ("train --evaluation.gold jpeg", "evaluation.gold: 'jpeg' is no known reward", "nearest valid: "),
    ("train --data.train shapes:trian", "data.train: 'shapes:trian' names no split", "'shapes:train'"),
    ("train --data.test here.txt", "data.test: here.txt is no file", "holds no .txt"),
    (f"train --data.train {LONG}", "data.train: 'xxx", "nearest valid: at most 4,096"),
    ("train --evaluation.before runs/gone", "evaluation.before: 'runs/gone' is no folder", "nearest valid: a run's"),
    ("train --name a/b", "name: 'a/b' names a folder too", "nearest valid: 'a-b'"),
    ("cost leaderboard_flow_cps --algorithm.group 1", "algorithm.group: 1 must be at least 2", ""),
    ("cost --optimizer.updates-per-iteration 99999", "optimizer.updates_per_iteration: 99999", "nearest valid: "),
    ("sample", "prompt: none given", "--prompt 'a red circle', or --prompts shapes:validation"),
    ("sample --prompts missing.txt", "missing.txt is no file", ""),
    ("sample --prompt x --steps 0", "steps: 0 must be ≥ 1", "nearest valid: 1"),
    ("sample --prompt x --guidance 0.5", "guidance: 0.5 must be ≥ 1.0", "nearest valid: 1.0"),
    ("eval --rewards shap", "'shap' is no known reward", "nearest valid: 'shapes'"),
    ("eval --prompts shapes:tset", "'shapes:tset' names no split", "nearest valid: 'shapes:test'"),
    ("eval --count 0", "count: 0 must be ≥ 1", "nearest valid: 1"),
    ("eval --samples-per-prompt 0", "samples_per_prompt: 0 must be ≥ 1", "nearest valid: 1"),
    ("eval --gold shap", "'shap' is no known reward", "nearest valid: 'shapes'"),
    ("eval shape", "'shape' is no pipeline, run or LoRA", "nearest valid: 'shapes'"),
    ("eval style.safetensors --base shapes", "'style.safetensors' is no file", "nearest valid: "),
    ("eval --output nowhere/x.json", "output: 'nowhere/x.json' is no place for a file", "nearest valid: 'x.json'"),
    # what others call it, and what we called it
    ("train --lr 3", "--lr: no such option", "--optimizer.learning-rate"),
    ("train --algorithm.beta 0.1", "--algorithm.beta: no such option", "--algorithm.kl"),
    ("train shapes_tempflow --algorithm.sedes 3", "--algorithm.sedes: no such option", "--algorithm.seeds"),
    (
        "train shapes_tempflow --algorithm.num-generations 8",
        "--algorithm.num-generations: no such",
        "--algorithm.branches",
    ),
    ("train leaderboard_flow_cps --num_generations 8", "--num_generations: no such option", "--algorithm.group"),
    ("train --per_device_train_batch_size 8", "--per_device_train_batch_size: no such option", "--train-rows"),
    ("train --sample.num_steps 8", "--sample.num_steps: no such option", "--algorithm.steps"),
    ("train --train.learning_rate 1", "--train.learning_rate: no such option", "--optimizer.learning-rate"),
    ("train --train.seed 1", "--train.seed: no such option", "--seed"),
    ("train --model shapes", "--model: no such option", "--model.path"),
    ("train --rewards.3.name shap", "--rewards.3.name: no such option", "--rewards.0.name"),
    ("train --optimizer.learning_rate 1", "options are spelled with hyphens", "--optimizer.learning-rate"),
    ("eval --samples_per_prompt 2", "options are spelled with hyphens", "--samples-per-prompt"),
    ("sample --out x", "--out: no such option", "--output"),
    ("eval --out x", "--out: no such option", "--output"),
    ("report a --out x", "--out: no such option", "--output"),
    ("export a --to x", "--to: no such option", "--output"),
    ("sample --guidance-scale 3", "--guidance-scale: no such option", "--guidance"),
    ("sample --num-inference-steps 3", "--num-inference-steps: no such option", "--steps"),
    ("train shapes_demo", "'shapes_demo' is neither a recipe nor a .yaml file", "'shapes_tempflow'"),
    ("train shapes_flow_cps", "'shapes_flow_cps' is neither a recipe nor", "'leaderboard_flow_cps'"),
    ("train vipo", "'vipo' is neither a recipe nor", "'leaderboard_vipo'"),
]


@pytest.mark.parametrize("line,fault,valid", FAULTS, ids=[f"{n}: {line[:40]}" for n, (line, *_) in enumerate(FAULTS)])
def test_a_fault_is_one_line_that_names_the_field_and_the_nearest_valid_value(
    monkeypatch, tmp_path, capsys, line, fault, valid
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    status = main(line.split(" "))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and fault in err and valid in err
    assert err.startswith("tempflow: ") and err.count("\n") == 1 and err.endswith("\n")
    assert len(err) <= 300 and "Traceback" not in err
    assert len(list(tmp_path.iterdir())) == 1  # nothing is written


def test_a_plan_of_any_size_is_refused_before_it_is_grown(monkeypatch, capsys):
    monkeypatch.setattr("tempflow.core.plan.MAX_EDGES", 10_000)
    assert main(["cost", "shapes_tempflow", "--algorithm.seeds", "999", "--algorithm.branches", "999"]) == 2
    err = capsys.readouterr().err
    told = "algorithm.steps: 6 would give a prompt more than 10000 edges, by step 0; nearest valid: fewer steps or"
    assert told in err


DEVICES = [("train", "--device"), ("eval", "--device"), ("sample --prompt x", "--device")]


@pytest.mark.parametrize("verb,flag", DEVICES)
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_here(monkeypatch, tmp_path, capsys, verb, flag, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main([*verb.split(), flag, device]) == 2
    err = capsys.readouterr().err
    assert f"device: {device!r}, but torch sees no" in err and "nearest valid: 'cpu'" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- file and options
LEAST = "name: mine\nalgorithm: {name: flow_grpo, steps: 4}\n"


def test_file_and_options_are_one_configuration(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(LEAST)
    made = configured("train", [str(file), "--iterations", "5", "--algorithm.group", "3", "--name", "other"])
    assert (made.iterations, made.name, made.output) == (5, "other", "runs/other")
    assert dict(made.algorithm)["group"] == 3 and dict(made.algorithm)["steps"] == 4
    file.write_text("name: mine\niterations: 3\n")
    assert configured("train", [str(file), "--algorithm.name", "flow_grpo", "--algorithm.group", "3"]).iterations == 3
    file.write_text(LEAST + "iterations: 0\nrewards: [{name: shapes}]\n")  # an option mends what the file has wrong
    made = configured("train", [str(file), "--iterations", "5", "--rewards.1.name", "shapes_strict"])
    assert made.iterations == 5 and made.reward_weights == {"shapes": 1.0, "shapes_strict": 1.0}


SOURCES = [
    (LEAST, "", "{file}: iterations: missing; it has no default"),
    (LEAST, "--iterations 0", "command line: iterations: 0 must be ≥ 1; nearest valid: 1"),
    (LEAST + "seed: x\n", "--iterations 3", "{file}: seed: 'x' is not a whole number"),
    (LEAST + "model: 3\n", "--iterations 3", "{file}: model: 3 is not a mapping of fields"),
    (LEAST + "model: 3\n", "--iterations 3 --model.path x", "command line: model: 3 is not a mapping of fields"),
    (LEAST + "lr: 3\n", "--iterations 3", "{file}: lr: unknown field; did you mean 'optimizer.learning_rate'?"),
    (LEAST + "learning-rate: 3\n", "--iterations 3", "did you mean 'optimizer.learning_rate'?"),
    (LEAST + "optimizer: {learning-rate: 3}\n", "--iterations 3", "did you mean 'learning_rate'?"),
    (LEAST + "train: {beta: 3}\n", "--iterations 3", "{file}: train: unknown field; "),
    (
        "algorithm: {name: flow, kl: 3}\n",
        "",
        "{file}: algorithm.name: 'flow' is no known algorithm; nearest valid: 'flow",
    ),
    (LEAST, "--iterations 3 --algorithm.name flow", "command line: algorithm.name: 'flow' is no known algorithm"),
    ("algorithm: {name: flow_grpo, beta: 3}\nname: x\niterations: 3\n", "", "did you mean 'kl'?"),
    ("algorithm: {name: flow_grpo, num_generations: 3}\nname: x\niterations: 3\n", "", "did you mean 'group'?"),
    ("algorithm: {name: tempflow_grpo, num_generations: 3}\nname: x\niterations: 3\n", "", "did you mean 'branches'?"),
]


def test_a_recipe_or_a_file_may_stand_behind_options(tmp_path):
    (tmp_path / "mine.yaml").write_text(LEAST + "iterations: 3\n")
    assert configured("train", ["--seed", "3", str(tmp_path / "mine.yaml"), "--threads", "1"]).seed == 3
    assert configured("train", ["--seed=3", "shapes_flow", "--evaluation.gold", "jpeg_compressibility"]).seed == 3


@pytest.mark.parametrize("text,options,message", SOURCES)
def test_a_fault_names_its_source(tmp_path, capsys, text, options, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["cost", str(tmp_path / "mine.yaml"), *options.split()]) == 2
    err = capsys.readouterr().err
    assert message.format(file=cut(str(tmp_path / "mine.yaml"), 160)) in err and err.count("\n") == 1


def test_many_faults_are_a_line_each_and_not_too_many(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(LEAST + "".join(f"wrong{n}: 3\n" for n in range(60)))
    assert main(["cost", str(tmp_path / "mine.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and "and 41 more" in lines[-1]


# --------------------------------------------------------------------------------------------------- hostile files
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [
    (BOMB + LEAST + "iterations: *i\n", "holds more than 10,000 values"),
    ("name: &n [*n]\n", "holds more than 10,000 values"),
    ("a: &a {b: *a}\n", "holds more than 10,000 values"),
    ("a: " + "[" * 4000 + "]" * 4000, "is nested deeper than 20"),
    ("x: " + "[" * 30 + "]" * 30, "is nested deeper than 20"),
    (f"name: {LONG}\niterations: 1\n", "has 5,000 characters"),
    (f"seed: {HUGE}\n", "is not YAML: Exceeds the limit"),
    ("seed: 99999999999999999999999\n", "seed: 99999999999999999999999 is too large"),
    ("seed: 2026-13-45\n", "is not YAML: month must be in 1..12"),
    ("\n".join(f"k{n}: 1" for n in range(12_000)), "holds more than 10,000 values"),
    ("name: !!python/object/apply:os.system ['true']\n", "is not YAML: could not determine a constructor"),
    ("{[1, 2]: 3}\n", "is not YAML: while constructing a mapping"),
    ("name: x\x00y\n", "is not YAML: unacceptable character"),
]


@pytest.mark.parametrize("text,message", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_refused_in_one_short_line(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["cost", str(tmp_path / "c.yaml")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and len(err) <= cli.LINE and "c.yaml" in err


def test_a_bomb_in_a_known_field_is_neither_unfolded_nor_printed(tmp_path):
    small = "name: x\niterations: 1\nalgorithm: {name: flow_grpo, group: [&a [1, 2, 3, 4, 5, 6], *a, *a, *a, *a, *a]}\n"
    (tmp_path / "c.yaml").write_text(small)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert "algorithm.group: [[" in str(caught.value) and "..." in str(caught.value) and len(str(caught.value)) < 250


def test_aliases_and_merges_within_reason_stay(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")
    assert read_config(tmp_path / "c.yaml") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


# ------------------------------------------------------------------------------------------------------------ names
OPTIONS = (SampleOptions, EvalOptions, ReportOptions, ExportOptions, TrainOptions, CostOptions)


def every_field() -> set[str]:
    """All paths that a name may lead to, whatever the algorithm."""
    found = {path for name in ALGORITHMS for path in leaves(Config, {"algorithm": {"name": name}})}
    return found.union(*(leaves(model) for model in OPTIONS))


def test_every_name_of_the_table_leads_to_a_field():
    fields = every_field()
    wrong = {name: target for name, targets in FIELDS.items() for target in targets if target not in fields}
    assert not wrong
    assert not [name for name in FIELDS if name in fields - {"model.path"} and "." in name]


def test_every_value_of_the_table_is_valid_somewhere():
    models = [Config, *OPTIONS, *map(algorithm_config, ALGORITHMS)]
    choices = " ".join(str(field.annotation) for model in models for field in leaves(model).values())
    known = {*ALGORITHMS, *RECIPES, "cuda", "cuda:0", "mps"}
    targets = {target for targets in VALUES.values() for target in targets} - known
    assert not [target for target in targets if f"'{target}'" not in choices]


KNOWN = {
    "beta": "algorithm.kl", "num_generations": "algorithm.group", "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate", "num_train_epochs": "iterations", "max_steps": "iterations",
    "per_device_train_batch_size": "train_rows", "gradient_accumulation_steps": "train_rows",
    "cfg_scale": "model.guidance", "guidance_scale": "model.guidance", "num_inference_steps": "algorithm.steps",
    "clip_range": "algorithm.clip", "epsilon": "algorithm.clip", "adv_clip_max": "algorithm.advantage_clip",
    "num_image_per_prompt": "algorithm.group", "lora_rank": "model.lora_rank", "lora_alpha": "model.lora_alpha",
    "mixed_precision": "model.dtype", "output_dir": "output", "resolution": "model.height",
    "num_steps": "algorithm.steps", "noise_level": "algorithm.noise_level", "sample.num_steps": "algorithm.steps",
    "sample.guidance_scale": "model.guidance", "sample.noise_level": "algorithm.noise_level",
    "train.learning_rate": "optimizer.learning_rate", "train.beta": "algorithm.kl", 
    "train.clip_range": "algorithm.clip",
    "train.adv_clip_max": "algorithm.advantage_clip", "sample.num_image_per_prompt": "algorithm.group",
    "train.ema": "optimizer.ema_decay", "train.num_inner_epochs": "optimizer.updates_per_iteration",
    "pretrained.model": "model.path", "eval_num_steps": "evaluation.steps", "save_freq": "checkpoint.every",
    "sample.seed": "seed", "train.seed": "seed", "config.seed": "seed",
    "train_max_grad_norm": "optimizer.max_grad_norm",
    "weight_decay": "optimizer.weight_decay", "use_lora": "model.training", "optimizer.lr": "optimizer.learning_rate",
    "model.seed": "seed", "Learning-Rate": "optimizer.learning_rate", "modle.path": "model.path",
    "optimizer.betas": "optimizer.beta1", "iteration": "iterations", "evaluation.evry": "evaluation.every",
    "model.lr": "optimizer.learning_rate", "guards.kl.treshold": None, "zzz": None,
}  # fmt: skip


@pytest.mark.parametrize("name,field", KNOWN.items())
def test_names_that_people_know_lead_to_ours(name, field):
    assert likeliest(name, list(leaves(Config, {"algorithm": {"name": "flow_grpo"}}))) == field


def test_long_names_and_values_cost_nothing():
    assert likeliest("x" * 10**6, ["steps"]) is None and nearest("y" * 10**6, ["a", "b"]) in ("'a'", "'b'")
    assert nearest("fp16", ["float32", "bfloat16"]) == "'bfloat16'" and nearest("x", []) == "none"


def test_values_are_shown_on_a_screen_line():
    bomb: list = ["x"]
    for _ in range(40):
        bomb = [bomb] * 10
    for value in (bomb, "a\nb" * 10**6, 10**5000, {"k" * 500: "v" * 500}, object()):
        assert len(shown(value)) <= 80 and "\n" not in shown(value)
    assert shown("short") == "'short'" and cut("a  b\nc") == "a b c"
    assert cut("x" * 50 + "end", 20).endswith("xend") and len(cut("x" * 10**6, 20)) == 20


# ------------------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe_shows_its_algorithm_s_fields(capsys, recipe):
    assert main(["train", recipe, "--help"]) == 0
    out, err = capsys.readouterr()
    made = RECIPES[recipe]()
    for number, (_, run) in enumerate(runs_of(made)):
        of = f"--stages.{number}." if isinstance(made, Stages) else "--"
        for field in algorithm_config(run.algorithm.name).model_fields:
            assert f"{of}algorithm.{field} ".replace("_", "-") in out
    assert not err and max(map(len, out.splitlines())) <= 120


def test_help_over_a_file_that_is_not_whole(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(LEAST)
    assert main(["train", str(tmp_path / "mine.yaml"), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--algorithm.std-group" not in out and "sampler steps of a rollout" in out and "(4)" in out
    assert main(["train", str(tmp_path / "mine.yaml"), "--algorithm.name", "tempflow_grpo", "-h"]) == 0
    assert "--algorithm.std-group" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tempflow 0.")


# ------------------------------------------------------------------------------------------------- whatever happens
def failing(monkeypatch, error: BaseException) -> None:
    def raises(args):
        raise error

    monkeypatch.setattr(cli, "_verb", lambda name: raises)


@pytest.mark.parametrize(
    "error,status,line",
    [
        (KeyError("x"), 1, "KeyError: 'x' (traceback in "),
        (RuntimeError("a\nb"), 1, "RuntimeError: a b (traceback in "),
        (RecursionError(), 1, "RecursionError: RecursionError (traceback in "),
        (MemoryError(), 1, "MemoryError: MemoryError (traceback in "),
        (AssertionError(LONG), 1, "AssertionError: xxxx"),
        (ValueError("a\nb"), 2, "a b"),
        (ValueError(LONG), 2, "xxx"),
        (OSError("model_index.json is broken"), 2, "model_index.json is broken"),
        (OSError(28, "No space left on device", "runs/a"), 1, "runs/a: No space left on device"),
        (PermissionError(13, "Permission denied"), 2, "Permission denied"),
        (ModuleNotFoundError("No module named 'cv2'"), 2, "No module named 'cv2'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (GeneratorExit(), 1, "GeneratorExit"),
    ],
)
def test_whatever_is_raised_is_one_line(monkeypatch, tmp_path, capsys, error, status, line):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(monkeypatch, error)
    assert main(["train"]) == status
    err = capsys.readouterr().err
    assert err.startswith(f"tempflow: {line}") and err.count("\n") == 1 and len(err) <= cli.LINE
    kept = list(tmp_path.iterdir())
    assert len(kept) == ("traceback in" in err) and all("Traceback" in file.read_text() for file in kept)


@pytest.mark.parametrize("how", ["--traceback", "variable"])
def test_a_traceback_on_demand(monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv(cli.TRACEBACK, "1")
    failing(monkeypatch, ConfigError("x"))
    with pytest.raises(ConfigError):
        main(["train", "nothing"] + ["--traceback"] * (how != "variable"))


def test_a_reader_that_has_gone_is_no_fault(monkeypatch, capsys):
    failing(monkeypatch, BrokenPipeError())
    assert main(["train"]) == 0 and capsys.readouterr().err == ""


def test_streams_that_are_closed_or_narrow(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["algorithms"]) == 0  # σ and × are written as escapes
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["trian"]) == 2 and main(["recipes"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_behind_the_output():
    code = "import sys; from tempflow.cli import main; sys.exit(main(['--help']))"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "tempflow: No space left on device\n")


def test_an_output_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    from tempflow.evaluate import suite

    def full(*args, **options):
        raise OSError(28, os.strerror(28), "samples/000.png")

    monkeypatch.setattr(suite, "sample_path", full)
    assert main(["sample", "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "tempflow: output: 'samples' cannot be written (No space left on device)\n"


def test_every_verb_s_own_options_have_help(capsys):
    for verb in VERBS:
        assert main([verb, "-h"]) == 0
        assert "_" not in "".join(w for w in capsys.readouterr().out.split() if w.startswith("--") and "|" not in w)
