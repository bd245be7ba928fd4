"""Work W1 through lensmith's own trainer, on a GPU: seconds and reserved memory per step of 8 samples.

    python benchmarks/run.py CHECKPOINT --recompute none --steps 12 --out result.json

W1: 8 samples a step, one image each (512 x 512 to 1280 x 960, native: 256 to 1,200 tokens), a question of 25 words, an
answer of 40: about 6,000 tokens. NF4 base, LoRA of rank 16 on all language linears, frozen tower, 8-bit AdamW, 6 loader
workers. CHECKPOINT may hold random weights: speed and memory are those of trained ones. Every row has a picture file of
its own, so nothing is shared between samples.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
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
    parser.add_argument("checkpoint")
    parser.add_argument("--size", default="8B", help="for the record")
    parser.add_argument("--recompute", choices=["none", "layers"], default="none")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()

    from lensmith.config.read import read_config
    from lensmith.train.sft import train_model

    run = options.work / f"w1-{options.size}-{options.recompute}-{int(time.time())}"
    config = read_config(
        None,
        [
            f"model={options.checkpoint}",
            f"data.train={write_rows(run.with_suffix('.rows'), SAMPLES_PER_STEP * options.steps)}",
            f"data.workers={options.workers}",
            "tune.method=qlora",
            "tune.rank=16",
            "tune.alpha=16",
            "optim.name=adamw_8bit",
            "optim.learning_rate=2e-5",
            f"optim.effective_samples={SAMPLES_PER_STEP}",
            "optim.epochs=1",
            f"memory.recompute={options.recompute}",
            f"save.every_steps={options.steps}",
            f"run={run}",
        ],
    )
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    result = train_model(config, say=say)
    print(json.dumps(record(options, run, result), indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record(options, run, result), indent=2) + "\n", encoding="utf-8")


def record(options: argparse.Namespace, run: Path, result: Any) -> dict[str, Any]:
    """One result, in the shape of benchmarks/results/*.json."""
    import torch

    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    return make_record(
        f"w1-{options.size.lower()}-qlora-recompute-{options.recompute}",
        f"W1: {options.size} QLoRA, 8 samples a step, recompute {options.recompute}",
        round(statistics.median(step["step_s"] for step in steps), 3),
        "s per 8 samples",
        command=f"python benchmarks/run.py CHECKPOINT --size {options.size} --recompute {options.recompute} "
        f"--steps {options.steps}",
        commit=options.commit,
        peak_reserved_gib=round(max(step["peak_gib"] for step in steps), 2),
        peak_allocated_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        min_s=round(min(step["step_s"] for step in steps), 3),
        max_s=round(max(step["step_s"] for step in steps), 3),
        data_wait_s=round(statistics.median(step["data_wait_s"] for step in steps), 4),
        tokens_per_step=round(statistics.mean(step["tokens"] for step in steps)),
        steps=len(steps),
        final_loss=round(result.loss, 4),
    )


if __name__ == "__main__":
    main()
