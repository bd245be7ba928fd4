"""Answering held-out questions on a GPU: the rollout engine against transformers' `generate`, same model, same batch.

    python benchmarks/eval_speed.py KIT --size 8B --batch 16 --out benchmarks/results/eval-speed-8b.json

Random weights in NF4 with an adapter of rank 16, one picture of 1,024 tokens a question, answers of exactly --new-tokens: the
end mark is forbidden, so that neither side stops early. Each side warms up once and is timed on the same questions after that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from grpo import write_rows
from random_weights import RandomShards, write_shell
from record import make_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--size", default="8B")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("runs/eval-bench"))
    parser.add_argument("--work", type=Path, help="as other benchmarks take it; instead of --folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in one process, ours first and last, so that neither has the warmer card."""
    import torch

    from lensmith.config.read import read_config
    from lensmith.data.encode import Encoder
    from lensmith.data.source import open_source
    from lensmith.evals.answer import answer_prompts
    from lensmith.evals.predict import MEDIA_TOKENS, answering, greedy_settings, pad_prompts
    from lensmith.model.adapters import prepare_trainable
    from lensmith.model.load import load_model
    from lensmith.model.names import read_architecture
    from lensmith.model.residence import let_segments_grow

    folder, size = options.work or options.folder, options.size.lower()
    let_segments_grow()
    shell = write_shell(options.kit, size, folder / f"shell-{size}")
    rows = write_rows(folder / "rows", options.questions, 1024)
    config = read_config(None, [f"model={shell}", f"data.train={rows}", "tune.method=qlora", "tune.rank=16"])
    loaded = load_model(config, shards=RandomShards(read_architecture(str(shell)), torch.device("cuda")))
    model = prepare_trainable(loaded.model, config.tune, seed=0).eval()
    encoder = Encoder.from_processor(loaded.processor, config.data.image)
    source = open_source(config.data, encoder, which="train")
    prompts = [encoder.encode_prompt(source.sample(row)) for row in range(options.questions)]
    greedy = greedy_settings(model, loaded.processor.tokenizer, encoder.end_token_id, options.new_tokens)
    # No end mark for anybody: it is one of the words that are never said.
    vocabulary = loaded.processor.tokenizer.get_vocab()
    never = [*(vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary), *greedy.eos_token_id]
    greedy.suppress_tokens = never

    def ours() -> list[list[int]]:
        limits = {"max_new_tokens": options.new_tokens, "batch": options.batch}
        answers = answer_prompts(loaded.model, encoder, prompts, end_ids=greedy.eos_token_id, never_ids=never, **limits)
        return [list(answer.ids) for answer in answers]

    def generate() -> list[list[int]]:
        written: list[list[int]] = []
        with answering(model):
            for start in range(0, len(prompts), options.batch):
                inputs = pad_prompts(prompts[start : start + options.batch], encoder, model)
                output = model.generate(**inputs, generation_config=greedy)
                written += output[:, inputs["input_ids"].shape[1] :].tolist()
        return written

    timed: dict[str, list[float]] = {"ours": [], "generate": []}
    texts: dict[str, list[list[int]]] = {}
    for name, side in (("ours", ours), ("generate", generate)) * 2:
        torch.cuda.synchronize()
        start = time.perf_counter()
        texts[name] = side()
        torch.cuda.synchronize()
        timed[name].append(round(time.perf_counter() - start, 3))
        print(name, timed[name][-1], file=sys.stderr, flush=True)
    assert {len(ids) for side in texts.values() for ids in side} == {options.new_tokens}
    same = sum(
        a == b for one, two in zip(texts["ours"], texts["generate"], strict=True) for a, b in zip(one, two, strict=True)
    )
    return make_record(
        f"eval-speed-{size}",
        f"{options.size} QLoRA, {options.questions} questions about a picture of 1,024 tokens each, answers of "
        f"{options.new_tokens} tokens, {options.batch} at once: transformers' generate / ours",
        round(timed["generate"][-1] / timed["ours"][-1], 2),
        "times as fast",
        command=f"python benchmarks/eval_speed.py KIT --size {options.size} --batch {options.batch}",
        commit=options.commit,
        ours_s=timed["ours"],
        generate_s=timed["generate"],
        # Of random weights two words are often equally likely, and rounding chooses: this is no measure of exactness.
        same_tokens=round(same / (options.questions * options.new_tokens), 3),
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / 2**30, 2),
    )


if __name__ == "__main__":
    main()
