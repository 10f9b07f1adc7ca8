"""Pretrains the embedded `shapes` model on a CPU: autoencoder, then transformer and text encoders (the flow), then
guidance is distilled into the transformer, then the pipeline folder is written.

    OMP_NUM_THREADS=1 python scripts/pretrain_shapes.py all --output runs/pretrain --init FIRST --to WEIGHTS

`all` runs the four stages by the recipe below; each can also be run alone (`autoencoder`, `flow`, `distill`, `ship`).
It computes in bfloat16 where the machine has it in hardware and in float32 elsewhere. The training stages save their
whole state (weights, optimizer, step) as safetensors, go on from there when started again, and log wall and processor
seconds and pictures seen. Pictures are rendered as they are needed, with noise seeded by the step; no picture of a
test prompt is ever drawn for training.

`--init` names the pipeline folder to start from; without it everything starts from random weights and wants a longer
schedule. The shipped weights started from those of the world's first edition, which are in the repository's history:

    git archive 8bbcf4a src/tempflow/shapes/weights | tar -x -C FOLDER
    FIRST = FOLDER/src/tempflow/shapes/weights
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.core.ema import Ema
from tempflow.folder import check, claim
from tempflow.models import resolved_dtype
from tempflow.models.attention import FusedForward
from tempflow.shapes import build
from tempflow.shapes.prompts import COLORS, KINDS, SHAPES, Kind, Spec, balanced, specs
from tempflow.shapes.render import scene
from tempflow.shapes.verify import judge
from tempflow.train.weights import Trainable, WeightSet

TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
KIND_SHARE: dict[Kind, float] = {
    "single": 0.09,
    "two": 0.13,
    "count": 0.15,
    "color": 0.07,
    "position": 0.22,
    "attribution": 0.34,
}
DROP_CAPTION = 0.10
POOL, REFRESH, REFRESH_ROWS = 32768, 4096, 24576  # latents at hand; how many are drawn anew, and after how many rows


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains; `judged` pictures are scored at each of its saves."""

    steps: int
    batch: int
    peak: float  # learning rate after the warm-up
    save_every: int
    judged: int = 240
    pool: int = POOL


RECIPE = {
    "autoencoder": Schedule(steps=600, batch=64, peak=1.5e-3, save_every=150),
    "flow": Schedule(steps=6400, batch=64, peak=1.0e-3, save_every=800),
    "distill": Schedule(steps=240, batch=64, peak=4e-4, save_every=120, pool=8192),
}


# ---------------------------------------------------------------------------------------------------------- data
def captions(count: int, rng: np.random.Generator) -> list[Spec]:
    """Random prompts of all splits but the test split, kinds by KIND_SHARE."""
    pools = {kind: [s for s in (*specs("train"), *specs("validation")) if s.kind == kind] for kind in KINDS}
    kinds = rng.choice(KINDS, count, p=[KIND_SHARE[k] for k in KINDS])
    return [pools[k][rng.integers(len(pools[k]))] for k in kinds]


