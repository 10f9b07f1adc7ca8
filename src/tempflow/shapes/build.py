"""The untrained `shapes` pipeline: a StableDiffusion3Pipeline in miniature, every slot filled.

16 picture tokens (a 32×32 picture, 8×8×8 latents, patch 2) beside 10 CLIP and 10 T5 tokens. Word-level tokenizers: the
world's grammar has 45 words. `pipe(prompt, height=32, width=32, max_sequence_length=10)` sees what training saw.
"""

# diffusers' own annotations are narrower than what it takes (tuples of one, a CLIPTokenizer), and its exports are lazy.
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tempflow.shapes.prompts import specs

TOKENS = 10  # per text stream: up to eight words and the ends
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")


def words() -> list[str]:
    """Every word of the world's prompts."""
    return sorted({word for spec in specs() for word in spec.prompt.split()})


def tokenizer(with_bos: bool, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Word-level; CLIP's closes with <bos> … <eos>, T5's with <eos>."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if with_bos else "$A <eos>",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=TOKENS,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def _clip(vocabulary: int, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    return CLIPTextModelWithProjection(config)


def autoencoder(channels: tuple[int, ...] = (16, 32, 48), latent_channels: int = 8) -> AutoencoderKL:
    """Four times smaller latents, without attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer(heads: int = 3, layers: int = 4) -> SD3Transformer2DModel:
    """SD 3.5's block (joint attention, RMS-normalised queries and keys) at width 64·heads."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=128,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def pipeline(seed: int = 0, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """A pipeline with random weights, a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = words()
        clip, t5 = tokenizer(True, known), tokenizer(False, known)
        encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=3,
            )
        )
        return StableDiffusion3Pipeline(
            transformer=transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=autoencoder(),
            text_encoder=_clip(len(clip), 64),
            tokenizer=clip,
            text_encoder_2=_clip(len(clip), 64),
            tokenizer_2=tokenizer(True, known),
            text_encoder_3=encoder_3,
            tokenizer_3=t5,
        )
