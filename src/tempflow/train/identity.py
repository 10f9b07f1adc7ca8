"""What a run depends on, by content: its record, and what differs from it when the run is gone on with.

Files are told apart by their sha256, whatever their paths; hub ids that rewards or the algorithm load by the commit
that they meant when the run began; rewards and algorithms of other packages by these packages'
versions. Objects given to `tempflow.train` are told apart by kind and name, and by their plain fields; prompts given so
by their content, and a model by its weights.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from tempflow import algorithms, rewards
from tempflow.algorithms.base import Algorithm
from tempflow.config import Config, ScorerConfig
from tempflow.data.prompts import SHAPES, source_path
from tempflow.folder import LOCK, PIPELINE, check, contents, kind_of
from tempflow.models import HUB_ID, local_folder
from tempflow.models.lora import ADAPTER_CONFIG
from tempflow.request import Prompt
from tempflow.rewards import SafeReward
from tempflow.rewards.function import FunctionReward
from tempflow.rewards.options import revision_of
from tempflow.rewards.weights import commit_of, snapshot_of
from tempflow.train import checkpoint
from tempflow.train.checkpoint import CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FILE = "identity.json"
READ = (".json", ".safetensors", ".txt", ".model")
"""Ends of the files that make a model; READMEs, pictures and pickles beside them do not."""

MAX_BYTES = 2**24
SHOWN = 12
"""Digits of a digest in a message."""

Digests = Mapping[str, str]
"""What → sha256."""

RUN, STAGED = "run", "stages"
"""What a run's folder is marked as, and one that holds the runs of stages."""

SUMMARY = "summary.json"
"""Of a run that is finished; gone while it is gone on with."""


