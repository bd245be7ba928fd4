"""AdamW for weights that train themselves in bf16: 8-bit states, stochastic rounding, and a step inside the backward pass.

A weight of 0.02 in bf16 has steps of 6e-5 to 1.2e-4; AdamW at a learning rate of 1e-5 moves it by about 1e-5. Rounded to
the nearest, nearly every such update is lost. Rounded up or down at random, with the chances that make the mean right,
they add up (arXiv:2010.06192). The arithmetic is in fp32, piece by piece, so that no fp32 copy of a whole weight exists.

With `in_backward` each weight is updated as soon as its gradient is known and the gradient is dropped, so that never all
gradients are alive (LOMO, arXiv:2306.09782, section 3). The result is the ordinary step, because AdamW treats weights one
by one; what looks at all gradients at once (clipping by their norm, adding up several packs) cannot be had.

States: fp32; or bitsandbytes' 8-bit blocks (arXiv:2110.02861), in GPU memory or in pages that move to the host and back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

States = Literal["fp32", "8bit", "paged_8bit"]

PIECE = 2**24
"""Numbers updated together: a multiple of bitsandbytes' block; 64 MiB in fp32."""
BLOCK = 256
"""Numbers that share a scale in an 8-bit state."""
FEWEST_IN_8_BITS = 4096
"""Smaller weights (norms, biases) keep fp32 states, as bitsandbytes' own optimizers do."""


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) for weights of any type; `generator` draws the rounding."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        states: States = "fp32",
        rounding: Literal["nearest", "stochastic"] = "stochastic",
        in_backward: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.states, self.rounding, self.in_backward = states, rounding, in_backward
        self._seed = seed
        # By number, because loading a state, as accelerate does at once, makes new groups with the same parameters.
        self._place = {
            id(p): (number, index)
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        }
        self.square_norms: list[Tensor] = []
        """Of the gradients dropped since the last `step`; with in_backward only."""
        if in_backward:
            myself: weakref.ref[RoundedAdamW] = weakref.ref(self)  # parameters must not keep their optimizer alive
            for parameter in (p for group in self.param_groups for p in group["params"]):
                parameter.register_post_accumulate_grad_hook(functools.partial(_step_inside, myself))

    def step_inside(self, parameter: Tensor) -> None:
        """Update one weight whose gradient is complete, and drop the gradient."""
        assert parameter.grad is not None, "autograd calls this when it has just added to it"
        self.square_norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square())
        self._update(parameter, self.param_groups[self._place[id(parameter)][0]])  # pyright: ignore[reportArgumentType]
        parameter.grad = None

    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients that were dropped since the last call; None where none was."""
        if not self.square_norms:
            return None
        norm = torch.stack([square.to(self.square_norms[0].device) for square in self.square_norms]).sum().sqrt()
        self.square_norms.clear()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; with in_backward all have been updated already."""
        assert closure is None, "trainers of this kind give none"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        assert parameter.grad is not None, "checked by the callers"
        values, grad = parameter.data.view(-1), parameter.grad.reshape(-1)
        generator = self._generator(parameter, state["step"])
        for start in range(0, len(values), PIECE):
            piece = slice(start, start + PIECE)
            wide = values[piece].to(torch.promote_types(parameter.dtype, torch.float32))
            update = _update_8bit if "absmax1" in state else _update_fp32
            update(wide, grad[piece].to(wide.dtype), state, piece, group)
            values[piece] = self._rounded(wide, parameter, generator)

    def _begin(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        state["step"] = 0
        size, device = parameter.numel(), parameter.device
        if self.states == "fp32" or size < FEWEST_IN_8_BITS:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["state1"], state["state2"] = (torch.zeros(size, dtype=wide, device=device) for _ in range(2))
            return
        from bitsandbytes.functional import get_paged

        for number in (1, 2):
            if self.states == "paged_8bit" and device.type == "cuda":
                stored: Any = get_paged(size, dtype=torch.uint8, device=device)
                stored.zero_()
            else:
                stored = torch.zeros(size, dtype=torch.uint8, device=device)
            state[f"state{number}"] = stored
            state[f"absmax{number}"] = torch.zeros(-(-size // BLOCK), device=device)

    def _rounded(self, wide: Float[Tensor, " n"], parameter: Tensor, generator: torch.Generator) -> Tensor:
        if parameter.dtype is not torch.bfloat16 or self.rounding == "nearest":
            return wide.to(parameter.dtype)
        return round_stochastically(wide, generator)

    def _generator(self, parameter: Tensor, step: int) -> torch.Generator:
        """Of one weight in one step, so that a resumed run draws what the whole one would have drawn."""
        entropy = [self._seed, step, *self._place[id(parameter)]]
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
        return torch.Generator(parameter.device).manual_seed(seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States keep their own types; torch's own method would turn them into the weights' type."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, stored in state_dict["state"].items():
            state = self.state[parameters[number]]
            self._begin(parameters[number], state)
            for name, value in stored.items():
                if isinstance(value, Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value


def _step_inside(optimizer: weakref.ref[RoundedAdamW], parameter: Tensor) -> None:
    if (alive := optimizer()) is not None:
        alive.step_inside(parameter)


def round_stochastically(wide: Float[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
    """fp32 to bf16, up or down at random, so that the expected value is the number itself."""
    # bf16 is the upper half of an fp32. Adding 0 .. 65,535 below it carries into the upper half as often as it should.
    bits: Int[Tensor, " n"] = wide.view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(torch.bfloat16)


def _update_fp32(wide: Tensor, grad: Tensor, state: dict[str, Any], piece: slice, group: dict[str, Any]) -> None:
    """As torch.optim.AdamW: Algorithm 2 of arXiv:1711.05101."""
    (beta1, beta2), step = group["betas"], state["step"]
    first, second = state["state1"][piece], state["state2"][piece]
    wide.mul_(1 - group["lr"] * group["weight_decay"])
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    wide.addcdiv_(first, size, value=-group["lr"] / (1 - beta1**step))


def _update_8bit(wide: Tensor, grad: Tensor, state: dict[str, Any], piece: slice, group: dict[str, Any]) -> None:
    """bitsandbytes' block-wise update, on the fp32 copy of a piece."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    blocks = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
    signed, unsigned = _maps(wide.device)
    beta1, beta2 = group["betas"]
    optimizer_update_8bit_blockwise(
        "adam",
        g=grad,
        p=wide,
        state1=_part(state["state1"], piece),
        state2=_part(state["state2"], piece),
        beta1=beta1,
        beta2=beta2,
        beta3=0.0,
        alpha=0.0,
        eps=group["eps"],
        step=state["step"],
        lr=group["lr"],
        qmap1=signed,
        qmap2=unsigned,
        absmax1=state["absmax1"][blocks],
        absmax2=state["absmax2"][blocks],
        weight_decay=group["weight_decay"],
    )


def _part(stored: Any, piece: slice) -> Tensor:
    part = stored[piece]
    if getattr(stored, "is_paged", False):
        # bitsandbytes knows by this attribute that the GPU can read what torch takes for host memory.
        part.is_paged, part.page_deviceid = True, stored.page_deviceid
    return part


_maps_on: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of an 8-bit state: signed for means, unsigned for squares."""
    from bitsandbytes.functional import create_dynamic_map

    if device not in _maps_on:
        _maps_on[device] = (create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device))
    return _maps_on[device]
