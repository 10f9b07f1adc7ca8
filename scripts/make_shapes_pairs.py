"""Makes a small preference set of the `shapes` world, to try offline training with.

    python scripts/make_shapes_pairs.py --output runs/pairs --pairs 200

The base model draws several pictures of each train prompt, task kinds in turn. Each that the strict verifier calls
right is `chosen` against one of the same prompt that it calls wrong, as long as there are both. Writes PNG files,
pairs.jsonl (for diffusion_dpo) and pictures.jsonl (the chosen ones alone, for sft). Equal arguments write equal files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tempflow.evaluate.suite import draw
from tempflow.folder import claim
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.sd3 import SD3
from tempflow.request import asked
from tempflow.rewards.shapes import ShapesReward
from tempflow.shapes.prompts import Spec, balanced, specs

SIZE = Size(32, 32)
ROWS = 192
PROMPTS_AT_ONCE = 24


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    if (a.out / "pairs.jsonl").exists():
        raise SystemExit(f"--output: {a.out} already holds pairs; choose another folder")
    claim(a.out, "pairs", "--output")
    pairs: list[dict[str, str]] = []
    for spec, right, wrong in islice(couples(load("shapes"), a.samples, a.steps, a.seed), a.pairs):
        line = {"prompt": spec.prompt, "kind": spec.kind}
        for key, picture in (("chosen", right), ("rejected", wrong)):
            line[key] = f"{len(pairs):04d}_{key}.png"
            Image.fromarray(picture.numpy()).save(a.out / line[key])
        pairs.append(line)
    pictures = [{"prompt": p["prompt"], "kind": p["kind"], "image": p["chosen"]} for p in pairs]
    for name, lines in (("pairs", pairs), ("pictures", pictures)):
        (a.out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(pairs)} pairs of {len({p['prompt'] for p in pairs})} prompts, in {a.out}")


def couples(model: SD3, samples: int, steps: int, seed: int) -> Iterator[tuple[Spec, Tensor, Tensor]]:
    """A picture that is right and one that is wrong, of train prompts, each asked once, task kinds in turn."""
    verifier = ShapesReward(graded=False)
    wanted = list(dict.fromkeys(balanced("train", 6 * len(specs("train")))))  # a kind comes every sixth time
    for first in range(0, len(wanted), PROMPTS_AT_ONCE):
        part = wanted[first : first + PROMPTS_AT_ONCE]
        texts = [spec.prompt for spec in part]
        how = {"steps": steps, "guidance": 1.0, "seed": seed + first, "size": SIZE, "rows": ROWS}
        media = draw(model, asked(texts), samples_per_prompt=samples, **how)
        owner = [text for text in texts for _ in range(samples)]
        right = verifier.score(media, owner, [{}] * len(owner)).value[:, 0].view(-1, samples) == 1
        for spec, pictures, good in zip(part, media.pictures().unflatten(0, (-1, samples)), right, strict=True):
            yield from zip(repeat(spec), pictures[good], pictures[~good], strict=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", dest="out", type=Path, required=True, help="folder for the pictures and the two .jsonl files"
    )
    parser.add_argument("--pairs", type=int, default=200, help="at most")
    parser.add_argument("--samples", type=int, default=8, help="pictures drawn of a prompt")
    parser.add_argument("--steps", type=int, default=10, help="sampler steps")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
