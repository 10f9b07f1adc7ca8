"""Several runs one after the other as one configuration: what they share, and what each stage lays over it.

Every stage is an ordinary run with a `Config` of its own. It starts from the weights that the one before ended with, or
from those that its `from` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tempflow.config.files import from_file, parse_config
from tempflow.config.tree import Config, check_name
from tempflow.grid import OWN
from tempflow.strict import MAX_FAULTS, ConfigError, check_bounds, leaves, shown

STAGES = "stages"
"""The field that makes a configuration one of stages."""

FROM = "from"
"""A stage's field: the earlier stages from the mean of whose weights it starts; without any, as the first one does."""

_GRID = ("model", "grid")

MAX_STAGES = 20

OF_THE_FIRST = ("before", "yardstick")
"""Fields of `evaluation` that look at the untrained model, so the first stage alone takes the shared ones."""


@dataclass(frozen=True)
class Stages:
    """Runs in their order. `parse_stages` and `load_stages` make it.

    name, output  of the whole; stage k is the run NAME-STAGE and writes to OUTPUT/k-STAGE
    runs          a configuration for each stage
    tree          what was given: the shared fields, and under `stages` a mapping for each stage
    """

    name: str
    output: str
    runs: tuple[Config, ...]
    tree: Mapping[str, Any] = field(repr=False)

    def replace(self, **fields: Any) -> Stages:
        """With other shared fields (or other `stages`), checked as a whole; `output` follows a new `name` unless it is
        given. Raises ConfigError."""
        kept = {key: value for key, value in self.tree.items() if not (key == "output" and "name" in fields)}
        return parse_stages({**kept, **fields})

    @property
    def titles(self) -> tuple[str, ...]:
        """What the stages are called."""
        return tuple(stage["name"] for stage in self.tree[STAGES])


def parse_recipe(given: Any) -> Config | Stages:
    """A mapping, as YAML has it, to one run's configuration or to one of stages. Raises ConfigError."""
    if not isinstance(given, Mapping) or STAGES in given:
        return parse_stages(given) if isinstance(given, Mapping) else parse_config(given)
    near = [key for key in given if isinstance(key, str) and get_close_matches(key, [STAGES], cutoff=0.75)]
    if near:
        raise ConfigError(f"{near[0]}: unknown field; did you mean {STAGES!r}?")
    return parse_config(given)


def load_stages(path: str | Path) -> Stages:
    """The configuration of stages in a YAML file of at most 1 MiB. Raises ConfigError, a line for each fault."""
    return from_file(path, parse_stages)


def to_yaml(config: Config | Stages) -> str:
    """The configuration as YAML that `load_config`, or `load_stages`, reads back to an equal one."""
    tree = dict(config.tree) if isinstance(config, Stages) else config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


