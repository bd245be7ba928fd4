"""Completions by vLLM, through TRL's own VLLMGeneration: what it is told of the run, and what is checked of what it does.

Weights, pictures and prompts are handed over exactly as training has them, and each is checked where it can be:

    weights     merged without touching the trained ones; a fingerprint tells when vLLM answers with older ones
    pictures    resized already, to the size that training sees; vLLM is told not to resize them again
    prompts     the ids that vLLM reports having read are compared with those that training computes
    sampling    temperature, end tokens and lengths of the built-in engine; marks of pictures are never drawn
    log-probs   TRL computes those of every fresh batch again; `GrpoMeter` compares, `Alarms` rings

Of TRL are used VLLMGeneration with _init_vllm, _iter_named_params, _place_features, sync_weights and generate, and of vLLM
what these call; tests/reference/test_vllm_rollout.py pins them.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from lensmith.config.tree import RunConfig
from lensmith.data.images import seen_picture
from lensmith.errors import RunError
from lensmith.model.decode import Completion
from lensmith.model.names import resolve_model
from lensmith.train.rollout import RolloutCost
from lensmith.train.vllm_ready import picture_limits
from lensmith.train.vllm_weights import merged_tensors
from lensmith.types import Encoded, VisionGeometry

NEVER = -100.0
"""Added to the logits of what must not be drawn; the least that vLLM's logit_bias takes."""


class VllmRollout:
    """What vLLM is told of a run."""

    def __init__(
        self,
        config: RunConfig,
        geometry: VisionGeometry,
        *,
        dtype: torch.dtype,
        image_token_id: int,
        end_ids: Sequence[int],
        never_ids: Sequence[int],
        longest_tokens: int,
        draw: int = 0,
    ) -> None:
        """`longest_tokens`: of a prompt with its completion; `draw`: steps that earlier starts of the run have taken."""
        self.config, self.geometry, self.cost = config, geometry, RolloutCost()
        self.dtype, self.image_token_id = dtype, image_token_id
        self.end_ids, self.never_ids, self.longest_tokens = tuple(end_ids), tuple(never_ids), longest_tokens
        self.draw = draw

    def open(self, model: nn.Module, accelerator: Any, processor: Any) -> SyncedVllm:
        """vLLM with the checkpoint's weights, beside the training or on its server; `model` is handed over later."""
        rollout, grpo = self.config.rollout, self.config.grpo
        return SyncedVllm(
            model,
            self,
            accelerator=accelerator,
            processing_class=processor,
            mode=rollout.vllm_mode,
            server_base_url=rollout.vllm_server.rstrip("/"),
            gpu_memory_utilization=rollout.vllm_gpu_share,
            max_model_length=self.longest_tokens,
            max_num_seqs=self.config.optim.effective_samples,
            model_impl="vllm",
            temperature=grpo.temperature,
            max_completion_length=grpo.max_new_tokens,
            generation_kwargs=self.sampling(),
        )

    def sampling(self) -> dict[str, Any]:
        """Beside temperature and length, by the names of vLLM's SamplingParams. No seed: it would be each completion's own,
        and those of one prompt would all be equal."""
        return {"logit_bias": dict.fromkeys(self.never_ids, NEVER), "stop_token_ids": list(self.end_ids)}

    def engine_arguments(self) -> dict[str, Any]:
        """What TRL leaves open in vLLM's constructor, or decides otherwise."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            # Whole weights are handed over; TRL would ask for 4 bits where the trained model has them.
            "quantization": None,
            "seed": int(np.random.SeedSequence([self.config.seed, self.draw]).generate_state(1, np.uint32)[0] >> 1),
            "mm_processor_kwargs": picture_limits(self.config, self.geometry),
            "limit_mm_per_prompt": {"video": 0},
        }

    def pictures(self, prompts: Sequence[Encoded]) -> list[list[Image.Image] | None] | None:
        """As TRL passes them on: a list for each prompt that has any, and nothing where no prompt has."""
        seen: dict[object, Image.Image] = {}
        for image in itertools.chain.from_iterable(prompt.images for prompt in prompts):
            key = (image.ref.key, image.seen_px)
            if key not in seen:
                seen[key] = seen_picture(image)
        if not seen:
            return None
        return [[seen[image.ref.key, image.seen_px] for image in prompt.images] or None for prompt in prompts]

    def read(self, ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float | None]]) -> list[Completion]:
        """What was answered. A log-probability that vLLM could not tell is not a number, which the meter sees."""
        return [
            Completion(
                tuple(one),
                tuple(float("nan") if p is None else p for p in probs),
                bool(one) and one[-1] in self.end_ids,
            )
            for one, probs in zip(ids, logprobs, strict=True)
        ]


class SyncedVllm(VLLMGeneration):
    """TRL's, with weights merged by us and every prompt checked."""

    def __init__(self, model: nn.Module, rollout: VllmRollout, **settings: Any) -> None:
        self.tuned, self.rollout = model, rollout
        self.is_behind = False
        """Whether the last completions were written with other weights than those in training."""
        self._handed: Tensor | None = None
        super().__init__(model=_Checkpoint(resolve_model(rollout.config.model)), **settings)  # type: ignore[arg-type]

    def _init_vllm(self) -> None:
        if self.mode == "server":
            return super()._init_vllm()
        plain = vllm_generation.LLM  # type: ignore[attr-defined]  # there where vLLM is installed
        try:
            vllm_generation.LLM = lambda **given: plain(**(given | self.rollout.engine_arguments()))  # type: ignore
            super()._init_vllm()
        finally:
            vllm_generation.LLM = plain  # type: ignore[attr-defined]

    def _iter_named_params(self) -> Generator[tuple[str, Tensor], None, None]:
        return merged_tensors(self.tuned, self.accelerator.device)

    def sync_weights(self) -> None:
        super().sync_weights()
        tune = self.rollout.config.tune
        if self.mode == "colocate" and (tune.vision, tune.merger) != ("frozen", "frozen"):
            self.llm.llm_engine.reset_encoder_cache()  # features of pictures, by the old tower
        self._handed = fingerprint(self.tuned)

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list[Any] | None] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> tuple[Any, ...]:
        self.is_behind = self._handed is None or not torch.equal(self._handed, fingerprint(self.tuned))
        asked = prompts
        if self.mode == "colocate":
            # vLLM writes as many marks as a picture has tokens where it finds one: a run of them would grow by as many.
            asked = [one_mark_each(ids, self.rollout.image_token_id) for ids in prompts]
        answered = super().generate(asked, images, num_generations, profiler)
        for ours, theirs in zip(prompts, answered[0], strict=True):
            if list(ours) != list(theirs):
                raise RunError(_other_prompt(ours, theirs, self.rollout.image_token_id))
        return answered

    def _place_features(self, features: dict[str, Any] | None, prompt_ids: list[int]) -> dict[str, Any] | None:
        placed = super()._place_features(features, prompt_ids)
        if features is not None and placed is not None:
            theirs, ours = (
                [one["length"] for one in found["mm_placeholders"]["image"]] for found in (features, placed)
            )
            if theirs != ours:
                raise RunError(
                    f"rollout.vllm_server={self.server_base_url}: the server cuts pictures into {theirs} tokens where training "
                    f"sees {ours}. Start it with the --mm-processor-kwargs that docs/grpo.md shows."
                )
        return placed


