"""A run's folder, read as data. A half-finished run has what there is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

Line = Mapping[str, Any]
PNG = b"\x89PNG\r\n\x1a\n"
QUIET_SECONDS = 120.0
"""A run without a new line for this long, and for five of its usual pauses, counts as stopped."""


@dataclass(frozen=True)
class RunData:
    """What a run's folder says.

    label         what the page calls it; set apart from other runs of one name
    config        config.yaml as a mapping, and `config_text` as written
    metrics, evaluations, steps    a line per iteration, ascending
    timings       lines in the order written; `elapsed` does not fall, also where the run was resumed
    summary       None until the run is finished
    samples       score → (values before, values after) of the test pictures; empty until then
    prompts       test prompts with their kind, where the run wrote them
    picture       before_after.png, or None
    quiet         seconds since the run last wrote
    """

    folder: Path
    label: str
    config: Line
    config_text: str
    metrics: Sequence[Line]
    evaluations: Sequence[Line]
    steps: Sequence[Line]
    timings: Sequence[Line]
    summary: Line | None
    samples: Mapping[str, Sequence[Sequence[float | None]]]
    prompts: Sequence[Line]
    environment: Line
    alarms: Sequence[Line]
    picture: bytes | None
    quiet: float

    @property
    def metric(self) -> str:
        """The score that the run is judged by."""
        given = self.summary["metric"] if self.summary else self.config.get("evaluation", {}).get("metric", "reward")
        return str(given)

    @property
    def iterations(self) -> tuple[int, int]:
        """Done, planned."""
        done = int(self.metrics[-1]["iteration"]) if self.metrics else 0
        return done, int(self.config.get("iterations", done))

    @property
    def minutes(self) -> float:
        """Wall time of the iterations and validations; of an unfinished run, up to its last line."""
        if self.summary:
            return float(self.summary["seconds"]) / 60
        return float(self.timings[-1]["elapsed"]) / 60 if self.timings else 0.0

    @property
    def status(self) -> str:
        """finished, running or stopped. A run says when it is finished; that it stopped is told from its silence."""
        if self.summary:
            return "finished"
        times = [line["elapsed"] for line in self.timings]
        pauses = [b - a for a, b in pairwise(times)]
        return "running" if self.quiet <= max(QUIET_SECONDS, 5 * median(pauses or [0.0])) else "stopped"


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in `folders`, labelled by name, or by folder where a name repeats.

    Raises ValueError for a folder that holds no run (naming the nearest that does), one given twice, or a broken file.
    """
    if not folders:
        raise ValueError("runs: none given; nearest valid: a folder that `tempflow train` wrote")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"runs: {str(folder)!r} is given twice; nearest valid: once")
    configs = [read_config(folder) for folder in folders]
    names = [str(config.get("name", folder.name)) for config, folder in zip(configs, folders, strict=True)]
    labels = [str(f) if names.count(n) > 1 else n for n, f in zip(names, folders, strict=True)]
    return [_read(f, label, c) for f, label, c in zip(folders, labels, configs, strict=True)]


def read_suite(folder: Path) -> Line:
    """What `tempflow suite` wrote into a folder: its summary, with `folder`, and `source` in words.

    Raises ValueError for a folder that holds no finished suite, or a broken file.
    """
    told = _json(folder / "summary.json")
    if told is None or not isinstance(told.get("tables"), list):
        raise ValueError(f"suites: {str(folder)!r} holds no finished suite; nearest valid: what `tempflow suite` wrote")
    settings = told["settings"]
    sides = [settings[side] for side in ("what", "against") if side in settings]
    words = [" ".join(str(side[k]) for k in ("pictures", "model", "lora") if side.get(k)) for side in sides]
    return {**told, "folder": str(folder), "source": " against ".join(words)}


@dataclass(frozen=True)
class Evaluation:
    """What `tempflow eval --output` wrote.

    rows    a model's figures each: what, walk, steps, guidance, mean, interval, perhaps diversity …
    test    prompts' source, height and width of all rows
    """

    file: Path
    rows: Sequence[Line]
    test: tuple[Any, ...]


