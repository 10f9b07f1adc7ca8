"""Fixed prompts, fixed noise, and reports that leave failures out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake import PROMPTS, SIZE, Fake, brightness
from PIL import Image

from tempflow.core.rollout import Noise
from tempflow.core.scores import Scores
from tempflow.evaluate import pictures, suite
from tempflow.evaluate.grid import CAPTION, CELL, GAP, grid
from tempflow.evaluate.suite import Report, draw, evaluate, fixed_prompts, numbered, sample_path
from tempflow.media import Media, Size
from tempflow.models.finite import NotFiniteError, to_pictures
from tempflow.perception.diversity import features, within_groups
from tempflow.request import Prompt, asked
from tempflow.rewards import from_function
from tempflow.stats import interval

ASKED = asked(PROMPTS)


def picture(prompts: list[str], rows: int = 64, seed: int = 3, steps: int = 5) -> torch.Tensor:
    return draw(Fake(), asked(prompts), steps=steps, guidance=1.0, seed=seed, size=SIZE, rows=rows).pictures()


def test_draw_is_an_euler_walk_from_the_seeds_noise() -> None:
    model = Fake()
    x = Noise(3, iteration=-1).initial([(n, 0) for n in range(len(PROMPTS))], (2, 2, 2))
    predict = model.predictor(model.encode(asked(PROMPTS), SIZE), 1.0)
    sigmas = model.schedule(5, SIZE).sigmas
    with torch.no_grad():
        for i in range(5):
            v = predict(x, sigmas[i].expand(len(x)), torch.arange(len(x)))
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert torch.equal(picture(list(PROMPTS)), model.decode(x, SIZE).pictures())


def test_a_picture_depends_on_seed_place_and_prompt_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on how many are drawn, in what batches, or in what chunks."""
    prompts = [PROMPTS[n % 6] for n in range(11)]
    whole = picture(prompts)
    assert whole.shape == (11, 2, 2, 3) and whole.dtype == torch.uint8
    assert torch.equal(picture(prompts, rows=2), whole)
    assert torch.equal(picture(prompts[:4]), whole[:4])
    monkeypatch.setattr(suite, "PROMPTS_AT_ONCE", 3)
    assert torch.equal(picture(prompts), whole)
    assert not torch.equal(picture(prompts, seed=4), whole)
    assert not torch.equal(whole[0], whole[6])  # the same prompt in another place has other noise


def test_a_validation_and_a_test_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the seed: weights chosen on a validation are not those that its test's noise happens to suit."""
    drawn: dict[str, list[torch.Tensor]] = {"test": [], "validation": []}
    initial = Noise.initial
    for stream, noises in drawn.items():

        def spy(self: Noise, ids: Sequence[tuple[int, ...]], *of: Any, kept: list = noises) -> torch.Tensor:
            kept.append(initial(self, ids, *of))
            return kept[-1]

        monkeypatch.setattr(Noise, "initial", spy)
        for seed in (3, 4):
            how = {"steps": 2, "guidance": 1.0, "seed": seed, "size": SIZE, "rows": 64, "stream": stream}
            evaluate(Fake(), [Prompt(p) for p in PROMPTS], [from_function(lambda i, t: [0.0] * len(t))], **how)  # type: ignore[arg-type]
    rows = {stream: torch.cat(noises).flatten(1) for stream, noises in drawn.items()}
    assert len(rows["test"]) == len(rows["validation"]) == 2 * len(PROMPTS)
    assert torch.cdist(rows["test"], rows["validation"]).min() > 0.1


