"""The command line. `tempflow` alone imports next to nothing; a verb imports what it needs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, Field
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from tempflow.strict import ConfigError, Strict, validated

if TYPE_CHECKING:
    from tempflow.config import Config
    from tempflow.evaluate.suite import Report

USAGE = """usage: tempflow VERB …

Reinforcement learning for flow-matching image generators.

  train [RECIPE | config.yaml] [--field value …]   train, by default the recipe `demo`
  cost [RECIPE | config.yaml] [--field value …]    what that would take: forwards, decodes, reward calls, memory
  sample [PATH] --prompt TEXT …                    draw pictures
  eval [PATH] [--prompts SOURCE]                   score a model on fixed prompts and noise
  algorithms | models | rewards | recipes          what there is

`tempflow VERB --help` lists a verb's fields. TEMPFLOW_TRACEBACK=1 shows where an error came from."""

TRACEBACK = "TEMPFLOW_TRACEBACK"
DEFAULT_RECIPE = "demo"


class SampleOptions(Strict):
    """Draw a picture of each prompt, without noise on the way."""

    path: Annotated[str, tyro.conf.Positional] = Field(
        default="shapes", description="'shapes', a pipeline folder, or a hub id"
    )
    prompt: Annotated[tuple[str, ...], Field(strict=False)] = Field(default=(), description="texts to draw")
    prompts: str = Field(default="", description="or a source of them: shapes:SPLIT, a .txt or .jsonl file")
    count: int = Field(default=24, ge=1, description="how many of the source's prompts")
    steps: int = Field(default=10, ge=1, description="sampler steps")
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance; 1 = none")
    seed: int = Field(default=0, description="of the noise")
    height: int = Field(default=32, ge=1, description="pixels")
    width: int = Field(default=32, ge=1, description="pixels")
    device: str = Field(default="cpu", description="auto, cpu, mps, cuda or cuda:N")
    out: str = Field(default="samples", min_length=1, description="folder for the pictures")


class EvalOptions(Strict):
    """Score a model: fixed prompts, fixed noise, deterministic sampling."""

    path: Annotated[str, tyro.conf.Positional] = Field(
        default="shapes", description="'shapes', a pipeline folder, or a hub id"
    )
    prompts: str = Field(default="shapes:test", description="shapes:SPLIT, a .txt or .jsonl file")
    count: int = Field(default=504, ge=1, description="how many pictures; task kinds in turn")
    rewards: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=("shapes_strict",), description="what scores them"
    )
    steps: int = Field(default=10, ge=1, description="sampler steps")
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance; 1 = none")
    seed: int = Field(default=1234, description="of the noise")
    height: int = Field(default=32, ge=1, description="pixels")
    width: int = Field(default=32, ge=1, description="pixels")
    device: str = Field(default="cpu", description="auto, cpu, mps, cuda or cuda:N")
    rows: int = Field(default=96, ge=1, description="most rows of a forward")
    out: str = Field(default="", description="file for the figures as JSON")


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status: 0, 1 when a guard stopped a run, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    verb = words[0]
    if verb not in VERBS:
        close = get_close_matches(verb, list(VERBS), n=1, cutoff=0.0)[0]
        return _fail(f"{verb!r} is no verb; nearest valid: {close!r}. `tempflow --help` lists them")
    try:
        return VERBS[verb](words[1:])
    except SystemExit as stop:  # tyro's, after it printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; nothing is left to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        return _fail(str(error) or type(error).__name__)


