"""A run, trained a few steps, exported to each kind from the command line and loaded as people without Lensmith would."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lensmith import cli
from lensmith.export.card import read_record
from lensmith.model.adapters import ADAPTER_CONFIG
from lensmith.model.names import resolve_model
from lensmith.rundir import RunDir

TINY = Path(resolve_model("lensmith/tiny"))
COLOURS = ("red", "green", "blue", "teal")
COMMON = (
    "optim.steps=4",
    "optim.effective_samples=2",
    "optim.learning_rate=0.02",
    "data.test=0.25",
    "data.image.max_tokens=40",
    "eval.max_new_tokens=4",
    "data.workers=0",
    "save.every_steps=2",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Three finished runs on eight rows: LoRA, LoRA with trained mergers, full."""
    folder = tmp_path_factory.mktemp("export")
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (96, 64), colour).save(folder / f"{colour}.png")
        rows += [
            {"image": f"{colour}.png", "question": q, "answer": colour} for q in ("Which colour?", "Name the colour.")
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "lora": ("tune.rslora=true", "tune.rank=24"),
        "merger": ("tune.merger=trained",),
        "full": ("tune.method=full", "tune.mlp=false"),
    }
    for name, settings in kinds.items():
        rate = ("optim.learning_rate=0.002",) if name == "full" else ()
        code = cli.main(
            ["train", str(folder / "rows.jsonl"), f"run={folder / name}", *COMMON, *settings, *rate, "--json"]
        )
        assert code == 0
    return {name: folder / name for name in kinds}


