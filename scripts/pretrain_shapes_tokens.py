"""Pretrains the `shapes_tokens` model on a CPU: a codebook for the shapes autoencoder, then the trunk, then guidance is
distilled into it, then the folder is written, in URSA's layout.

    OMP_NUM_THREADS=2 python scripts/pretrain_shapes_tokens.py all --output runs/tokens --to WEIGHTS

`all` runs the four stages by the recipe below; each can also be run alone (`codebook`, `trunk`, `distill`, `ship`).
The training stages save their whole state (weights, optimizer, step) as safetensors, go on from there when started
again, and log wall and processor seconds and pictures seen. Pictures are rendered as they are needed, with noise seeded
by the step; no picture of a test prompt is ever drawn for training. Trunk and guidance learn the kinds of prompts with
one object or two (`--kinds`).

The codebook is k-means of the latents of the shapes autoencoder, which is then trained through it. `trunk` alone, in a
new folder, takes the one that comes with the package. It computes in `--dtype` (auto: bfloat16 where the machine has it
in hardware), with float32 masters. `--minutes` ends it in time: it is the wall clock that it may take, and the learning
rate falls to its floor by then, whatever the machine's speed. On one core of two, or beside other work, one thread is
the faster one.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from pretrain_shapes import (
    KIND_SHARE,
    Log,
    Named,
    Schedule,
    learn,
    learning_rate,
    pictures,
    resume,
    save,
    to_uint8,
    training_state,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tempflow.core.ema import Ema
from tempflow.core.metric_path import MetricJump, MetricPath
from tempflow.core.schedule import linear
from tempflow.folder import check, claim
from tempflow.models import DTYPES, resolved_dtype, shapes_folder, tokens_folder
from tempflow.models.attention import FusedForward
from tempflow.models.ursa_parts import (
    AutoencoderVQ,
    KineticOptimalScheduler,
    URSAPipeline,
    URSATransformer3DModel,
    read_network,
)
from tempflow.shapes import build
from tempflow.shapes.prompts import KINDS, Kind, Spec, balanced, specs
from tempflow.shapes.verify import judge
from tempflow.train.weights import Trainable, WeightSet

CODES, WIDTH = 512, 8
TAUGHT: tuple[Kind, ...] = ("single", "color", "two")
"""The kinds of prompts that the trunk learns; the codebook has seen all."""

TEXT = 8
"""Tokens of a prompt: seven words and the end."""

DROP_CAPTION = 0.10
POOL, REFRESH, REFRESH_ROWS = 16384, 2048, 12288  # pictures at hand as tokens, how many anew, and after how many rows

RECIPE = {
    "codebook": Schedule(steps=900, batch=48, peak=1.5e-3, save_every=150),
    "trunk": Schedule(steps=9000, batch=64, peak=1.5e-3, save_every=300, pool=POOL),
    "distill": Schedule(steps=240, batch=64, peak=4e-4, save_every=120, pool=8192),
}


# ---------------------------------------------------------------------------------------------------------------- data
def captions(count: int, rng: np.random.Generator, kinds: Sequence[Kind]) -> list[Spec]:
    """Random prompts of all splits but the test split, of those kinds, by KIND_SHARE."""
    pools = {kind: [s for s in (*specs("train"), *specs("validation")) if s.kind == kind] for kind in kinds}
    share = np.array([KIND_SHARE[k] for k in kinds])
    picked = rng.choice(len(kinds), count, p=share / share.sum())
    return [pools[kinds[k]][rng.integers(len(pools[kinds[k]]))] for k in picked]


# ------------------------------------------------------------------------------------------------------------ codebook
def first_autoencoder() -> AutoencoderVQ:
    """The shapes autoencoder without its variance, and with a codebook that is nothing yet."""
    known = AutoencoderKL.from_pretrained(shapes_folder() / "vae", torch_dtype=torch.float32)
    told: Any = known.config
    vae = AutoencoderVQ(
        block_out_channels=told.block_out_channels,
        layers_per_block=told.layers_per_block,
        latent_channels=told.latent_channels,
        norm_num_groups=told.norm_num_groups,
        num_vq_embeddings=CODES,
        vq_embed_dim=WIDTH,
        mid_block_add_attention=told.mid_block_add_attention,
        spatial_stride=2 ** (len(told.block_out_channels) - 1),
        lookup="nearest",
    )
    weights = dict(known.state_dict())
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        weights[name] = weights[name][: told.latent_channels]
    for name in ("quant_conv", "post_quant_conv"):
        weights[f"{name}.weight"] = torch.eye(WIDTH)[:, :, None, None]
        weights[f"{name}.bias"] = torch.zeros(WIDTH)
    weights["quantizer.embedding.weight"] = vae.codes.detach()
    vae.load_state_dict(weights)
    return vae


@torch.no_grad()
def clusters(vectors: Tensor, count: int, rounds: int = 20) -> Tensor:
    """k-means by Lloyd's rounds from random vectors, [count, d]; a cluster without vectors starts anew at the worst."""
    generator = torch.Generator().manual_seed(0)
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:count]].clone()
    for _ in range(rounds):
        near = [torch.cdist(part, centres).min(-1) for part in vectors.split(8192)]
        distance, owner = torch.cat([n.values for n in near]), torch.cat([n.indices for n in near])
        size = torch.bincount(owner, minlength=count)
        total = torch.zeros_like(centres).index_add_(0, owner, vectors)
        centres = total / size.clamp(min=1)[:, None]
        empty = (size == 0).nonzero()[:, 0]
        centres[empty] = vectors[distance.topk(len(empty)).indices]
    return centres


