"""The sections of a configuration: ranges are checked where a field is declared."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BeforeValidator, Field, field_validator, model_validator

from tempflow.data.prompts import check_source
from tempflow.grid import OWN, Stated, as_stated
from tempflow.names import EMBEDDED_MODELS
from tempflow.strict import Place, Strict, nearest, shown

OWN_REWARD = "reward"
"""The metric that means the run's own first reward, also where that was given to `tempflow.train` as an object."""


def as_start(given: object) -> object:
    """A start as a configuration has it: one place, or of several a tuple. Raises ValueError for what is no text, and
    for a place twice."""
    for place in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(place, str):
            raise ValueError(f"a text or several are meant (in YAML, quoted), not {shown(place)}; nearest valid: ''")
    if not isinstance(given, list | tuple):
        return given
    twice = next((place for n, place in enumerate(given) if place in given[:n]), None)
    if twice is not None:
        raise ValueError(f"{shown(twice)} stands in it twice; nearest valid: once")
    return tuple(given) if len(given) > 1 else given[0] if given else ""


class ModelConfig(Strict):
    """The generator, and what of it is trained."""

    path: Place = Field(
        default="shapes",
        min_length=1,
        description="'shapes' or 'shapes_tokens' (embedded), a diffusers pipeline folder, or a hub id",
    )
    revision: str | None = Field(default=None, description="commit, tag or branch of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="what the network computes in; auto: bfloat16 where hardware does it; float16 scales its loss",
    )
    accept_licence: str = Field(
        default="", description="a non-commercial licence that the model is under and you accept, by its name"
    )
    height: int = Field(default=32, ge=1, le=16_384, description="pixels")
    width: int = Field(default=32, ge=1, le=16_384, description="pixels")
    frames: int = Field(default=1, ge=1, le=100_000, description="of a clip; 1 = a picture")
    fps: float | None = Field(default=None, gt=0, description="frames a second of a clip; null = the model's own")
    seconds: float | None = Field(default=None, gt=0, description="of sound; null = as long as the frames")
    grid: Annotated[Stated, BeforeValidator(as_stated)] = Field(
        default=OWN,
        description="the σ grid of rollouts and evaluations: own (what the weights carry, else the scheduler's), "
        "scheduler, useful (N steps that all count), or points before the shift, one a step: 1 0.75 0.5 0.25",
    )
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance in rollout and training; 1 = none")
    guidance_options: dict[str, float | bool] = Field(
        default={}, description="the family's further settings of guidance, by name"
    )
    training: Literal["full", "lora"] = Field(
        default="full", description="train all of the network, or a LoRA on its attention"
    )
    start: Annotated[Place | tuple[Place, ...], BeforeValidator(as_start)] = Field(
        default="",
        description="what training starts from: a run's folder (its best weights) or a LoRA (diffusers, PEFT, kohya or "
        "ComfyUI form), which is trained on, or with full training merged; several runs of whole networks = the mean "
        "of their weights; empty = the model as it is",
    )
    reference: Place = Field(
        default="base",
        min_length=1,
        description="what the KL holds to: 'base' (the model as it is), 'start', or a run's folder or a LoRA as above",
    )
    lora_rank: int = Field(
        default=32, ge=1, le=16_384, description="rank of a fresh LoRA; one that is started from keeps its own"
    )
    lora_alpha: int = Field(
        default=64, ge=1, le=1_000_000, description="alpha of the LoRA; it is scaled by alpha / rank"
    )

    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="layers of a fresh LoRA: ends of their names, or regular expressions of all of it; empty = the "
        "family's own",
    )
    checkpointing: bool = Field(
        default=False, description="activation checkpointing: less memory, a third more compute in training"
    )
    compile: bool = Field(default=False, description="torch.compile of each block")
    attention: str = Field(default="", description="an attention backend of diffusers; empty = the network's own")
    vae_tiling: bool = Field(default=False, description="decode by overlapping tiles: less memory, other pictures")
    offload: bool = Field(
        default=False, description="text encoders and autoencoder wait on the CPU while they are not used"
    )
    quantise: Literal["none", "int8", "float8", "nf4"] = Field(
        default="none",
        description="how the frozen network under a LoRA is held (needs tempflow[quant] or, for nf4, tempflow[bits])",
    )
    cache: Place = Field(
        default="", description="a folder of encoded prompts that runs and ranks share; empty = in memory alone"
    )
    drop_encoders: bool = Field(
        default=False,
        description="encode all prompts first, then free the text encoders (with a cache, training a LoRA)",
    )
    cache_gib: float = Field(default=64.0, gt=0, description="most GiB of that folder; what was unused longest goes")

    @property
    def starts(self) -> tuple[str, ...]:
        """The places that `start` names."""
        return (self.start,) if isinstance(self.start, str) and self.start else tuple(self.start)

    @model_validator(mode="after")
    def _mean_of_whole_networks(self) -> ModelConfig:
        if len(self.starts) > 1 and self.training == "lora":
            raise ValueError("start: a mean is of whole networks, and training is 'lora'; nearest valid: one place")
        return self

    @model_validator(mode="after")
    def _dropped_for_good(self) -> ModelConfig:
        if self.drop_encoders and not self.cache:
            raise ValueError("drop_encoders: true needs a folder in model.cache; nearest valid: false")
        if self.drop_encoders and self.training == "full":
            raise ValueError("drop_encoders: true, but full training saves the whole pipeline; nearest valid: false")
        return self

    @model_validator(mode="after")
    def _revision_of_hub_only(self) -> ModelConfig:
        if self.revision is not None and self.path in EMBEDDED_MODELS:
            raise ValueError(
                f"revision: {shown(self.revision)} is for hub ids, {self.path!r} has none; nearest valid: null"
            )
        return self


