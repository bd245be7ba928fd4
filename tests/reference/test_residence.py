"""Reference test: wherever weights and layer inputs live, and whichever layers run twice, the numbers are the same.

On a CPU host and device are one memory, so this tests the logic (order of visits, tickets, buffers used again); the copies
and their streams are tested on a GPU in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine import gradients, join
from torch.testing import assert_close

from lensmith.config.tree import Memory
from lensmith.errors import ConfigError
from lensmith.model import hosted
from lensmith.model.engine import Engine
from lensmith.model.head import FEWEST_WORDS, PIECE_BYTES, whole_pieces
from lensmith.model.hosted import HostHead
from lensmith.model.quant import FewBitHead
from lensmith.model.residence import check_frozen, settle_weights
from lensmith.plan.activations import HEAD_FEWEST_WORDS, HEAD_PIECE_BYTES

pytestmark = pytest.mark.usefixtures("float64_modules")
CPU = torch.device("cpu")

PLACES = {
    "recompute": Memory(recompute="layers"),
    "first two layers": Memory(recompute=2),
    "inputs in host memory": Memory(recompute="layers", offload="inputs"),
    "embedding in host memory": Memory(recompute="none", embedding="host"),
    "head in host memory": Memory(recompute="none", head="host"),
    "tower in host memory": Memory(recompute="none", tower="host"),
    "layers in host memory": Memory(recompute="layers", stream_layers=4),
    "everything": Memory(
        recompute="layers", offload="inputs", embedding="host", head="host", tower="host", stream_layers=3
    ),
}


@pytest.fixture
def samples(build_sample):
    return [
        build_sample(images=[(2, 3), (4, 2)], text=[5, 4, 9], learned=6, seed=1),
        build_sample(images=[], text=[17], learned=8, seed=2),
        build_sample(images=[(3, 5)], text=[3, 12], learned=5, seed=3),
    ]


def adapted(model):
    """LoRA whose B is not zero, on the decoder's linears."""
    tuned = get_peft_model(model, LoraConfig(r=3, target_modules=r".*language_model.*_proj"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return tuned


def logprobs_and_gradients(model, pack):
    logprobs = model(pack=pack)
    logprobs.sum().backward()
    return logprobs.detach(), gradients(model)


@pytest.mark.parametrize(
    ("name", "tied"),
    # Head and embedding are one weight in a tied model, so the head alone cannot move: refused, see below.
    [(name, tied) for name in PLACES for tied in (False, True) if not (tied and name == "head in host memory")],
)
def test_no_place_changes_a_log_probability_or_a_gradient(build_tiny, samples, name, tied):
    plain, moved = build_tiny(cls=Engine, tied=tied), build_tiny(cls=Engine, tied=tied)
    pack = join(plain, samples, [(0, 0, None), (1, 0, None), (2, 0, None)])
    settle_weights(moved, PLACES[name], CPU)
    plain, moved = adapted(plain), adapted(moved)
    expected, theirs = logprobs_and_gradients(plain, pack)
    for _ in range(2):  # the second pass meets used buffers and guests in both places
        found, ours = logprobs_and_gradients(moved, pack)
        assert_close(found, expected)
        assert ours.keys() == theirs.keys()
        assert len(ours) == 2 * 7 * 4
        for key, grad in theirs.items():
            assert_close(ours[key], grad, msg=lambda text, key=key: f"{key}: {text}")


def test_a_model_in_pieces_still_generates_as_before(build_tiny, samples, stock_logits):
    plain, moved = build_tiny(cls=Engine), build_tiny(cls=Engine)
    settle_weights(moved, PLACES["everything"], CPU)
    for sample in samples:
        assert_close(stock_logits(moved, sample), stock_logits(plain, sample))


def test_a_model_in_pieces_is_not_moved_as_a_whole(build_tiny):
    moved = build_tiny(cls=Engine)
    settle_weights(moved, PLACES["everything"], CPU)
    assert moved.to(torch.float32).lm_head.weight.dtype is torch.float64


def test_dropout_is_the_same_in_both_runs_of_a_layer(build_tiny, samples):
    """With other random numbers in the second run, gradients would be those of another network."""
    results = []
    for recompute in ("none", "layers"):
        model = build_tiny(cls=Engine)
        model.recompute, model.keeps_random = recompute, True
        pack = join(model, samples, [(0, 0, None), (1, 0, None)])
        tuned = get_peft_model(model, LoraConfig(r=3, lora_dropout=0.5, target_modules=r".*q_proj")).train()
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    parameter.fill_(0.05)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            results.append(logprobs_and_gradients(tuned, pack))
    assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        (Memory(head="host"), r"memory\.head=host, memory\.embedding=gpu: .* one weight"),
        (Memory(head_bits=8), r"memory\.head_bits=8, memory\.embedding=gpu: .* one weight"),
        (Memory(recompute="none", stream_layers=2), r"memory\.stream_layers=2, memory\.recompute=none: "),
    ],
)
def test_settings_that_would_save_nothing_or_cannot_work_are_named_in_pairs(build_tiny, memory, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settle_weights(build_tiny(cls=Engine, tied=True), memory, CPU)


def test_weights_that_train_cannot_live_in_host_memory(build_tiny):
    model = build_tiny(cls=Engine).to("meta")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"lm_head\.weight trains, and memory settings keep it in host memory"):
        check_frozen(model)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
def test_a_head_in_few_bits_is_the_head_to_the_precision_of_its_bits(bits, error):
    weight = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    head = FewBitHead(weight, bits)
    rows = torch.cat([piece for _, piece in head.pieces(300)])
    assert [start for start, _ in head.pieces(300)] == [0, 300, 600, 900]
    assert rows.shape == weight.shape
    assert (rows - weight).norm() / weight.norm() < error


@pytest.mark.parametrize("width", [2048, 2560, 4096, 5120])
def test_a_head_in_host_memory_crosses_in_pieces_whose_products_are_fast(width):
    """Of the widths of 2B to 32B: an odd number of words sends both products through kernels that load 2 bytes at a time."""
    head = HostHead(torch.nn.Parameter(torch.empty(30_000, width, dtype=torch.bfloat16), requires_grad=False), CPU)
    sizes = [len(piece) for _, piece in head.pieces(20 * FEWEST_WORDS)]
    assert sum(sizes) == 30_000
    assert all(size % FEWEST_WORDS == 0 for size in sizes[:-1])
    assert sizes[0] * width * 2 <= hosted.PIECE_BYTES


def test_the_planner_cuts_the_head_as_the_engine_does():
    assert (HEAD_FEWEST_WORDS, HEAD_PIECE_BYTES) == (FEWEST_WORDS, PIECE_BYTES)
    assert [whole_pieces(words) for words in (1, 1023, 1024, 20_971)] == [1024, 1024, 1024, 20_480]
