"""The guards of one run at work: their state, and where their alarms go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tempflow.config.guards import GuardsConfig
from tempflow.train import guards
from tempflow.train.guards import Alarm, NonFiniteError, State
from tempflow.train.signals import Signals


class Watcher:
    """Feeds figures to the guards. `write` is given all alarms as they come, `say` the lines to be read.

    Every method raises GuardError when a guard says stop. `state` is plain JSON and may be put back.
    """

    def __init__(
        self, config: GuardsConfig, write: Callable[[int, Sequence[Alarm]], None], say: Callable[[str], None]
    ) -> None:
        self.config, self.write, self.say = config, write, say
        self.state: State = guards.fresh_state()

    def rollout(self, iteration: int, signals: Signals) -> frozenset[int]:
        """The prompt slots whose groups are not to be trained."""
        return guards.skipped(self._heed(iteration, guards.watch_rollout(self.config, self.state, iteration, signals)))

    def first_ratio(self, iteration: int, gap: float, rows: tuple[int, int]) -> None:
        """Before each update: the rollout's log-probs beside the training forward's. rows: of rollout and training."""
        self._heed(iteration, guards.watch_first_ratio(self.config, self.state, iteration, gap, rows))

    def drops(self, iteration: int, fault: NonFiniteError | None) -> bool:
        """Whether this optimizer step is to be dropped."""
        return bool(self._heed(iteration, guards.watch_step(self.config, self.state, iteration, fault)))

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """After an iteration's updates."""
        self._heed(iteration, guards.watch_update(self.config, self.state, iteration, metrics))

    def validation(self, iteration: int, trained: float, gold: Mapping[str, float]) -> None:
        """After a validation."""
        self._heed(iteration, guards.watch_validation(self.config, self.state, iteration, trained, gold))

    def _heed(self, iteration: int, seen: tuple[State, list[Alarm]]) -> list[Alarm]:
        self.state, alarms = seen
        self.write(iteration, alarms)
        guards.enforce(alarms, self.say)
        return alarms
