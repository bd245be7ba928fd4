"""Which process this is, as torchrun says it, and what processes tell each other; alone without torchrun.

Gradients are summed here, once per step and only when every process has all of its own. DDP would sum them during the last
backward pass, and if one process ran out of memory there, the others would wait for it for ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lensmith.errors import ModelError

BUCKET_BYTES = 25 * 2**20
"""Gradients sent together: many adapters are a few KiB, and each message costs its own round. DDP's default."""


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def speaker(say: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """One process speaks for all."""
    return say if say is not None and rank() == 0 else lambda _: None


def refuse_data_parallel() -> None:
    """Raises ModelError where transformers would fall into nn.DataParallel: several GPUs, one process."""
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ModelError(
            f"{torch.cuda.device_count()} GPUs are visible to one process, which transformers would train with "
            "nn.DataParallel; packs cannot be scattered like that. Use all of them with `torchrun --nproc-per-node="
            f"{torch.cuda.device_count()} -m lensmith train ...`, or one with CUDA_VISIBLE_DEVICES=0."
        )


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process; all must ask."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def gather_values(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks; all must ask."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leave_group() -> None:
    """Let the other processes go, at the end of a run.

    torch asks for it: left to Python's exit, the group's threads may outlive what they use. Once a process that had done
    all of its work aborted there ("terminate called without an active exception"), and torchrun called the run a failure.
    """
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient becomes the sum over all processes; one that no process has stays None, as with a single process."""
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    somewhere = torch.tensor([parameter.grad is not None for parameter in trained], device=trained[0].device).int()
    torch.distributed.all_reduce(somewhere)
    gradients = []
    for parameter, processes in zip(trained, somewhere.tolist(), strict=True):
        if processes and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together up to BUCKET_BYTES; a larger one alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(member.nbytes for member in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
