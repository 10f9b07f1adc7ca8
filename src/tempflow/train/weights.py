"""The parameters that roles train, the weight sets beside them (old, average, reference), and the copy that drafts.

A set holds copies of the trainable parameters alone (a LoRA's, where a LoRA is trained) and computes through the same
network by `torch.func.functional_call`: nothing is switched, so nothing can be left switched, and the policy's
parameters keep requiring gradients while a set never gets any. A sharded network gathers its own parameters alone, so
there the set's and the policy's parts change places around a forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.lesson import POLICY, Role
from tempflow.core.draft import Precision
from tempflow.core.ema import Rule
from tempflow.models.precision import CheapCopy, cheap_copy
from tempflow.models.protocol import Model

FIRST_SCALE, LARGEST_SCALE, GROWS = 2.0**16, 2.0**24, 2000
"""Of float16's losses."""


class Trainable:
    """The parameters of `network` that require gradients, with float32 masters that the optimizer moves.

    In float32 the masters are the parameters themselves. In bfloat16 the network computes with rounded copies:
    gradients are added up in float32 (`collect`) and the moved masters are rounded back (`publish`). In float16 losses
    are multiplied by `loss_scale` before their backward, or small gradients would be rounded to 0.

    Raises ValueError when nothing is trainable.
    """

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        """`state`: what `state` gave, to begin with."""
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: no parameter requires gradients; choose full training or add a LoRA")
        self.network = network
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.split = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters: list[nn.Parameter] = (
            [nn.Parameter(p.detach().float().clone()) for p in self.parameters] if self.split else self.parameters
        )

        half = any(p.dtype == torch.float16 for p in self.parameters)
        self.loss_scale, self.finite_steps = FIRST_SCALE if half else 1.0, 0
        if state:
            self.load(state)

    def collect(self) -> None:
        """Adds the network's fresh gradients to the masters', without the loss's scale. To be called after each
        backward."""
        if not self.split:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            fresh = parameter.grad.float() / self.loss_scale
            master.grad = fresh if master.grad is None else master.grad.add_(fresh)
            parameter.grad = None

    def rescale(self, finite: bool) -> bool:
        """After a step's gradients: where they are not `finite`, half the loss's scale, and whether that was above 1,
        so that the scale may have been why. After `GROWS` finite steps in a row it is doubled (as torch.amp's)."""
        if self.loss_scale <= 1:
            return False
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.finite_steps % GROWS == 0:
            self.loss_scale = min(2 * self.loss_scale, LARGEST_SCALE)
        return not finite

    def zero_grad(self) -> None:
        for p in (*self.parameters, *self.masters):
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the network."""
        if self.split:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def named(self) -> dict[str, Tensor]:
        """The float32 masters themselves by parameter name."""
        return {n: m.detach() for n, m in zip(self.names, self.masters, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by parameter name."""
        return {n: m.detach().clone() for n, m in zip(self.names, self.masters, strict=True)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave. Raises ValueError naming a parameter that is missing or of another shape."""
        check_names(self, state)
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(laid_out(state[name], master))
        self.publish()


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the layout of `like`: this rank's part of it where that is sharded."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        local = tensor.to(like.device)  # every rank has read the whole: nothing is sent
        return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_names(trainable: Trainable, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError when `state` lacks a trainable parameter or has one of another shape."""
    for name, master in zip(trainable.names, trainable.masters, strict=True):
        if name not in state:
            raise ValueError(f"weights: {name!r} is missing; they are of another model or another kind of training")
        if state[name].shape != master.shape:
            raise ValueError(f"weights: {name!r} is {list(state[name].shape)}; the model has {list(master.shape)}")


Exchange = Callable[[], AbstractContextManager[None]]
"""What a forward runs in."""


class WeightSet:
    """Float32 copies of the policy's trainable parameters that follow it by a rule and never get gradients."""

    def __init__(self, trainable: Trainable, rule: Rule, values: Mapping[str, Tensor] | None = None) -> None:
        self.trainable, self.rule, self.updates = trainable, rule, 0
        start = trainable.named() if values is None else values
        check_names(trainable, start)
        self.values = [
            laid_out(start[n].detach().to(m.device, torch.float32), m).clone()
            for n, m in zip(trainable.names, trainable.masters, strict=True)
        ]
        self._rounded: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Follows the policy as it is now."""
        self.updates += 1
        decay = self.rule.decay(self.updates)
        if decay >= 1:
            return
        for value, master in zip(self.values, self.trainable.masters, strict=True):
            value.lerp_(master, 1 - decay)
        self._rounded = None

    def named(self) -> dict[str, Tensor]:
        """The values themselves by parameter name; `updates` is kept apart."""
        return dict(zip(self.trainable.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Puts back what `named` gave."""
        check_names(self.trainable, state)
        for name, value in zip(self.trainable.names, self.values, strict=True):
            value.copy_(laid_out(state[name], value))
        self.updates, self._rounded = updates, None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network itself holds this set: for saving it, and where a view cannot stand in."""
        kept = self.trainable.state()
        self.trainable.load(dict(zip(self.trainable.names, self.values, strict=True)))
        try:
            yield
        finally:
            self.trainable.load(kept)

    def network(self, turn_of: Callable[[Exchange], Exchange] | None = None) -> nn.Module:
        """The network as this set computes it, without gradients to the set; follows later updates.

        turn_of: a sharded network's `Shards.turn_of`
        """
        return _View(self) if turn_of is None else _Exchanged(self, turn_of(self.exchanged))

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, the parts of the network's sharded parameters and this set's have changed places, in their memory.

        No graph has saved these: a backward gathers them anew. A parameter that is held whole is left alone."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self.trainable.parameters, self.rounded().values(), strict=True):
            if isinstance(parameter, DTensor):
                a, b = part(parameter), part(value)
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def rounded(self) -> dict[str, Tensor]:
        """The values in the dtypes that the network computes in."""
        if self._rounded is None:
            named = zip(self.trainable.names, self.values, self.trainable.parameters, strict=True)
            self._rounded = {n: v.to(p.dtype) for n, v, p in named}
        return self._rounded


class _OfSet(nn.Module):
    def __init__(self, weights: WeightSet) -> None:
        super().__init__()
        self.weights = (weights,)  # in a tuple: the network is not this module's own


class _View(_OfSet):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (weights,) = self.weights
        return functional_call(weights.trainable.network, weights.rounded(), args, kwargs)


class _Exchanged(_OfSet):
    def __init__(self, weights: WeightSet, turn: Exchange) -> None:
        super().__init__(weights)
        self.turn = turn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (weights,) = self.weights
        held = {name: value for name, value in weights.rounded().items() if not isinstance(value, DTensor)}
        with self.turn(), torch.no_grad():  # as a view's: none of its tensors needs a gradient
            return functional_call(weights.trainable.network, held, args, kwargs)


def own_copy(network: nn.Module) -> nn.Module:
    """A network of the same structure whose trained parameters are its own, and start as they are; the rest it shares
    with the first. So where a LoRA is trained, this is a second LoRA on one base."""
    shared: list[Tensor] = [p for p in network.parameters() if not p.requires_grad]
    shared += list(network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def holds_policy(network: nn.Module, trainable: Trainable) -> bool:
    """Whether that weight set's network computes with the very numbers that the policy has now; of a sharded one, with
    those of this rank."""
    if not isinstance(network, _OfSet):
        return False  # a network of its own
    (weights,) = network.weights
    rounded = weights.rounded()
    named = zip(trainable.names, trainable.parameters, strict=True)
    return all(torch.equal(part(p.detach()), part(rounded[n])) for n, p in named)


@dataclass(frozen=True)
class WeightSets:
    """Those that follow one role, by name; a checkpoint keeps them in the role's folder."""

    sets: Mapping[str, WeightSet] = field(default_factory=dict[str, WeightSet])
    role: str = POLICY

    @staticmethod
    def of(algorithm: Algorithm, trainable: Trainable) -> WeightSets:
        """Those of the policy that the algorithm asks for, holding it as it is now."""
        rules = {name: algorithm.rule(name) for name in algorithm.sets}
        return WeightSets({name: WeightSet(trainable, rule) for name, rule in rules.items() if rule.moves})

    @staticmethod
    def of_role(role: Role, trainable: Trainable) -> WeightSets:
        """Those of another role."""
        return WeightSets({name: WeightSet(trainable, rule) for name, rule in role.weight_sets.items()}, role.name)

    def update(self) -> None:
        """After an iteration's updates."""
        for weights in self.sets.values():
            weights.update()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """A checkpoint's tensors by file: the sets' own, no copies."""
        return {self._file(name): weights.named() for name, weights in self.sets.items()}

    def updates(self) -> dict[str, int]:
        """How often each has followed, for the checkpoint's JSON."""
        return {name: weights.updates for name, weights in self.sets.items()}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: Mapping[str, int]) -> None:
        """Puts back what `tensors` and `updates` gave."""
        for name, weights in self.sets.items():
            weights.load(tensors[self._file(name)], updates[name])

    def _file(self, name: str) -> str:
        return f"{self.role}/set.{name}"


