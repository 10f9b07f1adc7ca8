"""Shared by the experiments: run configurations two side by side, resumably, and compare them pairwise."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files
from itertools import count
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tempflow.algorithms import Algorithm
from tempflow.config import Config, to_yaml
from tempflow.core.cost import equivalents
from tempflow.data.prompts import load_prompts
from tempflow.evaluate.suite import fixed_prompts
from tempflow.folder import remove
from tempflow.report.scatter import Scatter
from tempflow.request import Prompt
from tempflow.stats import paired_interval

ASIDE: dict[str, Any] = {
    **dict.fromkeys(("name", "output", "checkpoint", "track", "parallel"), True),
    "evaluation": {"before"},
}
"""Settings that do not change what a run finds."""

REFERENCE = "0.35"
"""Colour of a teacher's markers."""


def told(config: Config, code: int, last: str) -> None:
    """Prints how a run ended."""
    print(f"{Path(config.output).name}: {'' if code == 0 else f'exit {code}: '}{last}", flush=True)


def run_all(
    configs: Sequence[Config],
    side_by_side: int = 2,
    *,
    resume: bool = False,
    ended: Callable[[Config, int, str], None] = told,
) -> None:
    """Runs each configuration in a process of its own; one that has a summary already is left as it is.

    `resume` goes on with a run that was cut off, where its configuration is still the same; else it starts anew.
    `ended` is told of every run its exit status and last line, one run at a time. What ends this call early
    (KeyboardInterrupt, an exception of `ended`) asks the runs at work to keep their state and waits for them.
    """
    live, lock, leaving = set[subprocess.Popen](), Lock(), Event()

    def one(config: Config) -> None:
        if (Path(config.output) / "summary.json").exists():
            return
        with lock:
            if leaving.is_set():
                return
            process = _started(config, resume)
            live.add(process)
        code = _ended(config, process)
        with lock:
            live.discard(process)
            if not leaving.is_set():
                ended(config, code, _last_line(config))

    pool = ThreadPoolExecutor(side_by_side)
    try:
        list(pool.map(one, configs))
    except BaseException:
        with lock:
            leaving.set()
            for process in live:
                process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ended(config: Config, process: subprocess.Popen) -> int:
    """Waits for it and adds its processor time to that of the run's earlier starts; its exit status."""
    try:
        _, status, used = os.wait4(process.pid, 0)
    except ChildProcessError:  # who terminated it has waited already
        return process.wait()
    process.returncode = os.waitstatus_to_exitcode(status)
    _beside(config, ".cpu").write_text(f"{processor_seconds(config) + used.ru_utime + used.ru_stime:.2f}\n")
    return process.returncode


def processor_seconds(config: Config) -> float:
    """What the run has used so far, all its starts together."""
    file = _beside(config, ".cpu")
    return float(file.read_text()) if file.exists() else 0.0


def _beside(config: Config, end: str) -> Path:
    """A file beside the run's folder; rates have dots, so no `with_suffix`."""
    folder = Path(config.output)
    return folder.parent / f"{folder.name}{end}"


