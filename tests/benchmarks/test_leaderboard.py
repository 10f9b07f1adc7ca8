"""The leaderboard's bookkeeping: budgets, result files, what stands for what, order, the table. No run is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import leaderboard, runs
from benchmarks.claims import CLAIMS
from benchmarks.leaderboard import ENTRIES, METRIC, RATES, Board, Entry, Standing, Worker
from tempflow.config import Config, parse_config, to_yaml
from tempflow.folder import claim
from tempflow.request import Prompt

BASE = "b" * 64
FLOW = next(e for e in ENTRIES if e.name == "flow_grpo_global")


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(BASE, out=tmp_path / "runs", results=tmp_path / "results")


def result(after: np.ndarray, seed: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "stopped": None,
        "collapsed": False,
        "best_validation": 0.5,
        "before": 0.25,
        "after": after.mean(),
        "pictures": len(after),
        "after_bits": runs.packed(after),
        "diversity": [0.2, 0.1],
        "cost": {"forward_equivalents": 2345, "forwards": 1234, "decodes": 56},
        "seconds": 7.0,
        "curve": [[0, 0.25], [1234, 0.5]],
        "tempflow": "0",
    } | fields


def finished(config: Config, right: list[float], fake: Callable[[Path], None] | None = None) -> None:
    """Writes what a run of that configuration leaves behind."""
    folder = claim(config.output, "run")
    (folder / "config.yaml").write_text(to_yaml(config))
    points = [(0, 0.5), (1584, 0.75)]
    write_lines(folder / "evaluation.jsonl", [{"forward_equivalents": x, "mean": {METRIC: y}} for x, y in points])
    spent = {"forward_equivalents": 170, "forwards": 100, "decodes": 9, "reward_calls": 18}
    metrics = [{"diversity": d, **spent} for d in (3.0, 1, 1, 1, 1, 1, 1, 5)]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "alarms.jsonl", [])
    cost = {"forward_equivalents": 2600, "forwards": 1500, "decodes": 144, "reward_calls": 288}
    summary = {"best_validation": 0.75, "cost": cost, "seconds": 12.34}
    Path(f"{folder}.cpu").write_text("11.5\n")
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples.json").write_text(json.dumps({METRIC: [[0.0] * len(right), right]}))
    if fake is not None:
        fake(folder)


def write_lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


# ------------------------------------------------------------------------------------------------------------ budget
def test_budget_counts_rollout_training_and_reference(board: Board):
    # Flow-GRPO by hand, a prompt: 12 chains of 6 steps, 5 of which are trained; with a KL once more by the reference.
    cost = 12 * (12 * 6 + 3 * 12 * 5)
    config = board.config(FLOW, 1e-4, 0)
    assert config.iterations == round(80_000 / cost)
    held = replace(FLOW, algorithm={**FLOW.algorithm, "kl": 0.1})
    assert board.config(held, 1e-4, 0).iterations == round(80_000 / (cost + 12 * 12 * 5))


@given(st.integers(1, 20_000))
def test_budget_is_met_as_nearly_as_whole_iterations_can(budget: int):
    algorithm = parse_config({"name": "x", "iterations": 1, "algorithm": dict(FLOW.algorithm)}).algorithm.build()
    one = 3 * (72 + 3 * 60)
    assert abs(runs.affordable(algorithm, 3, budget) * one - budget) <= max(one / 2, one - budget)


def test_every_entry_spends_about_the_same(board: Board):
    for entry in ENTRIES:
        config = board.config(entry, RATES[0], 0)
        algorithm = config.algorithm.build()
        costs = [algorithm.cost(i, entry.prompts) for i in range(config.iterations)]
        others, judged = len(algorithm.objective.weight_sets) - 1, algorithm.latent_reward is not None
        planned = [(c.forwards, c.trained_edges) for c in costs]
        trained = planned if entry.trained is None else [(forwards, entry.trained) for forwards, _ in planned]
        spent = sum(forwards + edges * (3 + others + judged) for forwards, edges in trained)
        assert spent == pytest.approx(board.budget, rel=0.025) and trained <= planned
        assert 4 <= config.iterations / config.evaluation.every <= 7
    assert len({e.name for e in ENTRIES}) == len(ENTRIES)
    assert len(set(RATES)) == 3


def test_names_keep_rates_apart(board: Board):
    files = [board.file(board.config(FLOW, rate, 0)).name for rate in (1e-4, 1.5e-4, 15e-4)]
    assert files[1] == "flow_grpo_global-0.00015-0-80000.json"
    assert len(set(files)) == 3


# ------------------------------------------------------------------------------------------------------ result files
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_outcomes_survive_packing(bits: list[bool]):
    digits = runs.packed(np.array(bits, float))
    assert runs.unpacked(digits, len(bits)).tolist() == [float(b) for b in bits]
    # Independent of numpy: the digits are the outcomes as a binary number, filled up with zeros on the right.
    assert int(digits, 16) == int("".join(str(int(b)) for b in bits).ljust(len(digits) * 4, "0"), 2)


def test_a_failed_score_is_not_a_wrong_picture():
    with pytest.raises(ValueError, match="1 are neither 0 nor 1"):
        runs.packed(np.array([1, 0, np.nan]))
    with pytest.raises(ValueError, match="nearest valid: 4"):
        runs.unpacked("ff", 9)


def test_a_finished_run_becomes_a_small_file(board: Board):
    config = board.config(FLOW, 1e-4, 0)
    finished(config, [1.0, 0.0] * 504)
    Worker(board, 1).ended(config, 0, "done")
    file = board.file(config)
    kept = json.loads(file.read_text())
    assert file.stat().st_size < 6 * 1024
    assert kept["after"] == 0.5 and kept["before_bits"] == "00" * 126 and kept["after_bits"] == "aa" * 126
    assert kept["diversity"] == [pytest.approx(7 / 5), pytest.approx(9 / 5)]
    assert kept["curve"] == [[0, 0.5], [1584, 0.75]] and kept["cost"]["forwards"] == 1500 and not kept["collapsed"]
    assert kept["seconds"] == 11.5
    assert not Path(config.output).exists() and not Path(f"{config.output}.cpu").exists()
    assert leaderboard.stored(board, config) == kept


def test_collapse_and_a_guards_stop_are_told(board: Board):
    config = board.config(FLOW, 1e-4, 0)

    def stopped(folder: Path) -> None:
        (folder / "summary.json").unlink()
        write_lines(
            folder / "evaluation.jsonl", [{"forward_equivalents": x, "mean": {METRIC: 0.5 - x}} for x in (0, 0.3)]
        )
        alarms = [{"guard": g, "action": a, "iteration": i} for g, a, i in (("kl", "warn", 3), ("kl", "stop", 7))]
        write_lines(folder / "alarms.jsonl", alarms)

    finished(config, [1.0], stopped)
    kept = runs.boiled(config, BASE, METRIC)
    assert kept["stopped"] == "kl at iteration 7" and kept["best_validation"] == 0.5 and kept["collapsed"]
    assert "after" not in kept


def test_a_failed_run_is_counted_then_skipped(
    board: Board, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    config, worker, started = board.config(FLOW, 1e-4, 0), Worker(board, 1), list[str]()
    finished(board.untrained(), [1.0])

    def crash(configs: list[Config], jobs: int, *, resume: bool, ended: Callable[[Config, int, str], None]) -> None:
        for c in configs:
            started.append(c.name)
            ended(c, 1, "out of memory")

    monkeypatch.setattr(leaderboard, "run_all", crash)
    for _ in range(4):
        worker.run([config])
    assert started == [board.untrained().name, config.name] * leaderboard.ATTEMPTS
    assert "is skipped, it failed 2 times: exit 1: out of memory" in capsys.readouterr().out
    assert not board.file(config).exists()


def test_a_run_that_finished_before_the_cut_is_not_run_again(board: Board, monkeypatch: pytest.MonkeyPatch):
    done, other = board.config(FLOW, 1e-4, 0), board.config(FLOW, 2e-4, 0)
    for config in (done, other, board.untrained()):
        finished(config, [1.0, 1.0])
    (Path(other.output) / "config.yaml").write_text("name: something else\n")
    seen = list[str]()
    monkeypatch.setattr(leaderboard, "run_all", lambda configs, *_, **__: seen.extend(c.name for c in configs))
    Worker(board, 1).run([done, other])
    assert seen == [board.untrained().name, other.name] and not Path(other.output).exists()
    assert board.file(done).exists()


def test_without_the_untrained_models_test_no_run_is_started(board: Board, monkeypatch: pytest.MonkeyPatch):
    seen = list[str]()
    monkeypatch.setattr(leaderboard, "run_all", lambda configs, *_, **__: seen.extend(c.name for c in configs))
    with pytest.raises(SystemExit, match=r"untrained-240-1008 failed: see .*\.log"):
        Worker(board, 1).run([board.config(FLOW, 1e-4, 0)])
    assert seen == [board.untrained().name]


# ---------------------------------------------------------------------------------------------- what stands for what
def kept_as(board: Board, config: Config) -> dict[str, Any]:
    finished(config, [1.0])
    return json.loads(json.dumps(runs.boiled(config, BASE, METRIC)))


def test_a_result_stands_for_its_own_configuration_only(board: Board):
    config = board.config(FLOW, 1e-4, 0)
    kept = kept_as(board, config)
    elsewhere = config.replace(output="elsewhere", name="other")
    assert runs.mismatch(kept, config, BASE) == runs.mismatch(kept, elsewhere, BASE) == []
    assert runs.mismatch(kept, config.replace(seed=1), BASE) == ["seed was 0, now 1"]
    other = board.config(replace(FLOW, algorithm={**FLOW.algorithm, "clip": 0.02}), 1e-4, 0)
    assert runs.mismatch(kept, other, BASE) == ["algorithm.clip was 0.01, now 0.02"]
    assert runs.mismatch(kept, config, "c" * 64) == ["base weights bbbbbbbb, now cccccccc"]
    kept["config"]["seed"] = 1
    assert "its configuration was changed by hand" in runs.mismatch(kept, config.replace(seed=1), BASE)


def test_the_untrained_models_test_is_taken_over_and_changes_no_result(board: Board, tmp_path: Path):
    config, lender = board.config(FLOW, 1e-4, 0), board.untrained()
    assert config.evaluation.before == lender.output
    alike = {name: value for name, value in flat_evaluation(config).items() if name not in ("every", "before")}
    assert alike.items() <= flat_evaluation(lender).items() and config.model == lender.model
    assert [r.name for r in config.rewards] == [r.name for r in lender.rewards] and config.device == lender.device
    finished(config, [1.0, 0.0])
    made = runs.boiled(config, BASE, METRIC)
    assert "before" not in made["config"]["evaluation"]
    alone = config.replace(evaluation=config.evaluation.model_copy(update={"before": ""}))
    assert runs.mismatch(made, alone, BASE) == runs.mismatch(made, config, BASE) == []
    assert Board(BASE, test=7).untrained().output != lender.output


def flat_evaluation(config: Config) -> dict[str, Any]:
    return config.evaluation.model_dump()


def test_a_setting_added_later_counts_where_it_is_used(board: Board):
    config = board.config(FLOW, 1e-4, 0)
    kept = kept_as(board, config)
    for setting in ("clip_high", "train_steps"):
        del kept["config"]["algorithm"][setting]
    kept["config_hash"] = runs.config_hash(kept["config"])
    assert runs.mismatch(kept, config, BASE) == []
    used = board.config(replace(FLOW, algorithm={**FLOW.algorithm, "train_steps": 2}), 1e-4, 0)
    used = used.replace(iterations=config.iterations, evaluation=config.evaluation)
    assert runs.mismatch(kept, used, BASE) == ["algorithm.train_steps is 2, and was not there"]


def test_a_foreign_file_is_said_and_not_used(board: Board):
    config, said = board.config(FLOW, 1e-4, 0), list[str]()
    board.results.mkdir()
    board.file(config).write_text("{}")
    assert leaderboard.stored(board, config, said.append) is None
    board.file(config).write_text(json.dumps(kept_as(board, config) | {"base_hash": "d" * 64}))
    assert leaderboard.stored(board, config, said.append) is None
    assert "not a result" in said[0] and "base weights dddddddd" in said[1]


# ------------------------------------------------------------------------------------------------------ order of work
def test_validation_chooses_the_rate():
    def at(score: float | None, stopped: str | None = None) -> dict[str, Any]:
        return {"best_validation": score, "stopped": stopped}

    assert leaderboard.best_rate({4e-4: at(0.6), 1e-4: at(0.7), 2e-4: at(None)}) == 1e-4
    assert leaderboard.best_rate({4e-4: at(0.5), 1e-4: at(0.5)}) == 1e-4  # the gentler of two equals
    assert leaderboard.best_rate({4e-4: at(0.9, "kl at iteration 3"), 1e-4: at(0.4)}) == 1e-4
    assert leaderboard.best_rate({4e-4: at(0.9, "kl at iteration 3")}) == 4e-4
    assert leaderboard.best_rate({}) is None


def test_seeds_go_round_the_entries():
    paper, knob = Entry("p", {}, 1), Entry("k", {}, 1, "knob")
    order = [
        (e.name, seed) for e, _, seed in leaderboard.turns([(paper, 1.0), (knob, 1.0), (replace(paper, name="q"), 1.0)])
    ]
    assert order == [("p", 1), ("q", 1), ("p", 2), ("q", 2)]  # the search's own seed is the first


def test_other_seeds_count_only_at_the_rate_of_a_whole_search(board: Board):
    def keep(rate: float, seed: int, validation: float) -> None:
        config = board.config(FLOW, rate, seed)
        finished(config, [1.0, 0.0])
        kept = runs.boiled(config, BASE, METRIC) | {"best_validation": validation}
        board.results.mkdir(exist_ok=True)
        board.file(config).write_text(json.dumps(kept))

    def known() -> tuple[float | None, list[int]]:
        now = leaderboard.standing(board, FLOW)
        return now.rate, list(now.finals)

    first, second, third = RATES
    assert known() == (None, [])
    keep(first, leaderboard.SEARCH_SEED, 0.5)
    keep(first, 1, 0.5)
    assert known() == (first, [0])
    keep(second, leaderboard.SEARCH_SEED, 0.6)
    keep(third, leaderboard.SEARCH_SEED, 0.4)
    assert known() == (second, [0])
    keep(second, 1, 0.6)
    assert known() == (second, [0, 1])


# --------------------------------------------------------------------------------------------------------------- page
def test_the_first_editions_leaderboard_is_frozen(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture):
    """It says so in its first line, and a leaderboard of today neither reads its results nor writes its page."""
    root = Path(leaderboard.__file__).parents[1]
    frozen, page = root / "benchmarks" / "leaderboard" / "first_edition", root / "docs" / "leaderboard.md"
    first = page.read_text().splitlines()[0]
    assert "first edition" in first and "frozen" in first
    assert len(list(frozen.glob("*.json"))) == 187
    assert Board(BASE).results.resolve() != frozen.resolve()
    leaderboard.write(board, [FLOW], tmp_path / "docs")
    assert "is not used" not in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "docs").glob("*.md")] == [f"{leaderboard.PAGE}.md"] != [page.name]


def stands(name: str, *afters: np.ndarray, kind: Any = "paper", **fields: Any) -> Standing:
    entry = replace(FLOW, name=name, kind=kind)
    return Standing(entry, {1e-4: result(afters[0])}, 1e-4, {s: result(a, **fields) for s, a in enumerate(afters)})


def prompts(count: int) -> list[Prompt]:
    """As many different ones."""
    return [Prompt(str(n)) for n in range(count)]


def test_an_ordering_is_claimed_only_where_the_interval_excludes_zero():
    low, high = np.zeros(200), np.ones(200)
    close = low.copy()
    close[0] = 1  # one picture of 200: a resample leaves it out with probability 0.37
    a, b, c = (stands(n, x, x, x) for n, x in (("a", low), ("b", high), ("c", close)))
    apart = prompts(200)
    assert leaderboard.compared(b, a, apart, 200) == "+1.000 [+1.000, +1.000], 3 seeds: better"
    assert leaderboard.compared(a, b, apart, 200).endswith("3 seeds: worse")
    said = leaderboard.compared(c, a, apart, 200)
    assert "+0.005" in said and "not separable" in said
    # A gain on one prompt alone is one prompt's, however many of its pictures there are.
    few = [Prompt(str(n % 4)) for n in range(200)]
    gained = stands("d", (np.arange(200) % 4 == 0).astype(float))
    assert leaderboard.compared(gained, a, few, 400).endswith("not separable")
    assert leaderboard.compared(gained, a, apart, 400).endswith("better")


def test_only_seeds_that_both_have_are_compared():
    ones, zeros = np.ones(8), np.zeros(8)
    many, one = stands("many", ones, zeros, zeros), stands("one", zeros, kind="knob")
    assert leaderboard.compared(many, one, prompts(8), 50).endswith("1 seed: better")
    assert leaderboard.compared(many, replace(one, finals={}), prompts(8), 50) == "–"


def test_the_page_sorts_and_says_how_many_seeds(board: Board):
    half, most = np.array([1.0, 0, 1, 0]), np.array([1.0, 1, 1, 0])
    first = stands("tempflow_grpo", most, most)
    stopped = replace(stands("flow_grpo_global", half), finals={0: result(half), 1: {"stopped": "kl at iteration 9"}})
    searched = stands("third", np.ones(4))
    missing = Standing(replace(FLOW, name="fourth"), {}, None, {})
    text = leaderboard.page(replace(board, test=4), [stopped, missing, first, searched], draws=50)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "→ **" in line]
    assert [row.split()[1] for row in rows] == ["third", "tempflow_grpo", "flow_grpo_global"]
    assert "0.0001 (1 of 3 tried) | 1 of 3 |" in rows[0] and "2 of 3" in rows[1]
    assert "1 of 3; 1 stopped: kl at iteration 9" in rows[2]
    assert "0.250 → **0.750** | +0.500 | 0.100 (0.50 ×) | 2,345 | 1,234 | 56 | 7 |" in rows[1]
    assert "Not here yet: fourth (0 of 3 rates tried)." in text


def test_claims_are_of_entries_and_say_what_the_interval_says(board: Board):
    names = {e.name for e in ENTRIES}
    assert all(c.better in names and c.worse in names and c.better != c.worse for c in CLAIMS)
    assert len({(c.better, c.worse) for c in CLAIMS}) == len(CLAIMS)
    ones, half = np.ones(8), np.array([1.0, 0] * 4)
    mix, dance = stands("mix_grpo", ones, ones), stands("dance_grpo", half)
    holds = leaderboard.claimed({"mix_grpo": mix, "dance_grpo": dance}, prompts(8), 50)
    assert [(row[0], row[-1]) for row in holds] == [("mix_grpo > dance_grpo", "holds, so far")]
    assert holds[0][2].startswith("+0.500 [+0.") and holds[0][2].endswith("], 1 seed")
    turned = {"mix_grpo": replace(mix, finals={0: result(np.zeros(8))}), "dance_grpo": dance}
    assert leaderboard.claimed(turned, prompts(8), 50)[0][-1] == "the reverse, so far"
    rates = dict.fromkeys(RATES, result(ones))
    whole = {
        name: replace(stands(name, value, value, value), search=rates)
        for name, value in (("mix_grpo", ones), ("dance_grpo", half))
    }
    assert leaderboard.claimed(whole, prompts(8), 50)[0][-1] == "holds"
    same = leaderboard.claimed({"mix_grpo": dance, "dance_grpo": dance}, prompts(8), 50)
    assert same[0][-1] == "not separable, so far"
    assert leaderboard.claimed({"mix_grpo": mix}, prompts(8), 50) == []


def test_speeds_are_of_the_mean_curve():
    def curved(*curves: list[list[float | None]]) -> Standing:
        finals = {n: result(np.ones(4)) | {"curve": curve} for n, curve in enumerate(curves)}
        return Standing(FLOW, finals, 1e-4, finals)  # type: ignore[arg-type]

    one = [[0, 0.4], [1000, 0.4], [2000, 0.5], [3000, 0.4]]
    assert leaderboard.speeds(curved(one)) == ["1,500", "2,000", "–", "–"]
    other = [[0, 0.4], [1000, 0.6], [2000, 0.7]]
    assert leaderboard.speeds(curved(one, other)) == ["500", "1,000", "1,500", "2,000"]
    assert runs.reached([[0, 0.4], [50, None], [100, float("nan")], [200, 0.6]], 0.5) == 100


@pytest.mark.parametrize("number", [0, 3, 9])
def test_curves_are_drawn_for_any_number_of_entries(tmp_path: Path, number: int):
    curves = {f"e{i}": [np.array([[0, 0.4], [10, 0.5]]), np.array([[0, 0.4]])] for i in range(number)}
    runs.draw_curves(curves, tmp_path / "img" / "x.png", ["e1"])
    assert (tmp_path / "img" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_base_hash_is_of_weights_and_their_places(tmp_path: Path):
    assert len(runs.base_hash()) == 64
    seen = set[str]()
    for name, content in (("a/m", b"1"), ("a/m", b"2"), ("b/m", b"2")):
        root = tmp_path / str(len(seen))
        file = root / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        seen.add(runs.base_hash(root))
        (root / "config.json").write_text("{}")
        assert runs.base_hash(root) in seen
    assert len(seen) == 3


def test_processor_time_of_all_starts_is_added_up(board: Board, monkeypatch: pytest.MonkeyPatch):
    config, codes = board.config(FLOW, 1e-4, 0), list[int]()
    work = "sum(i * i for i in range(2_000_000)); raise SystemExit(3)"

    def started(config: Config, resume: bool) -> subprocess.Popen:
        Path(f"{config.output}.log").parent.mkdir(parents=True, exist_ok=True)
        Path(f"{config.output}.log").write_text("last\n")
        return subprocess.Popen([sys.executable, "-c", work])

    monkeypatch.setattr(runs, "_started", started)
    used = list[float]()
    for _ in range(2):
        runs.run_all([config], ended=lambda config, code, last: codes.append(code))
        used.append(runs.processor_seconds(config))
    assert codes == [3, 3] and 0 < used[0] < used[1]
