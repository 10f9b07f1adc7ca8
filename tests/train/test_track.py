"""What trackers were sent is read back by their own readers; what breaks in them breaks nothing else."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tempflow.config.track import TrackConfig
from tempflow.strict import ConfigError, validated
from tempflow.train import track
from tempflow.train.track import LEDGER, open_trackers

RUN_CONFIG = {"name": "toy", "seed": 3, "algorithm": {"name": "tempflow_grpo"}}
PICTURES = [("a <b>red</b> square", np.full((4, 6, 3), (255, 0, 0), np.uint8)), ("fog", np.zeros((4, 6, 3), np.uint8))]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not here: pip install 'tempflow[{package}]'")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither this machine's keys nor its stores."""
    for key in [k for k in os.environ if k.startswith(("WANDB", "TRACKIO"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield


def tell(folder: Path, to: str, steps: range, **options: Any) -> None:
    """A session of a run: figures and an evaluation at every step, pictures at even ones."""
    (tracker,) = open_trackers(TrackConfig(to=(to,), **options), "toy", folder, RUN_CONFIG)  # type: ignore[arg-type]
    for step in steps:
        tracker.log({"reward/shapes": step / 10, "loss": float("nan")}, step)
        tracker.log({"validation/shapes": step / 5}, step)
        if step % 2 == 0:
            tracker.images("samples", PICTURES, step)
    tracker.close()


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    assert open_trackers(TrackConfig(), "toy", tmp_path / "run", RUN_CONFIG) == []
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_told_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ImportError, match=r"track\.to: 'wandb' .*pip install 'tempflow\[wandb\]'"):
        open_trackers(TrackConfig(to=("tensorboard", "wandb")), "toy", tmp_path / "run", RUN_CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"to": ["tensorbord"]}, "nearest valid: 'tensorboard'"),
        ({"to": ["wandb", "wandb"]}, r"nearest valid: \['wandb'\]"),
        ({"images_every": -1}, "nearest valid: 0"),
        ({"wandb_mode": "on-line"}, "nearest valid: 'online'"),
    ],
)
def test_bad_config(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validated(TrackConfig, given)


# ------------------------------------------------------------------------------------------------ TensorBoard
@needs("tensorboard")
def test_tensorboard_reads_what_was_sent_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(tmp_path, "tensorboard", range(1, 5))
    tell(tmp_path, "tensorboard", range(3, 7))  # from a checkpoint at step 2
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/shapes")] == [
        (s, pytest.approx(s / 10)) for s in range(1, 7)
    ]
    assert [e.step for e in events.Scalars("validation/shapes")] == list(range(1, 7))
    assert "loss" not in events.Tags()["scalars"]
    images = events.Images("samples/00")
    assert [e.step for e in images] == [2, 4, 6] and (images[0].width, images[0].height) == (6, 4)
    file = tmp_path / "seen.png"
    file.write_bytes(images[0].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(file)), PICTURES[0][1])
    captions = events.Tensors("samples/captions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "00. a <b>red</b> square" in captions and "01. fog" in captions
    told = events.Tensors("config/text_summary")
    assert len(told) == 1 and "tempflow_grpo" in told[0].tensor_proto.string_val[0].decode()


# ------------------------------------------------------------------------------------------------------ wandb
def wandb_records(file: Path) -> list[Any]:
    """Records of a run file: LevelDB's log format (blocks of 32 KiB; crc 4, length 2, type 1) after seven bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, place, parts, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts = (parts if kind in (3, 4) else b"") + data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(pb.Record.FromString(parts))
    return records


def closed_wandb_records(file: Path, seconds: float = 60.0) -> list[Any]:
    """Records of a finished run: its last, `exit`, is written by another process, after `finish` has returned."""
    end = time.monotonic() + seconds
    while not (records := wandb_records(file)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{file.name} was not written to its end"
        time.sleep(0.05)
    return records


@needs("wandb")
def test_wandb_offline_holds_what_was_sent_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    tell(tmp_path, "wandb", range(1, 5), project="shapes")
    first = set((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    tell(tmp_path, "wandb", range(3, 7), project="shapes")
    files = sorted(first) + sorted(set((tmp_path / "wandb").glob("offline-run-*/*.wandb")) - first)
    assert len(first) == 1 and len({f.name for f in files}) == 1  # two sessions of one run: the file's name is its id
    records = [record for file in files for record in closed_wandb_records(file)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    known = json.loads((tmp_path / LEDGER).read_text())["id"]
    assert {(r.run_id, r.display_name, r.project) for r in runs} == {(known, "toy", "shapes")}
    assert any(u.key == "seed" and u.value_json == "3" for r in runs for u in r.config.update)
    lines: dict[int, dict[str, Any]] = {}
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    for row in rows:
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        lines[items["_step"]] = {**lines.get(items["_step"], {}), **items}
    assert [r.step.num for r in rows] == list(range(1, 7))  # none twice
    assert [lines[s]["reward/shapes"] for s in range(1, 7)] == [s / 10 for s in range(1, 7)]
    assert [lines[s]["validation/shapes"] for s in range(1, 7)] == [s / 5 for s in range(1, 7)]
    assert [s for s in lines if any(k.startswith("samples") for k in lines[s])] == [2, 4, 6]
    pictures = [p for f in files for p in f.parent.rglob("*.png")]
    assert len(pictures) == 6 and all(Image.open(p).size == (6, 4) for p in pictures)
    assert b"<b>red</b>" in b"".join(f.read_bytes() for f in files)


@needs("wandb")
def test_wandb_online_without_a_key_is_told_before_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"track\.wandb_mode: 'online'.*nearest valid: 'offline'"):
        open_trackers(TrackConfig(to=("wandb",), wandb_mode="online"), "toy", tmp_path, RUN_CONFIG)


# ---------------------------------------------------------------------------------------------------- trackio
@needs("trackio")
def test_trackio_keeps_what_was_sent_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    tell(tmp_path, "trackio", range(1, 5), project="shapes")
    tell(tmp_path, "trackio", range(3, 7), project="shapes")
    (run,) = SQLiteStorage.get_runs("shapes")
    assert run.startswith("toy-")
    rows = [r for r in SQLiteStorage.get_logs("shapes", run) if "reward/shapes" in r]
    assert [r["reward/shapes"] for r in rows] == [s / 10 for s in range(1, 7)]


# --------------------------------------------------------------------------------------------------- failures
class Broken:
    """A tracker whose network went away after `good` calls."""

    def __init__(self, good: int) -> None:
        self.good, self.calls, self.closed = good, list[tuple[str, Any]](), 0

    def _call(self, *what: Any) -> None:
        if len(self.calls) >= self.good:
            raise ConnectionError("no route\nto host")
        self.calls.append(what)

    def log(self, metrics: Any, step: int) -> None:
        self._call(dict(metrics), step)

    def images(self, name: str, pictures: Any, step: int) -> None:
        self._call(name, step)

    def close(self) -> None:
        self.closed += 1
        raise OSError("disk full")


def opened(monkeypatch: pytest.MonkeyPatch, folder: Path, inner: Any) -> track.Tracker:
    monkeypatch.setattr(track, "find_spec", lambda name: object())
    monkeypatch.setattr(track, "_OPEN", {"wandb": lambda *given: inner})
    (tracker,) = open_trackers(TrackConfig(to=("wandb",)), "toy", folder, RUN_CONFIG)
    return tracker


def test_a_tracker_that_fails_is_closed_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Broken(good=1)
    tracker = opened(monkeypatch, tmp_path, inner)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            tracker.log({"loss": 1.0}, step)
            tracker.images("samples", PICTURES, step)
        tracker.close()
    assert [r.getMessage() for r in caplog.records] == [
        "tracking: wandb failed and is closed, training goes on: ConnectionError: no route to host"
    ]
    assert inner.calls == [({"loss": 1.0}, 1)] and inner.closed == 1
    sent = json.loads((tmp_path / LEDGER).read_text())["sent"]
    assert sent == {"wandb": {"loss": 1}}  # what failed was not sent


def test_a_full_disk_under_the_ledger_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = opened(monkeypatch, tmp_path, Broken(good=9))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)


def test_a_tracker_that_cannot_open_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*given: Any) -> track.Tracker:
        raise ConnectionError("no route")

    monkeypatch.setattr(track, "find_spec", lambda name: object())
    monkeypatch.setattr(track, "_OPEN", {"wandb": refuse})
    assert open_trackers(TrackConfig(to=("wandb",)), "toy", tmp_path, RUN_CONFIG) == []
    assert "wandb did not open" in caplog.text


def test_an_interrupt_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Broken(good=9)
    monkeypatch.setattr(inner, "log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opened(monkeypatch, tmp_path, inner).log({"loss": 1.0}, 1)


def test_two_runs_of_one_name_have_different_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        opened(monkeypatch, tmp_path / name, Broken(good=9))
    first, second = (json.loads((tmp_path / name / LEDGER).read_text())["id"] for name in "ab")
    assert first != second
