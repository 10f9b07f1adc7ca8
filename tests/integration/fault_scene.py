"""A short run through the command line on the cheap model, in which something can be made to go wrong at a stage."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from fake import PROMPTS, Fake, Velocity, brightness, config

from tempflow.cli import main
from tempflow.config import to_yaml
from tempflow.rewards import from_function
from tempflow.train import checkpoint, trainer
from tempflow.train.records import LINES

OPTIONS: dict[str, Any] = {
    "iterations": 4,
    "train_rows": 16,
    "optimizer": {"updates_per_iteration": 2, "ema_decay": 0.7, "warmup_iterations": 2},
    "checkpoint": {"every": 2, "keep": 3},
    "evaluation": {"every": 2, "validation_prompts": 6, "test_prompts": 6, "metric": "shapes"},
    "algorithm": {"name": "tempflow_grpo", "steps": 4, "seeds": 2, "branches": 3, "clip": 0.02, "kl": 0.01},
    "guards": {"latent_norm": {"action": "off"}},
}

Act = Callable[[Any], Any]


class Scene:
    """Where a run is staged.

    stage     where it is: "before", "validation N", "rollout N", "update N", "checkpoint N", "after"
    returned  the valid scores that the reward gave, by stage
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.run, self.patch = folder, folder / "toy", patch
        self.stage, self.returned = "before", defaultdict[str, list[float]](list)
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"prompt": p, "tags": ["a"]}) + "\n" for p in PROMPTS))
        self.configure()
        patch.setattr(trainer, "prepare_model", lambda *args: Fake())
        patch.setattr(trainer.pictures, "curve", lambda *args: None)  # drawing takes longer than all the rest
        self.set_reward(lambda values: values)
        for place, name, said in (
            (trainer, "collect", lambda *a: f"rollout {a[2] + 1}"),
            (trainer, "learn", lambda *a: f"update {a[2][0].iteration + 1}"),
            (checkpoint, "save", lambda *a: f"checkpoint {a[1]}"),
            (trainer.Trainer, "_validate", lambda *a: f"validation {a[0].done}"),
            (trainer.Trainer, "_finish", lambda *a: "after"),
        ):
            patch.setattr(place, name, self._staged(getattr(place, name), said))

    def configure(self, **changes: Any) -> None:
        data = {"prompts_per_iteration": 3} | dict.fromkeys(("train", "validation", "test"), str(self.prompts))
        settings = config(self.run, **{"data": data, "rewards": [{"name": "shapes"}], **OPTIONS, **changes})
        (self.root / "config.yaml").write_text(to_yaml(settings))

    def set_reward(self, act: Act, stage: str = "", make: Callable[[Any], Any] = from_function) -> None:
        """What the reward "shapes" is: brightness, of which `act` makes what is returned, at a stage (or always)."""

        def shapes(images: Any, prompts: Any) -> Any:
            values = brightness(images, prompts)
            here = self.stage
            result = act(values) if stage in ("", here) else values
            if isinstance(result, list) and len(result) == len(values):
                self.returned[here] += [v for v in result if isinstance(v, float) and math.isfinite(v)]
            return result

        self.patch.setattr("tempflow.rewards.shapes.shapes", lambda: make(shapes))

    def at(self, stage: str, owner: Any, name: str, act: Act) -> None:
        """From now on `act` changes what `owner.name` gives at a stage; it may raise."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            return act(result) if self.stage == stage else result

        self.patch.setattr(owner, name, call)

    def forward(self, stage: str, act: Act) -> None:
        self.at(stage, Velocity, "forward", act)

    def train(self) -> int:
        return main(["train", str(self.root / "config.yaml")])

    def resume(self, *words: str) -> int:
        self.stage = "before"
        return main(["train", "--resume", str(self.run), *words])

    def _staged(self, original: Any, said: Callable[..., str]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, self.stage = self.stage, said(*args)
            result = original(*args, **kwargs)
            self.stage = outer
            return result

        return call


def once(act: Callable[[], Any]) -> Act:
    """Does it the first time only."""
    left = [act]

    def pass_on(value: Any) -> Any:
        if left:
            left.pop()()
        return value

    return pass_on


def raises(error: BaseException) -> Act:
    def act(value: Any) -> Any:
        raise error

    return act


def sends(number: signal.Signals) -> Act:
    return once(lambda: os.kill(os.getpid(), number))


def newest(run: Path) -> int | None:
    """The iteration of the newest checkpoint, every one there being whole."""
    root = run / checkpoint.FOLDER
    paths = sorted(p for p in root.glob("*") if p.name.isdigit()) if root.is_dir() else []
    assert all(checkpoint.damage(p) is None for p in paths)
    assert not list(root.glob(".[0-9]*"))
    return int(paths[-1].name) if paths else None


def assert_sound(scene: Scene) -> None:
    """Nothing false is on disk: whole lines, rewards that are the mean of what was returned, finite weights."""
    run = scene.run
    for name in LINES:
        text = (run / name).read_text() if (run / name).exists() else ""
        assert text == "" or text.endswith("\n")
        for line in map(json.loads, text.splitlines()):
            true = scene.returned.get(f"rollout {line['iteration']}")
            if name == "metrics.jsonl" and true:
                assert line["reward/shapes"] == pytest.approx(sum(true) / len(true), rel=1e-5)
    if (run / "summary.json").exists():
        looks = [json.loads(text)["mean"]["shapes"] for text in (run / "evaluation.jsonl").read_text().splitlines()]
        best = max(value for value in looks if value is not None)
        assert json.loads((run / "summary.json").read_text())["best_validation"] == best
    tensors: list[Tensor] = []
    for path in (run / checkpoint.FOLDER).glob("[0-9]*"):
        for name, part in checkpoint.read(path).tensors.items():
            tensors += part.values() if name != "looks" else []
    if (run / "model").exists():
        tensors += load_file(run / "model" / "model.safetensors").values()
    assert all(t.isfinite().all() for t in tensors)


def assert_equal(a: Path, b: Path) -> None:
    """Two finished runs: the same files, bit for bit."""
    for name in (*LINES, "samples.json", "model/model.safetensors", "before_after.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    summaries = [json.loads((run / "summary.json").read_text()) | {"seconds": 0} for run in (a, b)]
    assert summaries[0] == summaries[1]
    ends = [checkpoint.read(checkpoint.newest(run)) for run in (a, b)]
    for name, part in ends[0].tensors.items():
        assert all(t.equal(ends[1].tensors[name][k]) for k, t in part.items()), name
