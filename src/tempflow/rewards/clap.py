"""CLAP (arXiv 2211.06687): how well a sound fits its prompt, the cosine of their embeddings.

The sound is made mono (the mean of its channels) and resampled to the extractor's rate, 48 kHz, by a polyphase filter
(scipy). It is cut into windows of at most the extractor's length, 10 s, evenly apart over the whole of it; the score is
the mean of their cosines. CLAP's own code takes one such window by chance, and of released "fused" weights mixes three
by chance: a reward must not depend on chance, nor on its neighbours in a batch.

A score of sound and text alone does not look at the frames: it has nothing against a video that ignores its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.devices import resolved_device
from tempflow.media import Kind, Media
from tempflow.names import PATH, cut
from tempflow.rewards.protocol import check_media
from tempflow.rewards.scorer import Batch, require
from tempflow.rewards.weights import folder_of, load_strict, load_tokenizer, read_tensors, unfilled
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[clap]", "−1 to 1; about −.1 to .6"


def clap(
    *,
    path: Place = "laion/larger_clap_general",
    revision: str | None = None,
    device: str = "cpu",
    batch: Batch = 8,
) -> CLAP:
    """How well a sound fits its prompt, by CLAP: a cosine."""
    require("clap", "transformers", "accelerate", "scipy")
    return CLAP(path, revision, device, batch)


class CLAP:
    """See this file's docstring. It computes in float32, as its normalisations over batches need.

    path, revision  transformers' folder of a `ClapModel`, or a hub id: weights, tokenizer and extractor
    batch           windows at a time
    """

    name, groupwise = "clap", False
    takes: Kind = "sound"

    def __init__(self, path: str, revision: str | None, device: str, batch: int) -> None:
        self.path, self.revision, self.device, self.batch = path, revision, resolved_device(device), batch
        self._lock = Lock()
        self._loaded: tuple[Any, Any, Any] | None = None

    def prepare(self) -> None:
        """Loads the weights. Raises ValueError for weights that are missing, unexpected or no safetensors."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; a row whose sound is not finite is failed. Raises ValueError for media without sound.

        A prompt is cut where the text model's positions end (512 tokens).
        """
        media = check_media(media, prompts, metadata)
        if media.sound is None or media.sound_rate is None:
            raise ValueError(
                "media without sound for a reward that takes sound; nearest valid: a model that makes both"
            )
        self.prepare()
        assert self._loaded is not None
        model, tokenizer, extractor = self._loaded
        parts: list[tuple[int, np.ndarray]] = []
        for row, sound in enumerate(media.sound.numpy()):
            if np.isfinite(sound).all():
                wave = mono(sound, media.sound_rate, extractor.sampling_rate)
                parts += [(row, part) for part in windows(wave, extractor.nb_max_samples)]
        total, count = torch.zeros(len(media)), torch.zeros(len(media))
        with torch.inference_mode():
            for start in range(0, len(parts), self.batch):
                some = parts[start : start + self.batch]
                rows = torch.tensor([row for row, _ in some])
                asked = self._texts(model, tokenizer, [prompts[row] for row, _ in some])
                cosine = (asked * self._sounds(model, extractor, [part for _, part in some])).sum(1)
                total.index_add_(0, rows, cosine)
                count.index_add_(0, rows, torch.ones(len(some)))
        value = (total / count)[:, None]  # 0 ÷ 0, no number, for a row that was not heard
        return Scores(value, value.isfinite(), (self.name,))

    def _load(self) -> tuple[Any, Any, Any]:
        from transformers import AutoConfig, AutoFeatureExtractor, ClapModel

        folder = folder_of(self.path, self.revision)
        what = f"path: {cut(self.path, PATH)!r}"
        try:
            config: Any = AutoConfig.from_pretrained(folder)
            extractor = AutoFeatureExtractor.from_pretrained(folder)
            model: Any = unfilled(lambda: ClapModel(config))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{what} is no ClapModel's folder ({cut(str(error), PATH)}); get it again") from error
        load_strict(model.float(), read_tensors(folder), what)
        return model.to(self.device).eval(), load_tokenizer(self.path, self.revision), extractor

    def _texts(self, model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        config = model.config.text_config
        most = min(tokenizer.model_max_length, config.max_position_embeddings - config.pad_token_id - 1)
        asked = tokenizer(list(prompts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        given = {name: asked[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return _unit(model.get_text_features(**given))

    def _sounds(self, model: Any, extractor: Any, waves: Sequence[np.ndarray]) -> Tensor:
        heard = extractor(list(waves), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        # The extractor marks one row by chance as longer than it is; no window here is.
        longer = torch.zeros(len(waves), 1, dtype=torch.bool, device=self.device)
        features = heard["input_features"].float().to(self.device)
        return _unit(model.get_audio_features(input_features=features, is_longer=longer))


def mono(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound, float32 [C, S], as the mean of its channels, float32 [S'], at the wanted rate."""
    from scipy.signal import resample_poly

    mixed = sound.mean(0, dtype=np.float64)
    if rate != wanted:
        by = math.gcd(rate, wanted)
        mixed = resample_poly(mixed, wanted // by, rate // by)
    return mixed.astype(np.float32)


def windows(wave: np.ndarray, most: int) -> list[np.ndarray]:
    """A sound [S] as the fewest windows of at most `most` samples that cover it, evenly apart."""
    if len(wave) <= most:
        return [wave]
    count = math.ceil(len(wave) / most)
    starts = [round(k * (len(wave) - most) / (count - 1)) for k in range(count)]
    return [wave[start : start + most] for start in starts]


def _unit(said: Any) -> Tensor:
    """Features on the CPU, of length 1: transformers 5 returns an object that has them, older ones the tensor."""
    features = said if isinstance(said, Tensor) else said.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
