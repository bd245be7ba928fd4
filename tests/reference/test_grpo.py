"""Reference tests 5, 10 and 13: our GRPO steps are stock TRL's, however prompts are shared and steps are cut into packs.

Stock: trl.GRPOTrainer with the model's ordinary forward on padded batches, pictures repeated for every completion. Ours:
packs in which each prompt stands once. Both in float64 on lensmith/tiny with LoRA from the same seed; completions are
sampled from each trainer's own weights by the same engine, so that they stay equal as long as the weights do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from PIL import Image
from torch.testing import assert_close

from lensmith.config.tree import Data, Grpo, Images, Tune
from lensmith.data import groups
from lensmith.data.encode import Encoder
from lensmith.data.groups import GroupPacker, read_prompt
from lensmith.data.images import read_geometry
from lensmith.data.source import SampleSource, open_source
from lensmith.errors import ConfigError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine
from lensmith.model.names import resolve_model
from lensmith.rundir import RunDir, checkpoint_step
from lensmith.train.grpo_stats import GrpoStats
from lensmith.train.grpo_trainer import GRPOTrainer
from lensmith.train.oom import MemoryGuard
from lensmith.train.recover import GradientGuard, StopOnInterrupt
from lensmith.train.rollout import Rollout

pytestmark = pytest.mark.usefixtures("float64_modules")

STEPS, GROUP, PROMPTS, NEW_TOKENS, RATE = 3, 3, 2, 9, 1e-2
QUESTIONS = [
    "What colour is it?",
    "Read the text.",
    "Which shape is this, and how many are there?",
    "What is drawn here?",
]


class Float64Logprobs:
    """In place of TRL's chunked kernel, which works in fp32 (and until 1.15 on GPUs only): the same in full precision."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):
        logprobs = (hidden @ weight.T * scale / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy, None, None, logprobs.argmax(-1) == targets


@pytest.fixture(scope="module", autouse=True)
def float64_head() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Float64Logprobs)
        yield


