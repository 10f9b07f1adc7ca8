"""Given samples laid out as a rollout's leaves: their pictures read and encoded, nothing drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempflow.core.forest import Forest
from tempflow.core.given import Given
from tempflow.core.rollout import skeleton
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.models.finite import finite_rows
from tempflow.models.protocol import Model, Size
from tempflow.train.signals import Signals, measure_given

Read = Callable[[Sequence[Prompt]], Tensor]
"""read(prompts) -> uint8 [N·keys, H, W, 3], a prompt's pictures in the order of the algorithm's keys."""


def laid_out(
    given: Given, read: Read, model: Model, size: Size, prompts: Sequence[Prompt], slots: Sequence[int]
) -> tuple[Forest, Scores, Signals]:
    """The forest whose leaves are the slots' given samples, their scores and what there is to measure of them.

    A prompt is read and encoded by itself, so that its latents do not depend on its neighbours nor on the ranks. A
    sample whose latent is not finite has a failed score.
    """
    latents = torch.cat([model.encode_media(read([prompt]), size) for prompt in prompts])
    plans = [given.plan(0, slot) for slot in slots]
    forest = replace(skeleton(plans, slots), nodes=latents)
    ok = finite_rows(latents).cpu()
    scores = given.scored(ok)
    return forest.to(model.device), scores, measure_given(latents, forest.leaves.prompt, ok)
