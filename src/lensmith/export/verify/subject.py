"""The run under test: what its checks share while they run, and what its settings say about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lensmith.config.tree import RunConfig
from lensmith.data.encode import Encoder
from lensmith.evals.predict import Progress
from lensmith.export.verify.agree import Logits
from lensmith.export.verify.check import Check, Name, Stopwatch
from lensmith.export.verify.material import Material, find_material, image_prompts
from lensmith.export.verify.served import Endpoint
from lensmith.export.whole import RECORD
from lensmith.model.adapters import TRAINED_WEIGHTS, inherited_names
from lensmith.model.load import choose_device, choose_precision, load_processor, local_folder
from lensmith.model.names import read_architecture
from lensmith.model.quant import BITS, is_quantised_checkpoint
from lensmith.model.stream import FileShards
from lensmith.rundir import RunDir
from lensmith.types import Encoded, Sample

Say = Callable[[Any], None]


@dataclass(slots=True)
class Subject:
    """What the checks share while they run."""

    config: RunConfig
    tuned: Path
    base: Path
    tied: bool
    """Whether the head is the embedding."""
    stored_in_four_bits: bool
    """The base on disk."""
    device: torch.device
    dtype: torch.dtype
    encoder: Encoder
    processor: Any
    material: Material
    samples: list[Sample]
    """PROMPTS image prompts."""
    origin: str
    """Where those are from."""
    questions: int
    endpoint: Endpoint | None
    say: Say
    progress: Progress | None
    watch: Stopwatch = field(default_factory=Stopwatch)
    checks: dict[Name, Check] = field(default_factory=dict)
    forms: dict[str, Logits] = field(default_factory=dict)
    base_answers: list[str] = field(default_factory=list)
    """The base's answers to the image prompts, where there is a server to compare."""

    def settle(self, check: Check) -> None:
        """Keep a verdict."""
        self.checks[check.name] = check

    @property
    def prompts(self) -> list[Encoded]:
        """The image prompts with their answers, where they have some: what follows a question is compared too."""
        encode = self.encoder
        return [encode.encode(one) if one.answer else encode.encode_prompt(one) for one in self.samples]

    @property
    def few_bits(self) -> bool:
        """Whether the run kept weights of the base in few bits, so that its adapter corrected their rounding as well."""
        return self.config.tune.method in BITS

    def inherited(self) -> tuple[str, ...]:
        """Tensors that the run that this one went on from had trained itself, as the tuned folder has them."""
        return inherited_names(self.tuned / TRAINED_WEIGHTS)


def open_subject(
    run: RunDir, tuned: Path, questions: int, endpoint: Endpoint | None, say: Say, progress: Progress | None
) -> Subject:
    config, device = run.read_config(), choose_device()
    architecture = read_architecture(config.model)
    processor = load_processor(config.model)
    encoder = Encoder.from_processor(processor, config.data.image, config.data.video)
    say(f"Verifying {tuned}, tuned from {config.model}.")
    material = find_material(config, encoder, device)
    samples, origin = image_prompts(material, config.seed)
    return Subject(
        config=config,
        tuned=tuned,
        base=local_folder(config.model),
        tied=bool(architecture.tie_word_embeddings),
        stored_in_four_bits=is_quantised_checkpoint(architecture),
        device=device,
        dtype=choose_precision(config.precision, device),
        encoder=encoder,
        processor=processor,
        material=material,
        samples=samples,
        origin=origin,
        questions=questions,
        endpoint=endpoint,
        say=say,
        progress=progress,
    )


def is_dequantised(folder: Path) -> bool:
    """Whether the merged model was made from the base as 4-bit storage rounds it, as its export wrote down."""
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("into") == "nf4-dequantised"


def stored_dtype(folder: Path) -> torch.dtype:
    """The coarsest floating type of a model folder's weights."""
    shards = FileShards(folder)
    found = {shards.get(name).dtype for name in shards.names()}
    return max((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
