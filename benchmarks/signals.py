"""What an iteration's signals cost on one core: `train.signals` beside revision 8bbcf4a's, in turn in one run.

    python -m benchmarks.signals [--pairs 5] [--prompts 1]

Processor time of one thread, on a CPU. `before` is that revision's `measure`, which looked at every leaf; what is
computed of a picture has not changed since. A run whose guards are off measures nothing.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from benchmarks.pairs import timed
from tempflow.perception.diversity import features, within_groups
from tempflow.train.signals import Signals, grid_period, grid_share, high_frequency, measure

CASES = ((32, 4, 60), (512, 16, 24), (512, 16, 216))
"""Pixels along a side, a latent's channels, leaves of a prompt: `shapes`; SD 3.5 by Flow-GRPO, and by TempFlow-GRPO."""


def before(x0: Tensor, media: Tensor, prompt: Tensor, ok: Tensor) -> Signals:
    slots, leaves = torch.unique(prompt, return_counts=True)
    groups = [(prompt == slot).nonzero()[:, 0] for slot in slots]
    period = grid_period(x0.shape, media.shape)
    failed = (~ok).cpu()
    fine, grid = high_frequency(media), grid_share(media, period)
    return Signals(
        slots,
        leaves,
        torch.stack([rms(x0[rows.to(x0.device)]) for rows in groups]),
        within_groups(features(media), prompt)[1].cpu(),
        *(torch.stack([leaf[rows].double().mean() for rows in groups]) for leaf in (fine, grid, failed)),
    )


def rms(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x.float().flatten(1), dim=1).double().cpu()
    return (norms.square().sum() / x.numel()).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for side, channels, leaves in CASES:
        count = a.prompts * leaves
        x0 = torch.randn(count, channels, side // 8, side // 8, generator=generator)
        media = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
        slot, ok = torch.arange(a.prompts).repeat_interleave(leaves), torch.ones(count, dtype=torch.bool)
        pairs = timed(lambda g=(x0, media, slot, ok): before(*g), lambda g=(x0, media, slot, ok): measure(*g), a.pairs)
        each = 1e3 * math.fsum(pairs.after) / len(pairs.after) / count
        print(f"{a.prompts} prompts x {leaves:3d} leaves, {side}²: {pairs}; now {each:.3g} ms a leaf", flush=True)


if __name__ == "__main__":
    main()
