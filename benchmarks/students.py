"""Few-step students of the `shapes` model, beside their teacher.

    python -m benchmarks.students [--seeds 0 1 2] [--only NAME …] [--table] [--figure]

A student takes four steps, on σ = 1, .9, .75, .5, 0 but where a name says late: those are on σ = 1, .8, .55, .25, 0.
Its stages are those of `recipes.shapes_students`, each a run from the best weights of the one that it stands on
(`RUNS`): all that stand on one share it. Every run is tested on the same
1 008 pictures of the test split, in its own steps; diversity is the mean distance by hand-made features between nine
pictures of a prompt, over `PROMPTS` test prompts. Teachers are the shipped model by stated grids and guidance.

A finished run is boiled down to a small file under benchmarks/students, kept with the code: start it again to go on.
`--table` prints the page's table: score with its interval over prompts, gain on the guided teacher, diversity, compute.
`--figure` draws the scores over useful steps and over diversity, by the report's own geometry.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runs import (
    base_hash,
    boiled,
    draw_scatters,
    gain,
    mismatch,
    packed,
    run_all,
    samples,
    table,
    tested,
    unpacked,
)
from tempflow import models
from tempflow.config import Config, parse_config
from tempflow.config.parts import DataConfig
from tempflow.config.stages import stage_tree
from tempflow.data.prompts import load_prompts
from tempflow.evaluate.suite import Report, evaluate, fixed_prompts
from tempflow.grid import Grid, Stated, as_stated
from tempflow.media import Size
from tempflow.models.protocol import Model, WalksGrids
from tempflow.recipes.shapes import EVALUATION, REWARDS
from tempflow.recipes.shapes_students import LATE, SHARED, STAGES, STEPS
from tempflow.report.walks import Row, diversity_figure, steps_figure
from tempflow.request import Prompt
from tempflow.rewards import build
from tempflow.rewards.safe import safe

METRIC = "shapes_strict"
PROMPTS, PICTURES = 60, 9
"""For diversity."""

RUNS: Mapping[str, tuple[str, str]] = {
    "match": ("", "match"),
    "dmd2": ("match", "dmd2"),
    "dp_dmd": ("match", "dp_dmd"),
    "gdmd": ("match", "gdmd"),
    "rats": ("match", "rats"),
    "reward": ("match", "reward"),
    "dmd2-reward": ("dmd2", "reward"),
    "reward-alone": ("", "reward"),
    "late": ("", "late"),
    "late-mean": ("late", "again"),
    "late-awm": ("", "awm"),
    "late-both": ("late", "again"),
}
"""Each run: the one from whose best weights it starts ("": the shipped model), and its stage."""

MEANS: Mapping[str, int] = {"late-mean": 3}
"""Of how many runs' weights one starts from the mean: seed 0 from the seeds 0, 1 and 2, seed 1 from 3, 4 and 5."""

BESIDE: Mapping[str, str] = {"late-both": "late-awm"}
"""Whose weights, of the same seed, are averaged with those of the run that one starts from."""

LONGER: Mapping[str, Mapping[str, int]] = {name: {"iterations": 100} for name in ("reward", "dmd2-reward")}
"""What differs from the recipes: after other stages the reward's goes on until it has fallen."""

TEACHERS: Mapping[str, tuple[Stated, int, float]] = {
    "untrained, 4 steps": ("useful", STEPS, 1.0),
    "untrained, 4 steps, guided": ("useful", STEPS, 1.5),
    "untrained, 4 late steps": (LATE, STEPS, 1.0),
    "untrained, 4 late steps, guided": (LATE, STEPS, 1.5),
    "teacher, 10 steps": ("scheduler", 10, 1.0),
    "teacher, 10 steps, guided": ("scheduler", 10, 1.5),
    "teacher, 10 steps, guidance 2": ("scheduler", 10, 2.0),
    "teacher, 20 steps": ("scheduler", 20, 1.0),
    "teacher, 20 steps, guided": ("scheduler", 20, 1.5),
}
"""The shipped model: its grid, steps and guidance. In ten steps the best on validation of 1, 1.25, 1.5 and 2 is 1.5."""

RIVAL = "teacher, 10 steps, guided"


