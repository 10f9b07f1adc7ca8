"""What a rank of the data-parallel tests does: `torchrun`'s environment is set by the test. Writes JSON and tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from every import from_noises, on_ranks
from fake import (
    PROMPTS,
    SHAPE,
    SIZE,
    Bench,
    Fake,
    Light,
    Velocity,
    album,
    brightness,
    config,
    flow,
    tempflow,
    two_roles,
)
from kinds import patchy as by_content
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import built
from tempflow.algorithms import (
    Algorithm,
    dapo,
    dgpo,
    diffusion_dpo,
    diffusion_nft,
    e2po,
    gcpo,
    sft,
    sol_rl,
    v_grpo,
    vipo,
)
from tempflow.algorithms.phase import NoisePhase
from tempflow.config import Config
from tempflow.core.objective.reward_gradient import LateStep, RewardGradient
from tempflow.data.pictures import Pictures
from tempflow.data.prompts import load_prompts
from tempflow.request import Prompt
from tempflow.train import parallel as exchange
from tempflow.train.experience import credit
from tempflow.train.parallel import World, join, leave
from tempflow.train.trainer import train
from tempflow.train.weights import part

# groups are multiples of three: `patchy` fails every third picture of a call, which must not depend on the ranks
ALGORITHMS = {
    "flow": lambda: flow(kl=0.05, std="group"),
    "flow_global": lambda: flow(kl=0.05, std="global"),
    "tempflow": lambda: tempflow(kl=0.05),
    "tempflow_batch": lambda: tempflow(std_group="batch"),
    "nft": lambda: diffusion_nft(steps=4, group=6),
    "nft_norms": lambda: diffusion_nft(steps=4, group=6),
    "dgpo": lambda: dgpo(steps=4, group=6),
    "v_grpo": lambda: v_grpo(steps=4, group=6, pairs=3),
    "gcpo": lambda: gcpo(steps=4, group=6, sizes=(1, 2), share=1.0, clip=0.02),
    "vipo": lambda: vipo(steps=4, group=6, kind="flow", noise_level=0.7, clip=0.5),
    "e2po": lambda: e2po(steps=4, noises=2, conditions=3),
    "sol_rl": lambda: sol_rl(steps=4, group=6, pool=9, draft_steps=2),
    "dapo": lambda: dapo(steps=4, group=6, clip=0.02, clip_high=0.03),
    "diffusion_dpo": lambda: diffusion_dpo(pairs=3, beta=20.0),
    "sft": lambda: sft(pairs=3, kl=0.1),
    "two_roles": two_roles,
    "late": lambda: Algorithm("late", (NoisePhase(RewardGradient(LateStep(2)), count=1, updates=3),), 4),
}
FROM_NOISES = {
    name.replace(",", "").replace(" ", "_"): name
    for name, case in CASES.items()
    if "margin" not in case.fields and from_noises(built(case))
}
"""The golden cases of what learns from starting noises, one of every such algorithm at least; without those of a
margin, which the fake's rewards have all reached."""
ALGORITHMS |= {short: lambda name=name: built(CASES[name]) for short, name in FROM_NOISES.items()}


class Routed(Velocity):
    """With experts of one shape, by the prompt: the first rank's prompts use one, the second's another, and nobody the
    last."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 8) for _ in range(3))
        for number, expert in enumerate(self.experts):
            nn.init.constant_(expert.weight, 0.1 + number)
            nn.init.zeros_(expert.bias)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        second = ~torch.isin(condition[:, 0], FIRST)
        shift = torch.zeros(len(x), 8)
        for expert, rows in zip(self.experts, (~second, second), strict=False):
            if rows.any():
                shift = shift.index_put((rows.nonzero()[:, 0],), expert(condition[rows]))
        return super().forward(x, sigma, condition) - shift.view(-1, *SHAPE)


FIRST = torch.tensor([len(prompt) / 10 for prompt in PROMPTS[:2]])
"""By this the prompts of the first of two ranks are told from the others."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 33), nn.Linear(33, 8)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2) / 4)

    def forward(self, shift: torch.Tensor) -> torch.Tensor:
        return shift + self.down(torch.tanh(self.up(shift))) + 0.1 * shift @ self.lora_a.T @ self.lora_b.T


