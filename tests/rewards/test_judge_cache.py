"""The cache of a judge's answers, written by several processes at once."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from benchmarks.judge_server import Asked, JudgeServer, Reply
from tempflow.media import Media
from tempflow.rewards.endpoint import _keep, _kept
from tempflow.rewards.judge import judge
from tempflow.rewards.template import Answer

COUNT = 24
EXPECTED = [(1 + n % 5) / 5 for n in range(COUNT)]


def score(url: str, cache: str) -> list[float]:
    """All questions, of which each answer says its own picture's grey, several at a time."""
    media = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None].expand(COUNT, 4, 4, 3)
    found = judge(url=url, model="judge", template="unified_1", retries=0, cache=cache).score(
        Media.of(media), ["a cat"] * COUNT, [{}] * COUNT
    )
    assert found.ok.all()
    return found.value[:, 0].tolist()


def by_grey(asked: Asked) -> Reply:
    """A long answer, so that files take more than one write."""
    return Reply("why. " * 20_000 + f"Final Score: {1 + int(asked.pictures[0][0, 0, 0]) % 5}")


def work(url: str, cache: str, begin: Barrier) -> None:
    begin.wait(120)
    assert score(url, cache) == pytest.approx(EXPECTED)


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(2)
    with JudgeServer(by_grey) as server:
        processes = [spawn.Process(target=work, args=(server.url, str(tmp_path), begin)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]
        assert COUNT <= server.count <= 2 * COUNT
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == COUNT and all(file.suffix == ".json" for file in files)  # nothing lost, nothing left behind
    assert all(json.loads(file.read_text())["text"].startswith("why.") for file in files)
    assert score("http://127.0.0.1:9/v1", str(tmp_path)) == pytest.approx(EXPECTED)  # nobody is there to be asked


def test_a_torn_file_is_no_answer(tmp_path: Path) -> None:
    """Cut anywhere, with zeros at its end, or with other things in it."""
    file, answer = tmp_path / "a" / "b.json", Answer('Final Score: 4 "ä"', {"Yes": 0.5, "}": 0.25})
    _keep(file, answer)
    whole = file.read_bytes()
    assert _kept(file) == answer
    torn = [whole[:n] for n in range(len(whole))]
    torn += [part + bytes(len(whole) - len(part)) for part in torn]
    torn += [
        b'{"text": null, "top": {}}',
        b'{"text": 4, "top": {}}',
        b'{"text": "4"}',
        b'["text"]',
        b'{"text": "4", "top": []}',
    ]
    for part in torn:
        file.write_bytes(part)
        assert _kept(file) is None, part
    file.unlink()
    file.mkdir()
    _keep(file, answer)  # a place that cannot be written leaves nothing behind
    assert [*file.parent.iterdir()] == [file] and _kept(file) is None
