"""Each check says what is so; what would stop a run fails; nothing is changed and no secret is told."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file

from tempflow.cli.doctor import doctor_verb
from tempflow.config import Config
from tempflow.doctor import Check, failed, libraries, machine, run, to_json
from tempflow.models import load, shapes_folder
from tempflow.models.sd3 import LORA_TARGETS
from tempflow.recipes import RECIPES
from tempflow.rewards import notes

LINES = [
    "torch>=2.6",
    'peft>=0.17; extra == "diffusers"',
    'tempflow[diffusers]; extra == "shapes"',
    'opencv>=4.9; extra == "shapes"',
    'tempflow[shapes,plots]; extra == "demo"',
    'matplotlib>=3.8; extra == "plots"',
]


def small(**fields: object) -> Config:
    return RECIPES["shapes_lora"]().replace(**fields)


def with_model(**fields: object) -> Config:
    base = small()
    return base.replace(model=base.model.model_copy(update=fields))


# ----------------------------------------------------------------------------------------------------------- libraries
@pytest.mark.parametrize(
    "extra,names",
    [
        ("", ["torch"]),
        ("diffusers", ["peft"]),
        ("shapes", ["peft", "opencv"]),
        ("demo", ["matplotlib", "peft", "opencv"]),
        ("nothing", []),
    ],
)
def test_requirements_resolve_the_packages_own_extras(extra: str, names: list[str]) -> None:
    assert [r.name for r in libraries.requirements(LINES, extra)] == names


@pytest.mark.parametrize(
    "installed,state,found",
    [
        ("2.13.0+cpu", "ok", "2.13.0"),
        ("2.10", "ok", "2.10"),
        ("2.5.1", "fails", "2.5.1"),
        (None, "fails", "missing"),
    ],
)
def test_versions_are_compared_as_versions(installed: str | None, state: str, found: str) -> None:
    check = libraries.requirement_check(Requirement("torch>=2.6"), installed)
    assert check.state == state and found in check.found
    assert check.advice == ("" if state == "ok" else "pip install 'torch>=2.6'")


def test_python() -> None:
    assert libraries.python_check("3.11.0", ">=3.11").state == "ok"
    assert libraries.python_check("3.10.9", ">=3.11").state == "fails"


def test_an_extra_fails_only_where_something_needs_it() -> None:
    missing = ["opencv missing"]
    unused, used = (libraries.extra_check("shapes", missing, users) for users in ([], ["reward shapes"]))
    assert (unused.state, used.state) == ("ok", "fails")
    assert used.found == "not installed: opencv missing; needed by reward shapes"
    assert unused.advice == used.advice == "pip install 'tempflow[shapes]'"
    assert libraries.extra_check("shapes", [], ["reward shapes"]) == Check(
        "extra [shapes]", "ok", "installed; needed by reward shapes"
    )


def test_the_packages_own_metadata_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {check.name: check.state for check in libraries.library_checks()}
    assert {"Python", "torch", "pydantic", "extra [diffusers]", "extra [shapes]"} <= states.keys()
    assert "extra [dev]" not in states and set(states.values()) == {"ok"}
    there = libraries.installed
    monkeypatch.setattr(libraries, "installed", lambda name: None if name == "peft" else there(name))
    checks = {check.name: check for check in libraries.library_checks({"diffusers": ["model shapes"]})}
    assert checks["extra [diffusers]"].state == "fails" and "peft missing" in checks["extra [diffusers]"].found
    assert "peft missing" in checks["extra [shapes]"].found


# ------------------------------------------------------------------------------------------------------------- machine
def test_threads() -> None:
    assert machine.threads_check(4, 4) == Check("threads", "ok", "4 threads on 4 cores")
    assert machine.threads_check(8, 4).state == "warning" and "--threads 4" in machine.threads_check(8, 4).advice
    assert machine.threads_check(1, 4).state == "ok" and "--threads 4" in machine.threads_check(1, 4).advice


def test_the_cpu_is_described() -> None:
    found = machine.cpu_check().found
    assert f"{machine.cores()} cores" in found and torch.backends.cpu.get_cpu_capability() in found
    assert "GB of memory" in found or machine.memory() is None


def test_devices_that_are_not_here_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.device_check("cpu").state == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.device_check("cuda").state == machine.device_check("mps").state == "fails"
    assert not any(check.name == "dtypes" for check in machine.machine_checks("cuda", "float32", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.device_check("cuda:1").state == "ok"
    assert machine.device_check("cuda:2") == Check("device", "fails", "cuda:2, but there are 2", "--device cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3_000_000_000, 8_000_000_000))
    assert machine.accelerator_checks()[1] == Check("cuda:1", "ok", "card 1, 3.0 GB of 8.0 GB free")


def test_dtypes_are_timed_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.dtype_check("cpu", None)
    assert here.state == "ok" and "ms" in here.found and "a hint, no benchmark" in here.found
    assert machine.compared(0.001, 0.002, "bfloat16").state == "warning"
    assert machine.compared(0.001, 0.002, "float32").state == "ok"
    assert "bfloat16 may be faster" in machine.compared(0.002, 0.001, "float32").advice

    def refuses(device: str, dtype: torch.dtype) -> float:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported\nmore")
        return 0.001

    monkeypatch.setattr(machine, "timed_product", refuses)
    assert machine.dtype_check("cpu", "bfloat16") == Check(
        "dtypes", "fails", "no bfloat16 on cpu: BFloat16 is not supported", "--model.dtype float32"
    )
    assert machine.dtype_check("cpu", "float32").state == "warning"


def test_the_hubs_settings_without_secrets() -> None:
    from huggingface_hub.constants import ENV_VARS_TRUE_VALUES

    assert set(machine.TRUE) == set(ENV_VARS_TRUE_VALUES)
    checks = machine.hub_checks({"HF_HUB_OFFLINE": "true", "HF_TOKEN": "hf_secret", "HF_HOME": "there"})
    text = json.dumps(to_json(checks))
    assert "offline (HF_HUB_OFFLINE=true), cache in there" in text and "set: HF_TOKEN" in text
    assert "secret" not in text
    assert machine.hub_checks({})[0].found == "online (nothing set)"
    assert machine.hub_checks({"HF_HUB_OFFLINE": "0"})[0].found == "online (HF_HUB_OFFLINE=0)"


# ------------------------------------------------------------------------------------------------------- configuration
def states(config: Config, environment: dict[str, str] | None = None) -> dict[str, Check]:
    return {check.name: check for check in run.run_checks(config, notes(), environment or {})}


def test_a_recipe_that_runs_here(tmp_path: Path) -> None:
    checks = states(small(output=str(tmp_path / "deep" / "run")))
    assert {c.state for c in checks.values()} == {"ok"}
    assert checks["licence of model shapes"].found == "Apache-2.0"
    assert checks["data.train"].found.startswith("shapes:train, ")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    check = states(small(output=str(tmp_path)))["output"]
    assert check.state == "fails" and "already holds a run" in check.found
    (tmp_path / "file").touch()
    assert run.output_check(tmp_path / "file" / "run").state == "fails"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in run.output_check(tmp_path / "run").found


def test_a_folder_on_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run.tempfile, "TemporaryFile", refuses)
    check = run.output_check(tmp_path / "run")
    assert check.state == "fails" and check.found == f"{tmp_path} cannot be written: Read-only file system"


def test_models(tmp_path: Path) -> None:
    hub = with_model(path="someone/some-model")
    assert states(hub, {"HF_HUB_OFFLINE": "1"})["model"].state == "fails"
    assert states(hub, {})["model"].state == "warning" and states(hub)["disk"].state == "warning"
    assert states(hub)["licence of model some-model"].state == "warning"
    assert states(with_model(path=str(tmp_path / "none")))["model"].state == "fails"
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    check = states(with_model(path=str(tmp_path)))["model"]
    assert check.state == "fails" and "OtherPipeline" in check.found and "StableDiffusion3Pipeline" in check.advice


def test_a_model_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    index = shapes_folder() / "model_index.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda path, name, revision: str(index))
    checks = states(with_model(path="someone/some-model"), {"HF_HUB_OFFLINE": "1"})
    assert checks["model"].state == "ok" and checks["disk"].state == "ok"


@pytest.mark.parametrize(
    "licence,state", [("Apache-2.0", "ok"), ("mit", "ok"), ("unknown", "warning"), ("stabilityai-community", "warning")]
)
def test_licences(licence: str, state: str) -> None:
    assert run.licence_check("model", "some/model", licence).state == state


def test_prompts_that_are_missing(tmp_path: Path) -> None:
    base = small()
    data = base.data.model_copy(update={"test": str(tmp_path / "none.txt")})
    checks = states(base.replace(data=data))
    assert checks["data.train"].state == "ok" and checks["data.test"].state == "fails"
    assert "none.txt is no file" in checks["data.test"].found


def test_pictures_are_looked_at_where_the_algorithm_takes_them(tmp_path: Path) -> None:
    assert "pictures" not in states(small())
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a circle", "image": "a.png"}')
    base = small(algorithm={"name": "sft"})
    data = base.data.model_copy(update={"train": str(tmp_path / "pairs.jsonl")})
    missing = states(base.replace(data=data))["pictures"]
    assert missing.state == "fails" and "a.png is no file" in missing.found
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    fine = states(base.replace(data=data))["pictures"]
    assert fine.state == "ok" and fine.found == "1 headers fit"
    none = base.data.model_copy(update={"train": str(tmp_path / "none.jsonl")})
    assert "pictures" not in states(base.replace(data=none))  # the prompts' own check says it


def test_extras_that_a_configuration_needs() -> None:
    needs = run.needed_extras(small(), notes())
    assert needs == {"diffusers": ["model shapes"], "shapes": ["reward shapes", "reward shapes_strict"]}
    assert set(run.needed_extras(RECIPES["sd35_medium_tempflow"](), notes())) == {"diffusers"}
    tracked = small(track=small().track.model_copy(update={"to": ("wandb",)}))
    assert run.needed_extras(tracked, notes())["wandb"] == ["tracker wandb"]


def test_the_precision_of_drafts() -> None:
    def drafting(precision: str) -> Config:
        algorithm = RECIPES["leaderboard_sol_rl"]().algorithm.model_dump() | {"draft_precision": precision}
        return small(algorithm=algorithm)

    assert run.draft_checks(small(), "cpu") == []
    assert [c.state for c in run.draft_checks(drafting("int8"), "cpu")] == ["ok"]
    (check,) = run.draft_checks(drafting("float8"), "cpu")
    assert check.state == "fails" and "needs a CUDA device of compute capability 8.9" in check.found
    assert check.advice == "--algorithm.draft-precision int8"
    assert run.needed_extras(drafting("float8"), notes())["quant"] == ["drafts in float8"]
    assert run.needed_extras(drafting("int8"), notes(), "cuda")["quant"] == ["drafts in int8"]
    assert "quant" not in run.needed_extras(drafting("int8"), notes())


# ---------------------------------------------------------------------------------------------------------------- disk
def test_shapes_by_headers_are_the_tensors_own() -> None:
    folder = shapes_folder() / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert run.weight_shapes(folder) == {name: list(value.shape) for name, value in tensors.items()}


def test_the_size_of_a_lora_is_pefts() -> None:
    model = load("shapes")
    model.add_lora(5, 5)
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    assert run.lora_size(run.weight_shapes(shapes_folder() / "transformer"), 5, LORA_TARGETS) == trained


def test_what_a_full_run_writes() -> None:
    base = RECIPES["shapes_tempflow"]()
    tensors = load_file(shapes_folder() / "transformer" / "diffusion_pytorch_model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert base.optimizer.ema_decay > 0
    one, two = (run.written_bytes(base, shapes_folder(), kept) for kept in (1, 2))
    assert two - one == 4 * 4 * numbers
    without = base.replace(optimizer=base.optimizer.model_copy(update={"ema_decay": 0.0}))
    assert one - run.written_bytes(without, shapes_folder(), 1) == 4 * numbers


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("share,state", [(10, "ok"), (1.5, "warning"), (0.9, "fails")])
def test_free_space_is_compared(monkeypatch: pytest.MonkeyPatch, share: float, state: str) -> None:
    need = run.written_bytes(small(), shapes_folder(), small().checkpoint.keep + 2)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: Usage(0, 0, int(share * need)))
    assert run.disk_check(small()).state == state


# -------------------------------------------------------------------------------------------------------- command line
def test_the_verb_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert doctor_verb(["shapes_lora", "--json", "out.json", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "what to do" in out and "secret" not in out
    told = json.loads(Path("out.json").read_text())
    assert told["fails"] is False
    assert {"name", "state", "found", "advice"} == set(told["checks"][0])
    names = [check["name"] for check in told["checks"]]
    assert {"Python", "CPU", "device", "model", "disk", "output"} <= set(names) and len(names) == len(set(names))
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_the_verb_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_verb([]) == 0
    out = capsys.readouterr().out
    assert "dtypes" in out and "disk" not in out


def test_a_failing_check_gives_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert doctor_verb(["shapes_lora", f"--json={tmp_path / 'a.json'}", "--output", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["fails"] is True
    capsys.readouterr()


def test_without_torch_it_still_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tempflow.cli import doctor

    there = libraries.installed
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table would break the command
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(libraries, "installed", lambda name: None if name == "torch" else there(name))
    assert doctor_verb(["demo"]) == 1
    assert "pip install 'torch" in " ".join(capsys.readouterr().out.split())


def test_help_and_wrong_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_verb(["--help"]) == 0
    assert "usage: tempflow doctor" in capsys.readouterr().out
    assert doctor_verb(["demo", "--json"]) == 2
    assert "json: no file given" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'dmo' is neither a recipe nor"):
        doctor_verb(["dmo"])


def test_markup_in_what_was_found_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from tempflow.doctor import table

    Console(width=120).print(table([Check("extra [shapes]", "fails", "x [red]y[/red]")]))
    out = capsys.readouterr().out
    assert "extra [shapes]" in out and "x [red]y[/red]" in out
    assert failed([Check("a", "warning", "b")]) is False and failed([Check("a", "fails", "b")]) is True
