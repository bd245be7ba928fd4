"""Answers in batches are the answers one by one, on the inputs that transformers' own processor makes."""

import warnings

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lensmith.config.tree import Eval, Images, Tune
from lensmith.data.encode import Encoder
from lensmith.errors import DataError, RowError
from lensmith.evals.answer import batches
from lensmith.evals.predict import (
    MEDIA_TOKENS,
    Prediction,
    answer_samples,
    compare_results,
    draw_samples,
    evaluate_model,
    pad_prompts,
    read_predictions,
    score_predictions,
    write_predictions,
)
from lensmith.model.adapters import prepare_trainable
from lensmith.model.decode import Decoder
from lensmith.model.engine import Engine, find_engine
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA_TOKENS)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def processor():
    """Qwen3-VL's own processor classes and template over a tokenizer of 256 bytes and the special tokens."""
    from importlib.resources import files

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(
            size={"shortest_edge": 4 * 32**2, "longest_edge": 64 * 32**2}, patch_size=16, merge_size=2
        ),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"),
        Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
        chat_template=files("trl").joinpath("chat_templates/qwen3_vl.jinja").read_text(encoding="utf-8"),
    )


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder.from_processor(processor, Images(max_tokens=64))


@pytest.fixture
def model(build_tiny, processor):
    """A random model with this tokenizer's ids, in float64 so that batches of other shapes cannot flip a near tie."""
    model, ids = build_tiny(cls=Engine, vocab_size=264), processor.tokenizer.convert_tokens_to_ids
    model.config.image_token_id, model.config.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    model.config.vision_start_token_id = ids("<|vision_start|>")
    model.config.vision_end_token_id = ids("<|vision_end|>")
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of different sizes, as 4, 6 and 15 tokens."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    refs = []
    for name, (height, width) in {"a": (64, 64), "b": (64, 96), "c": (160, 96)}.items():
        path = folder / f"{name}.png"
        Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()).save(
            path
        )
        refs.append(ImageRef(path, key=str(path)))
    return refs


@pytest.fixture(scope="module")
def samples(pictures):
    """One, two and no pictures; short and long questions; an earlier turn; the same picture twice."""
    a, b, c = pictures
    asked = [
        ("q:1", (a,), (("user", "what?"), ("assistant", "teal"))),
        ("q:2", (), (("user", "no picture at all, but quite a long question"), ("assistant", "yes"))),
        ("q:3", (b, c), (("system", "Be brief."), ("user", "both?"), ("assistant", "no"))),
        ("q:4", (c,), (("user", "first?"), ("assistant", "one"), ("user", "and then?"), ("assistant", "two"))),
        ("q:5", (a,), (("user", "which?"), ("assistant", "red"))),
    ]
    made = []
    for where, refs, turns in asked:
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        marks = tuple(ImageMark(index) for index in range(len(refs)))
        messages = tuple(
            Message(role, (*(marks if index == first else ()), Text(text))) for index, (role, text) in enumerate(turns)
        )
        made.append(Sample(where, messages, refs))
    return made


def answer(model, encoder, processor, samples, **changes):
    settings = {"max_new_tokens": NEW_TOKENS, "batch": 8} | changes
    return answer_samples(model, encoder, processor, samples, **settings)


def test_a_batch_answers_as_its_questions_would_one_by_one(model, encoder, processor, samples):
    together = answer(model, encoder, processor, samples)
    alone = [answer(model, encoder, processor, [sample])[0] for sample in samples]
    assert together == alone
    assert [p.where for p in together] == ["q:1", "q:2", "q:3", "q:4", "q:5"]
    assert [(p.question, p.reference) for p in together][3] == ("and then?", "two")
    assert len({p.answer for p in together}) > 1, "the questions are told apart"
    assert together == answer(model, encoder, processor, samples, batch=2)


