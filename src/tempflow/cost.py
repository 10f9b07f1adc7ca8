"""What a run costs, before it starts: counted from its plans, never estimated, except where it says "at most"; and the
memory that a rank takes, estimated."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tempflow.config import Config
from tempflow.core.cost import equivalents
from tempflow.core.plan import Cost, Plan
from tempflow.models import DTYPES, adapter_of, place, resolved_device, resolved_dtype
from tempflow.models.family import check_size
from tempflow.models.pipeline_folder import settings_in
from tempflow.models.tools import Tools

if TYPE_CHECKING:
    from tempflow.models.memory import Footprint

STATE_BYTES, TOKEN_BYTES = 4, 8
"""States are stored in float32, tokens in int64."""


@dataclass(frozen=True)
class PhaseCost:
    """What a phase trains, forwards without gradient beside that (`others` names their networks), those of networks
    with a guidance of their own, and samples that its loss has decoded and scored: of the first iteration and of the
    run, at most."""

    role: str
    others: str
    trained: tuple[int, int]
    beside: tuple[int, int]
    guided: str = ""
    alone: tuple[int, int] = (0, 0)
    scored: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RunCost:
    """Counts for the first iteration and for the whole run.

    first, total        rows given to the network in rollouts, pictures decoded and scored, edges trained. A group whose
                        scores are all equal is not trained, so the trained edges (and their forwards) are upper bounds
    rewards             rewards per picture
    latent              rows through a latent reward, which scores the trained edges
    phases              what each phase trains, and asks of other networks
    old                 forwards of the first iteration and of the run that give old log-probs and nothing else, at most
    guided              whether guidance doubles the rows of every forward
    stored_nodes        most states that an iteration keeps for training
    state_bytes         bytes of one state; None where the model's folder is not here to say
    validation, test    forwards of one validation, and of one test (there is one before and one after)
    looked_at           pictures of all validations and tests, a yardstick's included
    looked_rows         rows of the network for them; guidance doubles these
    """

    iterations: int
    first: Cost
    total: Cost
    rewards: int
    latent: int
    phases: tuple[PhaseCost, ...]
    old: tuple[int, int]
    guided: bool
    stored_nodes: int
    state_bytes: int | None
    validation: int
    test: int
    looked_at: int
    looked_rows: int

    @property
    def forwards(self) -> int:
        """Rollout, training and other sets' forwards of the run at most, guidance not doubled; evaluation is apart."""
        return self._plain + self.total.trained_edges + self.alone

    @property
    def beside(self) -> int:
        """Of these, forwards without gradient in updates, but for old log-probs and those that stand alone."""
        return sum(phase.beside[1] for phase in self.phases)

    @property
    def alone(self) -> int:
        """Rows of networks with a guidance of their own; the negative prompts' are counted."""
        return sum(phase.alone[1] for phase in self.phases)

    @property
    def _plain(self) -> int:
        return self.total.forwards + self.beside + self.old[1]

    @property
    def equivalents(self) -> int:
        """The run's compute at most, in forward-equivalents (`core.cost.equivalents`); evaluation is apart."""
        trained, guided = self.total.trained_edges, self.guided
        return equivalents(self._plain, trained, guided=guided, latent=self.latent, alone=self.alone)

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
        ]
        for phase in self.phases:
            of = f"{phase.role}: " if len({phase.role for phase in self.phases}) > 1 else ""
            rows.append((f"{of}training forwards + backwards, at most", *phase.trained))
            if any(phase.beside):
                rows.append((f"{of}{phase.others} forwards, at most", *phase.beside))
            if any(phase.alone):
                rows.append((f"{of}{phase.guided} forwards by a guidance of its own, at most", *phase.alone))
            if any(phase.scored):
                rows.append((f"{of}samples decoded and scored, at most", *phase.scored))
        if any(self.old):
            rows.append(("forwards for old log-probs, at most", *self.old))
        for label, one, run in rows:
            table.add_row(label, f"{one:,}", f"{run:,}")
        table.add_section()
        table.add_row("all forwards but evaluation, at most", "", f"{self.forwards:,}")
        table.add_row("the same in forward-equivalents (with gradient: 3)", "", f"{self.equivalents:,}")
        table.add_row("forwards of a validation | of the test, twice", f"{self.validation:,}", f"{2 * self.test:,}")
        table.add_row("states kept for training, at most | their memory", f"{self.stored_nodes:,}", self._memory())
        if self.guided:
            table.caption = "guidance: every forward is of two rows (the negative prompt's row has no backward)"
        return table

    def _memory(self) -> str:
        if self.state_bytes is None:
            return "? (the model's folder is not here)"
        return _bytes(self.stored_nodes * self.state_bytes)