def pictures(wanted: list[Spec], rng: np.random.Generator) -> Tensor:
    """float32 [N, 3, 32, 32] in [-1, 1]."""
    array = np.stack([scene(spec, rng) for spec in wanted])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(media: Tensor) -> np.ndarray:
    return ((media.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ----------------------------------------------------------------------------------------------------- precision
def compute() -> torch.dtype:
    return getattr(torch, resolved_dtype("auto", "cpu"))


def half() -> AbstractContextManager[object]:
    """Autocast where the machine computes in bfloat16: for the autoencoder, whose weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16) if compute() == torch.bfloat16 else nullcontext()


def fused() -> AbstractContextManager[object]:
    return FusedForward() if compute() == torch.bfloat16 else nullcontext()


# --------------------------------------------------------------------------------------------------- checkpoints
def save(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def training_state(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    for i, state in enumerate(optimizer.state_dict()["state"].values()):
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return tensors


def resume(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Loads what `training_state` saved; returns the step to go on from (0 without a file)."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state = optimizer.state_dict()
    indices = {int(k.split(".")[1]) for k in tensors if k.startswith("optimizer.")}
    keys = ("step", "exp_avg", "exp_avg_sq")
    state["state"] = {i: {k: tensors[f"optimizer.{i}.{k}"] for k in keys} for i in indices}
    optimizer.load_state_dict(state)
    return step


def learn(
    loss: Tensor, trainable: Trainable, average: WeightSet, optimizer: torch.optim.Optimizer, rate: float
) -> None:
    """One update of the masters, at that rate, and of their average."""
    trainable.zero_grad()
    loss.backward()
    trainable.collect()
    nn.utils.clip_grad_norm_(trainable.masters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    trainable.publish()
    average.update()


def learning_rate(step: int, total: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine to `floor`·peak."""
    warmup = min(warmup, total // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * min(progress, 1.0)))))


class Named(nn.Module):
    """The masters under flat names, so that `training_state` and `resume` can treat them as a module."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        for i, master in enumerate(trainable.masters):
            self.register_parameter(str(i), master)


class Log:
    """Appends lines to a stage's .jsonl file and prints them; adds the time since it was made."""

    def __init__(self, path: Path) -> None:
        self.path, self.wall, self.cpu = path, time.perf_counter(), time.process_time()

    def __call__(self, step: int, rows: int, **figures: object) -> None:
        times = {
            "seconds": round(time.perf_counter() - self.wall, 1),
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
        }
        line = {"stage": self.path.stem, "step": step, "rows": rows} | figures | times
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------------- start
def first_pipeline(init: Path | None) -> StableDiffusion3Pipeline:
    """The untrained pipeline, or one with the weights of the folder `init`, whose vocabulary may be another.

    Words are matched by name. A new word starts near the words of its class that `init` knows: at their mean, with
    their spread.
    """
    pipe = build.pipeline(seed=0)
    if init is None:
        return pipe
    known = StableDiffusion3Pipeline.from_pretrained(init, torch_dtype=torch.float32)
    for name in ("vae", *TRAINED):
        mine, theirs = getattr(pipe, name), getattr(known, name)
        embedding = _embedding_names(mine)
        mine.load_state_dict(mine.state_dict() | {k: v for k, v in theirs.state_dict().items() if k not in embedding})
    pipe.vae.register_to_config(
        shift_factor=known.vae.config.shift_factor, scaling_factor=known.vae.config.scaling_factor
    )
    generator = torch.Generator().manual_seed(0)
    for number in ("", "_2", "_3"):
        old, new = (getattr(p, f"tokenizer{number}").get_vocab() for p in (known, pipe))
        table = getattr(known, f"text_encoder{number}").get_input_embeddings().weight.detach()
        mine = getattr(pipe, f"text_encoder{number}").get_input_embeddings().weight
        with torch.no_grad():
            for word, row in sorted(new.items()):
                if word in old:
                    mine[row] = table[old[word]]
                else:
                    alike = [i for w, i in sorted(old.items()) if _word_class(w) == _word_class(word)]
                    near = table[alike] if len(alike) > 1 else table
                    mine[row] = near.mean(0) + near.std(0) * torch.randn(near.shape[1], generator=generator)
    return pipe


def _embedding_names(module: nn.Module) -> set[str]:
    """The names of the word table, which T5 has twice."""
    if not hasattr(module, "get_input_embeddings"):
        return set()
    table = module.get_input_embeddings().weight
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p is table}


def _word_class(word: str) -> str:
    if word in SHAPES:
        return "shape"
    if word in COLORS:
        return "color"
    return "shapes" if word.removesuffix("s").removesuffix("e") in SHAPES or word.removesuffix("s") in SHAPES else ""


# --------------------------------------------------------------------------------------------------- autoencoder
def train_autoencoder(out: Path, how: Schedule, init: Path | None) -> None:
    torch.manual_seed(0)
    vae = first_pipeline(init).vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=how.peak, betas=(0.9, 0.99), weight_decay=1e-4)
    path, log = out / "autoencoder.safetensors", Log(out / "autoencoder.jsonl")
    for step in range(resume(path, {"vae": vae}, optimizer), how.steps):
        rng = np.random.default_rng([1, step])
        torch.manual_seed(step)
        x = pictures(captions(how.batch, rng), rng)
        with half():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = (y - x).float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, how.steps, how.peak)
        optimizer.step()
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(path, training_state({"vae": vae}, optimizer), step + 1)
            right = reconstruction(vae, how.judged)
            log(step + 1, (step + 1) * how.batch, mse=error.square().mean().item(), kl=kl.item(), right=right)


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int) -> float:
    """Share of rendered pictures that the verifier still calls right after the autoencoder."""
    rng = np.random.default_rng(99)
    wanted = balanced("train", count)
    parts = pictures(wanted, rng).split(60)
    seen = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in parts])
    return float(np.mean([judge(p, s).strict for p, s in zip(to_uint8(seen), wanted, strict=True)]))


