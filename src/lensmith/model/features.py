"""Features of pictures: each distinct one computed once per pack, and with a store once per run or for good.

What a frozen tower makes of a picture never changes, so it can be kept: in host memory (`RamStore`) or on disk
(`DiskStore`), least recently used out first. What is kept is the tower's own numbers in its own type, so a picture found is
bit for bit the picture computed. (Computed again among other pictures it may differ in the last bit: products over another
number of rows are rounded in another order.)

Features are large, (deepstack levels + 1) x width x 2 bytes per token: 32 KiB for 8B, 20 for 4B, 16 for 2B, where the pixels
are 12. Keeping them pays where a copy of that is quicker than the tower, and where a fair share of all pictures has room.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lensmith.config.tree import Memory
from lensmith.errors import ConfigError
from lensmith.model.vision import ImageFeatures, encode_images
from lensmith.rundir import explain_full_disk
from lensmith.types import Pack, counted

GIB = 2**30

TOWER_PATCHES = 16_384
"""Patches that go through the tower together. Frozen, it needs about 31 KB per patch in bf16 (8B: a row of 1,152 six times
over and its MLP's 4,304 twice), so half a GiB however many pictures a pack has; and products of this size keep a GPU busy."""

PAGE_TOKENS = 64
"""Tokens of one page of a RamStore: half a page is lost per picture, 3 % of one with 1,000 tokens."""
SLAB_BYTES = 2**28
"""Pages are page-locked this many bytes at a time: locking is slow, and torch rounds each such block up to a power of two."""

DISK_SLACK = 32
"""A DiskStore looks at its folder again after writing this share of its budget: other processes may be writing too."""
ABANDONED_S = 3600.0
"""A part of a file this old belongs to a process that is gone."""

Kept = Float[Tensor, "levels tokens width"]
"""Features of one picture: its tokens, then one level per deepstack merger."""


class FeatureStore(ABC):
    """Keeps features by the digest of the picture, within a budget, and counts how often that helped."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.hits = self.misses = 0

    def get(self, digest: str, device: torch.device) -> Kept | None:
        """Features of that picture on the device, or None."""
        found = self._read(digest, device)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    @abstractmethod
    def put(self, digest: str, features: Kept) -> None:
        """Keep a copy, if there is room or room can be made."""

    @abstractmethod
    def sentence(self) -> str:
        """What it came to, for the end of a run."""

    @abstractmethod
    def _read(self, digest: str, device: torch.device) -> Kept | None: ...

    def _share_found(self) -> str:
        asked = self.hits + self.misses
        return f"{self.hits:,} of {counted(asked, 'picture')} found" if asked else "no picture was asked for"


class RamStore(FeatureStore):
    """In host memory, in pages of equal size, so that pictures of all sizes can follow each other in the same place."""

    def __init__(self, budget_bytes: int, *, pinned: bool = False) -> None:
        """`pinned`: page-locked, so that copies to a GPU do not wait."""
        super().__init__(budget_bytes)
        self._pinned = pinned
        self._held: OrderedDict[str, tuple[int, list[Tensor]]] = OrderedDict()
        self._free: list[Tensor] = []
        self._taken_bytes = self._let_go = 0

    def put(self, digest: str, features: Kept) -> None:
        tokens = features.shape[1]
        num_pages = -(-tokens // PAGE_TOKENS)
        if digest in self._held or not self._make_room(num_pages, features):
            return
        pages = [self._free.pop() for _ in range(num_pages)]
        padded = F.pad(features.detach(), (0, 0, 0, num_pages * PAGE_TOKENS - tokens))
        for page, part in zip(pages, padded.split(PAGE_TOKENS, dim=1), strict=True):
            # No wait: whoever reads the page copies it on the same stream, behind this.
            page.copy_(part.contiguous(), non_blocking=self._pinned)
        self._held[digest] = tokens, pages

    def sentence(self) -> str:
        held = sum(page.nbytes for _, pages in self._held.values() for page in pages)
        told = f"Image features: {self._share_found()} in host memory, which holds {held / GIB:.3g} GiB of them"
        return (
            f"{told}; {self._let_go:,} had to make room. Raise memory.vision_cache_gib." if self._let_go else f"{told}."
        )

    def _read(self, digest: str, device: torch.device) -> Kept | None:
        if digest not in self._held:
            return None
        self._held.move_to_end(digest)
        tokens, pages = self._held[digest]
        return torch.cat([page.to(device, non_blocking=True) for page in pages], dim=1)[:, :tokens]

    def _make_room(self, num_pages: int, features: Kept) -> bool:
        """Whether so many pages are free, after taking more memory or letting go of what was not used for longest."""
        page_bytes = features[:, :1].nbytes * PAGE_TOKENS
        if num_pages * page_bytes > self.budget_bytes:
            return False
        while len(self._free) < num_pages:
            room = min(SLAB_BYTES, self.budget_bytes - self._taken_bytes) // page_bytes
            if room:
                shape = (room, len(features), PAGE_TOKENS, features.shape[2])
                slab = torch.empty(shape, dtype=features.dtype, pin_memory=self._pinned)
                self._taken_bytes += slab.nbytes
                self._free += slab.unbind()
            elif self._held:
                _, (_, pages) = self._held.popitem(last=False)
                self._free += pages
                self._let_go += 1
            else:
                return False
        return True


class DiskStore(FeatureStore):
    """On disk, one file per picture, for later runs as well; several processes may use one folder."""

    def __init__(self, budget_bytes: int, folder: Path, tower: nn.Module) -> None:
        """`tower`: with its mergers; features of other weights are not found.

        Raises ConfigError where the folder cannot be made.
        """
        super().__init__(budget_bytes)
        self.folder = folder
        self._own = folder / weights_digest(tower)
        self._written_bytes = 0
        self._full: str | None = None
        try:
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise ConfigError(
                f"memory.vision_cache_dir={folder}: no folder can be made there ({cause.strerror}). Name another one, or "
                "set memory.vision_cache_dir=null to keep features in host memory."
            ) from cause
        self._make_room()

    def put(self, digest: str, features: Kept) -> None:
        if self._full is not None:
            return
        handle, part = tempfile.mkstemp(dir=self._own, suffix=".part")
        os.close(handle)
        try:
            save_file({"features": features.detach().cpu().contiguous()}, part)
            Path(part).replace(self._path(digest))
        except (OSError, SafetensorError) as cause:
            self._full = explain_full_disk(cause, self.folder)
            if self._full is None:
                raise
            return
        finally:
            Path(part).unlink(missing_ok=True)
        self._written_bytes += features.nbytes
        if self._written_bytes > self.budget_bytes // DISK_SLACK:
            self._make_room()

    def sentence(self) -> str:
        found = f"Image features: {self._share_found()} in {self.folder}."
        return found if self._full is None else f"{found} Not all could be kept. {self._full}"

    def _path(self, digest: str) -> Path:
        return self._own / f"{digest}.safetensors"

    def _read(self, digest: str, device: torch.device) -> Kept | None:
        path = self._path(digest)
        try:
            found = load_file(path)["features"]
            os.utime(path)  # used just now: the last to go
        except FileNotFoundError:  # never there, or another process has made room
            return None
        except (SafetensorError, KeyError):  # not written by us, or the disk has lost a part: compute it again
            path.unlink(missing_ok=True)
            return None
        return found.to(device)

    def _make_room(self) -> None:
        """Remove what was not used for longest, and what processes that are gone have left half-written."""
        self._written_bytes, files = 0, []
        for path in self.folder.rglob("*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process makes room at the same moment
                continue
            if path.suffix == ".part" and found.st_mtime < time.time() - ABANDONED_S:
                path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                files.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in files) - (self.budget_bytes - self.budget_bytes // DISK_SLACK)
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def open_features(memory: Memory, tower: nn.Module, device: torch.device) -> FeatureStore | None:
    """The store that the settings ask for; None without one, or where tower or mergers train and features change.

    Raises ConfigError where the folder cannot be made.
    """
    if memory.vision_cache_gib is None or any(parameter.requires_grad for parameter in tower.parameters()):
        return None
    budget_bytes = int(memory.vision_cache_gib * GIB)
    if memory.vision_cache_dir is not None:
        return DiskStore(budget_bytes, memory.vision_cache_dir, tower)
    return RamStore(budget_bytes, pinned=device.type == "cuda")


def weights_digest(tower: nn.Module) -> str:
    """Of all weights with their names and types: equal towers give equal features."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def image_features(
    tower: Any,
    pack: Pack,
    device: torch.device,
    store: FeatureStore | None = None,
    *,
    recompute: bool = False,
    tower_patches: int = TOWER_PATCHES,
) -> ImageFeatures:
    """Features of the pack's pictures, in the order of its image tokens; equal pictures go through the tower once.

    Pictures in the `store` do not go through it at all. The others do in groups of at most `tower_patches` patches, which
    bounds a frozen tower's memory and changes nothing: pictures do not see each other.
    """
    names = pack.pictures or tuple(map(str, range(len(pack.grids))))
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    found: dict[str, Kept] = {}
    if store is not None and pack.pictures:
        found = {name: kept for name in first if (kept := store.get(name, device)) is not None}
    missing = [number for number, name in enumerate(names) if first[name] == number and name not in found]
    patches = pack.grids.prod(-1).tolist()
    tokens = [count // tower.spatial_merge_size**2 for count in patches]
    parts = [ImageFeatures(kept[0], tuple(kept[1:])) for kept in found.values()]
    for group in _groups(missing, patches, tower_patches):
        part = encode_images(tower, _pixels(pack, group, patches, device), pack.grids[group], recompute=recompute)
        if store is not None and pack.pictures:
            _keep(store, part, [names[number] for number in group], [tokens[number] for number in group])
        parts.append(part)
    laid = [*found, *(names[number] for number in missing)]
    return _arrange(parts, _token_rows(names, laid, {name: tokens[number] for name, number in first.items()}))


def _groups(numbers: Sequence[int], patches: Sequence[int], most: int) -> Iterator[list[int]]:
    """The pictures in order, in groups of at most so many patches; a larger picture alone."""
    group: list[int] = []
    for number in numbers:
        if group and sum(patches[member] for member in group) + patches[number] > most:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _pixels(
    pack: Pack, group: Sequence[int], patches: Sequence[int], device: torch.device
) -> Float[Tensor, "patches values"]:
    """Pixels of those pictures on the device; each run of neighbours is one copy, straight from page-locked memory."""
    stops = list(itertools.accumulate(patches))
    spans: list[list[int]] = []
    for number in group:
        start, stop = stops[number] - patches[number], stops[number]
        if spans and spans[-1][1] == start:
            spans[-1][1] = stop
        else:
            spans.append([start, stop])
    return _joined([pack.pixels[start:stop].to(device, non_blocking=True) for start, stop in spans])


def _keep(store: FeatureStore, part: ImageFeatures, names: Sequence[str], tokens: Sequence[int]) -> None:
    levels = torch.stack([part.tokens, *part.deepstack])
    for name, kept in zip(names, levels.split(list(tokens), dim=1), strict=True):
        store.put(name, kept)


def _token_rows(names: Sequence[str], laid: Sequence[str], tokens: Mapping[str, int]) -> np.ndarray:
    """Where the rows of each picture stand, when the distinct ones are laid end to end."""
    stops = dict(zip(laid, itertools.accumulate(tokens[name] for name in laid), strict=True))
    return np.concatenate([np.arange(stops[name] - tokens[name], stops[name]) for name in names])


def _arrange(parts: Sequence[ImageFeatures], rows: np.ndarray) -> ImageFeatures:
    tokens = _joined([part.tokens for part in parts])
    deepstack = tuple(map(_joined, zip(*(part.deepstack for part in parts), strict=True)))
    if len(rows) == len(tokens) and (rows[:-1] < rows[1:]).all():
        return ImageFeatures(tokens, deepstack)
    index = torch.from_numpy(rows).to(tokens.device, non_blocking=True)
    return ImageFeatures(tokens[index], tuple(level[index] for level in deepstack))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