# -------------------------------------------------------------------------------------------------------------- merging
def stage_tree(shared: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's mapping laid over the shared one: mappings are merged, everything else replaces.

    `algorithm` replaces the shared one where its name differs, so that no parameter reaches another algorithm.
    """
    if _other_algorithm(shared, stage):
        shared = {key: value for key, value in shared.items() if key != "algorithm"}
    return _laid_over(shared, stage)


def _other_algorithm(shared: Mapping[str, Any], stage: Mapping[str, Any]) -> bool:
    """Whether a stage names another algorithm than the shared one."""
    own, common = stage.get("algorithm"), shared.get("algorithm")
    if not (isinstance(own, Mapping) and "name" in own):
        return False
    return not isinstance(common, Mapping) or own["name"] != common.get("name")


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = _laid_over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return both


def parts_of(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """What is shared, and a mapping for each stage; empty ones where a stage is none."""
    shared, listed = {key: value for key, value in tree.items() if key != STAGES}, tree.get(STAGES)
    stages = listed if isinstance(listed, list | tuple) else []
    return shared, [stage if isinstance(stage, Mapping) else {} for stage in stages]


def stage_fields(tree: Mapping[str, Any]) -> dict[str, FieldInfo]:
    """`strict.leaves` of a tree with stages: shared fields, and those of each stage as stages.N.FIELD."""
    shared, stages = parts_of(tree)
    found = leaves(Config, shared)
    for number, stage in enumerate(stages):
        fields = leaves(Config, stage_tree(shared, stage))
        found |= {f"{STAGES}.{number}.{path}": info for path, info in fields.items() if path != "output"}
    return found


def reaches(tree: Mapping[str, Any], path: str) -> bool:
    """Whether a shared field, by its dotted path, is taken over by any stage; also those that are not there yet."""
    shared, stages = parts_of(tree)
    if path in ("name", "output"):
        return True
    of_first = path == "model.start" or path in [f"evaluation.{name}" for name in OF_THE_FIRST]
    firsts = [number for number, sources in enumerate(_sources(stages)) if not sources]
    able = [stages[number] for number in firsts] if of_first else stages
    open_to = [stage for stage in able if not is_given(stage, path.split("."))]
    if path.startswith("algorithm."):
        open_to = [stage for stage in open_to if not _other_algorithm(shared, stage)]
    return not stages or bool(open_to)


def is_given(tree: Any, path: Sequence[str]) -> bool:
    """Whether a tree says what stands at a path: at it, or above it by something else than a mapping."""
    for part in path:
        if not isinstance(tree, Mapping):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


# ----------------------------------------------------------------------------------------------------------- validation
def parse_stages(given: Mapping[str, Any]) -> Stages:
    """A mapping with `stages` to their configurations. Raises ConfigError with a line for each fault.

    A line names the field as stages.N.FIELD, N from 0. A fault of the shared part, which all stages have, is told once.
    """
    check_bounds(given)
    tree: dict[str, Any] = _plain(given)
    lines = list(_misshapen(tree.get(STAGES)))
    if lines:
        raise ConfigError("\n".join(lines[:MAX_FAULTS]))
    shared, stages = parts_of(tree)
    lines = list(_misnamed(stages))
    made, faults = list[Config](), list[list[str]]()
    for number, whole in enumerate(_completed(shared, stages)):
        try:
            made.append(parse_config(whole))
            faults.append([])
        except ConfigError as error:
            faults.append(str(error).splitlines())
            lines += [f"{STAGES}.{number}.{line}" for line in faults[-1]]
    common = [line for line in faults[0] if _is_shared(line, faults, stages)]
    lines = [*common, *(line for line in lines if line.split(".", 2)[-1] not in common)]
    lines = lines or list(_disconnected(made, stages))
    if lines:
        raise ConfigError("\n".join(lines[:MAX_FAULTS]))
    return Stages(shared["name"], _output(shared), tuple(made), tree)


def _misshapen(stages: Any) -> Iterator[str]:
    example = "[{name: first, …}, {name: second, …}]"
    if not isinstance(stages, list) or not 1 <= len(stages) <= MAX_STAGES:
        what = f"{len(stages)} stages" if isinstance(stages, list) and stages else shown(stages)
        yield f"{STAGES}: {what} is no list of 1 to {MAX_STAGES} stages; nearest valid: {example}"
        return
    for number, stage in enumerate(stages):
        if not isinstance(stage, Mapping):
            yield f"{STAGES}.{number}: {shown(stage)} is not a mapping of fields; nearest valid: {{name: first, …}}"


def _misnamed(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a stage may not say, or must."""
    seen: list[Any] = []
    for number, stage in enumerate(stages):
        here = f"{STAGES}.{number}"
        if "name" not in stage:
            yield f"{here}.name: missing; what the stage is called, and a part of its folder's name"
        elif not isinstance(stage["name"], str):
            yield f"{here}.name: {shown(stage['name'])} is not a text (in YAML, quote it)"
        else:
            try:
                check_name(stage["name"])
            except ValueError as error:
                yield f"{here}.name: {error}"
            if stage["name"] in seen:
                yield f"{here}.name: {shown(stage['name'])} is the name of two stages; nearest valid: one of its own"
        if "output" in stage:
            yield f"{here}.output: a stage writes into a folder of its name in `output`; nearest valid: without"
        yield from _misplaced(here, stage, [name for name in seen if isinstance(name, str)])
        first = number == 0 or (FROM in stage and not stage[FROM])
        if not first and is_given(stage, ["model", "start"]) and isinstance(stage.get("model"), Mapping):
            told = shown(stage["model"]["start"])
            yield f"{here}.model.start: {told}, but a stage starts from the one before; nearest valid: without"
        if not first and isinstance(stage.get("evaluation"), Mapping) and stage["evaluation"].get("before"):
            told = shown(stage["evaluation"]["before"])
            yield (
                f"{here}.evaluation.before: {told}, but a stage is compared with what it starts from; nearest valid: ''"
            )
        seen.append(stage.get("name"))


def _misplaced(here: str, stage: Mapping[str, Any], earlier: Sequence[str]) -> Iterator[str]:
    """What is wrong with the stages that one starts from."""
    given = stage.get(FROM, [])
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        yield f"{here}.{FROM}: {shown(given)} is not a list of stages; nearest valid: {shown([*earlier[-1:]])}"
        return
    for place, name in enumerate(given):
        if name not in earlier:
            near = (*get_close_matches(name, earlier, 1), *earlier[-1:])
            yield f"{here}.{FROM}: {shown(name)} is no stage before this one; nearest valid: {shown([*near[:1]])}"
        elif name in given[:place]:
            yield f"{here}.{FROM}: {shown(name)} stands in it twice; nearest valid: once"


def _sources(stages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """From which stages each one starts; none: from where the first does."""
    named, sources = dict[Any, int](), list[list[int]]()
    for number, stage in enumerate(stages):
        told = stage.get(FROM)
        if isinstance(told, list):
            names = dict.fromkeys(name for name in told if isinstance(name, str))
            sources.append([named[name] for name in names if name in named])
        else:
            sources.append([number - 1] if number else [])
        if isinstance(stage.get("name"), str):
            named[stage["name"]] = number
    return sources


def _completed(shared: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each stage's whole tree: named, with its folder, and started from the one before, or from those that it names,
    whose σ grid its weights carry."""
    name, output = shared.get("name"), _output(shared)
    folders, grids = list[str](), list[Any]()
    for number, (stage, sources) in enumerate(zip(stages, _sources(stages), strict=True)):
        below, title = dict(shared), stage.get("name") if _is_name(stage.get("name")) else f"stage-{number}"
        if sources and isinstance(below.get("evaluation"), Mapping):
            below["evaluation"] = {k: v for k, v in below["evaluation"].items() if k not in OF_THE_FIRST}
        whole = stage_tree(below, {key: value for key, value in stage.items() if key not in ("name", "output", FROM)})
        if _is_name(name):
            whole["name"] = f"{name}-{title}"
        if isinstance(output, str):
            whole["output"] = str(Path(output) / f"{number + 1}-{title}")
        if isinstance(model := whole.get("model", {}), Mapping):
            carried = [grids[source] for source in sources]
            grid = carried[0] if carried and model.get("grid", OWN) == OWN else model.get("grid", OWN)
            places = [folders[source] for source in sources]
            start = places if len(places) > 1 else places[0] if places else model.get("start", "")
            whole["model"] = {**model, "grid": grid, "start": start}
        grids.append(whole["model"]["grid"] if isinstance(whole.get("model"), Mapping) else OWN)
        folders.append(str(whole.get("output")))
        yield whole


def _is_name(value: Any) -> bool:
    try:
        check_name(value)
    except (TypeError, ValueError):
        return False
    return True


def _output(shared: Mapping[str, Any]) -> Any:
    """Where the stages' folders lie; whatever else was given, for validation to explain."""
    output = shared.get("output") or f"runs/{shared.get('name')}"
    return str(Path(output).expanduser()) if isinstance(output, str) else output


def _is_shared(line: str, faults: Sequence[Sequence[str]], stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a fault is every stage's and stands in none."""
    path = line.partition(":")[0].split(".")
    own = any(is_given({key: value for key, value in stage.items() if key != "name"}, path) for stage in stages)
    return not own and all(line in other for other in faults)


def _disconnected(runs: Sequence[Config], stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why a stage could not start from the weights of the one before, or of those that it names."""
    sources = _sources(stages)
    for number, source in ((n, s) for n, several in enumerate(sources) for s in several):
        here, old, new = f"{STAGES}.{number}.model", runs[source].model, runs[number].model
        for name, a, b in (("path", old.path, new.path), ("revision", old.revision, new.revision)):
            if a != b:
                yield f"{here}.{name}: {shown(b)}, but the stage before trains {shown(a)}; nearest valid: {shown(a)}"
        if len(sources[number]) > 1 and old.training == "lora":
            title = shown(stages[source]["name"])
            why = f"{title} trains a LoRA, and a mean is of whole networks"
            yield f"{STAGES}.{number}.{FROM}: {why}; nearest valid: [{title}]"
        if new.grid == runs[sources[number][0]].model.grid != old.grid and not is_given(stages[number], _GRID):
            why = f"{shown(stages[source]['name'])} walks {shown(old.grid)}, the first of them {shown(new.grid)}"
            yield f"{here}.grid: {why}; nearest valid: one that is stated"
        if (old.training, new.training) == ("full", "lora"):
            yield (
                f"{here}.training: 'lora', but the stage before trains the whole network, which the LoRA's file would "
                "not hold; nearest valid: 'full'"
            )


def _plain(value: Any) -> Any:
    """`value` as YAML has it: models as mappings, tuples as lists. Copies everything that can change."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
