"""TRL's GRPOTrainer over packs with shared prompts and our own rollouts; advantages, losses, KL and clipping are TRL's.

    prompts ──> rollout ──> rewards ──> advantages ──> packs ──> loss ──> step
    ours        ours        ours        TRL            ours      TRL      transformers

Completions come from our rollout, or from TRL's vLLM (`VllmRollout`), which is put in its place after TRL's constructor: TRL
would build it from the trained model's own modules.

What is overridden is pinned by tests/reference/test_grpo.py, which runs the stock trainer beside this one in float64.

TRL hands padded batches around; here they carry one more entry, `row`, the number of each completion in the batch that it
was generated in. Whatever TRL wants the log-probabilities of is looked up by it and computed from packs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.utils import split_tensor_dict

from lensmith.data.groups import GroupPacker, Prompt
from lensmith.errors import ConfigError
from lensmith.model.adapters import kept_values
from lensmith.model.decode import Completion
from lensmith.model.engine import Engine
from lensmith.rundir import RunDir
from lensmith.train.grpo_stats import Batch, GrpoMeter, GrpoStats
from lensmith.train.loop import RunFolderLoop
from lensmith.train.oom import MemoryGuard
from lensmith.train.ranks import world_size
from lensmith.train.recover import GradientGuard
from lensmith.train.rewards import RewardBatch, RewardSet
from lensmith.train.rollout import Rollout
from lensmith.train.rounded import RoundedAdamW
from lensmith.train.vllm_rollout import VllmRollout
from lensmith.types import Pack

SEQUENCE_MEANS = ("grpo", "dr_grpo", "sapo", "luspo")
"""TRL's losses that are a mean over the sequences of a batch: a part of it weighs as many as it has of them."""
TOKEN_MEANS = ("bnpo",)
"""Those that are a mean over its tokens. All others are divided by a count that TRL takes over the whole step already."""


