"""Stages: how they are configured, run, gone on with and shown."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake import PROMPTS, Fake, brightness, same, weights

import tempflow
from tempflow import stages as room
from tempflow.cli import main
from tempflow.cli.parse import configured
from tempflow.config import Config, Stages, load_config, load_stages, parse_recipe, parse_stages, to_yaml
from tempflow.recipes import RECIPES
from tempflow.stages import train
from tempflow.strict import ConfigError
from tempflow.train import build
from tempflow.train.checkpoint import CheckpointError, best_weights
from tempflow.train.trainer import Run, Trainer

TREE: dict[str, Any] = {
    "name": "two",
    "threads": 1,
    "algorithm": {"name": "rejection_sft", "steps": 4, "group": 4, "best": 1, "pairs": 2},
    "model": {"height": 2, "width": 2},
    "data": {"prompts_per_iteration": 3},
    "rewards": [{"name": "shapes"}, {"name": "shapes_strict"}],
    "optimizer": {"learning_rate": 0.05, "warmup_iterations": 1},
    "evaluation": {"every": 1, "validation_prompts": 6, "test_prompts": 6, "steps": 4},
    "stages": [
        {"name": "warm", "iterations": 3},
        {
            "name": "nft",
            "iterations": 3,
            "algorithm": {"name": "diffusion_nft", "steps": 4, "group": 4},
            "optimizer": {"learning_rate": 0.02},
        },
    ],
}
"""A warm-up and what follows it, as small as they come; on the fake generator of the training room's tests."""


def tree(**changes: Any) -> dict[str, Any]:
    """A copy, with other shared fields; a dotted one through `stages` is written with "__"."""
    made = copy.deepcopy(TREE)
    for path, value in changes.items():
        *above, last = path.split("__")
        inside: Any = made
        for part in above:
            inside = inside[int(part)] if part.isdigit() else inside.setdefault(part, {})
        inside[last] = value
    return made