@dataclass(frozen=True)
class Identity:
    """What a run depends on beside its configuration.

    contents  field of the configuration, or argument of `tempflow.train` → digests by file or part
    objects   argument of `tempflow.train` → what was given, by kind and name
    plugins   "reward 'NAME'", "algorithm 'NAME'" → the installed package that it comes from
    commits   field of the configuration that holds a hub id → the commit that it meant
    """

    contents: Mapping[str, Digests]
    objects: Mapping[str, str]
    plugins: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_identity(given: Mapping[str, Any] | Path) -> Identity | None:
    """From a checkpoint's state, or from the folder of a run; None where there is none.

    Raises CheckpointError for a file that is broken.
    """
    if isinstance(given, Path):
        file = given / FILE
        if not file.is_file():
            return None
        if file.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{file} has more than {MAX_BYTES} bytes")
        try:
            return Identity(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is broken ({error}); copy it from where the run was made") from error
    found = given.get("identity")
    return None if found is None else Identity(**found)


# ------------------------------------------------------------------------------------------------------------- compared
def changed_contents(was: Identity, now: Identity) -> list[str]:
    """A line for every object and every content that differs, with what was recorded and what there is now."""
    lines = [
        f"{name}: {was.objects.get(name, 'none given')} → {now.objects.get(name, 'none given')}"
        for name in {**was.objects, **now.objects}
        if was.objects.get(name) != now.objects.get(name)
    ]
    for name in was.contents.keys() & now.contents.keys():
        old, new = was.contents[name], now.contents[name]
        for part in sorted({*old, *new}):
            if old.get(part) != new.get(part):
                a, b = (f"sha256 {d[part][:SHOWN]}…" if part in d else "not there" for d in (old, new))
                lines.append(f"{name}: {part} was {a}, is now {b}")
    for name in was.commits.keys() & now.commits.keys():
        old, new = was.commits[name], now.commits[name]
        known = name in was.contents and was.contents[name] == now.contents.get(name)
        if old != new and not known:
            how = f"; nearest valid: {_revision(name)}: {old}" if _revision(name) else ""
            lines.append(f"{name}: commit {old[:SHOWN]}… → {new[:SHOWN]}…{how}")
    for name in was.plugins.keys() & now.plugins.keys():
        if was.plugins[name] != now.plugins[name]:
            lines.append(f"{name}: {was.plugins[name]} → {now.plugins[name]}")
    return sorted(lines)


def same_contents(was: Identity, now: Identity) -> tuple[str, ...]:
    """Fields whose content is recorded and has stayed, wherever it lies now, and the revisions that say which it is."""
    stayed = [name for name, digests in was.contents.items() if digests == now.contents.get(name)]
    pinned = [name for name, commit in was.commits.items() if commit == now.commits.get(name)]
    return (*stayed, *filter(None, map(_revision, (*stayed, *pinned))))


def _revision(name: str) -> str:
    """The field that says at which revision the hub id in the field `name` is; "" where there is none."""
    above, _, last = name.rpartition(".")
    return f"{above}.{revision_of(last)}" if name == "model.path" or above.endswith(".options") else ""


def check_given(folder: Path, was: Identity, given: Iterable[str]) -> None:
    """Raises ValueError, with the call that goes on, where the run was given objects that are not given now."""
    left_out = [name for name in was.objects if name not in {*given}]
    if left_out:
        listed = ", ".join(f"{name} ({was.objects[name]})" for name in left_out)
        raise ValueError(
            f"{str(folder)!r} was given objects in Python, which are not given now: {listed}. "
            f"Go on with it there: {go_on(folder, was)}"
        )


def go_on(folder: Path, identity: Identity | None) -> str:
    """The command that goes on with a run, and with the stages after it; or, where it was given objects, the Python
    call."""
    staged = kind_of(folder.absolute().parent) == STAGED
    folder = folder.parent if staged else folder
    if identity is None or not identity.objects:
        return f"tempflow train --resume {shlex.quote(str(folder))}"
    given = "".join(f"{name}={_short(what)}, " for name, what in identity.objects.items())
    file, output = str(folder / "config.yaml"), str(folder)
    load = "load_stages" if staged else "load_config"
    return f"tempflow.train(tempflow.{load}({file!r}).replace(output={output!r}), {given}resume=True)"


def _short(what: str) -> str:
    """A function by its name, anything else as dots."""
    kind, _, name = what.partition(" ")
    last = name.rpartition(".")[2]
    return last if kind == "function" and last.isidentifier() else "…"


def begun(folder: Path) -> bool:
    """Whether a run has written there."""
    marked = kind_of(folder) == RUN and any(name != LOCK for name in contents(folder))
    return marked or (folder / "metrics.jsonl").is_file()


def check_new(folder: Path, write: bool = True) -> None:
    """Raises ValueError unless a new run may take the folder. `write`: whether this rank is the one that will."""
    if not write:
        return
    if begun(folder):
        raise ValueError(
            f"output: {str(folder)!r} already holds a run; choose another folder, remove it, or go on with it: "
            f"{go_on(folder, read_identity(folder))}"
        )
    check(folder, RUN)


# ------------------------------------------------------------------------------------------------------------- recorded
def identity(
    config: Config,
    algorithm: Algorithm,
    prompts: Mapping[str, Sequence[Prompt]],
    given: Mapping[str, object],
) -> Identity:
    """What a run depends on.

    config     with its dtype settled
    algorithm  as it is run
    prompts    all prompts by their field or argument: "data.train", "data.validation", "data.test", or "prompts" …
    given      the objects that `tempflow.train` was given, by argument

    Reads every byte of the files that the run depends on; those of a hub id are fetched first. Raises ValueError for a
    model, or a folder that the algorithm names, that is not there, OSError for a file that cannot be read.
    """
    commits: dict[str, str] = {}
    contents: dict[str, Digests] = {name: _prompts(name, config, listed) for name, listed in prompts.items()}
    if "model" in given:
        contents["model"] = {"weights": _weights(getattr(given["model"], "network", None))}
    else:
        folder = local_folder(config.model.path, config.model.revision)
        contents["model.path"] = _pipeline(folder)
        if (commit := snapshot_of(folder)) is not None:
            commits["model.path"] = commit
    for name, places in (("model.start", config.model.starts), ("model.reference", (config.model.reference,))):
        found = [{**_any(at), **_beside(at)} for place in places if (at := Path(place).expanduser()).exists()]
        numbered = [(f"{n}/" if len(places) > 1 else "", digests) for n, digests in enumerate(found)]
        if found:
            contents[name] = {f"{number}{file}": told for number, digests in numbered for file, told in digests.items()}
    for folder in algorithm.latent_rewards:
        contents["algorithm.reward"] = _any(_latent_reward(folder))
    if "algorithm" not in given:
        for name, value in config.algorithm.model_dump().items():
            if not isinstance(value, str) or value in algorithm.latent_rewards:
                continue
            if _there(Path(value), Path.is_dir):
                contents[f"algorithm.{name}"] = _any(Path(value))
            elif os.sep in value and not HUB_ID.fullmatch(value):
                raise ValueError(f"algorithm.{name}: {value!r} is no folder; nearest valid: one that is, or a hub id")
            elif (commit := commit_of(value)) is not None:
                commits[f"algorithm.{name}"] = commit
    for place, scorer in _scorers(config, own="reward" not in given):
        make = rewards.maker(scorer.kind or scorer.name)
        for name, where in rewards.places(make, scorer.options).items():
            if _there(Path(where), Path.exists):
                contents[f"{place}.options.{name}"] = _any(Path(where))
        for name, commit in rewards.commits(make, scorer.options).items():
            commits[f"{place}.options.{name}"] = commit
    objects = {name: _named(name, value) for name, value in given.items()}
    return Identity(contents, objects, _plugins(config, given), commits)


def _scorers(config: Config, own: bool) -> list[tuple[str, ScorerConfig]]:
    """Rewards with their places in the configuration: those that evaluations judge by, and the run's `own`."""
    trained = [(f"rewards.{n}", scorer) for n, scorer in enumerate(config.rewards) if own]
    return [*trained, *((f"evaluation, {judge.name}", judge) for judge in config.judges)]


def _prompts(name: str, config: Config, prompts: Sequence[Prompt]) -> Digests:
    """Of the prompts with their metadata, and of the files beside them that the metadata name."""
    source = str(dict(config.data).get(name.removeprefix("data."), ""))
    root = Path() if not source or source.startswith(SHAPES) else source_path(source).parent
    said, named = hashlib.sha256(), set[str]()
    for prompt in prompts:
        parts = {field.name: _plain(getattr(prompt, field.name)) for field in fields(prompt)}
        said.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
        if not source.startswith(SHAPES):
            named.update(_texts(prompt.metadata))
    found = {"prompts": said.hexdigest()}
    files = {text: path for text in named if _there(path := root / text, Path.is_file)}
    if files:
        found["files that they name"] = hashlib.sha256(json.dumps(_digests(files), sort_keys=True).encode()).hexdigest()
    return found


def _plugins(config: Config, given: Mapping[str, object]) -> dict[str, str]:
    """Of other packages' rewards and algorithm that the configuration names and that nothing `given` stands in for."""
    scorers = (*config.judges, *(() if "reward" in given else config.rewards))
    named = {scorer.kind or scorer.name for scorer in scorers}
    found = {f"reward {name!r}": rewards.plugin(name) for name in sorted(named)}
    if "algorithm" not in given:
        found[f"algorithm {config.algorithm.name!r}"] = algorithms.plugin(config.algorithm.name)
    return {name: _package(entry) for name, entry in found.items() if entry is not None}


def _package(entry: EntryPoint) -> str:
    """Name and version of the package that an entry point is of, and what it points to."""
    package = "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"{package} ({entry.value})"


def _texts(value: object) -> Iterator[str]:
    """All texts in JSON values, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _there(path: Path, how: Callable[[Path], bool]) -> bool:
    try:
        return how(path)
    except (OSError, ValueError):  # no path at all: too long, a null byte
        return False


def _pipeline(folder: Path) -> Digests:
    """Of the files that a diffusers folder is loaded from: its index, and what is in its parts' folders."""
    parts = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    files = [folder / PIPELINE, *(f for part in parts for f in sorted(part.iterdir()))]
    return _digests({f.relative_to(folder).as_posix(): f for f in files if f.suffix in READ and f.is_file()})


def _any(path: Path) -> Digests:
    """Of a file, a run's best weights, a pipeline, or any other folder of weights."""
    if path.is_file():
        return _digests({path.name: path})
    if (path / checkpoint.FOLDER).is_dir():
        best = checkpoint.pointed(path, checkpoint.BEST) or checkpoint.newest(path)
        return _digests({"best weights": best / checkpoint.MANIFEST})
    if (path / PIPELINE).is_file():
        return _pipeline(path)
    files = [f for f in sorted(path.rglob("*")) if f.suffix in READ and f.is_file()]
    return _digests({f.relative_to(path).as_posix(): f for f in files if not f.name.startswith(".")})


def _beside(path: Path) -> Digests:
    """Of what gives a LoRA its scale: PEFT's configuration beside a file."""
    config = path.parent / ADAPTER_CONFIG
    return _digests({config.name: config}) if path.is_file() and config.is_file() else {}


def _latent_reward(where: str) -> Path:
    from tempflow.latent_reward import EMBEDDED
    from tempflow.latent_reward.model import embedded_folder

    return embedded_folder() if where == EMBEDDED else Path(where)


def _weights(network: object) -> str:
    """Of a network's parameters and buffers."""
    total = hashlib.sha256()
    if isinstance(network, nn.Module):
        for name, tensor in network.state_dict().items():
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Of files, several at a time: hashing lets other threads run."""
    stats = {name: file.stat() for name, file in files.items()}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = {n: pool.submit(_sha256, str(files[n]), s.st_ino, s.st_size, s.st_mtime_ns) for n, s in stats.items()}
        return {name: job.result() for name, job in jobs.items()}


@functools.lru_cache(maxsize=65536)
def _sha256(path: str, inode: int, size: int, modified: int) -> str:
    """The file is read once in a process, as long as it is not written to."""
    return checkpoint.sha256(Path(path))


# ------------------------------------------------------------------------------------------------------ objects by name
def _named(argument: str, value: object) -> str:
    """An argument of `tempflow.train` by kind and name."""
    if argument in ("prompts", "test_prompts"):
        return f"{len(value) if isinstance(value, Sequence) else 0} prompts"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_named(argument, item) for item in value) + "]"
    if isinstance(value, SafeReward):
        return _named(argument, value.reward)
    if isinstance(value, FunctionReward):
        return _named(argument, value.function)
    if inspect.isroutine(value):
        return f"function {_qualified(value)}"
    name = getattr(value, "name", "")
    said = f"object {_qualified(type(value))}" + (f" {name!r}" if isinstance(name, str) and name else "")
    if not _frozen(value):
        return said
    settings = hashlib.sha256(json.dumps(described(value), sort_keys=True).encode()).hexdigest()
    return f"{said} with settings {settings[:SHOWN]}"


def described(value: object, depth: int = 12) -> Any:
    """`value` as JSON that is the same in every process: plain values and frozen dataclasses by content, functions by
    name and what they close over, and other objects, whose state may change while they are used, by their kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == 0:
        return "…"
    if isinstance(value, tuple):
        return [described(item, depth - 1) for item in value]
    if isinstance(value, functools.partial):
        return [described(part, depth - 1) for part in (value.func, value.args, tuple(sorted(value.keywords.items())))]
    if _frozen(value):
        parts = {field.name: described(getattr(value, field.name), depth - 1) for field in fields(value)}
        return {"kind": _qualified(type(value)), **parts}
    if inspect.isroutine(value) or isinstance(value, type):
        cells = [_inside(cell) for cell in getattr(value, "__closure__", None) or ()]
        return [f"function {_qualified(value)}", *(described(item, depth - 1) for item in cells)]
    return f"object {_qualified(type(value))}"


def _plain(value: object) -> Any:
    """JSON-like data as it is, anything else in it as `described`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else described(value)


def _frozen(value: object) -> TypeGuard[DataclassInstance]:
    return is_dataclass(value) and not isinstance(value, type) and type(value).__dataclass_params__.frozen  # type: ignore


def _inside(cell: Any) -> object:
    """What a closure's cell holds; None where that was never set."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _qualified(value: object) -> str:
    """module.name; the script that was started goes by its file's name, as if it had been imported."""
    module = getattr(value, "__module__", None) or "builtins"
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
