"""GRPO from a config to a tuned model: the same walk as fine-tuning, with rollouts and rewards where answers were.

rows -> prompts -> rollout -> rewards -> advantages -> packs -> step -> tuned weights in the run folder
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trl.trainer.grpo_config import GRPOConfig

from lensmith.data.groups import GroupPacker, read_prompt
from lensmith.evals.predict import MEDIA_TOKENS
from lensmith.model.components import parameter_groups
from lensmith.model.engine import Engine
from lensmith.model.features import GIB, RamStore
from lensmith.train.completions import CompletionLog
from lensmith.train.grpo_stats import GrpoStats
from lensmith.train.grpo_trainer import GRPOTrainer
from lensmith.train.grpo_watch import GrpoWatch
from lensmith.train.measure import own_optimizer
from lensmith.train.oom import MemoryGuard
from lensmith.train.prepare import Prepared, Say
from lensmith.train.ranks import rank
from lensmith.train.recover import GradientGuard, StopOnInterrupt
from lensmith.train.rollout import Rollout
from lensmith.train.rounds import During, Rounds
from lensmith.train.sft import TrainResult, common_arguments, take_steps
from lensmith.train.vllm_ready import longest_sequence, vllm_sentence
from lensmith.train.vllm_rollout import VllmRollout

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

FEATURES_GIB = 1.0
"""Host memory for features of a batch's pictures, where memory.vision_cache_gib says nothing: 30 of 1,000 tokens at 8B."""


def train_grpo(
    prepared: Prepared, *, say: Say, progress: TrainProgress | None = None, during: During | None = None
) -> TrainResult:
    """The steps and the final save of a prepared run; see `lensmith.train.sft.train_model`."""
    config, run = prepared.config, prepared.run
    say(vllm_sentence(config, prepared.loaded.dtype))
    total = len(prepared.plan.steps)
    watch = GrpoWatch(prepared, say, progress)
    stop, rounds = StopOnInterrupt(), Rounds(during, config, run, say)
    trainer = build_trainer(prepared, say, watch, watch.log)
    for callback in (stop, rounds, *([watch.best] if rank() == 0 else [])):
        trainer.add_callback(callback)
    say(f"What is answered, and how it is judged: {run.page_path}")
    with contextlib.closing(watch):
        train_s = take_steps(prepared, trainer, stop, rounds, say)
    for sentence in watch.advice():
        say(sentence)
    return TrainResult(
        model=trainer.tuned,
        processor=prepared.loaded.processor,
        steps=total,
        samples=(total - prepared.steps_done) * config.optim.effective_samples,
        train_s=train_s,
        loss=watch.loss,
        run=run.path,
    )


def build_trainer(
    prepared: Prepared, say: Say, on_stats: Callable[[GrpoStats], None], log: CompletionLog
) -> GRPOTrainer:
    """The trainer of a prepared run."""
    config, loaded, encoder = prepared.config, prepared.loaded, prepared.encoder
    source = prepared.dataset.scan.source
    assert prepared.rewards is not None, "prepare_run has them with task=grpo"
    engine = loaded.model
    by_name = engine.features is None and not any(p.requires_grad for p in engine.model.visual.parameters())
    if by_name:
        # Rollout, old policy, reference and policy look at the same pictures: the tower sees each once per batch.
        engine.features = RamStore(int(FEATURES_GIB * GIB), pinned=loaded.device.type == "cuda")
    packer = GroupPacker(
        encoder.geometry,
        encoder.image_token_id,
        encoder.video_token_id,
        prepared.dataset.budget_tokens,
        prepared.dataset.share_prefix,
        loaded.dtype,
        name_picture=(lambda image: f"{image.ref.key} {image.seen_px}") if by_name else None,
    )
    rollout = build_rollout(prepared, engine, packer)
    rows = prepared.dataset.scan.rows
    return GRPOTrainer(
        model=prepared.model,
        engine=engine,
        args=grpo_arguments(prepared),
        processor=loaded.processor,
        order=[int(rows[sample]) for step in prepared.plan.steps[:: config.grpo.iterations] for sample in step],
        read=lambda row: read_prompt(source, row),
        packer=packer,
        rollout=rollout,
        rewards=prepared.rewards,
        groups=parameter_groups(prepared.model, config.optim, config.tune.method),
        run=prepared.run,
        guard=GradientGuard(say),
        memory=MemoryGuard(engine, prepared.run, say, budget_tokens=prepared.dataset.budget_tokens),
        on_stats=on_stats,
        on_batch=log.add,
        own_optimizer=own_optimizer(prepared.model, config),
    )


def build_rollout(prepared: Prepared, engine: Engine, packer: GroupPacker) -> Rollout | VllmRollout:
    """What writes the completions, as rollout.engine says; auto is the built-in engine."""
    config, loaded, encoder = prepared.config, prepared.loaded, prepared.encoder
    vocabulary: dict[str, int] = loaded.processor.tokenizer.get_vocab()
    ends: Any = engine.generation_config.eos_token_id  # one, several or none
    end_ids: list[int] = sorted({encoder.end_token_id, *([ends] if isinstance(ends, int) else ends or [])})
    never_ids = [vocabulary[token] for token in MEDIA_TOKENS if token in vocabulary]
    if config.rollout.engine == "vllm":
        return VllmRollout(
            config,
            encoder.geometry,
            dtype=loaded.dtype,
            image_token_id=encoder.image_token_id,
            end_ids=end_ids,
            never_ids=never_ids,
            longest_tokens=longest_sequence(config, prepared.dataset.scan),
            draw=prepared.steps_done,
        )
    return Rollout(
        engine, packer, config.grpo, end_ids=end_ids, never_ids=never_ids, seed=config.seed, batch=config.rollout.batch
    )


def grpo_arguments(prepared: Prepared) -> GRPOConfig:
    """Our settings in TRL's words."""
    config, grpo = prepared.config, prepared.config.grpo
    common = common_arguments(prepared)
    common["save_steps"] = -(-common["save_steps"] // grpo.iterations) * grpo.iterations
    return GRPOConfig(
        **common,
        per_device_train_batch_size=config.optim.effective_samples,
        num_generations=grpo.group,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
        top_p=1.0 if grpo.top_p is None else grpo.top_p,
        top_k=0 if grpo.top_k is None else grpo.top_k,
        min_p=grpo.min_p,
        loss_type=grpo.loss,
        importance_sampling_level=grpo.importance,
        scale_rewards=grpo.scale_rewards,
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon_high,
        beta=grpo.beta,
        num_iterations=grpo.iterations,
        mask_truncated_completions=grpo.mask_truncated,
        # VESPO weighs whole completions by itself, and TRL wants its correction of vLLM's log-probabilities by token then.
        vllm_importance_sampling_mode="token_mask" if grpo.loss == "vespo" else "sequence_mask",
        shuffle_dataset=False,
    )
