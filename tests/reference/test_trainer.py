"""Reference tests 6, 11 and 13: our trainer takes the steps that stock TRL takes, however a step is cut into packs.

Stock: trl.SFTTrainer with transformers' model on padded batches, one batch a step. Ours: packs. Both in float64 with LoRA
from the same seed, AdamW, three steps; compared are losses and all adapter weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch.testing import assert_close
from transformers import Qwen3VLForConditionalGeneration

from lensmith.config.tree import Optim, Tune
from lensmith.data.loader import StepPacks, step_loader
from lensmith.model.adapters import prepare_trainable
from lensmith.model.components import parameter_groups
from lensmith.model.engine import Engine
from lensmith.rundir import RunDir
from lensmith.train.oom import MemoryGuard
from lensmith.train.recover import GradientGuard
from lensmith.train.trainer import SFTTrainer
from lensmith.types import Pack, Segment

pytestmark = pytest.mark.usefixtures("float64_modules")

STEPS, RATE, PAD_ID = 3, 1e-2, 0


@pytest.fixture(scope="module")
def processor() -> Any:
    """A whole Qwen3VLProcessor on a byte-level vocabulary; the trainers ask it for little more than its pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    size = {"shortest_edge": 1024, "longest_edge": 65536}
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, size=size)
    return Qwen3VLProcessor(
        images, tokenizer, Qwen3VLVideoProcessor(patch_size=16, merge_size=2), chat_template="{{ 1 }}"
    )


@pytest.fixture(scope="module")
def steps(build_sample) -> list[list[dict[str, Any]]]:
    """Samples of each step: unequal lengths and numbers of images, unequal counts of learned tokens."""
    shapes = [([(2, 3)], [4, 9], 6), ([], [14], 3), ([(1, 2), (3, 2)], [2, 3, 7], 1), ([(4, 3)], [3, 20], 15)]
    return [
        [
            build_sample(images=images, text=text, learned=learned, seed=10 * step + n)
            for n, (images, text, learned) in enumerate(shapes)
        ]
        for step in range(STEPS)
    ]


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(s["input_ids"]) for s in samples)
    grow = lambda row, value: torch.nn.functional.pad(row, (0, longest - len(row)), value=value)  # noqa: E731
    pictures = [s for s in samples if s["pixel_values"] is not None]
    return {
        "input_ids": torch.stack([grow(s["input_ids"], PAD_ID) for s in samples]),
        "labels": torch.stack([grow(s["labels"], -100) for s in samples]),
        "attention_mask": torch.stack([grow(torch.ones_like(s["input_ids"]), 0) for s in samples]),
        "mm_token_type_ids": torch.stack([grow(s["mm_token_type_ids"], 0) for s in samples]),
        "pixel_values": torch.cat([s["pixel_values"] for s in pictures]),
        "image_grid_thw": torch.cat([s["image_grid_thw"] for s in pictures]),
    }


def packs_of(model: Any, samples: list[dict[str, Any]], cuts: list[int]) -> StepPacks:
    packs, start = [], 0
    for stop in [*cuts, len(samples)]:
        members, places, segments, at = samples[start:stop], [], [], 0
        for sample in members:
            ids = sample["input_ids"]
            rope, _ = model.model.get_rope_index(
                ids[None], mm_token_type_ids=sample["mm_token_type_ids"][None], image_grid_thw=sample["image_grid_thw"]
            )
            places.append(torch.cat([torch.arange(len(ids))[None], rope[:, 0]]))
            segments.append(Segment(at, len(ids)))
            at += len(ids)
        pictures = [s for s in members if s["pixel_values"] is not None]
        packs.append(
            Pack(
                torch.cat([s["input_ids"] for s in members]),
                torch.cat([s["labels"] for s in members]),
                torch.cat(places, 1),
                tuple(segments),
                torch.cat([s["pixel_values"] for s in pictures]) if pictures else torch.empty(0, 1536),
                torch.cat([s["image_grid_thw"] for s in pictures])
                if pictures
                else torch.empty(0, 3, dtype=torch.int64),
                tuple(f"rows.jsonl:{n + 1}" for n in range(start, stop)),
            )
        )
        start = stop
    return StepPacks(tuple(packs), sum(int((s["labels"] != -100).sum()) for s in samples), len(samples))


def arguments(folder: Path, **more: Any) -> trl.SFTConfig:
    return trl.SFTConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, warmup_steps=0,
        lr_scheduler_type="linear", optim="adamw_torch", use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, max_length=None, remove_unused_columns=False, seed=3,
        **{"save_strategy": "no", "logging_steps": 1, **more},
    )  # fmt: skip


