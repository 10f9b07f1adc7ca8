"""Data parallel on torch's own engine, under `torchrun`: ranks exchange tensors only; and sharding by FSDP2.

A rank takes a contiguous block of the iteration's prompt slots. Noise, windows and the order of edges are functions of
the run's seed and the slot, so they do not depend on how many ranks there are. Each rank knows all plans, hence the
shape of the whole forest; what it must be told is the other ranks' scores. Then every rank computes the same advantages
for all edges, and trains on its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        if self.size == 1:
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
        if self.size == 1:
            return flag
        seen = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

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


@dataclass(frozen=True, eq=False)
class Shards:
    """The switches of sharded networks, the policy's first. `whole`: on the first rank, a copy in one piece. `dtype`:
    what their float32 parameters compute in.

    Ranks run different numbers of forwards, so none of these may communicate: parameters are gathered once for a phase
    and gradients are scattered once, in an update's last backward.
    """

    networks: tuple[nn.Module, ...]
    whole: nn.Module | None
    dtype: torch.dtype = torch.float32

    def whole_with(self, weights: Mapping[str, Tensor]) -> nn.Module | None:
        """The network in one piece, on the CPU of the first rank, with these parameters: for being saved."""
        if self.whole is not None:
            self.whole.load_state_dict(dict(weights), strict=False)
        return self.whole

    def gather(self) -> None:
        """Every rank holds all parameters, until an update's last backward or `scatter`."""
        for network in self.networks:
            for module in _sharded(network):
                module.unshard()

    def scatter(self) -> None:
        """Back to a part each."""
        for network in self.networks:
            for module in _sharded(network):
                module.reshard()

    def before_backward(self, last: bool) -> None:
        """An update's last backward adds up and scatters gradients, and frees what `gather` took."""
        for network in self.networks:
            for module in _sharded(network):
                module.set_requires_gradient_sync(last, recurse=False)
                module.set_reshard_after_backward(last, recurse=False)


def shard(network: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype, world: World) -> nn.Module:
    """Shards `network`, each of `blocks` a unit of its own; float32 parameters compute in `dtype`.

    Gradients are added up over ranks, not averaged, in float32.
    """
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded(network):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale within a sum
    return network


def _sharded(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]
