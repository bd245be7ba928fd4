"""RoundedAdamW against torch's AdamW, inside the backward pass and after it, and its rounding against the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lensmith.train import rounded
from lensmith.train.rounded import RoundedAdamW, round_stochastically

STEPS = 20


def weights_after(make, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64)).to(dtype)
    optimizer, inputs, wanted = make(net), torch.randn(32, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype)
    for _ in range(STEPS):
        (net(inputs) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def groups(net):
    return [{"params": list(net.parameters()), "weight_decay": 0.1}]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("piece", [2**24, 256])
def test_with_fp32_states_it_is_adamw(monkeypatch, in_backward, piece):
    monkeypatch.setattr(rounded, "PIECE", piece)
    theirs = weights_after(lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1), torch.float32)
    ours = weights_after(lambda net: RoundedAdamW(groups(net), lr=1e-3, in_backward=in_backward), torch.float32)
    assert_close(ours, theirs, atol=1e-6, rtol=0)  # the same operations in another order, twenty times


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_step_inside_the_backward_pass_is_the_step_after_it(states):
    after, inside = (
        weights_after(lambda net, b=b: RoundedAdamW(groups(net), lr=1e-3, states=states, in_backward=b), torch.float32)
        for b in (False, True)
    )
    assert torch.equal(after, inside)


def test_stochastic_rounding_keeps_the_mean_and_exact_numbers():
    generator = torch.Generator().manual_seed(0)
    number = torch.full((200_000,), 0.0201)
    found = round_stochastically(number, generator).float()
    assert len(found.unique()) == 2
    # A bf16 step is 1.2e-4 there; the mean of 200,000 draws is known to 1.4e-7.
    assert abs(float(found.mean()) - 0.0201) < 1e-6
    whole = torch.tensor([1.0, -2.0, 0.0, torch.inf, 0.15625])
    assert torch.equal(round_stochastically(whole, generator).float(), whole)


def test_bf16_weights_follow_small_updates_only_with_stochastic_rounding():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = nn.Parameter(torch.full((4096,), 0.02, dtype=torch.bfloat16))
        optimizer = RoundedAdamW([{"params": [weight]}], lr=1e-5, rounding=rounding)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = float((0.02 - weight.detach().float()).mean())
    assert abs(moved["nearest"]) < 5e-5  # what rounding 0.02 itself costs
    assert moved["stochastic"] == pytest.approx(50 * 1e-5, rel=0.1)


def test_the_gradient_norm_is_known_also_when_gradients_are_gone():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = RoundedAdamW([{"params": [weight]}], lr=1e-3, in_backward=True)
    (weight * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
    assert weight.grad is None
    assert float(optimizer.grad_norm()) == pytest.approx(5.0)
    assert optimizer.grad_norm() is None


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_state_loaded_again_goes_on_bit_for_bit(states):
    """Types kept, new groups found, and the same random numbers drawn."""

    def steps(weight, optimizer, numbers):
        for number in numbers:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).bfloat16()
            optimizer.step()

    def start():
        weight = nn.Parameter(torch.linspace(-1, 1, 8192).bfloat16())
        return weight, RoundedAdamW([{"params": [weight]}], lr=1e-3, states=states, seed=7)

    whole, optimizer = start()
    steps(whole, optimizer, range(6))
    first, optimizer = start()
    steps(first, optimizer, range(3))
    saved, (second, resumed) = optimizer.state_dict(), start()
    second.data.copy_(first.data)
    resumed.load_state_dict(saved)
    steps(second, resumed, range(3, 6))
    assert torch.equal(second, whole)


def test_learning_rates_changed_after_loading_a_state_hold_inside_the_backward_pass():
    weight = nn.Parameter(torch.ones(4))
    optimizer = RoundedAdamW([{"params": [weight]}], lr=1.0, in_backward=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    weight.sum().backward()
    assert torch.equal(weight, torch.ones(4))
