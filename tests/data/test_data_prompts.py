import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tempflow.data import files as module
from tempflow.data.prompts import (
    as_prompts,
    check_source,
    load_prompts,
    shared_out,
    source_path,
    unused_negatives,
)
from tempflow.evaluate.suite import fixed_prompts
from tempflow.request import Prompt, Source
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
    ("a.jsonl", b'{"promt": "x"}', r"a\.jsonl:1: no \"prompt\", but 'promt'; nearest valid: .* '\S*a\.jsonl:promt'"),
    ("a.jsonl", b'{"prompt": 3}', r"a\.jsonl:1: \"prompt\" is 3; it must be a text"),
    ("a.jsonl", b'{"prompt": "  "}', r"a\.jsonl:1: \"prompt\" is '  '; it must be a text that is not blank"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
    ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt:2: not UTF-8 .* at byte 0"),
    ("a.txt", b"", r"a\.txt holds no prompt; a file needs at least one"),
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
    (tmp_path / "train_v1.csv.gz").write_text("x")
    with pytest.raises(ValueError, match=r"train_v1\.txt is no file; nearest valid: .*train_v2\.txt"):
        load_prompts("train_v1.txt", tmp_path)
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist either"):
        load_prompts("nowhere/a.txt", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.txt, \.jsonl, \.json, \.csv, \.tsv or \.parquet file"):
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


def test_kinds_of_the_shapes_world():
    whole, some = load_prompts("shapes:test"), load_prompts("shapes:test:color,single")
    assert some == tuple(p for p in whole if p.kind in ("single", "color")) and {p.kind for p in some} == {
        "single",
        "color",
    }
    assert load_prompts("shapes:test:single,two,count,color,position,attribution") == whole


@pytest.mark.parametrize(
    "source,message",
    [
        ("shapes:trian", "'shapes:trian' names no split of the shapes world; nearest valid: 'shapes:train'"),
        ("shapes:", "nearest valid: 'shapes:"),
        ("shapes:train:singel", "'shapes:train:singel' names no kind 'singel'; nearest valid: 'shapes:train:single'"),
        ("shapes:train:single,", "names no kind ''; nearest valid: 'shapes:train:"),
        ("shapes:train:", "names no kind ''; nearest valid: 'shapes:train:"),
        ("shapes:tran:single", "names no split of the shapes world; nearest valid: 'shapes:train'"),
        (
            "prompts.yaml",
            ".json, .csv, .tsv or .parquet file, nor a folder of .txt files; nearest valid: 'prompts.txt'",
        ),
        ("prompts.cvs", "nearest valid: 'prompts.csv'"),
        ("prompts.jsonlines", "nearest valid: 'prompts.jsonl'"),
        ("", "nearest valid: 'prompts.txt'"),
        ("shape:train", "neither a file nor 'shapes:SPLIT'; nearest valid: 'shapes:train'"),
        ("shapes", "nearest valid: 'shapes:"),
        ("p.txt:prompt", "names a key, which only tables and JSON have; nearest valid: 'p.txt'"),
        ("p.csv:", "nearest valid: 'p.csv'"),
    ],
)
def test_sources_of_no_known_kind(source, message):
    with pytest.raises(ValueError) as caught:
        check_source(source)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------ forms of files
TABLE = 'tag,prompt\ncolors,"a red, round ""thing"""\n\ncounting,two squares\n'
FORMS = {
    "a.txt": ('a red, round "thing"\rtwo squares\r', None),
    "b.txt": ('\r\na red, round "thing"\r\n\ntwo squares', None),
    "a.jsonl": (
        '{"tag": "colors", "prompt": "a red, round \\"thing\\""}\r{"tag": "counting", "prompt": "two squares"}',
        "tag",
    ),
    "b.jsonl": ('"a red, round \\"thing\\""\n{"prompt": "two squares"}', None),
    "a.json": (
        '[{"tag": "colors", "prompt": "a red, round \\"thing\\""},\n{"tag": "counting", "prompt": "two squares"}]',
        "tag",
    ),
    "b.json": ('["a red, round \\"thing\\"", "two squares"]', None),
    "a.csv": (TABLE, "tag"),
    "b.CSV": (TABLE.replace("\n", "\r"), "tag"),
    "a.tsv": (
        TABLE.replace(",prompt", "\tprompt").replace("colors,", "colors\t").replace("counting,", "counting\t"),
        "tag",
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_to_the_same_prompts(tmp_path: Path, name: str, encoding: str) -> None:
    text, tagged = FORMS[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = load_prompts(name, tmp_path)
    assert [p.text for p in found] == ['a red, round "thing"', "two squares"]
    assert [p.kind for p in found] == (["colors", "counting"] if tagged else ["", ""])


def test_a_folder_of_texts_is_a_prompt_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "DPG-Bench"
    folder.mkdir()
    for name, text in (("2.txt", "two\nlines "), ("1.txt", "one"), (".DS_Store", "\0")):
        (folder / name).write_text(text)
    want = (Prompt("one", {"file": "1.txt"}), Prompt("two\nlines", {"file": "2.txt"}))
    assert load_prompts(str(folder)) == load_prompts(f"{folder}/") == want
    (folder / "3.txt").touch()
    with pytest.raises(ValueError, match=r'3\.txt: "prompt" is \'\'; it must be a text that is not blank'):
        load_prompts(str(folder))
    (folder / "3.png").touch()
    with pytest.raises(ValueError, match=r"DPG-Bench holds '3\.png'; nearest valid: a folder of \.txt files alone"):
        load_prompts(str(folder))
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        load_prompts(str(tmp_path / "nowhere"))


def test_another_key_and_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\na red circle\tAbstract\n")
    (tmp_path / "p.txt").write_text("x")
    assert load_prompts("~/parti.tsv:Prompt") == (Prompt("a red circle", {"Category": "Abstract"}),)
    assert load_prompts("~/p.txt") == (Prompt("x"),)
    assert source_path("~/parti.tsv:Prompt") == tmp_path / "parti.tsv"


UNREADABLE = [
    ("a.csv", b"red circle\ntwo", r"a\.csv:2: no \"prompt\", but 'red circle'"),
    ("a.csv", b"prompt,kind\na red, round thing,x", r"a\.csv:2: 3 cells for 2 columns; quote cells"),
    ("a.csv", b"prompt,n,n\na,1,2", r"a\.csv:1: two columns are called 'n'"),
    ("a.csv", b'prompt\n"a red circle\nblue\n', r"a\.csv:2: not CSV .*unexpected end"),
    ("a.csv", b"prompt,n\na,1\n,2", r"a\.csv:3: \"prompt\" is ''; it must be"),
    ("a.csv", b"prompt\n", r"a\.csv holds no prompt"),
    ("a.json", b'{"prompt": "x"}', r"a\.json: a JSON object of 'prompt', not a list"),
    ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}', r"a\.json: not JSON .*is named \.jsonl"),
    ("a.json", b'["x", 3]', r"a\.json: item 2: a JSON int, not an object with a \"prompt\""),
    ("a.txt", b'fine\n{"prompt": "x"}', r"a\.txt:2: a JSON object in a text; nearest valid: '.*a\.jsonl'"),
    ("a.txt", b"one\ntw\0o", r"a\.txt:2: holds a NUL character"),
    (
        "a.txt",
        "one\rcaf\u00e9".encode("latin-1"),
        r"a\.txt:2: not UTF-8 .* at byte 3\); nearest valid: the file saved as",
    ),
    ("a.txt", "no mark".encode("utf-16-le"), r"a\.txt:1: holds a NUL character"),
    ("a.jsonl", b'{"prompt": "x", "prompt": "y"}', r"a\.jsonl:1: not JSON \(the key 'prompt' is there twice\)"),
    ("a.jsonl", b'{"prompt": "x", "n": {"m": 1, "m": 2}}', r"a\.jsonl:1: not JSON \(the key 'm' is there twice\)"),
    ("a.jsonl", b'{"prompt": "x", "Prompt": "y"}', r"a\.jsonl:1: both \"prompt\" and 'Prompt'"),
    ("a.jsonl", b'{"prompt": "\\ud800"}', r"a\.jsonl:1: \"prompt\" holds half a character"),
    ("a.jsonl", b'{"prompt": ["a", "b"]}', r"a\.jsonl:1: \"prompt\" is \['a', 'b'\]; it must be a text"),
    ("a.jsonl", b'{"prompt": "x"}\na red circle', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", b'{"n": 1, "m": 2}', r"a\.jsonl:1: no \"prompt\"; there are 'n' and 'm'"),
    ("a.jsonl", b"{}", r"a\.jsonl:1: no \"prompt\", nor anything else"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE)
def test_what_would_be_misread_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["Prompt", "PROMPT", "caption", "text", "prompt_en", "Prompts", "description"])
def test_a_key_of_another_name_is_shown_with_what_would_do(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "7", key: "a red circle", "n": 2}))
    with pytest.raises(ValueError) as caught:
        load_prompts("a.jsonl", tmp_path)
    where = tmp_path / "a.jsonl"
    assert (
        str(caught.value)
        == f"{where}:1: no \"prompt\", but '{key}'; nearest valid: call that \"prompt\", or give '{where}:{key}'"
    )
    assert load_prompts(f"a.jsonl:{key}", tmp_path)[0] == Prompt("a red circle", {"id": "7", "n": 2})


# ---------------------------------------------------------------------------------------------------------------- keys
CHANGES = [
    "negative_prompt_2", "prompt_2", "image_path", "source_image", "input_images", "init_image", "ref_image",
    "control_image", "cond_image", "edit_image", "mask", "mask_image", "video", "source_video", "first_frame",
    "audio", "latents", "control", "seed", "size", "height", "width", "resolution", "guidance_scale", "cfg",
    "steps", "num_inference_steps", "num_frames", "fps", "lora",
]  # fmt: skip
KEPT = [
    "tag", "kind", "include", "exclude", "image_id", "caption_zh", "category", "keywords", "id", "note_image",
    "dimension", "model",
]  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_keys_that_would_change_what_is_drawn_are_refused_with_their_line(tmp_path: Path, key: str) -> None:
    lines = [{"prompt": "a", key: None}, {"prompt": "b", key: ""}, {"prompt": "c", key: "5", "tag": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf'a\.jsonl:3: "{key}" would change what is drawn'):
        load_prompts("a.jsonl", tmp_path)
    with pytest.raises(ValueError, match=rf'prompts\[1\]: "{key}" would change'):
        as_prompts(["x", Prompt("c", {key: "5"})])
    (tmp_path / "a.csv").write_text(f"prompt,{key}\na,\nb,5\n")
    with pytest.raises(ValueError, match=rf'a\.csv:3: "{key}" would change'):
        load_prompts("a.csv", tmp_path)
    assert load_prompts("a.csv", tmp_path, uses=(key,))[1] == Prompt("b", {key: "5"})


@pytest.mark.parametrize("key", ["negative", "neg_prompt", "Negative-Prompt", "negativePrompt", "uncond_prompt"])
def test_the_negative_text_has_one_name(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "c", key: "blurry"}))
    with pytest.raises(ValueError, match=rf"""a\.jsonl:1: "{key}" is not read; nearest valid: "negative_prompt"$"""):
        load_prompts("a.jsonl", tmp_path)


def test_a_negative_prompt_is_the_prompts_own(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "negative_prompt": " blurry "}, {"prompt": "b", "negative_prompt": None, "tag": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_prompts("a.jsonl", tmp_path)
    assert found == (Prompt("a", {}, "blurry"), Prompt("b", {"tag": "x"}))
    assert as_prompts(found) == found == as_prompts(lines)
    (tmp_path / "a.csv").write_text("prompt,negative_prompt\na,blurry\nb,\n")
    assert [p.negative for p in load_prompts("a.csv", tmp_path)] == ["blurry", ""]
    with pytest.raises(ValueError, match=r'prompts\[0\]: "negative_prompt" is 3; nearest valid: a text'):
        as_prompts([{"prompt": "a", "negative_prompt": 3}])
    assert '1 of 2 prompts have a "negative_prompt", which this guidance' in unused_negatives(found, lambda: 1)
    assert unused_negatives(found, lambda: 2) == "" == unused_negatives(found[1:], lambda: 1 // 0)


def test_pictures_to_start_from_are_refused_or_read_with_their_sums(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"two")
    lines = [{"prompt": "x", "image": "a.png"}, {"prompt": "y", "images": ["b.png", "a.png"]}, {"prompt": "z"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r'a\.jsonl:1: "image": pictures would change .* draws from text alone'):
        load_prompts("a.jsonl", tmp_path)
    one, two, none = load_prompts("a.jsonl", tmp_path, sources=True)
    assert [s.path for s in two.sources] == [tmp_path / "b.png", tmp_path / "a.png"] and none.sources == ()
    assert one.sources == (Source(tmp_path / "a.png", hashlib.sha256(b"one").hexdigest()),) == two.sources[1:]
    assert as_prompts([one], sources=True) == (one,)
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*draws from text alone"):
        as_prompts([Prompt("x", {}, "", one.sources)])
    for name in ("../a.png", str(tmp_path / "a.png"), "c.png", 3):
        (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "x", "image": name}))
        with pytest.raises(
            ValueError, match=r"b\.jsonl:1: .image.: the picture .* is no file in .*; nearest .* relative"
        ):
            load_prompts("b.jsonl", tmp_path, sources=True)


@pytest.mark.parametrize(
    ("key", "name"),
    [("image", "a\0.png"), ("images", ["a.png", "a\0.png"]), ("image", "\ud800.png"), ("image", "a" * 5000 + ".png")],
)
def test_a_name_that_is_none_is_said_with_its_line_and_key(tmp_path: Path, key: str, name: object) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ["x", {"prompt": "y", key: name}])))
    with pytest.raises(ValueError, match=rf'a\.jsonl:2: "{key}": the picture .* cannot be read \(') as caught:
        load_prompts("a.jsonl", tmp_path, sources=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Source:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", "image": "a.png"}))
    monkeypatch.setattr(Source, "of", refuse)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: \"image\": the picture 'a\.png' cannot be read \(Permission denied"
    ):
        load_prompts("a.jsonl", tmp_path, sources=True)


