"""Data parallel on torch's own engine, under `torchrun`: ranks exchange tensors only; and sharding by block (FSDP2).

A rank takes a contiguous block of the iteration's prompt slots. Noise, windows and the order of edges are functions of
the run's seed and the slot, so they do not depend on how many ranks there are. Each rank knows all plans, hence the
shape of the whole forest; what it must be told is the other ranks' scores. Then every rank computes the same advantages
for all edges, and trains on its own.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

BUCKET = 1 << 24
"""Numbers sent at a time: 64 MiB of float32."""


def buckets(sizes: Sequence[int], most: int) -> list[range]:
    """Runs of neighbours that add up to `most` at most; a larger one is alone."""
    cuts, held = [0], 0
    for place, size in enumerate(sizes):
        if place > cuts[-1] and held + size > most:
            cuts, held = [*cuts, place], 0
        held += size
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True) if a < b]


@dataclass(frozen=True)
class World:
    """The ranks of a run; a single process is `World()` and communicates nothing."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def block(self, count: int, rank: int | None = None) -> range:
        """Which of `count` rows are this rank's (or another's): blocks in rank order whose sizes differ by one at
        most."""
        r = self.rank if rank is None else rank
        return range(count * r // self.size, count * (r + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up the ranks' tensors in place, in float32 or better: all ranks give the same shapes in the same order.

        They are sent in buckets of that order, one at a time, so that no more than BUCKET numbers are copied at once;
        a larger tensor is a bucket by itself. All ranks end with the same bits.
        """
        if self.size == 1:
            return
        for bucket in buckets([t.numel() for t in tensors], BUCKET):
            held = [tensors[i] for i in bucket]
            flat = torch.cat([t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in held])
            dist.all_reduce(flat)
            for tensor, part in zip(held, flat.split([t.numel() for t in held]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The ranks' rows behind each other, on the CPU; `counts` says how many each has."""
        if self.size == 1 or not any(counts):
            return rows
        if rows.shape[0] != counts[self.rank]:
            raise ValueError(f"rows: {rows.shape[0]} on rank {self.rank}; nearest valid: {counts[self.rank]}")
        plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=plain.dtype, device=self.device)
        padded[: rows.shape[0]] = plain
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]).to(rows.dtype).cpu()

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return self.most(int(flag)) > 0

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        seen = torch.tensor([number], device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return int(seen.item())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


SINGLE = World()
"""One process."""


def join(device: str) -> World:
    """The world that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK); `World()` without one.

    `device`: "cpu" takes the gloo backend, "cuda" the rank's own GPU and nccl. Raises ValueError for a device of which
    a rank cannot have its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=device)
    rank = int(os.environ["RANK"])
    if device.startswith("cuda"):
        local = int(os.environ["LOCAL_RANK"])
        if device != "cuda":
            raise ValueError(f"device: {device!r} is one GPU for {size} ranks; nearest valid: 'cuda'")
        if local >= torch.cuda.device_count():
            raise ValueError(f"device: rank {rank} wants GPU {local} of {torch.cuda.device_count()}; start fewer")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif device != "cpu":
        raise ValueError(f"device: {device!r} has no backend for {size} ranks; nearest valid: 'cpu'")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(rank, size, device)


def leave(world: World) -> None:
    """Takes the process out of its group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """`join`, and `leave` afterwards; within another one the process stays in the group."""
    already = dist.is_initialized()
    world = join(device)
    try:
        yield world
    finally:
        if not already:
            leave(world)


Exchange = Callable[[], AbstractContextManager[None]]
"""What a forward runs in."""

POLICY = 1
"""Its number among the weight sets that ranks tell each other."""


class Shards:
    """A network of which each rank holds a part, of its gradients too. A block is gathered to compute and freed behind
    it; its gradients are added up over the ranks, in float32, as soon as they are there.

    A gather is an exchange, so all ranks run forwards and backwards in the same order and number. `train.update` gives
    all ranks the same number of minibatches. Of forwards without a backward ranks may have different numbers, inside
    `in_step`.

    blocks  the network's repeated layers: what is gathered at a time, with the next one on its way. What lies outside
            of all blocks is gathered together

    Held whole on every rank, as `ddp` does, are numbers without a dimension, and trained parameters of another dtype
    than most (norms that a family keeps in float32): FSDP2 reduces gradients of one dtype.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
        self.network, self.world = network, world
        self._order, self._known, self._announces = list[FSDPModule](), False, False
        self._exchanges, self._turn = list[Exchange](), 0
        network.cpu()  # sharding moves a block at a time to the ranks' device
        self._whole = copy.deepcopy(network).requires_grad_(False).eval() if world.first else None
        units = _share_out(network, blocks, world)
        network.register_forward_pre_hook(self._begin, prepend=True)  # in front of the network's own gather
        network.register_forward_hook(self._end)
        for unit in units:
            unit.register_forward_pre_hook(self._note)

    def whole_with(self, weights: Mapping[str, Tensor]) -> nn.Module | None:
        """The network in one piece, on the CPU of the first rank, with these parameters: for being saved."""
        if self._whole is not None:
            self._whole.load_state_dict(dict(weights), strict=False)
        return self._whole

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around forwards without a backward. A rank that is through gathers blocks with the others until all are.

        Every forward is announced: before it a rank sends the number of its weight set, the policy being 1, and 0 when
        it has no more. Whoever sent 0 learns by the largest number whether another has one, and of which set to give
        its part.
        """
        self._announces = True
        try:
            yield
        finally:
            self._announces = False
        while (number := self.world.most(0)) > 0:
            with nullcontext() if number == POLICY else self._exchanges[number - POLICY - 1]():
                for unit in self._order:
                    unit.unshard()
                    unit.reshard()

    def turn_of(self, exchange: Exchange) -> Exchange:
        """What a forward of another weight set runs in: `exchange`, which puts its values in the policy's place, made
        known to the other ranks. All ranks ask for their sets in one order."""
        self._exchanges.append(exchange)
        number = len(self._exchanges)

        @contextmanager
        def turn() -> Iterator[None]:
            self._turn = number
            try:
                with exchange():
                    yield
            finally:
                self._turn = 0

        return turn

    def _begin(self, module: nn.Module, given: Any) -> None:
        if not self._known:
            self._order.clear()
        if self._announces:
            told = torch.tensor([POLICY + self._turn], device=self.world.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)  # this rank need not wait for the answer

    def _note(self, unit: FSDPModule, given: Any) -> None:
        if not self._known:
            self._order.append(unit)

    def _end(self, module: nn.Module, given: Any, out: Any) -> None:
        self._known = True


def _share_out(network: nn.Module, blocks: Sequence[nn.Module], world: World) -> list[Any]:
    """Makes each of `blocks` and the rest of `network` a unit of FSDP2; returns the units."""
    device = torch.device(world.device)
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)  # computes in its own dtypes
    trained = Counter({p.dtype: 0 for p in network.parameters()})
    for p in network.parameters():
        trained[p.dtype] += p.numel() * p.requires_grad
    usual = trained.most_common(1)[0][0]
    held = {p for p in network.parameters() if p.dim() == 0 or (p.requires_grad and p.dtype != usual)}
    for p in held:
        p.data = p.data.to(device)
    units: list[Any] = [*blocks, network]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=held)
    for unit, before in zip(units, (None, *units), strict=False):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot scale within a sum
        if hasattr(unit, "set_reduce_scatter_unused_params"):  # of torch 2.13: ranks may use different parameters
            unit.set_reduce_scatter_unused_params(True)
        # What is gathered ahead in a backward must not hang on how many forwards there were.
        unit.set_modules_to_backward_prefetch([network if before is None else before])
    return units
