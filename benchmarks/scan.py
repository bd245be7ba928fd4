"""How fast data is read, and in how much memory: what `lensmith check` and the start of every training run cost.

    python benchmarks/scan.py --out benchmarks/results/scan.json

Pictures are made here, each file of its own: a few drawn photographs with a comment that differs. Four things are measured:

    headers   rows per second, of one picture each: the row parsed and checked, its picture's header read; no token cut
    scan      the same from the text of the row to its token ids, as training does it before its first step
    decode    pictures of a megapixel per second, every pixel decoded and every byte digested, by `lensmith check`
    memory    of all processes together, while `lensmith check --quick` reads a million rows

The first ones are also given as processor time per row: the machine may have had other things to do.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from record import make_record

SIDES_PX = ((640, 480), (480, 640), (800, 600), (512, 512))
MEGAPIXEL_PX = (1152, 896)
NUM_DRAWN = 16
NOISE = 6
"""Most that a pixel is off, so that a JPEG has as many bytes as a photograph's: 45 to 70 kB at VGA size."""
NUM_WORDS = NUM_TEXTS = 20_000
MEMORY_PICTURES = 2_000
SAMPLE_EVERY_S = 0.25


def draw_photos(sides: tuple[tuple[int, int], ...], count: int, rng: np.random.Generator) -> list[bytes]:
    """JPEG files of smooth colours with a grain."""
    files = []
    for number in range(count):
        width, height = sides[number % len(sides)]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        grainy = smooth + rng.integers(-NOISE, NOISE + 1, smooth.shape)
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 8 == 0 else 1
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=75, exif=exif)
        files.append(buffer.getvalue())
    return files


def write_data(folder: Path, rows: int, pictures: int, sides: tuple[tuple[int, int], ...]) -> Path:
    """A data file of so many rows about so many pictures, in turns."""
    rng = np.random.default_rng(0)
    drawn = draw_photos(sides, min(NUM_DRAWN, pictures), rng)
    (folder / "images").mkdir(parents=True)
    for number in range(pictures):
        photo, comment = drawn[number % len(drawn)], f"picture {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment
        (folder / "images" / f"{number:07d}.jpg").write_bytes(photo[:2] + segment + photo[2:])
    questions, answers = draw_texts(6, 20, rng), draw_texts(3, 40, rng)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row, (asked, answered) in enumerate(rng.integers(0, NUM_TEXTS, (rows, 2)).tolist()):
            image = f"images/{row % pictures:07d}.jpg"
            file.write(
                json.dumps({"image": image, "question": f"{questions[asked]}?", "answer": answers[answered]}) + "\n"
            )
    os.sync()  # or writing goes on while reading is timed
    return folder / "rows.jsonl"


def draw_texts(shortest: int, longest: int, rng: np.random.Generator) -> list[str]:
    """Texts whose words recur as those of a language do: the n-th most frequent word is 1/n as frequent as the first."""
    letters = np.array(list("etaoinshrdlucmfwygpbvkxqjz"))
    words = ["".join(rng.choice(letters, length)) for length in rng.integers(2, 11, NUM_WORDS)]
    frequency = 1 / np.arange(1, NUM_WORDS + 1)
    lengths = rng.integers(shortest, longest, NUM_TEXTS)
    drawn = iter(rng.choice(words, lengths.sum(), p=frequency / frequency.sum()).tolist())
    return [" ".join(itertools.islice(drawn, length)) for length in lengths.tolist()]


def timed(job: Callable[[], Any]) -> dict[str, float]:
    """Seconds on the clock, and of processor time in this process and its children."""
    clock, spent = time.monotonic(), processor_s()
    job()
    return {"wall_s": time.monotonic() - clock, "processor_s": processor_s() - spent}


