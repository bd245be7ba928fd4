"""Held-out scores of a saved lensmith/tiny: greedy answers through plain transformers, per task.

python -m tools.tiny.score --model src/lensmith/model/tiny --items 40
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tools.tiny.feed import QUESTIONS, SIZES
from tools.tiny.tasks import Question, make_item

HELD_OUT_SEED = 10**6
"""No training run uses it."""
MAX_NEW_TOKENS = 24
BATCH = 512


def held_out(items: int) -> list[tuple[Image.Image, Question]]:
    """`items` unseen pictures of each size with their questions."""
    drawn = [make_item(HELD_OUT_SEED, i, *size, QUESTIONS) for size in SIZES for i in range(items)]
    return [(item.image, question) for item in drawn for question in dict.fromkeys(item.questions)]


def answer_questions(model: Any, processor: Any, asked: list[tuple[Image.Image, str]]) -> list[str]:
    """The model's greedy answers, stripped of special tokens."""
    answers: list[str] = []
    for start in range(0, len(asked), BATCH):
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in asked[start : start + BATCH]
        ]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def score_model(folder: Path, items: int, device: str) -> dict[str, dict[str, float]]:
    """Task -> share of answers that are exactly right, and how many were asked; `all` is over all questions."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    asked = held_out(items)
    answers = answer_questions(model, processor, [(image, question.text) for image, question in asked])
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for (_, question), answer in zip(asked, answers, strict=True):
        right[question.task].append(answer == question.answer)
        right["all"].append(answer == question.answer)
    return {task: {"exact": round(sum(r) / len(r), 4), "n": len(r)} for task, r in sorted(right.items())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with weights, tokenizer and processor")
    parser.add_argument("--items", type=int, default=40, help="pictures of each size")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(json.dumps(score_model(options.model, options.items, options.device), indent=2))
