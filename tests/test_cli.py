import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tempflow
from tempflow import cli
from tempflow.cli import main
from tempflow.cli.draw import SampleOptions
from tempflow.cli.export import ExportOptions
from tempflow.cli.judge import EvalOptions
from tempflow.cli.options import parse
from tempflow.cli.parse import configured
from tempflow.cli.report import ReportOptions
from tempflow.cli.train import TrainOptions
from tempflow.config import Config, algorithm_config, load_config, to_yaml
from tempflow.media import Size
from tempflow.models.guidance import Guidance
from tempflow.recipes import RECIPES
from tempflow.request import asked
from tempflow.strict import leaves, validated


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(words)
    out, err = capsys.readouterr()
    return status, out, " ".join(err.replace("│", " ").split())


# -------------------------------------------------------------------------------------------------------- help
def test_help_imports_no_torch():
    code = "import sys; from tempflow.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train [RECIPE | config.yaml]" in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(capsys, verb):
    status, out, err = run(capsys, verb, "--help")
    assert (status, err) == (0, "") and f"tempflow {verb}" in out


def test_help_shows_every_field_of_the_configuration(capsys):
    _, out, _ = run(capsys, "train", "shapes_flow", "--help")
    dumped = RECIPES["shapes_flow"]().model_dump()
    for name, value in dumped.items():
        for field, inner in (value if isinstance(value, dict) else {}).items():
            for leaf in [f"{field}.{key}" for key in inner] if isinstance(inner, dict) else [field]:
                listed = f"{field}.0.name" if leaf == "rewards" else leaf  # a list of sections: by its fields
                assert f"--{name}.{listed} ".replace("_", "-") in out
    assert "--rewards.0.weight" in out and "pictures per prompt" in out


def test_no_verb_prints_usage_and_fails(capsys):
    assert run(capsys)[0] == 2
    assert run(capsys, "-h")[0] == 0


def test_every_verb_is_in_the_usage():
    assert all(verb in cli.USAGE for verb in cli.VERBS)


# --------------------------------------------------------------------------------------------------- overrides
def test_overrides_are_laid_over_a_recipe():
    base = RECIPES["shapes_tempflow"]()
    made = configured("train", ["shapes_tempflow"])
    assert made == base
    flags = "--algorithm.seeds 3 --algorithm.branch-steps None --optimizer.learning-rate 1e-3 --rewards.0.weight 2"
    made = configured(
        "train", ["shapes_tempflow", *flags.split(), "--threads=2", "--seed", "-5", "--model.dtype", "bfloat16"]
    )
    expected = base.model_dump(mode="json")
    expected["algorithm"] |= {"seeds": 3, "branch_steps": None}
    expected["optimizer"] |= {"learning_rate": 1e-3}
    expected["model"] |= {"dtype": "bfloat16"}
    expected["rewards"][0] |= {"weight": 2.0}
    expected |= {"threads": 2, "seed": -5}
    assert made == Config.model_validate(expected)


def test_overrides_are_laid_over_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(RECIPES["shapes_flow"]()))
    made = configured("train", [str(file), "--algorithm.group", "7"])
    assert made.algorithm.build().plan(0, 0).roots == 7
    assert made.model_copy(update={"algorithm": load_config(file).algorithm}) == load_config(file)


def test_the_default_is_the_demo_recipe():
    assert configured("train", []) == RECIPES["demo"]()
    assert configured("train", ["--seed", "3"]).name == "demo"


@pytest.mark.parametrize("flag", [["--algorithm.name", "flow_grpo"], ["--algorithm.name=flow_grpo"]])
def test_another_algorithm_comes_with_its_own_defaults(flag):
    made = configured("train", ["shapes_tempflow", *flag, "--algorithm.group", "6"])
    assert made.algorithm == algorithm_config("flow_grpo")(name="flow_grpo", group=6)
    assert made.optimizer == RECIPES["shapes_tempflow"]().optimizer


def test_another_name_gives_another_folder_unless_one_is_chosen():
    assert configured("train", ["--name", "mine"]).output == "runs/mine"
    assert configured("train", ["--name", "mine", "--output", "here"]).output == "here"


def test_train_hands_the_configuration_to_the_loop(monkeypatch, capsys):
    from tempflow import stages

    seen = []
    monkeypatch.setattr(stages, "train", lambda config, **how: seen.append(config))
    assert run(capsys, "train", "shapes_lora", "--iterations", "2") == (0, "", "")
    assert seen[0].iterations == 2 and seen[0].model.training == "lora"


