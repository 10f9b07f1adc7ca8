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
from threading import Lock
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.names import PATH, cut
from tempflow.rewards.libraries import check_installed
from tempflow.rewards.protocol import check_media
from tempflow.rewards.vlm import Scorer, Source, Template, check_plain, fitted, is_plain
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
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    batch: Annotated[int, Field(ge=1)] = 4,
) -> HPSv3:
    """Human preference by HPSv3, a vision-language model of 7 B parameters."""
    check_installed("hpsv3", NEEDS, "transformers", "accelerate")
    text = Template.read(template, TEMPLATE, TOKENS)
    return HPSv3(path, revision, Source(base, base_revision, device, dtype), text, batch)


class HPSv3:
    """See this file's docstring.

    path, revision  the checkpoint: a safetensors file, a folder with one, or a hub id
    batch           pictures at a time
    """

    name, groupwise = "hpsv3", False

    def __init__(self, path: str, revision: str | None, source: Source, template: Template, batch: int) -> None:
        self.path, self.revision, self.source, self.template, self.batch = path, revision, source, template, batch
        self._lock = Lock()
        self._scorer: Scorer | None = None

    def prepare(self) -> None:
        """Loads the weights. Raises ValueError for weights that are missing, unexpected or no safetensors."""
        with self._lock:
            if self._scorer is None:
                tensors = read_tensors(folder_of(self.path, self.revision))
                self._scorer = Scorer.of(
                    self.source, tensors, head_of(tensors), TOKENS, f"path: {cut(self.path, PATH)!r}"
                )

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt with a control token, such as `<|im_end|>`."""
        check_plain(prompts)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; a row whose prompt has a control token is failed."""
        frames = check_media(media, prompts, metadata).pictures()[:, None]
        self.prepare()
        assert self._scorer is not None
        value = torch.full((len(frames), 1), torch.nan)
        rows = [row for row, prompt in enumerate(prompts) if is_plain(prompt)]
        sides = fitted(frames.shape[2], frames.shape[3], PIXELS, PIXELS)
        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            texts = [self.template.filled(prompts[row]) for row in some]
            value[some] = self._scorer([frames[row] for row in some], texts, sides, video=False)[:, 0, :1]
        return Scores(value, value.isfinite(), (self.name,))


def head_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The head, of the width that the checkpoint has: of released weights 3584."""
    first = tensors.get("rm_head.0.weight")
    width = first.shape[1] if first is not None and first.ndim == 2 else 3584
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
