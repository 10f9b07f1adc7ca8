"""What was grown, decoded and scored, as data: chunks of whole prompts that can be made anywhere, joined by slot, and
kept on disk.

On disk they are a folder of two files, safetensors for tensors and JSON for the rest: the same bits, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow.core.forest import Edges, Forest, Leaves
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.models.finite import WHOLE, WHY
from tempflow.train.checkpoint import sha256
from tempflow.train.judged import ByLatents, ByPictures
from tempflow.train.signals import Signals

FACTS, TENSORS = "rollouts.json", "rollouts.safetensors"
KIND, FORMAT = "tempflow rollouts", 3
MAX_FACTS, MAX_TENSORS = 2**24, 2**36
"""Bytes that are read at most, unless more is asked for."""

_EDGES = ("parent", "child", "step", "prompt", "root", "depth", "scale", "log_prob", "stochastic", "trained")
_LEAVES = ("node", "prompt", "root")
_SIGNALS = tuple(Signals.__dataclass_fields__)
_FLAGS = ("forest/edges/stochastic", "forest/edges/trained", "scores/ok", "latent_scores/ok")
_WHOLE = (
    *(f"forest/edges/{name}" for name in _EDGES if name not in ("scale", "log_prob", "stochastic", "trained")),
    *(f"forest/leaves/{name}" for name in _LEAVES),
    *("forest/descent/edge", "forest/descent/leaf", "signals/prompt", "signals/leaves", "broken", "drafts"),
)
_NODES, _STATES = "forest/nodes", ("forest/nodes", "forest/edges/mean")
_REAL = (
    *("schedule/sigmas", "forest/edges/scale", "forest/edges/log_prob", "forest/edges/mean"),
    *(f"signals/{name}" for name in _SIGNALS if f"signals/{name}" not in _WHOLE),
    "fidelity",
)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Some prompt slots of an iteration, or the offline samples in their place. It holds tensors and numbers alone: no
    network, no function, no pictures.

    slots          P prompt slots, ascending
    iteration      which one it is, from 0
    schedule       the grid that was walked
    forest         of N leaves: with edges and without leaf latents where edges are trained; with leaf latents and
                   without edges where leaves are
    scores         of the leaves
    signals        by slot
    broken         LongTensor [N], which leaves are no pictures, and why (`models.finite`)
    fidelity       float64 [P], how the draft ranked the chosen noises beside the regenerated pictures; NaN without one
    drafts         LongTensor [P·pool], as `broken`, of the drafts; none without a draft
    judged         whose scores credit sees: the leaves', or a latent reward's of the trained edges (or leaves)

    Raises ValueError where the parts are not of one size.
    """

    slots: tuple[int, ...]
    iteration: int
    schedule: Schedule
    forest: Forest
    scores: Scores
    signals: Signals
    broken: Tensor
    fidelity: Tensor
    drafts: Tensor
    judged: ByPictures

    def __post_init__(self) -> None:
        if not self.slots or self.slots[0] < 0 or any(b <= a for a, b in pairwise(self.slots)):
            raise ValueError(f"slots: {list(self.slots)[:8]} must ascend from 0 or more; nearest valid: [0]")
        leaves, prompts = len(self.forest.leaves), len(self.slots)
        sizes = [("scores", len(self.scores), leaves), ("broken", len(self.broken), leaves)]
        sizes += [("signals", len(self.signals.prompt), prompts), ("fidelity", len(self.fidelity), prompts)]
        sizes += [("latent_scores", len(said), len(self.forest.edges) or leaves) for said in self.judged.latent]
        for name, rows, wanted in sizes:
            if rows != wanted:
                raise ValueError(f"{name}: {rows} rows; nearest valid: {wanted}, one for each that was grown")
        if len(self.drafts) % prompts:
            raise ValueError(f"drafts: {len(self.drafts)} for {prompts} prompts; nearest valid: {prompts}, a pool each")

    def to(self, device: torch.device | str) -> Rollouts:
        """With the forest on that device; all else stays on the CPU."""
        return replace(self, forest=self.forest.to(device))

    @staticmethod
    def join(parts: Sequence[Rollouts]) -> Rollouts:
        """One of several chunks, given in any order, in ascending order of slot.

        Raises ValueError for no part, slots that are in two parts or lie between those of another, parts of different
        iterations, grids or kinds, and what does not fit together otherwise.
        """
        if not parts:
            raise ValueError("parts = []: nothing to join; nearest valid: one Rollouts")
        ordered = sorted(parts, key=lambda part: part.slots[0])
        first = ordered[0]
        for part in ordered[1:]:
            if part.iteration != first.iteration:
                raise ValueError(f"iteration: {part.iteration} in one part; nearest valid: {first.iteration}")
            own, theirs = first.schedule, part.schedule
            if not torch.equal(own.sigmas, theirs.sigmas) or (own.spread, own.gain) != (theirs.spread, theirs.gain):
                raise ValueError("schedule: parts walked different grids; nearest valid: parts of one iteration")
        slots = tuple(slot for part in ordered for slot in part.slots)
        for before, after in pairwise(slots):
            if after <= before:
                raise ValueError(f"slots: {after} comes after {before}; nearest valid: parts of neighbouring slots")
        for part in ordered[1:]:
            if len(part.judged.latent) != len(first.judged.latent):
                raise ValueError("latent_scores: some parts have none; nearest valid: parts of one algorithm")
            if len(part.drafts) * len(first.slots) != len(first.drafts) * len(part.slots):
                raise ValueError("drafts: parts have pools of several sizes; nearest valid: parts of one algorithm")
        latent = zip(*(part.judged.latent for part in ordered), strict=True)
        return Rollouts(
            slots=slots,
            iteration=first.iteration,
            schedule=first.schedule,
            forest=Forest.cat([part.forest for part in ordered]),
            scores=Scores.cat([part.scores for part in ordered]),
            signals=Signals.cat([part.signals for part in ordered]),
            broken=torch.cat([part.broken for part in ordered]),
            fidelity=torch.cat([part.fidelity for part in ordered]),
            drafts=torch.cat([part.drafts for part in ordered]),
            judged=replace(first.judged, latent=tuple(map(Scores.cat, latent))),
        )


