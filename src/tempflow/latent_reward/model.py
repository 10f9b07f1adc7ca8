"""R(x_σ, σ, prompt): a preference score of a noisy latent, made from a diffusion transformer's own early blocks.

DRM (CVPR 2026, arXiv 2605.25661), as a secondary source has it: SD3.5-M without its last three blocks, the picture
tokens through an MLP, back on their grid, a convolution, a pool, an MLP to one number. Not stated there, and chosen
here: a LayerNorm in front, the head's width, SiLU, a 3×3 kernel, a mean as the pool, a last layer that starts at zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.models import TRUNKS
from tempflow.models.protocol import Conditioning, Model, Predict, Trunk
from tempflow.names import nearest

WEIGHTS, RECORD = "latent_reward.safetensors", "latent_reward.json"
FORMAT = 1
EMBEDDED = "shapes"
"""Name of the reward that comes with the package, made of the `shapes` model."""
DROP = 3
"""Blocks that the paper leaves off; fewer where less than `LEAST` would be left."""
LEAST = 2
WIDTH = 256


@dataclass(frozen=True)
class RewardSpec:
    """What a `LatentReward` is built from.

    family       class of the network that it is a copy of, one of `models.TRUNKS`
    transformer  that network's configuration
    kept         how many of its blocks are kept, 1 … all
    width        channels of the head, ≥ 1
    licence      of the weights that it was made from; "unknown" where nobody said

    Raises ValueError for a family without a trunk, a field out of range or a configuration that lacks a field.
    """

    family: str
    transformer: Mapping[str, Any]
    kept: int
    width: int = WIDTH
    licence: str = "unknown"

    def __post_init__(self) -> None:
        trunk = _trunk_of(self.family)
        for field in (trunk.layers, *trunk.fields):
            value = self.transformer.get(field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"transformer.{field}: {value!r} must be a whole number; nearest valid: 1")
        layers = self.transformer[trunk.layers]
        if not 1 <= self.kept <= layers:
            near = min(max(self.kept, 1), layers)
            raise ValueError(f"kept: {self.kept} of {layers} blocks cannot be kept; nearest valid: {near}")
        if self.width < 1:
            raise ValueError(f"width: {self.width} is too small; nearest valid: 1, {WIDTH} is usual")


def _trunk_of(family: str) -> type[Trunk]:
    """Raises ValueError for a network's class without one."""
    if family not in TRUNKS:
        raise ValueError(
            f"transformer: {family[:60]} has no latent reward; nearest valid: {nearest(family, tuple(TRUNKS))}"
        )
    return TRUNKS[family]


