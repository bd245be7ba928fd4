"""Work W2 (see benchmarks/grpo.py) with stock TRL, no vLLM: seconds and reserved memory per step, by part.

    python benchmarks/peers/grpo_trl.py CHECKPOINT --steps 3 --recompute --out result.json

CHECKPOINT: 8B with random weights. The same adapter, rewards and optimizer as ours; SDPA attention, NF4 with double
quantisation, TRL's own defaults otherwise. --no-recompute turns gradient checkpointing off, with which transformers
decodes with its cache all the same but the policy pass is quicker and larger.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import make_record

GROUP, NEW_TOKENS, SIDE_PX, PROMPTS, WARM_UP_STEPS = 4, 256, 1024, 2, 1
WORDS = "the of chart value sales growth in year what is trend line bar total between region price north south highest lowest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--per-device", type=int, default=1, help="completions in one policy pass")
    parser.add_argument("--name", default="grpo-w2-8b-trl")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoProcessor, BitsAndBytesConfig, Qwen3VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rng, count = np.random.default_rng(0), PROMPTS * options.steps
    questions = [" ".join(rng.choice(WORDS.split(), 25)) for _ in range(count)]
    pictures = [Image.fromarray(rng.integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8)) for _ in range(count)]
    rows = Dataset.from_dict({"k": list(range(count))})
    rows.set_transform(
        lambda batch: {
            "image": [pictures[k] for k in batch["k"]],
            "prompt": [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[k]}]}]
                for k in batch["k"]
            ],
        }
    )
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        options.checkpoint,
        quantization_config=stored,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
    )
    linears = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    completions = GROUP * PROMPTS
    arguments = GRPOConfig(
        output_dir="runs/peer", num_generations=GROUP, max_completion_length=NEW_TOKENS,
        per_device_train_batch_size=options.per_device, gradient_accumulation_steps=completions // options.per_device,
        learning_rate=1e-6, bf16=True, max_steps=options.steps, logging_steps=1, save_strategy="no", report_to="none",
        optim="adamw_8bit", remove_unused_columns=False, temperature=1.0, gradient_checkpointing=options.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.recompute else None,
    )  # fmt: skip
    steps: list[float] = []
    parts: dict[str, list[float]] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            print(f"step {len(steps) + 1}: {time.perf_counter() - begun[-1]:.2f} s", file=sys.stderr, flush=True)
            steps.append(time.perf_counter() - begun[-1])
            begun.append(time.perf_counter())

    begun: list[float] = []

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            began = time.perf_counter()
            found = super()._generate_single_turn(*args, **kwargs)
            torch.cuda.synchronize()
            parts.setdefault("generation", []).append(time.perf_counter() - began)
            return found

    trainer = Timed(
        model=model, args=arguments, train_dataset=rows, processing_class=AutoProcessor.from_pretrained(options.checkpoint),
        reward_funcs=[lambda completions, **_: [random.random() for _ in completions]], callbacks=[Clock()],
        peft_config=LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", target_modules=linears),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    begun.append(time.perf_counter())
    trainer.train()
    timed, generation = steps[WARM_UP_STEPS:], parts["generation"][WARM_UP_STEPS:]
    found = make_record(
        options.name,
        f"8B QLoRA GRPO with stock TRL, {PROMPTS} prompts x {GROUP} completions of {NEW_TOKENS} tokens, one image of 1,024 "
        f"tokens; gradient checkpointing {'on' if options.recompute else 'off'}, {options.per_device} completions a pass",
        round(statistics.median(timed), 2),
        f"s per {completions} completions",
        command=f"python benchmarks/peers/grpo_trl.py CHECKPOINT --steps {options.steps} "
        f"--{'' if options.recompute else 'no-'}recompute --per-device {options.per_device}",
        commit=options.commit,
        rollout_s=round(statistics.median(generation), 2),
        policy_s=round(statistics.median(timed) - statistics.median(generation), 2),
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / 2**30, 2),
        completion_tokens=trainer.state.log_history[0].get("completions/mean_length"),
        steps=len(timed),
    )
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