# --------------------------------------------------------------------------------------------------------- on disk
class RolloutFileError(ValueError):
    """A folder from which no rollouts can be read; the message says why."""


def write(rollouts: Rollouts, folder: Path) -> None:
    """Writes both files into `folder`, which must be new or empty. The tensors come first, so that a folder that was
    left half written is never read.

    Raises ValueError where something is there, OSError where the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = next(folder.iterdir(), None)
    if there is not None:
        raise ValueError(f"folder: {str(folder)!r} has {there.name!r}; nearest valid: a new or empty folder")
    save_file(_apart(_tensors(rollouts)), folder / TENSORS)
    facts = {
        "kind": KIND,
        "format": FORMAT,
        "slots": list(rollouts.slots),
        "iteration": rollouts.iteration,
        "steps": rollouts.forest.steps,
        "spread": rollouts.schedule.spread,
        "gain": rollouts.schedule.gain,
        "rewards": list(rollouts.scores.names),
        "latent_rewards": [list(said.names) for said in rollouts.judged.latent],
        "bytes": (folder / TENSORS).stat().st_size,
        "sha256": sha256(folder / TENSORS),
    }
    (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: Path, most: int = MAX_TENSORS) -> Rollouts:
    """What `write` wrote, on the CPU (`Rollouts.to`): every tensor with the same bits and dtype.

    most: bytes of tensors that are read. Raises RolloutFileError for a folder that is not whole, was changed, is of
    another kind or of a newer version, or has more.
    """
    try:
        facts = _facts(_file(folder, FACTS, MAX_FACTS))
        file = _file(folder, TENSORS, most)
        size = file.stat().st_size
        if size != facts["bytes"] or sha256(file) != facts["sha256"]:
            raise RolloutFileError(f"{TENSORS} is not the file that was written ({size} of {facts['bytes']} bytes)")
        return _rollouts(facts, load_file(file))
    except (ValueError, KeyError, TypeError, OSError, RecursionError, SafetensorError) as error:
        why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise RolloutFileError(f"{str(folder)!r} holds no rollouts that can be read: {why}") from error


def _file(folder: Path, name: str, most: int) -> Path:
    """One of the two files: in the folder itself, and not too large."""
    file = folder / name
    if file.is_symlink() or not file.is_file():
        raise RolloutFileError(f"{name} is not there as a file")
    if file.stat().st_size > most:
        raise RolloutFileError(f"{name} has {file.stat().st_size} bytes; nearest valid: {most}")
    return file


def _facts(file: Path) -> Mapping[str, Any]:
    facts = json.loads(file.read_text(encoding="utf-8"))
    kind = facts.get("kind") if isinstance(facts, dict) else None
    if kind != KIND:
        raise RolloutFileError(f"{FACTS}: kind is {str(kind)[:40]!r}; nearest valid: {KIND!r}")
    if facts["format"] != FORMAT:
        raise RolloutFileError(f"{FACTS}: format is {str(facts['format'])[:40]}; nearest valid: {FORMAT}")
    numbers = {"iteration": facts["iteration"], "steps": facts["steps"], "bytes": facts["bytes"]}
    for name, number in (*numbers.items(), *(("slots", slot) for slot in facts["slots"])):
        if type(number) is not int or number < 0:
            raise RolloutFileError(f"{FACTS}: {name} has {str(number)[:40]!r}; nearest valid: 0")
    return facts


def _tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    """By name; what is None is not there."""
    forest = rollouts.forest
    edges, leaves = forest.edges, forest.leaves
    found: dict[str, Tensor | None] = {"schedule/sigmas": rollouts.schedule.sigmas, "forest/nodes": forest.nodes}
    found |= {f"forest/edges/{name}": getattr(edges, name) for name in (*_EDGES, "mean")}
    found |= {f"forest/leaves/{name}": getattr(leaves, name) for name in _LEAVES}
    found |= {"forest/descent/edge": forest.descent[0], "forest/descent/leaf": forest.descent[1]}
    found |= {f"forest/edge_traits/{name}": column for name, column in edges.traits.items()}
    found |= {f"forest/leaf_traits/{name}": column for name, column in leaves.traits.items()}
    found |= {"scores/value": rollouts.scores.value, "scores/ok": rollouts.scores.ok}
    found |= {f"signals/{name}": getattr(rollouts.signals, name) for name in _SIGNALS}
    found |= {"broken": rollouts.broken, "fidelity": rollouts.fidelity, "drafts": rollouts.drafts}
    for said in rollouts.judged.latent:
        found |= {"latent_scores/value": said.value, "latent_scores/ok": said.ok}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, no two of them in one place: safetensors writes each by itself."""
    apart, places = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if place in places else own
        places.add(place)
    return apart