def test_evaluate_scores_each_picture_by_its_prompt() -> None:
    prompts = [Prompt(p, {"kind": "ab"[n % 2]}) for n, p in enumerate(PROMPTS)]
    seen: list[str] = []

    def spy(images: list[Image.Image], texts: list[str]) -> list[float | None]:
        seen.extend(texts)
        return brightness(images, texts)

    fixed = {"steps": 5, "guidance": 1.0, "seed": 3, "size": SIZE, "rows": 4}
    report = evaluate(Fake(), prompts, [from_function(spy)], **fixed)  # type: ignore[arg-type]
    assert seen == list(PROMPTS) and report.kinds == ("a", "b") * 3
    want = picture(list(PROMPTS)).double().mean((1, 2, 3)) / 255
    np.testing.assert_allclose(report.values("spy"), want, rtol=1e-6)
    summed = evaluate(Fake(), prompts, [from_function(brightness)], total={"brightness": -3.0}, **fixed)  # type: ignore[arg-type]
    assert summed.scores.names == ("brightness", "reward")
    np.testing.assert_allclose(summed.values("reward"), -3 * want, rtol=1e-5)


REPORT = Report(
    Scores(
        torch.tensor([[0.2, 1.0], [0.4, 0.0], [0.9, 1.0], [0.0, 0.0]]),
        torch.tensor([[True, True], [True, False], [True, True], [False, False]]),
        ("soft", "hard"),
    ),
    ("p", "q", "r", "s"),
    ("one", "two", "one", "three"),
    10,
    1.0,
    7,
    gold=("hard",),
)


def test_report_means_leave_failures_out() -> None:
    assert REPORT.mean("soft") == pytest.approx(0.5) and REPORT.mean("hard") == 1.0
    by_kind = REPORT.by_kind("soft")
    assert list(by_kind) == ["one", "two", "three"]
    assert by_kind["one"] == pytest.approx(0.55) and by_kind["two"] == pytest.approx(0.4)
    assert math.isnan(by_kind["three"]) and math.isnan(REPORT.by_kind("hard")["two"])
    assert np.isnan(REPORT.values("soft")).tolist() == [False, False, False, True]


def test_report_json_and_table() -> None:
    told = REPORT.to_json()
    assert (told["count"], told["failed"], told["steps"], told["seed"]) == (4, 2, 10, 7)
    assert told["mean"]["hard"] == 1.0 and set(told["by_kind"]) == {"soft", "hard"}
    assert told["gold"] == ["hard"] and told["samples_per_prompt"] == 1 and "diversity" not in told
    assert told["interval"]["soft"] == list(REPORT.interval("soft"))
    assert told["by_kind_interval"]["soft"]["two"] == pytest.approx([0.4, 0.4])
    assert json.loads(json.dumps(told))["mean"] == told["mean"]
    rows = REPORT.table().splitlines()
    assert rows[0].split() == ["kind", "n", "prompts", "soft", "hard", "(gold)"]
    assert rows[1].split() == ["one", "2", "2", "0.550", "[0.200,", "0.900]", "1.000", "[1.000,", "1.000]"]
    assert rows[3].split() == ["three", "1", "1", "–", "–"]
    assert rows[4].split()[:4] == ["all", "4", "4", "0.500"]
    assert rows[5:] == [
        "soft: 1 of 4 scores failed; its mean is of the other 3",
        "hard: 2 of 4 scores failed; its mean is of the other 2",
    ]
    assert told["valid"] == {"soft": 3, "hard": 2}


