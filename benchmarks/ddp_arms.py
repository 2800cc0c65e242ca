"""Ways to average gradients in ``DistributedDataParallel``: torch's own, and Sterna's hook.

Each factory wraps a module, with a process group of its own, so that many can live side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from sterna.exchange.ddp_hook import DdpHook, register
from sterna.seams import Codec


class DdpArm(NamedTuple):
    """A wrapped module, and the handle of Sterna's hook where there is one."""

    model: DistributedDataParallel
    hook: DdpHook | None = None


def plain(module: nn.Module) -> DdpArm:
    """Float32, added up by Gloo."""
    return DdpArm(DistributedDataParallel(module, process_group=dist.new_group()))


def torch_fp16(module: nn.Module) -> DdpArm:
    """Torch's hook that halves the bytes."""
    group = dist.new_group()
    model = DistributedDataParallel(module, process_group=group)
    model.register_comm_hook(group, default_hooks.fp16_compress_hook)
    return DdpArm(model)


def torch_powersgd(rank: int, start: int = 2) -> Callable[[nn.Module], DdpArm]:
    """Torch's PowerSGD hook: error feedback and warm start, as it comes; float32 up to ``start``."""

    def make(module: nn.Module) -> DdpArm:
        group = dist.new_group()
        # One bucket: with several in flight this hook deadlocks on Gloo.
        model = DistributedDataParallel(module, process_group=group, bucket_cap_mb=100_000)
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=rank, start_powerSGD_iter=start
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return DdpArm(model)

    return make


def sterna(codec: Codec) -> Callable[[nn.Module], DdpArm]:
    """Sterna's hook with any codec."""

    def make(module: nn.Module) -> DdpArm:
        model = DistributedDataParallel(module, process_group=dist.new_group())
        return DdpArm(model, register(model, codec))

    return make