def adapted(build_tiny, cls: type) -> Any:
    model = prepare_trainable(build_tiny(cls=cls), Tune(rank=4), seed=7)
    model.base_model.model.config._name_or_path = "tiny"
    with torch.no_grad():  # B is zero at first, and A would then get no gradient in the first step
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


class Float64Logprobs:
    """In place of TRL's chunked kernel, which works in fp32 (and until 1.15 on GPUs only): the same in full precision."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):
        logprobs = (hidden @ weight.T * scale / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy, None, None, logprobs.argmax(-1) == targets


@pytest.fixture(scope="module")
def stock(build_tiny, processor, steps, float64_modules, tmp_path_factory):
    model = adapted(build_tiny, Qwen3VLForConditionalGeneration)
    before, order = adapter(model), []

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        (row,) = rows
        order.append(row["images"])
        return pad(steps[row["images"]])

    trainer = trl.SFTTrainer(
        model=model, args=arguments(tmp_path_factory.mktemp("stock")), processing_class=processor, data_collator=collate,
        train_dataset=Dataset.from_dict({"images": list(range(STEPS))}),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64Logprobs)
        trainer.train()
    return before, adapter(model), [h["loss"] for h in trainer.state.log_history if "loss" in h], order


def ours(model, folder, processor, loader, guard=None, **more):
    seen = []
    trainer = SFTTrainer(
        model=model,
        args=arguments(folder, **more),
        processor=processor,
        loader=step_loader(loader, workers=0, pin_memory=False),
        groups=parameter_groups(model, Optim(learning_rate=RATE), "lora"),
        run=RunDir(folder),
        guard=guard or GradientGuard(lambda _: None),
        memory=MemoryGuard(model.base_model.model, RunDir(folder), lambda _: None, budget_tokens=10**6),
        on_stats=seen.append,
    )
    return trainer, seen


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [3]], ids=["one pack", "four packs", "unequal packs"])
def test_steps_on_packs_are_stock_trls_steps(build_tiny, processor, steps, stock, tmp_path, cuts):
    before, after, losses, order = stock
    model = adapted(build_tiny, Engine)
    assert all(torch.equal(value, before[name]) for name, value in adapter(model).items())
    trainer, seen = ours(model, tmp_path, processor, [packs_of(model.base_model.model, steps[n], cuts) for n in order])
    trainer.train()
    assert [stats.loss for stats in seen] == pytest.approx(losses, rel=1e-6), "transformers logs fp32"
    moved = max(float((after[n] - before[n]).abs().max()) for n in before)
    assert moved > RATE
    for name, value in adapter(model).items():
        assert_close(value, after[name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_resuming_takes_the_same_steps_bit_by_bit(build_tiny, processor, steps, tmp_path):
    through, again = (adapted(build_tiny, Engine) for _ in range(2))
    packs = [packs_of(through.base_model.model, samples, [2]) for samples in steps]
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    ours(through, tmp_path, processor, packs, **options)[0].train()
    trainer, seen = ours(again, tmp_path, processor, packs, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert [stats.step for stats in seen] == [3]
    expected = adapter(through)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(again).items())
    assert json.loads((tmp_path / "checkpoints/step-000003/trainer_state.json").read_text())["global_step"] == 3


def test_a_step_that_is_not_finite_is_skipped_and_named_and_the_third_stops(build_tiny, processor, steps, tmp_path):
    from dataclasses import replace

    from lensmith.errors import RunError

    model = adapted(build_tiny, Engine)
    good = packs_of(model.base_model.model, steps[0], [])
    broken = replace(good, packs=(replace(good.packs[0], pixels=good.packs[0].pixels * float("nan")),))
    said: list[str] = []
    before = adapter(model)
    trainer, _ = ours(model, tmp_path, processor, [broken, broken, good], guard=GradientGuard(said.append))
    trainer.train()
    assert sum("skipped" in text and "rows.jsonl:1, rows.jsonl:2" in text for text in said) == 2
    after = adapter(model)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    trainer, _ = ours(model, tmp_path, processor, [broken] * 3)
    with pytest.raises(RunError, match=r"Step 3: 3 steps in a row .*rows\.jsonl:1.*Lower optim\.learning_rate"):
        trainer.train()


def test_every_step_is_in_the_metrics_and_loggers_hear_of_every_nth_and_the_last(
    build_tiny, processor, steps, tmp_path
):
    model = adapted(build_tiny, Engine)
    packs = [packs_of(model.base_model.model, steps[0], []) for _ in range(3)]
    trainer, stats = ours(model, tmp_path, processor, packs, logging_steps=2)
    trainer.train()
    assert [found.step for found in stats] == [1, 2, 3]
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [2, 3]
