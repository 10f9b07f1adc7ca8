"""The ratio at the first update in bfloat16, beside how far the rollout's log-probs are from training's.

    python -m benchmarks.first_ratio [--network tiny|shapes] [--kernels split own] [--kinds CPS …] [--seeds 0 1]

Kinds of step × plans, each the worst over guidance 1 and 4.5, rows of rollout/training 24/6, 24/24 and 7/96, and the
seeds: |log ratio| of the loop's own first update beside a tenth of a published clip, then the rollout's log-probs
beside those of the training forward as |Δ log p| and in roundings, which the guard `first_ratio` looks at, and the
same with a fault planted in training (rows 24/6, the first seed): each fault's worst case over guidance.

    guidance   1 instead of 4.5, 1.5 instead of 1
    prompt     the next prompt's condition
    σ          the network is told the next step's
    dropout    0.1 behind the first layer of each feed-forward
    older      the rollout is of the weights before the last updates (`--older`, AdamW at the recipes' 2e-4)

The network is that of `shapes`, or a tiny one of its kind with random weights in the same pipeline (the default: a CPU
without bfloat16 emulates it, slowly); latents are 8×8×8 in both. Kernels "own" are this machine's; emulated ones round
every row alike, whatever the batch. "split" makes linear layers add up in two parts, of which each is rounded and whose
border depends on the number of rows: a stand-in for hardware whose kernels do. Last, what the old log-probs of a second
update cost. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tempflow.algorithms import Algorithm, tempflow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.config import GuardsConfig
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS, DDIM, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.objective.edges import EdgeBatch, Loss, Predict
from tempflow.core.objective.ratio import PolicyRatio, clipped
from tempflow.data.prompts import load_prompts
from tempflow.media import Media, Size
from tempflow.models import load
from tempflow.models.protocol import Model
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.request import Prompt, asked
from tempflow.rewards import from_function
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Experience, credit
from tempflow.train.guards import Guards
from tempflow.train.source import collect
from tempflow.train.update import learn, lessons, predictors, shuffled
from tempflow.train.weights import Learner, Trainable

SIZE = Size(32, 32)
GUIDANCE = (1.0, 4.5)
ROWS = ((24, 6), (24, 24), (7, 96))

KINDS: dict[str, tuple[Dynamics, float]] = {
    "Flow-GRPO's SDE": (FlowSDE(0.7), 1e-4),
    "DanceGRPO's SDE": (DanceSDE(0.3), 1e-4),
    "Flash-GRPO's SDE": (LinearSDE(), 1e-3),
    "CPS": (CPS(0.8), 1e-5),
    "DDIM": (DDIM(1.0), 1e-4),
}
"""The step, and the clip that its method published (CPS: for a log-prob that is smaller by 2S²)."""


def plans_of(steps: int, roots: int) -> dict[str, plan.Plan]:
    noisy = range(steps - 1)
    return {
        "chain": plan.chain(steps, roots, train=noisy, stochastic=noisy),
        "window": plan.window(steps, roots, start=1, size=2),
        "branch each step": plan.branch_each_step(steps, seeds=1, branches=3),
        "tree": plan.tree(steps, 1, {0: 2, 1: 2}, stochastic=noisy, train=noisy),
    }


class SplitSums(TorchFunctionMode):
    """Linear layers in bfloat16 add up in two parts, cut at a place that depends on the number of rows."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.linear or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        x, weight = args[0], args[1]
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        cut = max(1, x.shape[-1] * (x.shape[0] % 7 + 1) // 8)
        whole = F.linear(x[..., :cut], weight[:, :cut]) + F.linear(x[..., cut:], weight[:, cut:])
        return whole if bias is None else whole + bias


KERNELS: dict[str, Callable[[], AbstractContextManager[object]]] = {"own": nullcontext, "split": SplitSums}


@dataclass(frozen=True)
class Heard(PolicyRatio):
    """The policy ratio, which notes the old log-probs that it is given."""

    old: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, models: Mapping[str, Predict], batch: EdgeBatch) -> Loss:
        self.old.append(batch.log_prob.detach())
        return super().__call__(models, batch)


@dataclass(frozen=True)
class Seen:
    """Largest values over edges: |log ratio|, |Δ log p| of rollout and training, and that in roundings."""

    ratio: float
    difference: float
    roundings: float

    def worst(self, other: Seen) -> Seen:
        return Seen(*map(max, astuple(self), astuple(other)))


