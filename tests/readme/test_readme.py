"""What the README shows works: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tempflow.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_block_runs(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    few = "{'data': {'prompts_per_iteration': 1}, 'evaluation': {'validation_prompts': 4, 'test_prompts': 8}}"
    small = code[1].replace("iterations=6", "iterations=1, threads=1").replace("few = ", f"few = {few} #")
    assert small.count("few = ") == 1 and "threads=1" in small
    done = subprocess.run([sys.executable, "-c", small], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "held-out reward" in done.stdout and "test of the untrained model, 8 pictures" in done.stdout


@pytest.mark.parametrize("target", re.findall(r"\]\((docs/[\w./]+)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: small letters, hyphens for spaces, nothing else."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_into_pages_lead_to_a_heading() -> None:
    lost = [
        f"{page.name}: {target}#{anchor}"
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text())
        if anchor not in anchors((page.parent / target) if target else page)
    ]
    assert not lost


@pytest.mark.parametrize("verb", ["train", "cost", "eval", "sample", "algorithms", "models", "rewards"])
def test_verbs_exist(verb: str) -> None:
    assert main([verb, "--help"]) == 0


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
