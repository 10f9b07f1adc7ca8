"""UniGenBench's way offline: `shapes` prompts in its CSV's form, judged over HTTP by the verifier.

    python -m benchmarks.unigen_shapes [--prompts 24] [--samples 2] [--failures 0.1] [--output runs/unigen_shapes]

The embedded model draws. A local endpoint (`benchmarks.judge_server`) gets each picture with all its checkpoints in one
question and answers by the verifier; some of its answers cannot be read, and are asked for again. The same pictures are
judged by the verifier directly. Both tallies are printed, and must be equal but for pictures that failed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.judge_server import Asked, JudgeServer, Reply
from tempflow.cli.suite import SuiteOptions, run_suite
from tempflow.evaluate.suites.gallery import gallery, load_picture
from tempflow.evaluate.unigenbench import Tally, tally
from tempflow.shapes.prompts import NUMBERS, Object, Spec, balanced, by_prompt
from tempflow.shapes.verify import judge, look

COLOR, SHAPE, QUANTITY = "Attribute - Color", "Attribute - Shape", "Attribute - Quantity"
LAYOUT, MATCHING = "Entity Layout - Two-Dimensional Space", "Compound - Feature Matching"


def points_of(spec: Spec) -> dict[str, str]:
    """A prompt's checkpoints: dimension → what it means here."""
    first, last = spec.objects[0], spec.objects[-1]
    number = NUMBERS.get(len(spec.objects), "one")
    found = {SHAPE: f"of each object the shape is right: {' and '.join(sorted({o.shape for o in spec.objects}))}"}
    if any(o.color for o in spec.objects):
        found[COLOR] = " and ".join(dict.fromkeys(f"the {o.shape} is {o.color}" for o in spec.objects if o.color))
    if spec.kind == "count":
        found[QUANTITY] = f"there are just {number} objects"
    if spec.relation is not None:
        found[LAYOUT] = f"the {first.shape} is {spec.relation} the {last.shape}"
    elif first.place is not None:
        found[LAYOUT] = f"the {first.shape} is {first.place}"
    found[MATCHING] = "all that the caption says is right, and nothing else is there"
    return found


def met(picture: np.ndarray, spec: Spec, dimension: str) -> int:
    """Whether the verifier finds a checkpoint met: its strict verdict on what the checkpoint is about alone."""
    if dimension == QUANTITY:
        return int(len(look(picture)[0]) == len(spec.objects))
    wanted = replace(spec, kind="two", relation=spec.relation if dimension == LAYOUT else None)
    parts = {SHAPE: (), COLOR: ("color",), LAYOUT: ("place",)}.get(dimension)
    if parts is not None:
        bare = [Object(o.shape, **{part: getattr(o, part) for part in parts}) for o in spec.objects]
        return int(judge(picture, replace(wanted, objects=tuple(bare))).strict)
    return int(judge(picture, spec).strict)


def write_csv(file: Path, specs: Sequence[Spec]) -> Path:
    """The prompts in the form of UniGenBench's file."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["index", "prompt_en", "sub_dims_en"])
        for index, spec in enumerate(specs):
            points = points_of(spec)
            told = {"Testpoints": list(points), "Testpoint Description": list(points.values())}
            out.writerow([index, spec.prompt, json.dumps(told)])
    return file


def verifier_checklist(failures: float = 0.0) -> Callable[[Asked], Reply]:
    """Answers the suite's question by the verifier; some questions, which the picture and the seed decide, get an
    answer of the wrong length, no JSON, or a verdict that is neither 0 nor 1."""
    judging = threading.Lock()

    def decide(asked: Asked) -> Reply:
        caption = re.findall(r"^Caption: (.*)$", asked.text, re.M)[0]
        dimensions = re.findall(r"^[0-9]+\. (.*?): ", asked.text, re.M)
        (picture,) = asked.pictures
        with judging:
            verdicts: list[object] = [met(picture, by_prompt()[caption], dimension) for dimension in dimensions]
        said = hashlib.sha256(f"{asked.body['seed']} {caption}".encode() + picture.tobytes()).digest()
        if int.from_bytes(said[:8], "big") / 2**64 < failures:
            wrong = ([*verdicts, 1], [*verdicts[:-1], 2], [*verdicts[:-1], True])
            return Reply("I cannot say." if said[8] % 4 == 3 else json.dumps({"score": wrong[said[8] % 4]}))
        return Reply(json.dumps({"remarks": ["seen"] * len(verdicts), "score": verdicts}))

    return decide


def asked_directly(folder: Path, specs: Sequence[Spec]) -> Tally:
    """The tally of a suite's pictures by the verifier, without a question."""
    rows: list[tuple[list[str], list[int]]] = []
    for (number, _), file in sorted(gallery(folder).items()):
        picture, dimensions = load_picture(file).numpy(), list(points_of(specs[number]))
        rows.append((dimensions, [met(picture, specs[number], dimension) for dimension in dimensions]))
    return tally(rows)


def through_the_wire(folder: Path, specs: Sequence[Spec], samples: int, failures: float) -> dict[str, float]:
    """Draws and judges; the suite's rows by label."""
    prompts = write_csv(folder.with_suffix(".csv"), specs)
    with JudgeServer(verifier_checklist(failures), keep=False) as server:
        options = {"url": server.url, "model": "judge", "timeout": 30.0}
        tables, _ = run_suite(
            SuiteOptions(name="unigenbench", prompts=str(prompts), samples=samples, options=options, output=str(folder))
        )
    assert sum(row.failed for table in tables for row in table.rows) == 0, "pictures failed ten times"
    return {row.label: row.mean for table in tables for row in table.rows}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=2, help="pictures a prompt")
    parser.add_argument("--failures", type=float, default=0.1, help="share of answers that cannot be read")
    parser.add_argument("--output", default="runs/unigen_shapes")
    given = parser.parse_args(args)
    folder, specs = Path(given.output), balanced("test", given.prompts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    rows = through_the_wire(folder, specs, given.samples, given.failures)
    direct = asked_directly(folder, specs)
    expected = {"UniGenBench": direct.overall, **direct.primary, **direct.dimensions}
    print(f"{'':<40}  by HTTP  directly")
    for label, mean in expected.items():
        print(f"{label:<40}  {rows[label]:.4f}   {mean:.4f}")
    assert rows.keys() == expected.keys() and all(abs(rows[k] - v) < 1e-12 for k, v in expected.items())


if __name__ == "__main__":
    main()