def stages_table(names: Sequence[str], costs: Sequence[RunCost]) -> Table:
    """What each of several runs takes, one after the other, and all together."""
    table = Table(title="all stages")
    for column in ("", "iterations", "decodes", "reward calls", "forwards, at most", "forward-equivalents"):
        table.add_column(column, justify="right" if column else "left")
    rows = [(c.iterations, c.total.leaves, c.total.leaves * c.rewards, c.forwards, c.equivalents) for c in costs]
    for name, row in zip(names, rows, strict=True):
        table.add_row(name, *(f"{value:,}" for value in row))
    table.add_section()
    table.add_row("together", *(f"{sum(column):,}" for column in zip(*rows, strict=True)))
    return table


def run_cost(config: Config) -> RunCost:
    """Counts what `config` asks for. Reads at most two small JSON files of the model's folder, never weights."""
    algorithm, prompts = config.algorithm.build().seeded(config.seed), config.data.prompts_per_iteration
    total, first, most = Cost(0, 0, 0), Cost(0, 0, 0), 0
    old = (0, 0)
    parts = [[Cost(0, 0, 0), Cost(0, 0, 0)] for _ in algorithm.phases]
    for iteration in range(config.iterations):
        here, nodes, trained = Cost(0, 0, 0), 0, [Cost(0, 0, 0) for _ in algorithm.phases]
        for plan in (algorithm.plan_of(iteration, slot) for slot in range(prompts)):
            here, nodes = here + algorithm.cost_of(plan), nodes + _kept_states(plan, algorithm.keeps)
            trained = [t + algorithm.taught_cost(p, plan) for t, p in zip(trained, algorithm.phases, strict=True)]
        again = algorithm.old_forwards(here.trained_edges, config.optimizer.updates_per_iteration)
        parts = [[t if iteration == 0 else p[0], p[1] + t] for t, p in zip(trained, parts, strict=True)]
        first, old = here if iteration == 0 else first, (again if iteration == 0 else old[0], old[1] + again)
        total, most = total + here, max(most, nodes + ("old means" in algorithm.keeps) * again)
    evaluation = config.evaluation
    return RunCost(
        iterations=config.iterations,
        first=first,
        total=total,
        rewards=len(config.rewards),
        latent=total.trained_edges * len(algorithm.latent_rewards),
        phases=tuple(
            PhaseCost(
                role=phase.role,
                others=", ".join(name for name in phase.networks if name not in (phase.role, *phase.guidance)),
                trained=(one.trained_edges, run.trained_edges),
                beside=(one.forwards, run.forwards),
                guided=", ".join(phase.guidance),
                alone=(one.alone, run.alone),
                scored=(one.leaves, run.leaves),
            )
            for phase, (one, run) in zip(algorithm.phases, parts, strict=True)
        ),
        old=old,
        guided=config.model.guidance != 1,
        stored_nodes=most,
        state_bytes=state_bytes(config),
        validation=evaluation.validation_prompts * evaluation.steps,
        test=evaluation.test_prompts * evaluation.steps,
        looked_at=sum(pictures for pictures, _ in _looks(config)),
        looked_rows=sum(pictures * evaluation.steps * (1 + (g != 1)) for pictures, g in _looks(config)),
    )


def _looks(config: Config) -> list[tuple[int, float]]:
    """Pictures and guidance of everything that is looked at: validations and the test before, between and after, and
    what the untrained model shows by each guidance of a yardstick."""
    evaluation = config.evaluation
    between = (config.iterations - 1) // evaluation.every if evaluation.every else 0
    looks = [(evaluation.validation_prompts, evaluation.guidance)] * (2 + between)
    looks += [(evaluation.test_prompts, evaluation.guidance)] * 2
    looks += [(evaluation.validation_prompts, guidance) for guidance in evaluation.yardstick]
    return looks + [(evaluation.test_prompts, guidance) for guidance in evaluation.yardstick[-1:]]


