"""A run is gone on with by what it began with, and by nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import Distribution, EntryPoint, EntryPoints
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fake import PROMPTS, Fake, album, brightness, config, tempflow

from tempflow import algorithms, rewards
from tempflow.algorithms import flow_grpo
from tempflow.cli import main
from tempflow.config import Config
from tempflow.core.ema import Ema
from tempflow.core.scores import Scores
from tempflow.request import Prompt
from tempflow.rewards import from_function
from tempflow.rewards.jpeg_compressibility import JPEGCompressibility
from tempflow.rewards.weights import folder_of
from tempflow.train import build, checkpoint, state, trainer
from tempflow.train.display import Interrupted
from tempflow.train.guards import GuardError
from tempflow.train.identity import (
    Identity,
    changed_contents,
    described,
    go_on,
    identity,
    read_identity,
    same_contents,
)
from tempflow.train.state import resumable
from tempflow.train.trainer import train


def darkness(images: Any, prompts: Any) -> list[float]:
    return [1 - value for value in brightness(images, prompts) if value is not None]


class Stop(BaseException):
    """The process is gone."""


# ---------------------------------------------------------------------------------------------- what lies on the disk
class World:
    """A run of files alone, stopped after its first checkpoint, and all that it depends on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("train", "validation", "test"):
            lines = album(root / name).read_text().splitlines()
            kept = [{k: v for k, v in json.loads(line).items() if k != "image"} for line in lines]
            (root / name / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        for place in ("base", "start", "dino"):
            for file in ("transformer/model.safetensors", "transformer/config.json", "README.md"):
                (root / place / file).parent.mkdir(parents=True, exist_ok=True)
                (root / place / file).write_text(f"{place} {file}")
            (root / place / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')

    def config(self, **changes: Any) -> Config:
        data = {name: str(self.root / name / "pairs.jsonl") for name in ("train", "validation", "test")}
        given = {
            "iterations": 1,
            "data": {**data, "prompts_per_iteration": 3},
            "model": {"path": str(self.root / "base"), "reference": str(self.root / "start")},
            "evaluation": {"validation_prompts": 2, "test_prompts": 2},
            "algorithm": {"name": "vipo", "steps": 4, "group": 4, "dino": str(self.root / "dino")},
        }
        return config(self.root / "run", **{**given, **changes})

    def identity(self, settings: Config | None = None) -> Identity:
        settings = settings or self.config()
        algorithm = settings.algorithm.build()
        with patch("tempflow.train.identity.local_folder", lambda path, revision: Path(path)):  # no real pipeline
            return identity(settings, algorithm, build.prompt_sources(settings, None, None, algorithm.reads), {})

    def saved(self) -> None:
        """What a run writes at its start."""
        folder = self.root / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(trainer.to_yaml(self.config()))
        (folder / "identity.json").write_text(json.dumps(self.identity().to_json()))

    def refusal(self, settings: Config | None = None) -> str:
        settings = settings or self.config()
        try:
            resumable(self.root / "run", settings, self.identity(settings), False, lambda line: None)
        except ValueError as error:
            return str(error)
        return ""


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.saved()
    return world


def spoil(*names: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        file = root.joinpath(*names)
        file.write_bytes(file.read_bytes().replace(b"a", b"A", 1)[:-1] + b"\n")

    return act


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a training prompt": (
        lambda root: (root / "train" / "pairs.jsonl").write_text(
            (root / "train" / "pairs.jsonl").read_text().replace("fog", "mist")
        ),
        r"data.train: prompts was sha256 \w{12}…, is now sha256 \w{12}…",
    ),
    "a prompt's metadata": (
        lambda root: (root / "test" / "pairs.jsonl").write_text(
            (root / "test" / "pairs.jsonl").read_text().replace('{"prompt": "fog"', '{"tag": 1, "prompt": "fog"')
        ),
        r"data.test: prompts was",
    ),
    "a picture beside the prompts": (spoil("validation", "1_chosen.png"), r"data.validation: files that they name was"),
    "a picture that has gone": (lambda root: (root / "train" / "2_rejected.png").unlink(), r"data.train: files that"),
    "the model's weights": (
        spoil("base", "transformer", "model.safetensors"),
        r"model.path: transformer/model.safetensors was sha256",
    ),
    "the model's settings": (spoil("base", "transformer", "config.json"), r"model.path: transformer/config.json was"),
    "a file of the model's that has gone": (
        lambda root: (root / "base" / "transformer" / "config.json").unlink(),
        r"model.path: transformer/config.json was sha256 \w{12}…, is now not there",
    ),
    "a new file of the model's": (
        lambda root: (root / "base" / "transformer" / "more.safetensors").write_text(""),
        r"model.path: transformer/more.safetensors was not there, is now sha256",
    ),
    "the reference": (spoil("start", "transformer", "model.safetensors"), r"model.reference: transformer/model.safe"),
    "a backbone that the algorithm names": (
        spoil("dino", "transformer", "config.json"),
        r"algorithm.dino: transformer/config.json was",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_content_that_changed_is_named(change: str, world: World) -> None:
    assert world.refusal() == ""
    act, message = CHANGES[change]
    act(world.root)
    said = world.refusal()
    assert said.startswith("the configuration is not the run's own: ") and "\n" not in said

    assert re.search(message, said), said
    assert said.count(" was ") == 1 and "allow_changes=True" in said
    told = list[str]()
    resumable(world.root / "run", world.config(), world.identity(), True, told.append)
    assert re.search("changed on resuming: " + message, told[0])


def test_what_does_not_matter_may_change_and_what_has_moved_is_the_same(world: World) -> None:
    (world.root / "base" / "README.md").write_text("better words")
    for old, new in (("base", "elsewhere"), ("train", "moved")):
        (world.root / old).rename(world.root / new)
    settings = world.config()
    data = settings.data.model_copy(update={"train": str(world.root / "moved" / "pairs.jsonl")})
    settings = settings.replace(
        model=settings.model.model_copy(update={"path": str(world.root / "elsewhere")}), data=data
    )
    assert world.refusal(settings) == ""
    spoil("elsewhere", "transformer", "config.json")(world.root)
    assert "model.path: " in world.refusal(settings)


def test_a_folder_that_the_algorithm_names_is_missed_before_any_work(world: World) -> None:
    (world.root / "dino").rename(world.root / "moved")
    with pytest.raises(ValueError, match=r"algorithm.dino: '\S+/dino' is no folder; nearest valid: "):
        world.identity()
    named = world.config(algorithm={"name": "vipo", "steps": 4, "group": 4, "dino": "facebook/dinov2-small"})
    assert "algorithm.dino" not in world.identity(named).contents


def cached(root: Path, name: str, commit: str) -> Path:
    """A hub id in the hub's cache, whose main is that commit; its snapshot."""
    place = root / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "config.json").write_text("{}")
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return snapshot


def test_hub_ids_are_pinned_to_the_commits_that_they_mean(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model, its rewards, what evaluations judge by, and the algorithm."""
    hub, old, new = world.root / "hub", "a" * 40, "b" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    ids = ("some/dino", "some/clip", "some/words", "some/judge")
    for name in ids:
        cached(hub, name, old)
    options = {"path": "some/clip", "tokenizer": "some/words"}

    def asked(**more: str) -> Config:
        return world.config(
            rewards=[{"name": "pickscore", "options": {**options, **more}}],
            evaluation={
                "validation_prompts": 2,
                "test_prompts": 2,
                "rewards": [{"name": "clipscore", "options": {"path": "some/judge"}}],
            },
            algorithm={"name": "vipo", "steps": 4, "group": 4, "dino": "some/dino"},
        )

    was = world.identity(asked())
    fields = (
        "algorithm.dino", "rewards.0.options.path", "rewards.0.options.tokenizer", "evaluation, clipscore.options.path"
    )  # fmt: skip
    assert was.commits == dict.fromkeys(fields, old)
    for name in ("config.yaml", "identity.json"):
        (world.root / "run" / name).unlink()
    (world.root / "run" / "config.yaml").write_text(trainer.to_yaml(asked()))
    (world.root / "run" / "identity.json").write_text(json.dumps(was.to_json()))
    assert world.refusal(asked()) == ""
    cached(hub, "some/clip", new)
    told = "rewards.0.options.path: commit aaaaaaaaaaaa… → bbbbbbbbbbbb…; nearest valid: rewards.0.options.revision: "
    assert f"{told}{old}." in world.refusal(asked())
    assert world.refusal(asked(revision=old)) == ""  # what the message says
    for name, place in zip(("some/dino", "some/words", "some/judge"), (fields[0], *fields[2:]), strict=True):
        cached(hub, name, new)
        assert f"{place}: commit aaaaaaaaaaaa… → bbbbbbbbbbbb…" in world.refusal(asked(revision=old))
        cached(hub, name, old)
    with pytest.raises(ValueError, match="cannot be had"):  # what is not there is for its loader to say
        folder_of("some/other")
    assert "rewards.0.options.path" not in world.identity(asked(path="some/other")).commits
    older = {name: part for name, part in was.to_json().items() if name != "commits"}
    assert not [line for line in changed_contents(Identity(**older), world.identity(asked())) if "commit" in line]


def test_a_model_of_the_hub_is_told_apart_by_its_files_and_named_by_its_commit(world: World) -> None:
    one, two, three = (cached(world.root / "hub", "some/model", letter * 40) for letter in "abc")
    for place, said in ((one, "x"), (two, "x"), (three, "y")):
        (place / "model_index.json").write_text(said)
    settings = world.config(model={"path": "some/model"})
    algorithm = settings.algorithm.build()
    prompts = build.prompt_sources(world.config(), None, None, algorithm.reads)
    found: list[Identity] = []
    for place in (one, two, three):
        with patch("tempflow.train.identity.local_folder", lambda path, revision, place=place: place):
            found.append(identity(settings, algorithm, prompts, {}))
    assert [one.commits["model.path"][0] for one in found] == ["a", "b", "c"]
    assert changed_contents(found[0], found[1]) == []  # other words about the same files
    assert "model.revision" in same_contents(found[0], found[1])
    lines = changed_contents(found[0], found[2])
    assert (
        len(lines) == 2
        and f"model.path: commit aaaaaaaaaaaa… → cccccccccccc…; nearest valid: model.revision: {'a' * 40}" in lines
    )
    assert "model.revision" not in same_contents(found[0], found[2])


def test_the_embedded_world_and_latent_reward_are_recorded() -> None:
    settings = config(Path("x"), algorithm={"name": "drm_grpo", "reward": "shapes"})
    found = identity(settings, settings.algorithm.build(), {}, {}).contents
    assert "transformer/diffusion_pytorch_model.safetensors" in found["model.path"]
    assert any(name.endswith(".safetensors") for name in found["algorithm.reward"])


def test_a_start_is_recorded_by_its_best_weights(begun: Path) -> None:
    settings = config(Path("x"), model={"start": str(begun)})
    found = identity(settings, settings.algorithm.build(), {}, {}).contents["model.start"]
    best = checkpoint.pointed(begun, checkpoint.BEST)
    assert best is not None and found == {"best weights": checkpoint.sha256(best / checkpoint.MANIFEST)}
    mean = settings.with_model(start=(str(begun), str(begun.parent / "not yet there")))
    several = identity(mean, settings.algorithm.build(), {}, {}).contents["model.start"]
    assert several == {"0/best weights": found["best weights"]}


# ------------------------------------------------------------------------------------------------- objects from Python
OBJECTS: dict[str, Any] = {"reward": brightness, "prompts": PROMPTS}
SHORT: dict[str, Any] = {"iterations": 2, "evaluation": {"every": 1, "validation_prompts": 2, "test_prompts": 2}}


def go(folder: Path, resume: bool = False, allow_changes: bool = False, **given: Any) -> Any:
    given = {"model": Fake(), **OBJECTS, **given}
    return train(config(folder, **SHORT), resume=resume, allow_changes=allow_changes, quiet=True, **given)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of objects that was killed after its first iteration."""
    folder = tmp_path_factory.mktemp("begun") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        kept = checkpoint.save

        def save(run: Path, iteration: int, *args: Any, **kwargs: Any) -> Path:
            path = kept(run, iteration, *args, **kwargs)
            if iteration == 1:
                raise Stop
            return path

        patch.setattr(checkpoint, "save", save)
        with pytest.raises(Stop):
            go(folder)
    yield folder


def tree(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("words", [[], ["--allow-changes"]])
def test_the_command_line_refuses_a_run_that_was_given_objects(
    words: list[str], begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "prepare_model", None)
    before = tree(begun)
    assert main(["train", "--resume", str(begun), *words]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "reward (function fake.brightness), prompts (6 prompts)" in said
    call = said.partition("Go on with it there: ")[2].strip()
    assert call == go_on(begun, read_identity(begun))
    assert "model=…, reward=brightness, prompts=…, resume=True)" in call
    assert tree(begun) == before


def test_the_call_that_goes_on_is_one(begun: Path, tmp_path: Path) -> None:
    """With the dots filled in, and from a folder that was moved."""
    import shutil

    import tempflow as package

    moved = Path(shutil.copytree(begun, tmp_path / "it's moved"))
    call = go_on(moved, read_identity(moved)).replace("model=…", "model=Fake()").replace("prompts=…", "prompts=PROMPTS")
    run = eval(call, {"tempflow": package, "brightness": brightness, "Fake": Fake, "PROMPTS": PROMPTS})
    assert run.folder == moved and (moved / "summary.json").is_file()


class Judge:
    name, groupwise = "judge", False

    def score(self, media: Any, prompts: Any, metadata: Any) -> Scores:
        value = media.float().mean((1, 2, 3))[:, None] / 255
        return Scores(value, torch.ones_like(value).bool(), ("judge",))


def mutated() -> Fake:
    model = Fake()
    with torch.no_grad():
        model.network.mean.bias.add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward": darkness}, r"reward: function fake.brightness → function test_identity.darkness"),
        (
            {"reward": [brightness, darkness]},
            r"reward: function fake.brightness → \[function fake.brightness, function",
        ),
        ({"reward": Judge()}, r"reward: function fake.brightness → object test_identity.Judge 'judge'"),
        ({"reward": None}, r"given objects in Python, which are not given now: reward \(function fake.brightness\)"),
        ({"prompts": PROMPTS[:5]}, r"prompts: 6 prompts → 5 prompts; prompts: prompts was sha256"),
        ({"prompts": [*PROMPTS[:5], "rain"]}, r"own: prompts: prompts was sha256"),
        ({"prompts": [*PROMPTS[:5], Prompt("snow", {"tag": 1})]}, r"prompts: prompts was sha256"),
        ({"test_prompts": PROMPTS}, r"test_prompts: none given → 6 prompts"),
        (
            {"algorithm": tempflow()},
            r"algorithm: none given → object \S*Algorithm 'TempFlow-GRPO'|algorithm: none given",
        ),
        ({"model": mutated()}, r"own: model: weights was sha256 \w+…, is now sha256"),
    ],
)
def test_other_objects_are_named_and_refused(given: dict[str, Any], message: str, begun: Path) -> None:
    before = tree(begun)
    with pytest.raises(ValueError, match=message):
        go(begun, resume=True, **given)
    assert tree(begun) == before


def test_a_test_is_not_taken_over_from_a_run_that_was_given_objects(begun: Path) -> None:
    settings = config(Path("x"), **SHORT).replace()
    e = settings.evaluation.model_copy(update={"before": str(begun), "metric": "reward"})
    settings = settings.replace(evaluation=e)
    own = identity(settings, settings.algorithm.build(), {}, {})
    with pytest.raises(
        ValueError, match=r"evaluation.before: .* was set otherwise: .*reward: function fake.brightness"
    ):
        state.run_baseline(settings, own)


def test_objects_are_told_apart_by_kind_name_and_settings() -> None:
    same = [flow_grpo(steps=4, group=4), flow_grpo(steps=4, group=4)]
    others = [flow_grpo(steps=4, group=4, clip=0.5), flow_grpo(steps=4, group=6), flow_grpo(steps=5, group=4)]
    others.append(replace(same[0], weight_sets={**same[0].weight_sets, "average": Ema(0.5)}))
    names = [named("algorithm", algorithm) for algorithm in (*same, *others[:3])]
    assert names[0] == names[1] and len(set(names)) == 4
    assert named("reward", JPEGCompressibility(quality=50)) != named("reward", JPEGCompressibility(quality=90))
    assert named("reward", from_function(brightness)) == named("reward", brightness) == "function fake.brightness"
    assert described(partial(darkness, prompts=3)) != described(partial(darkness, prompts=4))
    loop_of = lambda: loop_of  # closes over itself  # noqa: E731
    assert described(loop_of)


MINE, OTHER = "tempflow.rewards.jpeg_compressibility:jpeg_compressibility", "tempflow.rewards.shapes:shapes"


def installed(monkeypatch: pytest.MonkeyPatch, version: str, value: str = MINE) -> None:
    """A package with a reward and an algorithm."""
    metadata = f"Name: theirs\nVersion: {version}\n"
    package = type("Package", (Distribution,), {"read_text": lambda _, name: metadata, "locate_file": None})()
    points = EntryPoints(
        EntryPoint(name, value, group)._for(package)  # type: ignore[attr-defined]
        for name, value, group in (
            ("mine", value, "tempflow.rewards"),
            ("my_grpo", "tempflow.algorithms:flow_grpo", "tempflow.algorithms"),
        )
    )
    for module in (rewards, algorithms):
        monkeypatch.setattr(module, "entry_points", points.select)


@pytest.mark.parametrize("where", ["rewards", "gold", "metric"])
def test_another_package_s_reward_and_algorithm_are_recorded(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "1.2")
    named = {"rewards": {"rewards": [{"name": "mine"}]}, "gold": {"evaluation": {"gold": ["mine"]}}}
    named["metric"] = {"evaluation": {"metric": "mine"}}
    settings = config(tmp_path, algorithm={"name": "my_grpo"}, **named[where])

    def now(**given: object) -> Identity:
        return identity(settings, settings.algorithm.build(), {}, given)

    was = now()
    assert was.plugins == {
        "reward 'mine'": f"theirs 1.2 ({MINE})",
        "algorithm 'my_grpo'": "theirs 1.2 (tempflow.algorithms:flow_grpo)",
    }
    assert Identity(**json.loads(json.dumps(was.to_json()))) == was and not changed_contents(was, now())
    assert ("reward 'mine'" in now(reward=brightness).plugins) == (where != "rewards")
    assert "algorithm 'my_grpo'" not in now(algorithm=flow_grpo()).plugins
    installed(monkeypatch, "1.3", OTHER)
    assert changed_contents(was, now()) == [
        "algorithm 'my_grpo': theirs 1.2 (tempflow.algorithms:flow_grpo) → theirs 1.3 (tempflow.algorithms:flow_grpo)",
        f"reward 'mine': theirs 1.2 ({MINE}) → theirs 1.3 ({OTHER})",
    ]
    older = {key: value for key, value in was.to_json().items() if key != "plugins"}  # as runs from before have it
    assert not changed_contents(Identity(**older), now())


def named(argument: str, value: object) -> str:
    settings = config(Path("x"))
    return identity(settings, settings.algorithm.build(), {}, {argument: value}).objects[argument]


# -------------------------------------------------------------------------------------------------------- interrupted
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_right_after_a_save_writes_nothing_again(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, saved = checkpoint.save, list[int]()

    def save(run: Path, iteration: int, *args: Any, **kwargs: Any) -> Path:
        saved.append(iteration)
        path = kept(run, iteration, *args, **kwargs)
        if iteration == 1:
            os.kill(os.getpid(), number)
        return path

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Interrupted) as stop:
        go(tmp_path / "toy")
    assert saved == [0, 1] and stop.value.code == 128 + number
    monkeypatch.setattr(checkpoint, "save", kept)
    assert go(tmp_path / "toy", resume=True).folder == tmp_path / "toy"


def test_a_terminal_that_was_let_go_of_before_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        kept = checkpoint.save
        monkeypatch.setattr(
            checkpoint, "save", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGHUP) or kept(*args, **kwargs)
        )
        assert go(tmp_path / "toy").folder.is_dir()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_somebody_put_into_model_is_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "toy" / "model" / "notes.txt"
    kept = checkpoint.save

    def save(run: Path, *args: Any, **kwargs: Any) -> Path:
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine")
        return kept(run, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises((ValueError, GuardError), match=r"model/notes.txt was not written by tempflow"):
        go(tmp_path / "toy")
    assert notes.read_text() == "mine"
    notes.unlink()
    monkeypatch.setattr(checkpoint, "save", kept)
    go(tmp_path / "toy", resume=True)
    assert (tmp_path / "toy" / "model" / "model.safetensors").is_file()


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {here!r})
from fake import Fake, Velocity, brightness, config, PROMPTS
from pathlib import Path
import tempflow
forward, calls = Velocity.forward, []
def counted(*args):
    calls.append(0)
    for _ in range({times} if len(calls) == 60 else 0):
        os.kill(os.getpid(), {number})
    return forward(*args)
Velocity.forward = counted
tempflow.train(config(Path({folder!r})), model=Fake(), reward=brightness, prompts=PROMPTS)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(2, 1), (2, 2), (15, 1)])
def test_a_script_that_is_interrupted_ends_without_a_traceback(number: int, times: int, tmp_path: Path) -> None:
    code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path / "toy"), times=times, number=number)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr, done.stderr
    if times == 1:
        assert "to go on: tempflow.train(" in done.stdout and checkpoint.newest(tmp_path / "toy")
    else:
        assert "interrupted" in done.stderr


@pytest.mark.slow
def test_a_terminal_that_goes_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The shell's terminal is closed: nothing can be said any more, and everything is kept."""
    import pty

    code = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path / "toy"), times=0, number=0)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("config(Path", "config(iterations=10**6, output=Path")],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    metrics, seen = tmp_path / "toy" / "metrics.jsonl", b""
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 3):
        assert process.poll() is None, seen
        seen += os.read(ours, 1024)
    os.close(ours)
    assert process.wait(120) == 129
    newest = checkpoint.newest(tmp_path / "toy")
    assert int(newest.name) >= 3 and (tmp_path / "toy" / "metrics.jsonl").read_text().endswith("\n")
