"""Workers draw shards of pictures ahead of time; a pool on the device holds the newest and gives out random batches.

A shard is fully determined by the seed and its number. Which shards are in the pool at a given step depends on how fast
the machine draws, so two runs see the same pictures in slightly different order.
"""

from __future__ import annotations

import multiprocessing
import queue
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from tokenizers import Tokenizer
from tools.tiny.colours import shades
from tools.tiny.forward import Batch
from tools.tiny.tasks import make_item

SIZES: dict[tuple[int, int], float] = {
    (64, 64): 0.34,
    (96, 64): 0.14,
    (64, 96): 0.10,
    (128, 64): 0.12,
    (128, 128): 0.15,
    (160, 96): 0.15,
}
"""Width and height in pixels of the pictures drawn, and their shares of the steps."""
QUESTIONS = 8
TEXT_TOKENS = 30
"""Tokens after the picture; longer rows (1 in 1,000) are replaced by another of the picture's questions."""
ANSWER_TOKENS = 17
PREFIX = "<|im_start|>user\n<|vision_start|>"
BETWEEN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Shard:
    size: tuple[int, int]
    pixels: UInt8[np.ndarray, "P height width 3"]
    ids: Int[np.ndarray, "P Q T"]
    first: Int[np.ndarray, "P Q"]
    last: Int[np.ndarray, "P Q"]


def row_tokens(size: tuple[int, int], prefix: list[int]) -> int:
    """Tokens per row for pictures of this size: the picture is one per 32 x 32 pixels, and its end mark."""
    return len(prefix) + size[0] * size[1] // 1024 + 1 + TEXT_TOKENS


def draw_shard(
    seed: int, number: int, size: tuple[int, int], pictures: int, tokenizer: Tokenizer, lead: list[int]
) -> Shard:
    """Shard `number`: `pictures` items of one size as ids after `lead` (the prefix, image marks and their end)."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pad, end, between = encode("<|endoftext|>")[0], encode(END), encode(BETWEEN)
    length = len(lead) + TEXT_TOKENS
    pixels = np.empty((pictures, size[1], size[0], 3), dtype=np.uint8)
    ids = np.full((pictures, QUESTIONS, length), pad, dtype=np.int16)
    first, last = (np.zeros((pictures, QUESTIONS), dtype=np.int16) for _ in range(2))
    for p in range(pictures):
        item = make_item(seed, number * pictures + p, *size, QUESTIONS)
        pixels[p] = item.pixels
        rows = []
        for question in item.questions:
            asked, answered = [*lead, *encode(question.text), *between], [*encode(question.answer), *end]
            if len(asked) + len(answered) <= length and len(answered) <= ANSWER_TOKENS:
                rows.append((asked, answered))
        for q in range(QUESTIONS):
            asked, answered = rows[q % len(rows)]
            ids[p, q, : len(asked) + len(answered)] = asked + answered
            first[p, q], last[p, q] = len(asked), len(asked) + len(answered) - 1
    return Shard(size, pixels, ids, first, last)


def _work(out: multiprocessing.Queue, seed: int, start: int, step: int, pictures: int, tokenizer_file: str) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    prefix, image, end = (tokenizer.encode(t).ids for t in (PREFIX, "<|image_pad|>", "<|vision_end|>"))
    number = start
    while True:
        size = random.Random(f"{seed}/{number}").choices(list(SIZES), list(SIZES.values()))[0]
        lead = [*prefix, *image * (size[0] * size[1] // 1024), *end]
        out.put(draw_shard(seed, number, size, pictures, tokenizer, lead))
        number += step


class Pool:
    """The newest `capacity` pictures of each size, on `device`, drawn by `workers` processes for as long as it lives."""

    def __init__(
        self, seed: int, tokenizer_file: Path, device: torch.device, *, workers: int, shard: int, capacity: int
    ) -> None:
        shades()  # made once here, for all workers
        # Forked, so that workers start at once; none of them touches the GPU, and this comes before anything does here.
        context = multiprocessing.get_context("fork")
        self.device, self.shard, self.capacity = device, shard, capacity - capacity % shard
        self.queue = context.Queue(maxsize=2 * workers)
        self.tensors: dict[tuple[int, int], Batch] = {}
        self.drawn = dict.fromkeys(SIZES, 0)
        self.workers = [
            context.Process(target=_work, args=(self.queue, seed, w, workers, shard, str(tokenizer_file)), daemon=True)
            for w in range(workers)
        ]
        for worker in self.workers:
            worker.start()
        self.generator = torch.Generator(device).manual_seed(seed)

    def receive(self, *, wait: bool, most: int = 4) -> int:
        """Moves finished shards to the device, waiting for the first if asked to; returns how many."""
        for num in range(most):
            try:
                shard = self.queue.get(timeout=120) if wait and num == 0 else self.queue.get_nowait()
            except queue.Empty:
                if wait and num == 0:
                    raise RuntimeError("the workers drew nothing for two minutes; see their messages above") from None
                return num
            self._keep(shard)
        return most

    def _keep(self, shard: Shard) -> None:
        arrays = {name: torch.from_numpy(getattr(shard, name)) for name in ("pixels", "ids", "first", "last")}
        if shard.size not in self.tensors:
            self.tensors[shard.size] = Batch(
                **{
                    n: torch.empty(self.capacity, *a.shape[1:], dtype=a.dtype, device=self.device)
                    for n, a in arrays.items()
                }
            )
        start = self.drawn[shard.size] % self.capacity
        for name, array in arrays.items():
            getattr(self.tensors[shard.size], name)[start : start + self.shard].copy_(array)
        self.drawn[shard.size] += self.shard

    def ready(self, least: int) -> bool:
        return all(count >= least for count in self.drawn.values())

    def batch(self, size: tuple[int, int], pictures: int) -> Batch:
        """Random pictures of one size with all their questions."""
        held = self.tensors[size]
        count = min(self.drawn[size], self.capacity)
        chosen = torch.randint(count, (pictures,), generator=self.generator, device=self.device)
        return Batch(held.pixels[chosen], held.ids[chosen].long(), held.first[chosen].long(), held.last[chosen].long())

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
