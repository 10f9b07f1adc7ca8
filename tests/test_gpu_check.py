"""scripts/gpu_check.py: every section, on tiny networks on a CPU; and a page that no fault or lack of time breaks."""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[1] / "scripts" / "gpu_check.py"

Start = Callable[..., int]


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        yield runpy.run_path(str(FILE))


@pytest.fixture
def start(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts it as a command; its exit status."""

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(FILE), *options])
        with pytest.raises(SystemExit) as ended:
            script["main"]()
        return int(ended.value.code or 0)

    return run


def here(script: dict[str, Any]) -> Any:
    return script["Machine"](torch.device("cpu"), True)


def lines_of(output: Path) -> dict[str, dict[str, dict[str, Any]]]:
    sections = json.loads(output.with_suffix(".json").read_text())["sections"]
    return {section["title"]: {line["what"]: line for line in section["lines"]} for section in sections}


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(start: Start, tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.md"
    assert start("--output", str(output), "--tiny", "--minutes", "20") == 0
    told = json.loads(output.with_suffix(".json").read_text())
    assert [(s["state"], s["fault"]) for s in told["sections"]] == [("done", "")] * 7
    environment, tests, sd35, flux, tools, drafts, seeds = lines_of(output).values()
    assert "CUDA" in environment["GPU"]["not here"] and torch.__version__ in environment["packages"]["is"]
    (collected,) = tests.values()
    assert "collected" in collected["is"] and "CUDA" in collected["but"]
    for lines in (sd35, flux):
        graph, forward = lines["tempflow_grpo"], lines["diffusion_nft"]
        assert graph["|log ratio| at the first update"] == 0 and graph["rollout gap, roundings"] < 12
        assert forward["|log ratio| at the first update"] == "has none" and forward["loss"] > 0
        for name in ("tempflow_grpo", "diffusion_nft"):
            assert 0 < lines.pop(f"{name}, by `tempflow cost`")["peak GiB"] < 0.1
        for line in lines.values():
            assert 0 < line["share in its backwards"] < line["share in the network"] < 1
            assert line["peak GiB"] == "needs CUDA" and line["gradient norm"] > 0
            assert line["samples/s"] == line["samples"] / line["seconds"]
    assert tools["checkpointing"]["ms a row"] > 0 and tools["attention native"]["ms a row"] > 0
    assert "CUDA" in next(line for what, line in tools.items() if "compile" in what)["not here"]
    assert drafts["full"]["velocity's error, share"] == 0 < drafts["int8"]["velocity's error, share"] < 0.2
    assert "CUDA" in drafts["float8"]["not here"] and "CUDA" in drafts["nvfp4"]["not here"]
    (pair,) = seeds.values()
    assert pair["weights"] == "bitwise equal" and pair["largest difference"] == 0 < pair["largest weight"]
    page = output.read_text()
    assert all(f"\n## {section['title']}\n" in page for section in told["sections"])
    rows = [line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("| tempflow_grpo |")]
    assert rows == [page.split("\n| what | peak", 1)[1].split("\n")[1].count("|")] * 2  # no name breaks a table


def test_an_iteration_is_measured_and_leaves_the_model_as_it_was(script: dict[str, Any]) -> None:
    shape = script["sd35"](True)
    model = script["built"](shape, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    facts, trained = script["iteration"](model, shape, "tempflow_grpo", updates=2)
    assert facts["|log ratio| at the first update"] > 0  # the largest of both updates, and the second's is not 0
    assert 0 < facts["share in its backwards"] < facts["share in the network"] < 1
    assert facts["samples"] == 4 and "peak GiB" in facts
    after = model.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any(not torch.equal(value.bfloat16(), before[name]) for name, value in trained.items())


def test_the_estimate_is_of_the_network_that_is_drawn(script: dict[str, Any]) -> None:
    """Weights, masters, gradients and moments are counted, and no text encoder of a real size."""
    shape, device = script["sd35"](True), torch.device("cpu")
    network = script["built"](shape, device).network
    weights = sum(t.nbytes for t in network.state_dict().values())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    found = script["estimated"](shape, "tempflow_grpo", device)["peak GiB"] * script["GIB"]
    assert weights + 16 * trained < found < 5 * weights


def test_events_of_a_gpu_are_told_in_seconds(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(ticks)

        def elapsed_time(self, later: Event) -> float:
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Network(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return (super().forward(x),)

    network = Network(2, 2)
    watch = script["Stopwatch"](network, torch.device("cuda"))
    with torch.no_grad():
        network(torch.ones(1, 2))
    for _ in range(3):
        network(torch.ones(1, 2))[0].sum().backward()
    assert watch.stop() == (4.0, 3.0)
    network(torch.ones(1, 2))[0].sum().backward()
    assert next(ticks) == 14  # nothing is hooked any more


def test_another_seed_is_told_from_a_run_that_repeats(script: dict[str, Any]) -> None:
    shape = script["sd35"](True)
    networks = [script["built"](shape, torch.device("cpu"), seed).network.state_dict() for seed in (0, 0, 1)]
    name = "transformer_blocks.0.ff.net.2.weight"
    assert torch.equal(networks[0][name], networks[1][name]) and not torch.equal(networks[0][name], networks[2][name])


def test_the_real_shapes_are_the_released_ones(script: dict[str, Any]) -> None:
    """By the parameters that the models' cards give: 2.24 and 11.9 billion."""
    import diffusers
    from accelerate import init_empty_weights

    for shape, billions in ((script["sd35"](False), 2.24), (script["flux"](False, 19, 38), 11.9)):
        few = {"pos_embed_max_size": 4, "sample_size": 4} if "pos_embed_max_size" in shape.config else {}
        with init_empty_weights():
            network = getattr(diffusers, shape.network)(**{**shape.config, **few})  # positions are no parameters
        assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_fault_or_a_lack_is_a_line_and_the_next_is_tried(script: dict[str, Any], tmp_path: Path) -> None:
    output, seen = tmp_path / "page.md", list[str]()

    def breaks() -> dict[str, object]:
        raise RuntimeError("out of luck\nin two | lines")

    def lacks() -> dict[str, object]:
        raise script["LackError"]("no such thing")

    def first(_: Any) -> Iterator[Any]:
        yield "breaks", breaks
        yield "lacks", lacks
        yield "holds", lambda: {"figure": float("nan")}

    def second(_: Any) -> Iterator[Any]:
        seen.append(output.read_text())
        yield from ()
        raise ValueError("nothing to begin with")

    sections = [script["Section"]("One", 1, first), script["Section"]("Two", 1, second)]
    assert not script["check"](sections, here(script), 1.0, output)
    one, two = json.loads(output.with_suffix(".json").read_text())["sections"]
    assert [line.get("fault", line.get("not here", line.get("figure"))) for line in one["lines"]] == [
        "RuntimeError: out of luck in two | lines",
        "no such thing",
        "nan",
    ]
    assert (one["state"], two["state"]) == ("failed", "failed")
    assert two["fault"] == "ValueError: nothing to begin with"
    assert "out of luck in two \\| lines" in seen[0] and "## Two\nrunning" in seen[0]


def test_a_section_whose_time_is_up_leaves_what_it_found(script: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "page.md"

    def hangs() -> dict[str, object]:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as a reward's fault is passed over
                continue

    def slow(_: Any) -> Iterator[Any]:
        yield "quick", lambda: {"figure": 1}
        yield "hangs", hangs

    assert not script["check"]([script["Section"]("Slow", 1, slow)], here(script), 0.005, output)
    (section,) = json.loads(output.with_suffix(".json").read_text())["sections"]
    assert section["state"] == "cut short" and [line["what"] for line in section["lines"]] == ["quick"]


def test_sections_that_come_too_late_are_listed_as_not_run(script: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "page.md"
    late = script["Section"]("Late", 1, lambda _: pytest.fail("it was run"))
    assert not script["check"]([late, late], here(script), 0.0, output)
    assert output.read_text().count("not run: the 0 minutes were up") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--output", "page.txt", "--tiny"), "--output: 'page.txt' is no page; nearest valid: 'page.md'"),
        (("--output", "there.md", "--tiny"), "--output: 'there.json' is there already; nearest valid: a new file"),
        (("--output", "a.md", "--tiny", "--minutes", "nan"), "--minutes: nan must be above 0; nearest valid: 1"),
        (("--output", "a.md"), "torch sees no CUDA device here; nearest valid: --tiny"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: tuple[str, ...],
    said: str,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "there.json").touch()
    assert start(*options) == 2
    assert said in capsys.readouterr().err
