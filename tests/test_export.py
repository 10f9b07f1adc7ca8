"""Exports load in plain diffusers and draw what the run's own model draws; the card claims only what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from arithmetic import agree
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow.cli.export import export_verb
from tempflow.config import Config, load_config, to_yaml
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.evaluate.suite import draw
from tempflow.export import export_run, push
from tempflow.export import write as export_write
from tempflow.media import Size
from tempflow.models import load, shapes_folder
from tempflow.models.lora_files import load_lora
from tempflow.models.pipeline_folder import licence_of
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.recipes.shapes import shapes_lora, shapes_tempflow
from tempflow.request import asked
from tempflow.train import checkpoint

PROMPT, STEPS, SIZE, TOKENS = "a red circle", 3, Size(32, 32), 10
NOISE = Noise(seed=11)


# ---------------------------------------------------------------------------------------------------------- small runs
def configured(training: str, dtype: str, folder: Path, alpha: int = 16) -> Config:
    base = (shapes_lora if training == "lora" else shapes_tempflow)()
    model = base.model.model_dump() | {"dtype": dtype, "lora_rank": 8, "lora_alpha": alpha}
    return Config.model_validate(base.model_dump() | {"model": model, "output": str(folder)})


def report(mean: float) -> dict:
    return {
        "count": 1008, "failed": 0, "steps": 10, "guidance": 1.0, "seed": 1234,
        "mean": {"shapes": mean + 0.2, "shapes_strict": mean, "reward": 2 * mean + 0.2}, "by_kind": {},
    }  # fmt: skip


class Policy:
    """A model with a LoRA, or trained fully, whose weights are put in from float32, as a run puts in its masters."""

    def __init__(self, config: Config) -> None:
        m = config.model
        self.model = load("shapes", dtype=m.dtype)
        if m.training == "lora":
            self.model.add_lora(m.lora_rank, m.lora_alpha)
        else:
            self.model.train_fully()
        self.parameters = {n: p for n, p in self.model.network.named_parameters() if p.requires_grad}

    def changed(self, seed: int, size: float) -> dict[str, Tensor]:
        """Float32 weights well away from where they are."""
        random = torch.Generator().manual_seed(seed)
        start = {name: p.detach().float() for name, p in self.parameters.items()}
        spread = {name: size * value.abs().mean().clamp(min=0.02) for name, value in start.items()}
        return {n: v + spread[n] * torch.randn(v.shape, generator=random) for n, v in start.items()}

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


class MadeRun:
    """A finished run's folder as `train` leaves it, and its model with the best weights."""

    def __init__(self, folder: Path, training: str, dtype: str, alpha: int = 16) -> None:
        self.folder, self.config = folder, configured(training, dtype, folder, alpha)
        torch.manual_seed(0)
        self.policy = Policy(self.config)
        self.model = self.policy.model
        self.weights = {w: self.policy.changed(i, 0.6) for i, w in enumerate(("policy", "ema", "best"))}
        folder.mkdir()
        files = (checkpoint.WEIGHTS, checkpoint.AVERAGE)
        first = dict(zip(files, (self.policy.changed(9, 0.3), self.weights["best"]), strict=True))
        checkpoint.save(folder, 3, first, {}, best=True, keep=2)
        last = dict(zip(files, (self.weights[w] for w in ("policy", "ema")), strict=True))
        checkpoint.save(folder, 7, last, {}, best=False, keep=2)
        self.policy.put(self.weights["best"])
        self.model.save(str(folder / "model"))
        (folder / "config.yaml").write_text(to_yaml(self.config))
        summary = {"metric": "shapes_strict", "before": report(0.3125), "after": report(0.5), "best_iteration": 4}
        (folder / "summary.json").write_text(json.dumps(summary))

    def latents(self, which: str = "best") -> Tensor:
        """By our own rollout, as evaluation does."""
        self.policy.put(self.weights[which])
        forest = rollout(
            [plan.ode(STEPS, 1)],
            ODE(),
            self.model.schedule(STEPS, SIZE),
            self.model.predictor(self.model.encode(asked([PROMPT]), SIZE), 1.0),
            NOISE,
            shape=self.model.noise_shape(SIZE),
        )
        self.policy.put(self.weights["best"])
        return forest.nodes[forest.leaves.node]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], MadeRun]:
    kept: dict[tuple[str, str], MadeRun] = {}

    def make(training: str, dtype: str) -> MadeRun:
        if (training, dtype) not in kept:
            folder = tmp_path_factory.mktemp("runs") / f"{training}-{dtype}"
            kept[training, dtype] = MadeRun(folder, training, dtype)
        return kept[training, dtype]

    return make


