"""Nobody's files are written over: every verb against every kind of folder and file that is not its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tempflow import folder
from tempflow.cli import main
from tempflow.config import to_yaml
from tempflow.folder import MARKER, check, check_file, check_idle, claim, foreign, held, put, remove, seal, write_json
from tempflow.recipes import RECIPES


def text(file: Path, said: str = "mine") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(said)
    return file


def pipeline(place: Path) -> Path:
    text(place / "transformer" / "model.safetensors")
    return text(place / "model_index.json", '{"_class_name": "StableDiffusion3Pipeline"}').parent


def run_folder(place: Path) -> Path:
    claim(place, "run")
    text(place / "checkpoints" / "000002" / "manifest.json", "{}")
    text(place / "model" / "model.safetensors")
    return place


def link(at: Path, to: Path) -> Path:
    at.symlink_to(to)
    return at


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "somebody's files": lambda root: text(root / "x" / "notes.txt").parent,
    "somebody's model/": lambda root: text(root / "x" / "model" / "weights.bin").parents[1],
    "somebody's hidden file": lambda root: text(root / "x" / ".hidden").parent,
    "an empty folder in it": lambda root: text(root / "x" / "empty" / "y").parents[1],
    "a pipeline": lambda root: pipeline(root / "x"),
    "above a pipeline": lambda root: pipeline(root / "x" / "base").parent,
    "inside a pipeline": lambda root: pipeline(root / "x") / "new",
    "deep inside a pipeline": lambda root: pipeline(root / "x") / "transformer" / "new" / "er",
    "inside a pipeline, by a link": lambda root: link(root / "y", pipeline(root / "x")) / "new",
    "inside a pipeline, by dots": lambda root: pipeline(root / "x").parent / "z" / ".." / "x" / "new",
    "inside a run's model/": lambda root: run_folder(root / "x") / "model" / "new",
    "among a run's checkpoints": lambda root: run_folder(root / "x") / "checkpoints" / "000001",
    "inside a sealed folder": lambda root: seal(text(root / "x" / "a").parent, "model") or root / "x" / "new",
    "another verb's folder": lambda root: text(claim(root / "x", "other") / "notes.txt").parent,
    "a mark that is none": lambda root: text(text(root / "x" / MARKER, "[").parent / "notes.txt").parent,
    "a file": lambda root: text(root / "x"),
    "under a file": lambda root: text(root / "x") / "new",
    "a link to somebody's folder": lambda root: link(root / "y", text(root / "x" / "notes.txt").parent),
    "a link to a file": lambda root: link(root / "y", text(root / "x")),
    "a link to nothing": lambda root: link(root / "y", root / "x"),
}
FILES: dict[str, Callable[[Path], Path]] = {
    "somebody's file": lambda root: text(root / "x.html"),
    "somebody's page": lambda root: text(root / "x.html", "<!doctype html>\n<title>mine</title>"),
    "somebody's file, by a link": lambda root: link(root / "y.html", text(root / "x.html")),
    "a link to nothing": lambda root: link(root / "y.html", root / "x.html"),
    "a folder": lambda root: text(root / "x.html" / "notes.txt").parent,
    "inside a pipeline": lambda root: pipeline(root / "x") / "new.html",
    "inside a run's model/": lambda root: run_folder(root / "x") / "model" / "new.html",
    "under a file": lambda root: text(root / "x") / "new.html",
}
FOLDER_VERBS = {
    "train": ["train", "shapes_flow", "--output"],
    "sample": ["sample", "--prompt", "a red circle", "--output"],
    "eval": ["eval", "--count", "1", "--pictures"],
    "export": ["export", "RUN", "--output"],
}
FILE_VERBS = {
    "report": ["report", "RUN", "--output"],
    "eval": ["eval", "--count", "1", "--output"],
    "doctor": ["doctor", "--json"],
}


def tree(root: Path) -> dict[str, object]:
    """All that is there: links by their target, files by their bytes."""
    found = sorted(root.rglob("*"))
    return {str(p): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else "folder" for p in found}


def works(*args: object, **kwargs: object) -> None:
    raise AssertionError("work has begun")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run's folder to report and export, while no model can be loaded."""
    for place in ("train.build.load", "train.trainer.identity", "evaluate.source.load", "export.write.load"):
        monkeypatch.setattr(f"tempflow.{place}", works)
    for place in ("doctor._checks", "judge.chosen"):
        monkeypatch.setattr(f"tempflow.cli.{place}", works)
    monkeypatch.setattr("tempflow.report.page.render", works)
    run = tmp_path / "run"
    text(run / "config.yaml", a_config())
    return run


