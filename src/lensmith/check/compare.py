"""Rows compared with each other, by keys of eight bytes: copies, near copies, conflicts, and leaks.

All of it is sorting, so a million rows take seconds. Each function says which row goes with which: a report that names only
one of two copies leaves the search to its reader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lensmith.check.keys import NOTHING

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt64

NEAR_BITS = 3
"""Bits in which the hashes of two pictures that look the same may differ. 300 pictures saved again as JPEG of quality 40, at
half and at one and a half times the size changed at most 3 of 64 bits in 998 of 1,000 cases; two unrelated pictures
differed in 16 bits or more, always."""
NEAR_COLOUR = 8
"""Levels of 256 by which their mean colours may differ, in each of red, green and blue."""
NUM_BANDS = NEAR_BITS + 1
"""Hashes that differ in NEAR_BITS bits are equal in one of so many bands, so near ones meet when sorted by each band."""
NEIGHBOURS = 16
"""Rows compared with in such an order. Only where more rows than this say the same and agree in a band can one be missed."""


def find_copies(keys: UInt64[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """For each row, the first one with its key: itself, unless it is a copy."""
    _, first, of_key = np.unique(keys, return_index=True, return_inverse=True)
    return first[of_key]


def find_conflicts(
    asked: UInt64[np.ndarray, " rows"], answered: UInt64[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " rows"], int]:
    """For each row, one that answers the same question differently, or itself; and how many questions those are.

    Rows with asked == NOTHING have no question to share.
    """
    other = np.arange(len(asked))
    candidates = np.flatnonzero(asked != NOTHING)
    order = candidates[np.lexsort((answered[candidates], asked[candidates]))]
    _, starts, of_question, sizes = np.unique(asked[order], return_index=True, return_inverse=True, return_counts=True)
    first, last = order[starts], order[starts + sizes - 1]
    torn = answered[first] != answered[last]  # sorted by answer within a question
    of_first = answered[order] == answered[first][of_question]
    other[order] = np.where(torn[of_question], np.where(of_first, last[of_question], first[of_question]), order)
    return other, int(torn.sum())


def find_near_copies(
    said: UInt64[np.ndarray, " rows"],
    bits: UInt64[np.ndarray, " rows"],
    colours: Int[np.ndarray, " rows"],
) -> Int[np.ndarray, " rows"]:
    """For each row, the earliest one that says the same about a picture that looks the same; itself, if there is none.

    Args:
        said: equal where the texts are the same.
        bits: difference hash of the row's only picture.
        colours: its mean colour, 0xRRGGBB.
    """
    earliest = np.arange(len(said))
    width = 64 // NUM_BANDS
    for band in range(NUM_BANDS):
        part = (bits >> np.uint64(band * width)) & np.uint64((1 << width) - 1)
        order = np.lexsort((bits, part, said))
        for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-step], order[step:]
            near = (said[one] == said[other]) & (np.bitwise_count(bits[one] ^ bits[other]) <= NEAR_BITS)
            near &= _alike(colours[one], colours[other])
            one, other = one[near], other[near]
            np.minimum.at(earliest, np.maximum(one, other), np.minimum(one, other))
    return earliest


def find_leaks(
    train_contents: UInt64[np.ndarray, " train_pictures"], test_contents: UInt64[np.ndarray, " test_pictures"]
) -> tuple[Int[np.ndarray, " leaks"], Int[np.ndarray, " leaks"]]:
    """Pictures of the test side that are also on the train side, and for each the first such picture there."""
    contents, first = np.unique(train_contents, return_index=True)
    leaked = np.flatnonzero(np.isin(test_contents, contents))
    return leaked, first[np.searchsorted(contents, test_contents[leaked])]


def _alike(one: Int[np.ndarray, " rows"], other: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    alike = np.ones(len(one), bool)
    for shift in (0, 8, 16):
        alike &= np.abs((one >> shift & 0xFF) - (other >> shift & 0xFF)) <= NEAR_COLOUR
    return alike
