"""One generation at a time, because there is one set of weights; whoever comes meanwhile waits in a line of bounded length."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from lensmith.serve.generate import Answer
from lensmith.serve.refusal import Refused


class Work(Protocol):
    def __call__(self, *, on_text: Callable[[str], None], stop: threading.Event) -> Answer: ...


class Line:
    """Lives in the server's event loop; the work itself is done in one thread."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.inside = 0
        """Requests being answered or waiting."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="answers")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line. Raises Refused where it is full."""
        if self.inside > self.max_waiting:
            raise Refused(
                429,
                "line_full",
                f"one question is being answered and {self.max_waiting} wait, which is all that may; ask again in a moment.",
                headers={"Retry-After": "1"},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def pieces(self, work: Work) -> AsyncGenerator[str | Answer, None]:
        """The text as it is made, then the answer. Closing it stops the work, and returns when the thread is free again."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        made: asyncio.Queue[str | None] = asyncio.Queue()

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(made.put_nowait, piece)

        job = self._worker.submit(work, on_text=tell, stop=stop)
        job.add_done_callback(lambda _: tell(None))
        try:
            while (piece := await made.get()) is not None:
                yield piece
            yield job.result()
        finally:
            stop.set()
            if not job.cancel() and not job.done():
                await asyncio.wait({asyncio.wrap_future(job)})


async def while_connected(receive: Any, work: Any) -> None:
    """Do the work; where the caller goes away first, cancel it and wait until it has cleaned up."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        done = tasks[0].done()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if done:
        tasks[0].result()