@pytest.mark.parametrize("negative", [5, ["blurry"], "half \ud800", False])
def test_a_negative_that_is_no_text_is_refused(negative: Any) -> None:
    with pytest.raises(ValueError, match=r'^prompts\[1\]: "negative" is .*; nearest valid: a text$'):
        as_prompts(["x", Prompt("y", {}, negative)])


def test_of_two_negatives_none_is_dropped() -> None:
    with pytest.raises(ValueError, match=r"^prompts\[0\]: \"negative\" is 'fog' .* 'blurry'; nearest valid: one of"):
        as_prompts([Prompt("x", {"negative_prompt": "blurry"}, "fog")])
    for given in (Prompt("x", {"negative_prompt": "blurry"}), Prompt("x", {"negative_prompt": "blurry "}, " blurry")):
        assert as_prompts([given]) == (Prompt("x", {}, "blurry"),)
    assert as_prompts([Prompt("x", {"negative_prompt": ""}, " blurry\n")]) == (Prompt("x", {}, "blurry"),)


def test_all_other_keys_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", **dict.fromkeys(KEPT, 1)}))
    assert load_prompts("a.jsonl", tmp_path)[0].metadata == dict.fromkeys(KEPT, 1)


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [({"kind": "a", "tag": "b"}, "a"), ({"tag": "b"}, "b"), ({"kind": None, "tag": " b "}, "b"), ({"tag": ["x"]}, ""),
     ({}, ""), ({"kind": 3}, "3")],
)  # fmt: skip
def test_the_kind_of_task(metadata: dict[str, object], kind: str) -> None:
    assert Prompt("x", metadata).kind == kind


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a red circle", r"prompts: 'a red circle' is no list of prompts; nearest valid: \['a red circle'\]"),
        ([], "prompts: the list is empty"),
        (["a", 3], r"prompts\[1\]: a JSON int"),
        (["a", " "], r"prompts\[1\]: \"prompt\" is ' '"),
        ([{"text": "a"}], r"prompts\[0\]: no \"prompt\", but 'text'"),
        (None, "prompts: None is no list"),
    ],
)
def test_prompts_given_as_objects(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_prompts(given)
    found = as_prompts(["a", {"prompt": "b", "n": 1}, Prompt("c", {"n": 2})])
    assert found == (Prompt("a"), Prompt("b", {"n": 1}), Prompt("c", {"n": 2}))


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (3, ""),
        (2, "2 of 3 prompts are used"),
        (6, "6 are drawn of 3 prompts: each comes 2 times"),
        (7, "7 are drawn of 3 prompts: each comes 2 to 3 times"),
    ],
)
def test_it_says_how_prompts_are_shared_out(count: int, said: str) -> None:
    pool = [Prompt(text) for text in "abc"]
    assert shared_out(fixed_prompts(pool, count), pool) == said


