"""Pretrains the embedded `shapes` model from nothing on two CPU cores: autoencoder, then transformer and text encoders,
then guidance is distilled into the transformer.

    python scripts/pretrain_shapes.py autoencoder --out runs/pretrain --steps 1600 --batch 64
    python scripts/pretrain_shapes.py flow        --out runs/pretrain --steps 4600 --batch 128 --peak 1.4e-3
    python scripts/pretrain_shapes.py distill     --out runs/pretrain --steps 200 --batch 128 --peak 4e-4 --guidance 1.2
    python scripts/pretrain_shapes.py ship        --out runs/pretrain --to src/tempflow/shapes/weights

The first two stages save their whole state (weights, optimizer, step) every `--save-every` steps as safetensors and go
on from there when started again. Pictures are rendered as they are needed, with noise seeded by the step.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.folder import check, claim
from tempflow.models.attention import FusedForward
from tempflow.shapes import build
from tempflow.shapes.prompts import KINDS, Spec, balanced, specs
from tempflow.shapes.render import scene
from tempflow.shapes.verify import judge
from tempflow.train.weightsets import Ema, Trainable, WeightSet

TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

KIND_SHARE = {"single": 0.06, "two": 0.16, "count": 0.18, "color": 0.08, "position": 0.26, "attribution": 0.26}
DROP_CAPTION = 0.10
POOL, REFRESH, REFRESH_EVERY = 49152, 4096, 200


# ---------------------------------------------------------------------------------------------------------- data
def captions(count: int, rng: np.random.Generator) -> list[Spec]:
    """Random prompts of the whole world, kinds by KIND_SHARE."""
    pools = {kind: [s for s in specs() if s.kind == kind] for kind in KINDS}
    kinds = rng.choice(KINDS, count, p=[KIND_SHARE[k] for k in KINDS])
    return [pools[k][rng.integers(len(pools[k]))] for k in kinds]


def pictures(wanted: list[Spec], rng: np.random.Generator) -> Tensor:
    """float32 [N, 3, 32, 32] in [-1, 1]."""
    array = np.stack([scene(spec, rng) for spec in wanted])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(media: Tensor) -> np.ndarray:
    return ((media.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# --------------------------------------------------------------------------------------------------- checkpoints
def save(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
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


def learning_rate(step: int, total: int, peak: float, warmup: int = 200, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine to `floor`·peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * min(progress, 1.0)))))


class _Named(nn.Module):
    """The masters under flat names, so that `training_state` and `resume` can treat them as a module."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        for i, master in enumerate(trainable.masters):
            self.register_parameter(str(i), master)


# --------------------------------------------------------------------------------------------------- autoencoder
def train_autoencoder(out: Path, steps: int, batch: int, save_every: int) -> None:
    torch.manual_seed(0)
    vae = build.autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start, began = resume(out / "autoencoder.safetensors", {"vae": vae}, optimizer), time.time()
    for step in range(start, steps):
        rng = np.random.default_rng([1, step])
        torch.manual_seed(step)
        x = pictures(captions(batch, rng), rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = (y - x).float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.square().mean() + 0.1 * error.abs().mean() + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 3e-3)
        optimizer.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(out / "autoencoder.safetensors", training_state({"vae": vae}, optimizer), step + 1)
            right = reconstruction(vae, 360)
            line = {"step": step + 1, "mse": error.square().mean().item(), "kl": kl.item(), "right": right}
            log(out / "autoencoder.jsonl", line | {"seconds": round(time.time() - began, 1)})


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int) -> float:
    """Share of rendered pictures that the verifier still calls right after the autoencoder."""
    rng = np.random.default_rng(99)
    wanted = balanced("train", count)
    parts = pictures(wanted, rng).split(60)
    seen = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in parts])
    return float(np.mean([judge(p, s).strict for p, s in zip(to_uint8(seen), wanted, strict=True)]))


