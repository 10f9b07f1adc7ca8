"""Suites' files, made by hand in the published forms, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempflow.evaluate.suites.readers import (
    read_dpg_bench,
    read_drawbench,
    read_partiprompts,
    read_unigenbench,
)
from tempflow.evaluate.suites.table import SUITES, read, scorer_of, suite_of


def written(file: Path, text: str) -> str:
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_drawbench(tmp_path: Path) -> None:
    file = written(
        tmp_path / "d.csv", 'Prompts,Category\nA red colored car.,Colors\n"Three ""cats"", one dog.",Counting\n'
    )
    assert [(p.text, p.metadata) for p in read_drawbench(file)] == [
        ("A red colored car.", {"Category": "Colors"}),
        ('Three "cats", one dog.', {"Category": "Counting"}),
    ]
    wrong = written(tmp_path / "w.csv", "Prompt,Category\nA car.,Colors\n")
    with pytest.raises(ValueError, match=r"w.csv: no column 'Prompts'; nearest valid: 'Prompt' of 'Prompt', 'Cat"):
        read_drawbench(wrong)
    with pytest.raises(ValueError, match=r"e.csv:2: Category is empty"):
        read_drawbench(written(tmp_path / "e.csv", "Prompts,Category\nA car., \n"))
    with pytest.raises(ValueError, match=r"n.csv: no rows; .* Prompts, Category"):
        read_drawbench(written(tmp_path / "n.csv", "Prompts,Category\n"))
    with pytest.raises(ValueError, match=r"is no .csv file; nearest valid: '.*d.csv'"):
        read_drawbench(str(tmp_path / "d.tsv"))


def test_partiprompts_quotes_are_characters(tmp_path: Path) -> None:
    head = "Prompt\tCategory\tChallenge\tNote\n"
    file = written(tmp_path / "p.tsv", head + 'bond\tAbstract\tBasic\tx\r\n"hello" on a "sign"\tArtifacts\tWriting\t\n')
    found = read_partiprompts(file)
    assert [p.text for p in found] == ["bond", '"hello" on a "sign"']
    assert found[1].metadata == {"Category": "Artifacts", "Challenge": "Writing"}
    with pytest.raises(ValueError, match=r"q.tsv:2: 2 cells for 4 columns"):
        read_partiprompts(written(tmp_path / "q.tsv", head + "bond\tAbstract\n"))
    (tmp_path / "l.tsv").write_bytes(head.encode() + "café\tAbstract\tBasic\t\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"l.tsv: not UTF-8"):
        read_partiprompts(str(tmp_path / "l.tsv"))
    with pytest.raises(ValueError, match=r"P.tsv is no file; nearest valid: .*[a-z].tsv"):
        read_partiprompts(str(tmp_path / "P.tsv"))
    with pytest.raises(ValueError, match="no column 'Challenge'"):
        read_partiprompts(written(tmp_path / "r.tsv", "Prompt\tCategory\nbond\tAbstract\n"))


DPG = "item_id,text,proposition_id,dependency,category_broad,category_detailed,question_natural_language\n"


def dpg(tmp_path: Path, rows: str, head: str = DPG) -> tuple[str, str]:
    (tmp_path / "prompts").mkdir(exist_ok=True)
    for item in ("1", "b2"):
        written(tmp_path / "prompts" / f"{item}.txt", f"text of {item}")
    return str(tmp_path / "prompts"), written(tmp_path / "q.csv", head + rows)


GOOD = "1,t,1,0,entity,whole,Is there a cat?\n1,t,2,1,attribute,color,Is the cat red?\nb2,t,1,0,entity,whole,A dog?\n"


def test_dpg_bench(tmp_path: Path) -> None:
    first, second = read_dpg_bench(*dpg(tmp_path, GOOD))
    assert (first.text, second.text) == ("text of 1", "text of b2") and first.metadata["item"] == "1"
    red = {"id": 2, "parents": [1], "question": "Is the cat red?", "category": "attribute", "detail": "color"}
    assert first.metadata["questions"][1] == red and first.metadata["questions"][0]["parents"] == []  # type: ignore[index]
    plain = "item_id,proposition_id,dependency,question,category\n"
    rows = '1,1,0,A cat?,entity\n1,2,"1, 3",Red?,attribute\n1,3,0,A mat?,entity\nb2,1,0,A dog?,entity\n'
    first, _ = read_dpg_bench(*dpg(tmp_path, rows, plain))
    assert [q["parents"] for q in first.metadata["questions"]] == [[], [1, 3], []]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (GOOD.replace("b2,t", "b3,t"), r"no question of item 'b2', .* nearest valid: 'b3'"),
        (GOOD + "9,t,1,0,entity,whole,?\n", r"1 items without a text in .*, such as '9'"),
        (GOOD.replace(",2,1,", ",2,7,"), r"item '1' has no proposition 7; nearest valid: "),
        (GOOD.replace(",1,0,entity,whole,Is", ",1,2,entity,whole,Is"), r"in item '1' proposition 1 depends on itself"),
        (GOOD.replace(",2,1,", ",1,0,"), r"q.csv:3: proposition_id: 1 is there twice for item '1'"),
        (GOOD.replace(",2,1,", ",x,1,"), r"q.csv:3: proposition_id: 'x' is no whole number"),
        (GOOD.replace(",2,1,", ",2,,"), r"q.csv:3: dependency: '' is no whole number"),
    ],
)
def test_wrong_dpg_questions_are_named(tmp_path: Path, rows: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_dpg_bench(*dpg(tmp_path, rows))


def test_dpg_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'question_natural_language'; nearest valid: "):
        read_dpg_bench(*dpg(tmp_path, "1,1,0,entity\n", "item_id,proposition_id,dependency,category\n"))


def unigen(points: object) -> str:
    return '"' + json.dumps(points).replace('"', '""') + '"'


POINTS = {"Testpoints": ["Attribute - Color", "Style "], "Testpoint Description": ["the bench is red", "as a sketch"]}


def test_unigenbench_in_both_forms(tmp_path: Path) -> None:
    file = written(tmp_path / "u.csv", f"index,prompt_en,sub_dims_en\n7,a red bench,{unigen(POINTS)}\n")
    (prompt,) = read_unigenbench(file)
    expected = [
        {"dimension": "Attribute - Color", "description": "the bench is red"},
        {"dimension": "Style", "description": "as a sketch"},
    ]
    assert prompt.text == "a red bench" and prompt.metadata == {"index": 7, "points": expected}
    file = written(tmp_path / "v.csv", f"prompt,sub_dims\na red bench,{unigen(POINTS)}\n")
    assert read_unigenbench(file)[0].metadata == {"index": 0, "points": expected}


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ("nothing", r"u.csv:2: sub_dims_en: 'Testpoints' is None, no list of texts"),
        ([], r"'Testpoints' is None"),
        ({**POINTS, "Testpoints": []}, r"'Testpoints' is \[\]"),
        ({**POINTS, "Testpoint Description": ["one"]}, r"1 descriptions of 2 test points"),
        ({**POINTS, "Testpoints": ["a", 1]}, r"'Testpoints' is \['a', 1\]"),
        ({"Testpoints": ["a"]}, r"'Testpoint Description' is None"),
    ],
)
def test_wrong_checkpoints_are_named(tmp_path: Path, points: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_unigenbench(written(tmp_path / "u.csv", f"index,prompt_en,sub_dims_en\n0,a bench,{unigen(points)}\n"))


def test_unigenbench_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'sub_dims_en'; nearest valid: 'sub_dims_zh'"):
        read_unigenbench(written(tmp_path / "u.csv", "index,prompt_en,sub_dims_zh\n0,a bench,{}\n"))
    with pytest.raises(ValueError, match=r"u.csv:2: sub_dims_en is no JSON"):
        read_unigenbench(written(tmp_path / "u.csv", "index,prompt_en,sub_dims_en\n0,a bench,{\n"))
    line = f"x,a bench,{unigen(POINTS)}\n"
    with pytest.raises(ValueError, match=r"u.csv:2: index: 'x' is no whole number"):
        read_unigenbench(written(tmp_path / "u.csv", "index,prompt_en,sub_dims_en\n" + line))
    twice = f"1,a bench,{unigen(POINTS)}\n" * 2
    file = written(tmp_path / "t.csv", "index,prompt_en,sub_dims_en\n" + twice)
    with pytest.raises(ValueError, match="prompts 1 and 2 both have the index 1"):
        read(SUITES["unigenbench"], file)


def test_a_suite_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="name: 'geneval3' is no suite; nearest valid: 'geneval"):
        suite_of("geneval3")
    with pytest.raises(ValueError, match="prompts: none given; nearest valid: its CSV: Prompts, Category"):
        read(SUITES["drawbench"], "")
    with pytest.raises(ValueError, match="questions: none given; nearest valid: its folder of texts"):
        read(SUITES["dpg_bench"], "prompts")
    with pytest.raises(ValueError, match=r"questions: 'q.csv' is not read by this suite"):
        read(SUITES["drawbench"], "d.csv", "q.csv")


def test_scorers_take_their_options_and_no_others() -> None:
    with pytest.raises(ValueError, match=r"options\.url: missing"):
        scorer_of(SUITES["unigenbench"], "", {"model": "m"})
    with pytest.raises(ValueError, match=r"options\.attemps: unknown field; did you mean 'attempts'"):
        scorer_of(SUITES["unigenbench"], "", {"url": "http://x/v1", "model": "m", "attemps": 2})
    with pytest.raises(ValueError, match="scorer: 'shapes', and this suite has a judge of its own"):
        scorer_of(SUITES["dpg_bench"], "shapes", {})
    with pytest.raises(ValueError, match="'pickscor' is unknown; did you mean 'pickscore'"):
        scorer_of(SUITES["drawbench"], "pickscor", {})
    for wrong in ({"orders": "counter"}, {"pairs": 3}):
        with pytest.raises(ValueError, match=r"options\.(orders|pairs): every pair is asked in both orders"):
            scorer_of(SUITES["gsb"], "", {"url": "http://x/v1", "model": "m", **wrong})