class GRPOTrainer(RunFolderLoop, grpo_trainer.GRPOTrainer):
    """See the module. `order`: prompt numbers in the order of training; `read`: gives the prompt of a number."""

    def __init__(
        self,
        *,
        model: Any,
        engine: Engine,
        args: GRPOConfig,
        processor: Any,
        order: Sequence[int],
        read: Callable[[int], Prompt],
        packer: GroupPacker,
        rollout: Rollout | VllmRollout,
        rewards: RewardSet,
        groups: Sequence[dict[str, Any]],
        run: RunDir,
        guard: GradientGuard,
        memory: MemoryGuard,
        on_stats: Callable[[GrpoStats], None],
        on_batch: Callable[[Batch], None] = lambda _: None,
        callbacks: Sequence[TrainerCallback] = (),
        own_optimizer: RoundedAdamW | None = None,
    ) -> None:
        _check_arguments(args)
        prompts = [[{"role": "user", "content": f"prompt {number}"}] for number in order]
        rows = Dataset.from_dict({"prompt": prompts, "number": list(order)})
        with kept_values(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=rows,
                processing_class=processor,
                reward_funcs=[_named(name) for name in rewards.names],
                callbacks=list(callbacks),
            )
        self._settle(groups=groups, run=run, guard=guard, memory=memory, own_optimizer=own_optimizer)
        self.reward_weights = torch.tensor(list(rewards.weights), dtype=torch.float32)
        self.engine, self.read, self.packer, self.rollout, self.rewards = engine, read, packer, rollout, rewards
        self.on_stats, self.on_batch = on_stats, on_batch
        self._meter = GrpoMeter()
        self._prompts: list[Prompt] = []
        self._completions: list[Completion] = []
        """Of the batch generated last, one entry per completion; `row` counts in these."""
        self._pack: Pack | None = None
        """The pack whose loss is being computed; None where all rows of a batch are wanted."""
        self._learns = True
        """Whether any completion of the step under way had something to learn from."""
        if isinstance(rollout, VllmRollout):
            self.vllm_generation = rollout.open(model, self.accelerator, processor)
            self.use_vllm, self._last_loaded_step = True, -1

    # --- completions --------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As in TRL, but nothing is shuffled: groups stay together, so that their prompt can be shared."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        per_generation = self.args.steps_per_generation
        if self._step % (per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            whole = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(whole, per_generation)
        return self._buffered_inputs[self._step % per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.packer.forget()
        numbers = [row["number"] for row in inputs]
        prompts = {number: self.read(number) for number in dict.fromkeys(numbers)}
        self._prompts = [prompts[number] for number in numbers]
        output = super()._generate_and_score_completions(inputs)
        output["row"] = torch.arange(len(inputs))
        if self.use_vllm:
            self._look_at_vllm(output)
        self.on_batch(
            Batch(
                self.state.global_step + 1,
                tuple(self._prompts),
                tuple(self._completions),
                self._table,
                tuple(output["advantages"].tolist()),
            )
        )
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [prompt.encoded.input_ids.tolist() for prompt in self._prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        if isinstance(self.rollout, VllmRollout):
            return self._ask_vllm(self.rollout, prompt_ids, num_generations)
        first_of_each = [prompt.encoded for prompt in self._prompts[::num_generations]]
        groups = self.rollout.complete(first_of_each, num_generations, draw=self.state.global_step)
        self._completions = [completion for group in groups for completion in group]
        return [list(c.ids) for c in self._completions], [list(c.logprobs) for c in self._completions]

    def _ask_vllm(self, rollout: VllmRollout, prompt_ids: list[list[int]], members: int) -> tuple[Any, Any]:
        """By TRL, which hands over the weights where they have moved."""
        started = time.perf_counter()
        pictures = rollout.pictures([prompt.encoded for prompt in self._prompts])
        ids, logprobs = super()._generate_single_turn(prompt_ids, pictures, {}, members)
        self._completions = rollout.read(ids, logprobs)
        rollout.cost.seconds += time.perf_counter() - started
        rollout.cost.tokens += sum(map(len, ids))
        return ids, logprobs

    def _look_at_vllm(self, output: dict[str, Any]) -> None:
        """TRL has computed the log-probabilities of all fresh completions again; before any step, so they should be equal."""
        self._meter.compare(output["old_per_token_logps"], output["sampling_per_token_logps"])
        ratio, mask = output["importance_sampling_ratio"], output["completion_mask"].bool()
        # One ratio a completion, or one a token, with 1 for padding.
        ratio = ratio[mask] if ratio.shape == mask.shape else ratio
        self._meter.answered(stale=self.vllm_generation.is_behind, left_out=(ratio == 0).double().mean())

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        texts = self.processing_class.tokenizer.batch_decode(completion_ids_list, skip_special_tokens=True)
        self._table = self.rewards.score(
            RewardBatch(
                completions=texts,
                completion_ids=completion_ids_list,
                samples=[prompt.sample for prompt in self._prompts],
                truncated=[not completion.stopped for completion in self._completions],
            )
        )
        self._meter.judged(self._table.failures)
        return torch.tensor(self._table.values, dtype=torch.float32, device=self.accelerator.device)

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        """Of the completion tokens, [rows, logits_to_keep], 0 where there is none; from packs, whatever TRL padded.

        `model` is this trainer's own; as a reference it stands inside PEFT's use_adapter(), with TRL's frozen
        copy of the adapter as it was at the start.
        """
        if self._pack is not None:
            packs, rows = [self._pack], self._rows
        else:
            rows = list(range(len(input_ids)))
            packs = self._packs(rows)
        places = {row: place for place, row in enumerate(rows)}
        wide = torch.promote_types(self.engine.model.language_model.norm.weight.dtype, torch.float32)
        logprobs = torch.zeros(len(rows), logits_to_keep, dtype=wide, device=self.engine.place)
        entropies = torch.zeros_like(logprobs)
        for pack in packs:
            found, entropy = self.engine.pack_scores(pack, temperature=self.temperature)
            of_rows = [(places[_row_of(name)], len(self._completions[_row_of(name)].ids)) for name in pack.wheres]
            index = torch.tensor([(place, token) for place, count in of_rows for token in range(count)])
            index = tuple(index.to(logprobs.device, non_blocking=True).unbind(1))
            logprobs = logprobs.index_put(index, found)
            entropies = entropies.index_put(index, entropy)
        # Later iterations over the same completions differ by what the policy has moved since.
        if self._pack is not None and not self.use_vllm and self.state.global_step % self.num_iterations == 0:
            self._meter.compare(logprobs.detach(), self._sampled)
        return logprobs, entropies, None

    def _packs(self, rows: Sequence[int]) -> list[Pack]:
        """Those completions of the batch, in packs whose `wheres` are their numbers."""
        if not rows:
            return []
        return self.packer.pack_completions(
            [self._prompts[row].encoded for row in rows],
            [self._completions[row].ids for row in rows],
            [f"{self._prompts[row].encoded.where}, completion #{row}" for row in rows],
        )

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if not model.training:
            model.train()
        # TRL counts from 0 in every start of a run; a resumed one would regenerate at other steps than it did.
        self._step = self.state.global_step
        batch = self._prepare_inputs(inputs)
        started = time.perf_counter()
        packs = self._packs(self._moving_rows(batch))
        self.guard.wheres = tuple(name for pack in packs for name in pack.wheres)
        total = self.memory.take_step(
            self.state.global_step + 1,
            packs,
            take_pack=functools.partial(self._take_pack, model, batch),
            drop_gradients=functools.partial(self.tuned.zero_grad, set_to_none=True),
        )
        if not packs:
            # TRL computes such a step and gets gradients of 0, by which AdamW's momentum moves on; so it does here.
            for parameter in self.tuned.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self._learns = bool(packs)
        self._step += 1
        self._meter.after_step(packs, batch, self._completions, seconds=time.perf_counter() - started)
        return total

    def _moving_rows(self, batch: dict[str, Any]) -> list[int]:
        """Completions with something to learn from. A group whose rewards are all equal has no gradient: its advantages are
        0, so it is not computed, and still counts wherever TRL divides. A divergence (beta) moves every completion."""
        rows = batch["row"].tolist()
        learned = batch["completion_mask"].any(1).tolist()
        moving = [self.beta != 0.0 or advantage != 0.0 for advantage in batch["advantages"].tolist()]
        return [row for row, some, moves in zip(rows, learned, moving, strict=True) if some and moves]

    def _take_pack(self, model: nn.Module, batch: dict[str, Any], pack: Pack) -> Tensor:
        """One pack forward and backward; returns its share of the step's loss."""
        self._pack, self._rows = pack, [_row_of(name) for name in pack.wheres]
        place_of = {row: place for place, row in enumerate(batch["row"].tolist())}
        places = torch.tensor([place_of[row] for row in self._rows])
        part = {name: _take_rows(value, places, len(batch["row"])) for name, value in batch.items()}
        self._sampled = part["sampling_per_token_logps"]
        try:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, part) * self._weight(part, batch)
            self.accelerator.backward(loss)
        finally:
            self._pack = None
        return loss.detach()

    def _weight(self, part: dict[str, Any], batch: dict[str, Any]) -> Tensor | float:
        """What the loss of a part counts in that of the batch, so that the parts add up to it."""
        if self.loss_type in SEQUENCE_MEANS:
            return len(part["row"]) / len(batch["row"])
        if self.loss_type in TOKEN_MEANS:
            return part["completion_mask"].sum().double() / batch["completion_mask"].sum()
        return 1.0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        return super()._clip_grad_norm(model) if self._learns else torch.zeros(())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            stats = self._meter.stats(logs, self._metrics["train"], self.rollout.cost.take(), self.state.global_step)
            self.on_stats(stats)
        if self.tells_loggers(logs):
            super().log(logs, start_time)


def _check_arguments(args: GRPOConfig) -> None:
    """Raise ConfigError for what packs cannot do yet."""
    if args.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: a step is cut into packs by their tokens here, "
            f"so give it all of its completions at once: per_device_train_batch_size="
            f"{args.per_device_train_batch_size * args.gradient_accumulation_steps} and gradient_accumulation_steps=1, the "
            "same step."
        )
    if world_size() > 1:
        raise ConfigError(
            f"task=grpo: {world_size()} processes were started, and GRPO trains in one so far. Start one, with "
            "CUDA_VISIBLE_DEVICES=0 where there are several GPUs."
        )
    if args.entropy_coef:
        raise ConfigError(
            f"entropy_coef={args.entropy_coef}: entropies are measured here and carry no gradient. Leave it at 0."
        )


def _named(name: str) -> Callable[..., Any]:
    """TRL takes the names that it logs from functions; ours are never called (see `_calculate_rewards`)."""

    def reward(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"TRL called the reward {name} itself")

    reward.__name__ = name
    return reward


def _row_of(name: str) -> int:
    return int(name.rpartition("#")[2])


def _take_rows(value: Any, places: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == rows:
        return value[places.to(value.device)]
    return value