def _kept_states(plan: Plan | None, keeps: Collection[str]) -> int:
    """States of a plan's forest that stay for training once its leaves are scored."""
    if plan is None:
        return 0
    edges = _edge_states(plan, "means" in keeps) if "edges" in keeps else 0
    return edges + (len(plan.scored) if "leaves" in keeps else 0)


@lru_cache(maxsize=512)
def _edge_states(plan: Plan, means: bool) -> int:
    """States that stay once the leaves are scored: both ends of stochastic edges, and the means they were drawn from
    where the loss reads another edge's."""
    noisy = [e for e, stochastic in enumerate(plan.stochastic) if stochastic]
    return len({plan.parent[e] for e in noisy} | {plan.roots + e for e in noisy}) + means * len(noisy)


def _folder(config: Config) -> Path | None:
    """The model's, where it is on this machine."""
    folder = place(config.model.path)
    return folder if (folder / "model_index.json").is_file() else None


def latent_shape(config: Config) -> tuple[int, ...] | None:
    """Shape of a latent by the folder's JSON files; None where it is not on this machine, or its family doesn't say.

    Raises ValueError for a file that does not say what it should, or a size that cannot be drawn.
    """
    folder = _folder(config)
    if folder is None:
        return None
    family = adapter_of(config.model.path, folder).family
    with config.naming("model"):
        check_size(config.size, family.makes, config.model.path)
        return family.latent_shape(partial(settings_in, folder), config.size)


def state_bytes(config: Config) -> int | None:
    """Of one stored state; None and errors as for `latent_shape`."""
    folder, shape = _folder(config), latent_shape(config)
    if folder is None or shape is None:
        return None
    return (TOKEN_BYTES if adapter_of(config.model.path, folder).family.tokens else STATE_BYTES) * math.prod(shape)


def check_states(config: Config) -> None:
    """Raises ValueError where the model's folder is here, and its states are of another kind than its algorithm's."""
    folder = _folder(config)
    if folder is not None:
        with config.naming("algorithm"):
            tokens = adapter_of(config.model.path, folder).family.tokens
            config.algorithm.build().check_states(tokens, config.model.path)


# --------------------------------------------------------------------------------------------------------------- memory
MASTER = 4
"""Bytes of a trained number's master, of its gradient, of each of AdamW's two moments, and in each weight set."""

DRAFT_BITS = {"bfloat16": 16, "int8": 8, "float8": 8, "nvfp4": 4.5}


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one of `ranks`.

    held    what lies there throughout, by name
    phases  what each phase of an iteration takes beside it, at its peak
    saved   of training: what a minibatch keeps for its backward
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]
    saved: int
    ranks: int = 1

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(self.phases.values())

    def table(self) -> Table:
        """The parts, for a terminal."""
        table = Table(title=f"memory of a rank{f' of {self.ranks}' if self.ranks > 1 else ''}, estimated")
        table.add_column("")
        table.add_column("bytes", justify="right")
        for name, size in self.held.items():
            if size:
                table.add_row(name, _bytes(size))
        table.add_section()
        for name, size in self.phases.items():
            table.add_row(f"while {name}", _bytes(size))
        table.add_row("of training's: kept for the backward", _bytes(self.saved))
        table.add_section()
        table.add_row(f"peak, while {max(self.phases, key=lambda name: self.phases[name])}", _bytes(self.peak))
        table.caption = "rewards, kernels' workspaces and what the allocator keeps come on top"
        return table


