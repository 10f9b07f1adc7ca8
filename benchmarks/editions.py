"""What a forward of the embedded model costs beside its first edition's, and how large both are.

    python -m benchmarks.editions [--pairs 27] [--rows 24 96]

Takes the first edition's weights from git (revision 8bbcf4a). One thread, float32, forwards of both in turn, processor
time; prints the median of the pairs' ratios with quartiles.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from tempflow.media import Size
from tempflow.models import load, shapes_folder
from tempflow.models.protocol import Predict
from tempflow.request import asked

FIRST, WEIGHTS = "8bbcf4a", "src/tempflow/shapes/weights"
PROMPTS = asked(["a red circle", "two blue squares"])
SIZE = Size(32, 32)
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=27, help="forwards of each, in turn")
    parser.add_argument("--rows", type=int, nargs="+", default=[24, 96], help="of a forward")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        packed = subprocess.run(["git", "archive", FIRST, WEIGHTS], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            files.extractall(temporary, filter="data")
        folders = (Path(temporary) / WEIGHTS, shapes_folder())
        sizes = [sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6 for folder in folders]
        print(f"on disk: {sizes[0]:.2f} MB, then {sizes[1]:.2f} MB")
        models = [load(str(folder)) for folder in folders]
    predicts = [model.predictor(model.encode(PROMPTS, SIZE), 1.0) for model in models]
    for rows in a.rows:
        first, second = zip(*(seconds(predicts, rows) for _ in range(a.pairs + 3)), strict=True)
        ratios = [new / old for old, new in zip(first[3:], second[3:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{rows} rows: {middle:.3f} of the first edition's forward ({low:.3f} … {high:.3f})")


@torch.no_grad()
def seconds(predicts: list[Predict], rows: int) -> list[float]:
    """Processor time of one forward by each."""
    x, sigma = torch.randn(rows, 8, 8, 8), torch.full((rows,), 0.5)
    found: list[float] = []
    for predict in predicts:
        began = time.process_time()
        predict(x, sigma, torch.arange(rows) % len(PROMPTS))
        found.append(time.process_time() - began)
    return found


if __name__ == "__main__":
    main()
