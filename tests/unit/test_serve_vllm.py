"""The command of vLLM's server says what was trained: its pictures, its adapter, its names."""

import json
from pathlib import Path

import pytest

from lensmith.config.read import read_config
from lensmith.data.images import read_geometry
from lensmith.errors import ConfigError, ModelError
from lensmith.rundir import RunDir
from lensmith.serve.vllm import _check_servable, choose_engine, token_variable, vllm_command


@pytest.fixture
def command(processor):
    def make(*settings, adapter=Path("/runs/sft/tuned")):
        config = read_config(None, ["model=lensmith/tiny", *settings])
        where = {"folder": Path("/models/base"), "adapter": adapter, "host": "127.0.0.1", "port": 8000}
        return vllm_command(config, read_geometry(processor), **where)

    return make


def after(command, flag):
    return command[command.index(flag) + 1]


def test_the_command_names_pixels_adapter_and_address(command):
    made = command("data.image.min_tokens=16", "data.image.max_tokens=1000", "tune.rank=24")
    assert made[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "/models/base"]
    size = {"size": {"shortest_edge": 16 * 32**2, "longest_edge": 1000 * 32**2}}
    assert json.loads(after(made, "--mm-processor-kwargs")) == size
    assert (after(made, "--host"), after(made, "--port")) == ("127.0.0.1", "8000")
    assert (after(made, "--max-lora-rank"), after(made, "--lora-modules")) == ("32", "tuned=/runs/sft/tuned")
    assert after(made, "--served-model-name") == "base"
    assert after(made, "--generation-config") == "vllm"


def test_a_model_alone_has_no_adapter_flags(command):
    assert not any("lora" in part for part in command(adapter=None))


def test_the_token_is_not_on_the_command_line(command):
    assert token_variable("secret") == {"VLLM_API_KEY": "secret"}
    assert token_variable(None) == {}
    assert "--api-key" not in command()


def test_without_vllm_transformers_answers_and_it_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = []
    assert choose_engine("auto", "lensmith/tiny", said.append) == "transformers"
    assert said == ["Engine: transformers, because vLLM is not installed."]
    with pytest.raises(ConfigError, match=r"--engine vllm: vLLM is not installed here\. pip install vllm, or use"):
        choose_engine("vllm", "lensmith/tiny", said.append)


@pytest.mark.parametrize(
    ("settings", "file", "sentence"),
    [
        (
            [],
            "trained.safetensors",
            "holds trained weights besides or instead of an adapter, and vLLM loads adapters only",
        ),
        (["tune.vision=adapted"], "adapter_config.json", "adapts vision, which vLLM's LoRA leaves out"),
        (["tune.dora=true"], "adapter_config.json", "is a DoRA adapter, which vLLM's LoRA leaves out"),
    ],
)
def test_weights_that_vllm_would_leave_out_are_not_given_to_it(tmp_path, settings, file, sentence):
    run = RunDir(tmp_path / "run")
    run.start(read_config(None, ["model=lensmith/tiny", f"run={run.path}", *settings]), {})
    (run.path / file).touch()
    with pytest.raises(ModelError, match=sentence):
        _check_servable(str(run.path))
