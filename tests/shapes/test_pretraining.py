"""The script that made the shipped weights: every stage starts, goes on where it was cut off, and ships a pipeline."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tempflow import models
from tempflow.shapes import build

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_shapes.py"
TINY = ["--batch", "4", "--pool", "8", "--judged", "6", "--save-every", "2"]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def start(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any], *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    script["main"]()


def test_one_command_runs_all_stages_and_goes_on_where_it_stopped(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, to = tmp_path / "out", tmp_path / "weights"
    common = ["--output", str(out), "--init", str(models.shapes_folder()), "--to", str(to), *TINY]
    start(monkeypatch, script, "all", "--steps", "2", *common)
    for stage in ("autoencoder", "flow", "distill"):
        (line,) = (json.loads(text) for text in (out / f"{stage}.jsonl").read_text().splitlines())
        assert line["step"] == 2 and line["rows"] == 8 and line["cpu_seconds"] > 0
    start(monkeypatch, script, "flow", "--steps", "4", *common)
    assert [json.loads(text)["step"] for text in (out / "flow.jsonl").read_text().splitlines()] == [2, 4]
    shipped = StableDiffusion3Pipeline.from_pretrained(str(to))
    assert shipped.tokenizer.get_vocab() == build.tokenizer(True, build.words()).get_vocab()
    trained = script["load_file"](out / "distilled.safetensors")["transformer.proj_out.weight"]
    assert torch.equal(shipped.transformer.proj_out.weight, trained.bfloat16().float())


def test_words_keep_their_meaning_whatever_their_number(script: dict[str, Any], tmp_path: Path) -> None:
    """A pipeline of another vocabulary is a start: what a word means goes with the word, not with its id."""
    known = build.pipeline(seed=5)
    for number, ends in (("", True), ("_2", True), ("_3", False)):
        tokens = build.tokenizer(ends, ("circle", "zebra", "a", "red"))
        setattr(known, f"tokenizer{number}", tokens)
        getattr(known, f"text_encoder{number}").resize_token_embeddings(len(tokens))
    known.save_pretrained(tmp_path / "known")
    pipe = script["first_pipeline"](tmp_path / "known")
    for number in ("", "_2", "_3"):
        old, new = (getattr(p, f"tokenizer{number}").get_vocab() for p in (known, pipe))
        mine, theirs = (getattr(p, f"text_encoder{number}").get_input_embeddings().weight for p in (pipe, known))
        assert len(mine) == len(new) and old["circle"] != new["circle"]
        for word in ("circle", "a", "red", "<eos>"):
            assert torch.equal(mine[new[word]], theirs[old[word]])
        assert mine.isfinite().all()
    assert torch.equal(pipe.transformer.proj_out.weight, known.transformer.proj_out.weight)


def test_a_start_that_is_no_pipeline_is_refused(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, script, "all", "--output", str(tmp_path), "--init", str(tmp_path))
    assert "is no pipeline folder: it has no model_index.json" in capsys.readouterr().err
