"""The same function scores the same in TRL's own reward loop, and the two rewards that TRL has too agree with it."""

import inspect
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment
from trl.trainer import grpo_trainer

from lensmith.train.reward_functions import Completion, length, repetition
from lensmith.train.rewards import RewardBatch, load_rewards
from lensmith.types import Message, Sample, Text

EMPTY = Sample("rows.jsonl:1", (), ())
tokens = st.lists(st.integers(0, 5), max_size=60)


@given(tokens, st.integers(1, 4), st.floats(-2, 0))
def test_repetition_is_trls(ids, ngram, penalty):
    (theirs,) = get_repetition_penalty_reward(ngram_size=ngram, max_penalty=penalty)([ids])
    assert repetition(Completion("", ids, EMPTY, False), ngram=ngram, penalty=penalty) == theirs


@given(tokens, st.integers(20, 50), st.integers(0, 20))
def test_length_is_trls_overlong_punishment(ids, longest, cache):
    (theirs,) = get_soft_overlong_punishment(max_completion_len=longest, soft_punish_cache=cache)([ids])
    ours = length(Completion("", ids, EMPTY, False), max_tokens=longest, cache_tokens=cache)
    assert math.isclose(ours, theirs, abs_tol=1e-12)


def price_match(completions, prompts, price, completion_ids, **columns):
    """Uses everything that TRL hands over, and says nothing of one completion."""
    said = [completion[0]["content"] for completion in completions]
    asked = [prompt[-1]["content"] for prompt in prompts]
    return [
        None if not text else float(text == right) + 0.01 * len(ids) + 0.1 * question.count("?")
        for text, right, ids, question in zip(said, price, completion_ids, asked, strict=True)
    ]


def says_something(completions, **columns):
    """A second one, so that no completion is without a number, which TRL would warn about."""
    return [float(bool(completion[0]["content"])) for completion in completions]


def test_one_function_scores_the_same_in_trls_loop(monkeypatch, tmp_path):
    texts, ids = ["42", "", "6"], [[1], [1, 2], [1, 2, 3]]
    asked = {"role": "user", "content": "How much?"}
    rows = [{"prompt": [asked], "price": "42"}] * 3
    functions = [price_match, says_something]

    # TRL's own method with the least of a trainer around it; a change of its convention breaks here.
    monkeypatch.setattr(grpo_trainer, "gather", lambda values: values)
    monkeypatch.setattr(grpo_trainer, "profiling_context", lambda *names: nullcontext())
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        reward_funcs=functions,
        reward_processing_classes=[None] * 2,
        reward_func_names=["price_match", "says_something"],
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        _log_completion_extra=None,
        _log_metric=None,
    )
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = inspect.unwrap(grpo_trainer.GRPOTrainer._calculate_rewards)(
        trainer, rows, [row["prompt"] for row in rows], completions, ids
    )

    turns = (Message("user", (Text("How much?"),)), Message("assistant", (Text("42"),)))
    samples = [Sample("rows.jsonl:1", turns, (), {"price": "42"})] * 3
    ours = load_rewards(functions, root=tmp_path).score(RewardBatch(texts, ids, samples, [False] * 3))
    assert not ours.failures
    assert np.isnan(ours.values).sum() == 1
    np.testing.assert_allclose(ours.values, theirs.numpy(), rtol=1e-6)  # theirs are float32
