"""What a user may type as `model`, and the sentence for everything else."""

import json

import pytest

from lensmith.errors import ModelError
from lensmith.model.names import KNOWN_NAMES, TINY, nearest_names, read_architecture, resolve_model


def folder_with(path, **config):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        *KNOWN_NAMES,
        "unsloth/Qwen3-VL-8B-Instruct",
        "unsloth/Qwen3-VL-8B-Instruct-bnb-4bit",
        "unsloth/Qwen3-VL-2B-Thinking-unsloth-bnb-4bit",
        "someone/charts-8b",
    ],
)
def test_hub_names_stay_as_they_are(name):
    assert resolve_model(name) == name


def test_the_eight_dense_checkpoints_are_known():
    assert len(KNOWN_NAMES) == 8
    assert "Qwen/Qwen3-VL-8B-Instruct" in KNOWN_NAMES


def test_a_local_folder_is_taken_if_it_holds_a_qwen3_vl(tmp_path):
    folder = folder_with(tmp_path / "mine", model_type="qwen3_vl")
    assert resolve_model(folder) == folder


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("unsloth/Qwen3-VL-7B", "Qwen/Qwen3-VL-8B-Instruct"),
        ("Qwen3-VL-7B", "Qwen/Qwen3-VL-8B-Instruct"),
        ("Qwen/Qwen3-VL-3B-Thinking", "Qwen/Qwen3-VL-4B-Thinking"),
        ("Qwen/Qwen3-VL-72B-Instruct", "Qwen/Qwen3-VL-32B-Instruct"),
        ("2b", "Qwen/Qwen3-VL-2B-Instruct"),
        ("Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct"),
        ("qwen/qwen3-vl-4b-instruct", "Qwen/Qwen3-VL-4B-Instruct"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_those_that_do_nearest_first(name, first):
    assert nearest_names(name)[0] == first
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"model={name}: ")
    assert "the sizes are 2B, 4B, 8B, 32B, each Instruct and Thinking" in sentence
    assert f"Use one of {first}, " in sentence
    assert all(known in sentence for known in KNOWN_NAMES)
    assert TINY in sentence


def test_the_guides_name_is_answered_with_its_missing_size():
    with pytest.raises(ModelError, match=r"model=unsloth/Qwen3-VL-7B: there is no Qwen3-VL of 7B;"):
        resolve_model("unsloth/Qwen3-VL-7B")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", r"a mixture of experts.*The dense models are Qwen/Qwen3-VL-32B-Instruct,"),
        ("Qwen/Qwen3-VL-8B-Instruct-FP8", r"FP8 weights are for serving.*Use Qwen/Qwen3-VL-8B-Instruct;"),
        ("./nowhere", r"model=\./nowhere: does not exist; a model is a folder"),
        ("a/b/c", r"model=a/b/c: does not exist"),
    ],
)
def test_what_cannot_be_trained_is_answered(name, sentence):
    with pytest.raises(ModelError, match=sentence):
        resolve_model(name)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "qwen3_vl_moe"}, r"a mixture of experts \(qwen3_vl_moe\), which Lensmith does not train yet"),
        ({"model_type": "qwen2_5_vl"}, r"says model_type qwen2_5_vl, Lensmith trains qwen3_vl"),
        ({}, r"says model_type nothing"),
    ],
)
def test_a_folder_with_another_model_says_which(tmp_path, config, sentence):
    with pytest.raises(ModelError, match=sentence):
        resolve_model(folder_with(tmp_path / "other", **config))


def test_a_folder_without_a_model_says_what_is_in_it(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"no config\.json in it, found weights\.bin\."):
        resolve_model(str(tmp_path))


def test_an_adapter_folder_is_answered_with_its_base_and_start_from(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct"}')
    with pytest.raises(
        ModelError, match=r"an adapter, not a model: it changes Qwen/Qwen3-VL-8B-Instruct\. .*start_from="
    ):
        resolve_model(str(tmp_path))


def test_a_config_cut_short_is_answered(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3')
    with pytest.raises(ModelError, match=r"not readable JSON .*Copy it again"):
        resolve_model(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"model\.safetensors: is a file; a model is a folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


def test_a_hub_name_that_is_not_cached_while_offline_says_how_to_get_it(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"not in the local cache, and this process is offline.*`hf download Qwen/"
    ) as caught:
        read_architecture("Qwen/Qwen3-VL-32B-Thinking")
    assert isinstance(caught.value.__cause__, OSError)


def test_the_architecture_is_read_without_weights(tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)).text_config.num_hidden_layers == 4
