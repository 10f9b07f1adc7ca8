"""Faults of a run, one row each: what is said, how it ends, what is kept, and that it goes on (docs/faults.md).

Every row goes through the command line. After each, whatever is on disk is whole and true. Where the fault goes away
the resumed run ends bit for bit as one in which it never was.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_scene import PROMPTS, Fake, Scene, assert_equal, assert_sound, newest, once, raises, sends
from safetensors import SafetensorError

from tempflow.cli import main
from tempflow.core.scores import Scores
from tempflow.models import shapes_folder
from tempflow.train import checkpoint, track
from tempflow.train.evaluator import Evaluator
from tempflow.train.weights import Trainable

NAN, INF = math.nan, math.inf
FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass(frozen=True)
class Fault:
    """A row.

    inject   makes it happen in a scene
    says     patterns that the output has, logged warnings included
    status   the exit status
    kept     iteration of the newest checkpoint afterwards; None = there is none
    heals    once it has gone, the resumed run equals the uninterrupted one
    harmless the run itself equals the uninterrupted one
    """

    name: str
    inject: Callable[[Scene], None]
    says: tuple[str, ...]
    status: int = 1
    kept: int | None = 2
    heals: bool = True
    harmless: bool = False


@dataclass
class ObjectReward:
    """A reward that is no function; `answer` makes what `score` returns of the true scores."""

    function: Any
    answer: Callable[[Any, Scores], Any]
    name: str = "shapes"
    groupwise: bool = False

    def score(self, media: Any, prompts: Any, metadata: Any) -> Any:
        from PIL import Image

        values = self.function([Image.fromarray(m) for m in media.pictures().numpy()], list(prompts))
        value = torch.tensor(values, dtype=torch.float32)[:, None]
        return self.answer((media, prompts, metadata), Scores(value, torch.ones_like(value).bool(), ("shapes",)))


def as_object(answer: Callable[[Any, Scores], Any]) -> Callable[[Any], ObjectReward]:
    return lambda function: ObjectReward(function, answer)


def on_meta(given: Any, scores: Scores) -> Scores:
    moved = object.__new__(Scores)
    for name, value in (("value", scores.value.to("meta")), ("ok", scores.ok.to("meta")), ("names", scores.names)):
        object.__setattr__(moved, name, value)
    return moved


def spoils(given: Any, scores: Scores) -> Scores:
    media, prompts, metadata = given
    media.frames.zero_()
    for line in metadata:
        line["tags"].clear()
    metadata.clear()
    prompts.clear()
    return scores


def first(value: float | None) -> Callable[[list[float]], list[float | None]]:
    return lambda values: [value, *values[1:]]


def reward(act: Any, stage: str = "rollout 3", make: Any = None) -> Callable[[Scene], None]:
    return lambda scene: scene.set_reward(act, stage, *([make] if make else []))


def forward(stage: str, act: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.forward(stage, act)


def nan_row(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(out[:1], NAN), out[1:]])


def blown(out: torch.Tensor) -> torch.Tensor:
    out.register_hook(lambda gradient: gradient * INF)
    return out


# ------------------------------------------------------------------------------------------------------------- model
ALL_FAILED = r"iteration 3: all 54 rewards failed, so there is nothing to learn from: "
GO_ON = r"to go on, once that is mended: tempflow train --resume \S+toy"
MODEL = [
    Fault(
        "NaN from the model in a rollout",
        forward("rollout 3", lambda out: out * NAN),
        (ALL_FAILED + "the model's final latents are not finite: try model.dtype float32", GO_ON),
    ),
    Fault(
        "NaN from the model for one row",
        forward("rollout 3", nan_row),
        (r"warn: iteration 3: reward_failures: 0\.\d+ of the scores failed, above the limit 0.05",),
        status=0,
        kept=4,
        heals=False,
    ),
    Fault(
        "NaN from the model in training",
        forward("update 3", lambda out: out * NAN),
        (r"iteration 3: non_finite: the loss is nan. No weight was changed", r"--guards.non-finite.action", GO_ON),
    ),
    Fault(
        "infinite gradient",
        forward("update 3", lambda out: blown(out) if out.requires_grad else out),
        (r"iteration 3: non_finite: the gradient norm is (inf|nan). No weight was changed", GO_ON),
    ),
    Fault(
        "no memory in a rollout",
        forward("rollout 4", raises(MEMORY)),
        (r"OutOfMemoryError: CUDA out of memory", r"smaller rollout_rows \(now 64\) and train_rows", GO_ON),
        kept=3,
    ),
    Fault(
        "no memory in training",
        forward("update 4", raises(MEMORY)),
        (r"OutOfMemoryError: CUDA out of memory", r"stopped after 3 of 4 iterations by OutOfMemoryError", GO_ON),
    ),
    Fault("no memory in a validation", forward("validation 2", raises(MEMORY)), (r"CUDA out of memory", GO_ON)),
    Fault("no memory before training", forward("before", raises(MEMORY)), (r"CUDA out of memory", GO_ON), kept=None),
]

# ------------------------------------------------------------------------------------------------------------ reward
REFUSED = ConnectionError("refused")
RAISED = r"reward 'shapes' raised ConnectionError: refused"


def only_for(prompt: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        from fake import brightness

        from tempflow import rewards

        def shapes(images: Any, prompts: list[str]) -> Any:
            if prompt in prompts:
                raise KeyError(prompt)
            values = brightness(images, prompts)
            scene.returned[scene.stage] += [v for v in values if v is not None]
            return values

        scene.patch.setattr("tempflow.rewards.shapes.shapes", lambda: rewards.from_function(shapes))

    return inject


def hangs(timeout: float, act: Callable[[], None] = lambda: None) -> Callable[[Scene], None]:
    def hang(values: Any) -> Any:
        act()
        threading.Event().wait(3.0)
        return [v * 0 for v in values]

    def inject(scene: Scene) -> None:
        scene.configure(rewards=[{"name": "shapes", "timeout": timeout}])
        scene.set_reward(hang, "rollout 3")

    return inject


REWARD = [
    Fault(
        "reward raises once",
        reward(once(lambda: raises(REFUSED)(None))),
        (RAISED + "; its 54 scores are failed",),
        status=0,
        kept=4,
        harmless=True,
    ),
    Fault("reward raises", reward(raises(REFUSED)), (RAISED, ALL_FAILED + RAISED, GO_ON)),
    Fault(
        "reward raises, four iterations in",
        reward(raises(REFUSED), "rollout 4"),
        (r"iteration 4: all 54 rewards failed.*" + RAISED, GO_ON),
        kept=3,
    ),
    Fault(
        "reward object raises",
        reward(lambda v: v, make=as_object(lambda given, scores: raises(REFUSED)(None))),
        (r"before training: all 6 scores of shapes failed: " + RAISED, GO_ON),
        kept=None,
    ),
    Fault("reward hangs", hangs(0.3), (r"reward 'shapes' took longer than 0\.3 s", ALL_FAILED, GO_ON), heals=True),
    Fault(
        "SIGTERM while a reward hangs",
        hangs(60, lambda: sends(signal.SIGTERM)(None)),
        (r"stopped after 2 of 4 iterations; nothing is lost", r"to go on: tempflow train --resume"),
        status=143,
    ),
    Fault(
        "reward with a score too few",
        reward(lambda values: values[:-1]),
        (r"reward 'shapes' returned 53 scores; expected 54 numbers, one per image", GO_ON),
        status=2,
    ),
    Fault(
        "reward object with a row too few",
        reward(lambda v: v, make=as_object(lambda given, scores: scores.select(torch.arange(len(scores) - 1)))),
        (r"reward 'shapes' returned 5 rows; expected 6, one per medium",),
        status=2,
        kept=None,
    ),
    Fault(
        "reward of a wrong type",
        reward(lambda values: "good"),
        (r"reward 'shapes' returned 'good', a str; expected 54 numbers",),
        status=2,
    ),
    Fault(
        "reward object without scores",
        reward(lambda v: v, make=as_object(lambda given, scores: None)),
        (r"reward 'shapes' returned a NoneType; expected tempflow.core.scores.Scores",),
        status=2,
        kept=None,
    ),
    Fault(
        "reward object on another device",
        reward(lambda v: v, make=as_object(on_meta)),
        (r"reward 'shapes' returned scores on meta; expected cpu",),
        status=2,
        kept=None,
    ),
    Fault(
        "reward function on another device",
        reward(lambda values: torch.empty(len(values), device="meta")),
        (r"reward 'shapes' raised NotImplementedError", ALL_FAILED),
    ),
    *[
        Fault(f"reward says {value} once", reward(first(value)), (), status=0, kept=4, heals=False)
        for value in (NAN, INF, None)
    ],
    Fault(
        "reward says None for all",
        reward(lambda values: [None] * len(values)),
        (ALL_FAILED + r"the rewards said so themselves \(None, NaN or infinity\)", GO_ON),
    ),
    Fault(
        "reward raises for one prompt",
        only_for(PROMPTS[1]),
        (r"reward 'shapes' raised KeyError: 'the sun'", r"warn: 1 of 6 scores of shapes failed"),
        status=0,
        kept=4,
        heals=False,
    ),
    Fault(
        "reward raises in a validation",
        reward(raises(REFUSED), "validation 2"),
        (RAISED, r"warn: 6 of 6 scores of shapes failed"),
        status=0,
        kept=4,
        heals=False,
    ),
    Fault(
        "reward raises in the first validation",
        reward(raises(REFUSED), "validation 0"),
        (RAISED, r"warn: 6 of 6 scores of shapes failed"),
        status=0,
        kept=4,
        heals=False,
    ),
    Fault("reward raises in the last test", reward(raises(REFUSED), "after"), (RAISED, r"-> nan"), status=0, kept=4),
    Fault(
        "reward raises before training",
        reward(raises(REFUSED), "before"),
        (r"before training: all 6 scores of shapes failed: " + RAISED, GO_ON),
        kept=None,
    ),
    Fault(
        "reward changes what it is given",
        reward(lambda v: v, make=as_object(spoils)),
        (),
        status=0,
        kept=4,
        harmless=True,
    ),
]


# -------------------------------------------------------------------------------------------------------------- disk
def half_a_line(scene: Scene) -> None:
    """The disk fills up in the middle of a line of metrics.jsonl."""
    original = Path.open

    class Half:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *error: Any) -> None:
            self.stream.close()

        def write(self, text: str) -> None:
            self.stream.write(text[: len(text) // 2])
            raise FULL

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(path, mode, *args, **kwargs)
        full = (path.name, mode) == ("metrics.jsonl", "a") and len(path.read_bytes().splitlines()) == 2
        return Half(stream) if full else stream

    scene.patch.setattr(Path, "open", opened)


def half_a_model(scene: Scene) -> None:
    def save(model: Fake, folder: str, network: object = None) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"\0" * 10)
        raise FULL

    scene.patch.setattr(Fake, "save", save)


def under_a_file(scene: Scene) -> None:
    (scene.root / "file").touch()
    scene.run = scene.root / "file" / "toy"
    scene.configure()


DISK = [
    Fault("disk full: metrics.jsonl", half_a_line, (r"OSError: \[Errno 28\] No space left.*Free some space", GO_ON)),
    *[
        Fault(
            f"disk full: checkpoint, {type(error).__name__}",
            lambda scene, error=error: scene.at("checkpoint 4", checkpoint, "save_file", raises(error)),
            (r"checkpoint of iteration 4 could not be written: .*Older ones are whole; free some space", GO_ON),
        )
        for error in (FULL, SafetensorError("Error while serializing: I/O error: No space left on device"))
    ],
    Fault("disk full: model/", half_a_model, (r"No space left on device", r"Free some space", GO_ON), kept=4),
    Fault(
        "disk full: last files",
        lambda scene: scene.at("after", Evaluator, "strips", lambda drawn: raises(FULL)(None)),
        (r"No space left on device", GO_ON),
        kept=4,
    ),
    Fault(
        "output folder cannot be made",
        under_a_file,
        (r"output: '\S+toy' cannot be written \(\[Errno 20\] Not a directory",),
        status=2,
        kept=None,
        heals=False,
    ),
    Fault(
        "output folder is read-only",
        lambda scene: scene.patch.setattr(Path, "mkdir", lambda *a, **k: raises(DENIED)(None)),
        (r"output: '\S+toy' cannot be written \(\[Errno 13\] Permission denied\); choose another folder",),
        status=2,
        kept=None,
        heals=False,
    ),
]


# ----------------------------------------------------------------------------------------------------------- prompts
def line(text: bytes) -> Callable[[Scene], None]:
    """Puts it after the first line of the prompt file."""

    def inject(scene: Scene) -> None:
        head, *rest = scene.prompts.read_bytes().splitlines(keepends=True)
        scene.prompts.write_bytes(b"".join([head, text, b"\n", *rest]))

    return inject


def before(name: str, text: bytes, message: str) -> Fault:
    return Fault(name, line(text), (rf"data.train: \S+prompts.jsonl:2: {message}",), status=2, kept=None, heals=False)


PROMPT = [
    before("prompt line: no JSON", b'{"prompt": "a', r"not JSON \(.*a line looks like"),
    before("prompt line: no prompt", b'{"promt": "a"}', r"no \"prompt\", but 'promt'; nearest valid"),
    before("prompt line: no text", b'{"prompt": 3}', r"\"prompt\" is 3; it must be a text"),
    before("prompt line: no object", b"[1, 2]", r"a JSON list, not an object"),
    before("prompt line: not UTF-8", b'{"prompt": "caf\xe9"}', r"not UTF-8"),
    Fault("prompt line: empty", line(b"  "), (), status=0, kept=4, harmless=True),
    Fault(
        "prompt file: empty",
        lambda scene: scene.prompts.write_bytes(b"") and None,
        (r"data.train: \S+prompts.jsonl holds no prompt",),
        status=2,
        kept=None,
        heals=False,
    ),
]


# ------------------------------------------------------------------------------------------------- signals and others
def sigterm(name: str, inject: Callable[[Scene], None], kept: int | None, done: int) -> Fault:
    says = (rf"stopped after {done} of 4 iterations; nothing is lost", r"to go on: tempflow train --resume \S+toy")
    return Fault(f"SIGTERM {name}", inject, says, status=143, kept=kept)


def twice(values: Any) -> Any:
    """As a person presses it: Python runs handlers in the main thread, and this is a reward's."""
    signal.raise_signal(signal.SIGINT)
    time.sleep(1)
    signal.raise_signal(signal.SIGINT)
    time.sleep(1)
    return values