def log(path: Path, line: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------- flow
@torch.no_grad()
def latent_pool(vae: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, list[Spec]]:
    rng = np.random.default_rng([2, seed])
    wanted = captions(count, rng)
    with torch.autocast("cpu", torch.bfloat16):
        z = torch.cat(
            [vae.encode(pictures(wanted[i : i + 128], rng)).latent_dist.mode().float() for i in range(0, count, 128)]
        )
    return z, wanted


def encode(pipe, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The pipeline's own `encode_prompt`, with gradients where they are on, once per distinct prompt."""
    distinct = sorted(set(prompts))
    embeds, _, pooled, _ = pipe.encode_prompt(
        distinct, None, None, do_classifier_free_guidance=False, max_sequence_length=build.TOKENS
    )
    rows = torch.tensor([distinct.index(p) for p in prompts])
    return embeds[rows], pooled[rows]


def scale_latents(vae, z: Tensor) -> None:
    vae.register_to_config(shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4))


def train_flow(out: Path, steps: int, batch: int, save_every: int, peak: float, init: Path | None) -> None:
    if init is None:
        pipe = build.pipeline(seed=0)
        autoencoder = load_file(out / "autoencoder.safetensors")
        pipe.vae.load_state_dict({k[4:]: v for k, v in autoencoder.items() if k.startswith("vae.")})
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(init, torch_dtype=torch.float32)
        save(out / "autoencoder.safetensors", {f"vae.{k}": v for k, v in pipe.vae.state_dict().items()}, 0)
    pipe.vae.requires_grad_(False)
    modules: dict[str, nn.Module] = {n: getattr(pipe, n).train().to(torch.bfloat16) for n in TRAINED}
    everything = nn.ModuleDict(modules)
    trainable = Trainable(everything)  # bfloat16 compute, float32 masters
    average = WeightSet(trainable, Ema(0.999))
    optimizer = torch.optim.AdamW(trainable.masters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    path, began = out / "flow.safetensors", time.time()
    start = resume(path, {"masters": _Named(trainable)}, optimizer)
    if start:
        trainable.publish()
        saved = load_file(path.with_name("flow_ema.safetensors"))
        average.values, average.updates = [saved[n] for n in trainable.names], start
    z, wanted = latent_pool(pipe.vae, POOL, seed=start)
    scale_latents(pipe.vae, latent_pool(pipe.vae, 4096, seed=12345)[0])
    running = 0.0
    for step in range(start, steps):
        rng = np.random.default_rng([3, step])
        torch.manual_seed(step)
        if step > start and step % REFRESH_EVERY == 0:
            spot = (step // REFRESH_EVERY * REFRESH) % POOL
            z[spot : spot + REFRESH], wanted[spot : spot + REFRESH] = latent_pool(pipe.vae, REFRESH, seed=step)
        rows = rng.integers(0, POOL, batch)
        x0 = (z[torch.from_numpy(rows)] - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        drop = rng.random(batch) < DROP_CAPTION
        text = ["" if d else wanted[r].prompt for r, d in zip(rows, drop, strict=True)]
        sigma = torch.sigmoid(torch.randn(batch) + 0.4)  # shifted a little to noise, where the layout is decided
        noise = torch.randn_like(x0)
        mixed = torch.lerp(x0, noise, sigma[:, None, None, None])
        with FusedForward():
            embeds, pooled = encode(pipe, text)
            v = pipe.transformer(mixed.bfloat16(), embeds, pooled, sigma * 1000, return_dict=False)[0]
        loss = (v.float() - (noise - x0)).square().mean()
        trainable.zero_grad()
        loss.backward()
        trainable.collect()
        nn.utils.clip_grad_norm_(trainable.masters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        trainable.publish()
        average.update()
        running += 0.01 * (loss.item() - running) if running else loss.item()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(path, training_state({"masters": _Named(trainable)}, optimizer), step + 1)
            ema = dict(zip(trainable.names, average.values, strict=True))
            save(path.with_name("flow_ema.safetensors"), ema, step + 1)
            with average.applied():
                everything.eval()
                line = {"step": step + 1, "loss": round(running, 4), **evaluate(pipe, 240)}
                everything.train()
            log(out / "flow.jsonl", line | {"seconds": round(time.time() - began, 1)})


@torch.no_grad()
def evaluate(pipe, count: int, guidance: float = 1.0) -> dict[str, float]:
    """Strict validation score by kind, ten Euler steps, without guidance, in bfloat16."""
    pipe.set_progress_bar_config(disable=True)
    wanted = balanced("validation", count)
    right: dict[str, list[bool]] = {k: [] for k in KINDS}
    for i in range(0, count, 120):
        part = wanted[i : i + 120]
        noise = torch.randn(len(part), 8, 8, 8, generator=torch.Generator().manual_seed(7 + i))
        with torch.autocast("cpu", torch.bfloat16):  # the autoencoder is float32
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
def distill(out: Path, steps: int, batch: int, save_every: int, peak: float, guidance: float) -> None:
    """Guidance distillation (Meng et al. 2023; FLUX.1-dev ships so): one forward learns to give the guided velocity.

    Without it, RL without guidance would mostly rediscover guidance. The empty prompt keeps its own velocity.
    """
    pipe = build.pipeline(seed=0)
    load_pretrained(pipe, out, "flow_ema.safetensors")
    for name in TRAINED:
        getattr(pipe, name).requires_grad_(False).eval().to(torch.bfloat16)
    teacher, student = pipe.transformer, copy.deepcopy(pipe.transformer).requires_grad_(True)
    prompts = [s.prompt for s in specs()]
    row = {p: i for i, p in enumerate([*prompts, ""])}
    with torch.no_grad():
        embeds, pooled = encode(pipe, [*prompts, ""])
    trainable = Trainable(student)
    average = WeightSet(trainable, Ema(0.99))
    optimizer = torch.optim.AdamW(trainable.masters, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    z, wanted = latent_pool(pipe.vae, POOL // 4, seed=777)
    began = time.time()
    for step in range(steps):
        rng = np.random.default_rng([4, step])
        torch.manual_seed(10**6 + step)
        rows = rng.integers(0, len(wanted), batch)
        x0 = (z[torch.from_numpy(rows)] - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        text = torch.tensor(
            [row["" if d else wanted[r].prompt] for r, d in zip(rows, rng.random(batch) < 0.1, strict=True)]
        )
        empty = torch.full_like(text, row[""])
        sigma = torch.sigmoid(torch.randn(batch) + 0.4)
        mixed = torch.lerp(x0, torch.randn_like(x0), sigma[:, None, None, None]).bfloat16()
        with FusedForward():
            with torch.no_grad():
                both = torch.cat([empty, text])
                v = teacher(
                    mixed.repeat(2, 1, 1, 1), embeds[both], pooled[both], (sigma * 1000).repeat(2), return_dict=False
                )[0]
                base, conditional = v.float().chunk(2)
            guess = student(mixed, embeds[text], pooled[text], sigma * 1000, return_dict=False)[0]
        loss = (guess.float() - base - guidance * (conditional - base)).square().mean()
        trainable.zero_grad()
        loss.backward()
        trainable.collect()
        nn.utils.clip_grad_norm_(trainable.masters, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup=30)
        optimizer.step()
        trainable.publish()
        average.update()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            with average.applied():
                pipe.transformer = student
                line = {"step": step + 1, "loss": round(loss.item(), 4), **evaluate(pipe, 240)}
            log(out / "distill.jsonl", line | {"seconds": round(time.time() - began, 1)})
    ema = load_file(out / "flow_ema.safetensors")
    ema |= {f"transformer.{n}": v for n, v in zip(trainable.names, average.values, strict=True)}
    save(out / "distilled.safetensors", ema, steps)


def load_pretrained(pipe, out: Path, weights: str) -> None:
    """Puts the trained autoencoder, transformer and text encoders (averaged weights) into a fresh pipeline."""
    autoencoder = load_file(out / "autoencoder.safetensors")
    pipe.vae.load_state_dict({k[4:]: v for k, v in autoencoder.items() if k.startswith("vae.")})
    pipe.vae.requires_grad_(False)
    scale_latents(pipe.vae, latent_pool(pipe.vae, 4096, seed=12345)[0])
    everything = nn.ModuleDict({n: getattr(pipe, n) for n in TRAINED})
    everything.load_state_dict({**everything.state_dict(), **load_file(out / weights)})


# ---------------------------------------------------------------------------------------------------------- ship
def ship(out: Path, to: Path, shift: float) -> None:
    """Writes the pipeline folder with the averaged weights; the transformer in bfloat16, the rest in float32."""
    pipe = build.pipeline(seed=0, shift=shift)
    load_pretrained(pipe, out, "distilled.safetensors")
    # The text encoders stay float32: transformers would load them in the dtype that they were saved in.
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(to)
    (to / "licence.json").write_text(json.dumps({"licence": "Apache-2.0"}) + "\n")
    print(f"{sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB in {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["autoencoder", "flow", "distill", "ship"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--peak", type=float, default=1.2e-3, help="peak learning rate of the flow stage")
    parser.add_argument("--init", type=Path, help="a pipeline folder whose weights the flow stage starts from")
    parser.add_argument("--guidance", type=float, default=1.2, help="what the distill stage builds in")
    parser.add_argument("--shift", type=float, default=3.0, help="the scheduler's shift")
    parser.add_argument("--to", type=Path, default=Path("src/tempflow/shapes/weights"))
    a = parser.parse_args()
    claim(a.out, "pretraining", "--out")
    if a.stage == "ship":
        check(a.to, None, "--to")
    if a.stage == "autoencoder":
        train_autoencoder(a.out, a.steps, a.batch, a.save_every)
    elif a.stage == "flow":
        train_flow(a.out, a.steps, a.batch, a.save_every, a.peak, a.init)
    elif a.stage == "distill":
        distill(a.out, a.steps, a.batch, a.save_every, a.peak, a.guidance)
    else:
        ship(a.out, a.to, a.shift)


if __name__ == "__main__":
    main()
