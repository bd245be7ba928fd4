"""What surrounds llama.cpp's converter: how it is found, called, believed and, when it fails, quoted.

The converter itself is a program of others; the one here writes GGUF files as it does, in the same package's format.
"""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import torch

from lensmith.config.read import read_config
from lensmith.errors import ConfigError, RunError
from lensmith.export.gguf import export_gguf, find_tools
from lensmith.model.adapters import prepare_trainable, save_tuned
from lensmith.model.load import load_model
from lensmith.rundir import RunDir

CONVERTER = """
import argparse
import json
from pathlib import Path

import gguf
import numpy as np


def load_bf16(path):
    # By hand: the reader of safetensors needs torch for bf16, which takes seconds to load.
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    for name, tensor in json.loads(data[8:size]).items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            halves = np.frombuffer(data[size + start : size + end], np.uint16).astype(np.uint32)
            yield name, (halves << 16).view(np.float32).reshape(tensor["shape"])

parser = argparse.ArgumentParser()
for option in ("--outfile", "--outtype", "--model-name"):
    parser.add_argument(option)
parser.add_argument("model", type=Path)
parser.add_argument("--mmproj", action="store_true")
asked = parser.parse_args()
tensors = dict(load_bf16(asked.model / "model.safetensors"))
samples = {
    "model.visual.blocks.0.attn.proj.weight": "v.blk.0.attn_out.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
}
writer = gguf.GGUFWriter(asked.outfile, "clip" if asked.mmproj else "qwen3vl")
chosen = {name: t for name, t in tensors.items() if name.startswith("model.visual.") == asked.mmproj}
for name, tensor in chosen.items():
    writer.add_tensor(samples.get(name, name), SCALE * tensor)
if asked.mmproj:
    writer.add_tensor("second half of the patch embedding", np.zeros(1, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
QUANTIZE = """#!/bin/sh
cp "$1" "$2"
"""


@pytest.fixture
def llama_cpp(tmp_path) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.replace("SCALE", "1"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    folder = tmp_path_factory.mktemp("run")
    config = read_config(None, [f"run={folder}", "data.image.max_tokens=40"])
    run = RunDir(folder)
    run.start(config, {})
    model = prepare_trainable(load_model(config).model, config.tune, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_tuned(model, folder / "tuned")
    return run


def test_files_are_written_and_read_back(run, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp))
    made = export_gguf(run, run.path, tmp_path / "out", quants=("f32",))
    name = run.path.name
    assert made.files[0].name == f"{name}-f32.gguf"
    assert made.files[0].error == 0
    assert (made.files[0].tensors, made.projector.tensors) == (68, 76)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [f"{name}-f32.gguf", f"mmproj-{name}-f16.gguf", "Modelfile", "README.md", "lensmith_export.json"]
    )
    assert made.asked is None
    assert "--image-min-tokens 4 --image-max-tokens 40" in made.command
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM ./{name}-f32.gguf" in modelfile.splitlines()


def test_a_file_with_other_numbers_is_not_believed(run, llama_cpp, tmp_path):
    (llama_cpp / "convert_hf_to_gguf.py").write_text(CONVERTER.replace("SCALE", "2"))
    with pytest.raises(RunError, match=r"blk\.0\.attn_q\.weight, read back, differs from the merged .* by 100%"):
        export_gguf(run, run.path, tmp_path / "out", llama_cpp=llama_cpp, quants=("f16",))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_file_that_lacks_tensors_is_not_believed(run, llama_cpp, tmp_path):
    fewer = CONVERTER.replace("SCALE", "1").replace("chosen.items()", "list(chosen.items())[:9]")
    (llama_cpp / "convert_hf_to_gguf.py").write_text(fewer)
    with pytest.raises(RunError, match=r"with \d+ tensors, where qwen3vl with 68|with \d+ tensors, where clip with 76"):
        export_gguf(run, run.path, tmp_path / "out", llama_cpp=llama_cpp, quants=("f16",))


def test_a_converter_that_fails_is_quoted_with_a_hint(run, llama_cpp, tmp_path):
    (llama_cpp / "convert_hf_to_gguf.py").write_text("import sentencepiece_of_nobody")
    with pytest.raises(
        RunError, match=r"(?s)exit code 1, and nothing was exported.*pip install sentencepiece_of_nobody"
    ):
        export_gguf(run, run.path, tmp_path / "out", llama_cpp=llama_cpp)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.skipif(sys.platform == "win32", reason="the program of this test is a shell script")
def test_fewer_bits_go_through_llama_quantize(run, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RunError, match=r"--quant q4_k_m: needs llama-quantize"):
        find_tools(llama_cpp, ["q4_k_m"])
    monkeypatch.undo()
    program = llama_cpp / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text(QUANTIZE)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    made = export_gguf(run, run.path, tmp_path / "out", llama_cpp=llama_cpp, quants=("Q4_K_M",))
    assert [file.name for file in made.files] == [f"{run.path.name}-q4_k_m.gguf"]
    assert not list((tmp_path / "out").glob(".*"))


def test_an_unknown_type_is_answered_with_those_there_are(llama_cpp):
    with pytest.raises(ConfigError, match=r"--quant q9_0: not a type of GGUF file known here\. Use one of f32, f16"):
        find_tools(llama_cpp, ["q9_0"])


@pytest.mark.skipif(sys.platform == "win32", reason="the program of this test is a shell script")
def test_one_picture_is_asked_where_llama_cpp_can(run, llama_cpp, tmp_path):
    program = llama_cpp / "build" / "bin" / "llama-mtmd-cli"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\ntest -f "$6" && test -f "$2" && echo "  a red\n square "\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    made = export_gguf(run, run.path, tmp_path / "out", llama_cpp=llama_cpp, quants=("f32",))
    assert made.asked == "llama-mtmd-cli, asked about a red square, answered: a red square"
    program.write_text("#!/bin/sh\necho 'unknown model architecture' >&2\nexit 1\n")
    with pytest.raises(RunError, match=r"exit code 1 and answered '': unknown model architecture"):
        export_gguf(run, run.path, tmp_path / "other", llama_cpp=llama_cpp, quants=("f32",))
    assert not (tmp_path / "other").exists()
