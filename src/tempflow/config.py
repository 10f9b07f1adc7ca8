"""A run's configuration: one frozen, strict tree, the same for Python, YAML and the command line.

Ranges are checked where a field is declared; what takes several fields, where they meet. Every message names the field,
the value and the nearest valid one. An algorithm's fields are the parameters of its function: written once, there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    create_model,
    field_validator,
    model_validator,
)

from tempflow.algorithms import ALGORITHMS, Algorithm, find
from tempflow.data.prompts import check_source, nearest_file
from tempflow.strict import ConfigError, Strict, nearest, validated

MAX_YAML_BYTES = 2**20
OWN_REWARD = "reward"
"""The metric that means the run's own first reward, also where that was given to `tempflow.train` as an object."""


class ModelConfig(Strict):
    """The generator, and what of it is trained."""

    path: str = Field(
        default="shapes", min_length=1, description="'shapes' (embedded), a diffusers pipeline folder, or a hub id"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch of a hub id")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="what the network computes in")
    height: int = Field(default=32, ge=1, description="pixels")
    width: int = Field(default=32, ge=1, description="pixels")
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance in rollout and training; 1 = none")
    training: Literal["full", "lora"] = Field(
        default="full", description="train all of the network, or a LoRA on its attention"
    )
    lora_rank: int = Field(default=32, ge=1, description="rank of the LoRA")
    lora_alpha: int = Field(default=64, ge=1, description="alpha of the LoRA; it is scaled by alpha / rank")

    @model_validator(mode="after")
    def _revision_of_hub_only(self) -> ModelConfig:
        if self.revision is not None and self.path == "shapes":
            raise ValueError(f"revision: {self.revision!r} is for hub ids, 'shapes' has none; nearest valid: null")
        return self


class DataConfig(Strict):
    """Where prompts come from: 'shapes:SPLIT', a .txt file (a prompt a line) or a .jsonl file ({"prompt": …} lines)."""

    train: str = Field(default="shapes:train", description="prompts to train on")
    validation: str = Field(default="shapes:validation", description="prompts that choose the best weights")
    test: str = Field(default="shapes:test", description="prompts of the reported figures")
    prompts_per_iteration: int = Field(default=8, ge=1, description="prompts drawn for an iteration")

    @field_validator("train", "validation", "test")
    @classmethod
    def _source(cls, source: str) -> str:
        check_source(source)
        return source


class RewardConfig(Strict):
    """A reward by name (`tempflow rewards` lists them). Your own function is passed to `tempflow.train` instead."""

    name: str = Field(default="shapes", description="which reward")
    weight: float = Field(default=1.0, description="its factor in the sum of rewards")

    @field_validator("name")
    @classmethod
    def _known_reward(cls, name: str) -> str:
        _check_reward(name, ())
        return name


class OptimizerConfig(Strict):
    """AdamW on float32 weights."""

    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the gradient's average")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="decay of the squared gradient's average")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    updates_per_iteration: int = Field(
        default=1, ge=1, description="optimizer steps; each takes its share of the edges"
    )
    warmup_iterations: int = Field(default=0, ge=0, description="iterations over which the learning rate rises from 0")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the average weights that are evaluated; 0 = off"
    )


class EvaluationConfig(Strict):
    """Deterministic sampling of fixed prompts from fixed noise, by the average weights if there are any."""

    every: int = Field(default=10, ge=0, description="iterations between validations; 0 = only at the end")
    validation_prompts: int = Field(default=120, ge=1, description="pictures of a validation")
    test_prompts: int = Field(default=504, ge=1, description="pictures of the test before and after")
    steps: int = Field(default=10, ge=1, description="sampler steps")
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance; 1 = none")
    seed: int = Field(default=1234, description="seed of the noise")
    yardstick: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=(),
        description="guidance values (≥ 1) of which the untrained model's best is reported beside the result",
    )
    metric: str = Field(
        default="shapes_strict", description=f"a reward's name, or '{OWN_REWARD}': the run's weighted sum"
    )

    @field_validator("yardstick")
    @classmethod
    def _guidances(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        low = [v for v in values if v < 1]
        if low:
            raise ValueError(f"{low[0]} is no guidance; nearest valid: 1.0")
        return values

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        _check_reward(metric, (OWN_REWARD,))
        return metric


class AlgorithmConfig(Strict):
    """An algorithm by name, with the parameters of its function as further fields."""

    name: str = Field(description="which algorithm")

    def build(self) -> Algorithm:
        """The algorithm itself. Raises its function's ValueErrors."""
        parameters = {key: value for key, value in self if key != "name"}
        return find(self.name)(**parameters)

    @model_validator(mode="after")
    def _buildable(self) -> AlgorithmConfig:
        self.build()
        return self


@lru_cache
def algorithm_config(name: str) -> type[AlgorithmConfig]:
    """The configuration class of an algorithm: a field for each parameter of its function, with its default.

    Descriptions come from the "Args:" part of the function's docstring. Raises ValueError for an unknown name.
    """
    function = find(name)
    hints, texts = get_type_hints(function), _argument_texts(function.__doc__ or "")
    fields: dict[str, Any] = {"name": (Literal[name], Field(default=name, description="which algorithm"))}
    for parameter in inspect.signature(function).parameters.values():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], Field(default=default, description=texts.get(parameter.name)))
    label = "".join(word.capitalize() for word in name.split("_")) + "Config"
    summary = inspect.cleandoc(function.__doc__ or name).partition("\n")[0]
    return create_model(label, __base__=AlgorithmConfig, __doc__=summary, **fields)


