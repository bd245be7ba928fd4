"""One set of weights that answers as the tuned model or as its base, whichever is asked.

An adapter is switched off for the base. Trained components have two versions: the other one waits in host memory, and the
two change places. Where that copy would not fit, only the tuned model answers, and it is said.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from lensmith.config.tree import RunConfig
from lensmith.data.encode import Encoder
from lensmith.errors import ModelError
from lensmith.model.adapters import TRAINED_WEIGHTS, find_tuned, load_tuned
from lensmith.model.components import is_adapter, plain_name
from lensmith.model.load import load_model
from lensmith.rundir import find_run
from lensmith.serve.generate import Answer, Sampling, generate_answer
from lensmith.types import Sample

Which = Literal["base", "tuned"]
GIB = 2**30
HOST_SHARE = 0.5
"""Of the free host memory, at most this much for the base's version of trained components."""


class Subject:
    """A model ready to be asked, under each of its names."""

    def __init__(
        self,
        name: str,
        processor: Any,
        config: RunConfig,
        model: nn.Module,
        kinds: tuple[Which, ...],
        waiting: dict[str, Tensor],
    ) -> None:
        """`kinds`: what can answer, first what answers by default; `waiting`: the base's tensors of trained components."""
        self.name, self.processor, self.model, self.kinds = name, processor, model, kinds
        self.encoder = Encoder.from_processor(processor, config.data.image, config.data.video)
        self._waiting, self._present = waiting, kinds[0]
        self.names: dict[str, Which] = {kind: kind for kind in kinds}
        """What may be asked for. A run may be called `base`: the word keeps its meaning."""
        self.names.setdefault(name, kinds[0])

    def find(self, name: str | None) -> Which:
        """Which of the two a name means; None means the first. Raises ModelError for a name that nothing here has."""
        if name is None:
            return self.kinds[0]
        if name not in self.names:
            raise ModelError(
                f"model {name[:80]!r} is not served here. Ask for {' or '.join(map(repr, self.names))}, "
                "or leave the field out."
            )
        return self.names[name]

    def answer(
        self,
        which: Which,
        sample: Sample,
        sampling: Sampling,
        *,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """See `generate_answer`. Not for several threads at once: there is one set of weights."""
        with self._as(which) as model:
            return generate_answer(model, self.encoder, self.processor, sample, sampling, on_text=on_text, stop=stop)

    @contextmanager
    def _as(self, which: Which) -> Iterator[Any]:
        if self._waiting and which != self._present:
            _exchange(self.model, self._waiting)
            self._present = which
        if which == "base" and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.model


def open_subject(subject: str, *, say: Callable[[str], None]) -> Subject:
    """A run, one of its checkpoints, or a model; says what was chosen.

    Raises:
        LensmithError: it cannot be loaded.
    """
    run, tuned = find_run(subject)
    config = run.read_config() if run.exists else RunConfig(model=subject)
    source = find_tuned(tuned) if run.exists else None
    loaded = load_model(config)
    for sentence in loaded.sentences:
        say(sentence)
    if source is None:
        name = Path(subject).resolve().name if Path(subject).is_dir() else subject
        return Subject(name, loaded.processor, config, loaded.model, ("base",), {})
    name = run.path.resolve().name if tuned == run.path else f"{run.path.resolve().name}/{tuned.name}"
    waiting = _base_tensors(loaded.model, source)
    if waiting is None:
        say(_no_room_sentence(source, config.model))
    model = load_tuned(loaded.model, source)
    kinds: tuple[Which, ...] = ("tuned",) if waiting is None else ("tuned", "base")
    return Subject(name, loaded.processor, config, model, kinds, waiting or {})


def _base_tensors(model: nn.Module, source: Path) -> dict[str, Tensor] | None:
    """Copies of what the tuned weights will overwrite, in host memory; None where they would not fit."""
    if not (source / TRAINED_WEIGHTS).is_file():
        return {}
    with safe_open(source / TRAINED_WEIGHTS, "pt") as file:
        names = set(file.keys())
    places = {name: parameter for name, parameter in _places(model).items() if name in names}
    if sum(parameter.nbytes for parameter in places.values()) > HOST_SHARE * _free_host_bytes():
        return None
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in places.items()}


def _no_room_sentence(source: Path, base: str) -> str:
    gib = (source / TRAINED_WEIGHTS).stat().st_size / GIB
    return (
        f"Only the tuned model answers: it trained {gib:.1f} GiB of own weights, and the base's version of them is over "
        f"{HOST_SHARE:.0%} of the {_free_host_bytes() / GIB:.1f} GiB of free host memory. For the base, serve {base}."
    )


@torch.no_grad()
def _exchange(model: nn.Module, waiting: dict[str, Tensor]) -> None:
    """The waiting tensors into the model, and what was there into their place, one by one."""
    places = _places(model)
    for name, coming in waiting.items():
        leaving = places[name].detach().to("cpu", copy=True)
        places[name].copy_(coming)
        coming.copy_(leaving)


def _places(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): p for name, p in model.named_parameters() if not is_adapter(name)}


def _free_host_bytes() -> int:
    """What the system could hand out: Linux counts in what it only keeps of files; elsewhere, what nobody uses."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
