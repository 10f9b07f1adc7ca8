"""What enters the text encoders of a Stable Diffusion 3 pipeline, and what they make of something else in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.models.protocol import Encoded, TextInputs

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
"""A pipeline's text encoders and their tokenizers; the third, T5, may be missing."""

CLIPS: tuple[str, ...] = ("text_encoder", "text_encoder_2")


@torch.no_grad()
def text_inputs(pipe: Any, prompt: str, max_tokens: int) -> TextInputs:
    """See `EncodesInputs.text_inputs`; `max_tokens` is T5's `max_sequence_length`."""
    tokens, content = dict[str, Tensor](), dict[str, Tensor]()
    for name in _present(pipe):
        ids, words = _tokenized(pipe, name, prompt, max_tokens)
        tokens[name], content[name] = _embedding(getattr(pipe, name))(ids)[0], words
    return TextInputs(tokens, content)


def encode_inputs(pipe: Any, prompt: str, tokens: Mapping[str, Tensor], max_tokens: int) -> Encoded:
    """See `EncodesInputs.encode_inputs`. It is the pipeline's own `encode_prompt`, with the outputs of the encoders'
    embedding layers replaced. A CLIP's own vector is its pooled embedding, T5's the mean of what it puts out at the
    prompt's words (our choice: it has none)."""
    count = len(next(iter(tokens.values())))
    with ExitStack() as undo:
        for name in _present(pipe):
            handle = _embedding(getattr(pipe, name)).register_forward_hook(_instead(tokens[name]))
            undo.callback(handle.remove)
        embeds, _, pooled, _ = pipe.encode_prompt(
            [prompt] * count, None, None, do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )
    widths = [getattr(pipe, name).config.projection_dim for name in CLIPS]
    vectors: dict[str, Tensor] = dict(zip(CLIPS, pooled.split(widths, dim=-1), strict=True))
    if pipe.text_encoder_3 is not None:
        words = _tokenized(pipe, "text_encoder_3", prompt, max_tokens)[1]
        of_t5 = embeds[:, pipe.tokenizer_max_length :]
        vectors["text_encoder_3"] = of_t5[:, words if bool(words.any()) else ~words].mean(1)
    return Encoded({"embeds": embeds, "pooled": pooled}, vectors)


def _present(pipe: Any) -> Iterator[str]:
    return (name for name in ENCODERS if getattr(pipe, name) is not None)


def _embedding(encoder: nn.Module) -> nn.Module:
    """The layer that embeds tokens, as the forward calls it: a T5 has another of the same weights beside it."""
    inner: Any = getattr(encoder, "encoder", encoder)
    return inner.get_input_embeddings()


def _instead(value: Tensor) -> Any:
    def hook(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return value.to(out)

    return hook


def _tokenized(pipe: Any, name: str, prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token numbers [1, L] and which are the prompt's own words, bool [L], on the encoder's device."""
    tokens = getattr(pipe, ENCODERS[name])(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer_max_length if name in CLIPS else max_tokens,
        truncation=True,
        return_special_tokens_mask=True,
    )
    device = getattr(pipe, name).device
    real, special = torch.tensor(tokens["attention_mask"]), torch.tensor(tokens["special_tokens_mask"])
    return torch.tensor([tokens["input_ids"]], device=device), (real.bool() & ~special.bool()).to(device)
