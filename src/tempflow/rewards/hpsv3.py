"""HPSv3 (arXiv 2508.03789, MizzenAI/HPSv3): Qwen2-VL 7B with a head for the mean and the deviation of a preference.

The picture is resized to about 200 704 pixels. The chat's one turn is the picture and a text that ends in the token
`<|Reward|>`; the hidden state there goes through a float32 head 3584 → 1024 → 16 → 2 with ReLU between. The score is
the first number, the mean.

The weights were trained with one text around the prompt, and the score depends on it. That text is not ours to copy:
without `template` a text of our own asks the same, and the scores are **not comparable with published ones**. Whoever
has the official text gives it as a file, with `{prompt}` or `{text_prompt}` where the prompt goes, and `<|Reward|>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tempflow.names import PATH, cut
from tempflow.rewards.scorer import Batch, Dtype, require
from tempflow.rewards.vlm import RatedPictures, Rater, Source, Template, fitted, is_plain
from tempflow.rewards.weights import folder_of, read_tensors
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "MIT", "tempflow[scorers]", "about −5 to 15; compare within a prompt"

TOKENS = ("<|Reward|>",)
PIXELS = 256 * 28 * 28
"""Of a picture, as nearly as whole multiples of 28 allow."""

TEMPLATE = """Rate this generated picture from 0 (worst) to 10 (best), as people do who compare pictures of one prompt.
Quality: bodies and objects without errors, sharpness, rich detail, light and colour, composition.
Match: what the prompt names is there, in its number, with its properties, places and actions, in the style it asks for.
Prompt: {prompt}
Overall rating: <|Reward|>
"""
"""Ours, version 1."""


def hpsv3(
    *,
    path: Place = "MizzenAI/HPSv3",
    base: Place = "Qwen/Qwen2-VL-7B-Instruct",
    template: Place | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "bfloat16",
    batch: Batch = 4,
) -> RatedPictures:
    """Human preference by HPSv3, a vision-language model of 7 B parameters.

    path      the checkpoint: a safetensors file, a folder with one, or a hub id at `revision`
    base      folder or hub id, at `base_revision`, of the released model: configuration and tokenizer, no weights
    template  a file with the text around the prompt; see this file's docstring

    A prompt with a control token, such as `<|im_end|>`, is refused when prompts are read; its score is failed.
    """
    require("scorers", "transformers", "accelerate")
    text = Template.read(template, TEMPLATE, TOKENS)

    def load(at: str) -> Rater:
        tensors = read_tensors(folder_of(path, revision))
        source = Source(base, base_revision, at, dtype)
        return Rater.of(source, tensors, head_of(tensors), TOKENS, f"path: {cut(path, PATH)!r}")

    def rate(rater: Rater, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        value = torch.full((len(prompts),), torch.nan)
        rows = [row for row, prompt in enumerate(prompts) if is_plain(prompt)]
        if rows:
            sides = fitted(pictures.shape[1], pictures.shape[2], PIXELS, PIXELS)
            texts = [text.filled(prompts[row]) for row in rows]
            value[rows] = rater([pictures[row][None] for row in rows], texts, sides, video=False)[:, 0, 0]
        return value

    return RatedPictures("hpsv3", load, rate, batch=batch, device=device)


def head_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The head, of the width that the checkpoint has: of released weights 3584."""
    first = tensors.get("rm_head.0.weight")
    width = first.shape[1] if first is not None and first.ndim == 2 else 3584
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
