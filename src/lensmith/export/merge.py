"""An adapter, and weights that were trained themselves, into the base: tensor by tensor, under the base's own names and types.

Two numbers are measured for each tensor that changes. Rounding: the result is stored in the base's type, and bf16's eight
bits may lose part of a small change. NF4: a qlora run trained beside weights that NF4 had altered, and merging into the
full-precision ones gives a model that is near, not equal to, the one that was trained; `nf4-dequantised` gives the equal
one, at the price of NF4's error in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError, ModelError
from lensmith.export.base import EMBEDDING, HEAD, Base, copy_files, open_base
from lensmith.export.changes import Change, read_changes
from lensmith.export.tensors import (
    FILE_BYTES,
    Entry,
    Rows,
    file_names,
    piece_of,
    pieces,
    plan_files,
    write_header,
    write_index,
    write_values,
)
from lensmith.export.whole import check_replaceable, check_space, size, write_record, written_whole
from lensmith.model.adapters import TRAINED_WEIGHTS, find_tuned, inherited_names
from lensmith.rundir import RunDir
from lensmith.types import counted

Into = Literal["base", "nf4-dequantised"]
Progress = Callable[[int, int], None]
"""Called with tensors written so far and tensors in all."""

SMALL_FILES_BYTES = 64 * 2**20
"""Room for tokenizer, template and configuration beside the weights."""
MUCH_LOST = 0.1
"""Share of a change lost to rounding from which it is said."""


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """How one tensor of the merged model differs from the base's. All numbers are ratios of Frobenius norms."""

    name: str
    kind: Literal["lora", "dora", "trained", "kept"]
    """`kept`: not trained, listed because it was in NF4 while others were."""
    change: float
    """The trained change, before rounding, over the base."""
    lost: float
    """What storing it in the base's type rounds away, over the change; 0 where nothing changed."""
    nf4: float | None
    """Merged into full precision minus merged into what comes back from NF4, over the latter; None without NF4."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model on disk."""

    folder: Path
    base: str
    tuned: Path
    into: Into
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    changed: tuple[MergedTensor, ...]
    """Tensors that training changed or that were in NF4 meanwhile; all others are the base's, bit for bit."""
    seconds: float
    notes: tuple[str, ...]

    @property
    def nf4_error(self) -> float | None:
        """Root mean square over `changed` of the difference between the two ways to merge; None without NF4."""
        return _rms([tensor.nf4 for tensor in self.changed if tensor.nf4 is not None])

    @property
    def lost(self) -> float | None:
        """Root mean square share of the change that rounding took; None where nothing changed."""
        return _rms([tensor.lost for tensor in self.changed if tensor.change])

    def sentences(self) -> list[str]:
        trained = [tensor for tensor in self.changed if tensor.kind != "kept"]
        lines = [
            f"Merged {len(trained)} of {self.tensors} tensors of {self.base}, {size(self.nbytes)} "
            f"in {self.seconds:.1f} s; all others are the base's, bit for bit."
            if self.nf4_error is None or self.into == "base"
            else f"Merged {len(trained)} of {self.tensors} tensors into what NF4 left of {self.base}, "
            f"{size(self.nbytes)} in {self.seconds:.1f} s."
        ]
        if (lost := self.lost) is not None:
            lines.append(f"Storing the result in the base's type rounds away {lost:.2%} of the trained change.")
        if (error := self.nf4_error) is not None:
            worst = max((t for t in self.changed if t.nf4 is not None), key=lambda t: t.nf4 or 0)
            other = "the full-precision base" if self.into == "nf4-dequantised" else "what NF4 made of it"
            lines.append(
                f"Trained beside NF4 weights: merging into {other} instead would give weights that differ by "
                f"{error:.2%} (root mean square over {sum(t.nf4 is not None for t in self.changed)} linears), at most "
                f"{worst.nf4:.2%} in {worst.name}; what training changed is {_rms([t.change for t in trained]) or 0:.2%} "
                "of the weights. `lensmith eval` on both tells what it means for answers."
            )
        return [*lines, *self.notes]

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "tuned": str(self.tuned),
            "into": self.into,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 2),
            "lost": self.lost,
            "nf4_error": self.nf4_error,
            "notes": list(self.notes),
            "changed": [asdict(tensor) for tensor in self.changed],
        }


