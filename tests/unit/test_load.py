"""Loading a checkpoint folder on the CPU, the choice of precision, and the sentences for folders that do not serve."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError, ModelError
from lensmith.model.engine import Engine
from lensmith.model.load import LARGEST_ON_CPU, count_parameters, load_model, load_processor, precision_for
from lensmith.model.quant import quantised_linears

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(build_tiny, tmp_path_factory):
    """A whole checkpoint folder: weights in bf16, as published ones are, and a processor of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    folder = tmp_path_factory.mktemp("checkpoint")
    build_tiny(dtype=torch.bfloat16).save_pretrained(folder)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    media = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=media,
        ),
        Qwen3VLVideoProcessor(patch_size=16, merge_size=2),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def config_for(folder, **settings):
    return RunConfig.model_validate({"model": str(folder), **settings})


def test_a_checkpoint_is_loaded_in_one_type_on_one_device(checkpoint, build_tiny):
    loaded = load_model(config_for(checkpoint), device=CPU)
    assert isinstance(loaded.model, Engine)
    assert (loaded.dtype, loaded.device, loaded.name) == (torch.float32, CPU, str(checkpoint))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    expected = build_tiny(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name].float()) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.sentences == (f"{checkpoint}: fp32 on the CPU.",)


def test_qlora_on_a_cpu_runs_for_a_small_model_with_one_warning(checkpoint):
    loaded = load_model(config_for(checkpoint, tune={"method": "qlora"}), device=CPU)
    assert quantised_linears(loaded.model)["language"] == (28, 28)
    warnings = [sentence for sentence in loaded.sentences if sentence.startswith("Warning: ")]
    assert warnings == ["Warning: 4-bit weights on a CPU are slower than fp32 ones; tune.method=lora is quicker here."]


def test_qlora_on_a_cpu_is_refused_for_a_real_model_before_its_weights_are_touched(copy):
    """The sizes of the published 2B, and no weights: the answer comes from the configuration alone."""
    (copy / "model.safetensors").unlink()
    written = json.loads((copy / "config.json").read_text())
    written["text_config"] |= {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    written["vision_config"] |= {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048}
    written["vision_config"] |= {"num_heads": 16, "num_position_embeddings": 2304}
    written["tie_word_embeddings"] = True
    (copy / "config.json").write_text(json.dumps(written))
    with pytest.raises(
        ConfigError, match=r"tune\.method=qlora: there is no GPU here, and .* has 2\.1 billion parameters"
    ):
        load_model(config_for(copy, tune={"method": "qlora"}), device=CPU)


def test_parameters_are_counted_without_memory_and_tied_ones_once(tiny_config, build_tiny):
    for tied in (False, True):
        assert count_parameters(tiny_config(tied=tied)) == sum(p.numel() for p in build_tiny(tied=tied).parameters())
    assert count_parameters(tiny_config()) < LARGEST_ON_CPU


def test_a_ready_made_4_bit_checkpoint_loads_as_it_is_in_the_types_of_this_device(checkpoint, copy):
    first = load_model(config_for(checkpoint, tune={"method": "qlora"}), device=CPU)
    first.model.save_pretrained(copy)
    loaded = load_model(config_for(copy), device=CPU)
    assert quantised_linears(loaded.model) == quantised_linears(first.model)
    assert any("stored in 4 bits already" in sentence for sentence in loaded.sentences)
    with pytest.raises(ConfigError, match=r"stored in 4 bits, which tune\.method=full cannot train"):
        load_model(config_for(copy, tune={"method": "full"}), device=CPU)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "capability", "dtype"),
    [
        ("auto", None, torch.float32),
        ("auto", (7, 0), torch.float16),  # V100
        ("auto", (7, 5), torch.float16),  # T4
        ("auto", (8, 0), torch.bfloat16),  # A100
        ("auto", (12, 0), torch.bfloat16),
        ("bf16", None, torch.bfloat16),
        ("fp32", (9, 0), torch.float32),
    ],
)
def test_precision_follows_the_card(setting, capability, dtype):
    assert precision_for(setting, capability) is dtype


@pytest.mark.parametrize(
    ("setting", "capability", "sentence"),
    [
        ("fp16", None, r"precision=fp16: a CPU has no fp16 arithmetic .*Set precision=auto \(fp32 here\)"),
        ("bf16", (7, 5), r"precision=bf16: this GPU has compute capability 7\.5, bf16 starts at 8\.0\. Set precision="),
    ],
)
def test_a_precision_that_is_not_there_is_answered(setting, capability, sentence):
    with pytest.raises(ConfigError, match=sentence):
        precision_for(setting, capability)


def test_training_own_weights_in_bf16_is_warned_of(checkpoint):
    settings = {"precision": "bf16", "tune": {"merger": "trained"}, "optim": {"rounding": "nearest"}}
    sentences = load_model(config_for(checkpoint, **settings), device=CPU).sentences
    assert any(
        s.startswith("Warning: merger trains its own weights in bf16") and "tune.merger=adapted" in s for s in sentences
    )
    assert not any("Warning" in s for s in load_model(config_for(checkpoint, precision="bf16"), device=CPU).sentences)


# --- folders that do not serve ----------------------------------------------------------------------------------------


def test_missing_weights_are_never_drawn_at_random(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.visual.blocks.1.attn.qkv.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files, first model\.visual\.blocks\.1\.attn\.qkv"):
        load_model(config_for(copy), device=CPU)


def test_weights_of_another_size_than_the_config_are_answered(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.language_model.norm.weight"] = torch.ones(96, dtype=torch.bfloat16)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"norm\.weight is \[96\] in its weights and \[64\] by its config\.json"):
        load_model(config_for(copy), device=CPU)


def test_a_folder_without_weights_is_answered(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .* Copy model\.safetensors"):
        load_model(config_for(copy), device=CPU)


def test_weights_cut_short_are_answered(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"its weights could not be read"):
        load_model(config_for(copy), device=CPU)


def test_a_folder_without_a_processor_is_answered(build_tiny, tmp_path):
    build_tiny(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its processor \(tokenizer, image processor, chat template\) could not be"):
        load_processor(str(tmp_path))


def test_a_processor_without_a_chat_template_is_answered(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(
        ModelError, match=r"no chat template, so turns cannot be told apart\. Copy chat_template\.jinja"
    ):
        load_processor(str(copy))


def test_contradictions_come_before_any_file(tmp_path):
    with pytest.raises(ConfigError, match="all frozen"):
        load_model(config_for(tmp_path / "nowhere", tune={"language": "frozen"}), device=CPU)
