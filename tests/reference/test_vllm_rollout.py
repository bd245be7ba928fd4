"""Completions by vLLM, against a stand-in for vLLM's two classes (tests/fixtures/vllm_stand_in.py): real TRL between it and us.

vLLM itself needs a torch of its own; what came of running it is in docs/log.md, 2026-11-28.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from PIL import Image
from safetensors import safe_open
from tests.fixtures.vllm_stand_in import LLM, SamplingParams
from torch.testing import assert_close
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from lensmith.config.read import read_config
from lensmith.config.tree import Images, RunConfig, Tune
from lensmith.data.encode import Encoder
from lensmith.data.groups import GroupPacker, read_prompt
from lensmith.data.images import read_geometry, read_patches, seen_picture
from lensmith.data.source import SampleSource, open_source
from lensmith.errors import RunError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine
from lensmith.model.load import load_model
from lensmith.model.names import resolve_model
from lensmith.rundir import RunDir
from lensmith.train.grpo_alarms import LOGPROB_GAP, Alarms
from lensmith.train.grpo_stats import GrpoStats
from lensmith.train.grpo_trainer import GRPOTrainer
from lensmith.train.oom import MemoryGuard
from lensmith.train.recover import GradientGuard
from lensmith.train.vllm_rollout import NEVER, VllmRollout, fingerprint, one_mark_each
from lensmith.train.vllm_weights import merged_tensors

STEPS, GROUP, PROMPTS, NEW_TOKENS, RATE = 3, 2, 2, 6, 3e-2
GAP = LOGPROB_GAP[torch.float32]


@pytest.fixture(scope="module", name="source")
def some_rows(tmp_path_factory, processor) -> SampleSource:
    """One picture, two, and none; of sizes that are no multiples of a token's side, one of them small."""
    folder, rng, lines = tmp_path_factory.mktemp("rows"), np.random.default_rng(0), []
    for number, sizes in enumerate([[(70, 130)], [(40, 40), (150, 90)], []]):
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"images": names, "question": f"What colour is number {number}?", "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    config = read_config(None, [f"data.train={folder / 'rows.jsonl'}"])
    return open_source(config.data, Encoder.from_processor(processor, Images(min_tokens=1)), which="train")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL sets these for good; so they are put back after each test
        monkeypatch.delenv(name)


class Judged:
    names, weights = ("judge",), (1.0,)

    def score(self, batch: Any) -> Any:
        values = [sum(ids) % 5 / 4 for ids in batch.completion_ids]
        return SimpleNamespace(values=np.array(values)[:, None], failures={})


def config_of(*settings: str) -> RunConfig:
    return read_config(
        None,
        [
            "task=grpo", "rollout.engine=vllm", f"grpo.group={GROUP}", f"grpo.max_new_tokens={NEW_TOKENS}",
            f"optim.effective_samples={GROUP * PROMPTS}", "grpo.temperature=0.8", *settings,
        ],
    )  # fmt: skip


def make_trainer(
    folder: Path, source: SampleSource, processor: Any, found: list[GrpoStats], *settings: str, tune: Tune | None = None
) -> GRPOTrainer:
    config = config_of(*settings)
    engine = Engine.from_pretrained(resolve_model("lensmith/tiny"), dtype=torch.float32)
    model = prepare_trainable(engine, tune or Tune(rank=4), seed=7)
    encoder, vocabulary = source.encoder, processor.tokenizer.get_vocab()
    ids = {"image_token_id": encoder.image_token_id, "video_token_id": encoder.video_token_id}
    rollout = VllmRollout(
        config,
        read_geometry(processor),
        dtype=torch.float32,
        image_token_id=encoder.image_token_id,
        end_ids=[vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]],
        never_ids=list(ids.values()),
        longest_tokens=123,
    )
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    arguments = trl.GRPOConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=GROUP * PROMPTS, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, learning_rate=RATE, optim="adamw_torch", use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        shuffle_dataset=False, save_strategy="no", temperature=0.8,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        engine=engine,
        args=arguments,
        processor=processor,
        order=[0, 1, 2, 0, 1, 2],
        read=lambda number: read_prompt(source, number),
        packer=GroupPacker(read_geometry(processor), **ids, budget_tokens=4096),
        rollout=rollout,
        rewards=Judged(),  # type: ignore[arg-type]
        groups=[{"params": [p for p in model.parameters() if p.requires_grad], "lr": RATE, "weight_decay": 0.0}],
        run=run,
        guard=GradientGuard(lambda _: None),
        memory=MemoryGuard(engine, run, lambda _: None, budget_tokens=4096),
        on_stats=found.append,
    )


