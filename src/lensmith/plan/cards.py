"""GPUs by name and by size: memory, arithmetic, and how fast bytes move. For times, and for `--gpu 24`.

Rates are the makers' for dense bf16 with fp32 sums (half of the figures "with sparsity"); how much of them is reached is
fitted, see lensmith.plan.coefficients. Sources: NVIDIA's data sheets of A100, L4, L40S, H100, H200, B200 and T4 and the
architecture papers GA102 (appendix A), AD102 (appendix A) and Blackwell RTX; PCIe counts one direction.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from dataclasses import dataclass, replace

from lensmith.errors import ConfigError

CONTEXT_GIB = 0.6
"""What CUDA itself takes on a card with one process, before torch has asked for anything, and a little for a screen."""
SPARE_SHARE = 0.03
"""Of a card's memory: what the driver keeps, and what a large request cannot get in one piece."""
DRIVER_TIMEOUT_S = 5
"""An answer takes a tenth of a second; a driver that is stuck gives none."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU."""

    name: str
    gib: float
    """As sold; what of it can be used is `usable_gib`."""
    bf16_tflops: float
    """10**12 operations a second."""
    memory_gbps: float
    """10**9 bytes a second."""
    pcie_gbps: float
    """10**9 bytes a second from host memory."""

    @property
    def usable_gib(self) -> float:
        """What torch may reserve."""
        return usable_gib(self.gib)


def usable_gib(gib: float) -> float:
    """What torch may reserve on a card of this size."""
    return gib * (1 - SPARE_SHARE) - CONTEXT_GIB


CARDS: tuple[Card, ...] = (
    Card("RTX 4060", 8, 30.2, 272, 16),
    Card("RTX 3060", 12, 25.5, 360, 32),
    Card("T4", 16, 65, 320, 16),
    Card("RTX 4060 Ti", 16, 44.1, 288, 16),
    Card("RTX 4080", 16, 97.5, 717, 32),
    Card("RTX 3090", 24, 71, 936, 32),
    Card("RTX 4090", 24, 165.2, 1008, 32),
    Card("A10", 24, 125, 600, 32),
    Card("L4", 24, 121, 300, 32),
    Card("RTX 5090", 32, 209.5, 1792, 64),
    Card("A100 40GB", 40, 312, 1555, 32),
    Card("RTX A6000", 48, 154.8, 768, 32),
    Card("RTX 6000 Ada", 48, 364.2, 960, 32),
    Card("L40S", 48, 362, 864, 32),
    Card("A100", 80, 312, 2039, 32),
    Card("H100", 80, 989.4, 3350, 64),
    Card("H200", 141, 989.4, 4800, 64),
    Card("B200", 180, 2250, 8000, 64),
)
BY_SIZE = {
    size: next(card for card in CARDS if card.name == name)
    for size, name in {
        8: "RTX 4060",
        12: "RTX 3060",
        16: "RTX 4060 Ti",
        24: "RTX 4090",
        40: "A100 40GB",
        48: "RTX A6000",
        80: "H100",
    }.items()
}
"""The card whose rates stand for a size, smallest first: `--gpu 24`."""


def find_card(wanted: str) -> Card:
    """A card by its size in GiB or its name. Raises ConfigError for others, with the nearest names."""
    if wanted.isdecimal() and int(wanted) in BY_SIZE:
        return BY_SIZE[int(wanted)]
    if (found := match_card(wanted)) is not None:
        return found
    near = difflib.get_close_matches(wanted.lower(), [card.name.lower() for card in CARDS], n=3, cutoff=0.3)
    names = ", ".join(card.name for card in CARDS if card.name.lower() in near)
    raise ConfigError(
        f"--gpu {wanted}: not one of {', '.join(map(str, BY_SIZE))} GiB, and no card of that name is listed"
        f"{f' (near: {names})' if names else ''}. For any other card give its memory, as in --gib 20."
    )


def match_card(name: str) -> Card | None:
    """The listed card that a name such as `NVIDIA A100-SXM4-40GB` or `4090` means: all words of one are in the other."""
    asked = _words(name)
    matches = [card for card in CARDS if _words(card.name) <= asked or asked <= _words(card.name)]
    return max(matches, key=lambda card: len(_words(card.name) & asked) - len(_words(card.name) - asked), default=None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[\W_]+", name.lower())) - {""}


def card_of_size(gib: float) -> Card:
    """A card of any size, with the rates of the listed size next below it (of the smallest, for less)."""
    likeness = max((size for size in BY_SIZE if size <= gib), default=min(BY_SIZE))
    if gib == likeness:
        return BY_SIZE[likeness]
    like = BY_SIZE[likeness]
    return Card(f"{gib:g} GiB", gib, like.bf16_tflops, like.memory_gbps, like.pcie_gbps)


def find_own_card() -> Card | None:
    """The first GPU of this machine, as its driver tells; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=DRIVER_TIMEOUT_S).stdout
        name, mib = told.splitlines()[0].rsplit(",", 1)
        gib = int(mib) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return replace(match_card(name) or card_of_size(gib), name=name, gib=round(gib, 1))
