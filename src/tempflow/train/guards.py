"""What must hold before weights move, and what should hold while a run is left alone (docs/guards.md).

`check_*` and `clip_gradients` raise at once. The `watch_*` functions are pure: configuration, state and figures in, a
new state and alarms out. The state is plain JSON (`fresh_state()`); a run that restores it hears the same alarms. All
processes of a run must be given the same figures. `enforce` speaks and stops. `Guards` holds the state of one run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tempflow.config.guards import AnyAction, GuardsConfig
from tempflow.train.signals import Signals

FAINT = 0.01
"""A texture's share of picture energy below which its growth is not judged: nobody sees it."""

State = dict[str, Any]
"""Numbers, lists and dictionaries only. Keys: `fresh_state`."""

LOOK_AT = {
    "first_ratio": "guidance, prompts or σ that differ between rollout and training, dropout or train-mode layers, "
    "weights that moved in between, states stored in a lower precision than they were drawn in, and kernels that round "
    "by the batch's size (equal rows, or model.dtype float32, tell)",
    "clip_fraction": "log_ratio_abs, optimizer.learning_rate and updates_per_iteration (both may be too high), and a "
    "wider algorithm.clip",
    "zero_variance": "reward_std/… in metrics.jsonl: prompts may be solved or hopeless, the reward too coarse, or the "
    "noise level too low to tell siblings apart",
    "kl": "the pictures, a lower optimizer.learning_rate and a higher algorithm.kl",
    "reward_failures": "the reward's own warnings above, its server, timeouts and memory",
    "gold": "the pictures of the best and the latest validation side by side; earlier weights, a higher algorithm.kl "
    "or a further reward may be better",
    "diversity": "several pictures of one prompt; a higher algorithm.kl, fewer iterations or a reward of variety help",
    "latent_norm": "the pictures' contrast and saturation, a lower optimizer.learning_rate and a higher algorithm.kl",
    "velocity_norm": "latent_rms and the pictures' contrast, a lower optimizer.learning_rate and a higher algorithm.kl",
    "artefacts": "the pictures at full size for grids, speckle and over-sharpening; a higher algorithm.kl or earlier "
    "weights help",
    "idle": "the skips said above",
}


class GuardError(RuntimeError):
    """A guard stopped the run; weights are those of the last good update."""


class NonFiniteError(GuardError):
    """A loss or gradient is not finite; the optimizer step may be dropped (`watch_step`)."""


@dataclass(frozen=True)
class Alarm:
    """A guard that fired.

    guard    its name in the configuration
    action   "warn", "skip" or "stop"
    message  what happened, value, limit, what to look at, which flag changes the guard
    value    the figure, in the unit of `limit`
    prompts  with "skip": the prompt slots of this iteration that are not trained
    silent   the same guard spoke less than `repeat` iterations ago
    """

    guard: str
    action: Literal["warn", "skip", "stop"]
    message: str
    value: float
    limit: float
    prompts: tuple[int, ...] = ()
    silent: bool = False