def train_codebook(out: Path, how: Schedule) -> None:
    torch.manual_seed(0)
    vae, log, path = first_autoencoder(), Log(out / "codebook.jsonl"), out / "codebook.safetensors"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=how.peak, betas=(0.9, 0.99), weight_decay=1e-4)
    start = resume(path, {"vae": vae}, optimizer)
    if start == 0:
        rng = np.random.default_rng([10, 0])
        seen = pictures(captions(2048, rng, KINDS), rng)
        with torch.no_grad():
            latents = torch.cat([vae.latents(part) for part in seen.split(128)]).movedim(1, -1).reshape(-1, WIDTH)
            vae.codes.copy_(clusters(latents, CODES))
        log(0, 0, right=reconstruction(vae, how.judged))
    for step in range(start, how.steps):
        rng = np.random.default_rng([11, step])
        x = pictures(captions(how.batch, rng, KINDS), rng)
        z = vae.latents(x)
        q = F.embedding(vae.quantise(z.detach()), vae.codes).movedim(-1, 1)
        error = vae.rendered(z + (q - z).detach()) - x
        commit = (q - z.detach()).square().mean() + 0.25 * (z - q.detach()).square().mean()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 0.1 * commit
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, how.steps, how.peak)
        optimizer.step()
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(path, training_state({"vae": vae}, optimizer), step + 1)
            figures = {"mse": error.square().mean().item(), "commit": commit.item()}
            log(step + 1, (step + 1) * how.batch, **figures, right=reconstruction(vae, how.judged), **usage(vae))


@torch.no_grad()
def reconstruction(vae: AutoencoderVQ, count: int) -> float:
    """Share of rendered pictures of training prompts that the verifier still calls right after their tokens."""
    wanted = balanced("train", count)
    parts = pictures(wanted, np.random.default_rng(99)).split(60)
    seen = torch.cat([vae.decode(vae.quantise(vae.latents(x))) for x in parts])
    return float(np.mean([judge(p, s).strict for p, s in zip(to_uint8(seen), wanted, strict=True)]))


@torch.no_grad()
def usage(vae: AutoencoderVQ) -> dict[str, float]:
    """How many codes 512 pictures use, and the distance of the two nearest on the metric path."""
    rng = np.random.default_rng(98)
    tokens = vae.quantise(vae.latents(pictures(captions(512, rng, KINDS), rng)))
    near = MetricPath(vae.codes).distances(torch.arange(CODES)).fill_diagonal_(4)
    return {"used": len(tokens.unique()), "nearest": round(float(near.min()), 5)}


def trained_autoencoder(out: Path) -> AutoencoderVQ:
    """Of the `codebook` stage in that folder; where it has not run there, the one that comes with the package."""
    if not (out / "codebook.safetensors").is_file():
        return read_network("shapes_tokens", tokens_folder() / "vae", AutoencoderVQ, torch.float32).eval()
    vae = first_autoencoder()
    trained = load_file(out / "codebook.safetensors")
    vae.load_state_dict({k[4:]: v for k, v in trained.items() if k.startswith("vae.")})
    return vae.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------- trunk
