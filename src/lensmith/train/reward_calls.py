"""A user's own reward function, called as TRL calls it, so that one function works in both.

    batch   def price_match(completions, prompts=None, answer=None, images=None, completion_ids=None, **columns)
                -> list[float | None]            completions as [{"role": "assistant", "content": text}] each
    single  def price_match(completion: str, answer: str, ...) -> float | None
                                                 recognised by its parameter `completion`

Either may be async. A function gets what it names, and all of it where it takes **columns: what stands above, `truncated`,
and the row's columns by their names. `ground_truths` is `answer` by another name, for those who ask for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from lensmith.errors import RewardError
from lensmith.train.reward_functions import find_column
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text, VideoMark

Form = Literal["single", "batch"]

SINGLE = "completion"
"""The parameter that tells the single form."""
ALIASES = {"ground_truths": "answer", "ground_truth": "answer"}
"""Other names of a value; passed only where a function asks for them."""
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Pictures(Sequence[Any]):
    """A row's pictures, each read when it is asked for: most rewards that could see them never look."""

    def __init__(self, refs: Sequence[ImageRef]) -> None:
        self.refs = refs

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """The picture as a PIL image, RGB and upright."""
        from lensmith.data.images import open_image

        if isinstance(index, slice):
            return [open_image(ref) for ref in self.refs[index]]
        return open_image(self.refs[index])


@dataclass(frozen=True, slots=True)
class Signature:
    """What a reward function asks for."""

    form: Form
    named: Mapping[str, bool]
    """Parameter -> whether it has to be given."""
    takes_all: bool
    """Whether it has **columns."""
    set_before: frozenset[str] = frozenset()
    """Parameters that the config set; a column of that name does not replace them."""

    def without(self, names: Collection[str]) -> Signature:
        """The same where those parameters are set already."""
        named = {name: needed for name, needed in self.named.items() if name not in names}
        return replace(self, named=named, set_before=frozenset(names))


def read_signature(function: Callable[..., Any]) -> Signature:
    """How a function wants to be called."""
    parameters = inspect.signature(function).parameters.values()
    named = {one.name: one.default is inspect.Parameter.empty for one in parameters if one.kind in _KEYWORD}
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    return Signature("single" if SINGLE in named else "batch", named, takes_all)


def single_arguments(
    signature: Signature, text: str, ids: Sequence[int], sample: Sample, truncated: bool
) -> dict[str, Any]:
    """Keyword arguments of the single form.

    Raises:
        RewardError: the function needs a column that the row lacks.
    """
    given = {
        SINGLE: text,
        "prompt": prompt_messages(sample),
        "completion_ids": list(ids),
        "images": Pictures(sample.images),
        "truncated": truncated,
    }
    return _chosen(signature, [sample], {name: [value] for name, value in given.items()}, is_single=True)


def batch_arguments(
    signature: Signature,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    truncated: Sequence[bool],
) -> dict[str, Any]:
    """Keyword arguments of the batch form: lists with one value per completion.

    Raises:
        RewardError: the function needs a column that one of the rows lacks.
    """
    given = {
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "prompts": [prompt_messages(sample) for sample in samples],
        "completion_ids": [list(one) for one in ids],
        "images": [Pictures(sample.images) for sample in samples],
        "truncated": list(truncated),
    }
    return _chosen(signature, samples, given, is_single=False)


def _chosen(
    signature: Signature, samples: Sequence[Sample], given: Mapping[str, list[Any]], *, is_single: bool
) -> dict[str, Any]:
    columns = dict.fromkeys(name for sample in samples for name in sample.columns)
    offered = [*given, "answer", *columns]
    wanted = dict.fromkeys([*signature.named, *(offered if signature.takes_all else ())])
    wanted = [name for name in wanted if name not in signature.set_before]
    chosen: dict[str, Any] = {}
    for name in wanted:
        values = given[name] if name in given else [_value(sample, name) for sample in samples]
        if name not in given and all(value is None for value in values) and not signature.named.get(name, False):
            continue  # the function's own default stands
        if name not in given and signature.named.get(name, False):
            for sample, value in zip(samples, values, strict=True):
                if value is None:
                    find_column(sample, name)  # raises, and says what the row has
        chosen[name] = values[0] if is_single else values
    return chosen


def _value(sample: Sample, name: str) -> Any:
    """A column, or the answer under one of its names; a row's own column of that name goes first."""
    found = sample.columns.get(name)
    if found is None and ALIASES.get(name, name) == "answer":
        return sample.answer or sample.columns.get("answer")
    return found


def prompt_messages(sample: Sample) -> list[dict[str, Any]]:
    """What the model was asked, in TRL's conversational form; a message with pictures has typed parts."""
    is_answered = sample.messages[-1:] and sample.messages[-1].role == "assistant"
    messages = sample.messages[:-1] if is_answered else sample.messages
    return [{"role": message.role, "content": _content(message)} for message in messages]


def _content(message: Message) -> str | list[dict[str, Any]]:
    if all(isinstance(part, Text) for part in message.parts):
        return message.text
    return [_part(part) for part in message.parts]


def _part(part: Text | ImageMark | VideoMark) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, ImageMark) else "video"}


def read_number(value: Any) -> float:
    """What a reward function gave for one completion; None, where it does not apply, becomes nan.

    Raises:
        RewardError: it is no number, or not a finite one.
    """
    if value is None:
        return float("nan")
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise RewardError(f"returned {value!r}, a {type(value).__name__}, where a number or None is needed")
    number = float(value)
    if number in (float("inf"), float("-inf")):
        raise RewardError(f"returned {number}, where a finite number or None is needed")
    return number