def _rollouts(facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> Rollouts:
    """The parts put together again. Raises KeyError or ValueError where one is missing, of another kind, or points out
    of the forest."""
    _check_kinds(tensors)
    take = tensors.pop
    latent = [Scores(take("latent_scores/value"), take("latent_scores/ok"), tuple(n)) for n in facts["latent_rewards"]]
    rollouts = Rollouts(
        slots=tuple(facts["slots"]),
        iteration=facts["iteration"],
        schedule=Schedule(take("schedule/sigmas"), float(facts["spread"]), float(facts["gain"])),
        forest=_forest(tensors, facts["steps"]),
        scores=Scores(take("scores/value"), take("scores/ok"), tuple(facts["rewards"])),
        signals=Signals(*(take(f"signals/{name}") for name in _SIGNALS)),
        broken=take("broken"),
        fidelity=take("fidelity"),
        drafts=take("drafts"),
        judged=ByLatents(tuple(latent)) if latent else ByPictures(),
    )
    if tensors:
        raise ValueError(f"{TENSORS} has {min(tensors)[:60]!r}, which is no part of rollouts")
    _check_places(rollouts)
    return rollouts


def _forest(tensors: dict[str, Tensor], steps: int) -> Forest:
    take = tensors.pop

    def traits(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): take(name) for name in [*tensors] if name.startswith(prefix)}

    edges = Edges(
        **{name: take(f"forest/edges/{name}") for name in _EDGES},
        mean=tensors.pop("forest/edges/mean", None),
        traits=traits("forest/edge_traits/"),
    )
    leaves = Leaves(*(take(f"forest/leaves/{name}") for name in _LEAVES), traits=traits("forest/leaf_traits/"))
    descent = (take("forest/descent/edge"), take("forest/descent/leaf"))
    return Forest(take("forest/nodes"), edges, leaves, descent, steps)


