"""The script that makes `shapes_tokens`: stages start, go on where they were cut off, and ship what the adapter loads;
and the autoencoder that it made."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tempflow.evaluate.suite import draw
from tempflow.media import Size
from tempflow.models import load, tokens_folder
from tempflow.request import Prompt
from tempflow.shapes.prompts import balanced
from tempflow.shapes.render import scene
from tempflow.shapes.verify import judge

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_shapes_tokens.py"
TINY = ["--batch", "4", "--pool", "8", "--judged", "6", "--save-every", "2", "--layers", "1"]


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))
    yield runpy.run_path(str(SCRIPT))
    sys.path.remove(str(SCRIPT.parent))


def start(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any], *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    script["main"]()


def test_the_shipped_autoencoders_pictures_are_still_right(script: dict[str, Any], tmp_path: Path) -> None:
    """At least nine of ten of unseen pictures of test prompts: 95.5 % of 600."""
    vae = script["trained_autoencoder"](tmp_path)
    wanted = balanced("test", 60)
    rng = np.random.default_rng(2)
    x = torch.from_numpy(np.stack([scene(spec, rng) for spec in wanted])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        tokens = vae.quantise(vae.latents(x))
        seen = script["to_uint8"](vae.decode(tokens))
    assert tokens.shape == (60, 8, 8) and len(tokens.unique()) > 300
    assert np.mean([judge(p, s).strict for p, s in zip(seen, wanted, strict=True)]) >= 0.9


def test_the_shipped_trunk_draws_what_it_is_asked_for() -> None:
    """One object, ten steps, no guidance: strict .29 and graded .68 of the test split."""
    model, wanted = load("shapes_tokens"), [s for s in balanced("test", 96) if s.kind in ("single", "color")]
    assert model.licence == "Apache-2.0" and model.notes() == ()
    size, prompts = Size(32, 32), [Prompt(s.prompt) for s in wanted]
    seen = draw(model, prompts, steps=10, guidance=1.0, seed=3, size=size, rows=32).pictures().numpy()
    verdicts = [judge(p, s) for p, s in zip(seen, wanted, strict=True)]
    assert len(wanted) == 32 and np.mean([v.graded for v in verdicts]) > 0.5
    assert np.mean([v.strict for v in verdicts]) > 0.1
    files = [f for f in tokens_folder().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 7e6 and tokens_folder() / "licence.json" in files


@pytest.mark.slow
def test_stages_go_on_where_they_stopped_and_ship_a_pipeline(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, to = tmp_path / "out", tmp_path / "weights"
    common = ["--output", str(out), "--to", str(to), *TINY]
    start(monkeypatch, script, "codebook", "--steps", "2", *common)
    start(monkeypatch, script, "trunk", "--steps", "2", *common)
    start(monkeypatch, script, "trunk", "--steps", "4", "--dtype", "bfloat16", *common)
    lines = [json.loads(text) for text in (out / "trunk.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["rows"] == 8
    assert {"strict", "graded", "strict_at_0.8", "two"} <= lines[0].keys()
    start(monkeypatch, script, "trunk", "--steps", "6", "--minutes", "1e-9", *common)
    assert len((out / "trunk.jsonl").read_text().splitlines()) == 2, "its time is over"
    start(monkeypatch, script, "distill", "--steps", "2", *common)
    start(monkeypatch, script, "distill", "--steps", "4", *common)
    assert [json.loads(text)["step"] for text in (out / "distill.jsonl").read_text().splitlines()] == [2, 4]
    start(monkeypatch, script, "ship", *common)
    model: Any = load(str(to))
    assert model.licence == "Apache-2.0" and model.notes() == ()
    kept, before = (script["load_file"](out / f"{n}.safetensors")["lm_head.weight"] for n in ("distilled", "trunk_ema"))
    assert not torch.equal(kept, before)
    assert torch.equal(model.network.lm_head.weight, kept.bfloat16().float())
    seen = draw(model, [Prompt("a red circle")], steps=2, guidance=2.0, seed=0, size=Size(32, 32), rows=4)
    assert seen.frames.shape == (1, 1, 32, 32, 3)