def _argument_texts(docstring: str) -> dict[str, str]:
    """What the "Args:" part of a docstring says of each parameter."""
    part = inspect.cleandoc(docstring).partition("Args:\n")[2]
    texts: dict[str, str] = {}
    current = ""
    for line in part.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            current = start[1]
            texts[current] = start[2]
        elif current and line.startswith("        "):
            texts[current] += " " + line.strip()
        else:
            break
    return texts


def _to_algorithm(given: Any) -> Any:
    """A mapping becomes the configuration of the algorithm that it names."""
    if not isinstance(given, Mapping):
        return given
    if "name" not in given:
        raise ValueError(f"name: missing; nearest valid: one of {', '.join(ALGORITHMS)}")
    if not isinstance(given["name"], str):
        raise ValueError(f"name: {given['name']!r} is not a text; nearest valid: one of {', '.join(ALGORITHMS)}")
    return algorithm_config(given["name"]).model_validate(given)


class Config(Strict):
    """A run. `iterations` bounds it (never the clock), so that two runs with one seed write the same files."""

    name: str = Field(description="what the run is called; letters, digits, '.', '_', '-'")
    seed: int = Field(default=0, description="of all noise and prompt draws")
    iterations: int = Field(ge=1, description="how many; each is a rollout, its scores and the updates from them")
    output: str = Field(default="", description="folder for what the run writes (default: runs/NAME)")
    device: str = Field(default="cpu", description="auto, cpu, mps, cuda or cuda:N")
    threads: int | None = Field(default=None, ge=1, description="torch threads (default: torch's own choice)")
    rollout_rows: int = Field(default=96, ge=1, description="most rows of a forward in sampling and evaluation")
    train_rows: int = Field(default=96, ge=1, description="edges of a training micro-batch")
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(_to_algorithm)] = Field(
        description="how weights are trained (`tempflow algorithms` lists them)"
    )
    model: ModelConfig = Field(default=ModelConfig(), description="the generator")
    data: DataConfig = Field(default=DataConfig(), description="prompts")
    rewards: Annotated[tuple[RewardConfig, ...], Field(strict=False)] = Field(
        default=(RewardConfig(),), description="what is rewarded; several are summed by weight"
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="validation and test")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.model.height, self.model.width)

    def replace(self, **fields: Any) -> Config:
        """A copy with other top-level fields, checked as a whole; `output` follows a new `name` unless it is given."""
        kept = {key: value for key, value in self if not (key == "output" and "name" in fields)}
        return Config(**(kept | fields))

    @property
    def reward_weights(self) -> dict[str, float]:
        """Factor of each reward, for `GroupZScore.reward_weights`."""
        return {reward.name: reward.weight for reward in self.rewards}

    @model_validator(mode="before")
    @classmethod
    def _default_output(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and not given.get("output") and isinstance(given.get("name"), str):
            return {**given, "output": f"runs/{given['name']}"}
        return given

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "run"
            raise ValueError(f"{name!r} names a folder too: letters, digits, '.', '_', '-'; nearest valid: {plain!r}")
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            options = ("auto", "cpu", "mps", "cuda", "cuda:0")
            raise ValueError(f"{device!r} is no device; nearest valid: {nearest(device, options)}")
        return device

    @field_validator("rewards")
    @classmethod
    def _some_reward(cls, rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        names = [reward.name for reward in rewards]
        if not names:
            raise ValueError("[] leaves nothing to learn from; nearest valid: [{name: shapes}]")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is named twice; nearest valid: once, with the weights' sum")
        if all(reward.weight == 0 for reward in rewards):
            raise ValueError("all weights are 0, which leaves nothing to learn from; nearest valid: a weight of 1.0")
        return rewards

    @model_validator(mode="after")
    def _fits(self) -> Config:
        cost = self.algorithm.build().cost(0, self.data.prompts_per_iteration)
        updates = self.optimizer.updates_per_iteration
        if updates > cost.trained_edges:
            raise ValueError(
                f"optimizer.updates_per_iteration: {updates} updates share {cost.trained_edges} trained edges of an "
                f"iteration; nearest valid: {cost.trained_edges}"
            )
        return self


def _check_reward(name: str, extra: tuple[str, ...]) -> None:
    from tempflow.rewards import names  # here, so that a configuration does not import what rewards need

    known = (*extra, *names())
    if ":" in name:
        raise ValueError(
            f"{name!r}: a configuration names known rewards only, never code; pass your function to tempflow.train, "
            f"or register it as an entry point; nearest valid: {nearest(name, known)}"
        )
    if name not in known:
        raise ValueError(f"{name!r} is no known reward; nearest valid: {nearest(name, known)}")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as people mean it, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def parse_config(given: Any) -> Config:
    """A mapping, as YAML has it, to a `Config`. Raises ConfigError, a line for each fault."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"a configuration is a mapping of fields, not {type(given).__name__}; start with 'name: …'")
    return validated(Config, given, _narrowed(given.get("algorithm")))


def _narrowed(given: Any) -> dict[str, type[BaseModel]]:
    """Which algorithm's fields a faulty configuration meant, as far as it can be told."""
    name = given.get("name") if isinstance(given, Mapping) else None
    return {"algorithm": algorithm_config(name)} if isinstance(name, str) and name in ALGORITHMS else {}


def load_config(path: str | Path) -> Config:
    """The configuration in a YAML file of at most 1 MiB, read as data only.

    Raises ConfigError for a missing file (naming the nearest existing one), broken YAML, or fields that are not valid.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file} is no file; {nearest_file(file, ('.yaml', '.yml'))}")
    size = file.stat().st_size
    if size > MAX_YAML_BYTES:
        raise ConfigError(f"{file} has {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    try:
        given = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_config(given)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