def test_a_guard_that_stops_a_run_gives_status_one(monkeypatch, capsys):
    from tempflow import stages
    from tempflow.train.guards import GuardError

    def stopped(config, **how):
        raise GuardError("the loss is nan")

    monkeypatch.setattr(stages, "train", stopped)
    status, out, err = run(capsys, "train", "demo")
    assert (status, out, err) == (1, "", "tempflow: the loss is nan")


def test_an_interrupted_run(monkeypatch, capsys):
    from tempflow import stages

    def stopped(config, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", stopped)
    assert run(capsys, "train", "demo")[0] == 130


# --------------------------------------------------------------------------------------------------- other verbs
def test_cost_prints_the_counts(capsys):
    status, out, _ = run(
        capsys, "cost", "shapes_tempflow", "--algorithm.branch-steps", "None", "--algorithm.seeds", "4"
    )
    assert status == 0
    figures = out.replace(",", "").replace("│", " ").split()
    recipe = RECIPES["shapes_tempflow"]()
    prompts, iterations = recipe.data.prompts_per_iteration, recipe.iterations
    forwards, leaves = 4 * 5 + 4 * 6 * 15, 4 * 6 * 5  # six steps: S(T−1) + SK·T(T−1)/2, and SK(T−1)
    for figure in (prompts * forwards, prompts * leaves, prompts * iterations * (forwards + leaves)):
        assert str(figure) in figures
    assert "MiB" in out and "reference" not in out
    assert "reference" in run(capsys, "cost", "shapes_tempflow", "--algorithm.kl", "0.1")[1]


@pytest.mark.parametrize(
    "verb,words",
    [
        ("algorithms", ["flow_grpo", "tempflow_grpo", "2508.04324"]),
        ("models", ["shapes", "StableDiffusion3Pipeline", "licence"]),
        ("rewards", ["shapes_strict", "jpeg_compressibility", "licence"]),
        ("recipes", ["demo", "sd35_medium_tempflow"]),
    ],
)
def test_lists(capsys, verb, words):
    status, out, err = run(capsys, verb)
    assert (status, err) == (0, "") and all(word in out for word in words)


def test_every_reward_has_a_note():
    from tempflow.rewards import REWARDS, notes

    assert notes().keys() == set(REWARDS) and all(n.what and n.values and n.licence for n in notes().values())


class FakeReport:
    steps, guidance, seed, walk = 4, 1.5, 7, None

    def table(self) -> str:
        return "all 0.5"

    def to_json(self) -> dict:
        return {"mean": 0.5, "none": float("nan")}


def test_eval_asks_the_suite(monkeypatch, capsys, tmp_path):
    from tempflow.evaluate import source, suite

    seen = {}

    def evaluate(model, prompts, rewards, **options):
        seen.update(model=model, prompts=prompts, rewards=[r.name for r in rewards], **options)
        return FakeReport()

    monkeypatch.setattr(source, "load_source", lambda source, **options: (source.base, options))
    monkeypatch.setattr(suite, "evaluate", evaluate)
    file = tmp_path / "out.json"
    words = ["--count", "9", "--rewards", "shapes", "--gold", "jpeg_compressibility", "--samples-per-prompt", "3"]
    status, out, err = run(capsys, "eval", "shapes", *words, "--dtype", "bfloat16", "--output", str(file))
    assert (status, err) == (0, "") and out.splitlines()[0] == "all 0.5" and "4 steps, guidance 1.5, seed 7" in out
    assert re.fullmatch(r"9 of \d+ prompts are used", out.splitlines()[-1])
    written = json.loads(file.read_text())
    assert (written["what"], written["mean"], written["none"], written["dtype"]) == ("shapes", 0.5, None, "bfloat16")
    assert seen.pop("rewards") == ["shapes", "jpeg_compressibility"]
    assert [p.kind for p in seen.pop("prompts")][:7] == [
        "single", "two", "count", "color", "position", "attribution", "single",
    ]  # fmt: skip
    assert seen == {
        "model": ("shapes", {"dtype": "bfloat16", "device": "cpu"}), "steps": 10, "guidance": 1.0, "seed": 1234,
        "size": Size(32, 32), "rows": 96, "total": None, "compose": None, "gold": ("jpeg_compressibility",),
        "samples_per_prompt": 3,
    }  # fmt: skip


def test_sample_asks_the_suite(monkeypatch, capsys, tmp_path):
    from tempflow.evaluate import suite

    seen = {}

    def sample_path(path, prompts, **options):
        seen.update(path=path, prompts=prompts, **options)
        return [Path("a.png"), Path("b.png")]

    monkeypatch.setattr(suite, "sample_path", sample_path, raising=False)
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    words = ["--prompt", "a red circle", "--prompts", str(tmp_path / "p.txt"), "--prompt", "a cross", "--seed", "4"]
    assert run(capsys, "sample", *words, "--width", "64") == (0, "a.png\nb.png\n", "")
    prompts = [*asked(["a red circle", "a cross", "one", "two", "three"])]
    assert seen == {
        "path": "shapes", "prompts": prompts, "steps": 10, "guidance": Guidance(), "seed": 4,
        "size": Size(32, 64), "device": "cpu", "out": Path("samples"), "grid": None, "base": "",
    }  # fmt: skip
    assert run(capsys, "sample", *words, "--count", "2")[2] == "prompts: 2 of 5 prompts are used"
    assert seen["prompts"] == prompts[:2]
    assert (
        run(capsys, "sample", *words, "--count=11")[2] == "prompts: 11 are drawn of 5 prompts: each comes 2 to 3 times"
    )
    assert seen["prompts"] == (prompts * 3)[:11]
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "image": "a.png"}')
    status, out, err = run(capsys, "sample", "--prompts", str(tmp_path / "p.jsonl"))
    assert (status, out) == (2, "") and 'p.jsonl:1: "image": pictures would change what is drawn' in err


