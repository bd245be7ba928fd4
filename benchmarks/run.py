"""Work W1 through lensmith's own trainer, on a GPU: seconds and reserved memory per step of 8 samples.

    python benchmarks/run.py CHECKPOINT --recompute none --steps 12 --out result.json
    python benchmarks/run.py --random KIT --size 4B --samples 1 --low --name 4b-qlora-1 --out result.json

--random draws weights of the size's published architecture instead of reading a checkpoint; --low keeps embedding, tower
and layer inputs in host memory; --set changes any other setting.

W1: 8 samples a step, one image each (512 x 512 to 1280 x 960, native: 256 to 1,200 tokens), a question of 25 words, an
answer of 40: about 6,000 tokens. NF4 base, LoRA of rank 16 on all language linears, frozen tower, 8-bit AdamW, 6 loader
workers. CHECKPOINT may hold random weights: speed and memory are those of trained ones. Every row has a picture file of
its own, so nothing is shared between samples.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from record import make_record

IMAGE_PX = [(512, 512), (640, 480), (800, 600), (1024, 768), (1024, 1024), (768, 1024), (1280, 960), (448, 800)]
WORDS = "the of chart value sales growth in year what is trend line bar total between region price north south highest lowest"
SAMPLES_PER_STEP, QUESTION_WORDS, ANSWER_WORDS = 8, 25, 40
WARM_UP_STEPS = 3
LOW = ["memory.offload=inputs", "memory.embedding=host", "memory.tower=host"]


def write_rows(folder: Path, count: int, seed: int = 0) -> Path:
    """W1's rows: the same draws as for the peers' runs, each picture a file of its own."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pool = [
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (h, w, 3), np.uint8))
        for i, (w, h) in enumerate(IMAGE_PX)
    ]
    lines = []
    for number in range(count):
        pool[rng.randrange(len(pool))].save(folder / f"{number:04d}.png", compress_level=1)
        question = " ".join(rng.choice(WORDS.split()) for _ in range(QUESTION_WORDS))
        answer = " ".join(rng.choice(WORDS.split()) for _ in range(ANSWER_WORDS))
        lines.append(json.dumps({"image": f"{number:04d}.png", "question": question, "answer": answer}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--random", type=Path, metavar="KIT")
    parser.add_argument("--name", help="of the record")
    parser.add_argument("--samples", type=int, default=SAMPLES_PER_STEP, help="per step")
    parser.add_argument("--low", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C")
    parser.add_argument("--size", default="8B", help="for the record")
    parser.add_argument("--recompute", choices=["none", "layers"], default="layers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()
    if "engine=unsloth" in options.set:
        from lensmith.model.unsloth import import_unsloth

        import_unsloth()  # before transformers and TRL, which it rewrites

    from lensmith.config.read import read_config
    from lensmith.console import say
    from lensmith.train.sft import train_model

    checkpoint = draw_weights(options.random, options.size, options.work) if options.random else options.checkpoint
    run = options.work / f"{options.name or 'w1'}-{options.size}-{options.recompute}-{int(time.time())}"
    settings = [
        f"model={checkpoint}",
        f"data.train={write_rows(run.with_suffix('.rows'), options.samples * options.steps)}",
        f"data.workers={options.workers}",
        "data.test=null",
        "optim.name=adamw_8bit",
        f"optim.effective_samples={options.samples}",
        "optim.epochs=1",
        f"memory.recompute={options.recompute}",
        f"save.every_steps={options.steps}",
        f"run={run}",
    ]
    if not any(setting.startswith("tune.method=") for setting in options.set):
        settings += ["tune.method=qlora"]
    if "tune.method=full" not in options.set:
        settings += ["tune.rank=16", "tune.alpha=16", "optim.learning_rate=2e-5"]
    config = read_config(None, [*settings, *(LOW if options.low else []), *options.set])
    result = train_model(config, say=say)
    found = record(options, run, result)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def draw_weights(kit: Path, size: str, work: Path) -> Path:
    """A checkpoint's folder without weights, and a loader that draws them: 67 GB of a 32B fit few disks."""
    import torch

    from lensmith.model.load import load_model
    from lensmith.model.names import read_architecture
    from lensmith.train import prepare
    from random_weights import RandomShards, write_shell

    folder = write_shell(kit, size.lower(), work / f"shell-{size}")
    shards = RandomShards(read_architecture(str(folder)), torch.device("cuda"))
    prepare.load_model = functools.partial(load_model, shards=shards)
    return folder


def record(options: argparse.Namespace, run: Path, result: Any) -> dict[str, Any]:
    """One result, in the shape of benchmarks/results/*.json."""
    import torch

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    name = options.name or f"w1-{options.size.lower()}-qlora-recompute-{options.recompute}"
    settings = " ".join([*(LOW if options.low else []), *options.set])
    return make_record(
        name,
        f"{options.size}, {options.samples} samples a step, recompute {options.recompute} {settings}".strip(),
        round(statistics.median(step["step_s"] for step in steps), 3),
        f"s per {options.samples} samples" if options.samples > 1 else "s per sample",
        command=f"python benchmarks/run.py {'--random KIT' if options.random else 'CHECKPOINT'} --size {options.size} "
        f"--recompute {options.recompute} --samples {options.samples} --steps {options.steps}"
        + (" --low" if options.low else "")
        + (f" --set {' '.join(options.set)}" if options.set else ""),
        commit=options.commit,
        peak_reserved_gib=round(max(step["peak_gib"] for step in steps), 2),
        peak_allocated_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        min_s=round(min(step["step_s"] for step in steps), 3),
        max_s=round(max(step["step_s"] for step in steps), 3),
        data_wait_s=round(statistics.median(step["data_wait_s"] for step in steps), 4),
        tokens_per_step=round(statistics.mean(step["tokens"] for step in steps)),
        most_tokens=max(step["tokens"] for step in steps),
        steps=len(steps),
        final_loss=round(result.loss, 4),
    )


if __name__ == "__main__":
    main()
