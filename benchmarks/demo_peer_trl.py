"""The demo's training job with stock TRL on the same machine: questions per second at its best batch size.

Everything is stock: transformers' Qwen3VLForConditionalGeneration, TRL's SFTTrainer and its own collator, prompt and
completion columns so that only answers are learned, no recompute, fp32. Model, rows, LoRA modules and rank are those of
`lensmith demo`. Each batch size runs with each number of loader workers for a while; the best counts.

    python benchmarks/demo_peer_trl.py --seconds 15 > benchmarks/results/demo-peer-trl.json

Prints one JSON object on stdout. The first steps of each run are not timed; batches that workers had ready by then
count in TRL's favour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import make_record

WARMUP_STEPS = 3
BATCHES = (8, 16, 32, 64, 128)
WORKERS = (0, 1, 2)
LANGUAGE_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def read_peer_rows() -> Any:
    """easy-VQA's training questions as TRL wants them: image, prompt, completion; pictures are decoded when asked for."""
    import datasets

    from lensmith.demo import write_rows

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), seed=0)
        rows = [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    table = datasets.Dataset.from_list(
        [
            {
                "image": row["image"],
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )
    return table.cast_column("image", datasets.Image())


def measure(rows: Any, *, path: str, batch: int, workers: int, seconds: float) -> dict[str, Any]:
    """Samples per second of one setting, over whole optimizer steps after the warm-up."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lensmith.demo import demo_config

    class Stopwatch(TrainerCallback):
        started, stopped, steps = 0.0, 0.0, 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            if state.global_step == WARMUP_STEPS:
                self.started = now
            elif state.global_step > WARMUP_STEPS:
                self.stopped, self.steps = now, state.global_step - WARMUP_STEPS
                control.should_training_stop = now - self.started > seconds

    config, watch = demo_config(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa"),
            processing_class=AutoProcessor.from_pretrained(path),
            train_dataset=rows,
            peft_config=LoraConfig(
                r=config.tune.rank, lora_alpha=2 * config.tune.rank, target_modules=LANGUAGE_LINEARS
            ),
            callbacks=[watch],
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                gradient_checkpointing=False,
                dataloader_num_workers=workers,
                learning_rate=config.optim.learning_rate or 2e-4,
                num_train_epochs=1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                max_length=None,
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                seed=0,
            ),
        )
        trainer.train()
    elapsed_s = watch.stopped - watch.started
    return {
        "batch": batch,
        "workers": workers,
        "steps": watch.steps,
        "samples_per_s": batch * watch.steps / elapsed_s,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="timed, per setting")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--model", default="lensmith/tiny")
    wanted = parser.parse_args()

    from lensmith.model.names import resolve_model

    stdout, sys.stdout = sys.stdout, sys.stderr  # trainers print there too; stdout is for the one object
    rows, tried = read_peer_rows(), []
    for batch in wanted.batches:
        for workers in wanted.workers:
            tried.append(
                measure(rows, path=resolve_model(wanted.model), batch=batch, workers=workers, seconds=wanted.seconds)
            )
            print(tried[-1], file=sys.stderr, flush=True)
    best = max(tried, key=lambda run: run["samples_per_s"])
    result = make_record(
        "demo-samples-per-s-trl",
        f"the demo's job with stock TRL, batch {best['batch']}, {best['workers']} loader workers",
        round(best["samples_per_s"], 1),
        "questions/s",
        command=" ".join(["python", *sys.argv]),
        best=best,
        tried=tried,
    )
    print(json.dumps(result, indent=2), file=stdout)


if __name__ == "__main__":
    main()
