"""math-verify in a process of its own, so that a formula that never ends costs seconds and not the run.

sympy evaluates as it parses: `9^{9^{9^9}}` is one multiplication of big integers, which no signal interrupts and which fills
the memory. A process can be killed, from any thread, and its memory is bounded. It starts with the first formula (two seconds,
nearly all of it sympy), takes one line of JSON per comparison, ends with the program, and never sees more than two short texts.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
import threading
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_S = 2
"""Seconds of processor time for one comparison, so that a busy machine judges as an idle one; whole ones, as the system counts.
Where it does not, of the clock."""
MOST_WAIT_S = 30.0
"""Of the clock, on a machine however busy."""
MOST_BYTES = 4 << 30
"""Address space of the process, where the system can bound it."""


class MathProcess:
    """Compares formulas one at a time; threads take turns, and a forked process starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def equal(self, answer: str, reference: str) -> bool:
        """Whether math-verify finds the formulas equal; False where that takes more than `MOST_S` or `MOST_BYTES`.

        Raises:
            RuntimeError: The process did not start; the message holds what it printed.
        """
        with self._lock:
            process = self._running()
            assert process.stdin
            assert process.stdout
            too_long = threading.Timer(MOST_WAIT_S if resource else MOST_S, process.kill)
            too_long.daemon = True
            too_long.start()
            try:
                process.stdin.write(json.dumps([answer, reference]) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            finally:
                too_long.cancel()
            if not said:  # killed over this formula; what is dying must not be given the next one
                self.close()
            return said.strip() == "true"

    def close(self) -> None:
        """Ends the process; the next comparison starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[str]:
        alive = self._process is not None and self._owner == os.getpid() and self._process.poll() is None
        if not alive:
            self.close()
            self._process, self._owner = _start(), os.getpid()
        assert self._process is not None
        return self._process


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        start_new_session=True,  # Ctrl-C belongs to the run, which ends this process itself
    )  # fmt: skip
    assert process.stdout
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(
            f"the process that compares formulas did not start: {process.communicate()[1].strip()[-400:]}"
        )
    return process


def _serve() -> None:
    """Answers `[answer, reference]` lines with true or false until the other end closes."""
    import math_verify

    if resource is not None:
        _limit(resource.RLIMIT_AS, MOST_BYTES)
        _limit(resource.RLIMIT_CORE, 0)
    targets = (math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig())

    def parse(text: str) -> list[Any]:
        return math_verify.parse(f"\\boxed{{{text}}}", extraction_config=targets, parsing_timeout=None)  # type: ignore[arg-type]

    math_verify.verify(parse("x+1"), parse("1+x"), timeout_seconds=None)  # what sympy loads late is not counted either
    print("ready", flush=True)
    # Nobody reads the warnings that follow, and a full pipe would stop this process.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    for line in sys.stdin:
        answer, reference = json.loads(line)
        if resource is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + MOST_S)
        try:
            meant, said = parse(reference), parse(answer)
            equal = bool(meant and said and math_verify.verify(meant, said, timeout_seconds=None))
        except MemoryError:
            equal = False
        print("true" if equal else "false", flush=True)


def _limit(kind: int, most: int) -> None:
    assert resource is not None, "asked only where there is one"
    resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


math_process = MathProcess()
"""The one of this program."""
atexit.register(math_process.close)

if __name__ == "__main__":
    _serve()