# ----------------------------------------------------------------------------------------------------- plain diffusers
def plain(folder: Path, dtype: str, lora: Path | None = None) -> StableDiffusion3Pipeline:
    with quiet():
        pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), torch_dtype=getattr(torch, dtype))
        if lora is not None:
            pipe.load_lora_weights(str(lora))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def euler(pipe: StableDiffusion3Pipeline) -> Tensor:
    """x ← x + (σ' − σ)·v in float32, by the pipeline's own parts."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        PROMPT, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas
    x = noise()
    for i in range(STEPS):
        v = pipe.transformer(
            hidden_states=x.to(pipe.transformer.dtype),
            timestep=sigmas[i : i + 1] * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        x = x + (sigmas[i + 1] - sigmas[i]) * v.float()
    return x


def called(pipe: StableDiffusion3Pipeline) -> Tensor:
    return pipe(
        PROMPT,
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=noise(),
        output_type="latent",
        max_sequence_length=TOKENS,
    ).images


def noise() -> Tensor:
    return NOISE.initial([(0, 0)], (8, 8, 8))


def base_latents(dtype: str) -> Tensor:
    return euler(plain(shapes_folder(), dtype))


# ---------------------------------------------------------------------------------------------------------- same draws
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_an_export_draws_the_runs_own_latents_bit_by_bit(made, tmp_path: Path, training: str, dtype: str) -> None:
    run, to = made(training, dtype), tmp_path / "out"
    assert export_run(run.folder, to) == to
    pipe = plain(shapes_folder(), dtype, lora=to) if training == "lora" else plain(to, dtype)
    expected = run.latents()
    assert (expected - base_latents(dtype)).abs().mean() > 0.02  # otherwise equality would say little
    assert agree(euler(pipe), expected)
    if dtype == "float32":  # in bfloat16 the pipeline's call rounds the latents too
        assert agree(called(pipe), expected)
    adapter = SD3(pipe, "export", "unknown")
    options = {"steps": STEPS, "guidance": 1.0, "seed": 5, "size": SIZE, "rows": 8}
    assert agree(
        draw(adapter, asked([PROMPT]), **options).pictures(), draw(run.model, asked([PROMPT]), **options).pictures()
    )


def test_a_peft_folder_draws_the_same_latents(made, tmp_path: Path) -> None:
    from peft import PeftModel

    run = made("lora", "float32")
    export_run(run.folder, tmp_path / "out", form="peft")
    names = {"adapter_config.json", "adapter_model.safetensors", "licence.json", "README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} >= names
    pipe = plain(shapes_folder(), "float32")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(tmp_path / "out")).eval()
    assert agree(euler(pipe), run.latents())


def test_comfyuis_form_draws_the_same_latents(made, tmp_path: Path) -> None:
    run = made("lora", "float32")
    export_run(run.folder, tmp_path / "mine", form="comfyui")
    names = {"mine.safetensors", "licence.json", "README.md"}
    assert {p.name for p in (tmp_path / "mine").iterdir()} >= names
    assert all(n.startswith("diffusion_model.joint_blocks.") for n in load_file(tmp_path / "mine" / "mine.safetensors"))
    model = load("shapes", dtype="float32")
    load_lora(model, tmp_path / "mine")
    assert agree(euler(model.pipe), run.latents())
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "Copy `mine.safetensors` to ComfyUI's `models/loras`" in text and "```" not in text


def test_merging_is_the_sum_in_float32_and_diffusers_own_fusing_agrees(made, tmp_path: Path) -> None:
    run = made("lora", "float32")
    export_run(run.folder, tmp_path / "out", form="merged")
    pipe = plain(tmp_path / "out", "float32")
    fused = plain(shapes_folder(), "float32", lora=run.folder / "model")
    fused.fuse_lora()
    fused.unload_lora_weights()
    state, theirs = pipe.transformer.state_dict(), fused.transformer.state_dict()
    assert state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k]) for k in state)
    base = plain(shapes_folder(), "float32").transformer.state_dict()
    assert sum(not torch.equal(state[k], base[k]) for k in state) == len(run.weights["best"]) // 2
    expected = run.latents()
    assert (called(pipe) - expected).abs().max() <= 1e-5 * expected.abs().max()


def on_another_base(run: MadeRun, folder: Path, base: Path) -> Path:
    """A copy of the run's folder that names another base."""
    shutil.copytree(run.folder, folder)
    model = run.config.model.model_copy(update={"path": str(base)})
    (folder / "config.yaml").write_text(to_yaml(run.config.replace(model=model)))
    return folder