def check_finite_loss(loss: Tensor, iteration: int) -> None:
    """Raises NonFiniteError for a NaN or infinite loss, before its backward."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"iteration {iteration}: the loss is {loss.item()}. No weight was changed. Look at log_ratio_abs and the "
            "rewards of this iteration in metrics.jsonl; a lower learning rate or float32 usually helps"
        )


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, iteration: int) -> float:
    """Clips to `max_norm` and returns the norm before; raises NonFiniteError for a NaN or infinite norm."""
    # torch does not take sharded and whole ones together
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norms: list[Tensor] = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
    norm = total.item()
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"iteration {iteration}: the gradient norm is {norm}. No weight was changed. Look at the last steps of the "
            "schedule (tiny σ), at half precision, and at the learning rate"
        )
    return norm


def check_rewards(valid: int, total: int, iteration: int) -> None:
    """Raises GuardError when not one reward of an iteration is valid."""
    if valid == 0:
        raise GuardError(
            f"iteration {iteration}: all {total} rewards failed, so there is nothing to learn from. Look at the "
            "warnings above: the reward function's own exception is printed there"
        )


def fresh_state() -> State:
    """The state before the first iteration.

    spoke    guard -> iteration of its last line
    first    signal -> its first values, which make the baseline
    last     signal -> its latest values
    gold     reward -> its first and best validation, the trained reward at the best, and how many in a row are low
    dropped  optimizer steps dropped in a row
    idle     iterations in a row with all groups skipped
    """
    return {"spoke": {}, "first": {}, "last": {}, "gold": {}, "dropped": 0, "idle": 0}


def enforce(alarms: Iterable[Alarm], say: Callable[[str], None]) -> None:
    """Says each warning and skip that is not silent; raises GuardError with the messages of those that say stop."""
    alarms = list(alarms)
    for alarm in alarms:
        if alarm.action != "stop" and not alarm.silent:
            skipped = f" (skipped: prompts {', '.join(map(str, alarm.prompts))})" if alarm.prompts else ""
            say(f"{alarm.action}: {alarm.message}{skipped}")
    stops = [alarm.message for alarm in alarms if alarm.action == "stop"]
    if stops:
        raise GuardError("\n".join(stops))


def skipped(alarms: Iterable[Alarm]) -> frozenset[int]:
    """The prompt slots whose groups are not trained in this iteration."""
    return frozenset(slot for alarm in alarms if alarm.action == "skip" for slot in alarm.prompts)


def watch_rollout(config: GuardsConfig, state: State, iteration: int, signals: Signals) -> tuple[State, list[Alarm]]:
    """Failed scores, diversity, latent norm and artefacts of an iteration's leaves; after scoring, before the update.

    `signals` are those of all the iteration's leaves. `skipped(alarms)` are the slots whose groups must not be trained.
    """
    look, mean = _Look(config, copy.deepcopy(state), iteration), signals.metrics()
    fired = [
        _reward_failures(look, mean["reward_failures"], signals),
        _diversity(look, mean["diversity"], signals),
        _latent_norm(look, mean["latent_rms"]),
        _artefacts(look, mean),
    ]
    alarms = [alarm for alarm in fired if alarm is not None]
    idle = look.state["idle"] + 1 if skipped(alarms) >= set(signals.prompt.tolist()) else 0
    look.state["idle"] = idle
    if idle > config.idle:
        text = f"guards skipped every group of {idle} iterations in a row"
        alarms.append(look.alarm("idle", "stop", text, idle, f"above the limit {config.idle}", config.idle))
    return look.state, alarms


def watch_first_ratio(
    config: GuardsConfig, state: State, iteration: int, gap: float, rows: tuple[int, int]
) -> tuple[State, list[Alarm]]:
    """The largest difference between an edge's log-prob in the rollout and in the forward that its ratio compares with,
    in roundings (`core.objective.old.roundings`). rows: `rollout_rows` and `train_rows`."""
    look, guard = _Look(config, copy.deepcopy(state), iteration), config.first_ratio
    if guard.action == "off" or gap <= guard.limit:
        return look.state, []
    batches = "equal rows" if rows[0] == rows[1] else f"unequal rows (rollout_rows {rows[0]}, train_rows {rows[1]})"
    text = (
        f"training sees other log-probs than the rollout did before any weight moved: velocities are {gap:.3g} "
        f"roundings of their dtype apart, at {batches}"
    )
    bound = f"above the limit {guard.limit:g}"
    return look.state, [look.alarm("first_ratio", guard.action, text, gap, bound, guard.limit)]


def watch_step(
    config: GuardsConfig, state: State, iteration: int, fault: NonFiniteError | None
) -> tuple[State, list[Alarm]]:
    """Called for each optimizer step; `fault` is what its loss or gradients raised, None where they were finite.

    An alarm that skips means: clear the gradients, take no step, go on.
    """
    look, guard = _Look(config, copy.deepcopy(state), iteration), config.non_finite
    dropped = 0 if fault is None else look.state["dropped"] + 1
    look.state["dropped"] = dropped
    if fault is None:
        return look.state, []
    limit = guard.patience if guard.action == "skip" else 0
    action = "stop" if dropped > limit else "skip"
    bound = f"{'above' if action == 'stop' else 'within'} the limit {limit}"
    text = str(fault).removeprefix(f"iteration {iteration}: ") + f". Optimizer steps dropped in a row: {dropped}"
    return look.state, [look.alarm("non_finite", action, text, dropped, bound, limit, "patience")]


def watch_update(
    config: GuardsConfig, state: State, iteration: int, metrics: Mapping[str, float]
) -> tuple[State, list[Alarm]]:
    """Clip fraction, zero-variance groups, KL and size of velocities of an iteration; after its updates.

    Metrics that are not there are not judged.
    """
    look, window = _Look(config, copy.deepcopy(state), iteration), config.zero_variance.window
    clipped, kl = metrics.get("clip_fraction"), metrics.get("kl")
    recent = look.latest("zero_variance", metrics.get("zero_variance", math.nan), window)
    flat = _mean(recent) if len(recent) == window else None
    spread = f"of the edges of the last {window} iterations are in groups without spread"
    judged = [
        ("clip_fraction", config.clip_fraction, clipped, "{:.3g} of the trained edges are clipped"),
        ("zero_variance", config.zero_variance, flat, f"{{:.3g}} {spread}"),
        ("kl", config.kl, kl, "the mean KL to the reference is {:.3g}"),
    ]
    fired = [
        look.alarm(name, guard.action, text.format(value), value, f"above the limit {guard.limit:g}", guard.limit)
        for name, guard, value, text in judged
        if guard.action != "off" and value is not None and not value <= guard.limit
    ]
    norm = _velocity_norm(look, metrics.get("velocity_norm"))
    return look.state, fired if norm is None else [*fired, norm]


def watch_validation(
    config: GuardsConfig, state: State, iteration: int, trained: float, gold: Mapping[str, float]
) -> tuple[State, list[Alarm]]:
    """`trained`: the validation score that is optimised; `gold`: those that are only looked at, by name.

    A fall is measured in the larger of |best| and what the reward had gained since its first validation. Scores that
    are not finite are passed over.
    """
    look, guard = _Look(config, copy.deepcopy(state), iteration), config.gold
    fallen: list[tuple[float, str]] = []
    for name, value in gold.items():
        if not (math.isfinite(value) and math.isfinite(trained)):
            continue
        past = look.state["gold"].setdefault(name, {"first": value, "best": value, "trained": trained, "low": 0})
        if value >= past["best"]:
            past |= {"best": value, "trained": trained, "low": 0}
            continue
        scale = max(abs(past["best"]), past["best"] - past["first"])
        fall = (past["best"] - value) / scale if scale > 0 else math.inf
        past["low"] = past["low"] + 1 if fall > guard.drop and trained > past["trained"] else 0
        if past["low"] >= guard.patience:
            fallen.append((fall, name))
    if guard.action == "off" or not fallen:
        return look.state, []
    fall, name = max(fallen)
    past = look.state["gold"][name]
    text = (
        f"the trained reward rose from {past['trained']:.3g} to {trained:.3g} while {name}, which is not trained, fell "
        f"from {past['best']:.3g} to {gold[name]:.3g}, by {fall:.3g} of its best"
    )
    bound = f"beyond the limit {guard.drop:g}"
    return look.state, [look.alarm("gold", guard.action, text, fall, bound, guard.drop, "drop")]


def _reward_failures(look: _Look, share: float, signals: Signals) -> Alarm | None:
    guard = look.config.reward_failures
    if guard.action == "off" or not share > guard.limit:
        return None
    slots = signals.prompt[signals.failed > 0].tolist() if guard.action == "skip" else []
    bound = f"above the limit {guard.limit:g}"
    text = f"{share:.3g} of the scores failed"
    return look.alarm("reward_failures", guard.action, text, share, bound, guard.limit, prompts=slots)


def _diversity(look: _Look, value: float, signals: Signals) -> Alarm | None:
    """With "skip" each group is judged by itself, else the mean over groups and iterations."""
    guard = look.config.diversity
    trend = look.trend("diversity", value, guard.baseline)
    if guard.action == "off" or trend is None or trend[0] <= 0:
        return None
    low, slots, where = trend[1] / trend[0], [], f"a group over the last {guard.baseline} iterations"
    if guard.action == "skip":
        shares = signals.diversity / trend[0]
        low, slots = shares[shares.isfinite()].min().item(), signals.prompt[shares < guard.limit].tolist()
        where = "the least varied group"
    if not low < guard.limit:
        return None
    text = f"the mean distance between pictures within {where} is {low:.3g} of its baseline {trend[0]:.3g}"
    bound = f"below the limit {guard.limit:g}"
    return look.alarm("diversity", guard.action, text, low, bound, guard.limit, prompts=slots)


def _latent_norm(look: _Look, value: float) -> Alarm | None:
    guard = look.config.latent_norm
    trend = look.trend("latent_rms", value, guard.baseline)
    ratio, text = value, f"the RMS of final latents is {value:.3g}"
    if math.isfinite(value):
        if trend is None or trend[0] <= 0:
            return None
        ratio = trend[1] / trend[0]
        text = f"the RMS of final latents is {trend[1]:.3g}, {ratio:.3g} × its baseline {trend[0]:.3g}"
    if guard.action == "off" or 1 / guard.limit <= ratio <= guard.limit:
        return None
    bound = f"outside the limits {1 / guard.limit:.3g} and {guard.limit:g}"
    return look.alarm("latent_norm", guard.action, text, ratio, bound, guard.limit)


def _velocity_norm(look: _Look, ratio: float | None) -> Alarm | None:
    """Held to the starting model, so it needs no baseline."""
    guard = look.config.velocity_norm
    if guard.action == "off" or ratio is None or 1 / guard.limit <= ratio <= guard.limit:
        return None
    text = f"the RMS of the policy's velocities is {ratio:.3g} × the starting model's"
    bound = f"outside the limits {1 / guard.limit:.3g} and {guard.limit:g}"
    return look.alarm("velocity_norm", guard.action, text, ratio, bound, guard.limit)


TEXTURES = {"high_frequency": "fine texture", "grid": "a pattern in step with the latent grid"}


def _artefacts(look: _Look, mean: Mapping[str, float]) -> Alarm | None:
    guard = look.config.artefacts
    trends = {name: look.trend(name, mean[name], guard.baseline) for name in TEXTURES}
    growth = [(trend[1] / max(trend[0], FAINT), name, trend[1]) for name, trend in trends.items() if trend]
    if guard.action == "off" or not growth or max(growth)[0] <= guard.limit:
        return None
    ratio, name, share = max(growth)
    text = (
        f"{TEXTURES[name]} ({name}) has {share:.3g} of the pictures' energy, {ratio:.3g} × its baseline (of at least "
        f"{FAINT:g})"
    )
    return look.alarm("artefacts", guard.action, text, ratio, f"above the limit {guard.limit:g}", guard.limit)


@dataclass(frozen=True)
class _Look:
    """One look at the figures; `state` is the state to come, and the only thing that changes."""

    config: GuardsConfig
    state: State
    iteration: int

    def alarm(
        self,
        name: str,
        action: AnyAction,
        text: str,
        value: float,
        bound: str,
        limit: float,
        field: str = "limit",
        prompts: Iterable[int] = (),
    ) -> Alarm:
        """The alarm; the state then holds that it spoke."""
        assert action != "off"
        option = f"--guards.{name}".replace("_", "-")
        flags = f"{option}.{field} or {option}.action" if name != "idle" else option
        spoke = self.state["spoke"].get(name)
        silent = spoke is not None and self.iteration - spoke < self.config.repeat
        if not silent:
            self.state["spoke"][name] = self.iteration
        hint = f"Look at {LOOK_AT[name]}. " if name in LOOK_AT else ""  # a fault that is not finite says so itself
        message = f"iteration {self.iteration}: {name}: {text}, {bound}. {hint}To change this guard: {flags}"
        return Alarm(name, action, message, value, limit, tuple(prompts), silent)

    def trend(self, name: str, value: float, count: int) -> tuple[float, float] | None:
        """Means of the first `count` finite values and of the last; None until there are so many."""
        first, last = self.state["first"].setdefault(name, []), self.latest(name, value, count)
        if len(first) < count and math.isfinite(value):
            first.append(value)
        return (_mean(first[:count]), _mean(last)) if len(first) >= count else None

    def latest(self, name: str, value: float, count: int) -> list[float]:
        """The last `count` values, `value` being the newest; one that is not finite is left out."""
        kept = [*self.state["last"].get(name, []), *([value] if math.isfinite(value) else [])]
        self.state["last"][name] = kept[-count:]
        return kept[-count:]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class Guards:
    """Feeds figures to the guards. `write` is given all alarms as they come, `say` the lines to be read.

    Every method raises GuardError when a guard says stop. `state` is plain JSON and may be put back.
    """

    def __init__(
        self, config: GuardsConfig, write: Callable[[int, Sequence[Alarm]], None], say: Callable[[str], None]
    ) -> None:
        self.config, self.write, self.say = config, write, say
        self.state: State = fresh_state()

    def rollout(self, iteration: int, signals: Signals) -> frozenset[int]:
        """The prompt slots whose groups are not to be trained."""
        return skipped(self._heed(iteration, watch_rollout(self.config, self.state, iteration, signals)))

    def first_ratio(self, iteration: int, gap: float, rows: tuple[int, int]) -> None:
        """Before each update: the rollout's log-probs beside the training forward's. rows: of rollout and training."""
        self._heed(iteration, watch_first_ratio(self.config, self.state, iteration, gap, rows))

    def drops(self, iteration: int, fault: NonFiniteError | None) -> bool:
        """Whether this optimizer step is to be dropped."""
        return bool(self._heed(iteration, watch_step(self.config, self.state, iteration, fault)))

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """After an iteration's updates."""
        self._heed(iteration, watch_update(self.config, self.state, iteration, metrics))

    def validation(self, iteration: int, trained: float, gold: Mapping[str, float]) -> None:
        """After a validation."""
        self._heed(iteration, watch_validation(self.config, self.state, iteration, trained, gold))

    def _heed(self, iteration: int, seen: tuple[State, list[Alarm]]) -> list[Alarm]:
        self.state, alarms = seen
        self.write(iteration, alarms)
        enforce(alarms, self.say)
        return alarms
