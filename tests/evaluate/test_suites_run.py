"""A suite's run: drawing, judging, going on where it was ended, folders of pictures, its page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake import PROMPTS, SIZE, Fake
from PIL import Image

from benchmarks.judge_server import Asked, JudgeServer, Reply
from tempflow.cli.suite import SuiteOptions, job_of, run_suite
from tempflow.evaluate.source import Settings, Source
from tempflow.evaluate.suite import draw
from tempflow.evaluate.suites import run as runs
from tempflow.evaluate.suites.figures import Value, by_labels
from tempflow.evaluate.suites.gallery import gallery, load_picture
from tempflow.evaluate.suites.run import Job, Side, run, side_of
from tempflow.evaluate.suites.scorers import Scorer, Shown, checkpoints, diversity, yes_or_no
from tempflow.evaluate.suites.table import Suite
from tempflow.models.finite import LATENT, Decoded
from tempflow.report.suites import write_suite
from tempflow.request import Prompt, asked
from tempflow.rewards.protocol import RewardError

HOW = Settings(steps=3, seed=5, size=SIZE, rows=8)
PLAIN = Suite("a test", "a file", asked, by_labels("score", "mean", {"kind": "kind"}))  # type: ignore[arg-type]


class Judge:
    """The mean of a picture's pixels; failed for prompts with "fog". Ends the run after `most` parts."""

    about = "mean of pixels"

    def __init__(self, most: int = 100, whole: bool = False) -> None:
        self.whole, self.most = whole, most
        self.seen: list[list[str]] = []
        self.prepared = 0

    def prepare(self) -> None:
        self.prepared += 1

    def check(self, prompts: Sequence[Prompt]) -> None:
        assert prompts

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        if len(self.seen) == self.most:
            raise KeyboardInterrupt
        self.seen.append([p.text for p in prompts])
        return [None if p.text == "fog" else float(s[0].double().mean()) for s, p in zip(shown, prompts, strict=True)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_source` gives the fake generator; how often it was called."""
    loaded: list[str] = []

    def load(source: Source, **how: object) -> Fake:
        loaded.append(source.base)
        return Fake()

    monkeypatch.setattr(runs, "load_source", load)
    monkeypatch.setattr(runs, "AT_ONCE", 4)
    return loaded


def job(tmp_path: Path, scorer: Scorer, texts: Sequence[str] = PROMPTS[:5], **other: object) -> Job:
    side = Side("shapes", source=Source("shapes"), how=HOW)
    prompts = tuple(Prompt(text, {"kind": "light" if "a" in text else "other"}) for text in texts)
    plain = Job("plain", PLAIN, prompts, len(prompts), 2, (side,), scorer, tmp_path / "out", {"scorer": "mean"})
    return replace(plain, **other)


def silent(line: str) -> None:
    """Says nothing."""


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_pictures_are_those_that_an_evaluation_draws(tmp_path: Path, model: list[str]) -> None:
    judge = Judge()
    tables = run(job(tmp_path, judge), silent)
    expected = draw(
        Fake(), asked(PROMPTS[:5]), steps=3, guidance=1.0, seed=5, size=SIZE, rows=8, samples_per_prompt=2
    ).pictures()
    found = gallery(tmp_path / "out")
    assert list(found) == [(n, k) for n in range(5) for k in range(2)]
    assert torch.equal(torch.stack([load_picture(file) for file in found.values()]), expected)
    means = expected.double().mean((1, 2, 3)).tolist()
    told = {(line["number"], line["sample"]): line["value"] for line in lines(tmp_path / "out")}
    assert told == {key: None if key[0] == 3 else value for key, value in zip(found, means, strict=True)}
    (whole,) = tables[0].rows
    assert whole.mean == pytest.approx(np.mean(means[:6] + means[8:])) and (whole.count, whole.failed) == (8, 2)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] == 2 and summary["missing"] == "" and len(summary["shown"]) == 5
    assert summary["tables"][1]["rows"][0]["label"] == "light"


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_that_was_ended_goes_on(tmp_path: Path, model: list[str], whole: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, Judge(most=1, whole=whole)), silent)
    out = tmp_path / "out"
    kept = lines(out)
    assert len(kept) == 4 and not (out / "summary.json").exists()
    with (out / "results.jsonl").open("a") as stream:  # a line that the end cut off
        stream.write('{"number": 2, "sam')
    (out / "pictures" / "00004_1.png").unlink()
    (out / "pictures" / "00004_1.new").write_bytes(b"half")
    before = {file.name: file.stat().st_mtime_ns for file in (out / "pictures").glob("*.png")}
    judge = Judge(whole=whole)
    tables = run(job(tmp_path, judge), silent)
    assert [text for part in judge.seen for text in part] == [t for t in PROMPTS[2:5] for _ in range(2)]
    after = lines(out)
    assert after[:4] == kept and len(after) == 10 == len({(line["number"], line["sample"]) for line in after})
    assert {f.name: f.stat().st_mtime_ns for f in (out / "pictures").glob("*.png")}.items() >= before.items()
    again = Judge()
    fresh = run(job(tmp_path, again, output=tmp_path / "fresh"), silent)
    assert fresh == tables and model == ["shapes"] * 3
    third = Judge()
    assert run(job(tmp_path, third), silent) == tables and third.seen == [] and len(model) == 3
    assert third.prepared == 0  # all is there: nobody is asked whether the judge is


def test_a_prompt_that_is_half_judged_is_given_whole_where_that_is_needed(tmp_path: Path, model: list[str]) -> None:
    run(job(tmp_path, Judge()), silent)
    file = tmp_path / "out" / "results.jsonl"
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:3] + kept[4:]))
    for whole, given in ((True, 2), (False, 1)):
        judge = Judge(whole=whole)
        run(job(tmp_path, judge), silent)
        assert judge.seen == [[PROMPTS[1]] * given]
        assert len(lines(tmp_path / "out")) == 10
        file.write_text("".join(kept[:3] + kept[4:]))


def test_other_settings_are_refused_in_that_folder(tmp_path: Path, model: list[str]) -> None:
    run(job(tmp_path, Judge()), silent)
    side = Side("shapes", source=Source("shapes"), how=replace(HOW, steps=4))
    out = re.escape(str(tmp_path / "out"))
    for other, told in (
        ({"sides": (side,)}, r"what\.steps 3, and now it is 4"),
        ({"samples": 3}, "samples 2, and now it is 3"),
        ({"said": {"scorer": "x"}}, "scorer 'mean', and now it is 'x'"),
        ({"count": 4}, r"prompts '5 of content .*', and now it is '4 of content"),
    ):
        with pytest.raises(ValueError, match=rf"output: '{out}' has results with {told}.*; nearest valid: '{out}-2'"):
            run(job(tmp_path, Judge(), **other), silent)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"output: .* is not empty"):
        run(job(tmp_path, Judge(), output=other), silent)


def test_a_picture_that_changed_since_is_refused(tmp_path: Path, model: list[str]) -> None:
    run(job(tmp_path, Judge()), silent)
    Image.new("RGB", (2, 2)).save(tmp_path / "out" / "pictures" / "00002_0.png")
    with pytest.raises(ValueError, match="picture 2_0 is another than the one that"):
        run(job(tmp_path, Judge()), silent)


def test_pictures_that_are_not_finite_are_failed_and_drawn_once(
    tmp_path: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.drawn

    def broken(*given: object, **how: object):
        for slots, seen in whole(*given, **how):  # type: ignore[arg-type]
            code = torch.tensor([LATENT if n == 1 and k == 0 else 0 for n in slots for k in range(2)])
            yield slots, Decoded(seen.media, code)

    monkeypatch.setattr(runs, "drawn", broken)
    for _ in range(2):
        tables = run(job(tmp_path, Judge()), silent)
        assert tables[0].rows[0].failed == 3 and len(model) == 1
    (line,) = [line for line in lines(tmp_path / "out") if "why" in line]
    assert (line["number"], line["sample"], line["value"]) == (1, 0, None) and "not finite" in str(line["why"])


def test_a_judge_that_is_gone_ends_the_run_and_nothing_is_failed_for_it(tmp_path: Path, model: list[str]) -> None:
    class Gone(Judge):
        def prepare(self) -> None:
            super().prepare()
            if self.prepared > 1:
                raise RewardError("url: cannot be reached")

        def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
            return [None] * len(shown)

    with pytest.raises(RewardError, match="cannot be reached"):
        run(job(tmp_path, Gone()), silent)
    assert not (tmp_path / "out" / "results.jsonl").exists()
    tables = run(
        job(tmp_path, Judge(), texts=["fog"], output=tmp_path / "fog"), silent
    )  # all failed, the judge is there
    assert tables[0].rows[0].failed == 2 and math.isnan(tables[0].rows[0].mean)
    write_suite(tmp_path / "fog")


# ------------------------------------------------------------------------------------------------ folders of pictures
def grey(file: Path, level: int, side: int = 4) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (level, level, level)).save(file)


def of_folder(tmp_path: Path, folder: Path, count: int, samples: int, **other: object) -> Job:
    return job(tmp_path, Judge(), ["a lamp", "the sun", "snow"][:count], sides=(Side(str(folder), folder=folder),), samples=samples, **other)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("names", ["{n:05d}/samples/{k:04d}.png", "{n}_{k}.png", "pictures/{n:05d}_{k}.png"])
def test_layouts_of_folders(tmp_path: Path, names: str) -> None:
    folder = tmp_path / "in"
    for n in range(3):
        for k in range(2):
            grey(folder / names.format(n=n, k=k), 10 * n + k)
    if "pictures" in names:
        (folder / ".tempflow.json").write_text('{"tempflow": "suite"}')
    assert side_of(str(folder), "", {}).folder == folder
    run(of_folder(tmp_path, folder, 3, 2), silent)
    assert [line["value"] for line in lines(tmp_path / "out")] == [10 * n + k for n in range(3) for k in range(2)]


def test_missing_pictures_are_named_and_failed_and_may_come_later(tmp_path: Path) -> None:
    folder, said = tmp_path / "in", list[str]()
    grey(folder / "000.png", 7)
    grey(folder / "002.png", 9, side=6)  # another size
    tables = run(of_folder(tmp_path, folder, 3, 1), said.append)
    assert said[-1] == "1 of 3 pictures are not there and count as failed: 1_0"
    assert (tables[0].rows[0].mean, tables[0].rows[0].failed) == (8.0, 1)
    assert "not there: 1_0" in " ".join(write_suite(tmp_path / "out").read_text().split())
    grey(folder / "001.png", 8)
    assert run(of_folder(tmp_path, folder, 3, 1), silent)[0].rows[0].failed == 0


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    grey(folder / "5.png", 1)
    with pytest.raises(ValueError, match=r"has a picture of prompt 5, and the prompts are numbered 0 to 2"):
        run(of_folder(tmp_path, folder, 3, 1), silent)
    grey(folder / "5_0.png", 1)
    with pytest.raises(ValueError, match="are the same picture of prompt 5"):
        gallery(folder)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"0.png' is no picture that can be read"):
        run(of_folder(tmp_path, tmp_path / "bad", 1, 1), silent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no pipeline, run or LoRA"):
        side_of(str(tmp_path / "empty"), "", {})


# ----------------------------------------------------------------------------------------------------- judges, by HTTP
def picture(level: int) -> Shown:
    return (torch.full((2, 2, 3), level, dtype=torch.uint8),)


def checkpointed(*dimensions: str) -> Prompt:
    return Prompt("a {bench}", {"points": [{"dimension": d, "description": f"{d} is {{x}}"} for d in dimensions]})


def test_checkpoints_are_asked_in_one_question_and_again_until_they_are_answered() -> None:
    def decide(asked: Asked) -> Reply:
        attempt, level = asked.body["seed"] - 7, int(asked.pictures[0][0, 0, 0])
        if attempt < level:
            return Reply(['{"score": [1]}', "yes and no"][attempt % 2])
        return Reply('{"remarks": ["a", "b"], "score": [1, 0]}')

    with JudgeServer(decide) as server:
        scorer = checkpoints(url=server.url, model="judge", attempts=3, seed=7, retries=0, concurrency=1)
        scorer.prepare()
        prompts = [checkpointed("Style", "Color")] * 3
        assert scorer([picture(0), picture(2), picture(3)], prompts, [0, 1, 2]) == [(1.0, 0.0), (1.0, 0.0), None]
        assert len(server.asked) == 1 + 3 + 3
        text = server.asked[0].text
    assert "Caption: a {bench}" in text and "1. Style: Style is {x}\n2. Color: Color is {x}" in text
    assert text.count("lists of length 2") == 1 and '{"remarks"' in text
    with pytest.raises(ValueError, match="has no points"):
        scorer.check([Prompt("a cat")])


def test_yes_and_no_by_the_first_token() -> None:
    def decide(asked: Asked) -> Reply:
        if "nothing" in asked.text and asked.pictures[0][0, 0, 0] == 9:
            return Reply("", top={"Perhaps": 1.0})
        return Reply("", top={"Yes": 0.6, "no": 0.3} if "cat" in asked.text else {"Yes": 0.1, "No": 0.2})

    questions = [{"id": n, "parents": [], "question": q} for n, q in enumerate(("A cat?", "A dog?", "nothing?"), 1)]
    prompt = Prompt("x", {"questions": questions})
    with JudgeServer(decide) as server:
        scorer = yes_or_no(url=server.url, model="judge", retries=0)
        assert scorer([picture(1), picture(9)], [prompt] * 2, [0, 0]) == [(1.0, 0.0, 0.0), None]
        assert server.asked[0].text.endswith("Answer with yes or no.") and server.asked[0].body["logprobs"]


def test_distances_are_those_of_pairs() -> None:
    black, white = (torch.full((8, 8, 3), level, dtype=torch.uint8) for level in (0, 255))
    prompts = [Prompt("a")] * 3 + [Prompt("b")] * 2 + [Prompt("c")]
    shown = [(black,), (white,), (black,), (white,), (white,), (black,)]
    told = diversity()(shown, prompts, [0, 0, 0, 1, 1, 2])
    assert told[:5] == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0], abs=1e-5) and told[5] is None
    assert "features by hand" in diversity().about and "DINOv2 (some/model, cls)" in diversity(path="some/model").about
    assert sum(told[:3]) / 3 == pytest.approx(2 / 3, abs=1e-5)  # type: ignore[arg-type] (the mean of three pairs)


def test_gsb_end_to_end(tmp_path: Path) -> None:
    """Folders against each other: a better picture, a worse one, an equal one, one of another size."""
    for n, (a, b) in enumerate([(9, 1), (2, 8), (5, 5), (9, 3)]):
        grey(tmp_path / "a" / f"{n}.png", a)
        grey(tmp_path / "b" / f"{n}.png", b, side=6 if n == 3 else 4)
    (tmp_path / "p.txt").write_text("a lamp\nthe sun\nfog\nsnow\n")

    def decide(asked: Asked) -> Reply:
        a, b = (int(p[0, 0, 0]) for p in asked.pictures)
        return Reply("Image 1 is better." if a > b else "Image 2 is better.")

    with JudgeServer(decide) as server:
        options = SuiteOptions(
            name="gsb",
            what=str(tmp_path / "a"),
            against=str(tmp_path / "b"),
            prompts=str(tmp_path / "p.txt"),
            options={"url": server.url, "model": "judge"},
            output=str(tmp_path / "out"),
        )
        (table,), page = run_suite(options)
        assert server.count == 6
        again, _ = run_suite(options.model_copy(update={"options": {"url": server.url + "/", "model": "judge"}}))
        assert again == (table,) and server.count == 6
    assert [row.mean for row in table.rows] == [0.25, 0.5, 0.25, 0.25]
    assert page == tmp_path / "out" / "report.html" and page.read_text().count("data:image/png") == 8


def test_geneval2_and_dpg_bench_end_to_end(tmp_path: Path) -> None:
    """Of pictures in a folder: atoms by their probability; questions by yes and no."""
    grey(tmp_path / "in" / "0_0.png", 1)
    grey(tmp_path / "in" / "0_1.png", 2)
    atoms = [["How many cows are there?", "three"], ["Is there grass?", "yes"]]
    cows = {"prompt": "three cows", "atom_count": 2, "vqa_list": atoms, "skills": ["count", "object"]}
    (tmp_path / "g.jsonl").write_text(json.dumps(cows) + "\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "7.txt").write_text("three cows")
    rows = "7,1,0,Is there grass?,entity\n7,2,1,Are there cows?,entity\n"
    (tmp_path / "q.csv").write_text("item_id,proposition_id,dependency,question,category\n" + rows)

    def decide(asked: Asked) -> Reply:
        if "How many" in asked.text:
            return Reply(top={"three": 0.3, "Three": 0.06, "two": 0.6})
        no = "grass" in asked.text and asked.pictures[0][0, 0, 0] == 2
        return Reply(top={"no": 0.75, "yes": 0.25} if no else {"yes": 1.0})

    def first(name: str, prompts: str, questions: str = "") -> tuple[float, int]:
        given = {"url": server.url, "model": "judge"}
        tables, _ = run_suite(
            SuiteOptions(
                name=name,
                what=str(tmp_path / "in"),
                prompts=str(tmp_path / prompts),
                questions=questions,
                options=given,
                output=str(tmp_path / name),
            )
        )
        return tables[0].rows[0].mean, tables[0].rows[0].count

    with JudgeServer(decide) as server:
        soft = (math.sqrt(0.36 * 1.0) + math.sqrt(0.36 * 0.25)) / 2  # geometric means over atoms
        assert first("geneval2", "g.jsonl") == (pytest.approx(soft, abs=1e-6), 2)
        assert first("dpg_bench", "prompts", str(tmp_path / "q.csv")) == (0.5, 2)  # 1, and 0: cows without grass


def test_options_that_do_not_fit_are_told_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a lamp\n")
    grey(tmp_path / "a" / "0.png", 1)
    prompts, folder = str(tmp_path / "p.txt"), str(tmp_path / "a")
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    for told, given in {
        "against: none given; nearest valid: --against": {"name": "gsb", "options": judge},
        "against: 'diversity' compares nothing": {"name": "diversity", "against": "shapes"},
        "samples: 1 is too few for this suite; nearest valid: 2": {"name": "diversity", "samples": 1},
        "steps: the pictures are there, and none is drawn": {"name": "diversity", "what": folder, "steps": 4},
        "base: 'shapes' is for a LoRA": {"name": "diversity", "what": folder, "base": "shapes"},
        "is no pipeline, run or LoRA": {"name": "diversity", "what": str(tmp_path)},
    }.items():
        with pytest.raises(ValueError, match=re.escape(told)):
            job_of(SuiteOptions.model_validate({"prompts": prompts, **given}))
    found = job_of(SuiteOptions(name="diversity", prompts="shapes:test", count=3, samples=2, steps=4, height=32))
    assert found.sides[0].how is not None and found.sides[0].how.steps == 4 and len(found.keys) == 6


# ---------------------------------------------------------------------------------------------------------------- pages
HOSTILE = '<script>alert("x")</script> & <b>'


def test_pages_escape_what_prompts_say(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    grey(folder / "0.png", 7)
    prompts = (Prompt(HOSTILE, {"kind": HOSTILE}),)
    made = replace(of_folder(tmp_path, folder, 1, 1), every=prompts)
    run(made, silent)
    page = write_suite(tmp_path / "out").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3
