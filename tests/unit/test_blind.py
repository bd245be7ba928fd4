"""The blind test tells rows that need their pictures from rows that do not."""

import json
import re
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from lensmith.config.read import read_config
from lensmith.config.tree import Data, Images
from lensmith.data.encode import Encoder
from lensmith.data.images import read_patches
from lensmith.data.source import open_source
from lensmith.errors import DataError
from lensmith.evals.blind import BlindResult, _bootstrap, _grey, _shuffled, _with_pictures, blind_test

SAMPLES = 32


@pytest.fixture(scope="module")
def loaded():
    import torch

    from lensmith.model.load import load_model

    return load_model(read_config(None, ["model=lensmith/tiny", "precision=fp32"]), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder(loaded) -> Encoder:
    return Encoder.from_processor(loaded.processor, Images(max_tokens=64))


@pytest.fixture
def source_of(tmp_path, encoder):
    """`source_of(rows)` -> the source of a file with these rows."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return open_source(Data(train=str(path), image_root="/"), encoder, which="train")

    return write


@pytest.fixture(scope="module")
def shape_rows():
    """What shape a picture of easy-VQA shows: the model was never trained on them, and it is right about most."""
    paths = easy_vqa.get_test_image_paths()
    asked = [
        item for item in zip(*easy_vqa.get_test_questions(), strict=True) if item[0] == "what shape is in the image?"
    ]
    return [{"image": paths[number], "question": question, "answer": answer} for question, answer, number in asked[:80]]


def test_rows_that_need_their_pictures_show_a_gap(loaded, source_of, shape_rows):
    result = blind_test(loaded.model, source_of(shape_rows), range(80), samples=SAMPLES, seed=0)
    assert result.n == SAMPLES
    assert result.is_used
    assert result.loss_right < min(result.loss_shuffled, result.loss_grey)
    assert result.gap_low < result.gap < result.gap_high
    assert result.sentence.startswith("Images are used: the wrong one makes the answers less likely (loss 0.")


def test_rows_whose_answers_have_nothing_to_do_with_their_pictures_show_none(loaded, source_of, shape_rows):
    rng = np.random.default_rng(0)
    sums = [(row["image"], *rng.integers(1, 9, 2).tolist()) for row in shape_rows]
    rows = [{"image": image, "question": f"What is {a} + {b}?", "answer": str(a + b)} for image, a, b in sums]
    result = blind_test(loaded.model, source_of(rows), range(80), samples=SAMPLES, seed=0)
    assert not result.is_used
    assert result.sentence.startswith("Images are not used: ")


def test_the_same_seed_gives_the_same_result_and_leaves_the_mode_of_the_model(loaded, source_of, shape_rows):
    source = source_of(shape_rows)
    one, again, other = (blind_test(loaded.model, source, range(80), samples=4, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert not loaded.model.training


def test_the_right_loss_is_the_loss_of_training(loaded, source_of, shape_rows):
    from lensmith.data.pack import pack_samples

    source = source_of(shape_rows[:8])
    samples = [source.encoded(row) for row in range(8)]
    pack = pack_samples(samples, source.encoder.geometry, image_token_id=source.encoder.image_token_id)
    expected = -float(loaded.model(pack=pack).detach().mean())
    result = blind_test(loaded.model, source, range(8), samples=8, seed=0)
    assert result.loss_right == pytest.approx(expected, abs=1e-4)  # float32, summed in another order


def test_a_wrong_picture_is_another_one_in_the_same_frame(source_of, tmp_path):
    for number, size in enumerate([(64, 64), (128, 96), (200, 40)]):
        Image.new("RGB", size, (100 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": str(tmp_path / f"{number % 3}.png"), "question": "?", "answer": "a"} for number in range(9)]
    source = source_of(rows)
    right = [source.encoded(row) for row in range(9)]
    for one, other in zip(right, _shuffled(right, np.random.default_rng(0)), strict=True):
        assert one.images[0].ref != other.images[0].ref
        assert one.images[0].seen_px == other.images[0].seen_px
        assert one.input_ids is other.input_ids


def test_grey_is_nearly_zero_in_what_the_tower_takes(source_of, shape_rows):
    source = source_of(shape_rows[:1])
    grey = _with_pictures(source.encoded(0), [_grey()])
    pixels = read_patches(grey.images[0], source.encoder.geometry)
    assert float(pixels.abs().max()) < 0.01
    assert pixels.shape == read_patches(source.encoded(0).images[0], source.encoder.geometry).shape


def test_unusable_rows_and_rows_without_pictures_are_passed_over(loaded, source_of, shape_rows, tmp_path):
    whole = Path(shape_rows[0]["image"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [
        {"image": "/gone.png", "question": "?", "answer": "a"},
        {"image": str(tmp_path / "cut.png"), "question": "?", "answer": "a"},
        {"question": "2 + 2?", "answer": "4"},
        *shape_rows[:3],
    ]
    assert blind_test(loaded.model, source_of(rows), range(6), seed=0).n == 3


def test_too_few_pictures_are_refused_with_both_counts(loaded, source_of, shape_rows):
    with pytest.raises(DataError, match="blind test: 0 of 1 rows have a picture and an answer, and at least 2"):
        blind_test(loaded.model, source_of([{"question": "2 + 2?", "answer": "4"}]), range(1), seed=0)
    with pytest.raises(DataError, match=re.escape("rows.jsonl:1 shares a picture with each of the 2 rows")):
        blind_test(loaded.model, source_of([shape_rows[0]] * 4), [0, 0, 1], seed=0)


def test_the_interval_covers_a_known_gap_about_as_often_as_it_says():
    rng, covered, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        tokens = rng.integers(1, 6, SAMPLES)
        low, high = _bootstrap(rng.normal(0.5, 1.0, SAMPLES) * tokens, tokens, rng)
        covered += low <= 0.5 <= high
    # Percentile intervals of 32 are a little narrow: 93 % here. Three standard errors of 400 trials are 4 %.
    assert 0.89 < covered / trials < 0.97


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (0.1, 0.5, "Images are used: the wrong one makes the answers less likely (loss 1.000 with the right image, "
         "1.300 with another row's, 2.000 with a grey one: +0.300 nats per token, 95 % interval +0.100 to +0.500, n = 32)."),
        (-0.1, 0.5, "Images are not used: the wrong one changes the loss by no more than chance does (loss 1.000 with"),
        (-0.5, -0.1, "Images are not used: the right one even makes the answers less likely (loss 1.000 with"),
    ],
)  # fmt: skip
def test_the_outcome_is_one_sentence(low, high, sentence):
    result = BlindResult(1.0, 1.3, 2.0, low, high, 32)
    assert result.sentence.startswith(sentence)
