"""Suites' tables on values written by hand."""

from __future__ import annotations

import math

import pytest

from tempflow.evaluate import geneval, unigenbench
from tempflow.evaluate.suites.figures import (
    Judged,
    Table,
    Value,
    by_labels,
    of_dpg_bench,
    of_geneval,
    of_gsb,
    of_unigenbench,
    text_of,
    to_json,
    with_parents,
)
from tempflow.request import Prompt
from tempflow.rewards.geneval_rules import TAGS


def judged(text: str, metadata: dict[str, object], *values: Value) -> Judged:
    return Judged(Prompt(text, metadata), values)


def means(table: Table) -> dict[str, float]:
    return {row.label: row.mean for row in table.rows}


def test_scores_by_category() -> None:
    told = by_labels("DrawBench", "x", {"category": "Category"})(
        [
            judged("a", {"Category": "Colors"}, 1.0, 0.0),
            judged("b", {"Category": "Colors"}, 0.5, None),
            judged("c", {"Category": "Text"}, None, None),
        ]
    )
    (whole,) = told[0].rows
    assert (whole.mean, whole.prompts, whole.count, whole.failed) == (pytest.approx(0.5), 2, 3, 3)
    assert 0.5 - 1e-9 <= whole.low <= 0.5 <= whole.high <= 0.5 + 1e-9  # both prompts have the mean ½
    colors, text = told[1].rows
    assert (colors.label, colors.mean, colors.failed) == ("Colors", pytest.approx(0.5), 1)
    assert text.label == "Text" and math.isnan(text.mean) and (text.prompts, text.count, text.failed) == (0, 0, 2)
    assert to_json(told[1])["rows"][1]["mean"] is None
    assert "Text      –" in text_of(told) and "Colors    0.5000" in text_of(told)


def test_geneval_is_the_mean_over_tags() -> None:
    rows = [judged(f"{tag} {n}", {"tag": tag}, float(n == 0), 1.0) for tag in TAGS for n in range(2)]
    rows.append(judged("more", {"tag": "counting"}, 0.0, None))
    whole, by_tag = of_geneval(rows)
    expected = geneval.tally((r.prompt.kind, v) for r in rows for v in r.values)  # type: ignore[misc]
    assert whole.rows[0].mean == pytest.approx(expected.overall) == pytest.approx((5 * 0.75 + 3 / 5) / 6)
    assert means(by_tag) == pytest.approx(expected.by_tag) and [r.label for r in by_tag.rows] == list(TAGS)
    assert whole.rows[0].low < whole.rows[0].mean < whole.rows[0].high and whole.rows[0].failed == 1
    few, _ = of_geneval(rows[:2])
    assert math.isnan(few.rows[0].mean) and math.isnan(few.rows[0].low) and "no score of two_object" in few.about


def test_unigenbench_is_pooled_and_equals_the_tally() -> None:
    def points(*names: str) -> dict[str, object]:
        return {"points": [{"dimension": name, "description": "x"} for name in names]}

    rows = [
        judged("a", points("Attribute - Color", "Attribute - Shape", "Style"), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)),
        judged("b", points("Attribute - Color", "Attribute - Color"), (0.0, 0.0), None),
    ]
    whole, themes, subs = of_unigenbench(rows)
    verdicts = [
        ([p["dimension"] for p in r.prompt.metadata["points"]], list(map(int, v))) for r in rows for v in r.values if v
    ]  # type: ignore[attr-defined, arg-type, union-attr]
    expected = unigenbench.tally(verdicts)
    assert means(subs) == pytest.approx(expected.dimensions) and means(themes) == pytest.approx(expected.primary)
    assert means(themes)["Attribute"] == pytest.approx(3 / 6) and whole.rows[0].mean == pytest.approx(expected.overall)
    assert {row.label: row.failed for row in subs.rows} == {"Attribute - Color": 2, "Attribute - Shape": 0, "Style": 0}
    nothing, *_ = of_unigenbench([judged("a", points("Style"), None)])
    assert math.isnan(nothing.rows[0].mean) and nothing.rows[0].failed == 1


def question(number: int, *parents: int, category: str = "entity") -> dict[str, object]:
    return {"id": number, "parents": list(parents), "question": "?", "category": category, "detail": ""}


def test_a_child_of_a_no_counts_as_no() -> None:
    chain = [question(1, 3), question(2, 1), question(3)]  # 3 → 1 → 2, a parent behind its child
    assert with_parents(chain, (1.0, 1.0, 1.0)) == (1.0, 1.0, 1.0)
    assert with_parents(chain, (1.0, 1.0, 0.0)) == (0.0, 0.0, 0.0)
    assert with_parents(chain, (0.0, 1.0, 1.0)) == (0.0, 0.0, 1.0)
    both = [question(1), question(2), question(3, 1, 2)]
    assert with_parents(both, (1.0, 0.0, 1.0)) == (1.0, 0.0, 0.0)


def test_dpg_bench_by_hand() -> None:
    questions = {"questions": [question(1), question(2, 1, category="attribute"), question(3)]}
    rows = [
        judged("a", questions, (1.0, 1.0, 0.0), (0.0, 1.0, 1.0)),
        judged("b", {"questions": [question(1)]}, (1.0,), None),
    ]
    whole, category, given = of_dpg_bench(rows)
    assert means(whole) == {"DPG-Bench": pytest.approx((2 / 3 + 1 / 3 + 1) / 3)}
    assert whole.rows[0].failed == 1 and whole.rows[0].count == 3
    assert means(category) == {"entity": pytest.approx(3 / 5), "attribute": pytest.approx(1 / 2)}
    assert means(given) == {"entity": pytest.approx(3 / 5), "attribute": 1.0}


def test_gsb_by_hand() -> None:
    (table,) = of_gsb([judged("a", {}, 1.0), judged("b", {}, 0.75, 0.5), judged("c", {}, 0.0, None)])
    assert means(table) == pytest.approx({"(G − B) ÷ (G + S + B)": (2 - 1) / 4, "good": 0.5, "same": 0.25, "bad": 0.25})
    assert all(row.failed == 1 and row.prompts == 3 for row in table.rows)
    (other,) = of_gsb([judged("a", {}, 0.0), judged("b", {}, 0.25, 0.5), judged("c", {}, 1.0)])
    assert other.rows[0].mean == -table.rows[0].mean  # the other way round