def test_a_merged_bfloat16_export_rounds_the_sum_once(made, tmp_path: Path) -> None:
    """On a base with all the bits of float32, which the embedded one has not."""
    run = made("lora", "float32")
    shutil.copytree(shapes_folder(), tmp_path / "base")
    file = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.float() * 1.003 for name, value in load_file(file).items()}, file, {"format": "pt"})
    copy = on_another_base(run, tmp_path / "run", tmp_path / "base")
    export_run(copy, tmp_path / "out", form="merged", dtype="bfloat16")
    exact = plain(tmp_path / "base", "float32", lora=run.folder / "model")
    exact.fuse_lora()
    exact.unload_lora_weights()
    there = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    wanted = exact.transformer.state_dict()
    assert {t.dtype for t in there.values()} == {torch.bfloat16}
    assert all(torch.equal(value, wanted[name].bfloat16()) for name, value in there.items())
    expected = euler(exact)
    assert 0 < (euler(plain(tmp_path / "out", "bfloat16")) - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_a_scale_that_is_no_power_of_two(tmp_path: Path, form: str) -> None:
    """Then scale·B rounds once more; bit-equality is no longer promised."""
    run = MadeRun(tmp_path / "run", "lora", "float32", alpha=20)
    export_run(run.folder, tmp_path / "out", form=form)
    pipe = (
        plain(tmp_path / "out", "float32") if form == "merged" else plain(shapes_folder(), "float32", tmp_path / "out")
    )
    expected = run.latents()
    assert (called(pipe) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("training,which", [("lora", "policy"), ("lora", "ema"), ("lora", "best"), ("full", "policy")])
def test_weights_of_a_checkpoint(made, tmp_path: Path, training: str, which: str) -> None:
    run, to = made(training, "float32"), tmp_path / "out"
    export_run(run.folder, to, weights=which, checkpoint=3 if which == "best" else None)
    pipe = plain(shapes_folder(), "float32", lora=to) if training == "lora" else plain(to, "float32")
    assert agree(called(pipe), run.latents(which))
    assert "Held-out scores of these weights were not measured" in (to / "README.md").read_text()


def test_a_stopped_runs_best_weights_are_those_of_its_best_checkpoint(made, tmp_path: Path) -> None:
    run = made("lora", "float32")
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    export_run(tmp_path / "run", tmp_path / "out")
    assert agree(called(plain(shapes_folder(), "float32", lora=tmp_path / "out")), run.latents())
    assert "best weights of checkpoint 000003" in (tmp_path / "out" / "README.md").read_text()
    assert licence_of(tmp_path / "out") == "apache-2.0"
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "holds no checkpoint (config.yaml)" in refused(tmp_path / "run", tmp_path / "again")


def test_a_checkpoint_can_be_merged(made, tmp_path: Path) -> None:
    run = made("lora", "float32")
    export_run(run.folder, tmp_path / "out", weights="policy", form="merged")
    expected = run.latents("policy")
    assert (called(plain(tmp_path / "out", "float32")) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dtypes_of_the_files(made, tmp_path: Path) -> None:
    for form, dtype, file in [
        ("lora", "bfloat16", "pytorch_lora_weights.safetensors"),
        ("merged", "float32", "transformer/diffusion_pytorch_model.safetensors"),
    ]:
        export_run(made("lora", "bfloat16").folder, tmp_path / form, form=form, dtype=dtype)
        assert {t.dtype for t in load_file(tmp_path / form / file).values()} == {getattr(torch, dtype)}


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    from tempflow.train.trainer import train

    base = shapes_lora()
    config = Config.model_validate(
        base.model_dump()
        | {
            "iterations": 2,
            "output": str(tmp_path / "run"),
            "algorithm": base.algorithm.model_dump() | {"steps": 3, "seeds": 1, "branches": 3},
            "data": base.data.model_dump() | {"prompts_per_iteration": 3},
            "optimizer": base.optimizer.model_dump() | {"learning_rate": 1e-2, "warmup_iterations": 0},
            "evaluation": base.evaluation.model_dump() | {"every": 1, "validation_prompts": 6, "test_prompts": 12},
        }
    )
    run = train(config, quiet=True)
    export_run(tmp_path / "run", tmp_path / "out")
    pipe = plain(shapes_folder(), load_config(tmp_path / "run" / "config.yaml").model.dtype, lora=tmp_path / "out")
    options = {"steps": 10, "guidance": 1.0, "seed": 1234, "size": SIZE, "rows": 8}
    drawn = draw(SD3(pipe, "export", "unknown"), asked([PROMPT]), **options).pictures()
    assert agree(drawn, draw(run.model, asked([PROMPT]), **options).pictures())
    assert f"{run.after.mean('shapes_strict'):.4g}" in (tmp_path / "out" / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------- what is refused
def refused(run: Path, to: Path, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        export_run(run, to, **options)
    assert not list(to.parent.glob(".*partial*"))
    return str(error.value)


def test_a_full_run_has_no_lora(made, tmp_path: Path) -> None:
    for form in ("lora", "peft", "comfyui"):
        message = refused(made("full", "float32").folder, tmp_path / "out", form=form)
        assert message == f"form: {form!r}, but this run trained the whole network; nearest valid: 'merged'"
    assert not (tmp_path / "out").exists()


def test_comfyuis_form_needs_the_bases_configuration(made, tmp_path: Path) -> None:
    run = on_another_base(made("lora", "float32"), tmp_path / "run", tmp_path / "gone")
    message = refused(run, tmp_path / "out", form="comfyui")
    assert message.startswith("form: 'comfyui' needs the configuration of")
    assert message.endswith("which is not on this machine; nearest valid: 'lora'")


def test_a_target_that_is_not_empty_is_refused_and_kept(made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty; nearest valid: " in refused(made("lora", "float32").folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export_run(made("lora", "float32").folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").is_file()


def test_no_run_and_no_checkpoint(made, tmp_path: Path) -> None:
    run = made("lora", "float32").folder
    assert f"nearest run: {run}" in refused(run.with_name("lora-float23"), tmp_path / "out")
    assert refused(run, tmp_path / "out", checkpoint=8) == "checkpoint: 8 is not there; nearest valid: 7"
    assert "nearest valid: 'bfloat16'" in refused(run, tmp_path / "out", dtype="bfloat")


def test_weights_that_do_not_fit_the_base(made, tmp_path: Path) -> None:
    shutil.copytree(made("lora", "float32").folder, tmp_path / "run")
    file = tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors"
    save_file({k.replace("blocks.0", "blocks.9"): v for k, v in load_file(file).items()}, file)
    message = refused(tmp_path / "run", tmp_path / "out", form="merged")
    assert "its weight 'transformer_blocks.9.attn" in message and "is not in the base model" in message
    assert not (tmp_path / "out").exists()


def test_too_little_space(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export_write.shutil, "disk_usage", lambda path: usage._replace(free=17 << 20))
    assert "GB are needed and 0.02 GB are free" in refused(made("full", "float32").folder, tmp_path / "out")
    export_run(made("lora", "float32").folder, tmp_path / "lora")  # this one is small enough


def test_nothing_is_left_behind_when_writing_fails(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(export_write, "_write_papers", broken)
    with pytest.raises(OSError, match="disk is gone"):
        export_run(made("lora", "float32").folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ the card
def read_card(folder: Path) -> tuple[dict, str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_measured_and_the_licence(made, tmp_path: Path) -> None:
    export_run(made("lora", "bfloat16").folder, tmp_path / "out")
    front, body = read_card(tmp_path / "out")
    assert front["license"] == "apache-2.0" and front["library_name"] == "diffusers" and "lora" in front["tags"]
    assert licence_of(tmp_path / "out").lower() == licence_of(shapes_folder()).lower()
    assert json.loads((tmp_path / "out" / "licence.json").read_text()) == {"licence": "Apache-2.0"}
    for text in (
        "base: shapes", "a LoRA of rank 8, alpha 16, by `tempflow_grpo` with tempflow, in bfloat16",
        "reward: `shapes`, `shapes_strict`", "110 iterations; the weights are those after iteration 4",
        "| shapes_strict (metric) | 0.3125 | 0.5 |", "1008 held-out prompts", "10 steps, guidance 1, noise seed 1234",
    ):  # fmt: skip
        assert text in body, text
    assert "Measured before conversion" not in body and str(tmp_path) not in body


def test_the_card_of_an_offline_run_does_not_call_its_judges_rewards(made, tmp_path: Path) -> None:
    shutil.copytree(made("lora", "float32").folder, tmp_path / "run")
    config = made("lora", "float32").config.replace(algorithm={"name": "diffusion_dpo"})
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    export_run(tmp_path / "run", tmp_path / "out")
    body = read_card(tmp_path / "out")[1]
    assert "taught by pictures on disk (chosen, rejected); judged by: `shapes`, `shapes_strict`" in body
    assert "- reward:" not in body


@pytest.mark.parametrize("options", [{"form": "merged"}, {"dtype": "bfloat16"}])
def test_the_card_says_when_figures_are_of_another_form(made, tmp_path: Path, options: dict) -> None:
    export_run(made("lora", "float32").folder, tmp_path / "out", **options)
    assert "Measured before conversion to this form and dtype" in read_card(tmp_path / "out")[1]


def test_the_card_of_a_run_with_rewards_of_its_own_and_nothing_gained(made, tmp_path: Path) -> None:
    shutil.copytree(made("lora", "float32").folder, tmp_path / "run")
    config = made("lora", "float32").config
    gold = config.evaluation.model_copy(update={"gold": ("jpeg_compressibility",)})
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config.replace(evaluation=gold)))
    means = {"redness": 0.25, "jpeg_compressibility": -1.5, "reward": None}
    summary = {"metric": "reward", "best_iteration": 0, "before": report(0) | {"mean": means, "failed": 3}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"after": summary["before"]}))
    export_run(tmp_path / "run", tmp_path / "out")
    body = read_card(tmp_path / "out")[1]
    assert "reward: `redness`\n" in body and "shapes_strict" not in body
    assert "the untrained model: no later weights were better on validation" in body
    assert "| reward (metric) | not measured | not measured |" in body
    assert "scores failed on 3 pictures before and 3 after" in body


def test_a_stopped_run_claims_nothing(made, tmp_path: Path) -> None:
    shutil.copytree(made("lora", "float32").folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    export_run(tmp_path / "run", tmp_path / "out")
    body = read_card(tmp_path / "out")[1]
    assert "Held-out scores of these weights were not measured" in body and "0.3125" not in body
    assert "best weights of the stopped run, of a run of 110 iterations" in body


def test_licence_terms_of_a_base_with_a_card_travel(made, tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "some-community", "license_link": "LICENSE.md"}
    shutil.copytree(shapes_folder(), tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\nA base.\n")
    (tmp_path / "base" / "LICENSE.md").write_text("the terms")
    on_another_base(made("lora", "float32"), tmp_path / "run", tmp_path / "base")
    (tmp_path / "run" / "model" / "licence.json").unlink()
    export_run(tmp_path / "run", tmp_path / "out", form="merged")
    front, body = read_card(tmp_path / "out")
    assert {key: front[key] for key in terms} == terms
    assert licence_of(tmp_path / "out") == "some-community" and "carry its licence: some-community" in body
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "the terms"
    assert "base: base\n" in body and str(tmp_path) not in body


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_cards_lines_run(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: str) -> None:
    run = made(training, "float32")
    export_run(run.folder, tmp_path / "out")
    code = read_card(tmp_path / "out")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 7 and "max_sequence_length=10" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "picture.png").stat().st_size > 100


# -------------------------------------------------------------------------------------------------------- command line
def test_the_verb(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made("lora", "float32").folder
    assert export_verb([str(run), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors").popitem()[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "run: none given; nearest valid: tempflow export runs/NAME --output FOLDER"),
        (["runs/a/"], "output: none given; nearest valid: --output runs/a-export"),
        (["runs/a", "--output", "b", "--checkpoint", "-1"], "checkpoint: -1 must be ≥ 0; nearest valid: 0"),
        (["runs/a", "--output", "b"], "run: 'runs/a' has no config.yaml"),
    ],
)
def test_wrong_lines(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        export_verb(words)
    assert message in str(error.value)


# -------------------------------------------------------------------------------------------------------------- the hub
class Hub:
    """Stands in for huggingface_hub's HfApi."""

    calls: ClassVar[list[tuple[str, dict]]] = []
    refuses: ClassVar[Exception | None] = None

    def create_repo(self, repo_id: str, **options: object) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        if self.refuses is not None:
            raise self.refuses

    def upload_folder(self, **options: object) -> str:
        self.calls.append(("upload", options))
        return "https://hub/org/name/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("a card")
    return folder


def test_a_folder_goes_to_a_private_repository(exported: Path, hub: type[Hub]) -> None:
    line = push(exported, "org/name")
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1] == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert hub.calls[1][1]["folder_path"] == str(exported) and hub.calls[1][1]["repo_id"] == "org/name"
    assert line == "1 files, 0.0 MB are at https://hub/org/name/commit/1"


def test_a_dry_run_sends_nothing(exported: Path, hub: type[Hub]) -> None:
    assert push(exported, "org/name", dry=True).endswith("would go to org/name; nothing was sent")
    assert hub.calls == []


def test_a_hub_that_refuses_is_one_line(exported: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "refuses", OSError("401 Client Error\nUnauthorized"))
    with pytest.raises(
        ValueError, match=r"push_to_hub: 'org/name' cannot be written \(OSError: 401 .*hf auth login"
    ) as e:
        push(exported, "org/name")
    assert "\n" not in str(e.value) and (exported / "README.md").is_file()


@pytest.mark.parametrize("name", ["name", "a/b/c", "a b/c", ""])
def test_a_name_that_is_no_repository(exported: Path, hub: type[Hub], name: str) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub: .* is no repository; nearest valid: 'ORG/NAME'"):
        push(exported, name)
    assert hub.calls == []


def test_the_verb_checks_the_name_first_and_pushes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempflow.export as room

    done: list[tuple] = []
    monkeypatch.setattr(room, "export_run", lambda run, to, **options: done.append(("export", to)) or to)
    monkeypatch.setattr(room, "push", lambda folder, name, dry: done.append(("push", name, dry)) or "pushed")
    with pytest.raises(ValueError, match="push_to_hub"):
        export_verb(["runs/x", "--output", str(tmp_path / "o"), "--push-to-hub", "nowhere"])
    with pytest.raises(ValueError, match="dry_run: true, and nothing is to be pushed"):
        export_verb(["runs/x", "--output", str(tmp_path / "o"), "--dry-run"])
    assert done == []
    assert export_verb(["runs/x", "--output", str(tmp_path / "o"), "--push-to-hub", "org/x", "--dry-run"]) == 0
    assert done == [("export", tmp_path / "o"), ("push", "org/x", True)]