@pytest.mark.parametrize(
    "words",
    [["--prompt", "a", "--prompt", "b c"], ["--prompt", "a", "b c"], ["--prompt=a", "--seed", "3", "--prompt=b c"]],
)
def test_a_list_may_be_given_in_parts(words):
    assert parse(SampleOptions, "sample", words).prompt == ("a", "b c")


def test_a_list_inside_a_configuration_may_be_given_in_parts():
    words = [
        "demo",
        "--evaluation.yardstick",
        "2",
        "--seed",
        "3",
        "--evaluation.yardstick=4",
        "--evaluation.gold",
        "jpeg_compressibility",
    ]
    config = configured("train", words)
    assert (config.evaluation.yardstick, config.seed) == ((2.0, 4.0), 3)


NO_PLACES = {"prompt", "rewards", "gold", "device", "push_to_hub"}
"""Texts that name nothing on the disk."""


@pytest.mark.parametrize("model", [TrainOptions, SampleOptions, EvalOptions, ExportOptions, ReportOptions])
def test_home_is_read_in_every_option_that_may_name_a_place(model, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    fields = {name: field for name, field in leaves(model).items() if name not in NO_PLACES}
    kinds = {name: str(field.annotation) for name, field in fields.items()}
    texts = [name for name, kind in kinds.items() if "str" in kind and "dict" not in kind]
    lists = [name for name in texts if "tuple" in str(fields[name].annotation)]
    made = validated(model, {name: ["~/x"] if name in lists else "~/x" for name in texts})
    assert texts and all(dict(made)[name] in ("/home/me/x", ("/home/me/x",)) for name in texts), made


def test_doctor_reads_home_in_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempflow.cli.doctor._checks", lambda words: [])
    assert main(["doctor", "--json=~/found.json"]) == 0
    assert (tmp_path / "found.json").is_file()


# -------------------------------------------------------------------------------------------------- public names
def test_public_names_are_there_and_lazy():
    for name in tempflow.__all__:
        assert getattr(tempflow, name) is not None
    assert set(tempflow.__all__) <= set(dir(tempflow))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tempflow.nothing  # noqa: B018
    code = "import sys, tempflow; assert not {'torch', 'diffusers', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("first", ["import tempflow", "import tempflow.train.trainer"])
def test_train_is_a_room_and_a_function_whatever_was_imported_first(first):
    code = f"""{first}
import tempflow, tempflow.stages as stages
stages.train = lambda config, reward=None: (config, reward)
assert tempflow.train("c", reward=1) == ("c", 1)
from tempflow import train
from tempflow.media import Size
from tempflow.models.guidance import Guidance
from tempflow.request import asked
from tempflow.media import Size
from tempflow.models.guidance import Guidance
from tempflow.request import asked
assert train("c") == ("c", None)
import tempflow.train.guards as guards
assert guards.GuardError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
