"""Fixed prompts, fixed noise, and reports that leave failures out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fake import PROMPTS, SIZE, Fake, brightness
from PIL import Image

from tempflow.core.rollout import Noise
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.evaluate import pictures, suite
from tempflow.evaluate.suite import Report, draw, evaluate, fixed_prompts
from tempflow.rewards import from_function


def picture(prompts: list[str], rows: int = 64, seed: int = 3, steps: int = 5) -> torch.Tensor:
    return draw(Fake(), prompts, steps=steps, guidance=1.0, seed=seed, size=SIZE, rows=rows)


def test_draw_is_an_euler_walk_from_the_seeds_noise() -> None:
    model = Fake()
    x = Noise(3, iteration=-1).initial([(n, 0) for n in range(len(PROMPTS))], (2, 2, 2))
    predict = model.predictor(model.encode(PROMPTS), 1.0)
    sigmas = model.schedule(5, SIZE).sigmas
    with torch.no_grad():
        for i in range(5):
            v = predict(x, sigmas[i].expand(len(x)), torch.arange(len(x)))
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert torch.equal(picture(list(PROMPTS)), model.decode(x, SIZE))


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
    ("one", "two", "one", "three"),
    10,
    1.0,
    7,
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
    rows = REPORT.table().splitlines()
    assert rows[0].split() == ["kind", "soft", "hard"] and rows[-1].split() == ["all", "0.500", "1.000"]
    assert rows[1].split() == ["one", "0.550", "1.000"] and len(rows) == 5


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
        {"forwards": 100 * n, "mean": {"m": m}, "by_kind": {"m": {"": m} if n else {"": m, "one": m}}}
        for n, m in enumerate(means)
    ]
    evaluations = [{**e, "by_kind": {"m": {"one": e["mean"]["m"]}}} for e in evaluations]  # type: ignore[index]
    pictures.curve(evaluations, "m", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    # the thick black line; the axes' own black is thin and short of this many pixels
    assert page.size[0] > 500 and (pixels.sum(2) < 60).sum() > 300