# ---------------------------------------------------------------------------------------------------------- flow
@torch.no_grad()
def latent_pool(vae: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, list[Spec]]:
    rng = np.random.default_rng([2, seed])
    wanted = captions(count, rng)
    with half():
        z = torch.cat(
            [vae.encode(pictures(wanted[i : i + 128], rng)).latent_dist.mode().float() for i in range(0, count, 128)]
        )
    return z, wanted


def encode(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The pipeline's own `encode_prompt`, with gradients where they are on, once per distinct prompt."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(distinct), None, None, do_classifier_free_guidance=False, max_sequence_length=build.TOKENS
    )
    rows = torch.tensor([distinct[p] for p in prompts])
    return embeds[rows], pooled[rows]


def load_autoencoder(pipe: StableDiffusion3Pipeline, out: Path, pool: int) -> None:
    """Puts the trained autoencoder into `pipe`, with the shift and the scale of its latents."""
    trained = load_file(out / "autoencoder.safetensors")
    pipe.vae.load_state_dict({k[4:]: v for k, v in trained.items() if k.startswith("vae.")})
    pipe.vae.requires_grad_(False)
    z = latent_pool(pipe.vae, min(4096, pool), seed=12345)[0]
    pipe.vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


def normalised(pipe: StableDiffusion3Pipeline, z: Tensor) -> Tensor:
    return (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def train_flow(out: Path, how: Schedule, init: Path | None) -> None:
    pipe, log = first_pipeline(init), Log(out / "flow.jsonl")
    load_autoencoder(pipe, out, how.pool)
    modules: dict[str, nn.Module] = {n: getattr(pipe, n).train().to(compute()) for n in TRAINED}
    everything = nn.ModuleDict(modules)
    trainable = Trainable(everything)  # float32 masters, whatever it computes in
    average = WeightSet(trainable, Ema(0.998))
    optimizer = torch.optim.AdamW(trainable.masters, lr=how.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    path, averaged = out / "flow.safetensors", out / "flow_ema.safetensors"
    start = resume(path, {"masters": Named(trainable)}, optimizer)
    if start:
        trainable.publish()
        average.load(load_file(averaged), start)
    z, wanted = latent_pool(pipe.vae, how.pool, seed=start)
    refresh_every, refresh = max(1, REFRESH_ROWS // how.batch), min(REFRESH, how.pool)
    running = 0.0
    for step in range(start, how.steps):
        rng = np.random.default_rng([3, step])
        torch.manual_seed(step)
        if step > start and step % refresh_every == 0:
            spot = (step // refresh_every * refresh) % how.pool
            z[spot : spot + refresh], wanted[spot : spot + refresh] = latent_pool(pipe.vae, refresh, seed=step)
        rows = rng.integers(0, how.pool, how.batch)
        x0 = normalised(pipe, z[torch.from_numpy(rows)])
        drop = rng.random(how.batch) < DROP_CAPTION
        text = ["" if d else wanted[r].prompt for r, d in zip(rows, drop, strict=True)]
        sigma = torch.sigmoid(torch.randn(how.batch) + 0.4)  # shifted to noise, where the layout is decided
        noise = torch.randn_like(x0)
        mixed = torch.lerp(x0, noise, sigma[:, None, None, None])
        with fused():
            embeds, pooled = encode(pipe, text)
            v = pipe.transformer(mixed.to(compute()), embeds, pooled, sigma * 1000, return_dict=False)[0]
        loss = (v.float() - (noise - x0)).square().mean()
        learn(loss, trainable, average, optimizer, learning_rate(step, how.steps, how.peak))
        running += 0.01 * (loss.item() - running) if running else loss.item()
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(path, training_state({"masters": Named(trainable)}, optimizer), step + 1)
            save(averaged, average.named(), step + 1)
            with average.applied():
                everything.eval()
                scores = evaluate(pipe, how.judged)
                everything.train()
            log(step + 1, (step + 1) * how.batch, loss=round(running, 4), **scores)


@torch.no_grad()
def evaluate(pipe: StableDiffusion3Pipeline, count: int, guidance: float = 1.0) -> dict[str, float]:
    """Strict validation score by kind, ten Euler steps, and their mean."""
    pipe.set_progress_bar_config(disable=True)
    wanted = balanced("validation", count)
    right: dict[str, list[bool]] = {k: [] for k in KINDS}
    for i in range(0, count, 120):
        part = wanted[i : i + 120]
        noise = torch.randn(len(part), 8, 8, 8, generator=torch.Generator().manual_seed(7 + i))
        with half():
            seen = pipe(
                [s.prompt for s in part],
                height=32,
                width=32,
                max_sequence_length=build.TOKENS,
                num_inference_steps=10,
                guidance_scale=guidance,
                latents=noise,
                output_type="pt",
            ).images
        for picture, spec in zip(to_uint8(seen * 2 - 1), part, strict=True):
            right[spec.kind].append(judge(picture, spec).strict)
    by_kind = {k: round(float(np.mean(v)), 3) for k, v in right.items()}
    return {"strict": round(float(np.mean(list(by_kind.values()))), 3), **by_kind}


# ------------------------------------------------------------------------------------------------------- distill
def distill(out: Path, how: Schedule, guidance: float) -> None:
    """Guidance distillation (Meng et al. 2023; FLUX.1-dev ships so): one forward learns to give the guided velocity.

    Without it, RL without guidance would mostly rediscover guidance. The empty prompt keeps its own velocity.
    """
    path, log = out / "distill.safetensors", Log(out / "distill.jsonl")
    pipe = load_pretrained(out, out / "flow_ema.safetensors", how.pool)
    for name in TRAINED:
        getattr(pipe, name).requires_grad_(False).eval().to(compute())
    teacher, student = pipe.transformer, copy.deepcopy(pipe.transformer).requires_grad_(True)
    trainable = Trainable(student)
    average = WeightSet(trainable, Ema(0.99))
    optimizer = torch.optim.AdamW(trainable.masters, lr=how.peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    distilled = out / "distilled.safetensors"
    start = resume(path, {"masters": Named(trainable)}, optimizer)
    if start:
        trainable.publish()
        prefix = "transformer."
        saved = {k.removeprefix(prefix): v for k, v in load_file(distilled).items() if k.startswith(prefix)}
        average.load(saved, start)
    z, wanted = latent_pool(pipe.vae, how.pool, seed=777)
    for step in range(start, how.steps):
        rng = np.random.default_rng([4, step])
        torch.manual_seed(10**6 + step)
        rows = rng.integers(0, how.pool, how.batch)
        x0 = normalised(pipe, z[torch.from_numpy(rows)])
        drop = rng.random(how.batch) < DROP_CAPTION
        text = ["" if d else wanted[r].prompt for r, d in zip(rows, drop, strict=True)]
        sigma = torch.sigmoid(torch.randn(how.batch) + 0.4)
        mixed = torch.lerp(x0, torch.randn_like(x0), sigma[:, None, None, None]).to(compute())
        with fused():
            with torch.no_grad():
                embeds, pooled = encode(pipe, [*text, *[""] * how.batch])
                v = teacher(mixed.repeat(2, 1, 1, 1), embeds, pooled, (sigma * 1000).repeat(2), return_dict=False)[0]
                conditional, base = v.float().chunk(2)
            guess = student(mixed, embeds[: how.batch], pooled[: how.batch], sigma * 1000, return_dict=False)[0]
        loss = (guess.float() - base - guidance * (conditional - base)).square().mean()
        learn(loss, trainable, average, optimizer, learning_rate(step, how.steps, how.peak, warmup=30))
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(path, training_state({"masters": Named(trainable)}, optimizer), step + 1)
            whole = load_file(out / "flow_ema.safetensors") | {
                f"transformer.{n}": v for n, v in average.named().items()
            }
            save(distilled, whole, step + 1)
            with average.applied():
                pipe.transformer = student
                scores = evaluate(pipe, how.judged)
            log(step + 1, (step + 1) * how.batch, loss=round(loss.item(), 4), **scores)


def load_pretrained(out: Path, weights: Path, pool: int, shift: float = 3.0) -> StableDiffusion3Pipeline:
    """A pipeline with the trained autoencoder and the averaged transformer and text encoders."""
    pipe = build.pipeline(seed=0, shift=shift)
    load_autoencoder(pipe, out, pool)
    everything = nn.ModuleDict({n: getattr(pipe, n) for n in TRAINED})
    everything.load_state_dict({**everything.state_dict(), **load_file(weights)})
    return pipe


# ---------------------------------------------------------------------------------------------------------- ship
def ship(out: Path, to: Path, shift: float, pool: int) -> None:
    """Writes the pipeline folder with the averaged weights; the transformer in bfloat16, the rest in float32."""
    pipe = load_pretrained(out, out / "distilled.safetensors", pool, shift)
    # The text encoders stay float32: transformers would load them in the dtype that they were saved in.
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(to)
    (to / "licence.json").write_text(json.dumps({"licence": "Apache-2.0"}) + "\n")
    print(f"{sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB in {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *RECIPE, "ship"])
    parser.add_argument("--output", dest="out", type=Path, required=True, help="folder of states and logs")
    parser.add_argument("--init", type=Path, help="a pipeline folder whose weights are the start")
    parser.add_argument("--to", type=Path, default=Path("runs/weights"), help="new folder that `ship` writes")
    parser.add_argument("--guidance", type=float, default=2.0, help="what `distill` builds in")
    parser.add_argument("--shift", type=float, default=3.0, help="the scheduler's shift")
    for name, kind in (("steps", int), ("batch", int), ("peak", float), ("save-every", int), ("judged", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's, in every stage that runs")
    parser.add_argument("--pool", type=int, help="latents at hand, likewise")
    a = parser.parse_args()
    if a.init is not None and not (a.init / "model_index.json").is_file():
        parser.error(f"--init: {a.init} is no pipeline folder: it has no model_index.json")
    given = {n: v for n in Schedule.__dataclass_fields__ if (v := getattr(a, n)) is not None}
    recipe = {stage: replace(schedule, **given) for stage, schedule in RECIPE.items()}
    claim(a.out, "pretraining", "--output")
    if a.stage in ("all", "ship"):
        check(a.to, None, "--to")
    print(f"computes in {compute()}, {torch.get_num_threads()} threads", flush=True)
    if a.stage in ("all", "autoencoder"):
        train_autoencoder(a.out, recipe["autoencoder"], a.init)
    if a.stage in ("all", "flow"):
        train_flow(a.out, recipe["flow"], a.init)
    if a.stage in ("all", "distill"):
        distill(a.out, recipe["distill"], a.guidance)
    if a.stage in ("all", "ship"):
        ship(a.out, a.to, a.shift, recipe["flow"].pool)


if __name__ == "__main__":
    main()