def clock_back(scene: Scene) -> None:
    ticks = itertools.count()
    for name in ("time", "perf_counter"):
        scene.patch.setattr(time, name, lambda: 1e9 - next(ticks))


def broken_tracker(scene: Scene) -> None:
    class Broken:
        def log(self, metrics: Any, step: int) -> None:
            raise REFUSED

        def close(self) -> None:
            raise REFUSED

    scene.configure(track={"to": ["tensorboard"]})
    scene.patch.setattr(track, "_OPEN", {"tensorboard": lambda *args: Broken()})
    scene.patch.setattr(track, "find_spec", lambda name: name)


def second_run(words: Callable[[Scene], list[str]]) -> Callable[[Scene], None]:
    """While the run scores its third rollout, another is started in its folder."""

    def inject(scene: Scene) -> None:
        def start() -> None:
            assert main(["train", *words(scene)]) == 2

        scene.set_reward(once(start), "rollout 3")

    return inject


TERM = signal.SIGTERM
OTHER = [
    sigterm("before training", forward("before", sends(TERM)), None, 0),
    sigterm("in the first validation", forward("validation 0", sends(TERM)), 0, 0),
    sigterm("in a rollout", forward("rollout 4", sends(TERM)), 3, 3),
    sigterm("in decoding", lambda scene: scene.at("rollout 4", Fake, "decode", sends(TERM)), 3, 3),
    sigterm("in a reward", reward(sends(TERM), "rollout 4"), 3, 3),
    sigterm("in an update", forward("update 4", sends(TERM)), 3, 3),
    sigterm("between two updates", lambda scene: scene.at("update 4", Trainable, "publish", sends(TERM)), 4, 4),
    sigterm("in a validation", forward("validation 2", sends(TERM)), 2, 2),
    sigterm(
        "in writing a checkpoint",
        lambda scene: scene.at("checkpoint 2", checkpoint, "sha256", sends(TERM)),
        2,
        2,
    ),
    sigterm("in the last test", forward("after", sends(TERM)), 4, 4),
    *[
        Fault(
            f"{number.name} in a rollout",
            forward("rollout 4", sends(number)),
            (r"stopped after 3 of 4 iterations; nothing is lost", r"to go on: tempflow train --resume \S+toy"),
            status=128 + number,
            kept=3,
        )
        for number in (signal.SIGINT, signal.SIGHUP)
    ],
    Fault("second Ctrl-C", reward(once(lambda: twice(None)), "rollout 4"), (r"tempflow: interrupted",), 130),
    Fault("clock goes backwards", clock_back, (), status=0, kept=4, harmless=True),
    Fault(
        "tracker fails",
        broken_tracker,
        (r"tracking: tensorboard failed and is closed, training goes on: ConnectionError: refused",),
        status=0,
        kept=4,
        harmless=True,
    ),
    Fault(
        "second run in a folder",
        second_run(lambda scene: [str(scene.root / "config.yaml")]),
        (r"output: '\S+toy' already holds a run; choose another folder, remove it, or go on with it",),
        status=0,
        kept=4,
        harmless=True,
    ),
    Fault(
        "second process resumes a run that goes on",
        second_run(lambda scene: ["--resume", str(scene.run)]),
        (r"output: another process is at work in '\S+toy'",),
        status=0,
        kept=4,
        harmless=True,
    ),
]