Snapshot = tuple[list[Tensor], list[dict[str, Any]], tuple[list[Tensor], int] | None]
"""Masters, their optimizer's state, the average: copies."""


@dataclass(frozen=True, eq=False)
class Learner:
    """A role's parameters with their optimizer, the weight sets that follow it and, of the policy, its average."""

    trainable: Trainable
    optimizer: torch.optim.Optimizer
    sets: WeightSets = field(default_factory=WeightSets)
    average: WeightSet | None = None

    def networks(self, role: str) -> dict[str, nn.Module]:
        """What others are given of it by name: its network, by its own, and its weight sets'."""
        return {role: self.trainable.network} | {name: w.network() for name, w in self.sets.sets.items()}

    def step(self) -> None:
        """The optimizer's, from the gradients in the masters."""
        self.optimizer.step()
        self.trainable.publish()
        if self.average is not None:
            self.average.update()

    def snapshot(self) -> Snapshot:
        """Copies of all that `step` changes."""
        state = [
            {key: v.clone() if isinstance(v, Tensor) else v for key, v in self.optimizer.state.get(m, {}).items()}
            for m in self.trainable.masters
        ]
        average = None if self.average is None else ([v.clone() for v in self.average.values], self.average.updates)
        return [m.detach().clone() for m in self.trainable.masters], state, average

    @torch.no_grad()
    def restore(self, kept: Snapshot) -> None:
        """Puts a snapshot back, and drops the gradients."""
        masters, state, average = kept
        for master, value, moments in zip(self.trainable.masters, masters, state, strict=True):
            master.copy_(value)
            self.optimizer.state.pop(master, None)
            if moments:
                self.optimizer.state[master] = moments
        if self.average is not None and average is not None:
            self.average.load(dict(zip(self.trainable.names, average[0], strict=True)), average[1])
        self.trainable.zero_grad()
        self.trainable.publish()