def test_it_says_that_one_kind_is_repeated_while_another_is_not_all_used() -> None:
    pool = [Prompt("a", {"tag": "x"}), *(Prompt(text, {"tag": "y"}) for text in "bcd")]
    assert shared_out(fixed_prompts(pool, 4), pool) == "3 of 4 prompts are used, each comes 1 to 2 times"


# ------------------------------------------------------------------------------------------------------------ parquet
def parquet(path: Path, **columns: list[object]) -> str:
    from pyarrow import parquet as files
    from pyarrow import table

    files.write_table(table(columns), path)
    return str(path)


def test_a_parquet_file_is_read_as_json_lines_are(tmp_path: Path) -> None:
    source = parquet(
        tmp_path / "p.parquet",
        prompt=["a red circle", "two squares"],
        negative_prompt=[None, "blue"],
        kind=["single", "count"],
        numbers=[[1, 2], [3]],
    )
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a red circle", "kind": "single", "numbers": [1, 2]}\n'
        '{"prompt": "two squares", "negative_prompt": "blue", "kind": "count", "numbers": [3]}\n'
    )
    assert load_prompts(source) == load_prompts(str(tmp_path / "p.jsonl"))
    named = parquet(tmp_path / "q.parquet", caption=["a red circle"])
    assert [p.text for p in load_prompts(f"{named}:caption")] == ["a red circle"]


@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"\x89PNG", "path": "1.png"}])
def test_pictures_inside_a_parquet_file_are_refused(tmp_path: Path, value: object) -> None:
    source = parquet(tmp_path / "p.parquet", prompt=["a", "b"], image=[value, value])
    with pytest.raises(ValueError, match=r"p.parquet: row 1: column 'image' holds bytes, and prompts name files"):
        load_prompts(source)


def test_a_parquet_file_that_is_none_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_text("prompt\na red circle\n")
    with pytest.raises(ValueError, match=r"p.parquet: not parquet, or damaged .*nearest valid: the file fetched anew"):
        load_prompts(str(tmp_path / "p.parquet"))
    source = parquet(tmp_path / "large.parquet", prompt=["a" * 1000])
    monkeypatch.setattr("tempflow.data.files.MAX_BYTES", 500)
    with pytest.raises(ValueError, match=r"large.parquet holds .* bytes; the largest valid size is 500"):
        load_prompts(source)


def test_without_pyarrow_it_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "p.parquet", prompt=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"p.parquet needs pyarrow: pip install 'tempflow\[parquet\]'"):
        load_prompts(source)