def _fail(message: str, status: int = 2) -> int:
    for line in message.splitlines():
        print(f"tempflow: {line}", file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------------- parsing
def _as_mapping(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Lets tyro read the flags of a model's fields but not build it: its faults are then explained in our own words."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    defaults = dict(info.default)
    fields = [
        StructFieldSpec(
            name=name,
            type=Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation,  # type: ignore
            default=defaults[name],
            helptext=field.description,
        )
        for name, field in info.type.model_fields.items()
    ]
    return StructConstructorSpec(instantiate=dict, fields=tuple(fields))


def _parse(base: Strict, verb: str, args: Sequence[str]) -> Mapping[str, Any]:
    """The fields of `base` with the flags in `args` laid over them, not yet validated."""
    registry = ConstructorRegistry()
    registry.struct_rule(_as_mapping)
    parsed: Any = tyro.cli(
        type(base), prog=f"tempflow {verb}", default=base, args=args, use_underscores=True, registry=registry
    )
    return parsed


def configured(verb: str, args: Sequence[str]) -> Config:
    """The configuration that `[RECIPE | config.yaml] [--field value …]` means.

    `--algorithm.name` takes another algorithm, with its own defaults. Raises ConfigError.
    """
    from tempflow.config import parse_config

    named = bool(args) and not args[0].startswith("-")
    base = base_config(args[0] if named else DEFAULT_RECIPE)
    rest = list(args[1:] if named else args)
    other = _value(rest, "--algorithm.name")
    if other is not None and other != base.algorithm.name:
        base = parse_config({**base.model_dump(), "algorithm": {"name": other}})
    given = dict(_parse(base, verb, rest))
    if given["output"] == f"runs/{base.name}":  # not chosen but derived: derive it anew, the name may be another
        given["output"] = ""
    return parse_config(given)


def _value(args: Sequence[str], flag: str) -> str | None:
    """What follows `flag`, as its own word or behind an equals sign."""
    for place, word in enumerate(args):
        if word == flag and place + 1 < len(args):
            return args[place + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def base_config(source: str) -> Config:
    """A recipe by name, or the configuration in a YAML file. Raises ConfigError naming the nearest."""
    from tempflow.config import load_config
    from tempflow.recipes import RECIPES

    if source in RECIPES:
        return RECIPES[source]()
    if source.endswith((".yaml", ".yml")) or os.sep in source or Path(source).is_file():
        return load_config(source)
    close = get_close_matches(source, list(RECIPES), n=1, cutoff=0.0)[0]
    raise ConfigError(f"{source!r} is neither a recipe nor a .yaml file; nearest valid: {close!r}")


# --------------------------------------------------------------------------------------------------------- verbs
def _train(args: Sequence[str]) -> int:
    config = configured("train", args)
    _check_prompts(config)
    from tempflow.train.guards import GuardError
    from tempflow.train.loop import train

    try:
        train(config)
    except GuardError as error:
        return _fail(str(error), 1)
    return 0


def _check_prompts(config: Config) -> None:
    """Raises ConfigError, naming the field, for a prompt file that is missing or broken."""
    from tempflow.data.prompts import load_prompts

    for field in ("train", "validation", "test"):
        try:
            load_prompts(dict(config.data)[field])
        except ValueError as error:
            raise ConfigError(f"data.{field}: {error}") from error


def _cost(args: Sequence[str]) -> int:
    config = configured("cost", args)
    from tempflow.cost import run_cost

    _print(run_cost(config).table())
    return 0


def _sample(args: Sequence[str]) -> int:
    options = validated(SampleOptions, _parse(SampleOptions(), "sample", args))
    for path in run_sample(options):
        print(path)
    return 0


def run_sample(options: SampleOptions) -> list[Path]:
    """Draws what `options` say; the pictures' paths. Raises ValueError where nothing is asked for."""
    from tempflow.data.prompts import load_prompts

    texts = list(options.prompt)
    if options.prompts:
        texts += [prompt.text for prompt in load_prompts(options.prompts)[: options.count]]
    if not texts:
        raise ValueError("prompt: none given; nearest valid: --prompt 'a red circle', or --prompts shapes:validation")
    from tempflow.evaluate.suite import sample_path

    return sample_path(
        options.path,
        texts,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        size=(options.height, options.width),
        device=_device(options.device),
        out=Path(options.out),
    )


def _eval(args: Sequence[str]) -> int:
    options = validated(EvalOptions, _parse(EvalOptions(), "eval", args))
    report = run_eval(options)
    print(report.table())
    if options.out:
        Path(options.out).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


def run_eval(options: EvalOptions) -> Report:
    """Scores a model as `options` say. Raises ValueError for an unknown reward or a prompt source that is not there."""
    from tempflow.data.prompts import load_prompts
    from tempflow.rewards import build

    if not options.rewards:
        raise ValueError("rewards: none given; nearest valid: --rewards shapes_strict")
    prompts, rewards = load_prompts(options.prompts), [build(name) for name in options.rewards]
    from tempflow.evaluate.suite import evaluate_path, fixed_prompts

    return evaluate_path(
        options.path,
        fixed_prompts(prompts, options.count),
        rewards,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        size=(options.height, options.width),
        device=_device(options.device),
        rows=options.rows,
    )


def _device(name: str) -> str:
    """`name`, with "auto" resolved. Raises ValueError for a device that is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r}, but torch sees no CUDA device; nearest valid: 'cpu'")
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device; nearest valid: 'cpu'") from error


def _algorithms(args: Sequence[str]) -> int:
    from importlib.metadata import entry_points

    from tempflow.algorithms import ALGORITHMS, ENTRY_POINTS

    rows = [(name, _first_line(function)) for name, function in ALGORITHMS.items()]
    rows += [(entry.name, f"from {entry.value}") for entry in entry_points(group=ENTRY_POINTS)]
    return _list("algorithms", args, ("name", "what"), rows)


def _models(args: Sequence[str]) -> int:
    from tempflow.models import FAMILIES

    rows = [("shapes", "embedded, 32×32, shapes by prompt", "Apache-2.0", "tempflow[diffusers]")]
    rows += [(name, text, "of the weights' folder", "tempflow[diffusers]") for name, text in FAMILIES.items()]
    return _list("models", args, ("path or pipeline class", "what", "licence", "needs"), rows)


REWARD_NOTES = {
    "shapes": ("the shapes verifier with partial credit, 0 to 1", "Apache-2.0", "tempflow[shapes]"),
    "shapes_strict": ("the shapes verifier: 1 where the picture is right, else 0", "Apache-2.0", "tempflow[shapes]"),
    "jpeg_compressibility": ("minus the kilobytes of the picture's JPEG", "Apache-2.0", ""),
}


def _rewards(args: Sequence[str]) -> int:
    from tempflow.rewards import names

    other = ("from an installed package", "that package's", "")
    rows = [(name, *REWARD_NOTES.get(name, other)) for name in names()]
    return _list("rewards", args, ("name", "what", "licence", "needs"), rows)


def _recipes(args: Sequence[str]) -> int:
    from tempflow.recipes import RECIPES

    return _list("recipes", args, ("name", "what"), [(name, _first_line(recipe)) for name, recipe in RECIPES.items()])


def _first_line(described: object) -> str:
    return (described.__doc__ or "").strip().partition("\n")[0]


def _list(verb: str, args: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Prints a table; such a verb takes no arguments but --help."""
    if args and args[0] not in ("-h", "--help"):
        return _fail(f"{verb}: {args[0]!r} is one argument too many; nearest valid: tempflow {verb}")
    if args:
        print(f"usage: tempflow {verb}\n\nLists the {verb} by {', '.join(columns)}.")
        return 0
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    _print(table)
    return 0


def _print(table: object) -> None:
    from rich.console import Console

    Console().print(table)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "cost": _cost,
    "sample": _sample,
    "eval": _eval,
    "algorithms": _algorithms,
    "models": _models,
    "rewards": _rewards,
    "recipes": _recipes,
}


if __name__ == "__main__":
    sys.exit(main())
