"""Answers by greedy generation, from the same template and the same pixels that training reads, and what they score.

`answer_samples` goes through the rollout engine (lensmith.evals.answer); a model of transformers' own goes through its
`generate`, with the same prompts and the same rules, which is what the engine's answers are tested against.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lensmith.config.tree import Eval
from lensmith.data.boxes import restore_answer
from lensmith.data.encode import Encoder
from lensmith.data.images import grid_of, read_patches
from lensmith.errors import DataError
from lensmith.evals.answer import Answer, answer_prompts, batches
from lensmith.evals.probe import ANSWER_TOKENS as PROBE_TOKENS
from lensmith.evals.probe import ProbeQuestion
from lensmith.evals.results import (
    EvalResult,
    Prediction,
    compare_results,
    predict,
    read_predictions,
    score_predictions,
    write_predictions,
)
from lensmith.model.engine import evaluating, find_engine
from lensmith.types import Encoded, ImageRef, ImageSize, Moment, Sample, VisionGeometry

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import GenerationConfig

__all__ = [
    "EvalResult",
    "Prediction",
    "answer_samples",
    "answering",
    "compare_results",
    "draw_samples",
    "evaluate_model",
    "read_predictions",
    "score_predictions",
    "write_predictions",
]

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with questions answered so far and questions in all."""

MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for pictures and their frame: an answer never contains them."""
ASK_TOKENS = 512
"""Longest answer of `lensmith ask` and of a served model, unless another is asked for."""


def evaluate_model(
    model: Any,
    encoder: Encoder,
    processor: Any,
    samples: Sequence[Sample],
    settings: Eval,
    *,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Answer all samples and score the answers; with `keep`, write them to that JSONL file.

    Use `draw_samples` first for fewer samples than there are; `settings.samples` is not applied here, so that before and
    after get the very same list.

    Raises:
        DataError: a sample has no answer to compare with, or there are no samples.
    """
    check_answers(samples)
    started = time.perf_counter()
    predictions = answer_samples(
        model,
        encoder,
        processor,
        samples,
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
        progress=progress,
    )
    eval_s = time.perf_counter() - started
    if keep is not None:
        write_predictions(predictions, keep)
    return score_predictions(predictions, settings, eval_s=eval_s)


def check_answers(samples: Sequence[Sample]) -> None:
    """Raise DataError where a sample has no answer to compare with."""
    for sample in samples:
        if not sample.answer.strip():
            raise DataError(
                f"{sample.where}: no answer to compare with (0 characters). "
                "Give the row an answer or take it out of data.test; to only see answers, use `lensmith ask`."
            )


