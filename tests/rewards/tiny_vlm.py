"""A vision-language model of the Qwen2-VL kind, so small that a test can build it, with a tokenizer of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
MEDIA = ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
WIDTH = 32


def tokenizer_of(reward_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["a red cat " * 8, "quality rating picture prompt generated clip motion errors bodies objects " * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*CONTROL, *MEDIA], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.add_tokens(list(reward_tokens), special_tokens=True)
    return fast


def config_of(tokenizer: PreTrainedTokenizerFast, rows: int) -> Qwen2VLConfig:
    ids: Any = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def drawn(module: torch.nn.Module, seed: int) -> None:
    """Weights large enough for every input to show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers 4.45, in which the checkpoints were trained, named the network's tensors."""
    return {
        (
            f"visual.{name.removeprefix('visual.')}"
            if name.startswith("visual.")
            else name.replace("language_model.", "model.")
        ): t
        for name, t in tensors.items()
    }


def base_in(folder: Path) -> Path:
    """The released model's folder: configuration and tokenizer, which do not know the reward's tokens; no weights. Its
    vocabulary has more rows than tokens, as the released one's has."""
    tokenizer = tokenizer_of()
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    config_of(tokenizer, len(tokenizer) + 17).save_pretrained(folder)
    return folder
