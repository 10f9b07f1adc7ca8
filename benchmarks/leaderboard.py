"""Every algorithm on `shapes`, from one base, at one budget of forward-equivalents.

    python -m benchmarks.leaderboard [--only NAME …] [--jobs 2] [--table]

Each entry tries three learning rates with one seed; validation decides. The run at that rate is its first; a paper's
method has two more seeds there, a knob none. One rate is tried over all entries, then the next, then seeds in turn: a
leaderboard that was cut off is a table with fewer rates or seeds. A finished run is boiled down to a small file under
benchmarks/leaderboard/second_edition, which is kept with the code: start it again, here or elsewhere, to go on. The
page is docs/leaderboard_second_edition.md. The first edition of the world has a leaderboard of its own, which is
frozen: docs/leaderboard.md, its results in benchmarks/leaderboard/first_edition; nothing here reads or writes them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims import CLAIMS
from benchmarks.runs import (
    affordable,
    base_hash,
    boiled,
    draw_curves,
    gain,
    mean_curve,
    mismatch,
    reached,
    resumable,
    run_all,
    table,
    tested,
    told,
    unpacked,
)
from tempflow.config import Config, ConfigError, parse_config
from tempflow.folder import remove
from tempflow.recipes.shapes import OPTIMIZER, REWARDS
from tempflow.recipes.zoo import ENTRIES, Entry
from tempflow.request import Prompt

METRIC, SEARCH_SEED, ATTEMPTS = "shapes_strict", 0, 2
PAGE = "leaderboard_second_edition"
REFERENCES = ("flow_grpo_global", "tempflow_grpo")
"""Entries that all others are compared with."""


RATES = (2e-4, 1e-4, 4e-4)
"""The learning rates that every entry tries, in this order."""


def seeds(entry: Entry) -> tuple[int, ...]:
    """The runs at the chosen rate; the first is the search's own."""
    return (SEARCH_SEED, 1, 2) if entry.kind == "paper" else (SEARCH_SEED,)


@dataclass(frozen=True)
class Board:
    """One leaderboard: the hash of its base weights, its budget in forward-equivalents and its pictures; where runs
    work, and where results go."""

    base: str
    budget: int = 80_000
    validation: int = 240
    test: int = 1008
    dtype: str = "float32"
    out: Path = Path("runs/leaderboard")
    results: Path = Path("benchmarks/leaderboard/second_edition")

    def config(self, entry: Entry, rate: float, seed: int) -> Config:
        """The run's configuration. Raises ConfigError."""
        name = f"{entry.name}-{rate:g}-{seed}-{self.budget}"
        fields = {
            "name": name,
            "seed": seed,
            "iterations": 1,
            "output": str(self.out / self.base[:8] / name),
            "threads": 1,
            "algorithm": dict(entry.algorithm),
            "model": {"dtype": self.dtype},
            "data": {"prompts_per_iteration": entry.prompts},
            "rollout_rows": 192,
            "rewards": REWARDS,
            "optimizer": {**OPTIMIZER, "warmup_iterations": 5, **entry.optimizer, "learning_rate": rate},
            "evaluation": {
                **self._evaluation,
                "before": self.untrained().output,
            },
        }
        algorithm = parse_config(fields).algorithm.build().seeded(seed)
        iterations = affordable(algorithm, entry.prompts, self.budget, trained=entry.trained)
        fields["evaluation"] |= {"every": max(1, round(iterations / 5))}
        return parse_config(fields | {"iterations": iterations})

    @property
    def _evaluation(self) -> dict[str, Any]:
        return {
            "validation_prompts": self.validation,
            "test_prompts": self.test,
            "metric": METRIC,
            "seed": 4321,
        }

    def untrained(self) -> Config:
        """A run whose test of the untrained model all others take over."""
        name = f"untrained-{self.validation}-{self.test}"
        return parse_config(
            {
                "name": name,
                "iterations": 1,
                "output": str(self.out / self.base[:8] / name),
                "threads": 1,
                "algorithm": {"name": "flow_grpo", "steps": 2, "group": 2},
                "model": {"dtype": self.dtype},
                "data": {"prompts_per_iteration": 1},
                "rollout_rows": 192,
                "rewards": REWARDS,
                "evaluation": {**self._evaluation, "every": 0},
            }
        )

    def file(self, config: Config) -> Path:
        return self.results / f"{config.name}.json"