class DataConfig(Strict):
    """Where prompts come from: 'shapes:SPLIT' or 'shapes:SPLIT:KIND,KIND', a .txt (a prompt a line), .jsonl, .json,
    .csv, .tsv or .parquet file, or a folder of .txt files (docs/prompts.md)."""

    train: Place = Field(default="shapes:train", description="prompts to train on")
    validation: Place = Field(default="shapes:validation", description="prompts that choose the best weights")
    test: Place = Field(default="shapes:test", description="prompts of the reported figures")
    prompts_per_iteration: int = Field(default=8, ge=1, le=100_000, description="prompts drawn for an iteration")

    @field_validator("train", "validation", "test")
    @classmethod
    def _source(cls, source: str) -> str:
        check_source(source)
        return source


class ScorerConfig(Strict):
    """What scores pictures (`tempflow rewards` lists all). Your own function is passed to `tempflow.train` instead."""

    name: str = Field(default="shapes", description="which reward; with `kind`, what this one is called")
    kind: str = Field(default="", description="which reward, where several are of one kind; empty = the name says it")
    options: dict[str, Any] = Field(default={}, description="the reward's own settings, by name (docs/rewards.md)")
    frames: int | None = Field(
        default=None, ge=1, le=10_000, description="for clips: the mean over so many frames, by a reward of pictures"
    )
    timeout: float | None = Field(
        default=None, gt=0, description="seconds a scoring call may take before its scores are failed; null = any"
    )

    @model_validator(mode="after")
    def _known_reward(self) -> Self:
        check_reward("kind" if self.kind else "name", self.kind or self.name)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", self.name) or self.name == OWN_REWARD:
            near = re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name)[:64].lstrip(".-") or "my_reward"
            near = "my_reward" if near == OWN_REWARD else near
            raise ValueError(f"name: {shown(self.name)} names a column; nearest valid: {shown(near)}")
        from tempflow.rewards import REWARDS, checked  # here, as below

        if (self.kind or self.name) in REWARDS:  # what other packages' take is checked when it is made
            checked(REWARDS[self.kind or self.name], self.options)
        return self


class RewardConfig(ScorerConfig):
    """A reward that teaches, and how much."""

    weight: float = Field(default=1.0, description="its factor in the sum of rewards")
    schedule: dict[int, float] = Field(
        default={}, description="iteration → weight, linear between them, in place of `weight`; empty = none"
    )
    at_least: float | None = Field(
        default=None, description="a gate: pictures that it scores lower get `composition.gated`; null = none"
    )
    stream: str = Field(
        default="",
        description="which of a model's several streams (video, sound) it teaches; empty = all",
    )

    @model_validator(mode="after")
    def _from_the_start(self) -> Self:
        if any(iteration < 0 for iteration in self.schedule):
            raise ValueError(f"schedule: {min(self.schedule)} is no iteration; nearest valid: 0")
        return self

    def weight_at(self, iteration: int) -> float:
        """Its weight in an iteration, from 0: before the schedule's first the first's, after the last the last's."""
        return float(self.weights_at(np.array([iteration]))[0])

    def weights_at(self, iterations: np.ndarray) -> np.ndarray:
        """The same of several."""
        at = sorted(self.schedule)
        return np.interp(iterations, at or [0], [self.schedule[i] for i in at] or [self.weight])

    @property
    def teaches(self) -> bool:
        """Whether it ever has a weight."""
        return any(self.schedule.values()) if self.schedule else self.weight != 0


