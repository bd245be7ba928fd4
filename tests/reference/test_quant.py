"""Reference test 9: QLoRA = LoRA on the dequantised base, and only what was asked for is stored in 4 bits.

Real bitsandbytes on the CPU.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

from lensmith.config.tree import Tune
from lensmith.errors import ConfigError, ModelError
from lensmith.model.adapters import check_tune, prepare_trainable
from lensmith.model.components import is_adapter, take_census
from lensmith.model.quant import (
    check_quantised,
    is_quantised_checkpoint,
    quantisation,
    quantised_linears,
    settle_linears,
)

QLORA = Tune(method="qlora", rank=4)


@pytest.fixture(scope="module")
def checkpoint(build_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_tiny(dtype=torch.float32).save_pretrained(folder)
    return folder


def load(folder, quant):
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=quant
    )
    settle_linears(model, torch.float32)
    return model


def load_for(folder, tune):
    config = Qwen3VLForConditionalGeneration.config_class.from_pretrained(folder)
    return load(folder, quantisation(tune, config, dtype=torch.float32))


def dequantised(model):
    """The same weights, widened once, in ordinary linears."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            model.set_submodule(name, linear)
    return model


def test_qlora_stores_the_decoder_in_4_bits_and_nothing_else(checkpoint):
    model = load_for(checkpoint, QLORA)
    assert quantised_linears(model) == {
        "vision": (0, 4 * 4),
        "merger": (0, 4 * 2),
        "language": (4 * 7, 4 * 7),
        "head": (0, 1),
    }
    check_quantised(model, QLORA)


def test_tower_and_mergers_are_stored_in_4_bits_when_asked(checkpoint):
    tune = QLORA.model_copy(update={"quantise_vision": True})
    model = load_for(checkpoint, tune)
    stored = {component: counts[0] for component, counts in quantised_linears(model).items()}
    assert stored == {"vision": 16, "merger": 8, "language": 28, "head": 0}
    check_quantised(model, tune)


def test_without_qlora_nothing_is_stored_in_4_bits(checkpoint):
    assert quantisation(Tune(), load(checkpoint, None).config, dtype=torch.float32) is None


@pytest.mark.parametrize(
    ("skipped", "component"),
    [(["visual", "lm_head"], "vision"), (["model.visual"], "head"), (None, "vision")],
    ids=["a bare visual matches nothing", "the tower alone drops the head", "transformers' default"],
)
def test_the_three_wrong_skip_lists_are_caught(checkpoint, skipped, component):
    quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    with pytest.raises(ModelError, match=rf"linears of {component} are stored in few bits where none should be"):
        check_quantised(load(checkpoint, quant), QLORA)


@pytest.mark.parametrize("quantise_vision", [False, True])
def test_qlora_is_lora_on_the_dequantised_base(checkpoint, build_sample, stock_logits, stock_loss, quantise_vision):
    tune = QLORA.model_copy(update={"quantise_vision": quantise_vision, "vision": "adapted", "merger": "adapted"})
    sample = build_sample(images=[(3, 4), (2, 2)], text=[4, 3, 9], dtype=torch.float32)
    ours = prepare_trainable(load_for(checkpoint, tune), tune, seed=0)
    theirs = prepare_trainable(dequantised(load_for(checkpoint, tune)), tune, seed=0)
    for model in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # away from zero, so that A has a gradient too
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    # fp32 through eight layers of tower and decoder; the weights are equal, only the order of sums may differ.
    expected = stock_logits(theirs, sample)
    assert_close(stock_logits(ours, sample), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for model in (ours, theirs):
        stock_loss(model, [sample]).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (28 + 16 + 8)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            scale = gradients[name].abs().max().item()
            assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_lora_8bit_is_lora_on_the_8_bit_base_and_stores_nothing_else_so(tmp_path):
    """Products of int8 rows round each row to 1/127 of its largest value, so outputs differ by about half a percent."""
    from lensmith.config.tree import RunConfig
    from lensmith.model.load import load_model

    def loaded(method):
        return load_model(RunConfig.model_validate({"tune": {"method": method}, "precision": "fp32"})).model

    model, wide = loaded("lora_8bit"), loaded("lora")
    assert quantised_linears(model)["language"] == (42, 42)
    assert {name: stored for name, (stored, _) in quantised_linears(model).items() if stored} == {"language": 42}
    check_quantised(model, Tune(method="lora_8bit"))
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            weight = module.weight
            wide.get_submodule(name).weight.data = weight.data.float() * weight.SCB[:, None] / 127
    ids = torch.arange(20, 60)[None]
    found, expected = [], []
    for one, numbers in ((model, found), (wide, expected)):
        tuned = prepare_trainable(one, Tune(rank=4), seed=1).train()
        generator = torch.Generator().manual_seed(2)
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(std=0.05, generator=generator)
        logits = tuned(input_ids=ids).logits
        logits.logsumexp(-1).sum().backward()
        numbers += [logits.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)]
    assert len(found) == len(expected) == 1 + 2 * 42
    off = torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, expected, strict=True)])
    assert off[0] < 0.01
    assert off[1:].median() < 0.02
    assert off.max() < 0.1


def test_weights_in_8_bits_cannot_train_themselves():
    with pytest.raises(ConfigError, match=r"tune\.language=trained with method lora_8bit: weights stored in 8 bits"):
        check_tune(Tune(method="lora_8bit", language="trained"))


def test_an_evaluation_in_between_does_not_change_a_4_bit_model(checkpoint, build_sample, stock_logits):
    """bitsandbytes would repack the weights for inference on some CPUs, with rounded scales."""
    model, sample = load_for(checkpoint, QLORA), build_sample(dtype=torch.float32)
    trained = stock_logits(model.train(), sample)
    with torch.inference_mode():
        evaluated = stock_logits(model.eval(), sample)
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, stock_logits(model.train(), sample))


def test_census_of_a_4_bit_model_counts_what_the_weights_stand_for(checkpoint, build_tiny):
    tuned = prepare_trainable(load_for(checkpoint, QLORA), QLORA, seed=0)
    rows = {row.component: row for row in take_census(tuned)}
    adapters = sum(p.numel() for name, p in tuned.named_parameters() if is_adapter(name))
    assert sum(row.parameters for row in rows.values()) == adapters + sum(p.numel() for p in build_tiny().parameters())
    assert rows["language"].precision == "nf4+fp32"
    assert rows["vision"].precision == "fp32"


def test_a_checkpoint_stored_in_4_bits_is_loaded_as_it_is(checkpoint, tmp_path, build_sample, stock_logits):
    first = load_for(checkpoint, QLORA)
    first.save_pretrained(tmp_path)
    config = Qwen3VLForConditionalGeneration.config_class.from_pretrained(tmp_path)
    assert is_quantised_checkpoint(config)
    assert quantisation(QLORA, config, dtype=torch.float32) is None
    sample = build_sample(dtype=torch.float32)
    assert torch.equal(stock_logits(load(tmp_path, None), sample), stock_logits(first, sample))
    with pytest.raises(ConfigError, match=r"tune\.language=trained: .* is stored in 4 bits in this checkpoint"):
        prepare_trainable(load(tmp_path, None), Tune(language="trained"), seed=0)


def test_a_checkpoint_stored_in_another_way_is_refused(tiny_config):
    config = tiny_config()
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match=r"stored as fp8, and only bitsandbytes 4-bit or unquantised weights can be"):
        is_quantised_checkpoint(config)
