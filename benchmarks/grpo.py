"""Visual GRPO through lensmith's own trainer, on a GPU: seconds and reserved memory per step, by part.

    python benchmarks/grpo.py KIT w2 --out result.json          2 prompts x 4 completions of 256 tokens, one image of 1,024
    python benchmarks/grpo.py KIT long --out result.json        1 prompt x 16 completions of 64 tokens, one image of 2,500
    python benchmarks/grpo.py KIT sharing --out result.json     the policy pass alone, prompts shared against separate

8B with random weights in NF4, LoRA of rank 16 on all language linears, 8-bit AdamW, no vLLM. With random weights the end
token is one word in 151,936, so completions have their full length; a random reward keeps every group in the loss.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from random_weights import RandomShards, write_shell
from record import make_record

WORDS = "the of chart value sales growth in year what is trend line bar total between region price north south highest lowest"
QUESTION_WORDS, WARM_UP_STEPS = 25, 2
WORKS: dict[str, dict[str, int]] = {
    "w2": {"group": 4, "prompts": 2, "side_px": 1024, "new_tokens": 256},
    "long": {"group": 16, "prompts": 1, "side_px": 1600, "new_tokens": 64},
}
SHARING = {"group": 8, "prompt_px": 960, "new_tokens": 200}


def write_rows(folder: Path, count: int, side_px: int, seed: int = 0) -> Path:
    """Prompts with one picture of their own each, square, at its native size."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        pixels = rng.integers(0, 255, (side_px, side_px, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
        question = " ".join(rng.choice(WORDS.split(), QUESTION_WORDS))
        lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": "12"}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings_of(options: argparse.Namespace, shell: Path, rows: Path, run: Path, work: dict[str, int]) -> list[str]:
    return [
        f"model={shell}", "task=grpo", f"data.train={rows}", "data.test=null", "data.image.max_tokens=2600",
        "tune.method=qlora", "tune.rank=16", "tune.alpha=16", "optim.name=adamw_8bit", "optim.learning_rate=1e-6",
        f"optim.steps={options.steps}", f"optim.effective_samples={work['group'] * work['prompts']}",
        f"grpo.group={work['group']}", f"grpo.max_new_tokens={work['new_tokens']}",
        f"grpo.rewards=['{Path(__file__).parent.resolve()}/noise_reward.py:noise']", "log.every_steps=1",
        f"save.every_steps={options.steps}", f"run={run}", *options.set,
    ]  # fmt: skip


def measure_work(options: argparse.Namespace) -> dict[str, Any]:
    """Whole steps through `train_model`."""
    import torch

    from lensmith.config.read import read_config
    from lensmith.model.load import load_model
    from lensmith.model.names import read_architecture
    from lensmith.train import prepare
    from lensmith.train.evaluate import train_and_compare

    work, run = WORKS[options.work], options.folder / f"{options.work}-{int(time.time())}"
    shell = write_shell(options.kit, options.size.lower(), options.folder / f"shell-{options.size}")
    shards = RandomShards(read_architecture(str(shell)), torch.device("cuda"))
    prepare.load_model = functools.partial(load_model, shards=shards)
    rows = write_rows(options.folder / f"rows-{options.work}", work["prompts"] * options.steps, work["side_px"])
    config = read_config(None, settings_of(options, shell, rows, run, work))
    train_and_compare(config, say=lambda text: print(text, file=sys.stderr, flush=True))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    middle = lambda name: round(statistics.median(step[name] for step in steps), 3)  # noqa: E731
    completions = work["group"] * work["prompts"]
    return make_record(
        options.name or f"grpo-{options.work}-{options.size.lower()}",
        f"{options.size} QLoRA GRPO, {work['prompts']} prompts x {work['group']} completions of {work['new_tokens']} tokens, "
        f"one image of {work['side_px'] // 32} x {work['side_px'] // 32} tokens {' '.join(options.set)}".strip(),
        middle("step_s"),
        f"s per {completions} completions",
        command=f"python benchmarks/grpo.py KIT {options.work} --steps {options.steps}"
        + (f" --set {' '.join(options.set)}" if options.set else ""),
        commit=options.commit,
        rollout_s=middle("rollout_s"),
        policy_s=middle("policy_s"),
        rollout_tokens_per_s=middle("rollout_tokens_per_s"),
        peak_reserved_gib=round(max(step["peak_gib"] for step in steps), 2),
        logprob_gap=middle("logprob_gap"),
        completion_tokens=middle("completion_tokens"),
        step_s_each=[round(step["step_s"], 3) for step in steps],
        steps=len(steps),
    )