class Cheap(SD3):
    """Shows three of a latent's channels: what the autoencoder would draw does not matter here."""

    def decode(self, x: Tensor, size: Size) -> Media:
        shades = (x[:, :3].float() * 40 + 128).clamp(0, 255).round().to(torch.uint8)
        shades = shades.repeat_interleave(size.height // x.shape[2], 2).repeat_interleave(size.width // x.shape[3], 3)
        return Media.of(shades.permute(0, 2, 3, 1).cpu().contiguous())


def model_of(network: str, dtype: str) -> SD3:
    """The pipeline of `shapes`, all of whose transformer is trained."""
    model = load("shapes", dtype=dtype)
    assert isinstance(model, SD3)
    model.__class__ = Cheap
    if network == "tiny":
        config = dict(model.pipe.transformer.config) | {
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_projection_dim": 32,
        }
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(0)
            tiny = SD3Transformer2DModel.from_config(config)
            for parameter in tiny.parameters():  # the library's own initial weights almost ignore the text
                parameter.data.mul_(2 if parameter.ndim == 2 else 1)
            model.pipe.transformer = tiny.to(getattr(torch, dtype)).requires_grad_(False).eval()
    model.train_fully()
    return model


def setting_for(
    model: Model, dynamics: Dynamics, grown: plan.Plan, clip: float, guidance: float, rows: tuple[int, int], seed: int
) -> Context:
    plain = clipped(clip, clip)
    algorithm = Algorithm(
        name="first_ratio",
        steps=grown.steps,
        plan=lambda iteration, slot: grown,
        dynamics=dynamics,
        credit=GroupZScore(),
        phases=(EdgePhase(Heard(plain.clip, plain.ratio, plain.regularizers)),),
    )
    return Context(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(grown.steps, SIZE),
        size=SIZE,
        guidance=guidance,
        rewards=[from_function(lambda images, prompts: [float(np.asarray(i).mean()) for i in images], name="bright")],
        seed=seed,
        rollout_rows=rows[0],
        train_rows=rows[1],
        updates=1,
        max_grad_norm=1.0,
        sets={},
    )


def first_update(context: Context, experience: Experience, policy: Predict | None = None) -> Seen:
    """What the loop's loss sees at the first update, or with that policy; nothing is taken from it."""
    phase = context.algorithm.first
    (lesson,) = lessons(context, experience.prompts, 0, experience, [credit(context, experience)])
    taught = shuffled(phase.items(lesson), lesson.seed, (0,))
    models = predictors(context, experience.prompts) if policy is None else {"policy": policy}
    objective = phase.objective
    assert isinstance(objective, Heard)
    objective.old.clear()
    ratio, gap, batches = 0.0, 0.0, taught.minibatches(context.train_rows)
    for batch in batches:
        metrics = phase.loss(models, lesson, batch).metrics
        ratio = max(ratio, float(metrics["log_ratio_abs"].max()))
        gap = max(gap, float(metrics["rollout_gap"].max()))
    rollout = experience.forest.edges.log_prob[torch.cat([batch.row for batch in batches])]
    return Seen(ratio, float((torch.cat(objective.old) - rollout).abs().max()), gap)


# ---------------------------------------------------------------------------------------------------------- faults
class Dropped(nn.Module):
    """A layer with dropout behind it, in training and evaluation alike."""

    def __init__(self, layer: nn.Module, share: float) -> None:
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.dropout(self.layer(*args, **kwargs), self.share, training=True)


def with_dropout(model: Model) -> nn.Module:
    network = copy.deepcopy(model.network)
    for block in model.blocks(network):
        feed_forward = block.get_submodule("ff.net")
        assert isinstance(feed_forward, nn.ModuleList)
        feed_forward[0] = Dropped(feed_forward[0], 0.1)
    return network


def trained(model: SD3, network: str, updates: int, prompts: Sequence[Prompt]) -> nn.Module:
    """The network after that many updates of TempFlow-GRPO in float32, in the dtype of `model`."""
    if not updates:
        return model.network
    wide = model_of(network, "float32")
    branching = tempflow_grpo(steps=4, seeds=1, branches=4, clip=1e-2, kl=0.0, eps=0.1)
    context = setting_for(wide, FlowSDE(0.9), branching.plans(0, 1)[0], 1e-2, 1.0, (96, 96), 0)
    context = replace(context, algorithm=branching)
    trainable = Trainable(wide.network)
    optimizer = torch.optim.AdamW(trainable.masters, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0)
    learners = {"policy": Learner(trainable, optimizer)}
    watcher = Guards(GuardsConfig(), lambda iteration, alarms: None, print)
    for iteration in range(updates):
        experience = collect(context, prompts, iteration, Counter(), Clock())
        taught = lessons(context, prompts, iteration, experience, [credit(context, experience)])
        learn(context, prompts, taught, learners, Counter(), Clock(), watcher)
    with quiet():
        return wide.network.to(model.dtype)


def faults(context: Context, texts: Sequence[str], networks: Mapping[str, nn.Module]) -> dict[str, Predict]:
    """What training asks in the policy's place."""
    model, condition = context.model, context.model.encode(asked(texts), SIZE)
    right = model.predictor(condition, context.guidance)
    sigmas = context.schedule.sigmas

    def next_sigma(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        at = (sigmas[None] - sigma[:, None]).abs().argmin(1)
        return right(x, sigmas[at + 1], rows)

    return {
        "guidance": model.predictor(condition, 1.0 if context.guidance.rows > 1 else 1.5),
        "prompt": lambda x, sigma, rows: right(x, sigma, (rows + 1) % len(texts)),
        "σ": next_sigma,
        **{name: model.predictor(condition, context.guidance, network=net) for name, net in networks.items()},
    }


# ------------------------------------------------------------------------------------------------------- the table
def table(a: argparse.Namespace, kernels: str) -> tuple[str, float, dict[str, float]]:
    """Markdown; the healthy runs' largest gap in roundings; each fault's smallest of the cells' worst."""
    model = model_of(a.network, "bfloat16")
    prompts = load_prompts("shapes:train")[: a.prompts]
    networks = {"dropout": with_dropout(model), "older": trained(model, a.network, a.older, prompts)}
    lines, healthy, least = list[str](), 0.0, dict[str, float]()
    for kind, (dynamics, clip) in KINDS.items():
        if a.kinds and kind not in a.kinds:
            continue
        for name, grown in plans_of(a.steps, a.roots).items():
            if a.plans and name not in a.plans:
                continue
            seen, wrong = Seen(0.0, 0.0, 0.0), dict[str, Seen]()
            for guidance in GUIDANCE:
                for seed in a.seeds:
                    grown_by = dict[int, Experience]()
                    for rows in ROWS:
                        context = setting_for(model, dynamics, grown, clip, guidance, rows, seed)
                        with KERNELS[kernels]():
                            if rows[0] not in grown_by:
                                grown_by[rows[0]] = collect(context, prompts, 0, Counter(), Clock())
                            seen = seen.worst(first_update(context, grown_by[rows[0]]))
                            if rows != ROWS[0] or seed != a.seeds[0]:
                                continue
                            for fault, policy in faults(context, [p.text for p in prompts], networks).items():
                                found = first_update(context, grown_by[rows[0]], policy)
                                wrong[fault] = wrong.get(fault, found).worst(found)
            healthy = max(healthy, seen.roundings)
            least = {f: min(least.get(f, w.roundings), w.roundings) for f, w in wrong.items()}
            cells = [f"{w.difference:.1e} ({w.roundings:.0f})" for w in wrong.values()]
            first = [kind, name, f"{seen.ratio:.1g}", f"{clip / 10:.0e}"]
            cells = [*first, f"{seen.difference:.1e} ({seen.roundings:.1f})", *cells]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    head = [
        "kind of step",
        "plan",
        "log ratio",
        "clip / 10",
        "rollout − training",
        "guidance",
        "prompt",
        "σ",
        *networks,
    ]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]), healthy, least