@dataclass(frozen=True)
class Bench:
    """Where runs work and where results go."""

    base: str
    out: Path = Path("runs/students")
    results: Path = Path("benchmarks/students")
    figure: Path = Path("docs/img/students.png")

    def config(self, name: str, seed: int) -> Config:
        stage = RUNS[name][1]
        tree = stage_tree(SHARED, {**STAGES[stage], **LONGER.get(name, {})})
        return parse_config(
            {
                **tree,
                "name": f"{name}-{seed}",
                "seed": seed,
                "output": str(self.out / self.base[:8] / f"{name}-{seed}"),
                "threads": 1,
                "model": {
                    **tree["model"],
                    "dtype": "float32",
                    "start": [self.config(*one).output for one in self.sources(name, seed)],
                },
                "evaluation": {**tree["evaluation"], "every": tree["iterations"] // 5},
            }
        )

    def file(self, name: str, seed: int) -> Path:
        return self.results / f"{name}-{seed}.json"

    def sources(self, name: str, seed: int) -> list[tuple[str, int]]:
        """The runs from whose weights that one starts."""
        on, count = RUNS[name][0], MEANS.get(name, 1)
        beside = [(BESIDE[name], seed)] if name in BESIDE else []
        return [*((on, count * seed + n) for n in range(count)), *beside] if on else []

    def chain(self, name: str, seed: int) -> list[tuple[str, int]]:
        """The runs up to that one, first to last."""
        return [*(run for source in self.sources(name, seed) for run in self.chain(*source)), (name, seed)]


def looked(model: Model, size: Size, steps: int, guidance: float, each: int) -> Report:
    """Pictures of test prompts, with the test's noise: of all 1 008 one each, or `PROMPTS` prompts' `each`."""
    pool = load_prompts(DataConfig().test)
    prompts = fixed_prompts(pool, EVALUATION["test_prompts"] if each == 1 else PROMPTS)
    rewards = [safe(build(str(reward["name"]))) for reward in REWARDS]
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "size": size, "rows": 192}
    return evaluate(model, prompts, rewards, seed=EVALUATION["seed"], samples_per_prompt=each, **how)


def diversity(model: Model, size: Size, steps: int, guidance: float) -> list[float]:
    """Mean and 95 % interval over prompts."""
    told = looked(model, size, steps, guidance, PICTURES).to_json()["diversity"]
    return [round(x, 4) for x in (told["mean"], *told["interval"])]


def trained(bench: Bench, name: str, seed: int) -> None:
    """Runs the stages up to that one, and boils it down."""
    for run in bench.chain(name, seed):
        config, file = bench.config(*run), bench.file(*run)
        if file.exists() and run == (name, seed) and not mismatch(json.loads(file.read_text()), config, bench.base):
            return
        run_all([config], resume=True)
        if file.exists() and not mismatch(json.loads(file.read_text()), config, bench.base):
            continue
        result = boiled(config, bench.base, METRIC)
        model = models.load(str(Path(config.output) / "model"))
        result["spread"] = diversity(model, config.size, config.evaluation.steps, 1.0)
        result["graded"] = round(float(samples(config.output, "shapes")[1].mean()), 6)
        written(file, result)


def taught(bench: Bench, name: str) -> None:
    """The teacher in those steps."""
    file, (grid, steps, guidance) = bench.results / f"{name.replace(', ', '_').replace(' ', '_')}.json", TEACHERS[name]
    config = bench.config("match", 0)
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("base_hash") == bench.base and known["walk"] == _walk(name):
        return
    model = models.load("shapes")
    assert isinstance(model, WalksGrids)
    model.state_grid(Grid(as_stated(grid)))
    began = time.process_time()
    report = looked(model, config.size, steps, guidance, 1)
    seconds, scores = time.process_time() - began, report.scores
    columns = {name: scores.value[:, place].double().numpy() for place, name in enumerate(scores.names)}
    result = {
        "base_hash": bench.base,
        "walk": _walk(name),
        "after": round(float(columns[METRIC].mean()), 6),
        "after_bits": packed(columns[METRIC]),
        "graded": round(float(columns["shapes"].mean()), 6),
        "pictures": len(columns[METRIC]),
        "seconds": seconds,
        "spread": diversity(model, config.size, steps, guidance),
    }
    written(file, result)


def _walk(teacher: str) -> list[Any]:
    """A teacher's grid, steps and guidance as JSON has them."""
    grid, steps, guidance = TEACHERS[teacher]
    return [grid if isinstance(grid, str) else [*grid], steps, guidance]


def written(file: Path, result: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{file.stem}: {result['after']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "teachers"], default=[*RUNS, "teachers"])
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--figure", action="store_true", help="draw the figure of what is there, and run nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(base_hash())
    if given.table:
        print(page(bench, given.seeds))
    if given.figure:
        found = rows_of(bench, given.seeds, useful)
        figures = steps_figure(found, "strict"), diversity_figure(found, "strict")
        draw_scatters([figure for figure in figures if figure is not None], bench.figure)
    if given.table or given.figure:
        return
    for name in TEACHERS if "teachers" in given.only else ():
        taught(bench, name)
    for seed in given.seeds:
        for name in RUNS:
            if name in given.only:
                trained(bench, name, seed)


