"""UDM-GRPO on the `shapes_tokens` model: clean tokens as actions against the rollout's own jumps, at equal compute.

    python -m benchmarks.tokens [--seeds 0 1 2] [--only clean jumps] [--table]

The recipe `shapes_tokens` as it stands, in float32 on one thread, and the same with `actions: jumps`, the paper's
baseline. Both roll out and train equally many rows. Every run is tested on the same 1 008 pictures of the test split.

A run is gone on with where it was left; a finished one is boiled down to a small file under benchmarks/tokens, kept
with the code. `--table` prints the page's table of what is there and draws the figure: validation, the norm of the
gradient and k3 over the iterations, where an unstable form would show. k3 is of a sequence's mean log-prob with clean
tokens, and of each token with jumps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.runs import base_hash, boiled, gain, lines, mismatch, run_all, table, tested, unpacked
from tempflow.config import Config
from tempflow.models import tokens_folder
from tempflow.recipes import shapes_tokens

FORMS = {"clean": "clean tokens", "jumps": "jumps, the baseline"}
METRIC = "shapes_strict"
IMAGE = Path("docs/img/tokens.png")


@dataclass(frozen=True)
class Bench:
    """Where runs work and where results go."""

    base: str
    out: Path = Path("runs/tokens_bench")
    results: Path = Path("benchmarks/tokens")

    def config(self, form: str, seed: int) -> Config:
        made = shapes_tokens()
        return made.replace(
            name=f"{form}-{seed}",
            seed=seed,
            threads=1,
            output=str(self.out / self.base[:8] / f"{form}-{seed}"),
            model=made.model.model_copy(update={"dtype": "float32"}),
            algorithm=made.algorithm.model_copy(update={"actions": form}),
        )

    def file(self, form: str, seed: int) -> Path:
        return self.results / f"{form}-{seed}.json"

    def result(self, form: str, seed: int) -> dict[str, Any] | None:
        """The result that stands for this configuration and these weights."""
        file = self.file(form, seed)
        told = json.loads(file.read_text()) if file.exists() else None
        return told if told is not None and not mismatch(told, self.config(form, seed), self.base) else None


def keep(bench: Bench, form: str, seed: int) -> None:
    """Runs it, and boils it down."""
    config = bench.config(form, seed)
    if bench.result(form, seed) is not None:
        return
    run_all([config], resume=True)
    result = boiled(config, bench.base, METRIC)
    metrics = lines(config.output, "metrics.jsonl")
    held = "kl_reference" if form == "clean" else "kl"
    for name, source in (("grad_norm", "grad_norm"), ("kl", held)):
        result[name] = [round(line[source], 5) for line in metrics if line.get(source) is not None]
    file = bench.file(form, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{file.stem}: {result.get('before')} -> {result.get('after')}", flush=True)


def there(bench: Bench, form: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [told for seed in seeds if (told := bench.result(form, seed)) is not None]


def page(bench: Bench, seeds: Sequence[int]) -> str:
    """The table of all results that are there. A run that a guard stopped has no test: it says where that was."""
    rows = list[list[str]]()
    for form, title in FORMS.items():
        found = there(bench, form, seeds)
        whole = [told for told in found if told["stopped"] is None]
        stopped = ", ".join(told["stopped"] for told in found if told["stopped"] is not None) or "none"
        if not whole:
            continue
        before, after = (
            np.stack([unpacked(r[key], r["pictures"]) for r in whole]) for key in ("before_bits", "after_bits")
        )
        mean, low, high = gain(after, before, tested(bench.config(form, 0)))
        rows.append(
            [
                title,
                f"{before.mean():.3f}",
                ", ".join(f"{told['after']:.3f}" for told in whole),
                f"{np.median(after.mean(1) - before.mean(1)):+.3f}",
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                f"{max(max(told['grad_norm']) for told in whole):.2f}",
                stopped,
                f"{np.mean([told['cost']['forward_equivalents'] for told in whole]):,.0f}",
                f"{np.mean([told['seconds'] for told in whole]):,.0f}",
            ]
        )
    head = ["actions", "before", "after, each seed", "median gain", "mean gain", "largest gradient", "stopped"]
    return table([*head, "forward-equivalents", "processor seconds"], rows)


def draw(bench: Bench, seeds: Sequence[int], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = list(figure.subplots(1, 3))
    for color, (form, title) in zip(("C0", "C3"), FORMS.items(), strict=True):
        for place, told in enumerate(there(bench, form, seeds)):
            every = bench.config(form, 0).evaluation.every
            series = [y for _, y in told["curve"]], told["grad_norm"], told["kl"]
            for axis, each, line in zip(axes, (every, 1, 1), series, strict=True):
                at = np.arange(len(line)) * each + (each == 1)
                axis.plot(at, line, color=color, lw=1.2, label=title if place == 0 else None)
    names = ("validation, strict", "norm of the gradient", "k3 to the starting model")
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and draw the figure")
    given = parser.parse_args()
    bench = Bench(base_hash(tokens_folder()))
    if given.table:
        print(page(bench, given.seeds))
        draw(bench, given.seeds, IMAGE)
        return
    for seed in given.seeds:
        for form in given.only:
            keep(bench, form, seed)


if __name__ == "__main__":
    main()