@pytest.fixture(autouse=True)
def same_pixels(monkeypatch, processor) -> None:
    """The processor's own pixels on both sides; that ours are the same to rounding is tested in test_patches.py."""

    def read(image: Any, geometry: Any) -> torch.Tensor:
        return processor.image_processor(images=[Image.open(image.ref.source)], return_tensors="pt")["pixel_values"]

    monkeypatch.setattr(groups, "read_patches", read)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Prompts with one picture and with two. (Stock TRL fails where a batch holds a prompt without any.)"""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    lines = []
    for number, question in enumerate(QUESTIONS):
        pictures = []
        for picture in range([1, 2, 1, 1][number]):
            name = f"{number}-{picture}.png"
            shape = (*rng.choice([64, 96, 128], 2), 3)
            Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / name)
            pictures.append(name)
        lines.append(json.dumps({"images": pictures, "question": question, "answer": str(number)}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def source(rows: Path, processor: Any) -> SampleSource:
    data = Data(train=str(rows))
    return open_source(data, Encoder.from_processor(processor, Images()), which="train")


def adapted() -> tuple[Any, Engine]:
    engine = Engine.from_pretrained(resolve_model("lensmith/tiny"), dtype=torch.float64)
    model = prepare_trainable(engine, Tune(rank=4), seed=7)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model, engine


def judge(completion_ids: list[list[int]]) -> list[float]:
    """Any function of the tokens serves; short ones are liked."""
    return [sum(ids) % 5 / 4 - 0.1 * len(ids) for ids in completion_ids]


class Judged:
    """A reward set with that one reward."""

    names, weights = ("judge",), (1.0,)

    def __init__(self, reward: Callable[[list[list[int]]], list[float]] = judge) -> None:
        self.reward = reward

    def score(self, batch: Any) -> Any:
        return SimpleNamespace(values=np.array(self.reward(batch.completion_ids))[:, None], failures={})


def rollout_of(
    engine: Engine, source: SampleSource, processor: Any, *, share: bool = True, budget: int = 4096
) -> Rollout:
    encoder, vocabulary = source.encoder, processor.tokenizer.get_vocab()
    packer = GroupPacker(
        read_geometry(processor), encoder.image_token_id, encoder.video_token_id, budget, share, torch.float64
    )
    ends = [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
    settings = Grpo(group=GROUP, max_new_tokens=NEW_TOKENS)
    never = [encoder.image_token_id, encoder.video_token_id]
    return Rollout(engine, packer, settings, end_ids=ends, never_ids=never, seed=5)


def arguments(folder: Path, **more: Any) -> trl.GRPOConfig:
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": GROUP * PROMPTS,
        "num_generations": GROUP, "max_completion_length": NEW_TOKENS, "learning_rate": RATE, "optim": "adamw_torch",
        "lr_scheduler_type": "linear", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False, "seed": 3, "shuffle_dataset": False,
        "save_strategy": "no", "temperature": 1.0,
    }  # fmt: skip
    return trl.GRPOConfig(**(settings | more))


def run_stock(folder: Path, source: SampleSource, processor: Any, rows: Path, **more: Any) -> tuple[list[float], dict]:
    model, engine = adapted()
    rollout = rollout_of(engine, source, processor)
    prompts = [read_prompt(source, number).encoded for number in range(len(source))]

    class Stock(trl.GRPOTrainer):
        """Stock but for where completions come from."""

        def _generate_single_turn(self, prompt_ids, images, fields, num_generations, *args, **kwargs):
            members = [next(p for p in prompts if p.input_ids.tolist() == list(ids)) for ids in prompt_ids]
            groups = rollout.complete(members[::num_generations], num_generations, draw=self.state.global_step)
            return [list(c.ids) for group in groups for c in group], None

    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    data = Dataset.from_dict({"number": list(range(len(lines)))})

    def look(batch: dict[str, Any]) -> dict[str, Any]:
        chosen = [lines[number] for number in batch["number"]]
        return {
            "prompt": [[{"role": "user", "content": line["question"]}] for line in chosen],
            "images": [[Image.open(rows.parent / name) for name in line["images"]] for line in chosen],
        }

    data.set_transform(look)
    trainer = Stock(
        model=model,
        args=arguments(folder, **more),
        train_dataset=data,
        processing_class=processor,
        reward_funcs=[lambda completion_ids, **_: judge(completion_ids)],
    )
    trainer.train()
    return losses_of(trainer), adapter(model)


def make_ours(
    folder: Path, source: SampleSource, processor: Any, *, share: bool = True, budget: int = 4096, rewards: Any = None,
    on_stats: Any = None, **more: Any,
) -> GRPOTrainer:  # fmt: skip
    model, engine = adapted()
    rollout = rollout_of(engine, source, processor, share=share, budget=budget)
    run = RunDir(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    return GRPOTrainer(
        model=model,
        engine=engine,
        args=arguments(folder, **more),
        processor=processor,
        order=[n % len(source) for n in range(STEPS * PROMPTS)],
        read=lambda number: read_prompt(source, number),
        packer=rollout.packer,
        rollout=rollout,
        rewards=rewards or Judged(),
        groups=[{"params": [p for p in model.parameters() if p.requires_grad], "lr": RATE, "weight_decay": 0.0}],
        run=run,
        guard=GradientGuard(lambda _: None),
        memory=MemoryGuard(engine, run, lambda _: None, budget_tokens=budget),
        on_stats=on_stats or (lambda _: None),
    )


def losses_of(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo with a reference": {"loss_type": "grpo", "beta": 0.05},
    "two iterations on the same completions": {"loss_type": "grpo", "num_iterations": 2},
    "dr_grpo, rewards unscaled": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "GSPO": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 0.3},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "temperature, cut completions masked": {"temperature": 0.7, "mask_truncated_completions": True},
}


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_stock_trl(name, tmp_path, source, processor, rows):
    """Prefixes shared; and a budget so small that a step takes several packs, one of them with half a group."""
    their_losses, their_weights = run_stock(tmp_path / "stock", source, processor, rows, **CASES[name])
    ours = make_ours(tmp_path / "ours", source, processor, budget=70, **CASES[name])
    before = adapter(ours.model)
    ours.train()
    assert_close(torch.tensor(losses_of(ours)), torch.tensor(their_losses), atol=1e-9, rtol=1e-7)
    after = adapter(ours.model)
    moved = max((after[n] - before[n]).abs().max().item() for n in before)
    assert moved > RATE / 10
    for key, theirs in their_weights.items():
        assert_close(after[key], theirs, atol=1e-8, rtol=1e-6)


def test_a_step_without_any_signal_moves_by_momentum_alone_as_in_trl(tmp_path, source, processor, rows, monkeypatch):
    """Equal rewards have advantages of 0: nothing is computed, and AdamW goes on with what it remembers."""
    calls, first = [], judge

    def fades(completion_ids: list[list[int]]) -> list[float]:
        calls.append(len(completion_ids))
        return first(completion_ids) if len(calls) == 1 else [1.0] * len(completion_ids)

    monkeypatch.setattr(sys.modules[__name__], "judge", fades)
    _, theirs = run_stock(tmp_path / "stock", source, processor, rows)
    calls.clear()
    found: list[GrpoStats] = []
    ours = make_ours(tmp_path / "ours", source, processor, rewards=Judged(fades), on_stats=found.append)
    ours.train()
    assert [stats.tokens > 0 for stats in found] == [True, False, False]
    assert [stats.zero_variance for stats in found[1:]] == [1.0, 1.0]
    for key, weight in adapter(ours.model).items():
        assert_close(weight, theirs[key], atol=1e-8, rtol=1e-6)


def test_rollout_and_training_agree_on_every_logprob(tmp_path, source, processor):
    found: list[GrpoStats] = []
    make_ours(tmp_path, source, processor, on_stats=found.append).train()
    gaps = [stats.logprob_gap for stats in found]
    assert len(gaps) == STEPS
    assert max(gap for gap in gaps if gap is not None) < 1e-6  # TRL keeps those of the rollout in fp32


def test_sharing_prompts_changes_no_weight(tmp_path, source, processor):
    weights = []
    for share, budget in ((True, 4096), (False, 4096), (True, 90)):
        ours = make_ours(tmp_path / f"{share}-{budget}", source, processor, share=share, budget=budget)
        ours.train()
        weights.append(adapter(ours.model))
    for others in weights[1:]:
        for key, weight in weights[0].items():
            assert_close(others[key], weight, atol=1e-9, rtol=1e-7)


def test_steps_in_several_micro_batches_are_refused_with_the_same_step_in_one(tmp_path, source, processor):
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size=12 and gradient_accumulation_steps=1"):
        make_ours(tmp_path, source, processor, gradient_accumulation_steps=2)


def test_memory_that_runs_out_changes_no_weight(tmp_path, source, processor, monkeypatch):
    """The first pack of each step does not fit; it is cut in two and the step is taken again."""
    whole = make_ours(tmp_path / "whole", source, processor)
    whole.train()
    short, sizes = make_ours(tmp_path / "short", source, processor), []
    scores = short.engine.pack_scores

    def run_out(pack: Any, **more: Any) -> Any:
        sizes.append(len(pack.wheres))
        if len(pack.wheres) > GROUP and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("as a card of 12 GB would")
        return scores(pack, **more)

    monkeypatch.setattr(short.engine, "pack_scores", run_out)
    short.train()
    assert max(sizes) > GROUP
    assert short.run_dir.read_oom()
    for key, weight in adapter(whole.model).items():
        assert_close(adapter(short.model)[key], weight, atol=1e-9, rtol=1e-7)


def test_three_steps_are_one_and_a_resume_and_two_bit_for_bit(tmp_path, source, processor):
    """Rollouts are seeded by the step, so those after a resume are those that would have been."""
    whole = make_ours(tmp_path / "whole", source, processor)
    whole.train()
    stopped = make_ours(tmp_path / "parts", source, processor)
    stop = StopOnInterrupt()
    stop.asked = True
    stopped.add_callback(stop)
    stopped.train()
    checkpoint = stopped.run_dir.latest_checkpoint()
    assert checkpoint_step(checkpoint) == 1
    resumed = make_ours(tmp_path / "parts", source, processor)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for key, weight in adapter(whole.model).items():
        assert torch.equal(adapter(resumed.model)[key], weight)
