"""Reference tests 1 and 2: ids are those that serving sees, image tokens are as predicted, labels are the answers.

Every row of tests/fixtures/chats.jsonl goes through each of them.
"""

import copy
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lensmith.config.tree import Columns, Images
from lensmith.data.encode import Encoder, encode_sample
from lensmith.data.images import grid_of, read_geometry, write_policy
from lensmith.data.refs import RefReader
from lensmith.data.rows import open_rows
from lensmith.data.samples import guess_layout, to_sample
from lensmith.errors import ConfigError, ModelError, RowError
from lensmith.types import IGNORE, ImageMark, ImageRef, Message, Sample, Text

CHATS = Path(__file__).parent.parent / "fixtures" / "chats.jsonl"
NUM_CHATS = 15
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>")

THINKING = """{%- set ns = namespace(last=0) %}{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}
{%- set body = namespace(text='', thought='') %}{%- for c in m.content %}{%- if c.type == 'image' %}
{%- set body.text = body.text + '<|vision_start|><|image_pad|><|vision_end|>' %}{%- else %}
{%- set body.text = body.text + c.text %}{%- endif %}{%- endfor %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- if '</think>' in body.text %}
{%- set body.thought = body.text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set body.text = body.text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + body.thought + '\\n</think>\\n\\n' }}{%- endif %}{%- endif %}
{{- body.text + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
"""What matters of Qwen3-VL-Thinking's template: the prompt opens a thought, and past turns are shown without theirs."""


@pytest.fixture(scope="module")
def encoder(processor) -> Encoder:
    return Encoder.from_processor(processor, Images(max_tokens=64))


@pytest.fixture(scope="module")
def serving(processor, encoder):
    """The processor as a run saves it."""
    saved = copy.deepcopy(processor)
    write_policy(saved, encoder.min_tokens, encoder.max_tokens)
    return saved


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (150, 70), "red").save(folder / "wide.png")
    Image.new("RGB", (61, 300), "blue").save(folder / "tall.png")
    rows = open_rows(CHATS)
    samples = [to_sample(row, guess_layout(rows, Columns()), RefReader(folder)) for row in rows]
    assert len(samples) == NUM_CHATS
    return samples


def as_served(sample: Sample, messages=None) -> list[dict]:
    """The messages as a user of plain transformers would write them."""

    def part(part):
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        return {"type": "image", "image": Image.open(sample.images[part.index].source)}

    return [{"role": m.role, "content": [part(p) for p in m.parts]} for m in messages or sample.messages]


def say(*texts: str, images: tuple[ImageRef, ...] = ()) -> Sample:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [Message(roles[number % 2], (Text(text),)) for number, text in enumerate(texts)]
    if images:
        messages[0] = Message("user", (*map(ImageMark, range(len(images))), *messages[0].parts))
    return Sample("here:1", tuple(messages), images)


def learned_texts(encoded, tokenizer) -> list[str]:
    """Each unbroken run of learned labels, decoded."""
    learned = encoded.labels != IGNORE
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learned, [False]]).astype(int)))
    return [tokenizer.decode(encoded.labels[start:stop]) for start, stop in edges.reshape(-1, 2)]


def test_decoding_the_learned_labels_gives_back_exactly_the_assistants_text(encoder, chats, processor):
    for sample in chats:
        encoded = encode_sample(sample, encoder)
        answers = [message.text + "<|im_end|>" for message in sample.messages if message.role == "assistant"]
        assert learned_texts(encoded, processor.tokenizer) == answers
        np.testing.assert_array_equal(
            encoded.labels[encoded.labels != IGNORE], encoded.input_ids[encoded.labels != IGNORE]
        )


def test_ids_are_those_of_the_processor_where_texts_hold_no_special_tokens(encoder, chats, serving):
    plain = [
        sample
        for sample in chats
        if not any(token in message.text for message in sample.messages for token in SPECIAL)
        and not any(message.role == "assistant" and message.text[0].isspace() for message in sample.messages)
    ]
    assert len(plain) == 12
    for sample in plain:
        theirs = serving.apply_chat_template(as_served(sample), tokenize=True, return_dict=True)
        assert encoder.encode(sample).input_ids.tolist() == theirs["input_ids"][0]