def told(given: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(given)
    return str(caught.value).splitlines()


# ----------------------------------------------------------------------------------------------------------- configured
def test_a_stage_is_laid_over_what_all_share() -> None:
    made = parse_stages(tree(output="here", seed=7, stages__1__rewards=[{"name": "shapes", "weight": 2.0}]))
    warm, nft = made.runs
    assert [run.name for run in made.runs] == ["two-warm", "two-nft"] and made.titles == ("warm", "nft")
    assert [run.output for run in made.runs] == ["here/1-warm", "here/2-nft"]
    assert warm.optimizer.learning_rate == 0.05 and nft.optimizer.learning_rate == 0.02
    assert nft.optimizer.warmup_iterations == 1 and {run.seed for run in made.runs} == {7}  # merged, and shared
    assert len(warm.rewards) == 2 and [r.weight for r in nft.rewards] == [2.0]  # lists replace
    assert (warm.model.start, nft.model.start) == ("", "here/1-warm")
    assert {run.model.reference for run in made.runs} == {"base"}


def test_parameters_of_one_algorithm_do_not_reach_another() -> None:
    warm, nft = parse_stages(tree()).runs
    assert warm.algorithm.model_dump()["best"] == 1
    assert nft.algorithm.name == "diffusion_nft" and "best" not in nft.algorithm.model_dump()
    same_name = {"name": "rejection_sft", "pairs": 3}
    for own in (same_name, {"pairs": 3}):  # named or not, it is the same one: merged
        algorithm = parse_stages(tree(stages__1__algorithm=own)).runs[1].algorithm.model_dump()
        assert algorithm["group"] == 4 and algorithm["pairs"] == 3


def test_what_looks_at_the_untrained_model_is_the_first_stages(tmp_path: Path) -> None:
    shared = {**TREE["evaluation"], "before": str(tmp_path), "yardstick": [1.0, 2.0]}
    warm, nft = parse_stages(tree(evaluation=shared, model={"start": "lora.safetensors"})).runs
    assert (warm.evaluation.before, warm.evaluation.yardstick) == (str(tmp_path), (1.0, 2.0))
    assert (nft.evaluation.before, nft.evaluation.yardstick) == ("", ())
    assert (warm.model.start, nft.model.start) == ("lora.safetensors", "runs/two/1-warm")


def test_a_stages_weights_carry_the_grid_of_the_one_before() -> None:
    grids = [run.model.grid for run in parse_stages(tree(stages__0__model={"grid": "useful"})).runs]
    assert grids == ["useful", "useful"]
    own = tree(stages__0__model={"grid": "useful"}, stages__1__model={"grid": "scheduler"})
    assert [run.model.grid for run in parse_stages(own).runs] == ["useful", "scheduler"]
    points = told(tree(stages__0__model={"grid": [1.0, 0.75, 0.5, 0.25]}, stages__1__algorithm__steps=3))
    assert points[0].startswith("stages.1.") and "3" in points[0]


def souped(**changes: Any) -> dict[str, Any]:
    """A warm-up, a second one apart from it, and what starts from the mean of both."""
    warm, nft = copy.deepcopy(TREE["stages"])
    stages = [warm, {**warm, "name": "apart", "from": [], "seed": 1}, {**nft, "from": ["warm", "apart"]}]
    return tree(**{"stages": stages, **changes})


def test_a_stage_may_start_from_others_than_the_one_before() -> None:
    made = parse_stages(souped(output="here", model__start="lora", evaluation__before="x", evaluation__yardstick=[2.0]))
    assert [run.model.start for run in made.runs] == ["lora", "lora", ("here/1-warm", "here/2-apart")]
    assert [run.evaluation.before for run in made.runs] == ["x", "x", ""]  # of the untrained model
    assert parse_stages(souped(stages__2__from=["warm"])).runs[2].model.start == "runs/two/1-warm"
    assert parse_stages(made.replace(seed=3).tree).runs[2].model.starts == ("here/1-warm", "here/2-apart")
    grids = souped(stages__0__model={"grid": "useful"}, stages__1__model={"grid": "useful"})
    assert [run.model.grid for run in parse_stages(grids).runs] == ["useful"] * 3
    grids["stages"][1]["model"] = {"grid": "scheduler"}
    (line,) = told(grids)
    assert line.startswith("stages.2.model.grid: 'apart' walks 'scheduler', the first of them 'useful'")
    assert [run.model.grid for run in parse_stages(souped(stages__2__model={"grid": "useful"})).runs][2] == "useful"


def test_yaml_and_replacing(tmp_path: Path) -> None:
    made = parse_stages(tree())
    file = tmp_path / "two.yaml"
    file.write_text(to_yaml(made))
    assert load_stages(file) == made == tempflow.load_stages(file) and yaml.safe_load(file.read_text()) == TREE
    assert made.output == "runs/two" and made.replace(name="mine").output == "runs/mine"
    assert made.replace(output="x").runs[1].model.start == "x/1-warm"
    assert isinstance(parse_recipe({k: v for k, v in TREE.items() if k != "stages"} | {"iterations": 1}), Config)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stages__1__optimizer__learning_rte": 1.0}, "stages.1.optimizer.learning_rte: unknown field; did you mean"),
        ({"stages__1__optimizer__learning_rate": -1.0}, "stages.1.optimizer.learning_rate: -1.0 must be above 0.0"),
        ({"stages__1__algorithm__best": 2}, "stages.1.algorithm.best: unknown field"),
        ({"stages__0__iterations": 0}, "stages.0.iterations: 0 must be ≥ 1"),
        ({"stages__1__algorithm": {"name": "nope"}}, "stages.1.algorithm.name: 'nope' is no known algorithm"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),  # every stage's, told once
        ({"optimizer__learning_rate": -1.0}, "stages.0.optimizer.learning_rate: -1.0 must be above"),
        ({"name": "a b"}, "name: 'a b' names a folder too"),
        ({"stages__0__name": "a b"}, "stages.0.name: 'a b' names a folder too"),
        ({"stages__0__name": "nft"}, "stages.1.name: 'nft' is the name of two stages"),
        ({"stages__0__name": 3}, "stages.0.name: 3 is not a text"),
        ({"stages__1__output": "x"}, "stages.1.output: a stage writes into a folder of its name"),
        ({"stages__1__model": {"start": "x"}}, "stages.1.model.start: 'x', but a stage starts from the one before"),
        ({"stages__1__evaluation": {"before": "x"}}, "stages.1.evaluation.before: 'x', but a stage is compared"),
        ({"stages__1__model": {"training": "lora"}}, "stages.1.model.training: 'lora', but the stage before trains"),
        ({"stages__1__model": {"path": "a/b"}}, "stages.1.model.path: 'a/b', but the stage before trains 'shapes'"),
        ({"stages__1__from": "warm"}, "stages.1.from: 'warm' is not a list of stages; nearest valid: ['warm']"),
        ({"stages__1__from": ["wram"]}, "stages.1.from: 'wram' is no stage before this one; nearest valid: ['warm']"),
        ({"stages__1__from": [["warm"]]}, "stages.1.from: [['warm']] is not a list of stages"),
        ({"stages__0__from": ["nft"]}, "stages.0.from: 'nft' is no stage before this one; nearest valid: []"),
        ({"stages__1__from": ["warm", "warm"]}, "stages.1.from: 'warm' stands in it twice; nearest valid: once"),
        ({"stages": []}, "stages: [] is no list of 1 to 20 stages"),
        ({"stages": [{"name": "x"}] * 21}, "stages: 21 stages is no list of 1 to 20 stages"),
        ({"stages": [{"name": "x"}, "y"]}, "stages.1: 'y' is not a mapping of fields"),
        ({"stages": {"name": "x"}}, "stages: {'name': 'x'} is no list of 1 to 20 stages"),
    ],
)
def test_a_fault_is_one_line_that_names_the_stage(change: Mapping[str, Any], line: str) -> None:
    lines = told(tree(**change))
    assert len(lines) == 1 and lines[0].startswith(line), lines


