"""Greedy answers by the rollout engine: prompts without padding, one CUDA graph per token, finished ones leave.

    prompts ──> batches ──> prefill ──> one token per answer and step ──> answers
                longest first            (lensmith.model.decode)

A batch holds at most `batch` prompts and PROMPT_TOKENS tokens, and where the GPU runs out of memory it is cut in two, which is
said. What is answered depends on neither, but for rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lensmith.data.encode import Encoder
from lensmith.data.groups import GroupPacker
from lensmith.model.decode import Decoder
from lensmith.model.engine import Engine
from lensmith.model.sampling import Sampling
from lensmith.types import Encoded, counted

PROMPT_TOKENS = 16_384
"""Of the prompts that are read together: 2.3 GiB of keys and values at 8B in 16 bits."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote behind one prompt."""

    ids: tuple[int, ...]
    """Without the end mark."""
    stopped: bool
    """Whether it ended itself; False where max_new_tokens cut it off."""


def answer_prompts(
    engine: Engine,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    *,
    end_ids: Sequence[int],
    never_ids: Sequence[int],
    max_new_tokens: int,
    batch: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """The likeliest token again and again, for each prompt, in their order. The model's modes are as they were afterwards.

    Args:
        end_ids, never_ids: tokens that end an answer, and tokens that none may hold.
        progress: called with prompts answered so far and in all.

    Raises:
        torch.OutOfMemoryError: one prompt alone is too much for the GPU.
    """
    packer = GroupPacker(
        encoder.geometry, encoder.image_token_id, encoder.video_token_id, PROMPT_TOKENS, share_prefix=False
    )
    decoder = Decoder(engine, Sampling(temperature=0), end_ids=end_ids, never_ids=never_ids)
    # Greedy drawing asks for none of its numbers.
    generator = torch.Generator(engine.place)
    answers: dict[int, Answer] = {}

    def answer(chosen: Sequence[int]) -> None:
        pack = packer.pack_prompts([prompts[index] for index in chosen])
        packer.forget()
        try:
            groups = decoder.complete(pack, 1, max_new_tokens=max_new_tokens, generator=generator)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            groups = None
        # Outside the handler, whose traceback holds on to what did not fit.
        if groups is None:
            halve(chosen)
            return
        for index, (completion,) in zip(chosen, groups, strict=True):
            ids = completion.ids[:-1] if completion.stopped else completion.ids
            answers[index] = Answer(ids, completion.stopped)
        if progress is not None:
            progress(len(answers), len(prompts))

    def halve(chosen: Sequence[int]) -> None:
        torch.cuda.empty_cache()
        warnings.warn(
            f"The GPU ran out of memory over {counted(len(chosen), 'question')} at once, so they are asked in two halves. "
            f"Lower eval.batch ({batch}) to ask fewer from the start.",
            stacklevel=2,
        )
        answer(chosen[: len(chosen) // 2])
        answer(chosen[len(chosen) // 2 :])

    for chosen in batches(prompts, batch):
        answer(chosen)
    return [answers[index] for index in range(len(prompts))]


def batches(prompts: Sequence[Encoded], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts asked together: the longest first, so that the batch that needs most memory is the first one, and
    questions of one length about one picture side by side, so that it is read once."""
    order = sorted(range(len(prompts)), key=lambda index: _batch_key(prompts[index]))
    chosen: list[int] = []
    tokens = 0
    for index in order:
        if chosen and (len(chosen) == batch or tokens + prompts[index].num_tokens > PROMPT_TOKENS):
            yield chosen
            chosen, tokens = [], 0
        chosen.append(index)
        tokens += prompts[index].num_tokens
    if chosen:
        yield chosen


def _batch_key(prompt: Encoded) -> tuple[int, list[str]]:
    return -prompt.num_tokens, [image.ref.key for image in prompt.images]
