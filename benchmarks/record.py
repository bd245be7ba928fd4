"""One measured number with what a reader needs to repeat it: the shape of benchmarks/results/*.json."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any


def make_record(
    name: str, what: str, value: float, unit: str, *, command: str, commit: str | None = None, **more: Any
) -> dict[str, Any]:
    """`commit`: where there is no git to ask. The machine is the GPU, or the processor with the threads torch uses."""
    from lensmith.model.versions import environment

    found = environment()
    return {
        "name": name,
        "what": what,
        "value": value,
        "unit": unit,
        **more,
        "gpu_or_cpu": found["gpus"][0]["name"] if found["gpus"] else describe_cpu(),
        "versions": {**found["versions"], "python": found["python"], "cuda": found["cuda"]},
        "commit": commit or _commit(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def keep_record(record: dict[str, Any], out: Path | None) -> None:
    """Into the file, or to the terminal where none is named."""
    text = json.dumps(record, indent=2)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def describe_cpu() -> str:
    """The processor's own name and how many threads torch uses on it."""
    import torch

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
