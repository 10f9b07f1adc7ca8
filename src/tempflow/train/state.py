"""A run's state as tensors and JSON; whether a run can be resumed, and from where; another run's baseline; the weights
that training starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.lesson import Role
from tempflow.config import Config, load_config, parse_config
from tempflow.core.ema import Ema
from tempflow.core.objective.imitation import OnPolicyMatching
from tempflow.core.scores import Scores
from tempflow.evaluate.figures import Walk
from tempflow.evaluate.suite import Report
from tempflow.folder import MARKER, check_idle, foreign, kind_of
from tempflow.models import EMBEDDED_MODELS
from tempflow.models.lora import Lora, lora_of, paired, parameter_names, ranks_of
from tempflow.models.lora_files import LoraFile, TakesLora, read_lora
from tempflow.models.protocol import Model
from tempflow.strict import shown
from tempflow.train import checkpoint
from tempflow.train.identity import (
    RUN,
    STAGED,
    SUMMARY,
    Identity,
    changed_contents,
    check_given,
    read_identity,
    same_contents,
)
from tempflow.train.weights import Learner, Trainable, WeightSet, check_names, laid_out

Yardstick = tuple[float, Report]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the untrained model showed: its test report, the grid's pictures, and the yardstick if one was asked for."""

    before: Report
    grid: Tensor
    yardstick: Yardstick | None


