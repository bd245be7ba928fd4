"""The rollout engine against transformers' generate, against training's own log-probabilities, and against the distribution.

Float64 on the CPU, a random model with deepstack and M-RoPE; the same code runs under CUDA graphs (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lensmith.config.tree import Tune
from lensmith.data.positions import mrope_positions
from lensmith.model.adapters import prepare_trainable
from lensmith.model.decode import Decoder
from lensmith.model.engine import Engine
from lensmith.model.sampling import Sampler, Sampling
from lensmith.types import IGNORE, Pack, Segment

pytestmark = pytest.mark.usefixtures("float64_modules")

END_ID, IMAGE_ID, VOCAB = 7, 290, 300
NEVER_IDS = (290, 291, 292, 293)
PROMPTS: list[dict[str, Any]] = [
    {"images": [(3, 4)], "text": [4, 9]},
    {"images": [(2, 2), (1, 3)], "text": [2, 3, 5]},
    {"images": [], "text": [6]},
]


@pytest.fixture(scope="module")
def engine(build_tiny) -> Any:
    """With an adapter that changes something."""
    model = build_tiny(cls=Engine)
    tuned = prepare_trainable(model, Tune(rank=4), seed=0)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(tuned.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model.eval()


@pytest.fixture(scope="module")
def samples(build_sample) -> list[dict[str, Any]]:
    return [build_sample(**shape, learned=1, seed=n) for n, shape in enumerate(PROMPTS)]


def pack_of(samples: list[dict[str, Any]], answers: list[list[int]] | None = None) -> Pack:
    """The samples side by side; `answers` are appended to them and learned."""
    answers = answers or [[] for _ in samples]
    segments, ids, labels, positions, pixels, grids = [], [], [], [], [], []
    for sample, answer in zip(samples, answers, strict=True):
        own = np.concatenate([sample["input_ids"].numpy(), np.array(answer, dtype=np.int64)])
        shapes = [] if sample["image_grid_thw"] is None else [tuple(g) for g in sample["image_grid_thw"].tolist()]
        segments.append(Segment(sum(map(len, ids)), len(own)))
        ids.append(own)
        labels.append(np.concatenate([np.full(len(sample["input_ids"]), IGNORE), np.array(answer, dtype=np.int64)]))
        positions.append(mrope_positions(own, shapes, image_token_id=IMAGE_ID, merge=2).astype(np.int64))
        if shapes:
            pixels.append(sample["pixel_values"])
            grids.append(sample["image_grid_thw"])
    return Pack(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        labels=torch.from_numpy(np.concatenate(labels)),
        positions=torch.from_numpy(np.concatenate(positions, axis=1)),
        segments=tuple(segments),
        pixels=torch.cat(pixels) if pixels else torch.empty(0, 1536, dtype=torch.float64),
        grids=torch.cat(grids) if grids else torch.empty(0, 3, dtype=torch.int64),
        wheres=tuple(str(n) for n in range(len(samples))),
    )


def complete(engine: Any, samples: list[dict[str, Any]], members: int, most: int, **sampling: Any) -> Any:
    decoder = Decoder(engine, Sampling(**sampling), end_ids=[END_ID], never_ids=NEVER_IDS)
    generator = torch.Generator().manual_seed(3)
    return decoder.complete(pack_of(samples), members, max_new_tokens=most, generator=generator)


def test_greedy_completions_are_those_of_generate(engine, samples):
    found = complete(engine, samples, 2, 40, temperature=0)
    for sample, group in zip(samples, found, strict=True):
        settings = GenerationConfig(
            max_new_tokens=40, do_sample=False, eos_token_id=END_ID, pad_token_id=0, suppress_tokens=list(NEVER_IDS)
        )
        pictures = {k: sample[k] for k in ("pixel_values", "image_grid_thw") if sample[k] is not None}
        stock = engine.generate(
            input_ids=sample["input_ids"][None],
            attention_mask=torch.ones_like(sample["input_ids"])[None],
            mm_token_type_ids=sample["mm_token_type_ids"][None],
            generation_config=settings,
            **pictures,
        )[0, len(sample["input_ids"]) :].tolist()
        engine.model.rope_deltas = None
        assert [list(completion.ids) for completion in group] == [stock, stock]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_at_rollout_are_those_of_training(engine, samples, temperature):
    found = complete(engine, samples, 3, 90, temperature=temperature)
    for sample, group in zip(samples, found, strict=True):
        for completion in group:
            pack = pack_of([sample], [list(completion.ids)])
            with torch.no_grad():
                logprobs, _ = engine.pack_scores(pack, temperature=temperature)
            assert_close(torch.tensor(completion.logprobs, dtype=torch.float64), logprobs)


def test_sequences_that_finish_leave_without_changing_the_others(engine, samples):
    """With an end token that is likely, most sequences stop early and the batch shrinks on the way."""
    ends = list(range(5, 20))
    decoder = Decoder(engine, Sampling(), end_ids=ends, never_ids=NEVER_IDS)
    found = decoder.complete(pack_of(samples), 8, max_new_tokens=120, generator=torch.Generator().manual_seed(1))
    completions = [c for group in found for c in group]
    assert len({len(c.ids) for c in completions}) > 10
    for completion in completions:
        assert completion.stopped == (completion.ids[-1] in ends)
        assert not set(completion.ids[:-1]) & set(ends)
        assert completion.stopped or len(completion.ids) == 120
    longest = max(range(len(completions)), key=lambda n: len(completions[n].ids))
    pack = pack_of([samples[longest // 8]], [list(completions[longest].ids)])
    with torch.no_grad():
        assert_close(torch.tensor(completions[longest].logprobs, dtype=torch.float64), engine.pack_logprobs(pack))


def test_a_seed_gives_the_same_completions_again(engine, samples):
    assert complete(engine, samples, 2, 20) == complete(engine, samples, 2, 20)


def test_media_tokens_are_never_drawn(engine, samples):
    """Not even where they are the likeliest by far."""
    head = engine.lm_head.weight
    with torch.no_grad():
        before = head.clone()
        head[list(NEVER_IDS)] *= 50
        found = complete(engine, samples, 4, 60)
        head.copy_(before)
    assert not {token for group in found for c in group for token in c.ids} & set(NEVER_IDS)


FILTERS: dict[str, tuple[dict[str, Any], Callable[[], list[Any]]]] = {
    "temperature": ({"temperature": 0.6}, lambda: [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 5}, lambda: [TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.8}, lambda: [TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, lambda: [MinPLogitsWarper(0.1)]),
    "all": (
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        lambda: [TemperatureLogitsWarper(1.4), TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_drawn_from_transformers_distribution(name):
    """200,000 draws: every frequency within five standard errors, and nothing that the filters forbid."""
    settings, warpers = FILTERS[name]
    draws, generator = 200_000, torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 40, generator=generator, dtype=torch.float64)
    expected = LogitsProcessorList(warpers())(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]
    sampler = Sampler(Sampling(**settings), torch.empty(0, dtype=torch.int64))
    noise = torch.empty(draws, 40, dtype=torch.float64).exponential_(generator=generator)
    tokens, logprobs = sampler.draw(logits.expand(draws, -1), noise)
    shares = torch.bincount(tokens, minlength=40) / draws
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 5 * error).all()
    at_temperature = (logits / settings.get("temperature", 1.0)).log_softmax(-1)[0]
    assert_close(logprobs, at_temperature[tokens])
