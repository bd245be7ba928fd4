"""One answer to one sample, told piece by piece while it is made; the same prompt and pixels as in training and evaluation.

Greedy answers are those of `lensmith.evals.predict.answer_samples`: the settings are made by the same function.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lensmith.data.encode import Encoder
from lensmith.errors import DataError
from lensmith.evals.predict import ASK_TOKENS, answering, greedy_settings, pad_prompts
from lensmith.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

HALF_CHARACTER = "\ufffd"
"""What the tokenizer shows for the first bytes of a character whose last ones are not generated yet."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and how many may be."""

    max_new_tokens: int = ASK_TOKENS
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: float = 1.0
    seed: int | None = None
    """None: another one each time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    text: str
    """Without special tokens, otherwise as generated."""
    tokens: int
    """Generated, without the end mark."""
    prompt_tokens: int
    stopped: bool
    """Whether the model ended its answer itself; False where max_new_tokens cut it off."""


def generate_answer(
    model: Any,
    encoder: Encoder,
    processor: Any,
    sample: Sample,
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> Answer:
    """The model's answer to the last turn of the sample, which must be the user's.

    Args:
        on_text: given each new piece of the text; all pieces together are the whole text.
        stop: ends the generation at the next token, once set.

    Raises:
        RowError: a picture cannot be read.
        DataError: the question and the longest answer do not fit what the model can read.
    """
    prompt = encoder.encode_prompt(sample)
    room = model.config.text_config.max_position_embeddings
    if prompt.num_tokens + sampling.max_new_tokens > room:
        raise DataError(
            f"{sample.where}: the question is {prompt.num_tokens:,} tokens long and the answer may have "
            f"{sampling.max_new_tokens:,}, together over the {room:,} that the model can read. "
            "Send fewer or shorter turns, fewer pictures, or lower max_tokens."
        )
    settings = greedy_settings(model, processor.tokenizer, encoder.end_token_id, sampling.max_new_tokens)
    if sampling.temperature > 0:
        # top_k=0 is none: a caller who sets temperature and top_p means these two alone.
        settings.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    pieces = _Pieces(processor.tokenizer, settings.eos_token_id, on_text)
    with answering(model), _randomness(sampling, model.device):
        inputs = pad_prompts([prompt], encoder, model)
        stopping = [] if stop is None else [_Stop(stop)]
        model.generate(**inputs, generation_config=settings, streamer=pieces, stopping_criteria=stopping)
    return Answer(pieces.text, len(pieces.ids), prompt.num_tokens, pieces.stopped)


class _Pieces:
    """Takes tokens from transformers' generate, which calls `put` and `end`, and tells what they add to the text."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int], on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.end_ids, self.on_text = tokenizer, end_ids, on_text
        self.ids: list[int] = []
        self.stopped = False
        self._is_prompt, self._told = True, 0

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def put(self, ids: Int[Tensor, "*tokens"]) -> None:
        if self._is_prompt:  # the first call hands out the prompt
            self._is_prompt = False
            return
        token = int(ids.reshape(-1)[0])
        if token in self.end_ids:
            self.stopped = True
            return
        self.ids.append(token)
        if self.on_text is not None and not (text := self.text).endswith(HALF_CHARACTER):
            self._tell(text)

    def end(self) -> None:
        if self.on_text is not None:
            self._tell(self.text)

    def _tell(self, text: str) -> None:
        if self.on_text is not None and len(text) > self._told:
            self.on_text(text[self._told :])
            self._told = len(text)


class _Stop:
    """A stopping criterion of transformers: an event that another thread sets."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Int[Tensor, "batch tokens"], scores: Any, **_: Any) -> Bool[Tensor, " batch"]:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def _randomness(sampling: Sampling, device: torch.device) -> Any:
    """torch's generators at the seed, and afterwards as they were: generate() takes no generator of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        yield