def test_other_faults() -> None:
    given = tree()
    del given["stages"][1]["name"], given["stages"][0]["iterations"]
    assert [line.split(":")[0] for line in told(given)] == ["stages.1.name", "stages.0.iterations"]
    given = {k: v for k, v in tree(iterations=2).items() if k != "stages"}
    assert told({**given, "stage": []}) == ["stage: unknown field; did you mean 'stages'?"]
    assert told(tree(stages__1__stages=[]))[0].startswith("stages.1.stages: several runs, and one is meant")
    assert len(told(tree(**{f"stages__{n}__field{k}": 1 for n in (0, 1) for k in range(30)}))) == 20  # bounded
    deep: Any = 1
    for _ in range(30):
        deep = {"a": deep}
    assert "nested deeper" in told(tree(stages__0__model=deep))[0]


# --------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(TREE, sort_keys=False))
    return path


def test_options_are_shared_or_a_stages(file: Path) -> None:
    words = ["--seed", "5", "--stages.1.iterations", "9", "--stages.1.rewards.1.weight", "3", "--output", "out"]
    made = configured("train", [str(file), *words])
    assert isinstance(made, Stages) and [run.iterations for run in made.runs] == [3, 9]
    assert {run.seed for run in made.runs} == {5} and made.runs[1].model.start == "out/1-warm"
    weights = [[(r.name, r.weight) for r in run.rewards] for run in made.runs]
    assert weights == [[("shapes", 1.0), ("shapes_strict", 1.0)], [("shapes", 1.0), ("shapes_strict", 3.0)]]
    made = configured("train", [str(file), "--stages.1.algorithm.name", "flow_grpo", "--stages.1.algorithm.group", "6"])
    assert isinstance(made, Stages) and made.runs[1].algorithm.name == "flow_grpo"
    assert made.runs[0].algorithm.name == "rejection_sft" and made.runs[1].algorithm.model_dump()["group"] == 6


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--iterations", "5"], "command line: iterations: no stage takes it from what they share"),
        (["--stages.1.optimizer.lr", "1"], "no such option; nearest valid: --stages.1.optimizer.learning-rate"),
        (["--stages.7.iterations", "1"], "--stages.7.iterations: no such option; nearest valid: --stages."),
        (["--stages.1.algorithm.name", "nft"], "command line: stages.1.algorithm.name: 'nft' is no known algorithm"),
        (["--stages.1.iterations", "0"], "command line: stages.1.iterations: 0 must be ≥ 1"),
        (["--optimizer.beta1", "2"], "command line: optimizer.beta1: 2"),
        (["--stages.0.algorithm.group", "0"], "command line: stages.0.algorithm"),
    ],
)
def test_what_an_option_cannot_do(file: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(file), *words]) == 2
    assert line in capsys.readouterr().err


