"""The forgetting probe: its questions, what counts as right, and what is told."""

import io

import pytest
from PIL import Image

from lensmith.data.images import open_image
from lensmith.evals.probe import ProbeQuestion, ProbeResult, probe_questions


def test_the_questions_are_fixed_and_half_of_them_have_a_picture():
    questions = probe_questions()
    assert len(questions) == 32
    assert sum(question.paint is not None for question in questions) == 16
    assert len({(question.question, question.accepted) for question in questions}) == 32
    assert all(
        one.picture() == two.picture() for one, two in zip(questions, probe_questions(), strict=True) if one.paint
    )


def test_a_question_is_a_row_that_the_model_can_be_asked():
    for number, question in enumerate(probe_questions()):
        sample = question.to_sample(number)
        assert sample.question.endswith(question.question)
        assert sample.answer == question.accepted[0]
        assert [open_image(ref).size for ref in sample.images] == [(224, 224)] * (question.paint is not None)


def test_pictures_show_what_is_asked_about():
    by_answer = {(q.kind, q.accepted[0]): Image.open(io.BytesIO(q.picture())) for q in probe_questions() if q.paint}
    assert by_answer["colour", "red"].getpixel((112, 112)) == (255, 0, 0)
    assert by_answer["place", "red"].getpixel((60, 112)) == (255, 0, 0)
    assert by_answer["place", "blue"].getpixel((164, 112)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("red", True),
        ("The circle is red.", True),
        ("Red!", True),
        ("<think>It may be blue.</think> red", True),
        ("<think>It is red.</think> blue", False),
        ("reddish", False),
        ("blue", False),
        ("", False),
    ],
)
def test_an_answer_is_right_where_an_accepted_one_stands_in_it_as_a_word(answer, right):
    assert ProbeQuestion("colour", "What color is it?", ("red", "crimson")).is_right(answer) is right


def test_number_words_and_letters_count_as_written_or_as_digits():
    assert ProbeQuestion("count", "How many?", ("3",)).is_right("There are three dots.")
    assert ProbeQuestion("doing as told", "Write A, B and C.", ("A, B, C",)).is_right("A, B, C")


def test_what_was_forgotten_is_told_with_what_is_said_now():
    questions = tuple(ProbeQuestion("facts", f"Question {n}?", (f"answer {n}",)) for n in range(8))
    base = tuple(f"It is answer {n}." for n in range(8))
    tuned = ("It is answer 0.", *["no idea"] * 7)
    result = ProbeResult(questions, base, tuned)
    assert result.forgotten == [1, 2, 3, 4, 5, 6, 7]
    told = result.sentences()
    assert told[0] == "General questions (forgetting probe): base 8 of 8 right, tuned 1."
    assert told[1] == "  forgotten: Question 1? 'answer 1'; tuned says 'no idea'"
    assert told[-1] == "  and 2 more"
    assert result.to_json()["tuned_right"] == 1
    assert len(result.to_json()["answers"]) == 8


def test_a_base_model_that_knows_nothing_is_said_to_show_nothing():
    question = ProbeQuestion("facts", "What?", ("this",))
    assert "cannot show what training made it forget" in ProbeResult((question,), ("that",), ("that",)).sentences()[0]
