"""Layers that keep only their input and run again in the backward pass, and where that input waits meanwhile.

Like torch.utils.checkpoint (its re-entrant form), with two additions that it has no place for: inputs can wait in host
memory, copied on a stream of their own while the GPU computes, and a layer is told which of its two runs this is, so that
weights which live elsewhere can be fetched in the right order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Run = Callable[[Float[Tensor, "tokens width"], Literal["forward", "backward"]], Float[Tensor, "rows width"]]
"""One layer: hidden states in, hidden states out."""


class Waiting:
    """Inputs of the recomputed layers of one forward pass, in order. `hosts` is None where they wait on the device."""

    def __init__(self, hosts: HostBuffers | None) -> None:
        self._hosts, self._inputs = hosts, []

    def put(self, hidden: Tensor) -> int:
        """Take a layer's input; returns its ticket."""
        self._inputs.append(hidden.detach() if self._hosts is None else self._hosts.send(hidden.detach()))
        return len(self._inputs) - 1

    def get(self, ticket: int) -> Tensor:
        """The input again, once; the one before it starts on its way back, since its layer is next."""
        found = self._inputs[ticket]
        self._inputs[ticket] = None
        if self._hosts is None:
            return found
        if ticket and (before := self._inputs[ticket - 1]) is not None:
            self._hosts.call(before)
        return self._hosts.receive(found)


IN_FLIGHT = 2
"""Inputs on their way to the host at one time. Their memory is given up when the copy two layers back is over; left to the
allocator (`record_stream`) it would stay until the GPU, far behind the host, gets there: 0.7 GiB more at 2B."""


class HostBuffers:
    """Page-locked buffers for inputs, used again by every pass: locking pages costs more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._free: list[Tensor] = []
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device

    def send(self, hidden: Tensor) -> _Away:
        """Copy to the host while the device goes on."""
        block = self._take(hidden.nbytes)
        away = _Away(block, block[: hidden.nbytes].view(hidden.dtype).view(hidden.shape))
        if self._stream is None:
            away.host.copy_(hidden)
            return away
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            away.host.copy_(hidden, non_blocking=True)
        self._leaving.append((hidden, self._stream.record_event()))
        while len(self._leaving) > IN_FLIGHT:
            self._let_go()
        return away

    def _let_go(self) -> None:
        _, left = self._leaving.popleft()
        torch.cuda.current_stream().wait_event(left)

    def call(self, away: _Away) -> None:
        """Start the way back."""
        if away.back is not None:
            return
        if self._stream is None:
            away.back = away.host.to(self._device, copy=True)
            return
        while self._leaving:
            self._let_go()
        # Memory of the computing stream, so that it is given out again in that stream's order; the copy waits for what
        # used it before.
        away.back = torch.empty_like(away.host, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            away.back.copy_(away.host, non_blocking=True)
            away.arrived = self._stream.record_event()

    def receive(self, away: _Away) -> Tensor:
        """The tensor on the device; its buffer is free. The one stream makes a later copy into it wait for this one."""
        self.call(away)
        assert away.back is not None, "call() has just set it"
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(away.arrived)
        self._free.append(away.block)
        return away.back

    def _take(self, nbytes: int) -> Tensor:
        fitting = [number for number, block in enumerate(self._free) if block.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda number: self._free[number].nbytes))
        if self._free:
            self._free.pop()  # too small: packs have grown
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)


class _Away:
    """One input in host memory."""

    __slots__ = ("arrived", "back", "block", "host")

    def __init__(self, block: Tensor, host: Tensor) -> None:
        self.block, self.host = block, host
        self.back: Tensor | None = None
        self.arrived: Any = None


def recomputed(run: Run, hidden: Float[Tensor, "tokens width"], waiting: Waiting, *, keeps_random: bool) -> Tensor:
    """`run` on `hidden`, keeping only `hidden`. `keeps_random`: draws the same random numbers again (dropout)."""
    # Weights are no inputs of the function below; without something that wants a gradient it would be left out of the graph.
    anchor = torch.empty(0, requires_grad=True)
    return _Recomputed.apply(anchor, hidden, run, waiting, keeps_random)  # type: ignore[return-value]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor, run: Run, waiting: Waiting, keeps_random: bool) -> Tensor:
        ctx.run, ctx.waiting, ctx.ticket = run, waiting, waiting.put(hidden)
        ctx.random = _random_state(hidden.device) if keeps_random else None
        return run(hidden, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden = ctx.waiting.get(ctx.ticket).requires_grad_(ctx.needs_input_grad[1])
        devices = [hidden.device] if hidden.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices, enabled=ctx.random is not None):
            if ctx.random is not None:
                _set_random_state(ctx.random, hidden.device)
            again = ctx.run(hidden, "backward")
        if again.requires_grad:  # not for a layer in which nothing trains, below all that does
            torch.autograd.backward(again, grads)
        return None, hidden.grad, None, None, None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
