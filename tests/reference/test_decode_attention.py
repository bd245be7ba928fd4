"""Attention of one token per sequence to a shared prefix and to its own past is ordinary attention over both.

Lengths differ and caches are NaN beyond them. The kernels are interpreted on the CPU in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

REPEATS = 2
WIDTH = 16


def make_caches(groups, group_size, prefix, own, kv_heads=2, repeats=REPEATS, width=WIDTH, dtype=torch.float64):
    """Queries and caches of the largest lengths; NaN beyond them."""
    generator = torch.Generator().manual_seed(len(prefix) + sum(prefix) + sum(own))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    sequences = groups * group_size
    query = draw(sequences, kv_heads * repeats, width) * 3
    caches = [draw(units, max(lengths) + 3, kv_heads, width)
              for units, lengths in ((groups, prefix), (groups, prefix), (sequences, own), (sequences, own))]  # fmt: skip
    prefix_lengths, own_lengths = (torch.tensor(lengths, dtype=torch.int32) for lengths in (prefix, own))
    for cache, lengths in zip(caches, (prefix_lengths, prefix_lengths, own_lengths, own_lengths), strict=True):
        for unit, length in zip(cache, lengths.expand(len(cache)), strict=True):
            unit[length:] = float("nan")
    return query, caches[0], caches[1], prefix_lengths, caches[2], caches[3], own_lengths, width**-0.5


def ordinary(query, prefix_k, prefix_v, prefix_lengths, own_k, own_v, own_length, scale):
    """Each sequence by itself: one softmax over the keys of its prefix followed by its own."""
    group_size, repeats = len(query) // len(prefix_k), query.shape[1] // own_k.shape[2]
    rows = []
    for sequence, length in enumerate(own_length.expand(len(query)).tolist()):
        group = sequence // group_size
        shared = int(prefix_lengths[group])
        k = torch.cat([prefix_k[group, :shared], own_k[sequence, :length]]).repeat_interleave(repeats, 1)
        v = torch.cat([prefix_v[group, :shared], own_v[sequence, :length]]).repeat_interleave(repeats, 1)
        shares = (torch.einsum("hw,khw->hk", query[sequence], k) * scale).softmax(-1)
        rows.append(torch.einsum("hk,khw->hw", shares, v))
    return torch.stack(rows)


CASES = {
    "one sequence": (1, 1, [5], [1]),
    "one length for all": (2, 3, [7, 130], [4]),
    "lengths of their own": (2, 2, [64, 65], [1, 70, 64, 3]),
    "a group without a prefix": (3, 1, [0, 9, 200], [5, 1, 66]),
    "more queries than a tile": (1, 40, [33], [2]),
    "not a power of two of sequences": (1, 5, [129], [9, 1, 3, 4, 5]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plain_form_is_attention_over_both_ends_to_end(name):
    from lensmith.model.decode_attention import attend_decode

    arguments = make_caches(*CASES[name])
    assert_close(attend_decode(*arguments), ordinary(*arguments))


def kernel_case(case, options, strided):
    import triton

    from lensmith.model import decode_attention

    assert triton.knobs.runtime.interpret
    arguments = make_caches(*case, **options, dtype=torch.float32)
    query, *rest = arguments
    if strided:
        # As a view of stacked projections, and caches with heads before keys.
        query = torch.cat([query, query], dim=1)[:, : query.shape[1]]
        rest = [t.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(t, torch.Tensor) and t.ndim == 4 else t
                for t in rest]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        new_empty = torch.Tensor.new_empty
        poisoned = lambda *a, **kw: new_empty(*a, **kw).fill_(float("nan"))  # noqa: E731
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda *a, **kw: poisoned(*a, **kw) if a[0].is_floating_point() else new_empty(*a, **kw),
        )
        assert decode_attention.reads_to_length(query)
        ours = decode_attention.attend_decode(query, *rest)
    return ours, ordinary(
        *(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_plain_form(interpreted, name):
    ours, theirs = interpreted(kernel_case, CASES[name], {}, False)
    assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("repeats", "width"), [(1, 16), (4, 32), (3, 64)])
def test_the_kernel_takes_other_heads_and_strides(interpreted, repeats, width):
    case = (2, 3, [300, 20], [1, 2, 3, 100, 5, 6])
    ours, theirs = interpreted(kernel_case, case, {"repeats": repeats, "width": width, "kv_heads": 3}, True)
    assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def written_case(dtype, one_position):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, apply_rotary_pos_emb

    from lensmith.model.decode_attention import write_decode

    generator = torch.Generator().manual_seed(0)
    sequences, heads, kv_heads, capacity = 5, 4, 2, 7
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    stacked = draw(sequences, heads + 2 * kv_heads, WIDTH)
    query, key, value = stacked.split([heads, kv_heads, kv_heads], dim=1)
    norms = [Qwen3VLTextRMSNorm(WIDTH, eps=1e-6).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data = draw(WIDTH)
    angles = torch.rand(sequences, WIDTH // 2, generator=generator, dtype=dtype) * 6
    rope = tuple(torch.cat([angles, angles], -1).cos_() if turn == "cos" else torch.cat([angles, angles], -1).sin_()
                 for turn in ("cos", "sin"))  # fmt: skip
    own_k, own_v = (torch.full((sequences, capacity, kv_heads, WIDTH), 9.0, dtype=dtype) for _ in range(2))
    position = torch.tensor([3] if one_position else [0, 6, 3, 3, 1], dtype=torch.int32)
    with torch.no_grad():
        rotated = write_decode(query, key, value, *norms, rope, own_k, own_v, position)
        expected_q, expected_k = apply_rotary_pos_emb(norms[0](query), norms[1](key), *rope)
    places = position.expand(sequences).long()
    expected_own_k, expected_own_v = torch.full_like(own_k, 9.0), torch.full_like(own_v, 9.0)
    expected_own_k[torch.arange(sequences), places] = expected_k
    expected_own_v[torch.arange(sequences), places] = value
    return (rotated, own_k, own_v), (expected_q, expected_own_k, expected_own_v)


@pytest.mark.parametrize("one_position", [True, False])
def test_write_decode_norms_rotates_and_writes_one_place_of_each_cache(interpreted, one_position):
    for ours, theirs in zip(*written_case(torch.float64, one_position), strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(*interpreted(written_case, torch.float32, one_position), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_and_lengths_that_do_not_fit_are_named():
    from lensmith.model.decode_attention import attend_decode

    arguments = list(make_caches(2, 2, [3, 4], [1, 2, 3, 4]))
    with pytest.raises(ValueError, match="4 sequences, 2 groups and 3 own lengths"):
        attend_decode(*arguments[:6], arguments[6][:3], 1.0)
    with pytest.raises(ValueError, match="4 sequences, 3 groups"):
        attend_decode(arguments[0], *(t.repeat(2, 1, 1, 1)[:3] for t in arguments[1:3]), *arguments[3:])