def test_report_intervals_keep_kinds_and_prompts_together() -> None:
    values = np.random.default_rng(0).normal(size=24).astype(np.float32)
    kinds = tuple("aabb" * 6)  # two pictures of each prompt
    scores = Scores(torch.from_numpy(values)[:, None], torch.ones(24, 1, dtype=torch.bool), ("m",))
    prompts = [str(n // 2) for n in range(24)]
    report = Report(scores, tuple(prompts), kinds, 4, 1.0, 0, samples_per_prompt=2)
    assert report.interval("m") == interval(values, strata=kinds, clusters=prompts)
    of_a = [n for n in range(24) if kinds[n] == "a"]
    assert report.intervals_by_kind("m")["a"] == interval(values[of_a], clusters=[prompts[n] for n in of_a])
    low, high = report.interval("m")
    assert low < report.mean("m") < high


def test_a_prompt_that_comes_again_is_the_same_prompt() -> None:
    """A list longer than the prompts that there are goes round: more pictures, but no narrower interval."""
    values = torch.tensor([0.0, 1.0, 0.0] * 30)
    scores = Scores(values[:, None], torch.ones(90, 1, dtype=torch.bool), ("m",))
    report = Report(scores, ("p", "q", "r") * 30, ("a",) * 90, 4, 1.0, 0)
    assert report.interval("m") == interval([0.0, 1.0, 0.0]) and report.to_json()["prompts"] == 3
    assert report.intervals_by_kind("m")["a"] == report.interval("m")
    assert report.table().splitlines()[1].split()[:3] == ["a", "90", "3"]
    # three prompts of one kind against 97 of another: the first kind is as uncertain as three prompts are
    of_three, of_many = ["p", "q", "r"] * 33 + ["p"], [str(n) for n in range(97)]
    scores = Scores(torch.tensor([0.0, 1.0, 0.0] * 33 + [0.0] + [0.5] * 97)[:, None], torch.ones(197, 1) > 0, ("m",))
    kinds = ("few",) * 100 + ("many",) * 97
    assert Report(scores, (*of_three, *of_many), kinds, 4, 1.0, 0).intervals_by_kind("m")["few"] == (0.0, 1.0)


def test_report_of_plain_prompts_has_one_row() -> None:
    report = Report(REPORT.scores, REPORT.prompts, ("",) * 4, 4, 1.0, 0)
    assert [line.split()[0] for line in report.table().splitlines()[:2]] == ["kind", "all"]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"gold": ("hrad",)}, "gold: 'hrad' is none of the rewards scored; nearest valid: 'hard'"),
        ({"kinds": ("a",)}, "kinds has 1 entries; nearest valid: 4, one per picture"),
        ({"samples_per_prompt": 3}, "samples_per_prompt: 3 does not divide 4 rows"),
        ({"samples_per_prompt": 2, "diversity": torch.zeros(4)}, "diversity has 4 entries; nearest valid: 2"),
    ],
)
def test_report_checks_what_it_is_given(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(REPORT, **fields)


# ---------------------------------------------------------------------------------------------- several pictures each
FIXED: dict = {"steps": 5, "guidance": 1.0, "seed": 3, "size": SIZE, "rows": 64}


def test_more_pictures_of_a_prompt_leave_the_first_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one = picture(list(PROMPTS))
    three = draw(Fake(), ASKED, samples_per_prompt=3, **FIXED).pictures()
    assert torch.equal(three[::3], one) and torch.equal(
        draw(Fake(), asked(PROMPTS), samples_per_prompt=1, **FIXED).pictures(), one
    )
    assert not torch.equal(three[1::3], three[::3]) and not torch.equal(three[2::3], three[1::3])
    monkeypatch.setattr(suite, "PROMPTS_AT_ONCE", 7)  # two whole prompts of three
    model, sizes = Fake(), list[int]()
    monkeypatch.setattr(model, "decode", lambda x, size: (sizes.append(len(x)), Fake.decode(model, x, size))[1])
    assert torch.equal(draw(model, ASKED, samples_per_prompt=3, **FIXED).pictures(), three) and sizes == [
        6,
        6,
        6,
    ]


def test_groups_of_a_prompt_are_scored_and_their_diversity_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PROMPTS_AT_ONCE", 8)
    groups: list[list[str]] = []

    class Rank:
        name, groupwise = "rank", True

        def score(self, media, prompts, metadata) -> Scores:
            groups.append([*prompts])
            return Scores(
                torch.arange(len(media)).float()[:, None], torch.ones(len(media), 1, dtype=torch.bool), ("rank",)
            )

    prompts = [Prompt(p, {"kind": "ab"[n % 2]}) for n, p in enumerate([*PROMPTS[:3], PROMPTS[0]])]
    rewards = [Rank(), from_function(brightness)]
    report = evaluate(
        Fake(), prompts, rewards, samples_per_prompt=4, gold=("brightness",), total={"rank": 1.0}, **FIXED
    )
    assert groups == [[p.text] * 4 for p in prompts]  # the same prompt in another place is another group
    assert report.values("rank").tolist() == [0.0, 1.0, 2.0, 3.0] * 4 and report.kinds == tuple("aaaabbbb" * 2)
    assert report.gold == ("brightness",) and report.scores.names == ("rank", "brightness", "reward")
    media = draw(Fake(), prompts, samples_per_prompt=4, **FIXED).pictures()
    want = [within_groups(features(m), torch.zeros(4, dtype=torch.long))[1].item() for m in media.split(4)]
    assert report.diversity is not None and report.diversity.tolist() == pytest.approx(want, rel=1e-9)
    assert min(want) > 0
    told = report.to_json()["diversity"]
    assert told["mean"] == pytest.approx(np.mean(want)) and told["by_kind"]["a"] == pytest.approx(
        (want[0] + want[2]) / 2
    )
    assert told["interval"][0] <= told["mean"] <= told["interval"][1]
    head, first = (line.split() for line in report.table().splitlines()[:2])
    assert head[-1] == "diversity" and first[-1] == f"{told['by_kind']['a']:.3f}"


def test_parts_are_scored_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(p) for p in PROMPTS]
    whole = evaluate(Fake(), prompts, [from_function(brightness)], total={"brightness": 2.0}, **FIXED)
    monkeypatch.setattr(suite, "PROMPTS_AT_ONCE", 2)
    parts = evaluate(Fake(), prompts, [from_function(brightness)], total={"brightness": 2.0}, **FIXED)
    assert torch.equal(parts.scores.value, whole.scores.value) and parts.diversity is None