def read_evaluation(file: Path) -> Evaluation:
    """Raises ValueError, naming the file, where nothing is there or `tempflow eval` did not write it."""
    near = "nearest valid: FILE of tempflow eval … --output FILE"
    try:
        told = _json(file)
        if told is None:
            raise ValueError("it is a folder" if file.is_dir() else "no file is there")
        rows = [{**row} for row in told.get("rows", [told])]
        if not rows:
            raise ValueError("rows is empty")
        for row in rows:
            _check_row(row)
    except (ValueError, KeyError, TypeError, OSError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise ValueError(f"evaluations: {str(file)!r} holds no evaluation ({why}); {near}") from error
    return Evaluation(file, rows, tuple(told.get(key) for key in ("prompts_from", "height", "width")))


def _check_row(row: Line) -> None:
    """Raises KeyError, TypeError or ValueError for a row that is not as `tempflow eval` writes it."""
    whole = {"steps": row["steps"], "useful": row["walk"]["useful"], "count": row["count"]}
    whole |= {"samples_per_prompt": row["samples_per_prompt"], "prompts": row.get("prompts", 1)}
    for name, value in whole.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {str(value)[:40]!r}, no whole number from 1")
    if not isinstance(row["guidance"], int | float):
        raise ValueError(f"guidance is {str(row['guidance'])[:40]!r}, no number")
    if not isinstance(row["what"], str) or not isinstance(row["walk"]["grid"], str):
        raise ValueError("what and grid are texts")
    for name in ("mean", "interval", "diversity"):
        told = row[name] if name == "mean" else row.get(name, {})
        if not isinstance(told, dict):
            raise ValueError(f"{name} is {str(told)[:40]!r}, no object")


def read_config(folder: Path) -> Line:
    """The config.yaml of a run, or of stages, as a mapping. Raises ValueError where there is none."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"runs: {str(folder)!r} holds no run (no config.yaml); nearest valid: {_nearest(folder)}")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(
            f"{file} holds {type(given).__name__}, not a mapping; nearest valid: what `tempflow train` wrote"
        )
    return given


def _nearest(folder: Path) -> str:
    around = [folder, folder.parent, Path("runs")]
    known = sorted({str(c.parent) for place in around if place.is_dir() for c in place.glob("*/config.yaml")})
    close = get_close_matches(str(folder), known, n=1, cutoff=0.0)
    return repr(close[0]) if close else "a folder that `tempflow train` wrote"


def _read(folder: Path, label: str, config: Line) -> RunData:
    picture = folder / "before_after.png"
    data = picture.read_bytes() if picture.is_file() else b""
    written = [
        p.stat().st_mtime
        for p in (folder / n for n in ("config.yaml", "metrics.jsonl", "timings.jsonl"))
        if p.is_file()
    ]
    return RunData(
        folder=folder,
        label=label,
        config=config,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        metrics=_by_iteration(_lines(folder / "metrics.jsonl")),
        evaluations=_by_iteration(_lines(folder / "evaluation.jsonl")),
        steps=_by_iteration(_lines(folder / "steps.jsonl")),
        timings=_going_on(_lines(folder / "timings.jsonl")),
        summary=_json(folder / "summary.json"),
        samples=_json(folder / "samples.json") or {},
        prompts=_lines(folder / "test_prompts.jsonl"),
        environment=_json(folder / "environment.json") or {},
        alarms=_lines(folder / "alarms.jsonl"),
        picture=data if data.startswith(PNG) else None,
        quiet=max(0.0, time.time() - max(written)),
    )


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds {type(given).__name__}, not an object")
    return given


def _lines(file: Path) -> list[Line]:
    """JSON lines. The last may be half-written: then it is left out."""
    if not file.is_file():
        return []
    texts = file.read_text(encoding="utf-8").splitlines()
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"{file}, line {number} is not a JSON object: {error}") from error
        lines.append(line)
    return lines


def _by_iteration(lines: Sequence[Line]) -> list[Line]:
    """A line per iteration, ascending; of two with one number (a resumed run's) the later."""
    last = {int(line["iteration"]): line for line in lines if "iteration" in line}
    return [last[number] for number in sorted(last)]


def _going_on(lines: Sequence[Line]) -> list[Line]:
    """`elapsed` starts anew where a run was resumed; here it goes on."""
    passed = last = 0.0
    result: list[Line] = []
    for line in lines:
        now = float(line.get("elapsed") or 0.0)
        passed += last if now < last else 0.0
        last = now
        result.append({**line, "elapsed": passed + now})
    return result