def _started(config: Config, resume: bool) -> subprocess.Popen:
    folder, file = Path(config.output), _beside(config, ".yaml")
    words = ["train", str(file)]
    if resume and resumable(config):
        words = ["train", "--resume", str(folder)]
    else:
        remove(folder, "run")
        folder.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(config))
    with _beside(config, ".log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "tempflow.cli", *words], stdout=log, stderr=log)


def resumable(config: Config) -> bool:
    """Whether its folder holds this very run, begun or finished."""
    begun = Path(config.output) / "config.yaml"
    return begun.exists() and begun.read_text() == to_yaml(config)


def _last_line(config: Config) -> str:
    return "".join(_beside(config, ".log").read_text().strip().splitlines()[-1:])


def lines(folder: str | Path, name: str) -> list[dict]:
    """The lines of a run's JSONL file."""
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def summary(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


def samples(folder: str | Path, metric: str = "shapes_strict") -> np.ndarray:
    """[2, N]: per test picture, before and after."""
    return np.array(json.loads((Path(folder) / "samples.json").read_text())[metric], float)


def tested(config: Config) -> list[Prompt]:
    """The prompt of every test picture."""
    return fixed_prompts(load_prompts(config.data.test), config.evaluation.test_prompts)


def gain(a: np.ndarray, b: np.ndarray, prompts: Sequence[Prompt], draws: int = 10000) -> tuple[float, float, float]:
    """Mean of a − b and its 95 % bootstrap interval; seeds and prompts are drawn, task kinds keep their shares.

    a, b: [seeds, N], on the same pictures; prompts: of every picture.
    """
    kinds = [str(p.metadata.get("kind", "")) for p in prompts]
    clusters = [(kind, p.text) for kind, p in zip(kinds, prompts, strict=True)]
    return float(np.nanmean(a - b)), *paired_interval(a, b, draws, strata=kinds, clusters=clusters)


def reach(folder: str | Path, target: float, unit: str = "forward_equivalents", metric: str = "shapes_strict") -> float:
    """Cost (by `unit`) at which the validation curve first reaches `target`, interpolated."""
    return reached([(line[unit], line["mean"][metric]) for line in lines(folder, "evaluation.jsonl")], target)


def reached(curve: Sequence[Sequence[float | None]], target: float) -> float:
    """Cost at which a curve of (cost, score) first reaches `target`, interpolated; infinite where it never does.

    Points without a score (None, NaN) are passed over.
    """
    previous = None
    for cost, score in curve:
        if score is None or cost is None or np.isnan(score):
            continue
        if score >= target:
            if previous is None or score == previous[1]:
                return cost
            share = (target - previous[1]) / (score - previous[1])
            return previous[0] + share * (cost - previous[0])
        previous = (cost, score)
    return float("inf")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def packed(outcomes: np.ndarray) -> str:
    """Outcomes 0 or 1, [N], as hexadecimal digits, the first in the highest bit. Raises ValueError for others."""
    other = int((~np.isin(outcomes, (0, 1))).sum())
    if other:
        raise ValueError(f"outcomes: {other} are neither 0 nor 1 (a failed score is NaN); nearest valid: 0 and 1 alone")
    return np.packbits(outcomes.astype(bool)).tobytes().hex()


def unpacked(digits: str, outcomes: int) -> np.ndarray:
    """What `packed` packed, float64 [outcomes]. Raises ValueError where there are not so many digits."""
    if len(digits) != -(-outcomes // 8) * 2:
        raise ValueError(f"digits: {len(digits)} for {outcomes} outcomes; nearest valid: {-(-outcomes // 8) * 2}")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=outcomes).astype(float)


def affordable(
    algorithm: Algorithm, prompts: int, budget: int, *, guided: bool = False, trained: int | None = None, free: int = 0
) -> int:
    """Iterations, at least 1, whose compute in forward-equivalents comes nearest to the budget.

    guided: whether guidance doubles rows; trained: rows that an iteration trains, where the plans do not know; free:
    rollout rows of an iteration that are not counted.
    """
    others, spent = len(algorithm.objective.weight_sets) - 1, 0
    for iteration in count():
        cost = algorithm.cost(iteration, prompts)
        edges = cost.trained_edges if trained is None else trained
        latent = 0 if algorithm.latent_reward is None else edges
        plain = cost.forwards - free + edges * others
        next_ = spent + equivalents(plain, edges, guided=guided, latent=latent)
        if next_ >= budget:
            return max(1, iteration + (next_ - budget <= budget - spent))
        spent = next_
    raise AssertionError


def prompts_hash(config: Config) -> str:
    """SHA-256 of the test's prompts, in order."""
    told = [(p.text, str(p.metadata.get("kind", ""))) for p in tested(config)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def base_hash(root: Path | None = None) -> str:
    """SHA-256 of the safetensors files, and their names, in a model's folder; by default the shipped shapes model's."""
    root = root or Path(str(files("tempflow.shapes") / "weights"))
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.safetensors")):
        digest.update(file.relative_to(root).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def config_hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(flat(settings), sort_keys=True).encode()).hexdigest()


def mismatch(result: Mapping[str, Any], config: Config, base: str) -> list[str]:
    """Why a result does not stand for `config` from the base weights `base`; nothing when it does.

    A context that came in after the result was made counts only where it is not at its default, which is how the run
    had it.
    """
    known, now = flat(result["config"]), flat(config.model_dump(mode="json", exclude=ASIDE))
    chosen = flat(config.model_dump(mode="json", exclude=ASIDE, exclude_defaults=True))
    why = [] if config_hash(result["config"]) == result["config_hash"] else ["its configuration was changed by hand"]
    why += [] if result["base_hash"] == base else [f"base weights {result['base_hash'][:8]}, now {base[:8]}"]
    why += [] if result["test_hash"] == prompts_hash(config) else ["the test had other prompts"]
    why += [f"{key} was {value!r}, now {now.get(key)!r}" for key, value in known.items() if now.get(key) != value]
    return why + [f"{key} is {now[key]!r}, and was not there" for key in now if key not in known and key in chosen]


def boiled(config: Config, base: str, metric: str) -> dict[str, Any]:
    """A finished run, or one that a guard stopped, as a small file: plain JSON.

    base: hash of the weights that it started from; metric: the test score that is kept, 0 or 1 for each picture.
    `seconds`: processor time, None where the run was not started by `run_all`.
    `diversity` is that of the pictures trained on, in the first and the last five iterations. `collapsed`: the last
    validation is under half of the untrained model's.
    Raises OSError, KeyError or ValueError where the run is neither.
    """
    folder = Path(config.output)
    evaluations, metrics = lines(folder, "evaluation.jsonl"), lines(folder, "metrics.jsonl")
    curve = [[e["forward_equivalents"], e["mean"][metric]] for e in evaluations]
    seen = [line["diversity"] for line in metrics if line.get("diversity") is not None]
    settings = config.model_dump(mode="json", exclude=ASIDE)
    result = {
        "config_hash": config_hash(settings),
        "base_hash": base,
        "test_hash": prompts_hash(config),
        "tempflow": version("tempflow"),
        "torch": version("torch"),
        "curve": [[x, y if y is None else round(y, 5)] for x, y in curve],
        "diversity": [round(float(np.mean(part)), 5) for part in (seen[:5], seen[-5:])] if seen else None,
        "collapsed": curve[-1][1] is None or curve[-1][1] < 0.5 * curve[0][1],
    }
    if (folder / "summary.json").exists():
        told = summary(folder)
        before, after = samples(folder, metric)
        return result | {
            "stopped": None,
            "best_validation": told["best_validation"],
            "before": round(before.mean(), 6),
            "after": round(after.mean(), 6),
            "pictures": len(after),
            "before_bits": packed(before),
            "after_bits": packed(after),
            "cost": told["cost"],
            "seconds": processor_seconds(config) or None,
            "config": settings,
        }
    stops = [a for a in lines(folder, "alarms.jsonl") if a["action"] == "stop"]
    if not stops:
        raise ValueError("neither finished nor stopped by a guard")
    spent = ("forward_equivalents", "forwards", "decodes", "reward_calls")
    cost = {key: metrics[-1][key] for key in spent} if metrics else {}
    best = max((y for _, y in curve if y is not None), default=None)
    guard = f"{stops[-1]['guard']} at iteration {stops[-1]['iteration']}"
    return result | {"stopped": guard, "best_validation": best, "cost": cost, "seconds": None, "config": settings}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    bars = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in bars)


def mean_curve(runs: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of curves [points, 2] over the points that all of them reached."""
    return np.mean([run[: min(map(len, runs))] for run in runs], 0)


def draw_curves(curves: Mapping[str, Sequence[np.ndarray]], path: Path, grey: Sequence[str] = ()) -> None:
    """Mean curves as a PNG; more than eight are drawn apart, each before those named in `grey`.

    curves: by name, a float [points, 2] of (forward-equivalents, validation score) for each run. Runs of one name are
    averaged over the points that all of them reached.
    """
    apart = len(curves) > 8
    columns, rows = (4, -(-len(curves) // 4)) if apart else (1, 1)
    size = (3.4 * columns, 2.6 * rows) if apart else (8, 5)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    means = {name: mean_curve(runs) for name, runs in curves.items()}
    for place, (name, mean) in enumerate(means.items()):
        here, color = (axes[place], "C0") if apart else (axes[0], f"C{place}")
        for other in (n for n in grey if apart and n in means and n != name):
            here.plot(*means[other].T, color="0.75", lw=1)
        for run in curves[name]:
            here.plot(*run.T, color=color, alpha=0.3, lw=1)
        here.plot(*mean.T, color=color, lw=2, label=name)
        if apart:
            here.set_title(name, fontsize=9)
    for ax in axes[len(curves) if apart else 1 :]:
        ax.set_axis_off()
    for ax in axes:
        ax.grid(alpha=0.3)
    if not apart and curves:
        axes[0].legend(fontsize=8)
    figure.supxlabel("forward-equivalents, evaluation left out", fontsize=9)
    figure.supylabel("validation strict score", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_scatters(figures: Sequence[Scatter], path: Path) -> None:
    """The report's figures of markers as a PNG, one beneath the other, each with its title."""
    width, height = max(f.width for f in figures), max(f.height for f in figures) + 24
    page = Figure(figsize=(width / 100, len(figures) * height / 100))
    for place, figure in enumerate(figures):
        axes = page.add_axes((0, 1 - (place + 1) / len(figures), 1, 1 / len(figures)))
        axes.set(xlim=(0, width), ylim=(height - 24, -24))
        axes.set_axis_off()
        _draw_scatter(axes, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=130)


def _draw_scatter(axes: Axes, figure: Scatter) -> None:
    small: Any = {"fontsize": 7.7, "color": "0.35"}
    axes.text(figure.left, -6, f"{figure.title} over {figure.x_label}", fontsize=9.5)
    axes.text((figure.left + figure.right) / 2, figure.bottom + 29, figure.x_label, ha="center", **small)
    axes.plot((figure.left, figure.right), (figure.bottom, figure.bottom), color="0.6", lw=0.8)
    for tick in figure.y_ticks:
        axes.plot((figure.left, figure.right), (tick.at, tick.at), color="0.9", lw=0.8)
        axes.text(figure.left - 7, tick.at, tick.label, ha="right", va="center", **small)
    for tick in figure.x_ticks:
        axes.text(tick.at, figure.bottom + 15, tick.label, ha="center", **small)
    for line in figure.lines:
        colour, style = (REFERENCE, "--") if line.hollow else (f"C{line.colour}", "-")
        axes.plot(*zip(*line.corners, strict=True), color=colour, ls=style, lw=0.9)
    for mark in figure.marks:
        colour = REFERENCE if mark.hollow else f"C{mark.colour}"
        if mark.low is not None and mark.high is not None:
            axes.plot((mark.x, mark.x), (mark.low, mark.high), color=colour, alpha=0.4, lw=0.9)
        if mark.left is not None and mark.right is not None:
            axes.plot((mark.left, mark.right), (mark.y, mark.y), color=colour, alpha=0.4, lw=0.9)
        if mark.leader is not None:
            axes.plot((mark.x, mark.leader[0]), (mark.y, mark.leader[1]), color="0.6", lw=0.6)
        axes.plot(mark.x, mark.y, "s" if mark.hollow else "o", ms=5, mec=colour, mfc="w" if mark.hollow else colour)
    for mark in figure.marks:
        side = {"start": "left", "end": "right"}.get(mark.anchor, "center")
        behind = [patheffects.withStroke(linewidth=2, foreground="w")]
        axes.text(mark.label_x, mark.label_y, mark.label, fontsize=7.7, ha=side, path_effects=behind)