def memory_of(config: Config, cost: RunCost, ranks: int = 1) -> Memory | str:
    """Counted from the configurations in the model's folder (`models.memory`), without its weights; or why not.

    ranks: that share the run; each has its share of the prompts, and under `fsdp` of the weights

    Raises ValueError, naming the field, for a LoRA target, size or guidance that the model does not have.
    """
    folder, m = _folder(config), config.model
    if folder is None:
        return "the model's folder is not here"
    try:
        from tempflow.models.diffusers_model import DiffusersModel
        from tempflow.models.memory import Asked, Lora, footprint
    except ImportError as error:
        return f"{error.name} is not installed"
    adapter = adapter_of(m.path, folder)
    if not issubclass(adapter, DiffusersModel):
        return "its adapter is of another kind than those of diffusers' pipelines"
    if adapter.family.own:
        return "no library has its networks, and memory is counted of libraries' classes"
    device = config.device if config.device != "auto" else resolved_device("auto")
    dtype = (
        m.dtype if m.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else resolved_dtype("auto", device))
    )
    asked = Asked(
        size=config.size,
        guidance=m.guidance,
        guidance_options=m.guidance_options,
        dtype=DTYPES[dtype],
        device=device,
        tools=Tools(checkpointing=m.checkpointing, vae_tiling=m.vae_tiling, quantise=m.quantise),
        lora=Lora(m.lora_rank, m.lora_targets) if m.training == "lora" else None,
        sampled=config.rollout_rows,
        trained=config.train_rows,
        leaves=config.rollout_leaves,
        others=cost.beside + cost.alone > 0,
    )
    with config.naming("model"):
        try:
            found = footprint(adapter, folder, m.path, asked)
        except ImportError as error:
            return f"{error.name} is not installed"
    if found is None:
        return "the model's family does not say what a text's tensors are"
    away = m.offload and not device.startswith("cpu")
    waiting = {"text encoders": found.encoders * (not m.drop_encoders), "autoencoder": found.vae}
    shared = ranks if config.parallel.mode == "fsdp" else 1
    held = {
        "network": -(-found.network // shared),
        **(_gathered(found, asked.dtype.itemsize) if shared > 1 else {}),
        **({} if away else waiting),
        **beside(config, cost, found.trainable, asked.dtype.itemsize if found.split else 0, ranks),
        "low-precision copy that drafts": round(found.network / asked.dtype.itemsize * _draft_bits(config) / 8),
    }
    phases = {
        "sampling": found.sampling,
        "decoding": found.decoding + found.vae * away,
        # whole gradients in the network's dtype, which a sharded one has of a block at a time
        "training": found.training - (found.trainable * asked.dtype.itemsize if found.split and shared > 1 else 0),
    }
    if away or m.drop_encoders:
        phases = {"encoding prompts": found.encoders, **phases}
    return Memory(held, phases, found.saved, ranks)


def _gathered(found: Footprint, itemsize: int) -> dict[str, int]:
    """What a rank of a sharded network has whole: the block that computes, the next one and what lies outside of all;
    and a block's gradients until they are added up in float32, the next block's beside them."""
    return {
        "blocks, gathered": found.outside + 2 * found.block,
        "a block's gradients, gathered": found.taught * (itemsize + 2 * MASTER),
    }


def beside(config: Config, cost: RunCost, trained: int, half: int, ranks: int = 1) -> dict[str, int]:
    """Bytes that training holds beside the network's own weights on one of `ranks`, by name.

    trained: numbers; half: bytes of each in the network where that is less than float32, else 0
    """
    algorithm = config.algorithm.build()
    roles, sets = len(algorithm.roles), len(algorithm.sets) + sum(len(role.weight_sets) for role in algorithm.roles)
    own = -(-trained // (ranks if config.parallel.mode == "fsdp" else 1))
    return {
        "float32 masters": MASTER * own * (half > 0),
        "gradients": MASTER * own,
        "AdamW's moments": 2 * MASTER * own,
        "average weights": MASTER * own * (config.optimizer.ema_decay > 0),
        "other weight sets": sets * own * (MASTER + half),
        "other roles, with gradients and moments": roles * own * (4 * MASTER + half),
        "roles as the iteration found them": (1 + roles) * own * 3 * MASTER * algorithm.taken_back,
        "states kept for training": -(-cost.stored_nodes // ranks) * (cost.state_bytes or 0),
    }


def _draft_bits(config: Config) -> float:
    return DRAFT_BITS.get(config.algorithm.build().draft_precision, 0)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