class LatentReward(nn.Module):
    """Early blocks of a transformer and a head, float32, frozen; fresh weights are a function of `seed` alone.

    `forward` is called as the transformer itself is, so that an adapter binds σ and prompts for both: see `bind`.
    Scores mean something beside scores at the same σ only.
    """

    def __init__(self, spec: RewardSpec, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk: Any = _trunk_of(spec.family)(spec.transformer, spec.kept)
            self.head = _Head(self.trunk.inner, spec.width)
        self.requires_grad_(False).eval()

    @classmethod
    def from_transformer(
        cls,
        transformer: nn.Module,
        *,
        drop: int | None = None,
        width: int = WIDTH,
        seed: int = 0,
        licence: str = "unknown",
    ) -> LatentReward:
        """A reward whose blocks are copies of `transformer`'s, which stays as it is; the head is fresh.

        drop  how many of the last blocks are left off; None: 3 as in the paper, less where under two would be left

        Raises ValueError for another class of network, one that a LoRA was added to, or a `drop` that leaves no block.
        """
        family = type(transformer).__name__
        trunk = _trunk_of(family)
        state = transformer.state_dict()
        if any(".lora_" in name for name in state):
            raise ValueError("transformer: it has a LoRA; make the reward of the model as loaded, before add_lora")
        told: Any = transformer
        config = {k: v for k, v in told.config.items() if not k.startswith("_")}
        layers = config[trunk.layers]
        leave = min(DROP, max(layers - LEAST, 0)) if drop is None else drop
        if not 0 <= leave < layers:
            near = min(max(leave, 0), layers - 1)
            raise ValueError(f"drop: {leave} of {layers} blocks cannot be left off; nearest valid: {near}")
        reward = cls(RewardSpec(family, config, layers - leave, width, licence), seed)
        reward.trunk.load_state_dict({name: state[name] for name in reward.trunk.state_dict()})
        return reward.to(next(transformer.parameters()).device)

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor]:
        """Scores, one tensor [B] in the reward's dtype, inside a tuple as the transformer returns its velocity.

        It is called as that is, with what the trunk takes (`models.protocol.Trunk`). Raises ValueError where a shape is
        not that of the transformer it was made from.
        """
        tokens, grid = self.trunk(*inputs, **named)
        return (self.head(tokens, grid),)

    def check_fits(self, network: nn.Module) -> None:
        """Raises ValueError unless `network` is a transformer whose latents and prompts this one can read."""
        how = "scripts/train_latent_reward.py makes one of the model's own"
        if type(network).__name__ != self.spec.family:
            raise ValueError(f"a latent reward of {self.spec.family} cannot judge {type(network).__name__}; {how}")
        told: Any = network
        for field in _trunk_of(self.spec.family).fields:
            mine, theirs = self.spec.transformer[field], told.config[field]
            if mine != theirs:
                raise ValueError(f"the latent reward's {field} is {mine}, the model's {theirs}; {how}")

    def save(self, folder: str | Path, bits: int | None = None) -> None:
        """Writes weights as safetensors, and beside them a JSON record of what they are; no pickle.

        bits  2 … 8: matrices in whole numbers of so many bits with a float16 scale a row, all else in float16;
              None: everything in float32

        Raises ValueError for another number of bits.
        """
        if bits is not None and not 2 <= bits <= 8:
            raise ValueError(f"bits: {bits} is none of 2 … 8; nearest valid: {min(max(bits, 2), 8)}")
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(state if bits is None else _packed(state, self._matrices(), bits), place / WEIGHTS)
        record = {"format": FORMAT, "bits": bits, **asdict(self.spec)}
        (place / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> LatentReward:
        """What `save` wrote, in eval mode; "shapes" is the one that comes with the package.

        Raises ValueError, naming the file, where one is missing, broken, of another format, or does not fit the other.
        """
        place = embedded_folder() if folder == EMBEDDED else Path(folder)
        for name in (RECORD, WEIGHTS):
            if not (place / name).is_file():
                near = [str(p.parent) for p in sorted(place.parent.glob(f"*/{RECORD}"))]
                hint = f"nearest valid: {near[0]!r}" if near else "LatentReward.save makes such a folder"
                raise ValueError(f"latent reward: {str(place)!r} has no {name}; {hint}")
        spec, bits = _read_record(place / RECORD)
        reward = cls(spec)
        try:
            state = load_file(place / WEIGHTS)
            reward.load_state_dict(state if bits is None else _unpacked(state, reward._matrices(), bits))
        except SafetensorError as error:
            raise ValueError(f"latent reward: {str(place / WEIGHTS)!r} is not safetensors ({error})") from error
        except (RuntimeError, KeyError, ValueError) as error:  # names and shapes that differ
            what = " ".join(str(error).split())
            raise ValueError(f"latent reward: {WEIGHTS} does not fit {RECORD} in {str(place)!r} ({what})") from error
        return reward.to(device)

    def _matrices(self) -> dict[str, torch.Size]:
        """The shapes of those parameters that `save` may round."""
        return {name: p.shape for name, p in self.named_parameters() if p.dim() > 1}


def _packed(state: Mapping[str, Tensor], matrices: Mapping[str, torch.Size], bits: int) -> dict[str, Tensor]:
    """Each matrix as a stream of `bits`-bit numbers and, as NAME.scale, what a unit is worth in each of its rows."""
    most = 2 ** (bits - 1) - 1
    packed = {name: tensor.half() for name, tensor in state.items() if name not in matrices}
    for name in matrices:
        rows = state[name].float().flatten(1)
        scale = (rows.abs().amax(1) / most).clamp_min(2.0**-24).half()
        whole = (rows / scale.float()[:, None]).round().clamp(-most, most) + most
        planes = np.unpackbits(whole.to(torch.uint8).numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
        packed |= {name: torch.from_numpy(np.packbits(planes)), f"{name}.scale": scale}
    return packed


def _unpacked(state: dict[str, Tensor], matrices: Mapping[str, torch.Size], bits: int) -> dict[str, Tensor]:
    """What `_packed` was made of, rounded."""
    whole = dict(state)
    for name, shape in matrices.items():
        packed, scale, count = whole.pop(name), whole.pop(f"{name}.scale"), shape.numel()
        planes = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
        numbers = np.packbits(np.pad(planes, ((0, 0), (8 - bits, 0))), axis=1)
        rows = torch.from_numpy(numbers).float().view(len(scale), -1) - (2 ** (bits - 1) - 1)
        whole[name] = (rows * scale.float()[:, None]).view(shape)
    return whole


def embedded_folder() -> Path:
    """Where the package's own reward lies."""
    return Path(str(resources.files("tempflow"))) / "shapes" / "latent_reward"


def bind(model: Model, reward: nn.Module, condition: Conditioning) -> Predict:
    """score(x [B, C, h, w], sigma [B], rows [B]) -> [B]: the reward with prompts bound by the model's own adapter.

    So σ, prompts and dtypes reach it as they reach the transformer; a bfloat16 model's latents arrive in bfloat16.
    """
    return model.predictor(condition, 1.0, network=reward)


class _Head(nn.Module):
    """Tokens [B, h·w, d] on a grid (h, w) -> scores [B]; 0 for all until trained."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.pooled = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        picture = self.tokens(tokens).mT.unflatten(2, grid)
        pooled = nn.functional.silu(self.near(picture)).mean(dim=(2, 3))
        return self.out(nn.functional.silu(self.pooled(pooled))).squeeze(1)


def _read_record(file: Path) -> tuple[RewardSpec, int | None]:
    """What the reward is built from, and in how many bits its matrices are kept."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"latent reward: {str(file)!r} is not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("family") not in TRUNKS:
        known = " or ".join(map(repr, TRUNKS))
        raise ValueError(f"latent reward: {str(file)!r} must say format {FORMAT} and family {known}")
    kinds = {"family": str, "transformer": dict, "kept": int, "width": int, "licence": str}
    fields: dict[str, Any] = {name: record.get(name) for name in kinds}
    for (name, value), kind in zip(fields.items(), kinds.values(), strict=True):
        if not isinstance(value, kind):
            raise ValueError(f"latent reward: {name} in {str(file)!r} is {value!r}; it must be a {kind.__name__}")
    bits = record.get("bits")
    if bits is not None and bits not in range(2, 9):
        raise ValueError(f"latent reward: bits in {str(file)!r} is {bits!r}; it must be null or 2 … 8")
    return RewardSpec(**fields), bits
