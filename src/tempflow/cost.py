"""What a run costs, before it starts: counted from its plans, never estimated, except where it says "at most"."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.table import Table

from tempflow.config import Config
from tempflow.core.cost import equivalents
from tempflow.core.plan import Cost, Plan

STATE_BYTES = 4
"""States are stored in float32."""


@dataclass(frozen=True)
class RunCost:
    """Counts for the first iteration and for the whole run.

    first, total        rows given to the network in rollouts, pictures decoded and scored, edges trained. A group whose
                        scores are all equal is not trained, so the trained edges (and their forwards) are upper bounds
    rewards             rewards per picture
    latent              rows through a latent reward, which scores the trained edges
    others              the weight sets beside the policy (reference, old, …) that the loss asks at every trained edge
    guided              whether guidance doubles the rows of every forward
    stored_nodes        most states that an iteration keeps for training
    state_bytes         bytes of one state; None where the model's folder is not here to say
    validation, test    forwards of one validation, and of one test (there is one before and one after)
    """

    iterations: int
    first: Cost
    total: Cost
    rewards: int
    latent: int
    others: tuple[str, ...]
    guided: bool
    stored_nodes: int
    state_bytes: int | None
    validation: int
    test: int

    @property
    def forwards(self) -> int:
        """Rollout, training and other sets' forwards of the run at most, guidance not doubled; evaluation is apart."""
        return self.total.forwards + self.total.trained_edges * (1 + len(self.others))

    @property
    def equivalents(self) -> int:
        """The run's compute at most, in forward-equivalents (`core.cost.equivalents`); evaluation is apart."""
        plain = self.total.forwards + self.total.trained_edges * len(self.others)
        return equivalents(plain, self.total.trained_edges, guided=self.guided, latent=self.latent)

    def table(self) -> Table:
        """The counts, for a terminal."""
        table = Table(title=f"{self.iterations} iterations")
        table.add_column("")
        table.add_column("an iteration", justify="right")
        table.add_column("the run", justify="right")
        rows = [
            ("rollout forwards", self.first.forwards, self.total.forwards),
            ("decodes", self.first.leaves, self.total.leaves),
            ("reward calls", self.first.leaves * self.rewards, self.total.leaves * self.rewards),
            ("training forwards + backwards, at most", self.first.trained_edges, self.total.trained_edges),
        ]
        for name in self.others:
            rows.append((f"{name} forwards, at most", self.first.trained_edges, self.total.trained_edges))
        for label, one, run in rows:
            table.add_row(label, f"{one:,}", f"{run:,}")
        table.add_section()
        table.add_row("all forwards but evaluation, at most", "", f"{self.forwards:,}")
        table.add_row("the same in forward-equivalents (with gradient: 3)", "", f"{self.equivalents:,}")
        table.add_row("forwards of a validation | of the test, twice", f"{self.validation:,}", f"{2 * self.test:,}")
        table.add_row("states kept for training, at most | their memory", f"{self.stored_nodes:,}", self._memory())
        if self.guided:
            table.caption = "guidance: every forward is of two rows (the empty prompt's row has no backward)"
        return table

    def _memory(self) -> str:
        if self.state_bytes is None:
            return "? (the model's folder is not here)"
        size = float(self.stored_nodes * self.state_bytes)
        for unit in ("B", "KiB", "MiB"):
            if size < 1024:
                return f"{size:.1f} {unit}"
            size /= 1024
        return f"{size:.1f} GiB"


def run_cost(config: Config) -> RunCost:
    """Counts what `config` asks for. Reads at most two small JSON files of the model's folder, never weights."""
    algorithm, prompts = config.algorithm.build().seeded(config.seed), config.data.prompts_per_iteration
    total, first, most = Cost(0, 0, 0), Cost(0, 0, 0), 0
    means = algorithm.draws is None and algorithm.edge_objective.keeps_mean
    for iteration in range(config.iterations):
        here, nodes = Cost(0, 0, 0), 0
        for slot in range(prompts):
            plan = algorithm.plan(iteration, slot)
            kept = _edge_states(plan, means) if algorithm.draws is None else len(plan.scored)
            here, nodes = here + algorithm.cost_of(plan), nodes + kept
        first = here if iteration == 0 else first
        total, most = total + here, max(most, nodes)
    shape = latent_shape(config)
    evaluation = config.evaluation
    return RunCost(
        iterations=config.iterations,
        first=first,
        total=total,
        rewards=len(config.rewards),
        latent=0 if algorithm.judge is None else total.trained_edges,
        others=tuple(name for name in algorithm.objective.weight_sets if name != "policy"),
        guided=config.model.guidance != 1,
        stored_nodes=most,
        state_bytes=None if shape is None else STATE_BYTES * math.prod(shape),
        validation=evaluation.validation_prompts * evaluation.steps,
        test=evaluation.test_prompts * evaluation.steps,
    )


@lru_cache(maxsize=512)
def _edge_states(plan: Plan, means: bool) -> int:
    """States that stay once the leaves are scored: both ends of stochastic edges, and the means they were drawn from
    where these are kept."""
    noisy = [e for e, stochastic in enumerate(plan.stochastic) if stochastic]
    return len({plan.parent[e] for e in noisy} | {plan.roots + e for e in noisy}) + means * len(noisy)


def latent_shape(config: Config) -> tuple[int, int, int] | None:
    """(channels, height, width) of a latent by the folder's JSON files; None where there are none.

    Raises ValueError for a file that does not say what it should.
    """
    height, width = config.size
    if config.model.path == "shapes":
        return (8, height // 4, width // 4)
    folder = Path(config.model.path)
    transformer, vae = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    if not (transformer.is_file() and vae.is_file()):
        return None
    channels = _read(transformer, "in_channels")
    scale = 2 ** (len(_read(vae, "block_out_channels")) - 1)
    return (channels, height // scale, width // scale)


def _read(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path: {path} does not say {key!r}; is the folder whole?") from error
