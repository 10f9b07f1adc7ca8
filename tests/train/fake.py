"""A tiny analytic generator: the exact velocity of Gaussian data whose mean depends on the prompt and is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tempflow.algorithms import Algorithm, flow_grpo, tempflow_grpo
from tempflow.algorithms.lesson import Batch, Lesson, Role
from tempflow.algorithms.phase import LeafPhase, NoisePhase
from tempflow.config import Config
from tempflow.config.guards import GuardsConfig
from tempflow.core.ema import Ema, Frozen
from tempflow.core.objective.distill import DistributionMatching, FlowMatching
from tempflow.core.objective.preference import Supervised
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.core.times import UniformTimes
from tempflow.media import Kind, Media, Size
from tempflow.models.guidance import Guidance, guided
from tempflow.models.protocol import Conditioning, Encoded, Predict, TextInputs
from tempflow.request import Prompt
from tempflow.rewards import from_function
from tempflow.rewards.protocol import Reward
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Advantages, Experience, credit, rollout_metrics
from tempflow.train.guards import Guards
from tempflow.train.parallel import Shards
from tempflow.train.source import collect
from tempflow.train.update import learn, lessons, shuffled
from tempflow.train.weights import Drafter, Learner, Trainable, WeightSet, WeightSets, own_copy

SHAPE, SIZE = (2, 2, 2), Size(2, 2)
TOKENS = (4, 2)
"""The same latent as tokens [N, C], one for each pixel."""

PROMPTS = ("a dim lamp", "the sun", "a candle at night", "fog", "an old torch", "snow")
SPREAD = 0.5


class Velocity(nn.Module):
    """v = (x − x̂0)/σ, where x̂0 is the posterior mean of x0 ~ N(m, SPREAD²) and m = mean(condition)."""

    def __init__(self, dropout: float = 0.0, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        self.shape = shape
        self.mean = nn.Linear(2, 8)
        self.drop = nn.Dropout(dropout)
        with torch.no_grad():
            self.mean.weight.copy_(torch.linspace(-0.3, 0.3, 16).view(8, 2))
            self.mean.bias.zero_()

    def means(self, condition: Tensor) -> Tensor:
        return self.drop(self.mean(condition))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        m = self.means(condition).view(-1, *self.shape)
        s = sigma.to(x.dtype).view(-1, *[1] * len(self.shape))
        gain = (1 - s) * SPREAD**2 / ((1 - s).square() * SPREAD**2 + s.square())
        return (x - m - gain * (x - (1 - s) * m)) / s


class Fake:
    """Implements `models.protocol.Model`. `rows` lists the rows of every forward of the network, copies included."""

    name, licence = "fake", "Apache-2.0"
    shape: tuple[int, ...] = SHAPE
    makes: Kind = "picture"
    takes_sources = False
    guidance = Guidance

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self.network = Velocity(dropout, self.shape).to(dtype)
        self.dtype = dtype
        self.rows: list[int] = []
        self.network.register_forward_hook(lambda module, given, out: self.rows.append(len(out)))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule("mean")]

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        embeds = torch.stack([self.text_inputs(p).tokens["text"] for p in prompts])
        negative = torch.stack([self.text_inputs(Prompt(p.negative)).tokens["text"] for p in prompts])
        return Conditioning(tuple(prompts), {"embeds": embeds}, {"embeds": negative})

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        """One token, which the encoder hands on as it is; nothing for nothing."""
        token = torch.tensor([[len(prompt.text) / 10, sum(c in "aeiou" for c in prompt.text) / 5]])
        return TextInputs({"text": token}, {"text": torch.ones(1, dtype=torch.bool)})

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        return Encoded({"embeds": tokens["text"]}, {"text": tokens["text"].mean(1)})

    def schedule(self, steps: int, size: Size) -> Schedule:
        return linear(steps, 2.0)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        if size != SIZE:
            raise ValueError(f"height, width: {size} must be {SIZE}; nearest valid: {SIZE}")
        return self.shape

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        module, guide = self.network if network is None else network, guided(guidance)
        tokens = condition.tensors["embeds"][:, 0].to(self.dtype)
        negative = condition.negative["embeds"][:, 0].to(self.dtype)

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            v = module(x.to(self.dtype), sigma, tokens[rows])
            if guide.rows == 1:
                return v
            base = module(x.to(self.dtype), sigma, negative[rows])
            return guide(v, base)

        return predict

    def decode(self, x: Tensor, size: Size) -> Media:
        gray = (127.5 + 40 * x.float().mean(1)).clamp(0, 255).round().to(torch.uint8)
        return Media.of(gray[..., None].expand(-1, -1, -1, 3).contiguous())

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        """What `decode` rounds, [B, 1, 3, H, W]."""
        gray = (127.5 + 40 * x.float().mean(1)).clamp(0, 255) / 255
        return gray[:, None, None].expand(-1, 1, 3, -1, -1)

    def encode_media(self, media: Media, size: Size) -> Tensor:
        gray = media.pictures().float().mean(-1)
        return ((gray - 127.5) / 40)[:, None].expand(-1, 2, -1, -1).contiguous()

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = (self.network if network is None else network).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/model.safetensors")


class TokenFake(Fake):
    """Its states are tokens [B, N, C], as those of models that patch their latents before the sampler sees them."""

    name, shape = "token fake", TOKENS

    def decode(self, x: Tensor, size: Size) -> Media:
        return super().decode(x.transpose(1, 2).unflatten(2, (2, 2)), size)

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        return super().decode_pixels(x.transpose(1, 2).unflatten(2, (2, 2)), size)

    def encode_media(self, media: Media, size: Size) -> Tensor:
        return super().encode_media(media, size).flatten(2).transpose(1, 2).contiguous()


def album(folder: Path, count: int = 6) -> Path:
    """A folder with pictures, and a pairs.jsonl that names them for both offline algorithms; bright ones are chosen."""
    folder.mkdir(parents=True)
    grey = torch.Generator().manual_seed(4)
    lines: list[dict[str, str]] = []
    for number in range(count):
        line = {"prompt": PROMPTS[number % len(PROMPTS)]}
        for key, low in (("chosen", 150), ("rejected", 60)):
            pixels = torch.randint(low, low + 50, (2, 2, 1), generator=grey, dtype=torch.uint8).expand(-1, -1, 3)
            line[key] = f"{number}_{key}.png"
            Image.fromarray(pixels.contiguous().numpy()).save(folder / line[key])
        lines.append({**line, "image": line["chosen"]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Mean grey level in [0, 1]: a shift of the trained mean raises it."""
    return [sum(image.convert("L").tobytes()) / 4 / 255 for image in images]