def draw_samples(samples: Sequence[T], count: int | None, seed: int) -> list[T]:
    """At most `count` samples (or their numbers) drawn by the seed, in their own order; all with None."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), count))]


def answer_samples(
    model: Any,
    encoder: Encoder,
    processor: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch: int,
    progress: Progress | None = None,
) -> list[Prediction]:
    """The model's answer to the last question of each sample, greedily; a final assistant turn is not shown to it.

    `model` is an Engine, as load_model makes it, or a PeftModel around one; inside its `disable_adapter()` the base answers.
    One that transformers loaded answers by its own `generate`: `lensmith verify` takes it as the judge. The mode of its
    modules (training or not) is put back afterwards.
    """
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    settings = greedy_settings(model, processor.tokenizer, encoder.end_token_id, max_new_tokens)
    engine = find_engine(model)
    if engine is None:
        answers = _generate(model, encoder, prompts, settings, batch, progress)
    else:
        answers = answer_prompts(
            engine,
            encoder,
            prompts,
            end_ids=settings.eos_token_id,
            never_ids=settings.suppress_tokens,
            max_new_tokens=max_new_tokens,
            batch=batch,
            progress=progress,
        )
    texts = processor.tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
    asked = zip(texts, samples, prompts, strict=True)
    texts = [restore_answer(text, sample, prompt.images) for text, sample, prompt in asked]
    return [
        predict(sample, prompt.images, text, len(answer.ids), answer.stopped)
        for sample, prompt, text, answer in zip(samples, prompts, texts, answers, strict=True)
    ]


def _generate(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    settings: GenerationConfig,
    batch: int,
    progress: Progress | None,
) -> list[Answer]:
    """The same by transformers: padded on the left, until the last one of a batch has ended."""
    found: dict[int, Answer] = {}
    ends: Any = settings.eos_token_id
    with answering(model):
        for chosen in batches(prompts, batch):
            inputs = pad_prompts([prompts[index] for index in chosen], encoder, model)
            written = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].tolist()
            for index, ids in zip(chosen, written, strict=True):
                end = next((place for place, token in enumerate(ids) if token in ends), None)
                found[index] = Answer(tuple(ids[:end]), end is not None)
            if progress is not None:
                progress(len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


def answer_probe(
    model: Any, encoder: Encoder, processor: Any, questions: Sequence[ProbeQuestion], *, batch: int
) -> tuple[str, ...]:
    """The model's answers to the general questions, in their order."""
    samples = [question.to_sample(number) for number, question in enumerate(questions)]
    if not samples:
        return ()
    answered = answer_samples(model, encoder, processor, samples, max_new_tokens=PROBE_TOKENS, batch=batch)
    return tuple(prediction.answer for prediction in answered)


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Inference mode with every module in eval mode; afterwards each is in the mode it was in.

    A model may bring its own way as an attribute of this function's name (lensmith.model.unsloth).
    """
    own = getattr(model, "answering", None)
    try:
        with own(model) if own is not None else _inference(model):
            yield
    finally:
        # generate() leaves the last batch's offsets on the model; a later forward of another batch must not find them.
        for module in model.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    with evaluating(model), torch.inference_mode():
        yield


def greedy_settings(model: Any, tokenizer: Any, end_token_id: int, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding with nothing inherited: a checkpoint's own sampling settings fill only what is left None here."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    end_ids = {end_token_id, *([ends] if isinstance(ends, int) else ends or [])}
    vocabulary = tokenizer.get_vocab()
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,  # with temperature and top_p transformers' own defaults, which greedy decoding accepts without a warning
        repetition_penalty=1.0,
        use_cache=True,
        disable_compile=True,  # Unsloth takes a static cache, for which transformers compiles each shape anew: minutes
        eos_token_id=sorted(end_ids),
        pad_token_id=end_token_id,
        suppress_tokens=[vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary],
    )


def pad_prompts(prompts: Sequence[Encoded], encoder: Encoder, model: Any) -> dict[str, Tensor]:
    """Keyword arguments for `generate`: ids padded on the left, and the patches of all pictures in order.

    input_ids, attention_mask and mm_token_type_ids are [batch, tokens]; for the others see
    `picture_inputs`.
    """
    width = max(prompt.num_tokens for prompt in prompts)
    ids = np.full((len(prompts), width), encoder.end_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.num_tokens :] = prompt.input_ids
        mask[row, width - prompt.num_tokens :] = 1
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        # An end token pads, so padding counts as text.
        "mm_token_type_ids": torch.from_numpy(media_types(ids, encoder.image_token_id, encoder.video_token_id)),
        **picture_inputs([image for prompt in prompts for image in prompt.images], encoder.geometry),
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def media_types(
    ids: Int[np.ndarray, "*tokens"], image_token_id: int, video_token_id: int
) -> Int[np.ndarray, "*tokens"]:
    """What transformers calls mm_token_type_ids: 1 for the tokens of images, 2 for those of videos, 0 for all others."""
    return (ids == image_token_id) + 2 * (ids == video_token_id)


def picture_inputs(images: Sequence[ImageSize], geometry: VisionGeometry) -> dict[str, Tensor]:
    """Keyword arguments with which transformers' own forward takes images and moments; empty without any.

    pixel_values is [patches, values] and image_grid_thw [images, 3]; pixel_values_videos and video_grid_thw are the same
    for moments, each as a video of one step in time, which is how the stock model cuts up longer ones.
    """
    different = {(image.ref.key, image.seen_px): image for image in images}
    patches = {key: read_patches(image, geometry) for key, image in different.items()}
    inputs = {}
    for pixels, grids, kind in (
        ("pixel_values", "image_grid_thw", ImageRef),
        ("pixel_values_videos", "video_grid_thw", Moment),
    ):
        if chosen := [image for image in images if isinstance(image.ref, kind)]:
            inputs[pixels] = torch.cat([patches[image.ref.key, image.seen_px] for image in chosen])
            inputs[grids] = torch.tensor([grid_of(image, geometry) for image in chosen])
    return inputs