# ------------------------------------------------------------------------------------------------------------- results
def stored(board: Board, config: Config, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The result of that run, where there is one that stands for it; says why one does not."""
    file = board.file(config)
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text())
        why = mismatch(result, config, board.base)
    except (ValueError, KeyError, TypeError) as error:
        why = [f"not a result: {type(error).__name__}: {error}"]
    if why:
        say(f"{file.name} is not used: {'; '.join(why)}")
        return None
    return result


# ---------------------------------------------------------------------------------------------------------------- work
def best_rate(search: Mapping[float, Mapping[str, Any]]) -> float | None:
    """The rate of the best validation; one that a guard stopped only where all were. None without any."""
    whole = {rate: result for rate, result in search.items() if not result["stopped"]} or search
    score = {r: -1.0 if x["best_validation"] is None else x["best_validation"] for r, x in whole.items()}
    return max(sorted(score), key=lambda rate: score[rate]) if score else None


@dataclass(frozen=True)
class Standing:
    """What is known of an entry: results of its search by rate, the best rate so far, and results there by seed.

    Other seeds than the search's count only once all rates have been tried.
    """

    entry: Entry
    search: Mapping[float, Mapping[str, Any]]
    rate: float | None
    finals: Mapping[int, Mapping[str, Any]]

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        """Results with a test score."""
        return [r for r in self.finals.values() if not r["stopped"]]

    @property
    def searched(self) -> bool:
        """Whether all rates have been tried."""
        return len(self.search) == len(RATES)

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.searched and set(seeds(self.entry)) <= self.finals.keys()


def standing(board: Board, entry: Entry, say: Callable[[str], None] = print) -> Standing:
    """Raises ConfigError."""

    def found(rate: float, seed: int) -> dict[str, Any] | None:
        return stored(board, board.config(entry, rate, seed), say)

    search = {rate: r for rate in RATES if (r := found(rate, SEARCH_SEED)) is not None}
    rate = best_rate(search)
    if rate is None:
        return Standing(entry, search, None, {})
    others = seeds(entry)[1:] if len(search) == len(RATES) else ()
    finals = {SEARCH_SEED: search[rate]} | {s: r for s in others if (r := found(rate, s)) is not None}
    return Standing(entry, search, rate, finals)


class Worker:
    """Runs what has no result yet, and boils down what ends. Counts the failures of a run beside its folder."""

    def __init__(self, board: Board, jobs: int) -> None:
        self.board, self.jobs = board, jobs

    def run(self, configs: Sequence[Config]) -> None:
        """Raises KeyboardInterrupt when it is interrupted; runs at work have then kept their state."""
        todo = [c for c in configs if stored(self.board, c, _silent) is None and not self._given_up(c)]
        for config in todo:
            if (Path(config.output) / "summary.json").exists():  # finished, but cut off before it was boiled down
                if resumable(config):
                    self.ended(config, 0, "had finished")
                else:
                    self._forget(config)
        todo = [c for c in todo if stored(self.board, c, _silent) is None]
        print(f"{len(todo)} of {len(configs)} runs to do", flush=True)
        if todo:
            untrained = self.board.untrained()
            run_all([untrained], 1, resume=True, ended=told)
            if not (Path(untrained.output) / "summary.json").exists():  # every run would fail for the want of it
                sys.exit(f"{untrained.name} failed: see {untrained.output}.log")
        run_all(todo, self.jobs, resume=True, ended=self.ended)

    def ended(self, config: Config, code: int, last: str) -> None:
        """Keeps the result; a run without one is told of, and tried again when the leaderboard is next started."""
        try:
            result = boiled(config, self.board.base, METRIC)
        except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
            failed = self._failures(config)
            failed.parent.mkdir(parents=True, exist_ok=True)
            with failed.open("a") as stream:
                stream.write(f"exit {code}: {last or error}\n")
            print(f"{config.name} FAILED, exit {code}: {last or error} (see {config.output}.log)", flush=True)
            if 0 < code < 128:  # neither killed nor stopped by a signal: its state may be the fault
                self._forget(config)
            return
        file = self.board.file(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        part.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        part.replace(file)
        self._forget(config)
        self._failures(config).unlink(missing_ok=True)
        print(f"{config.name}: {result['stopped'] or last}", flush=True)

    def _forget(self, config: Config) -> None:
        """A run's folder is a hundred times its result; its processor time would be added to by a run in its place."""
        remove(config.output, "run")
        Path(f"{config.output}.cpu").unlink(missing_ok=True)

    def _failures(self, config: Config) -> Path:
        return Path(f"{config.output}.failed")

    def _given_up(self, config: Config) -> bool:
        file = self._failures(config)
        tries = file.read_text().splitlines() if file.exists() else []
        if len(tries) < ATTEMPTS:
            return False
        print(f"{config.name} is skipped, it failed {len(tries)} times: {tries[-1]}; remove {file} to try again")
        return True


def _silent(line: str) -> None:
    """Says nothing."""


# ---------------------------------------------------------------------------------------------------------------- page
def difference(a: Standing, b: Standing, prompts: Sequence[Prompt], draws: int = 10_000) -> tuple[str, str] | None:
    """Test scores of a − b on the final seeds that both have: mean with 95 % interval and number of seeds, verdict."""
    seeds = common(a, b)
    if not seeds:
        return None
    mine, theirs = (np.stack([outcomes(x.finals[s]) for s in seeds]) for x in (a, b))
    mean, low, high = gain(mine, theirs, prompts, draws)
    verdict = "better" if low > 0 else "worse" if high < 0 else "not separable"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {len(seeds)} seed{'s'[: len(seeds) > 1]}", verdict


def common(a: Standing, b: Standing) -> list[int]:
    """Seeds with a test score in both."""
    return [s for s in a.finals if s in b.finals and not (a.finals[s]["stopped"] or b.finals[s]["stopped"])]


def compared(a: Standing, b: Standing, prompts: Sequence[Prompt], draws: int = 10_000) -> str:
    """A cell of the table of differences."""
    found = difference(a, b, prompts, draws)
    return "–" if found is None else f"{found[0]}: {found[1]}"


HERE = {"better": "holds", "worse": "the reverse", "not separable": "not separable"}
"""What the difference of the claimed better entry and the other says of the claim."""


def claimed(by_name: Mapping[str, Standing], prompts: Sequence[Prompt], draws: int = 10_000) -> list[list[str]]:
    """Rows of the table of papers' claims; those whose entries both have a test score."""
    rows = list[list[str]]()
    for claim in CLAIMS:
        if claim.better in by_name and claim.worse in by_name:
            pair = by_name[claim.better], by_name[claim.worse]
            found = difference(*pair, prompts, draws)
            if found is not None:
                said = HERE[found[1]] + ("" if all(s.whole for s in pair) else ", so far")
                rows.append([f"{claim.better} > {claim.worse}", claim.told, found[0], said])
    return rows


MARKS = (0.45, 0.5, 0.55, 0.6)
"""Validation scores of the table of speeds."""


def speeds(s: Standing) -> list[str]:
    """Forward-equivalents after which the mean validation curve of the runs in the table first reaches each mark."""
    mean = mean_curve([np.array(r["curve"], float) for r in s.shown]).tolist()
    needs = [reached(mean, mark) for mark in MARKS]
    return [f"{need:,.0f}" if np.isfinite(need) else "–" for need in needs]


def outcomes(result: Mapping[str, Any]) -> np.ndarray:
    return unpacked(result["after_bits"], result["pictures"])


def row(s: Standing) -> list[str]:
    """The table's cells for an entry with a test score."""
    before, after = (np.mean([r[key] for r in s.shown]) for key in ("before", "after"))
    times = [r["seconds"] for r in s.shown if r["seconds"] is not None]
    spent, forwards, decodes = (
        np.mean([r["cost"][key] for r in s.shown]) for key in ("forward_equivalents", "forwards", "decodes")
    )
    spread = [r["diversity"] for r in s.shown if r["diversity"] is not None]
    first, last = np.mean(spread, 0) if spread else (np.nan, np.nan)
    stopped = [r["stopped"] for r in s.finals.values() if r["stopped"]]
    notes = [f"{len(s.shown)} of {len(seeds(s.entry))}"]
    notes += [f"{len(stopped)} stopped: {stopped[0]}"] if stopped else []
    notes += [f"{n} collapsed"] if (n := sum(r["collapsed"] for r in s.shown)) else []
    return [
        f"{s.entry.name} ({s.entry.kind})",
        f"{s.rate:g}" + ("" if s.searched else f" ({len(s.search)} of {len(RATES)} tried)"),
        "; ".join(notes),
        f"{before:.3f} → **{after:.3f}**",
        f"{after - before:+.3f}",
        f"{last:.3f} ({last / first:.2f} ×)" if spread else "–",
        f"{spent:,.0f}",
        f"{forwards:,.0f}",
        f"{decodes:,.0f}",
        f"{np.mean(times):,.0f}" if times else "–",
    ]


def page(board: Board, standings: Sequence[Standing], draws: int = 10_000) -> str:
    """The page in Markdown."""
    shown = sorted((s for s in standings if s.shown), key=lambda s: -np.mean([r["after"] for r in s.shown]))
    waiting = [
        f"{s.entry.name} ({len(s.search)} of {len(RATES)} rates tried"
        + (f", {len(s.finals)} stopped by a guard)" if s.finals else ")")
        for s in standings
        if not s.shown
    ]
    by_name = {s.entry.name: s for s in standings}
    references = [name for name in REFERENCES if name in by_name]
    versions = sorted({r["tempflow"] for s in shown for r in s.shown})
    head = [
        "entry",
        "rate",
        "seeds",
        "strict before → after",
        "gain",
        "diversity after",
        "forward-equivalents",
        "forwards",
        "decodes",
        "s",
    ]
    prompts = tested(board.untrained())
    claims = claimed(by_name, prompts, draws)
    fastest = [[s.entry.name, *speeds(s)] for s in shown]
    verdicts = [row[-1].partition(",")[0] for row in claims]
    differences = [
        [s.entry.name, *("" if s.entry.name == n else compared(s, by_name[n], prompts, draws) for n in references)]
        for s in shown
    ]
    return f"""# Leaderboard, second edition of `shapes`

Generated by `make leaderboard`, which goes on where it was cut off. Every entry trains the shapes model (base weights
{board.base[:8]}) for about {board.budget:,} planned forward-equivalents, {board.dtype}, one thread a run. A row
through any network is 1 forward-equivalent without gradient and 3 with it; groups without
spread are not trained, so fewer are counted. Of the learning rates {", ".join(f"{r:g}" for r in RATES)} the best on
{board.validation} validation prompts (seed {SEARCH_SEED}) is taken; a paper's method has two more seeds there, a knob
none. The seed of the search counts among them: it bears the luck of a choice among three (on validation, not on test).
Strict score: share of {board.test:,} held-out test pictures, of {len({p.text for p in prompts})} different prompts,
that the strict verifier calls right, with the weights that were best on validation. Settings are those of
the recipes: a method's own, scaled to six steps, but where the last
noisy step would have nearly all of the gradient Flow-CPS takes its code's unscaled log-prob, DDPO leaves that step out,
and DRM's candidates are Flow-CPS's (each one's page tells).

{table(head, [row(s) for s in shown])}

Not here yet: {", ".join(waiting) or "none"}.

Diversity: mean distance between training pictures of one prompt in the last five iterations, and its share of that in
the first five. Plans differ (branches share most of their way), so only the share can be compared between entries.
Seconds are processor time of the whole run, tests included (some runs made the test of the untrained model themselves,
40 s, others took it over), on whatever machine it ran: with one thread about what the
clock shows on a free core.
tempflow {", ".join(versions) or "–"}.

## Differences
Test score of the row less that of the column, on the same pictures and the seeds that both have, with its 95 %
paired bootstrap interval over seeds and prompts (a prompt's pictures stay together). "Better" and "worse" only where
it excludes 0; intervals are not widened for their number. With one seed it covers the choice of prompts, not the chance
in training.

{table(["", *references], differences)}

## What papers claim
Each on its own models, rewards and budgets; here at equal compute on `shapes`, by the same intervals.
{verdicts.count("holds")} of {len(claims)} hold, {verdicts.count("the reverse")} come out reversed, the others cannot
be told here. "So far": rates or seeds of one of the two are still missing, so nothing is settled.

{table(["claim", "as the paper has it", "here, difference of test scores", ""], claims)}

## Speed
Forward-equivalents until the mean validation curve of an entry's runs reaches a score, on straight lines between
validations; – where it does not. Validations are few, of {board.validation} pictures each, and one lucky one is enough.

{table(["", *(f"{mark:.2f}" for mark in MARKS)], fastest)}

![Validation score over forward-equivalents](img/{PAGE}.png)

Validation strict score over forward-equivalents: thick, the mean over an entry's runs in the table; thin, each run.
With more than eight entries each has a panel of its own, with {" and ".join(references)} in grey.
"""


def write(board: Board, entries: Sequence[Entry], docs: Path) -> None:
    """The page and its picture."""
    standings = [standing(board, entry) for entry in entries]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{PAGE}.md").write_text(page(board, standings))
    curves = {s.entry.name: [np.array(r["curve"], float) for r in s.shown] for s in standings if s.shown}
    draw_curves(curves, docs / "img" / f"{PAGE}.png", REFERENCES)
    print(f"{docs / f'{PAGE}.md'}: {len(curves)} of {len(entries)} entries have a score")


def work(board: Board, entries: Sequence[Entry], jobs: int) -> None:
    """The search, rate by rate over all entries, papers first; then seeds, one more of every entry at a time."""
    worker = Worker(board, jobs)
    entries = sorted(entries, key=lambda entry: entry.kind != "paper")
    print("search: ", end="")
    worker.run([board.config(e, rate, SEARCH_SEED) for rate in RATES for e in entries])
    found = list[tuple[Entry, float]]()
    for entry in entries:
        searched = standing(board, entry, _silent)
        if searched.rate is None or not searched.searched:
            print(f"{entry.name}: {len(searched.search)} of {len(RATES)} rates are there, so no further seeds yet")
        else:
            found.append((entry, searched.rate))
    print("seeds: ", end="")
    worker.run([board.config(e, rate, seed) for e, rate, seed in turns(found)])


def turns(found: Sequence[tuple[Entry, float]]) -> list[tuple[Entry, float, int]]:
    """Entry, rate and seed of the runs after the search: every entry's second seed, every entry's third."""
    most = max((len(seeds(entry)) for entry, _ in found), default=0)
    return [(e, rate, seeds(e)[turn]) for turn in range(1, most) for e, rate in found if turn < len(seeds(e))]


def valid(board: Board, entries: Sequence[Entry]) -> list[Entry]:
    """Those whose configuration is valid; says which are not, and why."""
    kept = list[Entry]()
    for entry in entries:
        try:
            for rate in RATES:
                board.config(entry, rate, SEARCH_SEED)
            kept.append(entry)
        except ConfigError as error:
            print(f"{entry.name} is skipped: {error}", flush=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to run; the page has all")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing, write the page of what there is")
    parser.add_argument("--budget", type=int, default=Board.budget, help="of a run, in forward-equivalents")
    parser.add_argument("--validation", type=int, default=Board.validation, help="validation prompts")
    parser.add_argument("--test", type=int, default=Board.test, help="test prompts")
    parser.add_argument("--output", dest="out", type=Path, default=Board.out, help="where runs work")
    parser.add_argument("--results", type=Path, default=Board.results)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    a = parser.parse_args()
    names = [e.name for e in ENTRIES]
    for name in a.only or ():
        if name not in names:
            nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
            parser.error(f"--only: {name!r} is no entry; nearest valid: {nearest!r}")
    board = Board(base_hash(), a.budget, a.validation, a.test, out=a.out, results=a.results)
    entries = valid(board, ENTRIES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        if not a.table:
            work(board, [e for e in entries if not a.only or e.name in a.only], a.jobs)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; start it again to go on")
    write(board, entries, a.docs)
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