def test_answers_are_those_of_transformers_generate(build_tiny, model, encoder, processor, samples):
    stock = build_tiny(vocab_size=264)
    stock.load_state_dict(model.state_dict())
    stock.config, stock.generation_config = model.config, model.generation_config
    stock.model.config = model.model.config
    assert find_engine(model) is model
    assert find_engine(stock) is None
    theirs = answer(stock, encoder, processor, samples)
    assert answer(model, encoder, processor, samples) == theirs
    assert len({p.answer for p in theirs}) > 1


def test_prompts_are_asked_longest_first_by_number_and_by_tokens(monkeypatch, encoder, samples):
    prompts = [encoder.encode_prompt(sample) for sample in samples]
    chosen = list(batches(prompts, 2))
    assert sorted(index for batch in chosen for index in batch) == list(range(len(samples)))
    assert [len(batch) for batch in chosen] == [2, 2, 1]
    lengths = [prompts[index].num_tokens for batch in chosen for index in batch]
    assert lengths == sorted(lengths, reverse=True)
    monkeypatch.setattr("lensmith.evals.answer.PROMPT_TOKENS", lengths[0])
    by_tokens = list(batches(prompts, 8))
    assert all(sum(prompts[index].num_tokens for index in batch) <= lengths[0] for batch in by_tokens)
    assert len(by_tokens) > 1


def test_what_does_not_fit_the_gpu_is_asked_in_halves_and_that_is_said(model, encoder, processor, samples, monkeypatch):
    whole, complete = answer(model, encoder, processor, samples), Decoder.complete

    def small_gpu(self, prompts, members, **settings):
        if len(prompts.segments) > 3:
            raise torch.OutOfMemoryError("made up")
        return complete(self, prompts, members, **settings)

    monkeypatch.setattr(Decoder, "complete", small_gpu)
    with pytest.warns(UserWarning, match="ran out of memory over 5 questions at once, so they are asked in two halves"):
        assert answer(model, encoder, processor, samples) == whole


def test_prompts_are_what_transformers_own_processor_makes(model, encoder, processor, samples):
    """Ids, token types, pixels and grids of a padded batch, bit for bit, with the processor's left padding."""
    chosen = [samples[index] for index in (0, 2, 4)]
    chats = [
        [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, Text)
                    else {"type": "image", "image": Image.open(sample.images[part.index].source)}
                    for part in message.parts
                ],
            }
            for message in sample.messages[:-1]
        ]
        for sample in chosen
    ]
    theirs = processor.apply_chat_template(
        chats,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    ours = pad_prompts([encoder.encode_prompt(sample) for sample in chosen], encoder, model)
    assert set(ours) == set(theirs)
    real = theirs["attention_mask"].bool()
    for name in ("attention_mask", "mm_token_type_ids", "image_grid_thw", "pixel_values"):
        assert_close(ours[name], theirs[name], rtol=0, atol=0, check_dtype=False)
    assert_close(ours["input_ids"][real], theirs["input_ids"][real], rtol=0, atol=0)


def test_media_tokens_are_never_answered(model, encoder, processor, samples):
    """Even where the head wants them above all else: whatever the hidden state, one of the first two is largest."""
    ids = processor.tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[ids] = 1000 * weight[0]
        weight[ids[0]] *= -1
    for sample in samples:
        inputs = pad_prompts([encoder.encode_prompt(sample)], encoder, model)
        assert model(**inputs).logits[0, -1].argmax() in ids
    answers = answer(model, encoder, processor, samples)
    assert all(p.tokens == NEW_TOKENS and p.answer for p in answers), "ordinary tokens only"


def test_an_answer_stops_at_the_end_mark_and_says_so(model, encoder, processor, samples):
    cut = answer(model, encoder, processor, samples)
    assert {p.stopped for p in cut} == {False}
    assert {p.tokens for p in cut} == {NEW_TOKENS}
    end, other = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    with torch.no_grad():  # whatever the hidden state, one of these two is largest
        weight = model.lm_head.weight
        weight[end], weight[other] = 1000 * weight[0], -1000 * weight[0]
    assert {(p.answer, p.tokens, p.stopped) for p in answer(model, encoder, processor, samples)} == {("", 0, True)}


def test_answering_leaves_the_model_as_it_was(model, encoder, processor, samples, build_sample, stock_loss):
    model.train()
    model.model.visual.eval()
    sample = build_sample(images=[], text=[9], learned=4)
    sample["input_ids"] %= 256
    stock_loss(model, [sample]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in model.named_modules()}
    answer(model, encoder, processor, samples)
    assert modes == {name: module.training for name, module in model.named_modules()}
    model.zero_grad()
    stock_loss(model, [sample]).backward()
    for name, parameter in model.named_parameters():
        if name in before:
            assert_close(parameter.grad, before[name], rtol=0, atol=0)


def test_a_checkpoints_sampling_settings_change_no_answer_and_warn_of_nothing(
    model, encoder, processor, samples, caplog
):
    plain = answer(model, encoder, processor, samples)
    # As in generation_config.json of the Qwen3-VL Instruct checkpoints, with a repetition penalty for good measure.
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.5}
    for name, value in wanted.items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        assert answer(model, encoder, processor, samples) == plain
    assert caplog.records == []


