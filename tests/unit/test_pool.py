"""Chunks come back in order from several processes, and whoever stops asking stops them at once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from lensmith.data.pool import AHEAD, in_chunks
from lensmith.errors import RowError, RunError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
two = partial(in_chunks, workers=2, parallel_rows=1, chunk_rows=10)


def rows_and_process(start: int, stop: int) -> tuple[range, int]:
    time.sleep(0.01)
    return range(start, stop), os.getpid()


@pytest.mark.parametrize("num_rows", [0, 1, 10, 95, 100])
@pytest.mark.parametrize("workers", [0, 1, 2, None])
def test_chunks_are_all_rows_in_order(num_rows, workers):
    chunks = list(in_chunks(rows_and_process, num_rows, workers=workers, chunk_rows=10, parallel_rows=1))
    assert [row for rows, _ in chunks for row in rows] == list(range(num_rows))
    assert all(len(rows) == 10 for rows, _ in chunks[:-1])


@linux_only
def test_several_processes_share_the_work_unless_there_is_little_of_it():
    several = {process for _, process in two(rows_and_process, 200)}
    assert len(several) == 2
    assert os.getpid() not in several
    assert {process for _, process in two(rows_and_process, 200, parallel_rows=201)} == {os.getpid()}


@linux_only
def test_no_more_than_a_few_results_wait_for_a_slow_caller(tmp_path):
    def leave_a_mark(start, stop):
        (tmp_path / str(start)).touch()

    chunks = two(leave_a_mark, 1000)
    next(chunks)
    time.sleep(0.3)
    assert len(list(tmp_path.iterdir())) <= 2 * AHEAD + 2
    chunks.close()


@linux_only
def test_what_work_raises_is_raised_here():
    def refuse(start, stop):
        raise RowError(f"rows.jsonl:{start}", "not_json", "is no row.")

    with pytest.raises(RowError, match=r"rows\.jsonl:0: is no row\.") as caught:
        list(two(refuse, 100))
    assert caught.value.code == "not_json"
    assert multiprocessing.active_children() == []


@linux_only
def test_processes_end_when_the_caller_stops_asking():
    chunks = two(lambda start, stop: time.sleep(60 if start > 10 else 0), 100)
    next(chunks)
    started = time.monotonic()
    chunks.close()
    assert time.monotonic() - started < 1
    assert multiprocessing.active_children() == []


@linux_only
def test_a_process_that_the_system_ends_is_said_with_the_way_out():
    def die(start, stop):
        if start == 50:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match=r"one of 2 processes that read rows was ended by the system.*data\.workers=1"):
        list(two(die, 100))


@linux_only
def test_ctrl_c_ends_everything_within_a_second_and_keeps_what_was_done():
    script = textwrap.dedent("""
        import time
        from lensmith.data.pool import in_chunks

        done = []
        try:
            for start in in_chunks(
                lambda start, stop: time.sleep(60 if start >= 40 else 0) or start,
                100, workers=2, chunk_rows=10, parallel_rows=1,
            ):
                done.append(start)
                print("began", flush=True)
        except KeyboardInterrupt:
            print(done, flush=True)
    """)
    running = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(4):
        running.stdout.readline()
    started = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    out, err = running.communicate(timeout=30)
    assert time.monotonic() - started < 2, "one second, and one for a machine under load"
    assert (out, err) == ("[0, 10, 20, 30]\n", "")