def ring(found: list[GrpoStats]) -> list[str]:
    alarms = Alarms(config_of().grpo, torch.float32, vllm=True)
    return [sentence for stats in found for sentence in alarms.look(stats)]


def test_weights_prompts_pictures_and_sampling_reach_vllm_as_training_has_them(tmp_path, source, processor):
    """Log-probabilities agree at every step although the weights move far; each of the four would break that."""
    found: list[GrpoStats] = []
    trainer = make_trainer(tmp_path / "run", source, processor, found)
    before = fingerprint(trainer.model)
    trainer.train()
    assert not torch.equal(fingerprint(trainer.model), before)
    assert [stats.logprob_gap is not None and stats.logprob_gap < GAP for stats in found] == [True] * STEPS
    assert [stats.stale for stats in found] == [False] * STEPS
    assert ring(found) == []

    given, encoder = LLM.newest.given, source.encoder
    assert given["model"] == resolve_model("lensmith/tiny")
    assert (given["dtype"], given["quantization"], given["max_model_len"]) == ("float32", None, 123)
    assert given["logprobs_mode"] == "processed_logprobs"
    assert given["gpu_memory_utilization"] == 0.3
    prompt, sampling = LLM.newest.asked[0]
    assert len(LLM.newest.asked) == STEPS * PROMPTS * GROUP
    assert prompt["prompt_token_ids"].count(encoder.image_token_id) == 1
    assert vars(sampling) == {
        "n": 1, "temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0,
        "max_tokens": NEW_TOKENS, "logit_bias": {encoder.image_token_id: NEVER, encoder.video_token_id: NEVER},
        "stop_token_ids": [processor.tokenizer.get_vocab()[token] for token in ("<|im_end|>", "<|endoftext|>")],
    }  # fmt: skip
    sizes = [size.seen_px for size in read_prompt(source, 1).encoded.images]
    two = next(p for p, _ in LLM.newest.asked if isinstance(p.get("multi_modal_data", {}).get("image"), list))
    assert [picture.size[::-1] for picture in two["multi_modal_data"]["image"]] == sizes
    assert any("multi_modal_data" not in asked for asked, _ in LLM.newest.asked), "the prompt without a picture"


def test_weights_that_vllm_does_not_take_over_ring_as_stale(tmp_path, source, processor):
    found: list[GrpoStats] = []
    trainer = make_trainer(tmp_path / "run", source, processor, found)
    sync, calls = trainer.vllm_generation.sync_weights, []

    def first_alone() -> None:
        LLM.newest.takes_weights = not calls
        calls.append(1)
        sync()

    trainer.vllm_generation.sync_weights = first_alone
    trainer.train()
    said = ring(found)
    assert len(said) == 1
    assert "They agreed at an earlier step, so vLLM's weights are stale" in said[0]


def test_weights_that_are_not_handed_over_ring_although_log_probabilities_may_agree(tmp_path, source, processor):
    found: list[GrpoStats] = []
    trainer = make_trainer(tmp_path / "run", source, processor, found)
    sync, calls = trainer.vllm_generation.sync_weights, []
    trainer.vllm_generation.sync_weights = lambda: None if calls else (calls.append(1), sync())
    trainer.train()
    assert [stats.stale for stats in found] == [False, True, True]
    assert any("stale rollout weights: vLLM wrote these completions with other weights" in said for said in ring(found))


def test_a_prompt_that_vllm_reads_otherwise_stops_the_run(tmp_path, source, processor, monkeypatch):
    trainer = make_trainer(tmp_path / "run", source, processor, [])
    LLM.newest.processor.image_processor.size = {"shortest_edge": 64 * 1024, "longest_edge": 1280 * 1024}
    with pytest.raises(RunError, match=r"read another prompt .* of them for pictures instead of 8"):
        trainer.train()