def test_with_its_adapter_disabled_a_tuned_model_answers_like_its_base(model, encoder, processor, samples):
    base = answer(model, encoder, processor, samples)
    tuned = prepare_trainable(model, Tune(rank=4), seed=0)
    assert answer(tuned, encoder, processor, samples) == base, "a fresh adapter changes nothing"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    assert answer(tuned, encoder, processor, samples) != base
    with tuned.disable_adapter():
        assert answer(tuned, encoder, processor, samples) == base


def test_evaluation_scores_both_ways_and_keeps_every_answer(model, encoder, processor, samples, tmp_path):
    seen = []
    settings, keep = Eval(max_new_tokens=2, batch=2), tmp_path / "predictions-before.jsonl"
    result = evaluate_model(
        model, encoder, processor, samples, settings, keep=keep, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert (result.exact.n, result.normalised.n, result.cut_off) == (5, 5, 5)
    assert result.metric == "normalised"
    assert result.score is result.normalised
    assert tuple(read_predictions(keep)) == result.predictions
    assert compare_results(result, result).ties == 5
    assert score_predictions(result.predictions, Eval(metric="exact")).why == "metric exact: set by eval.metric"


def test_predictions_survive_any_character(tmp_path):
    odd = Prediction("q:1", "two\nlines\u2028or three?", "naïve 数", '"quotes" \r\n \u0085 \\', 3, True)
    write_predictions([odd, odd], tmp_path / "odd.jsonl")
    assert read_predictions(tmp_path / "odd.jsonl") == [odd, odd]


def test_a_question_without_answer_is_named(model, encoder, processor, samples):
    bare = Sample("test.jsonl:7", samples[0].messages[:1], samples[0].images)
    with pytest.raises(DataError, match=r"test\.jsonl:7: no answer to compare with \(0 characters\)\. Give the row"):
        evaluate_model(model, encoder, processor, [samples[0], bare], Eval())


def test_asking_reads_the_picture(model, encoder, processor, pictures, tmp_path):
    def ask(source):
        marked = Message("user", (ImageMark(0), Text("what?")))
        sample = Sample("the question", (marked,), (ImageRef(source, key=str(source)),))
        return answer(model, encoder, processor, [sample])[0].answer

    answers = [ask(ref.source) for ref in pictures]
    assert len(set(answers)) > 1
    assert ask(pictures[0].source.read_bytes()) == answers[0]
    with pytest.raises(RowError, match=r"the question: .*gone\.png: there is no such file"):
        ask(tmp_path / "gone.png")


def test_samples_are_drawn_by_the_seed_in_their_own_order():
    everything = list(range(100))
    drawn = draw_samples(everything, 10, seed=3)
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 10
    assert drawn == draw_samples(everything, 10, seed=3)
    assert drawn != draw_samples(everything, 10, seed=4)
    assert draw_samples(everything, None, seed=0) == draw_samples(everything, 500, seed=0) == everything