def processor_s() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class HeaderReader:
    """Rows as checked samples and the headers of their pictures; returns how many pixels they have together."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def read(self, start: int, stop: int) -> int:
        headers = (self.source.header(ref) for row in range(start, stop) for ref in self.source.sample(row).images)
        return sum(height * width for height, width in (header.upright_px for header in headers))


def measure_headers(rows: Path, workers: int) -> dict[str, float]:
    from lensmith.config.tree import Data, Images
    from lensmith.data.encode import Encoder
    from lensmith.data.pool import in_chunks
    from lensmith.data.source import open_source
    from lensmith.model.load import load_processor

    encoder = Encoder.from_processor(load_processor("lensmith/tiny"), Images())

    def scan() -> None:
        source = open_source(Data(train=str(rows)), encoder, which="train")
        assert sum(in_chunks(HeaderReader(source).read, len(source), workers=workers, parallel_rows=1)) > 0

    return timed(scan)


def measure_scan(rows: Path, workers: int) -> dict[str, float]:
    """As training does it before its first step."""
    from lensmith.config.tree import Data, Images
    from lensmith.data.encode import Encoder
    from lensmith.data.scan import scan_source
    from lensmith.data.source import open_source
    from lensmith.model.load import load_processor

    encoder = Encoder.from_processor(load_processor("lensmith/tiny"), Images())

    def scan() -> None:
        source = open_source(Data(train=str(rows)), encoder, which="train")
        scan_source(source, budget_tokens=2048, on_long="shrink", on_bad_row="error", seed=0, workers=workers)

    return timed(scan)


def measure_check(rows: Path, workers: int, *, decode: bool) -> dict[str, float]:
    """Without the start of the command, which loads torch."""
    from lensmith.check.run import run_check
    from lensmith.config.tree import Data, RunConfig
    from lensmith.model.load import load_processor

    load_processor("lensmith/tiny")
    return timed(lambda: run_check(RunConfig(data=Data(train=str(rows))), decode=decode, workers=workers))


def measure_memory(rows: Path) -> dict[str, float]:
    """Most memory of the command and its processes, in 2**30 bytes; pages that several share count once in `peak_gib`."""
    command = [sys.executable, "-m", "lensmith", "check", str(rows), "--quick", "--no-html", "--json"]
    clock, spent = time.monotonic(), processor_s()
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL) as running:
        with sampled(running.pid) as peaks:
            running.wait()
        out.seek(0)
        report = json.load(out)
    return {
        "rows": report["rows"],
        **peaks,
        "wall_s": time.monotonic() - clock,
        "processor_s": processor_s() - spent,
    }


@contextmanager
def sampled(root: int) -> Iterator[dict[str, float]]:
    """The most memory that a process and its descendants hold together while the block runs."""
    peaks = {"peak_gib": 0.0, "peak_rss_sum_gib": 0.0}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_EVERY_S):
            held = [rollup for process in descendants(root) if (rollup := memory_of(process))]
            for name, field in (("peak_gib", "Pss"), ("peak_rss_sum_gib", "Rss")):
                peaks[name] = max(peaks[name], sum(rollup[field] for rollup in held) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        is_over.set()
        watcher.join()


def descendants(root: int) -> list[int]:
    """The process and all that it started, as far as they live."""
    found = [root]
    for process in found:
        for listed in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, listed.read_text().split())
            except OSError:  # it ended a moment ago
                continue
    return found


def memory_of(process: int) -> dict[str, int]:
    """KiB by the names of the kernel: `Rss`, and `Pss`, in which a page that n processes share counts 1/n."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}


def best(rounds: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The round that took the least time: the machine may have had other things to do in the others."""
    return min((measure() for _ in range(rounds)), key=lambda found: found["wall_s"])


def headers_record(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    rows = write_data(folder, wanted.rows, wanted.rows, SIDES_PX)
    found = best(wanted.rounds, lambda: measure_headers(rows, wanted.workers))
    return {
        "what": "rows of one picture each, parsed and checked, their picture's header read",
        "value": wanted.rows / found["wall_s"],
        "unit": "rows/s",
        "processor_us_per_row": found["processor_s"] / wanted.rows * 1e6,
        **found,
    }


def scan_record(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    rows = write_data(folder, wanted.rows, wanted.rows, SIDES_PX)
    found = best(wanted.rounds, lambda: measure_scan(rows, wanted.workers))
    return {
        "what": "the scan before training: rows of one picture each",
        "value": wanted.rows / found["wall_s"],
        "unit": "rows/s",
        "processor_us_per_row": found["processor_s"] / wanted.rows * 1e6,
        **found,
    }


def quick_record(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    rows = write_data(folder, wanted.rows, wanted.rows, SIDES_PX)
    found = best(wanted.rounds, lambda: measure_check(rows, wanted.workers, decode=False))
    return {
        "what": "lensmith check --quick: rows of one picture each",
        "value": wanted.rows / found["wall_s"],
        "unit": "rows/s",
        "processor_us_per_row": found["processor_s"] / wanted.rows * 1e6,
        **found,
    }


def decode_record(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    rows = write_data(folder, wanted.pictures, wanted.pictures, (MEGAPIXEL_PX,))
    found = best(wanted.rounds, lambda: measure_check(rows, wanted.workers, decode=True))
    return {
        "what": "lensmith check: JPEGs of {} x {} px, decoded in full".format(*MEGAPIXEL_PX),
        "value": wanted.pictures / found["wall_s"],
        "unit": "pictures/s",
        "processor_ms_per_picture": found["processor_s"] / wanted.pictures * 1e3,
        **found,
    }


def memory_record(folder: Path, wanted: argparse.Namespace) -> dict[str, Any]:
    found = measure_memory(write_data(folder, wanted.memory_rows, MEMORY_PICTURES, SIDES_PX))
    peak = found.pop("peak_gib")
    return {"what": "lensmith check --quick, all its processes", "value": peak, "unit": "GiB", **found}


RECORDS = {
    "headers-rows-per-s": headers_record,
    "scan-rows-per-s": scan_record,
    "check-quick-rows-per-s": quick_record,
    "check-megapixels-per-s": decode_record,
    "check-quick-memory": memory_record,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECORDS, help="measure one thing; the others stay in the file as they are")
    parser.add_argument("--rows", type=int, default=20_000, help="each with a picture of its own")
    parser.add_argument("--pictures", type=int, default=400, help="of a megapixel, to decode")
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    known = json.loads(wanted.out.read_text()) if wanted.only and wanted.out.exists() else []
    records = {record["name"]: record for record in known}
    for name in [wanted.only] if wanted.only else RECORDS:
        with tempfile.TemporaryDirectory() as folder:
            found = RECORDS[name](Path(folder) / "data", wanted)
        found = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
        command = f"python benchmarks/scan.py --only {name} --rounds {wanted.rounds} --workers {wanted.workers}"
        records[name] = make_record(name, command=command, cores=os.cpu_count(), workers=wanted.workers, **found)
        print(f"{name}: {found}", file=sys.stderr)
    ordered = [records[name] for name in RECORDS if name in records]
    wanted.out.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