@dataclass(frozen=True, eq=False)
class Drafter:
    """The sampler's network drafts too."""

    precision: Precision

    @staticmethod
    def of(algorithm: Algorithm, model: Model, trainable: Trainable, sets: Mapping[str, WeightSet]) -> Drafter:
        """What the algorithm's drafts are drawn with.

        sets: by name, the sampler's among them unless that is the policy. Raises ValueError for a device without that
        precision or a network that has no use for it; ImportError where torchao is missing.
        """
        if algorithm.draft_precision == "full":
            return Drafter("full")
        source = trainable if algorithm.sampler == "policy" else sets[algorithm.sampler]
        copy = cheap_copy(model.network, model.blocks(model.network), algorithm.draft_precision)
        return CopyDrafter(algorithm.draft_precision, copy, model.network, source)

    def fresh(self, sampler: nn.Module | None) -> nn.Module | None:
        """The network that drafts, as it is now, where `sampler` (None: the policy's) rolls out."""
        return sampler


@dataclass(frozen=True, eq=False)
class CopyDrafter(Drafter):
    """`copy` holds the weights that `source` had when `fresh` was last called; nothing of it is trained or kept.

    network: the policy's, whose untrained weights the copy shares in value.
    """

    copy: CheapCopy
    network: nn.Module
    source: Trainable | WeightSet

    def fresh(self, sampler: nn.Module | None) -> nn.Module | None:
        """The copy, with the source's weights as they are now."""
        self.copy.refresh(self.network, self.source.named())
        return self.copy
