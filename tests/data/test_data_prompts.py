import json
from pathlib import Path

import pytest

from tempflow.data import prompts as module
from tempflow.data.prompts import Prompt, check_source, load_prompts
from tempflow.shapes.prompts import SPLITS, specs


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_splits_in_their_own_order_with_kinds(split):
    prompts = load_prompts(f"shapes:{split}")
    assert [(p.text, p.metadata) for p in prompts] == [(s.prompt, {"kind": s.kind}) for s in specs(split)]


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\ufeffa red circle\n\n   \n  zwei Häuser \r\nlast", encoding="utf-8")
    assert load_prompts("a.txt", tmp_path) == (Prompt("a red circle"), Prompt("zwei Häuser"), Prompt("last"))
    assert load_prompts(str(tmp_path / "a.txt")) == load_prompts("a.txt", tmp_path)


def test_json_lines_keep_other_keys_as_metadata(tmp_path: Path):
    records = [{"prompt": " a cat ", "kind": "animal", "n": 2}, {"prompt": "a\ndog"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in records))
    assert load_prompts("a.jsonl", tmp_path) == (Prompt("a cat", {"kind": "animal", "n": 2}), Prompt("a\ndog"))


BROKEN = [
    ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ', r"a\.jsonl:2: not JSON .*a line looks like"),
    ("a.jsonl", b'\n\n["x"]', r"a\.jsonl:3: a JSON list, not an object"),
    ("a.jsonl", b'{"promt": "x"}', r"a\.jsonl:1: no \"prompt\"; did you mean 'promt'\?"),
    ("a.jsonl", b'{"prompt": 3}', r"a\.jsonl:1: \"prompt\" is 3; it must be a text"),
    ("a.jsonl", b'{"prompt": "  "}', r"a\.jsonl:1: \"prompt\" is '  '; it must be a text that is not blank"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
    ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt:2: not UTF-8 .* at byte 0"),
    ("a.txt", b"", r"a\.txt holds no prompt; a file needs at least one line"),
    ("a.txt", b"\n  \n", r"a\.txt holds no prompt"),
]


@pytest.mark.parametrize("name,content,message", BROKEN)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(name, tmp_path)


def test_a_missing_file_names_the_nearest_existing_one(tmp_path: Path):
    (tmp_path / "train_v2.txt").write_text("x")
    (tmp_path / "zebra.txt").write_text("x")
    (tmp_path / "train_v1.csv").write_text("x")
    with pytest.raises(ValueError, match=r"train_v1\.txt is no file; nearest valid: .*train_v2\.txt"):
        load_prompts("train_v1.txt", tmp_path)
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist either"):
        load_prompts("nowhere/a.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.txt or \.jsonl file"):
        load_prompts("empty/a.txt", tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt is no file"):
        load_prompts("folder.txt", tmp_path)


def test_the_size_limit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    (tmp_path / "a.txt").write_text("0123456789")
    assert len(load_prompts("a.txt", tmp_path)) == 1
    (tmp_path / "a.txt").write_text("0123456789a")
    with pytest.raises(ValueError, match=r"a\.txt has 11 bytes; the largest valid size is 10"):
        load_prompts("a.txt", tmp_path)


@pytest.mark.parametrize(
    "source,message",
    [
        ("shapes:trian", "'shapes:trian' names no split of the shapes world; nearest valid: 'shapes:train'"),
        ("shapes:", "nearest valid: 'shapes:"),
        ("prompts.csv", "neither 'shapes:SPLIT' nor a .txt or .jsonl file; nearest valid: 'prompts.txt'"),
        ("prompts", "nearest valid: 'prompts.txt'"),
        ("", "nearest valid: 'prompts.txt'"),
    ],
)
def test_sources_of_no_known_kind(source, message):
    with pytest.raises(ValueError) as caught:
        check_source(source)
    assert message in str(caught.value)