@pytest.mark.parametrize(
    "options,message",
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt: 0 is too few; nearest valid: 1"),
        ({"gold": ("brightness",), "total": {"brightness": 1.0}}, "gold: 'brightness' is trained on"),
        ({"gold": ("bright",)}, "gold: 'bright' is none of the rewards scored; nearest valid: 'brightness'"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Fake(), [Prompt("x")], [from_function(brightness)], **options, **FIXED)


def test_grid_puts_a_prompts_pictures_side_by_side(tmp_path: Path) -> None:
    media = torch.zeros(6, 4, 8, 3, dtype=torch.uint8)
    media[:, ..., 0] = torch.arange(6)[:, None, None] * 40
    grid(media, ["one", "two " * 90, "three"], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as page:
        cells = page.convert("RGB")
    step, block = CELL + GAP, 2 * (CELL + GAP)
    y = GAP + CAPTION + CELL // 4  # pictures are twice as wide as high
    for n in range(3):
        for k in range(2):
            assert cells.getpixel((GAP + n * block + k * step + CELL // 2, y)) == ((2 * n + k) * 40, 0, 0)
    with pytest.raises(ValueError, match="media has 6 pictures for 4 prompts"):
        grid(media, ["a"] * 4, tmp_path / "no.png")


# --------------------------------------------------------------------------------------------------------------- files
def sampled(folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, model: Fake | None = None) -> list[Path]:
    monkeypatch.setattr(suite, "load_source", lambda source, device, grid: model or Fake())
    how = {"steps": 2, "guidance": 1.0, "size": SIZE, "device": "cpu", "out": folder}
    return sample_path("shapes", asked(texts), seed=len(texts), **how)  # type: ignore[arg-type]


def test_samples_sort_go_on_and_write_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sampled(tmp_path / "s", [*PROMPTS], monkeypatch)
    assert [f.name for f in first] == [f"00{n}.png" for n in range(6)]
    kept = {f.name: f.read_bytes() for f in first}
    (tmp_path / "s" / "notes.png").write_text("mine")
    second = sampled(tmp_path / "s", [*PROMPTS[:2]], monkeypatch)
    assert [f.name for f in second] == ["006.png", "007.png"]
    assert all((tmp_path / "s" / name).read_bytes() == data for name, data in kept.items())
    assert (tmp_path / "s" / "notes.png").read_text() == "mine"
    many = numbered(tmp_path / "new", 1065)
    assert [f.name for f in many[:1] + many[-1:]] == ["0000.png", "1064.png"] and many == sorted(many)
    assert [f.name for f in numbered(tmp_path / "s", 992)][-1] == "999.png"
    with pytest.raises(ValueError, match=r"holds 000\.png; 993 more need 4 digits, .*; nearest valid: '.*s-2'"):
        sampled(tmp_path / "s", ["fog"] * 993, monkeypatch)


def test_a_sample_that_is_not_finite_is_named_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Fake):
        def decode(self, x: torch.Tensor, size: Size) -> Media:
            images = x[:, :1].expand(-1, 3, -1, -1).clone()
            images[1] = math.nan
            return to_pictures([images])

    with pytest.raises(
        NotFiniteError, match=r"1 of 3 pictures are none: the decoder's .*\('the sun'\).* other 2 are in"
    ):
        sampled(tmp_path, [*PROMPTS[:3]], monkeypatch, Breaks())
    assert sorted(f.name for f in tmp_path.glob("*.png")) == ["000.png", "002.png"]


def test_fixed_prompts_take_kinds_in_turn_and_go_round() -> None:
    prompts = [Prompt(f"{kind}{n}", {"kind": kind}) for kind, count in (("a", 3), ("b", 1)) for n in range(count)]
    assert [p.text for p in fixed_prompts(prompts, 6)] == ["a0", "b0", "a1", "b0", "a2", "b0"]
    plain = [Prompt(str(n)) for n in range(3)]
    assert [p.text for p in fixed_prompts(plain, 5)] == ["0", "1", "2", "0", "1"]
    assert fixed_prompts(prompts, 4) == fixed_prompts(prompts, 6)[:4]


def test_before_after_pairs_pictures(tmp_path: Path) -> None:
    before, after = torch.zeros(7, 4, 4, 3, dtype=torch.uint8), torch.full((7, 4, 4, 3), 255, dtype=torch.uint8)
    before[0, ..., 0] = 200
    pictures.before_after(before, after, [f"prompt {n}" for n in range(7)], tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as page:
        cells = page.convert("RGB")
    x, y = pictures.GAP + pictures.CELL // 2, 2 * pictures.CAPTION + pictures.CELL // 2
    assert cells.getpixel((x, y)) == (200, 0, 0)
    assert cells.getpixel((x + pictures.CELL + 4, y)) == (255, 255, 255)
    second = (x + 2 * pictures.CELL + 2 * pictures.GAP, y)
    assert cells.getpixel(second) == (0, 0, 0)
    assert cells.size[1] > 3 * pictures.CELL  # seven pairs in rows of three


@pytest.mark.parametrize("means", [[0.2, 0.5, 0.4], [-20.0, -12.0, -15.0], [0.1, math.nan, 0.2], [math.nan] * 3])
def test_curve_draws_any_metric(means: list[float], tmp_path: Path) -> None:
    evaluations = [
        {"forward_equivalents": 100 * n, "mean": {"m": m}, "by_kind": {"m": {"": m} if n else {"": m, "one": m}}}
        for n, m in enumerate(means)
    ]
    evaluations = [{**e, "by_kind": {"m": {"one": e["mean"]["m"]}}} for e in evaluations]  # type: ignore[index]
    pictures.curve(evaluations, "m", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    # the thick black line; the axes' own black is thin and short of this many pixels
    assert page.size[0] > 500 and (pixels.sum(2) < 60).sum() > 300
