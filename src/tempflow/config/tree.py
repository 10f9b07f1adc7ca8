"""The whole configuration. What takes several fields is checked here, where they meet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from tempflow.algorithms.base import Algorithm
from tempflow.config.algorithm import AlgorithmConfig, to_algorithm
from tempflow.config.guards import GuardsConfig
from tempflow.config.parts import (
    OWN_REWARD,
    CheckpointConfig,
    CompositionConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    ScorerConfig,
    check_reward,
)
from tempflow.config.track import TrackConfig
from tempflow.grid import Grid
from tempflow.media import Size
from tempflow.rewards.compose import Composition
from tempflow.strict import Place, Strict, nearest, shown


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be a part of a folder's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "run"
        raise ValueError(
            f"{shown(name)} names a folder too: letters, digits, '.', '_', '-'; nearest valid: {shown(plain)}"
        )


class Config(Strict):
    """A run. `iterations` bounds it (never the clock), so that two runs with one seed write the same files."""

    name: str = Field(description="what the run is called; letters, digits, '.', '_', '-'")
    seed: int = Field(default=0, description="of all noise and prompt draws")
    iterations: int = Field(
        ge=1, le=1_000_000, description="how many; each is a rollout, its scores and the updates from them"
    )
    output: Place = Field(default="", description="folder for what the run writes (default: runs/NAME)")
    device: str = Field(default="cpu", description="auto, cpu, mps, cuda or cuda:N")
    threads: int | None = Field(default=None, ge=1, le=1024, description="torch threads (default: torch's own choice)")
    rollout_rows: int = Field(
        default=96, ge=1, le=1_000_000, description="most rows of a forward in sampling and evaluation"
    )
    rollout_leaves: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="most pictures, or frames of clips, of a chunk of whole prompts (one at least) that is grown, then "
        "decoded and scored; of large ones fewer, 1 GiB together",
    )
    overlap: bool = Field(
        default=True,
        description="score a chunk while the next is grown, a thread a reward; false = in turn, in the main thread",
    )
    train_rows: int = Field(default=96, ge=1, le=1_000_000, description="edges of a training micro-batch")
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(to_algorithm)] = Field(
        description="how weights are trained (`tempflow algorithms` lists them)"
    )
    model: ModelConfig = Field(default=ModelConfig(), description="the generator")
    data: DataConfig = Field(default=DataConfig(), description="prompts")
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = Field(
        default=(RewardConfig(),), description="what is rewarded; several are summed by weight"
    )
    composition: CompositionConfig = Field(default=CompositionConfig(), description="how several rewards are joined")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="validation and test")

    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="what is kept to go on from")
    guards: GuardsConfig = Field(default=GuardsConfig(), description="what stops a run, or warns")
    track: TrackConfig = Field(default=TrackConfig(), description="experiment trackers")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="several processes")

    @property
    def size(self) -> Size:
        """Of what is drawn."""
        m = self.model
        return Size(m.height, m.width, m.frames, m.fps, m.seconds)

    def grid_steps(self, algorithm: Algorithm) -> dict[str, int]:
        """How many steps are walked on the model's grid, by the field that says it."""
        drafted = {} if algorithm.draft is None else {"algorithm.draft_steps": algorithm.draft.steps}
        return {"algorithm.steps": algorithm.steps, **drafted, "evaluation.steps": self.evaluation.steps}

    @contextmanager
    def naming(self, section: str) -> Iterator[None]:
        """Around work with a section's values: a ValueError that begins with one of its fields ("height: …") names it
        as the configuration does ("model.height: …")."""
        try:
            yield
        except ValueError as error:
            field = re.match(r"\w+(?=[:,])", str(error))
            if field is None or field[0] not in type(getattr(self, section)).model_fields:
                raise
            raise ValueError(f"{section}.{error}") from error

    def replace(self, **fields: Any) -> Config:
        """A copy with other top-level fields, checked as a whole; `output` follows a new `name` unless it is given."""
        kept = {key: value for key, value in self if not (key == "output" and "name" in fields)}
        return Config(**(kept | fields))

    def with_model(self, **fields: Any) -> Config:
        """A copy with other fields of its model."""
        return self.replace(model=self.model.model_copy(update=fields))

    def weights_at(self, iteration: int) -> dict[str, float]:
        """Weight of each reward in an iteration, from 0."""
        return {reward.name: reward.weight_at(iteration) for reward in self.rewards}

    @property
    def scheduled(self) -> Callable[[int], dict[str, float]] | None:
        """`weights_at`, where some weight changes."""
        return self.weights_at if any(reward.schedule for reward in self.rewards) else None

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward in the last iteration, by which evaluations judge."""
        return self.weights_at(self.iterations - 1)

    def compose(self, given: Sequence[str] | None = None) -> Composition | None:
        """What the rewards become beside a sum by weight; None: nothing else.

        given   names of rewards that were given as objects: each weighs 1 and none is a gate; None: these here
        """
        c = self.composition
        gates = {r.name: r.at_least for r in self.rewards if given is None and r.at_least is not None}
        weights = self.weights_at(0) if given is None else dict.fromkeys(given, 1.0)
        found = Composition(weights, "product" if c.how == "product" else "sum", gates, c.gated, c.drop_above)
        return found if found.adds or found.drop_above < 1 else None

    @property
    def judges(self) -> tuple[ScorerConfig, ...]:
        """What evaluations score by beside the trained rewards: the metric and the gold."""
        trained = {reward.name for reward in self.rewards}
        named = {scorer.name: scorer for scorer in self.evaluation.rewards}
        extra = {*named, self.evaluation.metric, *self.evaluation.gold} - {OWN_REWARD} - trained
        return tuple(named.get(name) or ScorerConfig(name=name) for name in sorted(extra))

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and not given.get("output") and isinstance(given.get("name"), str):
            return {**given, "output": f"runs/{given['name']}"}
        return given

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        check_name(name)
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            options = ("auto", "cpu", "mps", "cuda", "cuda:0")
            raise ValueError(f"{shown(device)} is no device; nearest valid: {nearest(device, options)}")
        return device

    @field_validator("rewards")
    @classmethod
    def _some_reward(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        names = [reward.name for reward in rewards]
        if not names:
            raise ValueError("[] leaves nothing to learn from; nearest valid: [{name: shapes}]")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"{shown(twice[0])} is named twice; nearest valid: once, with the weights' sum; or two names with the "
                "same `kind`"
            )
        if not any(reward.teaches for reward in rewards):
            raise ValueError("all weights are 0, which leaves nothing to learn from; nearest valid: a weight of 1.0")
        return rewards

    @model_validator(mode="after")
    def _some_weight_always(self) -> Config:
        scheduled = next((number for number, reward in enumerate(self.rewards) if reward.schedule), None)
        if scheduled is None:
            return self
        iterations = np.arange(self.iterations)
        silent = ~np.any([reward.weights_at(iterations) for reward in self.rewards], axis=0)
        if silent.any():
            raise ValueError(
                f"rewards.{scheduled}.schedule: all weights are 0 in iteration {int(silent.argmax())} (from 0), which "
                "leaves nothing to learn from; nearest valid: a weight of 0.01 there"
            )
        return self

    @model_validator(mode="after")
    def _judges(self) -> Config:
        e, trained = self.evaluation, {reward.name for reward in self.rewards}
        own = [scorer.name for scorer in e.rewards]
        for number, name in enumerate(own):
            if name in trained or name in own[:number]:
                raise ValueError(f"evaluation.rewards.{number}.name: {shown(name)} is named twice; nearest valid: once")
        for name in e.gold:
            if name in {reward.name for reward in self.rewards if reward.teaches}:
                raise ValueError(f"evaluation.gold: {shown(name)} is trained on; nearest valid: a reward that is not")
            check_reward("evaluation.gold", name, {*own, *trained})
        check_reward("evaluation.metric", e.metric, {OWN_REWARD, *own, *trained})
        return self

    @model_validator(mode="after")
    def _composed(self) -> Config:
        c = self.composition
        for number, reward in enumerate(self.rewards):
            if reward.stream and (c.how == "product" or any(r.at_least is not None for r in self.rewards)):
                raise ValueError(
                    f"rewards.{number}.stream: {shown(reward.stream)}, but products and gates join all streams; "
                    "nearest valid: ''"
                )
            if reward.at_least is not None and c.how == "normalised":
                raise ValueError(
                    f"rewards.{number}.at_least: {reward.at_least:g}, but how 'normalised' sums advantages; "
                    "nearest valid: null, or composition.how 'sum'"
                )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Config:
        algorithm = self.algorithm.build()
        if not isinstance(self.model.grid, str):
            for field, steps in self.grid_steps(algorithm).items():
                Grid(self.model.grid).check_steps(field, steps)
        self.guards.check(algorithm.name, algorithm.compared)
        cost = algorithm.seeded(self.seed).cost(0, self.data.prompts_per_iteration)
        updates = self.optimizer.updates_per_iteration
        if updates > cost.trained_edges:
            raise ValueError(
                f"optimizer.updates_per_iteration: {updates} updates share {cost.trained_edges} trained edges of an "
                f"iteration; nearest valid: {cost.trained_edges}"
            )
        return self
