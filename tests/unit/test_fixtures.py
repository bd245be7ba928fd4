"""The shared fixtures do what the other tests trust them to do."""

import pytest
import torch


def test_tiny_model_and_samples_are_the_same_for_the_same_seed(build_tiny, build_sample, stock_loss):
    losses = [stock_loss(build_tiny(seed=3), [build_sample(seed=5)]) for _ in range(2)]
    assert losses[0] == losses[1]
    assert losses[0] != stock_loss(build_tiny(seed=4), [build_sample(seed=5)])


def test_patched_modules_hold_float64_precision(float64_modules, build_tiny, build_sample, stock_loss):
    """A central difference agrees with autograd far below what float32 rounding inside the model would allow."""
    model, sample = build_tiny(), build_sample(images=[(3, 4), (2, 2)], text=[4, 3, 9])
    stock_loss(model, [sample]).backward()
    weight = model.model.visual.blocks[0].attn.qkv.weight
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    step, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * step * direction)
            values.append(stock_loss(model, [sample]).item())
            weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    # Rounding 1e-15 / step 1e-5 and curvature step**2 leave about 1e-9; through float32 it would be about 1e-2.
    assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=1e-6, abs=1e-8)