def text_tokenizer() -> Any:
    """Word by word, with an end; padded on the left."""
    made = build.tokenizer(False, build.words())
    made.model_max_length, made.padding_side = TEXT, "left"
    return made


def first_trunk(vae: AutoencoderVQ, words: int, layers: int) -> URSATransformer3DModel:
    """Random weights; a code's embedding and its output row start as linear functions of the code."""
    torch.manual_seed(0)
    network = URSATransformer3DModel(
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=layers,
        head_dim=64,
        rope_theta=1000.0,
        vocab_size=words + CODES,
        lm_vocab_size=words,
        lm_head_size=CODES,
        bov_token_id=1,
    )
    units = MetricPath(vae.codes).units
    trunk: Any = network.model
    with torch.no_grad():
        trunk.embed_tokens.weight[words:] += 0.02 * units @ torch.randn(WIDTH, 192)
        network.lm_head.weight.copy_(0.02 * units @ torch.randn(WIDTH, 192) + 0.02 * torch.randn(CODES, 192))
    return network


@torch.no_grad()
def token_pool(vae: AutoencoderVQ, count: int, seed: int, kinds: Sequence[Kind]) -> tuple[Tensor, list[Spec]]:
    rng = np.random.default_rng([12, seed])
    wanted = captions(count, rng, kinds)
    parts = [vae.quantise(vae.latents(pictures(wanted[i : i + 128], rng))) for i in range(0, count, 128)]
    return torch.cat(parts), wanted


def ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[N, TEXT], as the adapter makes them."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_trunk(out: Path, how: Schedule, a: argparse.Namespace) -> None:
    vae, tokenizer, log = trained_autoencoder(out), text_tokenizer(), Log(out / "trunk.jsonl")
    path, jump = out / "trunk.safetensors", MetricJump(MetricPath(vae.codes))
    dtype = DTYPES[resolved_dtype(a.dtype, "cpu")]
    network: Any = first_trunk(vae, len(tokenizer), a.layers)
    in_dtype(network, dtype)
    trainable = Trainable(network)
    average = WeightSet(trainable, Ema(0.998))
    decay = [m for m in trainable.masters if m.dim() > 1]
    rest = [m for m in trainable.masters if m.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.peak, betas=(0.9, 0.98), fused=True)
    start = resume(path, {"masters": Named(trainable)}, optimizer)
    if start:
        trainable.publish()
        average.load(load_file(out / "trunk_ema.safetensors"), start)
    tokens, wanted = token_pool(vae, how.pool, start, a.kinds)
    refresh_every, refresh = max(1, REFRESH_ROWS // how.batch), min(REFRESH, how.pool)
    running, spent = 0.0, Spent(out / "trunk.jsonl", a.minutes)
    for step in range(start, how.steps):
        if spent.share() >= 1:
            break
        rng = np.random.default_rng([13, step])
        torch.manual_seed(step)
        if step > start and step % refresh_every == 0:
            spot = (step // refresh_every * refresh) % how.pool
            tokens[spot : spot + refresh], wanted[spot : spot + refresh] = token_pool(vae, refresh, step, a.kinds)
        rows = rng.integers(0, how.pool, how.batch)
        drop = rng.random(how.batch) < DROP_CAPTION
        prompt = ids(tokenizer, ["" if d else wanted[r].prompt for r, d in zip(rows, drop, strict=True)])
        x0 = tokens[torch.from_numpy(rows)]
        sigma = times(how.batch, a.towards)
        x = jump.path.corrupt(x0, torch.rand(x0.shape, dtype=torch.float64), sigma)
        with FusedForward() if dtype == torch.bfloat16 else torch.enable_grad():
            logits = network(x, prompt)
        loss = F.cross_entropy(logits.float().flatten(0, 2), x0.flatten())
        done = max(step / how.steps, spent.share())
        learn(loss, trainable, average, optimizer, learning_rate(int(done * how.steps), how.steps, how.peak))
        running += 0.01 * (loss.item() - running) if running else loss.item()
        last = step + 1 == how.steps or spent.share() >= 1
        if (step + 1) % how.save_every == 0 or last:
            save(path, training_state({"masters": Named(trainable)}, optimizer), step + 1)
            save(out / "trunk_ema.safetensors", average.named(), step + 1)
            with average.applied():
                scores = evaluate(network.eval(), vae, jump, tokenizer, how.judged, a)
                network.train()
            log(step + 1, (step + 1) * how.batch, loss=round(running, 4), **scores)


def in_dtype(network: nn.Module, dtype: torch.dtype) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def distill(out: Path, how: Schedule, a: argparse.Namespace) -> None:
    """One forward learns the law that two give with guidance, at a temperature; the empty prompt keeps its own.

    Without it, RL without guidance would mostly rediscover guidance. The loss is the cross-entropy to that law.
    """
    vae, tokenizer, log = trained_autoencoder(out), text_tokenizer(), Log(out / "distill.jsonl")
    path, jump = out / "distill.safetensors", MetricJump(MetricPath(vae.codes))
    dtype = DTYPES[resolved_dtype(a.dtype, "cpu")]
    teacher: Any = first_trunk(vae, len(tokenizer), a.layers)
    teacher.load_state_dict(load_file(out / "trunk_ema.safetensors"))
    in_dtype(teacher, dtype)
    network: Any = copy.deepcopy(teacher)
    teacher.requires_grad_(False).eval()
    trainable = Trainable(network)
    average = WeightSet(trainable, Ema(0.99))
    optimizer = torch.optim.AdamW(trainable.masters, lr=how.peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    start = resume(path, {"masters": Named(trainable)}, optimizer)
    if start:
        trainable.publish()
        average.load(load_file(out / "distilled.safetensors"), start)
    tokens, wanted = token_pool(vae, how.pool, 777, a.kinds)
    for step in range(start, how.steps):
        rng = np.random.default_rng([14, step])
        torch.manual_seed(10**6 + step)
        rows = rng.integers(0, how.pool, how.batch)
        drop = rng.random(how.batch) < DROP_CAPTION
        prompt = ids(tokenizer, ["" if d else wanted[r].prompt for r, d in zip(rows, drop, strict=True)])
        x0 = tokens[torch.from_numpy(rows)]
        x = jump.path.corrupt(x0, torch.rand(x0.shape, dtype=torch.float64), times(how.batch, a.towards))
        with FusedForward() if dtype == torch.bfloat16 else torch.enable_grad():
            with torch.no_grad():
                own, empty = teacher(x, prompt).float(), teacher(x, ids(tokenizer, [""] * how.batch)).float()
            logits = network(x, prompt)
        guided = torch.lerp(empty, own, a.guidance) / a.temperature
        law = torch.where(torch.from_numpy(drop)[:, None, None, None], own, guided).softmax(-1)
        loss = F.cross_entropy(logits.float().flatten(0, 2), law.flatten(0, 2))
        learn(loss, trainable, average, optimizer, learning_rate(step, how.steps, how.peak, warmup=30))
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(path, training_state({"masters": Named(trainable)}, optimizer), step + 1)
            save(out / "distilled.safetensors", average.named(), step + 1)
            with average.applied():
                scores = evaluate(network.eval(), vae, jump, tokenizer, how.judged, a)
                network.train()
            log(step + 1, (step + 1) * how.batch, loss=round(loss.item(), 4), **scores)


class Spent:
    """Which share of its minutes a stage has taken, those before it was started again among them."""

    def __init__(self, log: Path, minutes: float) -> None:
        lines = log.read_text().splitlines() if log.exists() else []
        seconds = [json.loads(line)["seconds"] for line in lines]
        ends = [now for now, then in zip(seconds, [*seconds[1:], 0.0], strict=False) if then < now]
        self.before, self.start, self.seconds = sum(ends), time.perf_counter(), minutes * 60

    def share(self) -> float:
        return (self.before + time.perf_counter() - self.start) / self.seconds


def times(count: int, towards: float) -> Tensor:
    """σ of each row, one in each of `count` equal parts; above 1 `towards` the data, where edges are decided."""
    even = (torch.randperm(count) + torch.rand(count)) / count
    return (even.double() ** towards).clamp(1e-3, 1.0)


@torch.no_grad()
def evaluate(
    network: Any, vae: AutoencoderVQ, jump: MetricJump, tokenizer: Any, count: int, a: argparse.Namespace
) -> dict[str, float]:
    """Strict and graded validation score without guidance, 10 steps, at temperature 1 and at .8; strict by kind."""
    wanted = [s for s in balanced("validation", count * len(KINDS) // len(a.kinds)) if s.kind in a.kinds]
    grid, told = linear(10), dict[str, float]()
    for temperature in (1.0, 0.8):
        generator = torch.Generator().manual_seed(7)
        seen: list[np.ndarray] = []
        for i in range(0, len(wanted), 60):
            prompt = ids(tokenizer, [s.prompt for s in wanted[i : i + 60]])
            shape = (len(prompt), 8, 8)
            x = jump.path.start(torch.rand(shape, dtype=torch.float64, generator=generator), grid)
            for step in range(grid.steps):
                law = jump.transition(x, network(x, prompt).float() / temperature, grid, torch.full((len(x),), step))
                x = law.sample(torch.rand(shape, dtype=torch.float64, generator=generator))
            seen.append(to_uint8(vae.decode(x)))
        verdicts = [judge(p, s) for p, s in zip(np.concatenate(seen), wanted, strict=True)]
        name = "" if temperature == 1 else f"_at_{temperature:g}"
        by_kind = {k: [v.strict for v, s in zip(verdicts, wanted, strict=True) if s.kind == k] for k in a.kinds}
        told[f"strict{name}"] = round(float(np.mean([v.strict for v in verdicts])), 3)
        told[f"graded{name}"] = round(float(np.mean([v.graded for v in verdicts])), 3)
        told |= {f"{k}{name}": round(float(np.mean(v)), 3) for k, v in by_kind.items()}
    return told


# ---------------------------------------------------------------------------------------------------------------- ship
def ship(out: Path, to: Path, layers: int) -> None:
    """Writes the pipeline folder with the averaged weights, distilled where that was done; the trunk in bfloat16, the
    autoencoder in float32."""
    vae, tokenizer = trained_autoencoder(out), text_tokenizer()
    network = first_trunk(vae, len(tokenizer), layers)
    distilled = out / "distilled.safetensors"
    network.load_state_dict(load_file(distilled if distilled.is_file() else out / "trunk_ema.safetensors"))
    scheduler = KineticOptimalScheduler(alpha=0.9, c=3.0, shift=1.0)
    URSAPipeline(network.to(torch.bfloat16), scheduler, vae, tokenizer).save_pretrained(to)
    (to / "licence.json").write_text(json.dumps({"licence": "Apache-2.0"}) + "\n")
    print(f"{sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB in {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *RECIPE, "ship"])
    parser.add_argument("--output", dest="out", type=Path, required=True, help="folder of states and logs")
    parser.add_argument("--to", type=Path, default=Path("runs/tokens_weights"), help="new folder that `ship` writes")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="the trunk computes in"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=95.0, help="wall clock of `trunk`")
    parser.add_argument("--towards", type=float, default=1.0, help="power of σ: above 1 towards the data")
    parser.add_argument("--guidance", type=float, default=2.0, help="what `distill` builds in")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the logits, which `distill` builds in too")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=TAUGHT, help="of prompts, in `trunk` and `distill`"
    )
    for name, kind in (("steps", int), ("batch", int), ("peak", float), ("save-every", int), ("judged", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's, in every stage that runs")
    parser.add_argument("--pool", type=int, help="pictures at hand as tokens, likewise")
    a = parser.parse_args()
    given = {n: v for n in Schedule.__dataclass_fields__ if (v := getattr(a, n)) is not None}
    recipe = {stage: replace(schedule, **given) for stage, schedule in RECIPE.items()}
    claim(a.out, "pretraining", "--output")
    if a.stage in ("all", "ship"):
        check(a.to, None, "--to")
    if a.stage in ("all", "codebook"):
        train_codebook(a.out, recipe["codebook"])
    if a.stage in ("all", "trunk"):
        train_trunk(a.out, recipe["trunk"], a)
    if a.stage in ("all", "distill"):
        distill(a.out, recipe["distill"], a)
    if a.stage in ("all", "ship"):
        ship(a.out, a.to, a.layers)


if __name__ == "__main__":
    main()
