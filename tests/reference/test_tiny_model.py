"""The embedded model: loads in plain transformers, has what makes Qwen3-VL hard, and answers drawings it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tools.tiny.feed import QUESTIONS
from tools.tiny.pretrain import compare_with_stock
from tools.tiny.score import HELD_OUT_SEED, answer_questions
from tools.tiny.tasks import make_item
from tools.tiny.tokenizer import NOT_SKIPPED, SPECIAL, VOCAB_SIZE, write_folder

from lensmith.model.names import TINY, resolve_model

MOST_BYTES = 12 * 10**6


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve_model(TINY))


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def test_plain_transformers_loads_the_true_classes(model, processor):
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.eos_token_id


def test_weights_are_bf16_and_small_enough_to_ship(folder):
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= MOST_BYTES
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) > 100
    assert "lm_head.weight" not in names, "the head is the embedding"


def test_special_tokens_follow_the_vocabulary_in_qwens_order(model, processor):
    tokenizer, config = processor.tokenizer, model.config
    assert len(tokenizer) == config.text_config.vocab_size == VOCAB_SIZE
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL, *NOT_SKIPPED])
    assert ids == list(range(VOCAB_SIZE - len(ids), VOCAB_SIZE))
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("text", ["naïve café 1234", "日本語\n\n\ttab", "a<b>c </think> d", "yes"])
def test_the_tokenizer_gives_any_text_back(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_it_has_what_makes_qwen3_vl_hard(model):
    text, vision = model.config.text_config, model.config.vision_config
    sections = text.rope_parameters["mrope_section"]
    assert sum(sections) == text.head_dim // 2
    # transformers interleaves: height and width take every third frequency, so neither may run past the end.
    assert max(sections[1:]) * 3 <= text.head_dim // 2
    assert 1 < text.num_key_value_heads < text.num_attention_heads
    assert (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (16, 2, 2)
    assert max(vision.deepstack_visual_indexes) < vision.depth
    assert len(vision.deepstack_visual_indexes) < text.num_hidden_layers


def test_every_deepstack_merger_reaches_the_logits(model, processor):
    item = make_item(HELD_OUT_SEED, 0, 64, 64, 1)
    content = [{"type": "image", "image": item.image}, {"type": "text", "text": item.questions[0].text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        for merger in model.model.visual.deepstack_merger_list:
            silenced = merger.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
            without = model(**inputs).logits[0, -1]
            silenced.remove()
            assert (whole - without).abs().max() > 0.01, "a merger that was trained changes what is answered"


def test_the_training_forward_is_the_stock_forward(folder):
    # float32 throughout; the largest logits are near 20, so this is rounding over ten layers.
    assert compare_with_stock(folder) < 1e-4


def test_it_answers_drawings_it_never_saw(model, processor, folder):
    drawn = [make_item(HELD_OUT_SEED + 1, index, 64, 64, QUESTIONS) for index in range(40)]
    asked = [
        (item.image, question)
        for item in drawn
        for question in dict.fromkeys(item.questions)
        if question.task in ("colour", "shape", "background", "side")
    ]
    answers = answer_questions(model, processor, [(image, question.text) for image, question in asked])
    right = [answer == question.answer for (_, question), answer in zip(asked, answers, strict=True)]
    promised = json.loads((folder / "training.json").read_text(encoding="utf-8"))["held_out"]
    expected = min(promised[task]["exact"] for task in ("colour", "shape", "background", "side"))
    assert len(right) > 80
    # Four standard errors under the worst of the four scores that training.json states.
    slack = 4 * (expected * (1 - expected) / len(right)) ** 0.5
    assert sum(right) / len(right) > expected - slack


def test_the_script_makes_the_tokenizer_that_is_shipped(folder, tmp_path):
    write_folder(tmp_path, (folder / "chat_template.jinja").read_text(encoding="utf-8"))
    ours, shipped = (json.loads((where / "tokenizer.json").read_text(encoding="utf-8")) for where in (tmp_path, folder))
    assert ours["model"]["vocab"] == shipped["model"]["vocab"]
    assert ours["added_tokens"] == shipped["added_tokens"]