def measure_sharing(options: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward over one group: its prompt once, and once per completion in the same row."""
    import torch

    from lensmith.config.read import read_config
    from lensmith.data.encode import Encoder
    from lensmith.data.groups import GroupPacker, read_prompt
    from lensmith.data.source import open_source
    from lensmith.model.adapters import prepare_trainable
    from lensmith.model.features import RamStore
    from lensmith.model.load import load_model
    from lensmith.model.names import read_architecture
    from lensmith.model.residence import let_segments_grow

    let_segments_grow()
    shell = write_shell(options.kit, options.size.lower(), options.folder / f"shell-{options.size}")
    rows = write_rows(options.folder / "rows-sharing", 1, SHARING["prompt_px"])
    config = read_config(
        None, [f"model={shell}", f"data.train={rows}", "tune.method=qlora", "tune.rank=16", *options.set]
    )
    shards = RandomShards(read_architecture(str(shell)), torch.device("cuda"))
    loaded = load_model(config, shards=shards)
    model = prepare_trainable(loaded.model, config.tune, seed=0).train()
    source = open_source(config.data, Encoder.from_processor(loaded.processor, config.data.image), which="train")
    # As in a step of GRPO, where the rollout has looked at the pictures already: features are kept, for both ways alike.
    loaded.model.features = RamStore(2**30, pinned=True)
    gc.collect()
    gc.freeze()
    prompt, rng = read_prompt(source, 0).encoded, np.random.default_rng(0)
    answers = [rng.integers(1000, 100_000, SHARING["new_tokens"]).tolist() for _ in range(SHARING["group"])]
    found: dict[str, Any] = {"prompt_tokens": prompt.num_tokens}
    for name, share in (("separate", False), ("shared", True), ("separate again", False), ("shared again", True)):
        encoder = source.encoder
        packer = GroupPacker(
            encoder.geometry, encoder.image_token_id, encoder.video_token_id, 10**6, share, loaded.dtype
        )
        (pack,) = packer.pack_completions([prompt] * len(answers), answers, [f"#{n}" for n in range(len(answers))])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = [_pass(model, pack) for _ in range(3 + options.steps)][3:]
        found[name] = {
            "tokens": pack.num_tokens,
            "s": round(statistics.median(seconds), 4),
            "min_s": round(min(seconds), 4),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        }
        print(name, found[name], file=sys.stderr, flush=True)
    times = {name: min(found[name]["s"], found[f"{name} again"]["s"]) for name in ("separate", "shared")}
    return make_record(
        options.name or "grpo-sharing-8b",
        f"{options.size} QLoRA, forward and backward over one group of {SHARING['group']} completions of "
        f"{SHARING['new_tokens']} tokens on one prompt of {prompt.num_tokens} tokens: separate / shared",
        round(times["separate"] / times["shared"], 2),
        "times as fast",
        command=f"python benchmarks/grpo.py KIT sharing --steps {options.steps}",
        commit=options.commit,
        **found,
    )


def _pass(model: Any, pack: Any) -> float:
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    logprobs = model(pack=pack)
    (-logprobs.sum() / len(logprobs)).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("work", choices=[*WORKS, "sharing"])
    parser.add_argument("--size", default="8B")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--name", help="of the record")
    parser.add_argument("--set", nargs="*", default=[], metavar="A.B=C")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()
    found = measure_sharing(options) if options.work == "sharing" else measure_work(options)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
