"""The drawings that lensmith/tiny is pretrained on: repeatable, truthful, unlike easy-VQA, encoded as the processor does."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from tools.tiny.colours import ANCHORS, MARGIN, VISIBLE, distance, draw_named, draw_shade
from tools.tiny.feed import PREFIX, QUESTIONS, SIZES, draw_shard
from tools.tiny.phrases import PHRASES
from tools.tiny.tasks import WORDS, make_item

from lensmith.model.names import TINY, resolve_model

NUM_ITEMS = 60


@pytest.fixture(scope="module")
def items():
    return [make_item(3, index, *size, QUESTIONS) for size in SIZES for index in range(NUM_ITEMS // len(SIZES))]


def test_an_item_follows_from_its_seed_and_number():
    one, again, other = (make_item(7, number, 96, 64, 4) for number in (5, 5, 6))
    assert np.array_equal(one.pixels, again.pixels)
    assert one.questions == again.questions
    assert not np.array_equal(one.pixels, other.pixels)


def test_pictures_have_the_size_asked_for_and_are_not_empty():
    for width, height in SIZES:
        for index in range(5):
            pixels = make_item(1, index, width, height, 2).pixels
            assert pixels.shape == (height, width, 3)
            assert pixels.std() > 1, "nothing was drawn"


def test_every_question_is_filled_in_and_has_an_answer(items):
    asked = [question for item in items for question in item.questions]
    assert len(asked) == NUM_ITEMS * QUESTIONS
    assert all(question.text.strip() and question.answer.strip() for question in asked)
    assert not [question.text for question in asked if "{" in question.text]


def test_no_question_is_one_of_easy_vqa(items):
    from easy_vqa import get_test_questions, get_train_questions

    def plain(text: str) -> str:
        return re.sub(r"[^a-z ]", "", text.lower().replace("colour", "color")).strip()

    theirs = {plain(text) for texts, _, _ in (get_train_questions(), get_test_questions()) for text in texts}
    fillings = [
        {"shape": shape, "colour": colour, "kind": "word"}
        for shape in ("circle", "rectangle", "triangle", "shape")
        for colour in ("black", "gray", "red", "green", "blue", "teal", "brown", "yellow")
    ]
    ours = {
        plain(re.sub(r"\{(\w+)\}", lambda blank: names.get(blank[1], "star"), text))  # noqa: B023  used at once
        for texts in PHRASES.values()
        for text in texts
        for names in fillings
    }
    assert len(theirs) > 90
    assert not ours & theirs
    assert not {plain(question.text) for item in items for question in item.questions} & theirs


def test_nothing_is_answered_with_yes_or_no_but_those_words_themselves(items):
    for question in (question for item in items for question in item.questions):
        if question.answer.lower() in ("yes", "no"):
            assert question.task in ("read", "lines", "capitals")


def test_a_shade_is_nearer_to_its_own_name_than_to_any_other():
    rng = random.Random(0)
    # Up to half a grid step of jitter comes on top of the margin that the table keeps.
    for name in ANCHORS:
        shade = draw_shade(name, rng)
        nearest = {other: min(distance(shade, anchor) for anchor in anchors) for other, anchors in ANCHORS.items()}
        assert min(nearest, key=nearest.__getitem__) == name
    assert MARGIN < 1


def test_what_is_drawn_stands_out_from_what_is_behind_it():
    rng = random.Random(1)
    behind = [(250, 250, 245), (200, 30, 30)]
    for _ in range(20):
        name, shade = draw_named(rng, behind, {"blue"})
        assert name != "blue"
        assert min(distance(shade, other) for other in behind) >= VISIBLE


def test_the_words_to_read_are_many_and_lower_case():
    assert len(WORDS) > 800
    assert all(word.isalpha() and word.islower() for word in WORDS)


def test_training_rows_are_what_the_processor_makes():
    from tokenizers import Tokenizer
    from transformers import AutoProcessor

    folder = resolve_model(TINY)
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    size, pictures = (96, 64), 4
    lead = tokenizer.encode(f"{PREFIX}{'<|image_pad|>' * 6}<|vision_end|>").ids
    shard = draw_shard(2, 1, size, pictures, tokenizer, lead)
    for p in range(pictures):
        item = make_item(2, pictures + p, *size, QUESTIONS)
        for q, question in enumerate(item.questions):
            user = [{"type": "image", "image": item.image}, {"type": "text", "text": question.text}]
            chat = [{"role": "user", "content": user}, {"role": "assistant", "content": question.answer}]
            theirs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="np")
            last = shard.last[p, q]
            assert shard.ids[p, q, : last + 1].tolist() == theirs["input_ids"][0][: last + 1].tolist()
            learned = shard.ids[p, q, shard.first[p, q] : last].tolist()
            assert processor.tokenizer.decode(learned) == question.answer
            assert shard.ids[p, q, last] == processor.tokenizer.eos_token_id


def test_orthogonalised_updates_have_singular_values_near_one():
    torch = pytest.importorskip("torch")
    from tools.tiny.muon import orthogonalise

    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 80, generator=generator)).float())
    # Jordan et al. give 0.7 to 1.2 for their coefficients; bf16 adds a little.
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_a_gradient_that_is_not_finite_changes_nothing():
    import torch
    from tools.tiny.muon import Muon

    weight = torch.nn.Parameter(torch.ones(6, 4))
    weight.grad = torch.full_like(weight, float("nan"))
    muon = Muon({"w.weight": weight}, torch.tensor(0.1), momentum=0.95, weight_decay=0.1, pieces={})
    muon.step(torch.tensor(False))
    assert torch.equal(weight.detach(), torch.ones(6, 4))
    assert all(bool(buffer.isfinite().all()) for buffer in muon.buffers.values())
