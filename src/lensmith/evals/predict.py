"""Answers by greedy generation, from the same template and the same pixels that training reads.

Prompts of similar length go through together, padded on the left, longest first: the batch that needs most memory is the
first one. A batch reads each of its pictures once, and questions of one length about one picture come in one batch. The
order of the answers is the order of the samples.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lensmith.config.tree import Eval, Images
from lensmith.data.boxes import restore_answer
from lensmith.data.encode import Encoder
from lensmith.data.images import grid_of, read_patches
from lensmith.errors import DataError
from lensmith.evals.score import MATCHERS, Comparison, Metric, Score, compare_answers, guess_metric, score_answers
from lensmith.types import Encoded, ImageMark, ImageRef, ImageSize, Message, Moment, Sample, Text, VisionGeometry

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import GenerationConfig

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with questions answered so far and questions in all."""

MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for pictures and their frame: an answer never contains them."""
ASK_TOKENS = 512
"""Longest answer of `ask_model`."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question and what the model answered; one line of predictions-*.jsonl."""

    where: str
    question: str
    reference: str
    """The answer in the data; empty where there is none."""
    answer: str
    """Without special tokens and with boxes as the data writes them, otherwise as generated."""
    tokens: int
    """Generated, without the end mark."""
    stopped: bool
    """Whether the model ended its answer itself; False where max_new_tokens cut it off."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores of one model on one set of questions, and every answer behind them."""

    metric: Metric
    why: str
    """A sentence: how the metric was chosen."""
    exact: Score
    normalised: Score
    predictions: tuple[Prediction, ...]
    eval_s: float

    @property
    def score(self) -> Score:
        """The score by the chosen metric."""
        known = {"exact": self.exact, "normalised": self.normalised}.get(self.metric)
        return self.score_of(range(len(self.predictions))) if known is None else known

    def is_right(self, prediction: Prediction) -> bool:
        """Whether one answer counts, by the chosen metric."""
        return MATCHERS[self.metric](prediction.answer, prediction.reference)

    def score_of(self, chosen: Sequence[int]) -> Score:
        """The score of some of the questions only, by the chosen metric."""
        picked = [self.predictions[index] for index in chosen]
        return score_answers([p.answer for p in picked], [p.reference for p in picked], self.metric)

    @property
    def cut_off(self) -> int:
        """Answers that max_new_tokens cut off."""
        return sum(not prediction.stopped for prediction in self.predictions)


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


def score_predictions(predictions: Sequence[Prediction], settings: Eval, *, eval_s: float = 0.0) -> EvalResult:
    """Score answers that are there already, for example those that `read_predictions` returns.

    Raises:
        DataError: there are none.
    """
    answers, references = [p.answer for p in predictions], [p.reference for p in predictions]
    metric, why = guess_metric(references)
    if settings.metric != "auto":
        metric, why = settings.metric, f"metric {settings.metric}: set by eval.metric"
    exact, normalised = score_answers(answers, references, "exact"), score_answers(answers, references, "normalised")
    return EvalResult(metric, why, exact, normalised, tuple(predictions), eval_s)


def compare_results(before: EvalResult, after: EvalResult) -> Comparison:
    """Wins and losses of `after` over `before`, question by question, by the metric of `before`."""
    then, now = ([prediction.answer for prediction in result.predictions] for result in (before, after))
    return compare_answers(then, now, [prediction.reference for prediction in before.predictions], before.metric)


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

    `model` may be a PeftModel; inside its `disable_adapter()` the base answers. Its mode (training or not, module by
    module) is put back afterwards.
    """
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    order = sorted(range(len(prompts)), key=lambda index: _batch_key(prompts[index]))
    settings = greedy_settings(model, processor.tokenizer, encoder.end_token_id, max_new_tokens)
    answers: dict[int, tuple[list[int], bool]] = {}
    with answering(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = pad_prompts([prompts[index] for index in chosen], encoder, model)
            generated = model.generate(**inputs, generation_config=settings)
            new_tokens = generated[:, inputs["input_ids"].shape[1] :].tolist()
            answers |= zip(chosen, (_cut_at_end(ids, settings.eos_token_id) for ids in new_tokens), strict=True)
            if progress is not None:
                progress(len(answers), len(samples))
    texts = processor.tokenizer.batch_decode([answers[i][0] for i in range(len(samples))], skip_special_tokens=True)
    asked = zip(texts, samples, prompts, strict=True)
    texts = [restore_answer(text, sample, prompt.images) for text, sample, prompt in asked]
    return [
        Prediction(sample.where, sample.question, sample.answer, text, len(answers[index][0]), answers[index][1])
        for index, (sample, text) in enumerate(zip(samples, texts, strict=True))
    ]


def _batch_key(prompt: Encoded) -> tuple[int, list[str]]:
    return -prompt.num_tokens, [image.ref.key for image in prompt.images]


def ask_model(
    model: Any,
    processor: Any,
    image: Path | bytes | None,
    question: str,
    *,
    budget: Images | None = None,
    max_new_tokens: int = ASK_TOKENS,
) -> str:
    """One answer to one question about one picture (a file or its bytes), or about none.

    Args:
        budget: tokens that the picture may cost; None for the defaults of data.image.

    Raises:
        DataError: the picture cannot be read.
    """
    refs = () if image is None else (ImageRef(image, key=str(image) if isinstance(image, Path) else "asked"),)
    parts = (*(ImageMark(index) for index in range(len(refs))), Text(question))
    sample = Sample("the question", (Message("user", parts),), refs)
    encoder = Encoder.from_processor(processor, budget or Images())
    return answer_samples(model, encoder, processor, [sample], max_new_tokens=max_new_tokens, batch=1)[0].answer.strip()


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Inference mode with every module in eval mode; afterwards each is in the mode it was in."""
    # Not model.train() at the end: a frozen tower may have been in eval mode while the rest trained.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
        # generate() leaves the last batch's offsets on the model; a later forward of another batch must not find them.
        for module in model.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None


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


def _cut_at_end(ids: list[int], end_ids: Sequence[int]) -> tuple[list[int], bool]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return ids[:end], end is not None


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """One JSON object per line, in the order of the samples; `read_predictions` reads it back."""
    lines = (json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote."""
    with path.open(encoding="utf-8") as lines:  # not splitlines(): an answer may hold other kinds of line ends
        return [Prediction(**json.loads(line)) for line in lines]