@dataclass
class Light:
    """The same with gradients, from 0 to 1; prompts in `dark` have failed scores."""

    name: str = "light"
    dark: tuple[str, ...] = ()
    groupwise: bool = False

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        pixels = media.pictures().permute(0, 3, 1, 2)[:, None].float() / 255
        value = self.differentiable(pixels, prompts, metadata)[:, None]
        return Scores(value, value.isfinite(), (self.name,))

    def differentiable(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> Tensor:
        failed = torch.tensor([math.nan if prompt in self.dark else 1.0 for prompt in prompts])
        return pixels.flatten(1).mean(1) * failed


def weights(model: Fake) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.network.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def tempflow(**options: Any) -> Algorithm:
    return tempflow_grpo(**{"steps": 4, "seeds": 2, "branches": 3, "clip": 0.02, "kl": 0.0, **options})


def flow(**options: Any) -> Algorithm:
    return flow_grpo(**{"steps": 4, "group": 6, "clip": 0.02, "kl": 0.0, **options})


def two_roles(rollout: bool = True) -> Algorithm:
    """A policy and a fake score: Flow-GRPO's edges and the rollout's clean samples (unless without a `rollout`), then
    distribution matching from fresh noises."""
    matching = NoisePhase(DistributionMatching(), count=3)
    follows = NoisePhase(FlowMatching(), count=3, updates=2, role="fake")
    role = Role("fake", rate=2.0, weight_sets={"slow": Ema(0.5)})
    if not rollout:
        return Algorithm("matching", (matching, follows), 4, roles=(role,))
    base = flow(kl=0.05, std="group")
    samples = LeafPhase(Supervised(), Renoise(UniformTimes(2)), role="fake")
    return replace(base, name="two_roles", roles=(role,), phases=(base.first, samples, follows, matching))


class Bench:
    """What one iteration needs, without a run around it. `sharded`: the network is shared out over the ranks."""

    def __init__(
        self,
        model: Fake | None = None,
        algorithm: Algorithm | None = None,
        reward: Callable[..., Any] | Reward = brightness,
        ema: float = 0.0,
        rate: float = 0.02,
        sharded: bool = False,
        **context: Any,
    ) -> None:
        self.model = model or Fake()
        algorithm = algorithm or tempflow()
        network = self.model.network
        shards = Shards(network, self.model.blocks(network), context["world"]) if sharded else None
        self.trainable = Trainable(self.model.network)
        self.weight_sets = WeightSets.of(algorithm, self.trainable)
        sets = dict(self.weight_sets.sets)
        if "reference" in algorithm.sets:
            sets["reference"] = WeightSet(self.trainable, Frozen())
        self.sets = sets
        standard = Context(
            model=self.model,
            algorithm=algorithm,
            schedule=self.model.schedule(algorithm.steps, SIZE),
            size=SIZE,
            guidance=Guidance(),
            rewards=[reward if isinstance(reward, Reward) else from_function(reward)],
            seed=5,
            rollout_rows=64,
            train_rows=64,
            updates=1,
            max_grad_norm=1.0,
            sets={name: weights.network(shards.turn_of if shards else None) for name, weights in sets.items()},
            drafter=Drafter.of(algorithm, self.model, self.trainable, sets),
            shards=shards,
        )
        self.context = replace(standard, **context)
        self.average = WeightSet(self.trainable, Ema(ema)) if ema else None
        self.optimizer = torch.optim.AdamW(self.trainable.masters, lr=rate, weight_decay=0.0)
        self.learners = {"policy": Learner(self.trainable, self.optimizer, self.weight_sets, self.average)}
        for role in algorithm.roles:
            own = Trainable(own_copy(network))
            moves = torch.optim.AdamW(own.masters, lr=rate * role.rate, weight_decay=0.0)
            self.learners[role.name] = Learner(own, moves, WeightSets.of_role(role, own))
        roles = dict[str, nn.Module]()
        for name, learner in self.learners.items():
            roles |= {n: weights.network() for n, weights in learner.sets.sets.items()} if name != "policy" else {}
            roles |= {name: learner.trainable.network} if name != "policy" else {}
        self.context = replace(self.context, sets={**self.context.sets, **roles})
        self.counter, self.clock, self.said = Counter(), Clock(), list[str]()

    def collect(self, iteration: int = 0, prompts: Sequence[str | Prompt] = PROMPTS) -> Experience:
        given = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        return collect(self.context, given, iteration, self.counter, self.clock).of(self.context.algorithm.first)

    def lesson(
        self, experience: Experience, given: Advantages, iteration: int = 0, skip: Collection[int] = ()
    ) -> Lesson:
        """What the first phase, and only phase, learns from."""
        return lessons(self.context, experience.prompts, iteration, experience, [given], skip)[0]

    def items(self, experience: Experience, given: Advantages, iteration: int = 0, skip: Collection[int] = ()) -> Batch:
        """The first phase's items, in the order in which they are taken."""
        lesson = self.lesson(experience, given, iteration, skip)
        return shuffled(self.context.algorithm.first.items(lesson), lesson.seed, (iteration,))

    def batch(self, experience: Experience, given: Advantages, items: Batch) -> Any:
        """Those items as the objective is given them."""
        phase: Any = self.context.algorithm.first
        return phase.batch(self.lesson(experience, given), items)

    def update(self, experience: Experience, iteration: int = 0) -> dict[str, float]:
        experience = experience.of(self.context.algorithm.first)
        given = [credit(self.context, experience, phase) for phase in self.context.algorithm.phases]
        found = lessons(self.context, experience.prompts, iteration, experience, given)
        return rollout_metrics(experience, given[0].advantage) | self.learned(experience.prompts, found)

    def iterate(self, iteration: int = 0, prompts: Sequence[str | Prompt] = PROMPTS) -> dict[str, float]:
        if self.context.algorithm.rolls_out:
            return self.update(self.collect(iteration, prompts), iteration)
        given = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        return self.learned(given, lessons(self.context, given, iteration, None, ()))

    def learned(self, prompts: Sequence[Prompt], given: Sequence[Lesson]) -> dict[str, float]:
        """What the phases learn from these lessons."""
        metrics = learn(
            self.context,
            prompts,
            given,
            self.learners,
            self.counter,
            self.clock,
            Guards(GuardsConfig(), lambda iteration, alarms: None, self.said.append),
        )
        for learner in self.learners.values():
            learner.sets.update()
        return metrics


def config(output: Path, **changes: Any) -> Config:
    """A short run on the fake; nested groups are given as dictionaries."""
    given: dict[str, Any] = {
        "name": "toy",
        "iterations": 8,
        "output": str(output),
        "threads": 1,
        "rollout_rows": 64,
        "train_rows": 64,
        "algorithm": {"name": "tempflow_grpo", "steps": 4, "seeds": 2, "branches": 3, "clip": 0.02, "kl": 0.0},
    }
    groups: dict[str, dict[str, Any]] = {
        "model": {"height": 2, "width": 2},
        "data": {"prompts_per_iteration": 3},
        "optimizer": {"learning_rate": 0.05},
        "evaluation": {"every": 2, "validation_prompts": 6, "test_prompts": 12, "steps": 4, "metric": "reward"},
    }
    merged = {k: {**groups.get(k, {}), **v} if isinstance(v, dict) and k in groups else v for k, v in changes.items()}
    return Config.model_validate({**given, **groups, **merged})
