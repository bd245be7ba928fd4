"""Work over many rows, a chunk at a time, by several processes; the results come in order, and Ctrl-C ends it at once.

    for found in in_chunks(measurer.measure, len(source)):
        ...                                     # found = measurer.measure(start, stop) for the next rows

What `work` returns crosses a process boundary: numbers belong in arrays, not in lists. Whoever stops asking (a break, an
exception, Ctrl-C) ends the processes with whatever they were doing, and keeps the results it has.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from lensmith.errors import RunError

T = TypeVar("T")

CHUNK_ROWS = 2_000
"""Rows per call of `work`: enough that handing them over costs nothing, few enough for a progress bar that moves."""
PARALLEL_ROWS = 20_000
"""From so many rows on, starting processes pays, where a row costs a fraction of a millisecond."""
AHEAD = 2
"""Chunks begun per process, so that none waits for the caller, and no more results lie about than that."""


def in_chunks(
    work: Callable[[int, int], T],
    num_rows: int,
    *,
    workers: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
    parallel_rows: int = PARALLEL_ROWS,
) -> Iterator[T]:
    """`work(start, stop)` for consecutive chunks of the rows 0 .. num_rows - 1, in order.

    Args:
        work: reads but never changes what it belongs to, because each process has a copy. It touches neither torch
            nor a GPU: the processes are forked. Where they cannot be (macOS, Windows), this process does all the work.
        workers: processes; None for one per core this process may use, 1 or less for none but this one.
        chunk_rows: rows per call; fewer where a row takes long, as when pictures are decoded.
        parallel_rows: fewer rows than that are not worth the start of processes.

    Raises:
        RunError: the system ended one of the processes, and what it was doing is lost.
    """
    spans = [(start, min(start + chunk_rows, num_rows)) for start in range(0, num_rows, chunk_rows)]
    processes = min(usable_cores() if workers is None else workers, len(spans))
    if processes <= 1 or num_rows < parallel_rows or sys.platform != "linux":
        yield from itertools.starmap(work, spans)
        return
    with _forked(work, processes) as pool:
        waiting: deque[Future[T]] = deque()
        for span in spans:
            waiting.append(pool.submit(_do, *span))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def usable_cores() -> int:
    """Cores that this process may run on, which in a container or under a scheduler are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _forked(work: Callable[[int, int], Any], processes: int) -> Iterator[ProcessPoolExecutor]:
    """Forked, so that starting costs nothing, `work` need not be picklable, and no __main__ guard is needed."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _adopt, (work,))
    try:
        yield pool
    except BrokenProcessPool as cause:
        raise RunError(
            f"one of {processes} processes that read rows was ended by the system, most often because memory ran out; "
            "close what else uses memory, or read in one process, with data.workers=1"
        ) from cause
    except BaseException:
        # The executor would let running chunks finish, which takes seconds where pictures are decoded.
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_adopted: list[Callable[[int, int], Any]] = []
"""In a worker process only: its work."""


def _adopt(work: Callable[[int, int], Any]) -> None:
    # Ctrl-C reaches every process of a terminal; only the parent answers, so that the screen shows no tracebacks of workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopted.append(work)


def _do(start: int, stop: int) -> Any:
    return _adopted[0](start, stop)
