"""Reference tests 4, 5 and 7: packs, shared prefixes and the labelled-rows head change neither loss nor gradient.

The reference is transformers' own model, one sample at a time, in float64; positions come from its get_rope_index.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lensmith.model.engine import Engine
from lensmith.model.head import token_logprobs
from lensmith.types import IGNORE, Pack, Segment

pytestmark = pytest.mark.usefixtures("float64_modules")


def rope_positions(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    places, _ = model.model.get_rope_index(
        sample["input_ids"][None],
        mm_token_type_ids=sample["mm_token_type_ids"][None],
        image_grid_thw=sample["image_grid_thw"],
    )
    return torch.cat([torch.arange(len(sample["input_ids"]))[None], places[:, 0]])


def join(model: Any, samples: list[dict[str, Any]], segments: list[tuple[int, int, int | None]]) -> Pack:
    """A pack from `segments`: sample number, first token taken, parent segment; a parent's tokens end where those start."""
    ids, labels, places, laid, start = [], [], [], [], 0
    images = [n for n, first, parent in segments if parent is None]
    for number, first, parent in segments:
        sample = samples[number]
        is_prefix = any(p == len(laid) for _, _, p in segments)
        stop = next(f for _, f, p in segments if p == len(laid)) if is_prefix else len(sample["input_ids"])
        cut = slice(first, stop)
        ids.append(sample["input_ids"][cut])
        labels.append(sample["labels"][cut])
        places.append(rope_positions(model, sample)[:, cut])
        laid.append(Segment(start, stop - first, parent))
        start += stop - first
    pixels = [samples[n]["pixel_values"] for n in images if samples[n]["pixel_values"] is not None]
    grids = [samples[n]["image_grid_thw"] for n in images if samples[n]["pixel_values"] is not None]
    return Pack(
        torch.cat(ids),
        torch.cat(labels),
        torch.cat(places, dim=1),
        tuple(laid),
        torch.cat(pixels) if pixels else torch.empty(0, 1536),
        torch.cat(grids) if grids else torch.empty(0, 3, dtype=torch.int64),
        tuple(map(str, range(len(segments)))),
    )


@pytest.fixture
def samples(build_sample):
    return [
        build_sample(images=[(2, 3), (4, 2)], text=[5, 4, 9], learned=6, seed=1),
        build_sample(images=[], text=[17], learned=8, seed=2),
        build_sample(images=[(3, 5)], text=[3, 12], learned=5, seed=3),
        build_sample(images=[(1, 1), (2, 2), (5, 3)], text=[2, 2, 2, 7], learned=4, seed=4),
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def check(model, pack, samples, stock_loss):
    expected = stock_loss(model, samples)
    expected.backward()
    theirs = gradients(model)
    logprobs = model(pack=pack)
    loss = -logprobs.sum() / len(logprobs)
    loss.backward()
    ours = gradients(model)
    assert_close(loss, expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name, grad in theirs.items():
        assert grad.abs().max() > 0, name
        assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_packing_does_not_change_the_loss_or_any_gradient(build_tiny, samples, stock_loss, recompute):
    model = build_tiny(cls=Engine)
    model.recompute = recompute
    pack = join(model, samples, [(n, 0, None) for n in range(len(samples))])
    check(model, pack, samples, stock_loss)


def test_a_shared_prefix_does_not_change_the_loss_or_any_gradient(build_tiny, build_sample, stock_loss):
    first = build_sample(images=[(4, 3)], text=[5, 11], learned=4, seed=5)
    prefix = 5 + 12 + 2
    branches = [first]
    for seed, length, learned in ((6, 9, 9), (7, 3, 1)):
        other = build_sample(images=[], text=[length], learned=learned, seed=seed)
        branches.append(
            {
                "input_ids": torch.cat([first["input_ids"][:prefix], other["input_ids"]]),
                "labels": torch.cat([torch.full((prefix,), IGNORE), other["labels"]]),
                "pixel_values": first["pixel_values"],
                "image_grid_thw": first["image_grid_thw"],
                "mm_token_type_ids": torch.cat([first["mm_token_type_ids"][:prefix], other["mm_token_type_ids"]]),
            }
        )
    alone = build_sample(images=[(2, 2)], text=[3, 8], learned=5, seed=8)
    samples = [*branches, alone]
    model = build_tiny(cls=Engine)
    pack = join(model, samples, [(0, 0, None), (0, prefix, 0), (1, prefix, 0), (2, prefix, 0), (3, 0, None)])
    assert pack.num_tokens < sum(len(s["input_ids"]) for s in samples)
    check(model, pack, samples, stock_loss)


class WidestTensor(TorchDispatchMode):
    """Remembers the most columns that any tensor with so many rows had."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and len(tensor) == self.rows:
                self.columns = max(self.columns, tensor.shape[1])
        return result


@pytest.mark.parametrize("trained", [True, False])
def test_the_head_is_full_cross_entropy_and_never_holds_more_than_a_piece_of_logits(trained):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, head = draw(29, 16).requires_grad_(), draw(1000, 16).requires_grad_(trained)
    targets = torch.randint(0, 1000, (29,), generator=generator)
    weights, wanted = draw(29), [hidden, head] if trained else [hidden]
    reference = -torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    theirs = torch.autograd.grad((reference * weights).sum(), wanted)
    with WidestTensor(rows=29) as widest:
        ours = token_logprobs(hidden, head, targets, piece_words=64)
        grads = torch.autograd.grad((ours * weights).sum(), wanted)
    assert_close(ours, reference)
    for ours_grad, theirs_grad in zip(grads, theirs, strict=True):
        assert_close(ours_grad, theirs_grad)
    assert widest.columns == 64


def test_the_head_keeps_small_gradients_of_nearly_certain_tokens():
    """In bf16 a word's own row and the weighted sum of all rows cancel; the error must be relative to what is left."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(500, 32, generator=generator).bfloat16()
    targets = torch.arange(40)
    hidden = (head[:40].float() * 0.6).bfloat16().requires_grad_()
    share = (hidden.detach() @ head.T).double().softmax(-1)  # of logits in bf16, as the head's own are
    assert share[range(40), targets].median() > 0.999
    truth = head[:40].double() - share @ head.double()
    (ours,) = torch.autograd.grad(token_logprobs(hidden, head, targets).sum(), [hidden])
    error, size = (ours.double() - truth).norm(dim=1), truth.norm(dim=1)
    # Weights rounded to bf16 are 0.2 % off each; a cancellation would leave 0.01 in every row.
    assert (error <= 0.01 * size + 1e-6).all()
    assert size.min() < 1e-6


def test_without_a_pack_the_engine_is_the_stock_model(build_tiny, samples, stock_logits):
    ours, stock = build_tiny(cls=Engine), build_tiny()
    for sample in samples:
        assert torch.equal(stock_logits(ours, sample), stock_logits(stock, sample))
