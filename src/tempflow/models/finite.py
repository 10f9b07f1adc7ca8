"""What leaves a model and is not finite: a failure with a name, before anyone scores it or learns from it.

The rest of the house calls a model's `encode`, `decode` and `encode_media` through `encoded`, `decoded` and
`encoded_media`, whatever the adapter: media that meet a run's size are looked at here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.media import Media, Size
from tempflow.models.protocol import Conditioning, DecodesPixels, Model
from tempflow.request import Prompt

WHOLE, LATENT, PICTURE, GIVEN = 0, 1, 2, 3
"""What may be wrong with a sample: nothing, or where it broke."""

WHY = {
    LATENT: "the model's final latents are not finite",
    PICTURE: "the decoder's pictures are not finite",
    GIVEN: "the autoencoder's latents of given pictures are not finite",
}
ADVICE = "try model.dtype float32, other weights or less guidance"
NAMED = 3
"""Prompts that a line names."""


class NotFiniteError(ArithmeticError):
    """A part of the model gave NaN or an infinity where it is given the same every time."""


class BrokenPicturesError(NotFiniteError):
    """Some decoded media are not finite. media: all B, those black and silent; ok: bool [B], the others."""

    def __init__(self, media: Media, ok: Tensor) -> None:
        super().__init__(f"{int((~ok).sum())} of {len(ok)} decoded pictures are not finite; {ADVICE}")
        self.media, self.ok = media, ok


@dataclass(frozen=True, eq=False)
class Decoded:
    """media: B of them; broken: LongTensor [B], WHOLE or where a sample broke."""

    media: Media
    broken: Tensor

    @property
    def ok(self) -> Tensor:
        """bool [B], which of them are any at all."""
        return self.broken == WHOLE


def encoded(model: Model, prompts: Sequence[Prompt], size: Size) -> Conditioning:
    """`model.encode`. Raises NotFiniteError, naming the prompt, for a condition that is not finite."""
    condition = model.encode(prompts, size)
    named = [(condition.tensors, [p.text for p in prompts])]
    named += [] if condition.negative is None else [(condition.negative, [p.negative for p in prompts])]
    for tensors, texts in named:
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            row = int((~finite_rows(tensor)).nonzero()[0, 0])
            raise NotFiniteError(
                f"prompt {texts[row][:60]!r}: its {name!r} from the text encoders is not finite; {ADVICE}"
            )
    return condition


def decoded(model: Model, latents: Tensor, size: Size) -> Decoded:
    """`model.decode` of latents [B, *S]; what is not finite before or after it is marked, and black.

    Raises ValueError for media of another kind, number or size.
    """
    fine, drawn = finite_rows(latents), torch.ones(len(latents), dtype=torch.bool)
    if not bool(fine.all()):  # what an adapter makes of NaN is nobody's business
        latents = _where(fine, latents, torch.zeros_like(latents))
    try:
        media = model.decode(latents, size)
    except BrokenPicturesError as error:
        media, drawn = error.media, error.ok
    if not isinstance(media, Media) or len(media) != len(latents):
        told = f"{len(media)} media" if isinstance(media, Media) else f"a {type(media).__name__}"
        raise ValueError(f"{model.name} decoded {len(latents)} latents to {told}; expected Media of {len(latents)}")
    if wrong := media.misfit(size):
        raise ValueError(f"{model.name} decoded media of {wrong}; nearest valid: an adapter that makes that size")
    broken = torch.where(drawn.cpu(), WHOLE, PICTURE)
    return Decoded(media, torch.where(fine.cpu(), broken, LATENT))


def decoded_pixels(model: Model, latents: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """`DecodesPixels.decode_pixels` of latents [B, *S], and bool [B] on their device: which rows are finite before and
    after it. Those that are not before it are decoded as zeros.

    Raises ValueError for a model whose decoder has no gradients, and for frames of another shape.
    """
    if not isinstance(model, DecodesPixels):
        raise ValueError(f"model: {model.name!r} decodes without gradients; nearest valid: one with `decode_pixels`")
    fine = finite_rows(latents)
    held = _where(fine, latents, torch.zeros_like(latents))
    pixels = model.decode_pixels(held, size)
    right = pixels.dim() == 5 and pixels.shape[0] == len(latents) and pixels.shape[2:] == (3, size.height, size.width)
    if not right:
        shape = f"[{len(latents)}, F, 3, {size.height}, {size.width}]"
        raise ValueError(f"{model.name} decoded frames {list(pixels.shape)}; nearest valid: {shape}")
    return pixels, fine & finite_rows(pixels).to(fine.device)


def encoded_media(model: Model, media: Media, size: Size) -> Tensor:
    """`model.encode_media`. Raises ValueError for media of another size, rate or length of sound."""
    if wrong := media.misfit(size):
        raise ValueError(f"media: {wrong}; nearest valid: media of {size}")
    return model.encode_media(media, size)


def to_pictures(images: Iterable[Tensor]) -> Media:
    """Decoded parts, float [b, 3, H, W] in −1 … 1, as media; for adapters. See `to_media`."""
    return to_media(image[:, None] for image in images)


def to_media(
    clips: Iterable[Tensor], fps: float | None = None, sound: Tensor | None = None, sound_rate: int | None = None
) -> Media:
    """Decoded parts, float [b, F, 3, H, W] in −1 … 1, as media of B in all; sound: float [B, C, S] beside them.

    Raises BrokenPicturesError where one is not finite: as whole numbers NaN is a black pixel, and nobody would see it.
    """
    frames, fine = list[Tensor](), list[Tensor]()
    for clip in clips:
        fine.append(finite_rows(clip).cpu())
        scaled = (clip.float() / 2 + 0.5).clamp(0, 1)
        frames.append((scaled * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu())
    ok, pictures = torch.cat(fine), torch.cat(frames).contiguous()
    if sound is not None:
        heard = finite_rows(sound).cpu()
        ok, sound = ok & heard, torch.where(heard[:, None, None], sound.float().cpu(), 0.0)
    if not bool(ok.all()):
        pictures[~ok] = 0
        raise BrokenPicturesError(Media(pictures, fps, sound, sound_rate), ok)
    return Media(pictures, fps, sound, sound_rate)


def _where(rows: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, other)


def finite_rows(x: Tensor) -> Tensor:
    """bool [B] on x's device: which rows of [B, …] are finite."""
    return x.isfinite().flatten(1).all(1)


def told(broken: Tensor, prompts: Sequence[str], what: str = "pictures") -> list[str]:
    """A line for each way in which samples broke: how many of how many, why, of which prompts. prompts: B texts."""
    lines: list[str] = []
    for code, why in WHY.items():
        rows = (broken == code).nonzero()[:, 0].tolist()
        if rows:
            names = list(dict.fromkeys(prompts[row] for row in rows))
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            listed = ", ".join(repr(name[:60]) for name in names[:NAMED])
            lines.append(f"{len(rows)} of {len(broken)} {what} are none: {why} ({listed}{more}); {ADVICE}")
    return lines
