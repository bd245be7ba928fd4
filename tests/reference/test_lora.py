"""The one-product form of adapted linears is PEFT's own, forward and gradients; what it cannot do it leaves to PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from lensmith.model import lora
from lensmith.model.lora import project


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.plain = (nn.Linear(24, width, bias=False) for width in (16, 40, 8))


def adapted(**options) -> Pair:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["left", "right"], init_lora_weights=False, **options)
    model = get_peft_model(Pair().double(), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    return model.base_model.model.double()


def run(forward, pair, x):
    for parameter in pair.parameters():
        parameter.grad = None
    x.grad = None
    outputs = forward(x)
    sum((out.sin() * (n + 1)).sum() for n, out in enumerate(outputs)).backward()
    grads = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    return outputs, {**grads, "x": x.grad.clone()}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.0, "use_dora": True}])
def test_projecting_together_is_projecting_one_by_one(options):
    pair = adapted(**options)
    linears = (pair.left, pair.right, pair.plain)
    x = torch.randn(11, 24, dtype=torch.float64, requires_grad=True)
    theirs, their_grads = run(lambda x: [linear(x) for linear in linears], pair, x)
    ours, our_grads = run(lambda x: project(linears, x), pair, x)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    assert our_grads.keys() == their_grads.keys()
    assert len(our_grads) >= 5
    for name, grad in their_grads.items():
        assert_close(our_grads[name], grad)


def test_one_product_serves_plain_adapters_and_only_those():
    assert lora.split_linear(adapted().left) is not None
    assert lora.split_linear(adapted().plain).down is None
    assert lora.split_linear(adapted(use_dora=True).left) is None
    assert lora.split_linear(adapted(lora_dropout=0.1).left) is None
    assert lora.split_linear(nn.Linear(3, 3)) is None, "a bias"
    trained = nn.Linear(3, 3, bias=False)
    assert lora.split_linear(trained) is None, "a weight that trains"
    assert lora.split_linear(trained.requires_grad_(False)) is not None


def test_a_disabled_adapter_is_left_out():
    pair = adapted()
    x = torch.randn(5, 24, dtype=torch.float64)
    pair.left.enable_adapters(False)
    assert_close(project((pair.left,), x)[0], pair.left.base_layer(x))
