"""Frozen weights that live in page-locked host memory and visit the GPU: one copy per group, made while it computes.

A group is whatever is needed together: a decoder layer, a block of the image tower. Its tensors stand side by side in one
block of host memory; on a visit the block is copied as it is and the tensors point into the copy. Two places on the GPU
are enough, because the next group is copied while the present one computes:

    GPU place 0    layer 0 ......  copy 2 | layer 2 ......
    GPU place 1    copy 1 | layer 1 ......  copy 3 | ...

Whoever computes with a group's weights in the backward pass must have fetched it there: only layers whose forward pass is
run again may be hosted (`recompute`), and `Visitors.bring` is called for both runs.

On a CPU everything works the same with plain memory, which is how the tests compare it with weights that stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lensmith.model.head import whole_pieces

ALIGNMENT = 256
"""Bytes; what CUDA's own allocator gives, so that no kernel finds a tensor on an odd place."""
PIECE_BYTES = 64 * 2**20
"""A hosted head crosses in pieces of this size: about 1.5 ms each over PCIe 5, with two of them on the GPU at a time."""


class Hosted:
    """Tensors of one group; `device` is where they visit. Their values move to the host at once."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors = list(tensors)
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors]
        self._starts = [0, *itertools.accumulate(sizes)]
        self.nbytes = self._starts.pop()
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._at_home = self._views(self.host)
        for tensor, home in zip(self.tensors, self._at_home, strict=True):
            home.copy_(tensor)
            tensor.data = home

    def _views(self, block: Tensor) -> list[Tensor]:
        return [
            block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(self._starts, self.tensors, strict=True)
        ]

    def arrive(self, block: Tensor) -> None:
        """Point the tensors into a copy of `host`."""
        for tensor, view in zip(self.tensors, self._views(block), strict=True):
            tensor.data = view

    def leave(self) -> None:
        """Point them to the host again."""
        for tensor, home in zip(self.tensors, self._at_home, strict=True):
            tensor.data = home


class Visitors:
    """Groups that take turns in two places on the device."""

    def __init__(self, groups: Sequence[Hosted], device: torch.device) -> None:
        self.groups = list(groups)
        largest = max(group.nbytes for group in self.groups)
        self._places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._guests: list[int | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: list[Any] = [None, None]

    def bring(self, index: int, then: int | None = None) -> None:
        """Group `index` is on the device for whatever is computed next; group `then` starts on its way.

        To be called when all work with the group before has been given to the device.
        """
        if index not in self._guests:
            self._fetch(index, place=0 if self._guests[0] != then else 1)
        place = self._guests.index(index)
        if self._arrived[place] is not None:
            torch.cuda.current_stream().wait_event(self._arrived[place])
        if then is not None and 0 <= then < len(self.groups) and then not in self._guests:
            self._fetch(then, place=1 - place)

    def _fetch(self, index: int, *, place: int) -> None:
        before, group = self._guests[place], self.groups[index]
        if before is not None:
            self.groups[before].leave()
        block = self._places[place][: group.nbytes]
        if self._stream is None:
            block.copy_(group.host)
        else:
            # Whatever computed in this place is in the queue already: the copy waits for it, the host does not.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                block.copy_(group.host, non_blocking=True)
            self._arrived[place] = self._stream.record_event()
        group.arrive(block)
        self._guests[place] = index


class HostEmbedding(nn.Embedding):
    """An input embedding whose weight stays in host memory; only the rows asked for reach the device."""

    @classmethod
    def of(cls, embedding: nn.Embedding, device: torch.device) -> HostEmbedding:
        """The same embedding; its parameter object stays the same, so that a tied head still shares it."""
        hosted = cls(1, 1, device="meta")
        hosted.num_embeddings, hosted.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        hosted.weight, hosted.device = embedding.weight, device
        return hosted

    device: torch.device

    def forward(self, input: Int[Tensor, ...]) -> Float[Tensor, "... width"]:
        # Text repeats itself: each distinct word crosses the bus once.
        words, places = input.cpu().unique(return_inverse=True)
        rows = F.embedding(words, self.weight)
        if self.device.type == "cuda":
            rows, places = rows.pin_memory(), places.pin_memory()
        rows, places = rows.to(self.device, non_blocking=True), places.to(self.device, non_blocking=True)
        return rows[places]


class HostHead(nn.Module):
    """A frozen language head whose weight stays in host memory and crosses piece by piece."""

    def __init__(self, weight: nn.Parameter, device: torch.device) -> None:
        super().__init__()
        self.weight, self.device = weight, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_words(self) -> int:
        return len(self.weight)

    def pieces(self, words: int) -> Iterator[tuple[int, Float[Tensor, "words width"]]]:
        """See `HeadWeight`; each piece is copied while the one before it is used."""
        words = min(words, whole_pieces(PIECE_BYTES // (self.weight.shape[1] * self.weight.element_size())))
        starts = range(0, len(self.weight), words)
        places = [torch.empty_like(self.weight[:words], device=self.device) for _ in range(2)]
        arrived = self._send(starts[0], places[0])
        for number, start in enumerate(starts):
            if self._stream is not None:
                torch.cuda.current_stream().wait_event(arrived)
            piece = places[number % 2][: len(self.weight) - start]
            if number + 1 < len(starts):
                # Into the other place, once the work on what stands there is done.
                arrived = self._send(starts[number + 1], places[(number + 1) % 2])
            yield start, piece

    def _send(self, start: int, place: Tensor) -> Any:
        part = self.weight.detach()[start : start + len(place)]
        if self._stream is None:
            place[: len(part)].copy_(part)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            place[: len(part)].copy_(part, non_blocking=True)
            return self._stream.record_event()

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        return torch.cat([hidden @ piece.T for _, piece in self.pieces(len(self.weight))], dim=-1)


def pin(parameter: nn.Parameter) -> None:
    """Move a parameter's values to host memory, page-locked where a GPU will copy from it."""
    values = parameter.data.cpu()
    parameter.data = values.pin_memory() if torch.cuda.is_available() else values