def merge_run(
    run: RunDir,
    tuned: Path,
    out: Path,
    *,
    into: Into = "base",
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
    finish: Callable[[Path, Merged], None] | None = None,
) -> Merged:
    """The tuned weights in `tuned` (a run, checkpoint or adapter folder) merged into the base of `run`, written to `out`.

    `out` holds the whole model: weights in files of about `file_bytes`, the base's other files, and the run's image limits
    in the processor. It appears whole or not at all; an earlier export there is replaced. `finish(folder, merged)` may add
    files before it appears.

    Raises:
        RunError: `out` holds something else, or the disk is full.
        ModelError: no tuned weights, or none that fit the base.
        ConfigError: `into` does not go with how the run was trained.
    """
    start = time.perf_counter()
    check_replaceable(out)
    config, source = run.read_config(), find_tuned(tuned)
    base = open_base(run, config)
    notes = _check_into(base, config, into)
    changes = read_changes(source)
    notes += _inherited_notes(source) + _check_fit(base, source, changes)
    files = plan_files(base.entries, file_bytes)
    nbytes = sum(entry.nbytes for entry in base.entries)
    check_space(out, nbytes + SMALL_FILES_BYTES)
    with written_whole(out) as folder:
        names = copy_files(base, run, config, folder)
        measured = _write_weights(folder, files, base, changes, into, progress)
        merged = Merged(
            folder=out,
            base=base.name,
            tuned=source,
            into=into,
            tensors=len(base.entries),
            nbytes=nbytes,
            files=tuple(names),
            changed=tuple(measured),
            seconds=time.perf_counter() - start,
            notes=tuple(notes + _noticed(measured)),
        )
        write_record(folder, {"to": "merged"} | merged.to_json())
        if finish is not None:
            finish(folder, merged)
    return merged


def _check_into(base: Base, config: RunConfig, into: Into) -> list[str]:
    if base.stored_in_four_bits:
        return [
            f"{base.name} is stored in 4 bits itself, so the merge is into its dequantised weights. For a merge into "
            "full precision name the 16-bit checkpoint as model in the run's config.yaml."
        ]
    if into == "nf4-dequantised" and config.tune.method != "qlora":
        raise ConfigError(
            f"--merge-into nf4-dequantised: this run has tune.method={config.tune.method}, so no weight was in NF4 while "
            "it trained. Leave the option out: the full-precision base is what was trained beside."
        )
    if config.tune.method == "lora_8bit":
        return [
            "Trained beside 8-bit weights and merged into the full-precision ones, which differ a little from them."
        ]
    return []


def _inherited_notes(source: Path) -> list[str]:
    if not (names := inherited_names(source / TRAINED_WEIGHTS)):
        return []
    return [f"{counted(len(names), 'tensor')} that an earlier run had trained are merged as well, first {min(names)}."]


def _check_fit(base: Base, source: Path, changes: dict[str, Change]) -> list[str]:
    """Every change has a tensor of its shape in the base; a tied head written out in the base's files follows the embedding."""
    entries = {entry.name: entry for entry in base.entries}
    if base.tied and HEAD in changes:
        raise ModelError(
            f"{source}: trained {HEAD} apart from the embedding, while {base.name} says tie_word_embeddings=true, which "
            "would drop one of them on loading. Train from a base whose config.json has tie_word_embeddings=false."
        )
    if extra := sorted(set(changes) - set(entries)):
        raise ModelError(
            f"{source}: {len(extra)} of its {len(changes)} changed tensors are not in {base.name}, first {extra[0]}. "
            "It was made for another model; set model to that one in the run's config.yaml."
        )
    for name, change in changes.items():
        if tuple(change.shape) != entries[name].shape:
            raise ModelError(
                f"{source}: {name} is {list(change.shape)} there and {list(entries[name].shape)} in {base.name}. "
                "It was made for a model of another size; set model to that one in the run's config.yaml."
            )
    if base.tied and HEAD in entries and EMBEDDING in changes:
        changes[HEAD] = changes[EMBEDDING]
        return [f"{base.name} also stores its tied head; it was written equal to the trained embedding."]
    return []