# ----------------------------------------------------------------------------------------------------- configuration
def compares_with_nothing(scene: Scene) -> None:
    """The guard of velocities' size is asked for, and the KL, for which the starting model was asked, is taken away."""
    scene.configure(guards={"velocity_norm": {"action": "warn"}})
    file = scene.root / "config.yaml"
    text = file.read_text()
    assert "kl: 0.01" in text
    file.write_text(text.replace("kl: 0.01", "kl: 0.0"))


CONFIGURATION = [
    Fault(
        "guard without a reference",
        compares_with_nothing,
        (r"guards.velocity_norm.action: 'warn' compares with the starting model, .* tempflow_grpo .* nearest valid",),
        status=2,
        kept=None,
        heals=False,
    ),
]

FAULTS = [*MODEL, *REWARD, *DISK, *PROMPT, *OTHER, *CONFIGURATION]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        scene = Scene(tmp_path_factory.mktemp("whole"), patch)
        assert scene.train() == 0
    yield scene.run


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault(
    fault: Fault,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        scene = Scene(tmp_path, patch)
        fault.inject(scene)
        status = scene.train()
    said = "".join(capsys.readouterr()) + caplog.text
    for pattern in fault.says:
        assert re.search(pattern, said, re.DOTALL), f"{pattern}\nnot in\n{said}"
    assert status == fault.status, said
    assert newest(scene.run) == fault.kept
    assert_sound(scene)
    if fault.harmless:
        assert_equal(whole, scene.run)
    elif fault.heals:
        with monkeypatch.context() as patch:
            assert Scene(tmp_path, patch).resume() == 0
        assert_equal(whole, scene.run)


# -------------------------------------------------------------------------------------------- between stop and resume
@dataclass(frozen=True)
class Damage:
    """What happens to the folder of a run stopped in iteration 4 (checkpoints 0, 2 and 3), before it goes on."""

    name: str
    act: Callable[[Path], object]
    says: str
    words: tuple[str, ...] = ()
    status: int = 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def files(run: Path, name: str) -> list[Path]:
    return sorted((run / checkpoint.FOLDER).glob(f"[0-9]*/{name}"))


def rewrite(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


DAMAGE = [
    Damage(
        "newest checkpoint cut short",
        lambda run: cut(files(run, "policy/weights.safetensors")[-1]),
        r"000003 is damaged \(policy/weights.safetensors has \d+ bytes, not \d+\); the one before it is used",
    ),
    Damage(
        "newest checkpoint without a file",
        lambda run: files(run, "state.json")[-1].unlink(),
        r"000003 is damaged \(state.json is missing\); the one before it is used",
    ),
    Damage(
        "all checkpoints damaged",
        lambda run: [cut(path) for path in files(run, "policy/ema.safetensors")],
        r"all 3 checkpoints are damaged; nothing to resume from",
        status=2,
    ),
    Damage("pointer lost", lambda run: (run / checkpoint.FOLDER / checkpoint.BEST).unlink(), "going on from"),
    Damage("config.yaml missing", lambda run: (run / "config.yaml").unlink(), r"toy/config.yaml is no file", status=2),
    Damage(
        "config.yaml missing, another given",
        lambda run: (run / "config.yaml").unlink(),
        r"going on from \S+000003",
        words=("../config.yaml",),
    ),
    Damage(
        "config.yaml changed",
        lambda run: rewrite(run, "learning_rate: 0.05", "learning_rate: 0.01"),
        r"the configuration is not the run's own: optimizer.learning_rate: 0.05 → 0.01. Take back .*--allow-changes",
        status=2,
    ),
    Damage(
        "config.yaml broken",
        lambda run: rewrite(run, "iterations: 4", "iterations: ["),
        r"toy/config.yaml is not YAML",
        status=2,
    ),
    Damage(
        "mark missing",
        lambda run: (run / ".tempflow.json").unlink(),
        r"resume: '\S+toy' has no .tempflow.json of a run, so nothing is written there; nearest valid",
        status=2,
    ),
    Damage(
        "somebody's model/",
        lambda run: [(run / "model").mkdir(), (run / "model" / "notes.txt").write_text("mine")],
        r"resume: '\S+toy/model/notes.txt' is not as this run wrote it, and its end writes model/ anew; move it away",
        status=2,
    ),
    Damage("metrics.jsonl cut short", lambda run: cut(run / "metrics.jsonl"), r"less than at its checkpoint", status=2),
    Damage(
        "metrics.jsonl with half a line too much",
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"iterat'),
        r"going on from",
    ),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=[damage.name for damage in DAMAGE])
def test_damage(
    damage: Damage, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        scene = Scene(tmp_path, patch)
        scene.forward("rollout 4", sends(TERM))
        assert scene.train() == 143 and newest(scene.run) == 3
    damage.act(scene.run)
    before = {p: p.read_bytes() for p in scene.run.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        words = [str(scene.run / word) for word in damage.words]
        status = Scene(tmp_path, patch).resume(*words)
    said = "".join(capsys.readouterr())
    assert re.search(damage.says, said) and status == damage.status, said
    if status == 0:
        assert_equal(whole, scene.run)
    elif "metrics" not in damage.name:
        assert before == {p: p.read_bytes() for p in scene.run.rglob("*") if p.is_file()}


def test_weights_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The model itself: the run does not begin, and nothing is written."""
    model = shutil.copytree(shapes_folder(), tmp_path / "model")
    cut(model / "transformer" / "diffusion_pytorch_model.safetensors")
    words = ["--model.path", str(model), "--output", str(tmp_path / "toy")]
    assert main(["train", "demo", *words]) == 2
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "toy").exists()
