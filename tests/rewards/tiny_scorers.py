"""Small random scorers in the published layouts, what their papers' architectures make of pictures and prompts, in
float64 and without transformers, and tokenizers whose tokens are single letters."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

SIDE, PATCH, LENGTH = 32, 8, 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)

ALPHABET = sorted(ByteLevel.alphabet())
WORDS = [*ALPHABET, *(f"{letter}</w>" for letter in ALPHABET), "<|startoftext|>", "<|endoftext|>"]

CLIP: dict[str, Any] = {
    "model_type": "clip",
    "projection_dim": 20,
    "text_config": {
        "vocab_size": len(WORDS),
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": LENGTH,
        "projection_dim": 20,
        "hidden_act": "gelu",
        "bos_token_id": len(WORDS) - 2,
        "eos_token_id": len(WORDS) - 1,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 20,
        "patch_size": PATCH,
        "image_size": SIDE,
        "hidden_act": "gelu",
    },
}

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "cat", "dog", "two", "a", "of"]

BLIP: dict[str, Any] = {
    "model_type": "blip",
    "text_config": {
        "vocab_size": len(PIECES) + 2,
        "hidden_size": 24,
        "encoder_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "bos_token_id": 2,
        "sep_token_id": 3,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "image_size": SIDE,
        "layer_norm_eps": 1e-6,
    },
}


# ----------------------------------------------------------------------------------------------------------- tokenizers
def clip_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(WORDS)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def clip_ids(prompt: str) -> list[int]:
    """Of lower-case words with single spaces."""
    letters = [WORDS.index(c) for word in prompt.split() for c in (*word[:-1], f"{word[-1]}</w>")]
    start, end = len(WORDS) - 2, len(WORDS) - 1
    ids = [start, *letters[: LENGTH - 2], end]
    return ids + [end] * (LENGTH - len(ids))


def bert_ids(prompt: str) -> list[int]:
    """Of words in PIECES, without the padding."""
    return [PIECES.index(word) for word in ("[CLS]", *prompt.split()[:33], "[SEP]")]


# ------------------------------------------------------------------------------------------------------------ open_clip
def open_clip(seed: int = 0) -> dict[str, Tensor]:
    """Tensors in open_clip's layout, float32."""
    draw = _drawer(seed)
    wide, narrow, common = 32, 24, 20
    found = {
        "positional_embedding": draw(LENGTH, narrow),
        "text_projection": draw(narrow, common),
        "logit_scale": torch.tensor(math.log(100.0)),
        "visual.class_embedding": draw(wide),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, wide),
        "visual.proj": draw(wide, common),
        "visual.conv1.weight": draw(wide, 3, PATCH, PATCH),
        "token_embedding.weight": draw(len(WORDS), narrow),
    }
    for name, size in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        found |= {f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)}
    for tower, size, inner in (("visual.", wide, 64), ("", narrow, 48)):
        for place in range(2):
            block = f"{tower}transformer.resblocks.{place}"
            for name in ("ln_1", "ln_2"):
                found |= {f"{block}.{name}.weight": 1 + draw(size), f"{block}.{name}.bias": draw(size)}
            found[f"{block}.attn.in_proj_weight"] = draw(3 * size, size)
            found[f"{block}.attn.in_proj_bias"] = draw(3 * size)
            parts = (("attn.out_proj", size, size), ("mlp.c_fc", inner, size), ("mlp.c_proj", size, inner))
            for name, out, into in parts:
                found |= {f"{block}.{name}.weight": draw(out, into), f"{block}.{name}.bias": draw(out)}
    return found