def optimizer_of(config: Config, trainable: Trainable, role: Role | None = None) -> torch.optim.Optimizer:
    """AdamW on the masters; its moments in 8 bits by bitsandbytes, where that is asked for. `role`: whose betas and
    rate it has where it is not the policy's."""
    o = config.optimizer
    betas = (o.beta1, o.beta2) if role is None or role.betas is None else role.betas
    rate = o.learning_rate * (1.0 if role is None else role.rate)
    if o.kind == "adamw_8bit":
        eight: Any = import_module("bitsandbytes")
        return eight.optim.AdamW8bit(
            trainable.masters,
            lr=rate,
            betas=betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
    return torch.optim.AdamW(
        trainable.masters,
        lr=rate,
        betas=betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as `name/key` tensors, for parameters in the order of `names`."""
    parts = zip(names, _masters(optimizer), strict=True)
    return {f"{n}/{key}": torch.as_tensor(v) for n, m in parts for key, v in optimizer.state.get(m, {}).items()}


def _masters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [master for group in optimizer.param_groups for master in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave; group options stay as they are."""
    masters, own = _masters(optimizer), isinstance(optimizer, torch.optim.AdamW)
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        place = names.index(name)
        held = laid_out(value, masters[place]) if value.ndim else value
        # bitsandbytes counts steps by a whole number, and its own loading takes its own wrapping of these alone
        state.setdefault(place, {})[field] = held if own or value.ndim else int(value)
    if own:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return
    for place, part in state.items():
        moved = {k: v.to(masters[place].device) if isinstance(v, Tensor) else v for k, v in part.items()}
        optimizer.state[masters[place]] = moved


def average_of(config: Config, trainable: Trainable) -> WeightSet | None:
    """The policy's average, where the run keeps one."""
    decay = config.optimizer.ema_decay
    return WeightSet(trainable, Ema(decay)) if decay else None


def learner_tensors(role: str, learner: Learner) -> dict[str, dict[str, Tensor]]:
    """A role's part of a checkpoint by file, in a folder of its name: no copies."""
    files = {f"{role}/weights": learner.trainable.named()}
    moments = optimizer_tensors(learner.optimizer, learner.trainable.names)
    if moments:  # none before the first update
        files[f"{role}/optimizer"] = moments
    if learner.average is not None:
        files[f"{role}/ema"] = learner.average.named()
    return files | learner.sets.tensors()


def learner_facts(learner: Learner) -> dict[str, Any]:
    """What is no tensor in a role, for JSON."""
    return {
        "followers": learner.sets.updates(),
        "average_updates": 0 if learner.average is None else learner.average.updates,
        "loss_scale": [learner.trainable.loss_scale, learner.trainable.finite_steps],
    }


def load_learner(
    role: str, learner: Learner, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> None:
    """Puts back what `learner_tensors` and `learner_facts` gave. Raises CheckpointError where the role is not there."""
    file = f"{role}/weights"
    if file not in tensors:
        raise checkpoint.CheckpointError(f"checkpoint: {file} is missing, and {role!r} learns; of another algorithm?")
    learner.trainable.load(tensors[file])
    if learner.average is not None:
        learner.average.load(tensors[f"{role}/ema"], facts["average_updates"])
    learner.sets.load(tensors, facts["followers"])
    load_optimizer(learner.optimizer, learner.trainable.names, tensors.get(f"{role}/optimizer", {}))
    learner.trainable.loss_scale, learner.trainable.finite_steps = facts["loss_scale"]


def looks_of(baseline: Baseline) -> dict[str, Tensor]:
    """The tensors of `baseline`."""
    reports = {"before": baseline.before} | ({"yardstick": baseline.yardstick[1]} if baseline.yardstick else {})
    seen = {f"{name}/value": r.scores.value for name, r in reports.items()}
    seen |= {f"{name}/ok": r.scores.ok for name, r in reports.items()}
    return seen | {"grid": baseline.grid}


def baseline_facts(baseline: Baseline) -> dict[str, Any]:
    """What is no tensor in `baseline`, for JSON."""
    guidance = None if baseline.yardstick is None else baseline.yardstick[0]
    return {
        "before": _facts(baseline.before),
        "yardstick": baseline.yardstick and _facts(baseline.yardstick[1]),
        "at": guidance,
    }


def baseline_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Baseline:
    """What `baseline_facts` and `looks_of` were given."""
    yardstick = None
    if facts["yardstick"] is not None:
        yardstick = (facts["at"], _report(facts["yardstick"], tensors, "yardstick"))
    return Baseline(_report(facts["before"], tensors, "before"), tensors["grid"], yardstick)


def _facts(report: Report) -> dict[str, Any]:
    return {
        "names": list(report.scores.names),
        "prompts": list(report.prompts),
        "kinds": list(report.kinds),
        "gold": list(report.gold),
        "steps": report.steps,
        "guidance": report.guidance,
        "seed": report.seed,
        "walk": None if report.walk is None else asdict(report.walk),
    }


def _report(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Report:
    scores = Scores(tensors[f"{name}/value"], tensors[f"{name}/ok"], tuple(facts["names"]))
    prompts, kinds, gold = tuple(facts["prompts"]), tuple(facts["kinds"]), tuple(facts["gold"])
    walk = None if facts.get("walk") is None else Walk(**facts["walk"])
    return Report(scores, prompts, kinds, facts["steps"], facts["guidance"], facts["seed"], gold=gold, walk=walk)


FREE = ("output",)
"""Fields that may differ: the folder may have been moved."""


@contextmanager
def _named(field: str) -> Iterator[None]:
    """A checkpoint's fault with the field that names the folder in front."""
    try:
        yield
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{field}: {error}") from error


def check_resumable(folder: Path, config: Config, given: Sequence[str]) -> None:
    """What can be told without work.

    Raises CheckpointError where there is no run; ValueError where the folder is not a run's own, where the run still
    goes on, where it would write over its own model, and where it was given objects in Python that are not `given` now.
    """
    if not (folder / "config.yaml").is_file() and not (folder / checkpoint.FOLDER).is_dir():
        with _named("resume"):
            checkpoint.newest(folder)  # no run at all: raises, naming what is there
    if kind_of(folder) != RUN:
        raise ValueError(
            f"resume: {str(folder)!r} has no {MARKER} of a run, so nothing is written there; nearest valid: a folder "
            "that `tempflow train` made (of a copied run, copy that file too)"
        )
    check_idle(folder)
    fault = foreign(folder / "model")
    if fault is not None:
        raise ValueError(
            f"resume: {str(folder / fault)!r} is not as this run wrote it, and its end writes model/ anew; move it away"
        )
    own, path = folder.resolve(), Path(config.model.path).expanduser()
    if config.model.path not in EMBEDDED_MODELS and path.exists() and path.resolve().is_relative_to(own):
        raise ValueError(f"model.path: {config.model.path!r} lies in the run's own folder, which it would write over")
    was = read_identity(folder)
    if was is not None:
        check_given(folder, was, given)


def resumable(
    folder: Path, config: Config, now: Identity, allow_changes: bool, say: Callable[[str], None]
) -> checkpoint.Saved | None:
    """The newest whole checkpoint of the run in `folder`; None when it died before the first.

    now   what the run depends on as it is called this time

    Raises CheckpointError when the folder holds no run or all its checkpoints are damaged, and ValueError, naming all
    that differs, when configuration, contents or objects are not the checkpoint's own (those of config.yaml and
    identity.json, where there is no checkpoint) and changes are not allowed.
    """
    file, root, saved = folder / "config.yaml", folder / checkpoint.FOLDER, None
    if not file.is_file() or (root.is_dir() and any(p.name.isdigit() for p in root.iterdir())):
        saved = checkpoint.read_newest(folder, say)
    config_was = load_config(file) if saved is None else parse_config(yaml.safe_load(saved.state["config"]))
    was = read_identity(folder) if saved is None else read_identity(saved.state)
    changes = _changes(folder, config_was, was, config, now)
    if changes and not allow_changes:
        raise ValueError(_refused(changes))
    for change in changes:
        say(f"changed on resuming: {change}")
    if saved is None:
        say(f"{folder} has no checkpoint yet: the run starts from the beginning")
    else:
        say(f"going on from {saved.path}")
    return saved


def finished(folder: Path, config: Config, now: Identity, allow_changes: bool) -> bool:
    """Whether the run in `folder` is finished as `config` has it; by its records, no weights are read.

    Raises ValueError, naming all that differs, where it is another's and changes are not allowed.
    """
    if not (folder / CONFIG_FILE).is_file():
        return False
    changes = _changes(folder, load_config(folder / CONFIG_FILE), read_identity(folder), config, now)
    if changes and not allow_changes:
        raise ValueError(_refused(changes))
    return not changes and (folder / SUMMARY).is_file()


def _changes(folder: Path, config_was: Config, was: Identity | None, config: Config, now: Identity) -> list[str]:
    """What is not as the run was started. Raises ValueError where objects are not given that it was given."""
    if was is None:
        return changed_fields(config_was, config)
    check_given(folder, was, now.objects)
    return changed_fields(config_was, config, (*FREE, *same_contents(was, now))) + changed_contents(was, now)


def _refused(changes: Sequence[str]) -> str:
    listed = "; ".join(changes)
    how = "Take back the changes, or allow them: --allow-changes (in Python: allow_changes=True)"
    return f"the configuration is not the run's own: {listed}. {how}"


def changed_fields(was: Config, now: Config, free: Sequence[str] = FREE) -> list[str]:
    """ "field: a → b" for each leaf that differs, those in `free` apart."""
    a, b = was.model_dump(mode="json"), now.model_dump(mode="json")
    old, new = _flat(a, b), _flat(b, a)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in free]
    return [f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in names]


def _flat(tree: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → leaf. Lists are leaves, but for such as rewards, of as many items in the `other` tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        beside: Any = other.get(key)
        if _items(value) and _items(beside) and len(value) == len(beside):
            value, beside = ({str(n): item for n, item in enumerate(part)} for part in (value, beside))
        inside = beside if isinstance(beside, Mapping) else {}
        flat |= _flat(value, inside, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _items(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


ALIKE = ("model", "reward", "prompts", "test_prompts", "data.validation", "data.test", "evaluation.", "device")
"""Fields and objects, or beginnings of their names, that the untrained model's test depends on."""

APART = ("evaluation.every", "evaluation.before", "model.training", "model.lora_", "model.reference")
"""Of these, what it does not: a fresh LoRA changes nothing."""


def run_baseline(config: Config, own: Identity | None = None) -> Baseline:
    """What the untrained model showed in the run in `config.evaluation.before`, from its newest whole checkpoint.

    `own`: what this run depends on; None compares the configuration alone. Raises ValueError, naming what differs,
    where that run was not set alike; CheckpointError where it has no checkpoint.
    """
    folder = Path(config.evaluation.before)
    with _named("evaluation.before"):
        saved = checkpoint.read_newest(folder)
    was = parse_config(yaml.safe_load(saved.state["config"]))
    theirs = read_identity(saved.state)
    changes = changed_fields(was, config)
    if own is not None and theirs is not None:
        changes = changed_fields(was, config, same_contents(theirs, own)) + changed_contents(theirs, own)
    other = [c for c in changes if c.startswith(ALIKE) and not c.startswith(APART)]
    if other:
        raise ValueError(
            f"evaluation.before: the run in {str(folder)!r} was set otherwise: {'; '.join(other)}; "
            "nearest valid: '', the untrained model is tested anew"
        )
    return baseline_of(saved.state["looks"], saved.tensors["looks"])


# ------------------------------------------------------------------------------------------------------ where it starts
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, eq=False)
class StartingWeights:
    """What a field names: all weights of a run by parameter name, a run's LoRA, or a LoRA's file. One of the three."""

    field: str
    path: str
    weights: Mapping[str, Tensor] | None = None
    lora: Lora | None = None
    file: LoraFile | None = None

    def lora_for(self, model: Model) -> Lora | None:
        """The LoRA in the names of the model's layers; None where whole weights are given.

        Raises ValueError where it does not fit, or is of a text encoder too, which no run trains or keeps.
        """
        if self.file is None:
            return self.lora
        if not isinstance(model, TakesLora):
            raise ValueError(f"{self.field}: {self.path!r} is a LoRA; this model takes none; nearest valid: ''")
        try:
            fitted = model.fit_lora(self.file)
        except ValueError as error:
            raise ValueError(f"{self.field}: {error}") from error
        for part, lora in fitted.others.items():
            raise ValueError(
                f"{self.field}: {self.path!r} has {len(lora)} layers of {part} too, which a run would not keep; "
                "nearest valid: the file without them, or `model.path` with them merged in"
            )
        return fitted.network


def read_starts(places: Sequence[str], field: str) -> StartingWeights:
    """What one place names, or the mean of the weights of several runs (a model soup, arXiv 2203.05482; of policies
    that were rewarded apart from one start, WARP, 2406.16768; both from memory). Raises ValueError as `read_start`, and
    for several that are not runs of whole networks with the same parameters."""
    if len(places) == 1:
        return read_start(places[0], field)
    mean = dict[str, Tensor]()
    for place in places:
        weights = read_start(place, field).weights
        if weights is None:
            raise ValueError(f"{field}: a mean is of whole networks, and {place!r} is a LoRA; nearest valid: it alone")
        shapes = {name: value.shape for name, value in weights.items()}
        if mean and shapes != {name: value.shape for name, value in mean.items()}:
            raise ValueError(f"{field}: {place!r} has other parameters than {places[0]!r}; nearest valid: one of both")
        for name, value in weights.items():
            mean[name] = mean[name] + value.double() / len(places) if name in mean else value.double() / len(places)
    return StartingWeights(field, " and ".join(places), {name: value.float() for name, value in mean.items()})


def read_start(path: str, field: str) -> StartingWeights:
    """Reads what `path` names. Raises ValueError, naming `field`, where that is neither a run nor a LoRA."""
    place = Path(path).expanduser()
    try:
        if (place / "model_index.json").is_file():
            raise ValueError(f"{path!r} is a whole pipeline; nearest valid: --model.path {path}")
        if (place / CONFIG_FILE).is_file() or (place / checkpoint.FOLDER).is_dir():
            return _of_run(place, path, field)
        return StartingWeights(field, path, file=read_lora(place))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _of_run(run: Path, path: str, field: str) -> StartingWeights:
    if kind_of(run) == STAGED:
        load_config(run / CONFIG_FILE)  # raises, with the last stage's folder
    weights = checkpoint.best_weights(run)
    if not any(".lora_A." in name for name in weights):
        return StartingWeights(field, path, weights=weights)
    trained = load_config(run / CONFIG_FILE).model
    return StartingWeights(field, path, lora=paired(weights, trained.lora_alpha / trained.lora_rank))


def check_start(start: StartingWeights, training: str) -> None:
    """Raises ValueError for whole weights where a LoRA is trained: that LoRA's file alone would not be the model."""
    if training == "lora" and start.weights is not None:
        raise ValueError(
            f"{start.field}: {start.path!r} trained the whole network, and this run trains a LoRA; "
            f"nearest valid: --model.path {Path(start.path) / 'model'}"
        )


def check_reference(config: Config, algorithm: Algorithm) -> None:
    """Raises ValueError where the reference that the algorithm asks for cannot be read."""
    which = config.model.reference
    if algorithm.starts_from_reference and which not in ("base", "start"):
        read_start(which, "model.reference")


def check_teacher(config: Config, algorithm: Algorithm) -> None:
    """Raises ValueError where a student is to follow, at its own states, just what it starts as."""
    m = config.model
    starts_as = m.reference == "start" or (m.reference == "base" and not m.start)
    for phase in algorithm.phases:
        loss = phase.objective
        if not isinstance(loss, OnPolicyMatching) or loss.teacher != "reference" or not starts_as:
            continue
        if loss.strength == m.guidance:
            raise ValueError(
                f"algorithm.teacher_guidance: {loss.strength:g} is the student's own, and it starts as its teacher "
                f"(model.start: {shown(m.start)}, model.reference: {shown(m.reference)}), which leaves nothing to "
                "learn; nearest valid: 4.5, or another model.reference"
            )


def starting_state(
    start: StartingWeights, trainable: Trainable, base: Mapping[str, Tensor], lora: Lora | None
) -> dict[str, Tensor]:
    """The trained parameters with what is given: `base` is what they are without it, `lora` what `lora_for` gave.

    Raises ValueError, naming the field, where names or shapes do not agree.
    """
    state = dict(base)
    if lora is None:
        state = dict(start.weights or {})
    elif any(".lora_A." in name for name in base):
        state |= _as_lora(start, lora, trainable.network)
    else:
        for layer, factors in lora.items():
            name = f"{layer}.weight"
            if name not in base:
                raise ValueError(f"{start.field}: {layer!r} is no layer that is trained; another base?")
            state[name] = base[name] + factors.dense().to(base[name].device)
    try:
        check_names(trainable, state)
    except ValueError as error:
        raise ValueError(f"{start.field}: {start.path!r}: {error}") from error
    return state


def _as_lora(start: StartingWeights, lora: Lora, network: nn.Module) -> dict[str, Tensor]:
    own, told = lora_of(network), ranks_of(lora)
    state: dict[str, Tensor] = {}
    for layer, factors in lora.items():
        if layer not in own or own[layer].rank != told[layer]:
            has = f"rank {own[layer].rank}" if layer in own else "none"
            raise ValueError(
                f"{start.field}: {start.path!r} has a LoRA of rank {told[layer]} on {layer!r}, and what is trained has "
                f"{has} there"
            )
        a, b = parameter_names(layer)
        state[a] = factors.a.float()
        state[b] = (factors.b.double() * (factors.scale / own[layer].scale)).float()
    return state


def start_summary(start: StartingWeights, lora: Lora | None, training: str) -> str:
    """What is done with it, for the run's first lines."""
    if lora is None:
        return f"best weights of {start.path}"
    ranks = " and ".join(map(str, sorted(set(ranks_of(lora).values()))))
    done = "goes on being trained" if training == "lora" else "is merged into the weights"
    return f"the LoRA of {start.path} ({len(lora)} layers, rank {ranks}) {done}"
