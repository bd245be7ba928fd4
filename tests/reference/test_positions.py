"""Reference test 3: our M-RoPE positions are transformers' own, for any mix of text and images."""

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from lensmith.data.positions import mrope_positions, next_position

IMAGE, START, END, WORD = 290, 292, 293, 7
MERGE = 2


def token_ids(*parts: int | tuple[int, int, int]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """A number stands for so many words, a triple for an image of that grid between its marks."""
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [WORD] * part
        else:
            ids += [START, *[IMAGE] * (part[0] * part[1] * part[2] // MERGE**2), END]
            grids.append(part)
    return np.array(ids), grids


@pytest.fixture(scope="module")
def rope_index(tiny_config):
    """transformers' get_rope_index, which reads nothing of the model but its config."""
    model = Qwen3VLModel.__new__(Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = tiny_config()

    def positions(ids: np.ndarray, grids: list[tuple[int, int, int]]) -> np.ndarray:
        row = torch.from_numpy(ids)[None]
        index, deltas = model.get_rope_index(
            row,
            mm_token_type_ids=(row == IMAGE).int(),
            image_grid_thw=torch.tensor(grids) if grids else None,
            attention_mask=torch.ones_like(row),
        )
        assert int(deltas) == int(index.max()) + 1 - len(ids)
        return index[:, 0].numpy()

    return positions


@pytest.mark.parametrize(
    "parts",
    [
        (5,),
        (3, (1, 4, 6), 4),
        ((1, 2, 2),),
        ((1, 8, 2), (1, 2, 8), 3),
        (1, (1, 4, 4), 2, (1, 6, 10), 1, (1, 2, 2)),
        (2, (3, 4, 6), 5),
    ],
    ids=["text only", "one image", "nothing but an image", "adjacent images", "three images", "three frames"],
)
def test_positions_are_those_of_transformers(rope_index, parts):
    ids, grids = token_ids(*parts)
    ours = mrope_positions(ids, grids, image_token_id=IMAGE, merge=MERGE)
    np.testing.assert_array_equal(ours[0], np.arange(len(ids)))
    np.testing.assert_array_equal(ours[1:], rope_index(ids, grids))
    assert next_position(ours) == rope_index(ids, grids).max() + 1


def test_positions_are_those_of_transformers_for_a_hundred_random_samples(rope_index):
    rng = np.random.default_rng(0)
    for _ in range(100):
        parts = []
        for _ in range(rng.integers(0, 5)):
            parts += [int(rng.integers(0, 4)), (1, *(2 * rng.integers(1, 9, 2)).tolist())]
        ids, grids = token_ids(*parts, int(rng.integers(1, 9)))
        ours = mrope_positions(ids, grids, image_token_id=IMAGE, merge=MERGE)
        np.testing.assert_array_equal(ours[1:], rope_index(ids, grids))


def test_image_tokens_without_a_grid_are_an_error_with_both_counts():
    ids, _ = token_ids(2, (1, 4, 4), 1)
    with pytest.raises(ValueError, match="4 image tokens in the ids but 6 in the grids"):
        mrope_positions(ids, [(1, 4, 6)], image_token_id=IMAGE, merge=MERGE)


def test_text_after_the_last_image_goes_on_from_its_longer_side():
    ids, grids = token_ids(2, (1, 2, 10))
    positions = mrope_positions(ids, grids, image_token_id=IMAGE, merge=MERGE)
    assert positions[1:, -1].tolist() == [8, 8, 8]  # two words, the start mark, then five columns
    assert next_position(positions) == 9
    assert next_position(positions[:, :0]) == 0
