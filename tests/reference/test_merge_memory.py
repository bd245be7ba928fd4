"""Merging takes the memory of a few pieces of one tensor, however large the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

from lensmith.config.read import read_config
from lensmith.export.tensors import Entry, file_names, pieces, plan_files, write_header, write_index, write_values
from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapted_modules
from lensmith.model.names import resolve_model
from lensmith.rundir import RunDir

MODEL_MIB = 250
"""At least; the made-up checkpoint."""
PEAK_MIB = 160
"""Of anonymous memory: PIECE_VALUES in fp32 are 32 MiB, of which a base, a change, a result and their difference exist."""
RANK = 8

MERGE = """
import sys, threading, time
from pathlib import Path
from lensmith.rundir import RunDir
from lensmith.export.merge import merge_run

def anonymous_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024

run, out, before, peak, stop = RunDir(sys.argv[1]), Path(sys.argv[2]), anonymous_mib(), [0.0], threading.Event()

def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous_mib())

watcher = threading.Thread(target=watch)
watcher.start()
merged = merge_run(run, run.path, out)
stop.set()
watcher.join()
print(peak[0] - before, merged.nbytes / 2**20)
"""


@pytest.fixture(scope="module")
def large_run(tmp_path_factory) -> RunDir:
    """A run on random weights of MODEL_MIB, written as a merge writes them."""
    folder = tmp_path_factory.mktemp("large")
    base = folder / "base"
    shutil.copytree(resolve_model("lensmith/tiny"), base, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((base / "config.json").read_text())
    settings["text_config"] |= {"hidden_size": 1024, "intermediate_size": 5120, "vocab_size": 48000}
    settings["vision_config"]["out_hidden_size"] = 1024
    (base / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(base))
    entries = [Entry(name, tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()]
    files = plan_files(entries, 150 * 2**20)
    for name, held in zip(file_names(len(files)), files, strict=True):
        with (base / name).open("wb") as file:
            write_header(file, held)
            for entry in held:
                for piece in pieces(entry.shape):
                    rows = (len(range(*piece.indices(entry.shape[0]))), *entry.shape[1:])
                    write_values(file, torch.randint(-99, 99, rows, dtype=torch.int8).to(torch.bfloat16) / 1000)
    write_index(base, files)
    config = read_config(None, [f"model={base}", f"run={folder / 'run'}", f"tune.rank={RANK}"])
    run = RunDir(config.run)
    run.start(config, {})
    write_adapter(run.path / "tuned", entries, adapted_modules(config.tune) or "")
    return run


def write_adapter(folder: Path, entries: list[Entry], pattern: str) -> None:
    import re

    folder.mkdir()
    tensors = {}
    for entry in entries:
        module = entry.name.removesuffix(".weight")
        if re.fullmatch(pattern, module):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.rand(RANK, entry.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.rand(entry.shape[0], RANK)
    assert len(tensors) == 2 * 6 * 7
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": pattern, "bias": "none"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process its anonymous memory")
def test_merging_takes_the_memory_of_a_few_pieces_not_of_the_model(large_run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(large_run.path), str(tmp_path / "merged")],
        capture_output=True,
        text=True,
        check=True,
        # What merging holds, not what the allocator keeps for each thread.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )
    peak_mib, model_mib = map(float, done.stdout.split())
    assert model_mib > MODEL_MIB
    assert peak_mib < PEAK_MIB, f"{peak_mib:.0f} MiB for a model of {model_mib:.0f} MiB"
    print(f"{peak_mib:.0f} MiB for a model of {model_mib:.0f} MiB")