@pytest.fixture
def export(capsys):
    """`export(run, "--to", "merged")` -> the one JSON object on stdout; the verb must succeed."""

    def call(run: Path, *arguments: str) -> dict:
        code = cli.main(["export", str(run), *arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refuse(capsys):
    """`refuse(run, "--to", "gguf")` -> the sentence on stderr; the exit code must be the user's."""

    def call(run: Path, *arguments: str) -> str:
        assert cli.main(["export", str(run), *arguments]) == cli.USER_ERROR
        return capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def inputs():
    processor = AutoProcessor.from_pretrained(TINY)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(text=[text], images=[Image.new("RGB", (96, 64), "teal")], return_tensors="pt")


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.double()


def stock(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)


def apart(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> float:
    """Mean distance of two answers over their distance from the base's."""
    return float((ours - theirs).abs().mean() / (theirs - base).abs().mean())


@pytest.mark.parametrize("name", ["lora", "merger", "full"])
def test_the_merged_model_answers_as_the_adapter_and_not_as_the_base(runs, export, inputs, name):
    told = export(runs[name], "--to", "merged")
    folder, tuned = Path(told["folder"]), runs[name] / "tuned"
    assert folder == runs[name] / "export" / "merged"
    theirs = stock(TINY)
    if (tuned / "trained.safetensors").is_file():
        theirs.load_state_dict(load_file(tuned / "trained.safetensors"), strict=False)
    if (tuned / ADAPTER_CONFIG).is_file():
        theirs = PeftModel.from_pretrained(theirs, tuned)
    base = logits(stock(TINY), inputs)
    # bf16 rounds what was trained in fp32; `lost` says by how much of the change.
    assert apart(logits(stock(folder), inputs), logits(theirs, inputs), base) < 3 * told["lost"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.size["longest_edge"] == 40 * 1024
    assert f"# {name}" in (folder / "README.md").read_text()
    assert "FROM ." in (folder / "Modelfile").read_text().splitlines()


def test_the_adapter_loads_in_plain_peft_by_its_folder_alone(runs, export, inputs):
    told = export(runs["lora"], "--to", "adapter")
    folder = Path(told["folder"])
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert "lensmith.model" not in (folder / ADAPTER_CONFIG).read_text()
    settings["base_model_name_or_path"] = str(TINY)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
    auto = AutoPeftModel.from_pretrained(folder, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(stock(TINY), runs["lora"] / "tuned")
    assert torch.equal(logits(auto, inputs), logits(theirs, inputs))
    assert told["servable"] is True
    assert told["rank"] == 24


def test_an_adapter_with_trained_mergers_says_what_others_do_not_load(runs, export, inputs):
    told = export(runs["merger"], "--to", "adapter")
    folder = Path(told["folder"])
    assert told["servable"] is False
    assert "merger trained weights of their own, which PEFT and vLLM do not look for" in told["notes"][0]
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert 'load_file("trained.safetensors")' in code


def test_the_vllm_folder_serves_the_limits_of_training(runs, export):
    told = export(runs["lora"], "--to", "vllm")
    folder, command = Path(told["folder"]), told["command"]
    assert command[:5] == ["vllm", "serve", "./model", "--served-model-name", "lora"]
    limits = json.loads(command[command.index("--mm-processor-kwargs") + 1])
    assert limits == {"size": {"shortest_edge": 4096, "longest_edge": 40 * 1024}}
    assert (folder / "model" / "config.json").is_file()
    assert shlex.join(command) in (folder / "serve.sh").read_text()
    subprocess.run(["sh", "-n", folder / "serve.sh"], check=True)
    ast.parse((folder / "client.py").read_text())


def test_the_limits_on_the_command_line_are_what_a_processor_takes(runs, export):
    told = export(runs["lora"], "--to", "vllm", "--lora")
    limits = json.loads(told["command"][told["command"].index("--mm-processor-kwargs") + 1])
    picture, text = Image.new("RGB", (640, 640)), ["<|vision_start|><|image_pad|><|vision_end|>"]
    # As vLLM does it: the base's processor made and called with these arguments.
    made = AutoProcessor.from_pretrained(TINY, **limits)
    cut = made(text=text, images=[picture], return_tensors="pt", **limits)
    own = AutoProcessor.from_pretrained(told["folder"] + "/adapter")(text=text, images=[picture], return_tensors="pt")
    assert torch.equal(cut["image_grid_thw"], own["image_grid_thw"])
    assert int(own["image_grid_thw"].prod()) <= 4 * 40


def test_vllm_is_given_a_rank_it_knows_for_an_adapter(runs, export, refuse):
    told = export(runs["lora"], "--to", "vllm", "--lora")
    command = told["command"]
    assert command[command.index("--max-lora-rank") + 1] == "32", "24 is none of vLLM's ranks"
    assert command[command.index("--lora-modules") + 1] == "lora=./adapter"
    said = refuse(runs["merger"], "--to", "vllm", "--lora")
    assert "vLLM cannot serve this adapter beside its base" in said
    assert "Export" in said or "export" in said


def test_a_checkpoint_is_exported_with_its_own_step(runs, export):
    checkpoint = RunDir(runs["lora"]).checkpoint_path(2)
    told = export(checkpoint, "--to", "adapter", "--out", str(runs["lora"].parent / "at-2"))
    assert Path(told["tuned"]) == checkpoint / "tuned"
    assert "- 2 steps" in (Path(told["folder"]) / "README.md").read_text()
    # A checkpoint has no processor beside it; the export has the limits all the same.
    processor = AutoProcessor.from_pretrained(told["folder"])
    assert processor.image_processor.size["longest_edge"] == 40 * 1024


def test_the_card_tells_scores_and_cost_and_no_path_of_this_machine(runs, export):
    told = export(runs["lora"], "--to", "adapter")
    text = (Path(told["folder"]) / "README.md").read_text()
    after = read_record(RunDir(runs["lora"]), runs["lora"] / "tuned").after
    assert f"| this model | {after.score} |" in text
    assert "4 steps, 8 samples" in text
    assert "license: apache-2.0" in text
    assert "data.image.max_tokens: 40" in text
    assert str(runs["lora"].parent) not in text


def test_a_full_run_has_no_adapter(runs, refuse):
    said = refuse(runs["full"], "--to", "adapter")
    assert "trained weights themselves. Export the whole model: --to merged." in said


def test_options_without_effect_are_refused(runs, refuse):
    assert "--quant: has no effect here, because --to merged" in refuse(
        runs["lora"], "--to", "merged", "--quant", "f16"
    )
    assert "--lora merges nothing" in refuse(runs["lora"], "--to", "vllm", "--lora", "--merge-into", "nf4-dequantised")
    assert "this run has tune.method=lora" in refuse(runs["lora"], "--to", "merged", "--merge-into", "nf4-dequantised")


def test_gguf_without_llama_cpp_says_where_to_get_it(runs, refuse, monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert "no folder of llama.cpp is named. Clone https://" in refuse(runs["lora"], "--to", "gguf")
    said = refuse(runs["lora"], "--to", "gguf", "--llama-cpp", str(tmp_path))
    assert f"{tmp_path / 'convert_hf_to_gguf.py'} is not there" in said
    assert "--quant q9: not a type" in refuse(runs["lora"], "--to", "gguf", "--quant", "q9")
    assert not (runs["lora"] / "export" / "gguf").exists()


def test_nothing_is_pushed_without_a_token(runs, refuse, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    out = tmp_path / "out"
    said = refuse(runs["lora"], "--to", "adapter", "--out", str(out), "--push", "me/model")
    assert "there is no token of the Hub here, so nothing was exported or pushed" in said
    assert not out.exists()


def test_a_folder_that_is_no_run_is_refused(refuse, tmp_path):
    assert "no run here" in refuse(tmp_path, "--to", "merged")