def test_help_cost_and_what_is_for_one_run(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("tempflow.cost.memory_of", lambda config, cost, ranks: "not here")  # it builds the network
    small = ["--model.height", "32", "--model.width", "32"]
    assert main(["train", str(file), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--stages.1.algorithm.mix-beta" in out and "--stages.1.optimizer.beta1" not in out and "--seed INT" in out
    assert main(["cost", str(file), *small]) == 0
    out = capsys.readouterr().out
    each = [room_cost(run) for run in configured("cost", [str(file), *small]).runs]  # type: ignore[union-attr]
    assert "warm: rejection_sft" in out and "nft: diffusion_nft" in out and f"{sum(each):,}" in out
    assert main(["cost", str(file), *small, "--find-rows", str(tmp_path / "x.yaml")]) == 2
    assert "find_rows: is for one run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="stages: several runs, and one is meant"):
        load_config(file)


def room_cost(config: Config) -> int:
    from tempflow.cost import run_cost

    return run_cost(config).equivalents


def test_the_doctor_looks_at_every_stage(file: Path, tmp_path: Path) -> None:
    from tempflow.doctor.run import run_checks
    from tempflow.rewards import notes

    def checks(**changes: Any) -> dict[str, Any]:
        shapes = {"model": {}, "output": str(tmp_path / "out"), **changes}
        return {check.name: check for check in run_checks(parse_stages(tree(**shapes)), notes(), {})}

    found = checks()
    assert not any(check.state == "fails" for check in found.values())
    assert "model.start" not in found and "data.train" in found and not any("stages." in name for name in found)
    found = checks(stages__1__data={"train": str(tmp_path / "none.txt")})
    assert found["stages.0: data.train"].state == "ok" and found["stages.1: data.train"].state == "fails"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert checks()["output"].state == "fails"


def test_a_recipe_may_have_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tiny_stages() -> Stages:
        """A warm-up and what follows it."""
        return parse_stages(TREE)

    monkeypatch.setitem(RECIPES, "tiny_stages", tiny_stages)
    assert main(["recipes"]) == 0 and "A warm-up and what follows it." in capsys.readouterr().out
    made = configured("train", ["tiny_stages", "--name", "mine"])
    assert isinstance(made, Stages) and made.output == "runs/mine" and made.runs[0].name == "mine-warm"
    assert TREE["name"] == "two" == tiny_stages().name


# -------------------------------------------------------------------------------------------------------------- running
class Killed(BaseException):
    """What a run is ended by: nothing catches it, so nothing is kept."""


def go(output: Path, model: Fake | None = None, **changes: Any) -> Run:
    options = {key: changes.pop(key) for key in ("resume", "allow_changes") if key in changes}
    config = parse_stages(tree(output=str(output), **changes))
    return train(config, model=model or Fake(), reward=brightness, prompts=PROMPTS, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return go(tmp_path_factory.mktemp("stages") / "whole")


FILES = ("metrics.jsonl", "evaluation.jsonl", "steps.jsonl", "samples.json", "model/model.safetensors")


def alike(a: Path, b: Path) -> None:
    for stage in ("1-warm", "2-nft"):
        for name in FILES:
            assert (a / stage / name).read_bytes() == (b / stage / name).read_bytes(), (stage, name)


def test_each_stage_starts_from_what_the_one_before_ended_with(whole: Run) -> None:
    home = whole.folder.parent
    assert whole.folder.name == "2-nft" and sorted(p.name for p in home.iterdir() if p.is_dir()) == ["1-warm", "2-nft"]
    first, second = (json.loads((home / stage / "summary.json").read_text()) for stage in ("1-warm", "2-nft"))
    assert second["before"]["mean"]["reward"] == first["after"]["mean"]["reward"] > first["before"]["mean"]["reward"]
    assert whole.before.mean("reward") == first["after"]["mean"]["reward"]
    assert load_config(home / "2-nft" / "config.yaml").model.start == str(home / "1-warm")
    assert load_stages(home / "config.yaml").runs[1].algorithm.name == "diffusion_nft"


def test_a_stage_starts_from_the_mean_of_those_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, plain = list[Any](), build._start

    def noted(config: Config, model: Any, trainable: Any, say: Any) -> Any:
        base = plain(config, model, trainable, say)
        begun.append(trainable.state())
        return base

    monkeypatch.setattr(build, "_start", noted)
    config = parse_stages(souped(output=str(tmp_path / "run")))
    run = train(config, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    warm, apart = (best_weights(Path(stage.output)) for stage in config.runs[:2])
    assert len(begun) == 1 and not same(warm, apart)
    assert same(begun[0], {name: (warm[name].double() / 2 + apart[name].double() / 2).float() for name in warm})
    summaries = [json.loads((Path(stage.output) / "summary.json").read_text()) for stage in config.runs]
    assert summaries[0]["before"]["mean"] == summaries[1]["before"]["mean"] != summaries[2]["before"]["mean"]
    files = {file: file.read_bytes() for file in run.folder.parent.rglob("*.safetensors")}
    again = train(config, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)  # all are finished
    assert again.folder == run.folder and files == {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_reference_is_the_base_in_every_stage_unless_it_says_otherwise(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, plain = list[Any](), build._reference

    def noted(which: str, model: Any, trainable: Any, base: Any) -> Any:
        found = plain(which, model, trainable, base)
        held.append((trainable.state(), trainable.state() if found is None else found))
        return found

    monkeypatch.setattr(build, "_reference", noted)
    untrained = weights(Fake())
    go(tmp_path / "run", stages__0__iterations=1, stages__1__iterations=1, stages__1__model={"reference": reference})
    ((policy, reference_weights),) = held  # the first stage has no reference
    assert not same(policy, untrained)
    assert same(reference_weights, untrained if reference == "base" else policy)


def test_killed_inside_and_between_stages_it_ends_as_the_uninterrupted_one(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, iterate, run_one = tmp_path / "run", Trainer._iterate, room.train_run

    def killed_in(stage: str, iteration: int) -> None:
        def once(self: Trainer) -> None:
            if self.config.name == stage and self.done == iteration:
                raise Killed
            iterate(self)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "_iterate", once)
            go(output)

    def killed_before(stage: str) -> None:
        def none(config: Config, *rest: Any) -> Run:
            if config.name == stage:
                raise Killed
            return run_one(config, *rest)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(room, "train_run", none)
            go(output)

    killed_in("two-warm", 2)
    killed_before("two-nft")
    warm = {p: p.stat().st_mtime_ns for p in (output / "1-warm").rglob("*")}
    assert not (output / "2-nft").exists()
    killed_in("two-nft", 0)
    killed_in("two-nft", 2)
    assert not (output / "2-nft" / "summary.json").exists()
    again = go(output, resume=True)
    alike(whole.folder.parent, output)
    assert {p: p.stat().st_mtime_ns for p in (output / "1-warm").rglob("*")} == warm  # finished: nobody touched it
    assert again.after.mean("reward") == whole.after.mean("reward") and same(weights(again.model), weights(whole.model))  # type: ignore[arg-type]
    once_more = go(output)
    assert once_more.after.mean("reward") == whole.after.mean("reward")
    alike(whole.folder.parent, output)


def test_what_was_begun_and_is_configured_otherwise_now_is_refused(tmp_path: Path) -> None:
    short = {"stages__0__iterations": 1, "stages__1__iterations": 1}
    with pytest.raises(CheckpointError, match=r"resume: .* holds no stages"):
        go(tmp_path / "run", resume=True, **short)
    assert not (tmp_path / "run").exists()
    go(tmp_path / "run", **short)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for change, line in (
        (
            {"optimizer__beta1": 0.5},
            r"stages\.0: the configuration is not the run's own: optimizer\.beta1: 0\.9 → 0\.5",
        ),
        ({"stages__1__seed": 3}, r"stages\.1: the configuration is not the run's own: seed: 0 → 3"),
        ({"stages__0__name": "cold"}, r"output: .* holds the stage '1-warm', which is not configured"),
        ({"stages": [TREE["stages"][0]]}, r"output: .* holds the stage '2-nft', which is not configured"),
    ):
        with pytest.raises(ValueError, match=line):
            go(tmp_path / "run", **({**change} if "stages" in change else {**short, **change}))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    longer = go(tmp_path / "run", **{**short, "stages__1__iterations": 2}, allow_changes=True)
    assert longer.folder.name == "2-nft" and len((longer.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_last_stages_faults_are_told_before_the_first_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages\.1\.model\.height"):
        go(tmp_path / "run", stages__1__model={"height": 4})
    config = parse_stages(tree(output=str(tmp_path / "run"), stages__1__data={"train": str(tmp_path / "none.txt")}))
    with pytest.raises(ValueError, match=r"stages\.1\.data\.train: .*none.txt"):
        train(config, model=Fake(), reward=brightness, quiet=True)
    with pytest.raises(ValueError, match="algorithm: an object is one run's"):
        train(config, algorithm=object(), quiet=True)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* is not empty"):
        go(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_interrupted_it_says_how_all_stages_are_gone_on_with(whole: Run) -> None:
    from tempflow.train.identity import go_on, read_identity

    home = whole.folder.parent
    assert go_on(whole.folder, None) == f"tempflow train --resume {home}"
    call = go_on(whole.folder, read_identity(whole.folder))
    assert call.startswith(f"tempflow.train(tempflow.load_stages('{home}/config.yaml')") and "resume=True" in call


def test_going_on_by_the_command_line(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = list[tuple[Any, dict[str, Any]]]()
    monkeypatch.setattr(room, "train", lambda config, **options: calls.append((config, options)))
    home = str(whole.folder.parent)
    assert main(["train", "--resume", home, "--stages.1.iterations", "9", "--allow-changes"]) == 0
    ((config, options),) = calls
    assert isinstance(config, Stages) and config.output == home and [r.iterations for r in config.runs] == [3, 9]
    assert options == {"resume": True, "allow_changes": True}
    assert main(["train", "--resume", home, "--stages.1.data.train", str(tmp_path / "none.txt")]) == 2
    assert "stages.1.data.train: " in capsys.readouterr().err and len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------- shown
def test_a_page_for_each_stage_and_one_that_lists_them(whole: Run, tmp_path: Path) -> None:
    home = whole.folder.parent
    assert main(["report", str(home), "--output", str(tmp_path / "all.html")]) == 0
    assert (
        "3 / 3" in (tmp_path / "all.html").read_text() and "rejection_sft" in (home / "1-warm/report.html").read_text()
    )
    assert main(["report", str(home), str(whole.folder), "--output", str(tmp_path / "x.html")]) == 2  # one twice


def test_where_one_run_is_meant_the_last_stage_is_named(whole: Run, tmp_path: Path, capsys: Any) -> None:
    home = str(whole.folder.parent)
    for words in (["export", home, "--output", str(tmp_path / "x")], ["eval", home]):
        assert main(words) == 2
        assert f"several runs, and one is meant; nearest valid: {home}/2-nft" in capsys.readouterr().err


def test_on_the_embedded_model_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is loaded anew for each stage, and a LoRA goes on being trained."""
    given = tree(
        output=str(tmp_path / "run"),
        model={"training": "lora", "lora_rank": 2},
        data={"prompts_per_iteration": 2},
        algorithm={"name": "rejection_sft", "steps": 2, "group": 2, "best": 1, "pairs": 1},
        evaluation={"every": 0, "validation_prompts": 2, "test_prompts": 2, "steps": 2},
        stages__0__iterations=1,
        stages__1__iterations=1,
        stages__1__algorithm={"name": "diffusion_nft", "steps": 2, "group": 2},
    )
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(given))
    assert main(["train", str(file)]) == 0
    out = capsys.readouterr().out
    assert "stage 1 of 2, warm: rejection_sft" in out and f"start: the LoRA of {tmp_path}/run/1-warm" in out
    assert (tmp_path / "run" / "2-nft" / "summary.json").is_file() and "reference: base" in out
