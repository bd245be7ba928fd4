"""Ids put together word by word are those of the whole text, for whatever text."""

import itertools
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from lensmith.data.words import LONGEST_WORD, QWEN_SPLIT, WordTokenizer

ASCII = [chr(code) for code in range(128)]


@pytest.fixture(scope="module")
def backend(processor) -> Tokenizer:
    return processor.tokenizer.backend_tokenizer


@pytest.fixture(scope="module")
def whole(backend):
    """The tokenizer's own ids of a text, special tokens in it as plain characters."""
    plain = Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    return lambda text: plain.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def words(backend) -> WordTokenizer:
    return WordTokenizer(backend)


def test_two_ascii_characters_are_split_as_the_tokenizer_does(words, whole):
    wrong = [a + b for a, b in itertools.product(ASCII, ASCII) if words(a + b) != whole(a + b)]
    assert wrong == []


@given(st.text(st.sampled_from("ab Z09  \n\r\t'sStTlLvVrReEmMdD.,!<>|_\x0b\x0c\x1c\x1f\x00\x7f"), max_size=40))
def test_any_ascii_text_is_split_as_the_tokenizer_does(words, whole, text):
    assert words(text) == whole(text)


@given(st.text(st.sampled_from("aß é e\u0301中文١٢\u2028\x85\ufeff😀ſK's \n"), max_size=20))
def test_texts_of_other_scripts_have_the_ids_of_the_whole_text(words, whole, text):
    assert words(text) == whole(text)


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <think>b</think>", "<tool_call>", "<|vision_start|><|image_pad|>", ""]
)
def test_added_tokens_in_a_text_mean_what_they_mean_to_the_tokenizer(words, whole, text):
    assert words(text) == whole(text)
    assert pickle.loads(pickle.dumps(words))(text) == whole(text)


def test_words_are_cut_once_and_what_is_remembered_is_bounded(backend, monkeypatch):
    words = WordTokenizer(backend)
    text = "the chart shows the chart"
    assert words(text) == words(text)
    assert set(words._known) == {"the", " chart", " shows", " the"}
    words("x" * (LONGEST_WORD + 1))
    words("中" * (LONGEST_WORD + 1))
    assert max(map(len, words._known)) <= LONGEST_WORD
    monkeypatch.setattr("lensmith.data.words.KNOWN_WORDS", 100)  # instead of 65,536
    for number in range(300):
        words("".join("abcdefghij"[int(digit)] for digit in str(number)) + " and so on")
        assert len(words._known) <= 100


def test_a_word_cut_among_others_is_cut_as_it_is_alone(backend, whole):
    words = WordTokenizer(backend)
    words("It's 2026:\n\n  unbelievable,isn't it?!")
    assert {word: ids for word, ids in words._known.items() if ids != whole(word)} == {}
    assert len(words._known) > 10


def test_a_tokenizer_with_another_pattern_is_asked_whole(backend, whole):
    other = Tokenizer.from_str(backend.to_str())
    assert json.loads(other.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN_SPLIT}
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), "isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    words = WordTokenizer(other)
    words("2026 charts")
    assert set(words._known) == {"2026 charts"}, "one word: the text as it is"
