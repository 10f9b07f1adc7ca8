"""What the families share: a tokenizer, an autoencoder, visible weights, and the loop over the sampler's grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

Size = tuple[int, int]
"""(height, width) in pixels."""

PROMPTS = ["a red cat on the house", "a small bird", "the large dog under a blue tree"]
NEGATIVES = ["a small house", "blue", "the bird on a tree"]
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>", "<|im_start|>", "<|im_end|>")
WORDS = tuple(sorted({word for text in (*PROMPTS, *NEGATIVES) for word in text.split()}))
PAD, BOS, UNK, EOS = range(4)
VOCABULARY = len(SPECIAL) + len(WORDS) + 4
"""Tokens of every tiny tokenizer; "\\n" and the names of a chat's roles are among them."""

QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's chat template in short: with thinking off, an empty thought follows."""


class Family(Protocol):
    """The names that each file of this folder offers; a file with two pipelines offers two such objects.

    Latents are [B, C, h, w] everywhere, never packed.
    """

    PROMPTS: list[str]
    SIZES: tuple[Size, Size]
    GUIDANCE: float
    SHIFTED: dict[str, Any]
    """A change of the scheduler's configuration that makes another grid."""

    def pipeline(self) -> DiffusionPipeline: ...

    def noise_shape(self, pipe: Any, size: Size) -> tuple[int, int, int]: ...

    def theirs(
        self,
        pipe: Any,
        prompts: list[str],
        negatives: list[str],
        steps: int,
        size: Size,
        guidance: float,
        latents: Tensor,
        output: str = "latent",
    ) -> Tensor:
        """The pipeline's own `__call__` from that noise: latents, or pictures as numpy [B, H, W, 3] for "np"."""
        ...

    def encode(self, pipe: Any, prompts: list[str]) -> Any: ...

    def encode_negatives(self, pipe: Any, negatives: list[str]) -> Any: ...

    def grid(self, pipe: Any, steps: int, size: Size) -> tuple[Tensor, Tensor]: ...

    def velocity(self, pipe: Any, x: Tensor, t: Tensor, positive: Any, negative: Any, guidance: float) -> Tensor: ...


def plain(
    family: Any,
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    **extra: float,
) -> Tensor:
    """Latents by Euler's rule over the family's own grid, from `latents`: x ← x + (σ' − σ)·v(x, t)."""
    with torch.no_grad():
        positive, negative = family.encode(pipe, prompts), family.encode_negatives(pipe, negatives)
        timesteps, sigmas = family.grid(pipe, steps, size)
        x = latents
        for t, here, there in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
            x = x + (there - here) * family.velocity(pipe, x, t, positive, negative, guidance, **extra)
    return x


def fresh(scheduler: Any) -> Any:
    """A scheduler of the same configuration without the state that a call leaves behind."""
    return type(scheduler).from_config(scheduler.config)


def guided(run: Callable[[Any], Tensor], positive: Any, negative: Any, guidance: float) -> Tensor:
    """Classifier-free guidance, v_∅ + g·(v_c − v_∅); at g = 1 the negative branch is not computed."""
    v = run(positive)
    if guidance == 1:
        return v
    base = run(negative)
    return base + guidance * (v - base)


def pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] → [B, h·w, 4·C]: 2×2 patches row by row, channels in the order (C, 2, 2)."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, to [B, C, height, width]."""
    x = x.view(len(x), height // 2, width // 2, x.shape[-1] // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), -1, height, width)


# ----------------------------------------------------------------------------------------------------------- building
def build(make: Callable[[], DiffusionPipeline]) -> Any:
    """The pipeline that `make` builds, with every weight redrawn, the same on each call and on no account noisy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                redraw(part)
                part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def redraw(network: nn.Module) -> None:
    """Draws weights ~ N(0, 1/fan_in), biases and the scales of norms with a spread of 0.1.

    A fresh network has zeros in its last layers and its modulations, so it would ignore text, time and guidance.
    """
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in network.named_parameters():
        drawn, inputs = torch.randn_like(parameter), parameter.numel() // max(1, len(parameter))
        if name.endswith("bias"):
            parameter.copy_(0.1 * drawn)
        elif id(parameter) in tables:
            parameter.copy_(drawn)
        elif inputs == 1:
            parameter.copy_(1 + 0.1 * drawn)
        else:
            parameter.copy_(drawn * inputs**-0.5)


def tokenizer(
    length: int,
    template: str = "$A <eos>",
    pad: str = "<pad>",
    side: str = "right",
    chat: str | None = None,
    words: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """One token a word, punctuation mark and line break. `template` says where <bos> and <eos> stand.

    `words` are more of them; what is in no list becomes <unk>. `chat` is a chat template in Jinja.
    """
    known = (*SPECIAL, *WORDS, "\n", "system", "user", "assistant", *words)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=length,
        pad_token=pad,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=side,
    )
    if chat is not None:
        made.chat_template = chat
    return made


def length(tokenizer: Any, default: int) -> int:
    """A text's length in tokens: the pipeline's default, or what its tokenizer allows where that is less."""
    return min(default, tokenizer.model_max_length)


def autoencoder(channels: int, levels: int = 2, **settings: Any) -> AutoencoderKL:
    """Each level but the first halves the sides."""
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": (4,) * (levels - 1) + (8,),
            "layers_per_block": 1,
            "latent_channels": channels,
            "norm_num_groups": 4,
            "sample_size": 32,
            "scaling_factor": 0.7,
            "shift_factor": 0.2,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **settings,
        }
    )