@cache
def a_config() -> str:
    return to_yaml(RECIPES["shapes_flow"]()).replace("dtype: auto", "dtype: float32")


def refused(words: list[str], run: Path, output: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(root)
    status = main([*(str(run) if word == "RUN" else word for word in words), str(output)])
    said = capsys.readouterr().err
    assert status == 2 and len(said.splitlines()) == 1 and repr(str(output)) in said, said
    assert "nearest valid: " in said or "choose another folder" in said
    assert tree(root) == before


@pytest.mark.parametrize("verb", FOLDER_VERBS)
@pytest.mark.parametrize("kind", FOLDERS)
def test_no_verb_writes_into_a_folder_that_is_not_its_own(
    kind: str, verb: str, idle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    refused(FOLDER_VERBS[verb], idle, FOLDERS[kind](tmp_path / "there"), tmp_path, capsys)


@pytest.mark.parametrize("verb", FILE_VERBS)
@pytest.mark.parametrize("kind", FILES)
def test_no_verb_writes_over_a_file_that_is_not_its_own(
    kind: str, verb: str, idle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    refused(FILE_VERBS[verb], idle, FILES[kind](tmp_path / "there"), tmp_path, capsys)


def test_the_page_of_a_run_is_not_laid_over_somebody_elses(
    idle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = text(idle / "report.html", "<!doctype html>")
    assert main(["report", str(idle)]) == 2
    assert "was not written by tempflow" in capsys.readouterr().err and page.read_text() == "<!doctype html>"


# --------------------------------------------------------------------------------------------------- what may be taken
def test_a_folder_is_taken_that_is_new_empty_or_ones_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("new", "deep/er", "empty", "link", "new"):
        text(claim(tmp_path / name, "run") / "notes.txt")
        assert folder.kind_of(tmp_path / name) == "run"
    check(tmp_path / "new", "run")
    with pytest.raises(ValueError, match=r"to: '.*new' is not empty; nearest valid: '.*new-2' \(it holds notes.txt\)"):
        check(tmp_path / "new", None, "to")
    claim(claim(tmp_path / "abandoned", "pictures"), "run")  # nothing is in it but the mark


def test_the_nearest_valid_path_is_free(tmp_path: Path) -> None:
    for name in ("x", "x-2"):
        text(tmp_path / name / "a")
    with pytest.raises(ValueError, match=r"nearest valid: '\S+x-3'"):
        check(tmp_path / "x", "run")
    inside = pipeline(tmp_path / "base") / "transformer" / "out"
    with pytest.raises(ValueError, match=r"lies in '\S+base', .* nearest valid: '\S+/base-out'"):
        check(inside, "run")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ValueError, match=r"output: '\S+x' cannot be written \(\[Errno 13\].*choose another folder"):
        claim(tmp_path / "x", "run")


def test_only_folders_of_ones_own_are_removed(tmp_path: Path) -> None:
    text(claim(tmp_path / "mine", "run") / "a")
    remove(tmp_path / "mine", "run")
    remove(tmp_path / "mine", "run")
    assert not (tmp_path / "mine").exists()
    text(tmp_path / "x" / "notes.txt")
    with pytest.raises(ValueError, match="is not empty"):
        remove(tmp_path / "x", "run")
    (tmp_path / "link").symlink_to(claim(tmp_path / "target", "run"))
    with pytest.raises(ValueError, match="is a link"):
        remove(tmp_path / "link", "run")
    assert (tmp_path / "target").is_dir() and (tmp_path / "x" / "notes.txt").is_file()


def sealed(place: Path, said: str) -> Path:
    text(place / "part" / "weights", said)
    seal(place, "model")
    return place


def later(file: Path) -> Path:
    """A clock may be too coarse to tell a file's times apart."""
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
    return file


def test_a_sealed_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for said in ("one", "two"):
        put(sealed(tmp_path / ".fresh", said), tmp_path / "model")
        assert (tmp_path / "model" / "part" / "weights").read_text() == said
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("model/notes.txt", lambda model: text(model / "notes.txt")),
        ("model/part/weights", lambda model: text(model / "part" / "weights", "changed by hand")),
        ("model/part/weights", lambda model: later(text(model / "part" / "weights", "two"))),
        ("model/part/link", lambda model: link(model / "part" / "link", model.parent)),
        ("model/part/weights", lambda model: (model / MARKER).unlink()),
        ("model", lambda model: link(model, model.rename(model.with_name("moved")))),
    ],
)
def test_what_was_put_into_a_sealed_folder_keeps_it(name: str, act: Callable[[Path], object], tmp_path: Path) -> None:
    model = sealed(tmp_path / "model", "one")
    assert foreign(model) is None
    act(model)
    sealed(tmp_path / ".fresh", "two")
    before = tree(tmp_path)
    assert foreign(model) == name
    with pytest.raises(ValueError, match=rf"{name} was not written by tempflow and is not replaced; move it away"):
        put(tmp_path / ".fresh", model)
    assert tree(tmp_path) == before


def test_bytes_are_read_again_only_where_a_time_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sealed(tmp_path / "model", "one")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_sha256", works)
        assert foreign(model) is None
    assert foreign(Path(shutil.copytree(model, tmp_path / "copy"))) is None  # keeps times
    later(model / "part" / "weights")
    assert foreign(model) is None


def test_a_seal_that_says_sizes_alone_holds(tmp_path: Path) -> None:
    """As runs of older versions have it."""
    model = sealed(tmp_path / "model", "one")
    text(model / MARKER, json.dumps({"tempflow": "model", "files": {"part/weights": 3}}))
    assert foreign(later(model / "part" / "weights").parents[1]) is None
    text(model / "part" / "weights", "four")
    assert foreign(model) == "model/part/weights"


def test_a_file_of_ours_is_written_anew(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json(tmp_path / "new" / "x.json", {"value": value})
        assert json.loads((tmp_path / "new" / "x.json").read_text())["value"] == value
    text(tmp_path / "empty.json", "")
    for path in (tmp_path / "empty.json", Path("/dev/null")):
        check_file(path)


# ------------------------------------------------------------------------------------------------- several processes
HOLD = "import sys; from tempflow.folder import held\nwith held(sys.argv[1]): print('in', flush=True); sys.stdin.read()"


@contextmanager
def at_work(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is at work in the folder."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdin=pipe, stdout=pipe, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = claim(tmp_path / "out", "samples")
    check_idle(place)  # nobody has ever been there
    told = rf"^output: another process is at work in '{place}'; wait .*, such as '{place}-2'$"
    with at_work(place) as process:
        with pytest.raises(ValueError, match=told), held(place):
            pytest.fail("two at once")
        with pytest.raises(ValueError, match=r"^pictures: another process"), monkeypatch.context() as patch:
            patch.setattr(folder, "ASKING", 0.01)
            check_idle(place, "pictures")
        process.kill()
        process.wait()
        with held(place) as taken:  # the lock's file is still there
            assert taken == place and (place / ".lock").is_file()
            with pytest.raises(ValueError, match=told), held(place):  # in one process too
                pytest.fail("two at once")
    check_idle(place)
    check(place, "samples")


def test_every_verb_that_writes_into_a_folder_leaves_one_alone_in_which_another_process_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "ASKING", 0.01)
    (tmp_path / "p.txt").write_text("a red circle\n")
    prompts, few = str(tmp_path / "p.txt"), ["--steps", "1", "--count", "1"]
    verbs = {
        "suite": ["suite", "diversity", "--prompts", prompts, *few, "--samples", "2", "--output"],
        "samples": ["sample", "shapes", "--prompt", "a red circle", "--steps", "1", "--output"],
        "eval": ["eval", *few, "--pictures"],
    }
    for name, words in verbs.items():
        place = claim(tmp_path / name, "suite" if name == "suite" else "pictures")
        with held(place):
            before = sorted(place.iterdir())
            assert main([*words, str(place)]) == 2
            assert sorted(place.iterdir()) == before
        (line,) = [t for t in capsys.readouterr().err.splitlines() if "at work" in t]
        assert line.endswith(
            f"another process is at work in '{place}'; wait until it has ended, or choose another "
            f"folder, such as '{place}-2'"
        )


def test_a_file_is_written_whole_and_through_a_link(tmp_path: Path) -> None:
    file = write_json(tmp_path / "f.json", {"a": 1})
    (tmp_path / "link.json").symlink_to(file)
    inode = file.stat().st_ino
    with file.open() as before:
        write_json(tmp_path / "link.json", {"a": 2})
        assert json.load(before)["a"] == 1  # whoever reads has the old one, whole
    assert json.loads(file.read_text())["a"] == 2 and (tmp_path / "link.json").is_symlink()
    assert file.stat().st_ino != inode and sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "link.json"]