class CompositionConfig(Strict):
    """How several rewards become what is learned from. A score that failed makes that picture's failed."""

    how: Literal["sum", "normalised", "product"] = Field(
        default="sum",
        description="sum: of scores by weight; normalised: each reward's advantages, summed by weight (GDPO); product: "
        "of scores, each to the power of its weight",
    )
    gated: float = Field(default=0.0, description="what a picture gets that misses a gate (`rewards.N.at_least`)")
    drop_above: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="a prompt of which a larger share of pictures has failed scores teaches nothing; 1 = never",
    )


class OptimizerConfig(Strict):
    """AdamW on float32 weights."""

    kind: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit holds the moments of large tensors in 8 bits (needs tempflow[bits])"
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the gradient's average")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="decay of the squared gradient's average")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    updates_per_iteration: int = Field(
        default=1, ge=1, le=100_000, description="optimizer steps; each takes its share of the edges"
    )
    warmup_iterations: int = Field(
        default=0, ge=0, le=1_000_000, description="iterations over which the learning rate rises from 0"
    )
    decay: Literal["none", "linear", "cosine"] = Field(
        default="none",
        description="how the learning rate falls towards 0 from the warm-up's end to the run's",
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the average weights that are evaluated; 0 = off"
    )

    def rate(self, iteration: int, iterations: int) -> float:
        """The learning rate of an iteration, from 0, of a run of `iterations`: it rises linearly in the warm-up, then
        falls by `decay`; the last iteration's is above 0."""
        if iteration < self.warmup_iterations:
            return self.learning_rate * (iteration + 1) / (self.warmup_iterations + 1)
        left = (iterations - iteration) / max(1, iterations - self.warmup_iterations)
        fall = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.learning_rate * fall[self.decay]


class EvaluationConfig(Strict):
    """Deterministic sampling of fixed prompts from fixed noise, by the average weights if there are any."""

    every: int = Field(default=10, ge=0, description="iterations between validations; 0 = only at the end")
    validation_prompts: int = Field(default=120, ge=1, le=1_000_000, description="pictures of a validation")
    test_prompts: int = Field(default=504, ge=1, le=1_000_000, description="pictures of the test before and after")
    steps: int = Field(default=10, ge=1, le=1_000, description="sampler steps")
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance; 1 = none")
    seed: int = Field(default=1234, description="seed of the noise")
    yardstick: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=(),
        description="guidance values (≥ 1) of which the untrained model's best is reported beside the result",
    )
    rewards: Annotated[tuple[ScorerConfig, ...], Field(strict=False)] = Field(
        default=(), description="rewards with options that `gold` and `metric` name, and that are not trained on"
    )
    gold: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="rewards that are judged but not trained on, to see whether the gain is real"
    )
    metric: str = Field(
        default="shapes_strict", description=f"a reward's name, or '{OWN_REWARD}': the run's weighted sum"
    )
    before: Place = Field(
        default="",
        description="folder of a run set alike, whose test of the untrained model is taken over; empty = tested anew",
    )

    @field_validator("yardstick")
    @classmethod
    def _guidances(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        low = [v for v in values if v < 1]
        if low:
            raise ValueError(f"{low[0]} is no guidance; nearest valid: 1.0")
        return values


class CheckpointConfig(Strict):
    """What is kept to go on from; the best by validation is kept in any case."""

    every: int = Field(default=10, ge=1, description="iterations between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept beside the best")
    background: bool = Field(
        default=False,
        description="write them while the next iteration runs, from a copy in the CPU's memory (one process)",
    )


class ParallelConfig(Strict):
    """Several processes, started by torchrun. Prompts per iteration and samples per prompt are the whole run's."""

    mode: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="ddp: every rank holds the network; fsdp: a part, gathered block by block (FSDP2)"
    )


def check_reward(field: str, name: str, more: Collection[str] = ()) -> None:
    """Whether a reward is known, or one of `more`. Raises ValueError, naming the field."""
    from tempflow.rewards import names  # here, so that a configuration does not import what rewards need

    known = (*more, *names())
    if ":" in name:
        raise ValueError(
            f"{field}: {shown(name)}: a configuration names known rewards only, never code; pass your function to "
            f"tempflow.train, or register it as an entry point; nearest valid: {nearest(name, known)}"
        )
    if name not in known:
        raise ValueError(f"{field}: {shown(name)} is no known reward; nearest valid: {nearest(name, known)}")
