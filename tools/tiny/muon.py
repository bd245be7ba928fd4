"""Muon: momentum whose update for a weight matrix is made orthogonal (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

Beside torch.optim.Muon for two reasons: the rate is a tensor, so that a captured step reads its new value, and matrices
of one shape are handled as one stack, so that the sixty of them here cost a few kernels and not thousands.
"""

from __future__ import annotations

import collections

import torch
from jaxtyping import Float
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step, tuned by Jordan et al. for a steep slope at zero."""
NUM_STEPS = 5
RMS = 0.2
"""Root mean square of an update's entries at rate 1: about AdamW's, so both take like rates (Liu et al., arXiv:2502.16982)."""


def orthogonalise(matrices: Float[Tensor, "n rows columns"]) -> Float[Tensor, "n rows columns"]:
    """Nearly U V^T for each matrix U S V^T with rows <= columns, in bf16: singular values end within 0.7 to 1.2."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Steps for 2-D views of `weights`; `pieces` says into how many equal matrices a fused weight is cut."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        rate: Tensor,
        *,
        momentum: float,
        weight_decay: float,
        pieces: dict[str, int],
    ) -> None:
        self.rate, self.momentum, self.weight_decay = rate, momentum, weight_decay
        self.stacks: dict[tuple[int, int], list[tuple[nn.Parameter, int, bool]]] = collections.defaultdict(list)
        for name, weight in weights.items():
            num = pieces.get(name.rpartition(".")[0].rpartition(".")[2], 1)
            rows, columns = weight.shape[0] // num, weight[0].numel()
            self.stacks[min(rows, columns), max(rows, columns)].append((weight, num, rows > columns))
        self.buffers = {
            shape: torch.zeros(sum(num for _, num, _ in stack), *shape, device=stack[0][0].device)
            for shape, stack in self.stacks.items()
        }

    @torch.no_grad()
    def step(self, usable: Tensor) -> None:
        """One step along the parameters' gradients; changes nothing where `usable` (a boolean scalar) is False."""
        rate = self.rate * usable
        for shape, stack in self.stacks.items():
            gradients = torch.cat([self._cut(weight.grad, num, tall) for weight, num, tall in stack])
            gradients = torch.where(usable, gradients, 0.0)
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum)).float() * (RMS * max(shape) ** 0.5)
            start = 0
            for weight, num, tall in stack:
                part = update[start : start + num]
                start += num
                part = (part.mT if tall else part).reshape(weight.shape)
                weight.mul_(1 - rate * self.weight_decay).sub_(rate * part)

    @staticmethod
    def _cut(gradient: Tensor | None, num: int, tall: bool) -> Float[Tensor, "num rows columns"]:
        assert gradient is not None, "every weight has a gradient from the first step on"
        matrices = gradient.reshape(num, gradient.shape[0] // num, -1)
        return matrices.mT if tall else matrices
