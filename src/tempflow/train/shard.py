"""The network sharded over the ranks by FSDP2: parameters, gradients and the optimizer's state a part each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tempflow.train.dist import World


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
