"""`lensmith verify` passes a run as it is, and names what was done to one that was tampered with."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import easy_vqa
import pytest
import torch
from safetensors.torch import load_file, save_file

from lensmith import cli
from lensmith.config.read import read_config
from lensmith.export.merge import merge_run
from lensmith.model.load import local_folder
from lensmith.model.names import TINY
from lensmith.rundir import RunDir
from lensmith.train.sft import train_model

NAMES = ["changed", "reload", "agree", "inputs", "blind", "health", "metric"]
SETTINGS = [
    "data.image_root=/",
    "data.test=0.2",
    "data.workers=0",
    "data.image.max_tokens=64",
    "optim.steps=12",
    "optim.effective_samples=32",
    "optim.learning_rate=2e-3",
    "pack.check_packs=0",
    "eval.max_new_tokens=4",
    "seed=3",
]


def train(rows: list[dict], folder: Path, *settings: str) -> RunDir:
    """A run in `folder` on these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = read_config(None, [f"data.train={folder / 'rows.jsonl'}", f"run={folder / 'run'}", *SETTINGS, *settings])
    train_model(config)
    return RunDir(config.run)


def shape_rows(count: int) -> list[dict]:
    """What shape or colour easy-VQA's pictures show."""
    paths = easy_vqa.get_train_image_paths()
    asked = [item for item in zip(*easy_vqa.get_train_questions(), strict=True) if item[0].startswith("what")]
    drawn = random.Random(0).sample(asked, count)
    return [{"image": paths[number], "question": question, "answer": answer} for question, answer, number in drawn]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return train(shape_rows(400), tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_run(run, run.path, folder)
    return folder


@pytest.fixture
def verify(capsys):
    """`verify(run, ...)` -> exit code, the checks by name, what a person reads."""

    def call(run: RunDir, *arguments: str) -> tuple[int, dict[str, dict], str]:
        code = cli.main(["verify", str(run.path), *arguments, "--questions", "24", "--json"])
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert told.get("ok") == (code == 0), err
        return code, {check["name"]: check for check in told["checks"]}, err

    return call


@pytest.fixture
def copy(run, tmp_path) -> RunDir:
    """The run, to be tampered with."""
    shutil.copytree(run.path, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


@pytest.fixture
def merged_copy(merged, tmp_path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "merged"))


def rewrite(file: Path, change) -> None:
    """`change(tensors)` between reading and writing a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_run_as_it_is_passes_all_seven_and_leaves_nothing_behind(run, verify):
    before = {path.relative_to(run.path) for path in run.path.rglob("*")}
    code, checks, read = verify(run)
    assert code == 0, read
    assert list(checks) == NAMES
    assert all(set(check) == {"name", "ok", "value", "bound", "fix"} for check in checks.values())
    assert all(check["ok"] is True and check["fix"] == "" for check in checks.values()), checks
    assert "All 7 checks passed" in read
    assert {path.relative_to(run.path) for path in run.path.rglob("*")} == before


def test_a_merged_model_that_was_tampered_with_fails_where_it_was(run, merged_copy, verify):
    def spoil(tensors: dict) -> None:
        tensors["model.visual.blocks.0.norm1.bias"][0] += 1  # frozen
        tensors["model.language_model.layers.3.mlp.down_proj.weight"] *= -3  # adapted
        tensors["model.language_model.layers.4.self_attn.o_proj.weight"] *= -3

    rewrite(merged_copy / "model.safetensors", spoil)
    processor = json.loads((merged_copy / "processor_config.json").read_text())
    processor["image_processor"]["size"]["shortest_edge"] *= 8
    (merged_copy / "processor_config.json").write_text(json.dumps(processor))
    code, checks, read = verify(run, "--merged", str(merged_copy))
    assert code == 1
    assert {name for name, check in checks.items() if not check["ok"]} == {"changed", "agree", "inputs", "metric"}
    assert checks["changed"]["value"] == 3
    assert (
        "1 tensor that the settings freeze is different in the merged model: model.visual.blocks.0.norm1.bias."
        in (checks["changed"]["fix"])
    )
    assert checks["agree"]["value"] > checks["agree"]["bound"]
    assert checks["metric"]["value"] < checks["metric"]["bound"]
    assert "pass size={'shortest_edge': 4096, 'longest_edge': 65536}" in checks["inputs"]["fix"]
    assert "Not ready: changed, agree, inputs, metric failed." in read


def test_an_adapter_that_was_tampered_with_fails_and_what_cannot_be_asked_any_more_says_so(copy, verify):
    def spoil(tensors: dict) -> None:
        names = sorted(name for name in tensors if "lora_B" in name)
        tensors[names[0].replace("lora_B", "lora_b")] = tensors.pop(names[0])
        tensors[names[1]].zero_()
        tensors[names[2]][0, 0] = torch.nan

    rewrite(copy.path / "tuned" / "adapter_model.safetensors", spoil)
    code, checks, read = verify(copy)
    assert code == 1
    assert {name: check["ok"] for name, check in checks.items()} == {
        "changed": False,
        "reload": False,
        "agree": None,
        "inputs": True,
        "blind": None,
        "health": False,
        "metric": None,
    }
    assert checks["reload"]["value"] == 2, "one key missing, one without a place"
    assert checks["health"]["value"] == 2, "one dead, one with a NaN"
    assert "Not run: " in checks["blind"]["fix"]
    assert "not run" in read


def test_a_run_whose_answers_need_no_picture_fails_blind_alone(tmp_path, verify):
    rng = random.Random(1)
    rows = []
    for row in shape_rows(60):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rows.append({"image": row["image"], "question": f"What is {a} + {b}?", "answer": str(a + b)})
    run = train(rows, tmp_path, "optim.steps=4", "data.test=null")
    code, checks, _ = verify(run)
    assert code == 1
    assert {name for name, check in checks.items() if check["ok"] is False} == {"blind"}
    assert checks["metric"]["ok"] is None
    assert checks["metric"]["fix"].startswith("Not run: 0 held-out questions")


def test_a_run_without_its_data_is_asked_about_drawn_pictures(copy, verify):
    config = copy.config_path.read_text()
    copy.config_path.write_text(config.replace("rows.jsonl", "gone.jsonl"))
    code, checks, read = verify(copy)
    assert code == 0, checks
    assert [name for name, check in checks.items() if check["ok"] is None] == ["blind", "metric"]
    assert "on 8 prompts drawn here" in " ".join(read.split())
    assert "None failed: 5 of 7 checks passed" in read


@pytest.fixture
def serve():
    """`serve(folder)` -> address of an OpenAI-compatible server of that model: plain transformers, its own processor."""
    servers = []

    def start(folder: Path) -> str:
        import base64
        import io
        import threading
        from http.server import BaseHTTPRequestHandler, HTTPServer

        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        own = AutoProcessor.from_pretrained(folder)

        def opened(part: dict) -> dict:
            if part["type"] != "image_url":
                return part
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            return {"type": "image", "image": Image.open(io.BytesIO(data))}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"data": [{"id": folder.name}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                turns = [{**turn, "content": list(map(opened, turn["content"]))} for turn in asked["messages"]]
                shape = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
                inputs = own.apply_chat_template(turns, **shape)
                ids = model.generate(**inputs, max_new_tokens=asked["max_tokens"], do_sample=False)
                text = own.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                self.reply({"choices": [{"message": {"content": text}}]})

            def reply(self, told: dict) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(told).encode())

            def log_message(self, *_: object) -> None:
                """Requests are no news."""

        servers.append(server := HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_of_the_merged_model_agrees_and_one_that_serves_the_base_is_found_out(run, merged, verify, serve):
    code, checks, read = verify(run, "--merged", str(merged), "--endpoint", serve(merged))
    assert code == 0, checks
    assert "gives 8 of 8 answers word for word" in " ".join(read.split())
    code, checks, _ = verify(run, "--merged", str(merged), "--endpoint", serve(local_folder(TINY)))
    assert code == 1
    assert [name for name, check in checks.items() if check["ok"] is False] == ["agree"]
    assert "times the base's: it serves another model" in checks["agree"]["fix"]


def test_a_server_that_is_not_there_is_said_to_be(run, capsys):
    assert cli.main(["verify", str(run.path), "--endpoint", "http://127.0.0.1:9/v1"]) == 1
    assert "http://127.0.0.1:9/v1/models: no answer" in capsys.readouterr().err
    assert cli.main(["verify", str(run.path), "--endpoint", "localhost:9"]) == 1
    assert "--endpoint localhost:9: not an http or https address" in capsys.readouterr().err
