"""One process or several: sums, averages and sharding of a network by torch's FSDP2.

`torchrun` starts the processes and sets what torch reads from the environment. All weights are sharded when all are
trained: every process holds fp32 masters, their average and the optimiser's moments of its part, and layers are
gathered in the computing dtype when they run. Adapters are small: every process has the whole base and all adapters,
and their gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among `world`; `mesh` is None where there is one process alone."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: Any = None

    @classmethod
    def from_torchrun(cls, kind: str, local_rank: int) -> Processes:
        """Joins the group that torchrun started; `kind` is cpu or cuda."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device, init_device_mesh(kind, (dist.get_world_size(),)))

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all processes."""
        if self.world == 1:
            return list(values)
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()  # type: ignore[no-any-return]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of parameters that every process holds whole; a missing gradient is zero."""
        if self.world == 1:
            return
        import torch.distributed as dist

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        if self.mesh is not None:
            import torch.distributed as dist

            dist.destroy_process_group()

    def shard(self, network: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Shards fp32 parameters over the processes: each layer a unit, the rest another. `dtype`: of computation."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        fully_shard(network, mesh=self.mesh, mp_policy=policy)


def fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives a parameter its values; of a sharded one each process takes its own part of `values`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(parameter, DTensor):
            part = distribute_tensor(
                values.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(values)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded: every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
