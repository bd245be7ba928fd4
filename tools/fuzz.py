"""Feed the readers broken data until one of them stumbles: nothing but our own errors may come out, and in time.

    python tools/fuzz.py --cases 100000            # or --seconds 300; --seed 1; --target rows --target headers

Inputs are good ones, bent: bits flipped, spans cut, doubled, exchanged and mixed with other inputs, numbers made extreme,
words of the format put in. An input that makes our code take a line or a turn it never took joins those that are bent next
(`--guide` off takes the same inputs without looking, four times as fast). Every case can be repeated: it follows from the
seed and its number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tools.fuzz_targets import TARGETS, Target

from lensmith.errors import LensmithError

CASE_S = 5
"""Longer than any case may take; the largest inputs are a few hundred KiB."""
MAX_BYTES = 300_000
MAX_CORPUS = 2_000
EXTREMES = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"\xed\xa0\x80",
)


class Hang(Exception):
    """A case took over CASE_S."""


@dataclass
class Findings:
    """What came out of the cases."""

    cases: Counter[str] = field(default_factory=Counter)
    fine: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    stumbles: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Where it happened -> how to repeat it, and the input."""
    slowest_s: float = 0.0
    slowest: str = ""

    def table(self) -> str:
        lines = [f"{'target':<12}{'cases':>9}{'read':>9}{'refused':>9}"]
        lines += [f"{name:<12}{n:>9,}{self.fine[name]:>9,}{self.refused[name]:>9,}" for name, n in self.cases.items()]
        total = sum(self.cases.values())
        lines.append(f"{'all':<12}{total:>9,}{sum(self.fine.values()):>9,}{sum(self.refused.values()):>9,}")
        lines.append(f"slowest case {self.slowest_s:.2f} s ({self.slowest}); {len(self.stumbles)} kinds of stumble")
        return "\n".join(lines)


def bend(content: bytes, others: list[bytes], words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """A few small accidents."""
    bent = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(bent) + 1)
        end = min(len(bent), place + int(rng.paretovariate(0.7)))
        match rng.randrange(8):
            case 0:
                bent[place:end] = bytes(byte ^ (1 << rng.randrange(8)) for byte in bent[place:end][:8])
            case 1:
                del bent[place:end]
            case 2:
                bent[place:place] = bent[place:end] * rng.choice((1, 2, 50))
            case 3:
                del bent[place:]
            case 4:
                bent[place:place] = rng.choice(words or EXTREMES)
            case 5:
                bent[place:end] = rng.choice(EXTREMES)
            case 6:
                bent[place:end] = rng.randbytes(end - place if end - place < 100 else 4)
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                bent[place:end] = other[start : start + rng.randrange(1, 200)]
    return bytes(bent[:MAX_BYTES])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang inside the block when its time is over."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Trail:
    """Which turns our own code has taken: pairs of lines that followed one another."""

    def __init__(self) -> None:
        self.known: set[tuple[str, int, int]] = set()
        self.is_new = False
        self._ours: dict[str, bool] = {}

    def follow(self, action: Callable[[], Any]) -> None:
        """Run it; `is_new` says whether it took a turn that nothing before it took."""
        self.is_new = False
        sys.settrace(self._enter)
        try:
            action()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        ours = self._ours.get(name)
        if ours is None:
            ours = self._ours[name] = "lensmith/data" in name
        if not ours:
            return None
        last = frame.f_lineno

        def step(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            turn = (name, last, frame.f_lineno)
            if turn not in self.known:
                self.known.add(turn)
                self.is_new = True
            last = frame.f_lineno
            return step

        return step


class Fuzzer:
    """Bends inputs of one target after another and keeps account."""

    def __init__(self, targets: list[Target], folder: Path, *, seed: int, guide: bool) -> None:
        self.targets, self.folder, self.seed = targets, folder, seed
        self.trail = Trail() if guide else None
        self.corpora = {target.name: list(target.inputs) for target in targets}
        self.findings = Findings()

    def run(self, *, cases: int | None, seconds: float | None) -> Findings:
        """Stops at whichever comes first, or at Ctrl-C."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with suppress(KeyboardInterrupt):
            for number in itertools.count() if cases is None else range(cases):
                if deadline is not None and time.monotonic() >= deadline:
                    break
                self.try_one(self.targets[number % len(self.targets)], number)
        return self.findings

    def try_one(self, target: Target, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        corpus = self.corpora[target.name]
        content = bend(rng.choice(corpus), corpus, target.words, rng)
        label = f"{target.name}, seed {self.seed}, case {number}"
        started = time.monotonic()
        outcome = self._outcome(target, content, label)
        took = time.monotonic() - started
        found = self.findings
        found.cases[target.name] += 1
        found.fine[target.name] += outcome == "read"
        found.refused[target.name] += outcome == "refused"
        if took > found.slowest_s:
            found.slowest_s, found.slowest = took, label
        if self.trail and self.trail.is_new and len(corpus) < MAX_CORPUS:
            corpus.append(content)

    def _outcome(self, target: Target, content: bytes, label: str) -> str:
        def read() -> None:
            target.read(content, self.folder)

        try:
            with time_limit(CASE_S):
                self.trail.follow(read) if self.trail else read()
        except LensmithError as refusal:
            if not str(refusal).replace("\n", " ").isprintable():
                self._note(f"a sentence that cannot be printed: {str(refusal)[:120]!a}", label, content)
            return "refused"
        except (Exception, Hang) as stumble:  # noqa: BLE001 (to find the ones we did not think of)
            where = traceback.extract_tb(stumble.__traceback__)
            ours = [step for step in where if "lensmith" in step.filename] or list(where)
            last = ours[-1]
            self._note(
                f"{type(stumble).__name__}: {str(stumble)[:100]!a} at {Path(last.filename).name}:{last.lineno} {last.line}",
                label,
                content,
            )
            return "stumbled"
        return "read"

    def _note(self, what: str, label: str, content: bytes) -> None:
        self.findings.stumbles.setdefault(what, (label, content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guide", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--target", action="append", choices=sorted(target.name for target in TARGETS))
    parser.add_argument("--json", type=Path, help="write the counts there")
    wanted = parser.parse_args()
    targets = [target for target in TARGETS if not wanted.target or target.name in wanted.target]
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(targets, Path(folder), seed=wanted.seed, guide=wanted.guide)
        limit = 10_000 if wanted.cases is None and wanted.seconds is None else wanted.cases
        found = fuzzer.run(cases=limit, seconds=wanted.seconds)
    print(found.table())
    for what, (label, content) in found.stumbles.items():
        print(f"\n{what}\n  {label}: {content[:200]!r}")
    if wanted.json:
        wanted.json.write_text(json.dumps({"cases": found.cases, "refused": found.refused}, indent=1))
    return 1 if found.stumbles else 0


if __name__ == "__main__":
    sys.exit(main())