def test_a_tower_that_trains_makes_vllm_forget_features_of_pictures(tmp_path, source, processor):
    found: list[GrpoStats] = []
    tune = Tune(method="full", language="trained", vision="trained", merger="trained")
    settings = ("tune.method=full", "tune.vision=trained", "tune.merger=trained")
    make_trainer(tmp_path / "run", source, processor, found, *settings, tune=tune).train()
    assert LLM.newest.encoder_resets == STEPS
    assert ring(found) == []


def test_a_log_probability_that_is_missing_rings(tmp_path, source, processor):
    stats = SimpleNamespace(
        step=1, zero_variance=0.0, entropy=1.0, completion_tokens=5.0, truncated=0.0, repetition=0.0, stale=False,
        left_out=0.0, logprob_gap=float("nan"),
    )  # fmt: skip
    (said,) = ring([stats])  # type: ignore[list-item]
    assert "are nan nats apart" in said
    assert "They have not agreed since this start" in said


def test_pictures_are_the_bytes_that_training_cuts_up(source, processor):
    """And the processor leaves them as they are under the limits that vLLM is given."""
    geometry = read_geometry(processor)
    for size in read_prompt(source, 1).encoded.images:
        side = {"shortest_edge": 1024, "longest_edge": 1280 * 1024}
        theirs = processor.image_processor(images=[seen_picture(size)], size=side, return_tensors="pt")["pixel_values"]
        assert_close(read_patches(size, geometry), theirs, atol=0, rtol=0)


def test_runs_of_marks_become_one():
    assert one_mark_each([5, 9, 9, 9, 6, 9, 9, 7, 7], mark=9) == [5, 9, 6, 9, 7, 7]
    assert one_mark_each([9, 9], mark=9) == [9]
    assert one_mark_each([], mark=9) == []


def with_changes(model: Any) -> Any:
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def test_merged_tensors_are_the_checkpoints_names_with_pefts_merged_values_and_nothing_moves():
    engine = Engine.from_pretrained(resolve_model("lensmith/tiny"), dtype=torch.bfloat16)
    model = with_changes(prepare_trainable(engine, Tune(rank=4, vision="adapted", rslora=True), seed=7))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = {name: values.clone() for name, values in merged_tensors(model, torch.device("cpu"))}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} moved"
    (file,) = Path(resolve_model("lensmith/tiny")).glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert set(found) <= set(opened.keys())
        assert set(opened.keys()) - set(found) <= {"lm_head.weight"}, "a tied head is the embedding"
    merged = model.float().merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert_close(found[name].float(), parameter, atol=2e-3, rtol=2**-8)


def test_weights_in_4_bits_are_handed_over_whole():
    """By what the model computes: its merged weights in a plain model answer as it does."""
    engine = load_model(read_config(None, ["tune.method=qlora"]), device=torch.device("cpu")).model
    model = with_changes(prepare_trainable(engine, Tune(method="qlora", rank=4), seed=7))
    plain = Engine.from_pretrained(resolve_model("lensmith/tiny"), dtype=engine.dtype)
    places = dict(plain.named_parameters())
    with torch.no_grad():
        for name, values in merged_tensors(model, torch.device("cpu")):
            assert values.dtype == places[name].dtype
            places[name].copy_(values)
        ids = torch.arange(5, 30)[None]
        assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3, rtol=0)


def test_what_is_used_of_trl_is_there():
    parameters = {
        "_init_vllm": ["self"],
        "_iter_named_params": ["self"],
        "_place_features": ["self", "features", "prompt_ids"],
        "sync_weights": ["self"],
        "generate": ["self", "prompts", "images", "num_generations", "profiler"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(VLLMGeneration, name)).parameters) == expected
    known = inspect.signature(VLLMGeneration.__init__).parameters
    passed = ("mode", "server_base_url", "gpu_memory_utilization", "max_model_length", "max_num_seqs", "model_impl")
    assert set(passed) | {"temperature", "max_completion_length", "generation_kwargs"} <= set(known)
    turn = inspect.getsource(trl.GRPOTrainer._generate_single_turn)
    assert "self.state.global_step != self._last_loaded_step" in turn
    assert "self.vllm_generation.sync_weights()" in turn
    assert "self.use_vllm = args.use_vllm" in inspect.getsource(trl.GRPOTrainer.__init__)