class _Checkpoint(nn.Module):
    """All that VLLMGeneration asks of the model itself: where its files are, and what it consists of."""

    def __init__(self, name_or_path: str) -> None:
        super().__init__()
        self.name_or_path = name_or_path


@torch.no_grad()
def fingerprint(model: nn.Module) -> Tensor:
    """A number for each trained weight, which a step changes."""
    norms = [
        torch.linalg.vector_norm(weight, dtype=torch.float64) for weight in model.parameters() if weight.requires_grad
    ]
    return torch.stack(norms)


def one_mark_each(ids: Sequence[int], mark: int) -> list[int]:
    """The ids with each run of a mark as a single one."""
    return [
        own for before, own in itertools.pairwise([None, *ids]) if own is not None and (own != mark or before != mark)
    ]


def _other_prompt(ours: Sequence[int], theirs: Sequence[int], mark: int) -> str:
    counts: Mapping[str, tuple[int, int]] = {
        "tokens": (len(ours), len(theirs)),
        "of them for pictures": (list(ours).count(mark), list(theirs).count(mark)),
    }
    told = ", ".join(f"{theirs} {what} instead of {ours}" for what, (ours, theirs) in counts.items())
    return (
        f"rollout.engine=vllm: vLLM read another prompt than training computes: {told}. What it writes cannot be learned from. "
        "Set rollout.engine=builtin, and please report this with the output of `lensmith env`."
    )