def _write_weights(
    folder: Path,
    files: Sequence[Sequence[Entry]],
    base: Base,
    changes: Mapping[str, Change],
    into: Into,
    progress: Progress | None,
) -> list[MergedTensor]:
    """All files and their index; what was measured of the tensors that are not simply copied."""
    measured: list[MergedTensor] = []
    done, total = 0, sum(map(len, files))
    for file_name, entries in zip(file_names(len(files)), files, strict=True):
        with (folder / file_name).open("wb") as file:
            write_header(file, entries)
            for entry in entries:
                found = _write_tensor(file, entry, base, changes.get(entry.name), into)
                measured += [] if found is None else [found]
                done += 1
                if progress is not None:
                    progress(done, total)
    write_index(folder, files)
    return measured


def _write_tensor(file: BinaryIO, entry: Entry, base: Base, change: Change | None, into: Into) -> MergedTensor | None:
    """One tensor, changed or copied; what was measured on the way, None for one that is simply copied."""
    four_bit = base.was_four_bit(entry.name)
    full: Rows = base.rows(entry.name)
    if change is None and not four_bit:
        for piece in pieces(entry.shape):
            write_values(file, piece_of(full, piece))
        return None
    dequantised = base.dequantised(entry.name) if four_bit else None
    wide = torch.promote_types(entry.dtype, torch.float32)
    sums = _Sums()
    for piece in pieces(entry.shape):
        into_full = sums.merge(piece_of(full, piece).to(wide), change, piece)
        values = into_full
        if dequantised is not None:
            into_nf4 = _apply(change, dequantised[piece].to(wide), piece)
            sums.compare(into_full, into_nf4)
            values = into_nf4 if into == "nf4-dequantised" else into_full
        stored = values.to(entry.dtype)
        sums.rounded(values, stored)
        write_values(file, stored)
    return sums.measured(entry.name, "kept" if change is None else change.kind)


def _apply(change: Change | None, base: Tensor, rows: slice) -> Tensor:
    return base if change is None else change.apply(base, rows)


class _Sums:
    """Squares summed over the pieces of one tensor."""

    def __init__(self) -> None:
        self._base = self._change = self._lost = self._nf4 = self._apart = 0.0

    def merge(self, base: Tensor, change: Change | None, rows: slice) -> Tensor:
        merged = _apply(change, base, rows)
        self._base += _square(base)
        self._change += _square(merged - base)
        return merged

    def compare(self, full: Tensor, nf4: Tensor) -> None:
        self._nf4 += _square(nf4)
        self._apart += _square(full - nf4)

    def rounded(self, values: Tensor, stored: Tensor) -> None:
        self._lost += _square(stored.to(values.dtype) - values)

    def measured(self, name: str, kind: Any) -> MergedTensor:
        return MergedTensor(
            name,
            kind,
            change=_ratio(self._change, self._base),
            lost=_ratio(self._lost, self._change),
            nf4=_ratio(self._apart, self._nf4) if self._nf4 else None,
        )


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def _rms(values: list[float]) -> float | None:
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else None


def _noticed(measured: list[MergedTensor]) -> list[str]:
    trained = [tensor for tensor in measured if tensor.kind != "kept"]
    notes = []
    if still := [tensor.name for tensor in trained if tensor.change == 0]:
        notes.append(
            f"Warning: {len(still)} of {len(trained)} trained tensors equal the base's, first {still[0]}: they got no update."
        )
    if coarse := [tensor for tensor in trained if tensor.change and tensor.lost > MUCH_LOST]:
        worst = max(coarse, key=lambda tensor: tensor.lost)
        notes.append(
            f"Warning: in {len(coarse)} of {len(trained)} tensors rounding takes more than {MUCH_LOST:.0%} of the trained "
            f"change, at most {worst.lost:.0%} in {worst.name}. The adapter itself (--to adapter) loses nothing."
        )
    return notes