class Deep(Velocity):
    """With layers that are checkpointed as diffusers does it, and a number without a dimension. `gathered`: bytes of
    whole parameters, seen between any two layers, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.gathered = list[int]()

    def means(self, condition: torch.Tensor) -> torch.Tensor:
        shift = self.gain.to(condition.dtype) * self.mean(condition)
        for layer in self.layers:
            again = torch.is_grad_enabled()
            shift = checkpoint(layer.__call__, shift, use_reentrant=False) if again else layer(shift)
            self.look()
            if shift.requires_grad:
                shift.register_hook(lambda _: self.look())
        return shift

    def look(self) -> None:
        self.gathered.append(sum(p.nbytes for p in self.parameters() if not isinstance(p, DTensor)))


class DeepFake(Fake):
    """`lora`: only its layers' low-rank parts are trained, which stand beside their weights."""

    def __init__(self, dtype: torch.dtype, lora: bool) -> None:
        super().__init__(dtype=dtype)
        self.network = Deep().to(dtype)
        self.network.gain.data = self.network.gain.data.float()
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_("lora" in name if lora else True)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return list(network.get_submodule("layers").children())


def fake(words: Sequence[str]) -> Fake:
    if "deep" in words:
        return DeepFake(torch.bfloat16 if "half" in words else torch.float32, "lora" in words)
    model = Fake()
    if "routed" in words:
        model.network = Routed()
    return model


def patchy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Groups of different sizes and worth: some fail, one has no spread."""
    values = brightness(images, prompts)
    return [
        None if p == "fog" and n % 3 == 0 else 0.5 if p == "snow" else v
        for n, (p, v) in enumerate(zip(prompts, values, strict=True))
    ]


def half_broken(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Nothing to learn from the first two prompts, which are the first rank's of two."""
    values = brightness(images, prompts)
    return [None if p == PROMPTS[0] else 0.5 if p == PROMPTS[1] else v for p, v in zip(prompts, values, strict=True)]


def one_update(case: str, out: Path, mode: str, world: World) -> None:
    """Loss, advantages, gradients and one SGD step of an iteration.

    case: an algorithm's name behind words. "idle": the first two prompts teach nothing and have broken latents;
    "routed": each rank's prompts use parameters of their own; "apart": the other weight sets are far from the policy;
    "twice": a second iteration; "few": of two prompts; "updates": two updates; "deep": a checkpointed network; "lora",
    "half": of that, what is trained, and its dtype.
    """
    *words, name = case.split(" ")
    rows: dict[str, int] = {"train_rows": 7, "rollout_rows": 11, "rollout_leaves": 20}
    reward: Any = half_broken if "idle" in words else patchy
    algorithm = ALGORITHMS[name]()
    if from_noises(algorithm):  # a call's pictures are a minibatch's: what fails must not depend on its place there
        rows["train_rows"] = 20
        reward = Light(dark=("fog",)) if algorithm.through_rewards else by_content
    if "updates" in words:
        rows["updates"] = 2
    patched = Bench(fake(words), algorithm, reward, world=world, ema=0.5, sharded=mode == "fsdp", **rows)
    trainable = patched.trainable
    for weights in patched.sets.values() if "apart" in words else ():
        weights.load({n: 1.1 * whole(value) + 0.02 for n, value in weights.named().items()}, weights.updates)
    if name == "nft_norms":
        patched.context = replace(patched.context, norms=True)
        with torch.no_grad():
            patched.model.network.mean.bias.add_(torch.linspace(-1, 2, 8))
    optimizer = torch.optim.SGD(trainable.masters, lr=0.1, momentum=0.5, weight_decay=0.1)
    prompts: Sequence[str | Prompt] = PROMPTS[: 2 if "few" in words else 5]
    given = patched.context.algorithm.offline
    if given is not None:
        file = album(out.parent / f"{out.name}_album_{world.rank}")
        prompts = load_prompts(str(file), uses=("chosen", "rejected", "image"))[:5]
        patched.context = replace(patched.context, pictures=Pictures.beside(str(file), given.keys, SIZE))
    seen: dict[str, torch.Tensor] = {}
    kept = optimizer.step

    def step(*args: Any) -> Any:
        named = zip(trainable.names, trainable.masters, strict=True)
        seen.update({n: whole(m.grad) for n, m in named if m.grad is not None})
        return kept(*args)

    optimizer.step = step  # type: ignore[method-assign]
    for role, learner in patched.learners.items():
        own = optimizer if role == "policy" else torch.optim.SGD(learner.trainable.masters, lr=0.2, momentum=0.5)
        patched.learners[role] = replace(learner, optimizer=own)
    metrics, judged = dict[str, float](), None
    for iteration in range(2 if "twice" in words else 1):
        if not patched.context.algorithm.rolls_out:
            metrics = patched.iterate(iteration, prompts)
            continue
        experience = patched.collect(iteration, prompts=prompts)
        judged = credit(patched.context, experience)
        if "idle" in words:
            forest = experience.forest
            untaught = forest.edges.prompt < 2
            forest.nodes[torch.cat([forest.edges.parent[untaught], forest.edges.child[untaught]])] = torch.nan
        metrics = patched.update(experience, iteration)
    assert patched.average is not None
    tensors = {f"gradient/{n}": t for n, t in seen.items()}
    tensors |= {f"after/{n}": whole(m.detach()) for n, m in zip(trainable.names, trainable.masters, strict=True)}
    for set_name, weights in {"average": patched.average, **patched.sets}.items():
        tensors |= {f"{set_name}/{n}": whole(value) for n, value in weights.named().items()}
    for role, learner in patched.learners.items():
        tensors |= {f"{role}/{n}": whole(value) for n, value in learner.trainable.named().items()}
        tensors |= {f"{role}/{s}/{n}": whole(v) for s, w in learner.sets.sets.items() for n, v in w.named().items()}
    if judged is not None:
        tensors["advantage"] = judged.advantage.value
    if patched.counter.spread is not None:
        metrics |= {"scores": patched.counter.scores, "spread": patched.counter.spread}
    if world.first:
        out.mkdir(parents=True)
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, out / "tensors.safetensors")
        (out / "metrics.json").write_text(json.dumps(metrics))
        if "deep" in words:
            (out / "bytes.json").write_text(json.dumps(held(patched, optimizer)))