def recomputation(a: argparse.Namespace) -> str:
    """What old log-probs of a second update cost: forwards, and processor time of an iteration's updates, in turn."""
    lines = [
        "| dtype | trained edges | forwards for old log-probs | update, two updates over one |",
        "|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        model = model_of(a.network, dtype)
        prompts = load_prompts("shapes:train")[: a.prompts]
        dynamics, clip = KINDS["Flow-GRPO's SDE"]
        grown = plans_of(a.steps, a.roots)["chain"]
        one = setting_for(model, dynamics, grown, clip, 1.0, (24, 6), 0)
        trainable = Trainable(model.network)
        learners = {"policy": Learner(trainable, torch.optim.SGD(trainable.masters, lr=0.0))}
        watcher = Guards(GuardsConfig(), lambda iteration, alarms: None, print)
        experience = collect(one, prompts, 0, Counter(), Clock())
        given, seconds, counts = credit(one, experience), ([], []), Counter()
        for _ in range(a.repeats):
            for side, context in enumerate((one, replace(one, updates=2))):
                counts, began = Counter(), time.process_time()
                taught = lessons(context, prompts, 0, experience, [given])
                learn(context, prompts, taught, learners, counts, Clock(), watcher)
                seconds[side].append(time.process_time() - began)
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        lines.append(f"| {dtype} | {counts.train} | {counts.old} | {ratio:.3f} |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["tiny", "shapes"], default="tiny")
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=["split"])
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=[], help="none: all")
    parser.add_argument("--plans", nargs="*", choices=list(plans_of(4, 1)), default=[], help="none: all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--roots", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--older", type=int, default=10, help="updates between the weights of rollout and training")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the planted dropout
    for kernels in a.kernels:
        began = time.process_time()
        markdown, healthy, least = table(a, kernels)
        print(f"\nKernels: {kernels}. |Δ log p| with roundings in brackets; {time.process_time() - began:.0f} CPU s\n")
        print(markdown)
        print(f"\nlargest without a fault: {healthy:.2f} roundings; smallest of each fault's cells:")
        print(", ".join(f"{name} {value:.0f}" for name, value in least.items()))
    print(f"\n{recomputation(a)}")


if __name__ == "__main__":
    main()