def page(bench: Bench, seeds: Sequence[int]) -> str:
    """The table of all results that are there."""
    prompts, rows = tested(bench.config("match", 0)), list[list[str]]()
    teachers = taught_there(bench)
    rival = teachers.get(RIVAL)
    for name, told in teachers.items():
        mean, low, high = scored([told], prompts)
        rows.append([name, "", f"{mean:.3f} [{low:.3f}, {high:.3f}]", f"{told['graded']:.3f}", "", spread(told), ""])
    for name, there in trained_there(bench, seeds).items():
        found = [*there.values()]
        mean, low, high = scored(found, prompts)
        beside = ""
        if rival is not None:
            after = np.stack([bits(result) for result in found])
            lead, a, b = gain(after, np.repeat(bits(rival)[None], len(after), 0), prompts)
            beside = f"{lead:+.3f} [{a:+.3f}, {b:+.3f}]"
        spent = [
            sum(json.loads(bench.file(*run).read_text())["cost"]["forward_equivalents"] for run in bench.chain(name, s))
            for s in there
        ]
        each = ", ".join(f"{result['after']:.3f}" for result in found)
        rows.append(
            [
                name,
                each,
                f"{mean:.3f} [{low:.3f}, {high:.3f}]",
                f"{np.mean([r['graded'] for r in found]):.3f}",
                beside,
                spread(*found),
                f"{np.mean(spent):,.0f}",
            ]
        )
    head = ["", "strict, each seed", "strict", "graded", f"strict − {RIVAL}", "diversity", "forward-equivalents"]
    return table(head, rows)


def rows_of(bench: Bench, seeds: Sequence[int], useful: Callable[[Stated, int], int]) -> list[Row]:
    """All results that are there, for the figures. Intervals resample prompts, a student's score's seeds too; those of
    its diversity are the mean of the seeds' bounds. useful: how many steps of a grid count."""
    prompts, rows = tested(bench.config("match", 0)), list[Row]()
    for name, told in taught_there(bench).items():
        grid, steps, guidance = TEACHERS[name]
        who = ("teacher", "teacher", 0, True, _said(grid), steps, useful(grid, steps), guidance)
        rows.append(Row(*who, *_figures([told], prompts)))
    for colour, (name, there) in enumerate(trained_there(bench, seeds).items()):
        grid = bench.config(name, 0).model.grid
        who = (name, name, colour, False, _said(grid), STEPS, useful(grid, STEPS), 1.0)
        rows.append(Row(*who, *_figures([*there.values()], prompts)))
    return rows


def _said(grid: Stated) -> str:
    return str(Grid(grid))


def _figures(
    found: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
) -> tuple[float, tuple[float, float], float, tuple[float, float]]:
    """Score and diversity, each with its interval."""
    mean, low, high = scored(found, prompts)
    spread, left, right = np.mean([result["spread"] for result in found], 0).tolist()
    return mean, (low, high), spread, (left, right)


def useful(grid: Stated, steps: int) -> int:
    """How many steps of the shipped model's grid change the picture."""
    model = models.load("shapes")
    assert isinstance(model, WalksGrids)
    model.state_grid(Grid(as_stated(grid)))
    return model.schedule(steps, Size(32, 32)).useful


def taught_there(bench: Bench) -> dict[str, dict[str, Any]]:
    """The teachers' results that are there."""
    files = {name: bench.results / f"{name.replace(', ', '_').replace(' ', '_')}.json" for name in TEACHERS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def trained_there(bench: Bench, seeds: Sequence[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of runs that are there and came to their end, by name and seed."""
    files = {name: {seed: bench.file(name, seed) for seed in seeds} for name in RUNS}
    told = {n: {s: json.loads(f.read_text()) for s, f in each.items() if f.exists()} for n, each in files.items()}
    there = {name: {s: r for s, r in each.items() if r["stopped"] is None} for name, each in told.items()}
    return {name: each for name, each in there.items() if each}


def bits(result: Mapping[str, Any]) -> np.ndarray:
    return unpacked(result["after_bits"], result["pictures"])


def scored(found: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> tuple[float, float, float]:
    """Mean strict score of one run's or several seeds' tests, and its interval over prompts (and seeds)."""
    after = np.stack([bits(result) for result in found])
    return gain(after, np.zeros_like(after), prompts)


def spread(*results: Mapping[str, Any]) -> str:
    return f"{np.mean([result['spread'][0] for result in results]):.3f}"


if __name__ == "__main__":
    main()
