"""Source pictures of edits: from prompts, from a folder, over the wire; what is refused."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.judge_server import JudgeServer, Reply
from tempflow.evaluate.suites.scorers import ByReward
from tempflow.media import Media
from tempflow.request import Prompt, Source
from tempflow.rewards.judge import judge
from tempflow.rewards.sources import parted
from tempflow.rewards.wire import Limits, head_size, pack, pack_prompts, read_head, read_prompts


def pictures(count: int) -> torch.Tensor:
    """Each of one grey that says its number."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 6, 6, 3) * 10


def test_a_prompts_own_sources_are_shown_here_and_over_the_wire(tmp_path: Path) -> None:
    """They need no metadata, go before what metadata say, and reach another machine as bytes, each once."""
    files = [tmp_path / f"{level}.png" for level in (9, 20)]
    for level, file in zip((9, 20), files, strict=True):
        Image.new("RGB", (3, 4), (level, 8, 7)).save(file)
    one, two = (Prompt(file.name, {"image": "gone.png"}, sources=(Source.of(file),)) for file in files)
    prompts = [one, two, one, one]
    texts, told, media = [p.text for p in prompts], [p.told for p in prompts], Media.of(pictures(4))
    limits = Limits(rows=9, bytes=1 << 20, pixels=1 << 20)
    body = pack(media, texts, told)
    head = read_head(body[: head_size(body[:4], limits)], limits)
    assert all(row["sources"][0]["data"] for row in head.metadata) and body.count(b'"data"') == 2
    assert str(tmp_path).encode() not in body
    asked = read_prompts(pack_prompts(texts, told))
    assert b'"data"' not in pack_prompts(texts, told)
    with JudgeServer(lambda asked: Reply("Final Score: 3")) as server:
        reward = judge(
            url=server.url, model="judge", template="hp_scorer", concurrency=1, retries=0
        )  # no folder is named
        for metadata in (told, head.metadata):
            reward.check_prompts(texts, metadata)
            assert reward.score(media, texts, metadata).ok.all()
        assert [tuple(a.pictures[0][0, 0]) for a in server.asked] == [(n, 8, 7) for n in (9, 20, 9, 9)] * 2
        suite = ByReward(reward)
        suite.check(prompts)
        assert None not in suite([(picture,) for picture in pictures(4)], prompts, [0, 1, 0, 0])
        assert len(server.asked) == 12
        reward.check_prompts(texts, asked.metadata)  # before the run sums will do; a score needs the bytes
        with pytest.raises(ValueError, match=r"source picture of sha256 .* was not sent"):
            reward.score(media, texts, asked.metadata)
        data = base64.b64encode(b"no picture").decode()
        for wrong, why in (
            ([{"sha256": "0", "data": data}], "is another one"),
            ([{"sha256": hashlib.sha256(b"no picture").hexdigest(), "data": data}], "cannot be read"),
            ([{"sha256": "0", "data": "*"}], "no base64"),
            ([{"path": str(files[0]), "sha256": one.sources[0].digest}], "no source picture"),  # no path is opened
            ([str(files[0])], "no source picture"),
        ):
            with pytest.raises(ValueError, match=why):
                reward.check_prompts(["a"], [{"sources": wrong}])
        Image.new("RGB", (3, 4)).save(files[0])
        with pytest.raises(ValueError, match="is another than when the prompts were read"):
            reward.check_prompts(["a"], [one.told])
        with pytest.raises(ValueError, match="is another than when the prompts were read"):
            pack(media, texts, told)


def test_requests_hold_as_many_sources_as_fit(tmp_path: Path) -> None:
    sources: list[Source] = []
    for level in range(3):
        (tmp_path / f"{level}").write_bytes(bytes([level]) * 300)  # 404 as base64
        sources.append(Source.of(tmp_path / f"{level}"))
    rows = [Prompt("a", sources=(sources[n],)).told for n in (0, 0, 1, 1, 2, 0)]

    def of(rows: list[Any], most_rows: int, most: int) -> list[tuple[int, int]]:
        return [(part.start, part.stop) for part in parted(rows, most_rows, most)]

    assert of(rows, 4, 10_000) == [(0, 4), (4, 6)] and of(rows, 9, 810) == [(0, 4), (4, 6)]
    assert of(rows, 9, 1) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert of([{}] * 5, 2, 1) == [(0, 2), (2, 4), (4, 5)] and of([], 2, 1) == []