def held(bench: Bench, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that this rank holds between two iterations, and the most of whole parameters at a time."""
    network, trainable = bench.model.network, bench.trainable
    sets = [bench.average, *bench.sets.values()]
    parts: dict[str, list[Any]] = {
        "network": list(network.parameters()),
        "masters": trainable.masters if trainable.split else [],
        "gradients": [p.grad for p in (*trainable.parameters, *trainable.masters)],
        "moments": [t for state in optimizer.state.values() for t in state.values()],
        "weight sets": [value for weights in sets if weights is not None for value in weights.values],
    }
    counted = {name: {id(t): part(t).nbytes for t in found if t is not None} for name, found in parts.items()}
    return {name: sum(of.values()) for name, of in counted.items()} | {"gathered": max(network.gathered)}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def a_run(out: Path, mode: str, resume: bool, prompts: int = 5) -> None:
    """A short run; every rank calls `train` alike."""
    options: dict[str, Any] = {
        "iterations": 3,
        "data": {"prompts_per_iteration": prompts},
        "parallel": {"mode": mode},
        "optimizer": {"learning_rate": 0.02, "ema_decay": 0.5, "eps": 1e-3, "updates_per_iteration": 2},
        "algorithm": {"name": "tempflow_grpo", "steps": 4, "seeds": 2, "branches": 3, "clip": 0.02, "kl": 0.05},
    }
    settings = config(out, **options)
    train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=resume)


def a_shapes_run(out: Path, mode: str, training: str) -> None:
    """An iteration of DiffusionNFT on the embedded model, with activation checkpointing."""
    settings: dict[str, Any] = {
        "name": "toy",
        "iterations": 1,
        "output": str(out),
        "threads": 1,
        "rollout_rows": 3,
        "train_rows": 4,
        "model": {"training": training, "checkpointing": True, "dtype": "float32", "lora_rank": 4},
        "algorithm": {"name": "diffusion_nft", "steps": 3, "group": 4},
        "data": {"prompts_per_iteration": 3},
        "parallel": {"mode": mode},
        "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.5, "eps": 1e-2},
        "evaluation": {"every": 0, "validation_prompts": 3, "test_prompts": 3, "steps": 2, "metric": "shapes"},
    }
    train(Config.model_validate(settings), quiet=True)


def main(how: str, target: str, *cases: str) -> None:
    """A run ("run", "resume", "few": of one prompt an iteration), one of the embedded model ("lora", "full"), runs of
    golden cases ("every" and their names), or an update of each case, which stays in its folder of `target`."""
    if cases[0] in ("lora", "full"):
        a_shapes_run(Path(target), how, cases[0])
        return
    if cases[0] in ("run", "resume", "few"):
        a_run(Path(target), how, cases[0] == "resume", 1 if cases[0] == "few" else 5)
        return
    world, exchange.BUCKET = join("cpu"), 10  # several buckets, and tensors that are larger than one
    if cases[0] == "every":
        on_ranks(Path(target), how, cases[1:], world)
        leave(world)
        return
    for case in cases:
        print(case, flush=True)  # names the one that fails
        one_update(case, Path(target) / case.replace(" ", "_"), how, world)
    leave(world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