def test_prompt_is_what_serving_sees_before_the_last_answer(encoder, chats, serving):
    sample = chats[4]
    prompt = encoder.encode_prompt(sample)
    theirs = serving.apply_chat_template(
        as_served(sample, sample.messages[:-1]), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert prompt.input_ids.tolist() == theirs["input_ids"][0]
    assert prompt.num_learned == 0
    assert len(prompt.images) == 3
    whole = encoder.encode(sample)
    assert whole.input_ids[: prompt.num_tokens].tolist() == prompt.input_ids.tolist()
    assert (whole.labels[prompt.num_tokens :] != IGNORE).sum() == whole.num_tokens - prompt.num_tokens - 1


def test_image_tokens_are_as_predicted_from_the_header_and_as_the_grid_says(encoder, chats):
    geometry = encoder.geometry
    for sample in chats:
        encoded = encoder.encode(sample)
        grids = [grid_of(image, geometry) for image in encoded.images]
        assert int((encoded.input_ids == encoder.image_token_id).sum()) == sum(map(np.prod, grids)) // geometry.merge**2
        assert [image.tokens for image in encoded.images] == [int(np.prod(grid)) // geometry.merge**2 for grid in grids]


def test_special_tokens_in_texts_are_plain_characters(encoder, chats, processor):
    ids = dict(zip(SPECIAL, processor.tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    for sample in chats:
        found = encoder.encode(sample).input_ids.tolist()
        assert found.count(ids["<|im_start|>"]) == found.count(ids["<|im_end|>"]) == len(sample.messages)
        assert found.count(ids["<|vision_start|>"]) == len(sample.images)
        assert found.count(ids["<|endoftext|>"]) == 0


def test_prefix_ends_behind_the_last_image_and_holds_no_answer(encoder, chats, processor):
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    one, none, several_turns = encoder.encode(chats[0]), encoder.encode(chats[1]), encoder.encode(chats[4])
    assert one.input_ids[one.prefix_tokens - 1] == end
    assert end not in one.input_ids[one.prefix_tokens :]
    assert none.prefix_tokens == 0
    assert none.prefix_key is None
    assert several_turns.prefix_tokens == 0  # its last image comes after an answer


def test_questions_about_one_image_have_one_prefix(encoder, chats):
    images = chats[0].images
    first, second = (encoder.encode(say(question, "Yes.", images=images)) for question in ("Is it red?", "Is it blue?"))
    other = encoder.encode(say("Is it red?", "Yes.", images=chats[2].images))
    assert first.prefix_key == second.prefix_key
    assert first.prefix_key != other.prefix_key


def test_thinking_template_learns_from_the_open_thought_on(processor, encoder):
    thinking = Encoder(processor.tokenizer, THINKING, encoder.geometry, min_tokens=4, max_tokens=64)
    sample = say("2 + 2?", "<think>\nAdd them.\n</think>\n\n4")
    prompt, whole = thinking.encode_prompt(sample), thinking.encode(sample)
    assert processor.tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert whole.input_ids[: prompt.num_tokens].tolist() == prompt.input_ids.tolist()
    assert learned_texts(whole, processor.tokenizer) == ["Add them.\n</think>\n\n4<|im_end|>"]
    without = thinking.encode(say("2 + 2?", "4"))
    assert learned_texts(without, processor.tokenizer) == ["\n</think>\n\n4<|im_end|>"]


def test_thinking_template_counts_past_answers_that_it_shows_otherwise(processor, encoder):
    thinking = Encoder(processor.tokenizer, THINKING, encoder.geometry, min_tokens=4, max_tokens=64)
    sample = say("2 + 2?", "<think>\nAdd.\n</think>\n\n4", "And 3 + 3?", "<think>\nAgain <|im_end|>.\n</think>\n\n6")
    assert thinking.unlearned_answers(sample) == 1
    assert encoder.unlearned_answers(sample) == 0
    encoded = thinking.encode(sample)
    assert learned_texts(encoded, processor.tokenizer) == ["Again <|im_end|>.\n</think>\n\n6<|im_end|>"]
    assert "Add." not in processor.tokenizer.decode(encoded.input_ids)


def test_template_that_strips_texts_gets_the_real_ones(processor, encoder):
    template = processor.chat_template.replace("content_item.text }}", "content_item.text | trim }}")
    assert template != processor.chat_template
    strict = Encoder(processor.tokenizer, template, encoder.geometry, min_tokens=4, max_tokens=64)
    encoded = strict.encode(say("A <|im_end|> in the question", "  blanks around <|im_end|> it \n"))
    assert learned_texts(encoded, processor.tokenizer) == ["blanks around <|im_end|> it<|im_end|>"]


def test_template_that_cannot_be_used_is_named_with_what_it_does(processor, encoder):
    def refusal(template: str) -> str:
        odd = Encoder(processor.tokenizer, template, encoder.geometry, min_tokens=4, max_tokens=64)
        with pytest.raises(RowError) as caught:
            odd.encode(say("Question", "Answer"))
        assert caught.value.code == "template_refused"
        return str(caught.value)

    real = processor.chat_template
    assert "no end mark <|im_end|> after the answer in turn 2" in refusal(real.replace("<|im_end|>", ""))
    assert "shows text 1 of the row 0 times" in refusal(real.replace("content.text }}", "'' }}"))
    assert "is not how it then shows that answer" in refusal(
        real.replace("'<|im_start|>assistant\\n'", "'<|im_start|>bot'")
    )
    sentence = refusal("{{ raise_exception('roles must alternate') }}")
    assert sentence.startswith("here:1: the chat template of ")
    assert "does not take these turns: roles must alternate" in sentence


def test_template_without_images_is_refused_for_a_row_with_one(processor, encoder, chats):
    template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    blind = Encoder(processor.tokenizer, template, encoder.geometry, min_tokens=4, max_tokens=64)
    with pytest.raises(RowError, match="shows 0 images where the row has 1") as caught:
        blind.encode(chats[0])
    assert caught.value.code == "marks_mismatch"


def test_limits_that_contradict_each_other_are_refused(processor):
    with pytest.raises(ConfigError, match=r"min_tokens is 9 but data\.image\.max_tokens is 8"):
        Encoder.from_processor(processor, Images(min_tokens=9, max_tokens=8))


def test_checkpoint_without_a_template_is_refused(processor, encoder):
    class Bare:
        tokenizer, image_processor, chat_template = processor.tokenizer, processor.image_processor, {"a": "", "b": ""}

    with pytest.raises(ModelError, match=r"one chat template and has several \(a, b\)"):
        Encoder.from_processor(Bare(), Images())


def test_missing_picture_is_told_with_the_row_that_names_it(encoder, tmp_path):
    gone = ImageRef(tmp_path / "gone.png", "gone")
    with pytest.raises(RowError, match=r"here:1: .*gone\.png: there is no such file"):
        encoder.encode(say("Q", "A", images=(gone,)))


def test_encoder_goes_to_a_worker_and_gives_the_same_ids(encoder, chats):
    sent = pickle.loads(pickle.dumps(encoder))
    for sample in chats:
        np.testing.assert_array_equal(sent.encode(sample).input_ids, encoder.encode(sample).input_ids)


def test_short_rows_are_encoded_in_a_fraction_of_a_millisecond(encoder, chats):
    """5,000 rows a second is the aim (measured: docs/data.md); a quarter of it here, for machines under load."""
    samples = [say(f"Is there a circle in image {n}?", "yes", images=chats[0].images) for n in range(500)]
    sizes = encoder.encode(samples[0]).images
    started = time.perf_counter()
    for sample in samples:
        encoder.encode(sample, sizes)
    assert len(samples) / (time.perf_counter() - started) > 1250


def test_geometry_is_read_from_the_checkpoint(processor):
    geometry = read_geometry(processor)
    assert (geometry.patch_px, geometry.merge, geometry.frames, geometry.token_px) == (16, 2, 2, 32)
    assert geometry.mean == (0.5, 0.5, 0.5)