def _check_kinds(tensors: Mapping[str, Tensor]) -> None:
    for names, dtype in ((_WHOLE, torch.int64), (_FLAGS, torch.bool)):
        for name in names:
            if name in tensors and tensors[name].dtype != dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}; nearest valid: {dtype}")
    for name in _REAL:
        if name in tensors and not tensors[name].is_floating_point():
            raise ValueError(f"{name} is {tensors[name].dtype}; nearest valid: torch.float32")
    nodes = tensors[_NODES]
    if not nodes.is_floating_point():
        if nodes.dtype != torch.int64:
            raise ValueError(f"{_NODES} is {nodes.dtype}; nearest valid: torch.float32, or torch.int64 for tokens")
        if nodes.numel() and int(nodes.min()) < 0:
            raise ValueError(f"{_NODES} has the token {int(nodes.min())}; nearest valid: 0")
        if "forest/edges/mean" in tensors:
            raise ValueError("forest/edges/mean: steps of tokens have none; nearest valid: without it")
    flat = [f"forest/edges/{name}" for name in _EDGES] + [name for name in _WHOLE + _REAL if name not in _STATES]
    for name in flat:
        if name in tensors and tensors[name].ndim != 1:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)[:8]}; nearest valid: one dimension")


def _check_places(rollouts: Rollouts) -> None:
    """Every column has a row for each edge or leaf, and indices stay inside what they index."""
    forest, grid = rollouts.forest, rollouts.schedule.steps
    edges, leaves, nodes = forest.edges, forest.leaves, len(forest.nodes)
    if forest.steps != grid and (forest.steps or len(edges)):  # given samples walked none
        raise ValueError(f"steps is {forest.steps}, but the schedule has {grid}; nearest valid: {grid}")
    columns: list[tuple[str, Tensor, int]] = [(f"edges.{name}", getattr(edges, name), len(edges)) for name in _EDGES]
    columns += [(f"leaves.{name}", getattr(leaves, name), len(leaves)) for name in _LEAVES]
    columns += [(f"edges.traits[{name!r}]", column, len(edges)) for name, column in edges.traits.items()]
    columns += [(f"leaves.traits[{name!r}]", column, len(leaves)) for name, column in leaves.traits.items()]
    if edges.mean is not None and edges.mean.shape != (len(edges), *forest.nodes.shape[1:]):
        near = [len(edges), *forest.nodes.shape[1:]]
        raise ValueError(f"edges.mean has shape {list(edges.mean.shape)[:8]}; nearest valid: {near[:8]}")
    columns += [(f"signals.{name}", getattr(rollouts.signals, name), len(rollouts.slots)) for name in _SIGNALS]
    columns += [("descent", forest.descent[1], len(forest.descent[0]))]
    for name, column, rows in columns:
        if not column.ndim or len(column) != rows:
            raise ValueError(f"{name} has shape {list(column.shape)}; nearest valid: {rows} rows")
    slots = torch.tensor(rollouts.slots)
    known = torch.isin(torch.cat([edges.prompt, leaves.prompt]), slots)
    if not bool(known.all()) or not torch.equal(rollouts.signals.prompt, slots):
        raise ValueError(f"prompt: names a slot that is none of {list(rollouts.slots)[:8]}")
    for name, index, low, high in (
        ("edges.parent", edges.parent, -1, nodes),
        ("edges.child", edges.child, -1, nodes),
        ("leaves.node", leaves.node, -1, nodes),
        ("edges.step", edges.step, 0, grid),
        ("broken", rollouts.broken, WHOLE, max(WHY) + 1),
        ("drafts", rollouts.drafts, WHOLE, max(WHY) + 1),
        ("descent", forest.descent[0], 0, len(edges)),
        ("descent", forest.descent[1], 0, len(leaves)),
    ):
        if len(index) and not (low <= int(index.min()) and int(index.max()) < high):
            bad = int(index.min()) if int(index.min()) < low else int(index.max())
            raise ValueError(f"{name} has {bad}; nearest valid: {low} to {high - 1}")