def clip_picture(t: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The picture's feature, not normalised. pixels: float64 [N, 3, SIDE, SIDE], colours normalised."""
    t = {name: tensor.double() for name, tensor in t.items()}
    x = _patches(pixels, t["visual.conv1.weight"])
    x = torch.cat([t["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + t["visual.positional_embedding"]
    x = _clip_tower(t, _norm(t, "visual.ln_pre", x, 1e-5), "visual.", heads=4, causal=False)
    return _norm(t, "visual.ln_post", x[:, 0], 1e-5) @ t["visual.proj"]


def clip_prompt(t: dict[str, Tensor], ids: Tensor) -> Tensor:
    t = {name: tensor.double() for name, tensor in t.items()}
    x = t["token_embedding.weight"][ids] + t["positional_embedding"]
    x = _norm(t, "ln_final", _clip_tower(t, x, "", heads=3, causal=True), 1e-5)
    return x[torch.arange(len(ids)), ids.argmax(1)] @ t["text_projection"]


def clip_cosine(t: dict[str, Tensor], pixels: Tensor, prompts: list[str]) -> Tensor:
    a, b = clip_picture(t, pixels), clip_prompt(t, torch.tensor([clip_ids(prompt) for prompt in prompts]))
    return torch.tensor([float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)], dtype=torch.float64)


def _clip_tower(t: dict[str, Tensor], x: Tensor, tower: str, heads: int, causal: bool) -> Tensor:
    for place in range(2):
        block = f"{tower}transformer.resblocks.{place}"
        y = _norm(t, f"{block}.ln_1", x, 1e-5)
        q, k, v = (y @ t[f"{block}.attn.in_proj_weight"].T + t[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
        mask = torch.full((x.shape[1],) * 2, -math.inf, dtype=torch.float64).triu(1) if causal else torch.tensor(0.0)
        x = x + _linear(t, f"{block}.attn.out_proj", attend(q, k, v, heads, mask))
        y = _linear(t, f"{block}.mlp.c_fc", _norm(t, f"{block}.ln_2", x, 1e-5))
        x = x + _linear(t, f"{block}.mlp.c_proj", gelu(y))
    return x


# ----------------------------------------------------------------------------------------------------------------- BLIP
def image_reward(seed: int = 0) -> dict[str, Tensor]:
    """Tensors in ImageReward.pt's layout, float32."""
    draw = _drawer(seed)
    wide, narrow = 32, 24
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    found = {
        f"{vision}.cls_token": draw(1, 1, wide),
        f"{vision}.pos_embed": draw(1, (SIDE // PATCH) ** 2 + 1, wide),
        f"{vision}.patch_embed.proj.weight": draw(wide, 3, PATCH, PATCH),
        f"{vision}.patch_embed.proj.bias": draw(wide),
        f"{text}.embeddings.word_embeddings.weight": draw(len(PIECES) + 2, narrow),
        f"{text}.embeddings.position_embeddings.weight": draw(40, narrow),
        f"{text}.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": draw(4, wide),
        "blip.vision_proj.bias": draw(4),
        "blip.text_proj.weight": draw(4, narrow),
        "blip.text_proj.bias": draw(4),
    }

    def norm(name: str, size: int) -> None:
        found.update({f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)})

    def linear(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": draw(out, into), f"{name}.bias": draw(out)})

    norm(f"{vision}.norm", wide)
    norm(f"{text}.embeddings.LayerNorm", narrow)
    for place in range(2):
        block = f"{vision}.blocks.{place}"
        norm(f"{block}.norm1", wide)
        norm(f"{block}.norm2", wide)
        for name, out, into in (("attn.qkv", 96, 32), ("attn.proj", 32, 32), ("mlp.fc1", 64, 32), ("mlp.fc2", 32, 64)):
            linear(f"{block}.{name}", out, into)
        layer = f"{text}.encoder.layer.{place}"
        for kind, into in (("attention", narrow), ("crossattention", wide)):
            linear(f"{layer}.{kind}.self.query", narrow, narrow)
            linear(f"{layer}.{kind}.self.key", narrow, into)
            linear(f"{layer}.{kind}.self.value", narrow, into)
            linear(f"{layer}.{kind}.output.dense", narrow, narrow)
            norm(f"{layer}.{kind}.output.LayerNorm", narrow)
        linear(f"{layer}.intermediate.dense", 48, narrow)
        linear(f"{layer}.output.dense", narrow, 48)
        norm(f"{layer}.output.LayerNorm", narrow)
    return found | {f"mlp.{name}": tensor for name, tensor in head(narrow, seed + 1).items()}


def blip_reward(t: dict[str, Tensor], pixels: Tensor, prompts: list[str]) -> Tensor:
    """ImageReward of each picture and its prompt, float64; each text without its padding."""
    t = {name: tensor.double() for name, tensor in t.items()}
    return torch.stack([_blip_one(t, picture[None], prompt) for picture, prompt in zip(pixels, prompts, strict=True)])


def _blip_one(t: dict[str, Tensor], pixels: Tensor, prompt: str) -> Tensor:
    v = "blip.visual_encoder"
    x = _patches(pixels, t[f"{v}.patch_embed.proj.weight"]) + t[f"{v}.patch_embed.proj.bias"]
    x = torch.cat([t[f"{v}.cls_token"], x], 1) + t[f"{v}.pos_embed"]
    nothing = torch.tensor(0.0)
    for place in range(2):
        block = f"{v}.blocks.{place}"
        q, k, w = _linear(t, f"{block}.attn.qkv", _norm(t, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + _linear(t, f"{block}.attn.proj", attend(q, k, w, 4, nothing))
        y = gelu(_linear(t, f"{block}.mlp.fc1", _norm(t, f"{block}.norm2", x, 1e-6)))
        x = x + _linear(t, f"{block}.mlp.fc2", y)
    seen = _norm(t, f"{v}.norm", x, 1e-6)
    e = "blip.text_encoder.embeddings"
    ids = bert_ids(prompt)
    y = t[f"{e}.word_embeddings.weight"][ids] + t[f"{e}.position_embeddings.weight"][: len(ids)]
    y = _norm(t, f"{e}.LayerNorm", y[None], 1e-12)
    for place in range(2):
        layer = f"blip.text_encoder.encoder.layer.{place}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            at = y if source is None else source
            q = _linear(t, f"{layer}.{kind}.self.query", y)
            k, w = _linear(t, f"{layer}.{kind}.self.key", at), _linear(t, f"{layer}.{kind}.self.value", at)
            z = _linear(t, f"{layer}.{kind}.output.dense", attend(q, k, w, 3, nothing))
            y = _norm(t, f"{layer}.{kind}.output.LayerNorm", z + y, 1e-12)
        z = _linear(t, f"{layer}.output.dense", gelu(_linear(t, f"{layer}.intermediate.dense", y)))
        y = _norm(t, f"{layer}.output.LayerNorm", z + y, 1e-12)
    rated = layers({name.removeprefix("mlp."): x for name, x in t.items() if name.startswith("mlp.")}, y[0, 0])
    return (rated[0] - 0.16717362830052426) / 1.0333394966054072


# ---------------------------------------------------------------------------------------------------------------- heads
def head(width: int, seed: int = 0, hidden: tuple[int, ...] = (7, 6, 5, 4)) -> dict[str, Tensor]:
    """Five linear layers as they are published, float32."""
    draw, sizes = _drawer(seed), (width, *hidden, 1)
    found: dict[str, Tensor] = {}
    for place, (into, out) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        found |= {f"layers.{place}.weight": draw(out, into), f"layers.{place}.bias": draw(out)}
    return found


def layers(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """One layer after the other, float64."""
    for place in (0, 2, 4, 6, 7):
        x = x @ t[f"layers.{place}.weight"].double().T + t[f"layers.{place}.bias"].double()
    return x


# ---------------------------------------------------------------------------------------------------------------- parts
def pixels_of(pictures: Tensor) -> Tensor:
    """uint8 [N, SIDE, SIDE, 3] to float64 [N, 3, SIDE, SIDE]."""
    return ((pictures.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Head by head."""
    width = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        a, b, c = (x[..., h * width : (h + 1) * width] for x in (q, k, v))
        parts.append(torch.softmax(a @ b.transpose(1, 2) / math.sqrt(width) + mask, -1) @ c)
    return torch.cat(parts, -1)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """Patches row by row, [N, P, width]."""
    cut = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, 3, rows, columns, PATCH, PATCH]
    return torch.einsum("ncrsij,dcij->nrsd", cut, weight).flatten(1, 2)


def _norm(t: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def _linear(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def _drawer(seed: int):
    source = torch.Generator().manual_seed(seed)
    return lambda *sides: 0.3 * torch.randn(*sides, generator=source)
