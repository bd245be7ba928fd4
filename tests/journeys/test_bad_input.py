"""Everything the issue calls bad input, through the real command line: one sentence that helps, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lensmith import cli
from lensmith.rundir import RunDir

COLOURS = ("red", "green", "blue", "teal", "brown", "gray", "yellow", "black")
LONG_WAIT_S = 120
"""For a process that trains; a busy machine may need most of it."""
QUICK = ("optim.steps=1", "optim.effective_samples=4", "data.workers=0", "data.test=null")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current folder with eight pictures in it."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


@pytest.fixture
def write_rows(workplace):
    """`write_rows(row, ...)` -> rows.jsonl with eight good rows and then those given."""

    def write(*bad: dict, good: bool = True) -> Path:
        rows = [{"image": f"{colour}.png", "question": "Which colour?", "answer": colour} for colour in COLOURS]
        path = workplace / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*(rows if good else []), *bad]))
        return path

    return write


@pytest.fixture
def train(workplace, capsys):
    """`train("rows.jsonl", "tune.rank=4")` -> exit code and what the person reads."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        code = cli.main(["train", *map(str, arguments), *QUICK])
        err = capsys.readouterr().err
        assert "Traceback" not in err, err
        return code, " ".join(err.split())

    return call


def train_process(
    *arguments: str | Path, prefix: tuple[str, ...] = (), limit_bytes: int | None = None
) -> subprocess.Popen:
    """The same in a process of its own, for what can only end a process."""

    def limit() -> None:
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "lensmith", "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,  # noqa: PLW1509 (no threads here)
    )


def messages(*turns: tuple[str, str], **columns: object) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **columns}


# --- settings -----------------------------------------------------------------------------------------------------------


def test_unknown_setting_names_the_near_one(train, write_rows):
    write_rows()
    Path("run.yaml").write_text("data: {train: rows.jsonl}\noptim:\n  lr: 2e-4\n")
    code, err = train("run.yaml")
    assert code == 1
    assert "run.yaml:3: there is no setting optim.lr (set to 0.0002). Did you mean optim.learning_rate?" in err


def test_wrong_type_says_what_is_allowed(train, write_rows):
    code, err = train(write_rows(), "tune.rank=many")
    assert code == 1
    assert "tune.rank is 'many', but must be a whole number, at least 1." in err


# --- files --------------------------------------------------------------------------------------------------------------


def test_missing_settings_file(train):
    code, err = train("rnu.yaml")
    assert code == 1
    assert "rnu.yaml: no such file" in err


def test_missing_data_file_names_the_near_ones(train, write_rows):
    write_rows()
    code, err = train("row.jsonl")
    assert code == 1
    assert re.search(r"row\.jsonl: there is no such file or folder.*rows\.jsonl", err)


def test_empty_file(train, workplace):
    (workplace / "rows.jsonl").touch()
    code, err = train("rows.jsonl")
    assert code == 1
    assert re.search(r"rows\.jsonl: is empty \(0 bytes\); write the rows to it, or name another file", err)


def test_no_usable_rows(train, write_rows):
    path = write_rows({"image": "red.png", "question": "Which colour?", "answer": " "}, good=False)
    code, err = train(path, "data.on_bad_row=skip")
    assert code == 1
    assert re.search(r"none of the .*rows can be used: rows\.jsonl:1: the answer in turn 2 is empty", err), err
    assert "empty" in err


# --- rows ---------------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> str:
    path = folder / "cut.png"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path.name


def not_an_image(folder: Path) -> str:
    path = folder / "fake.png"
    path.write_text("<html>404 not found</html>")
    return path.name


@pytest.mark.parametrize(
    ("make_row", "sentence"),
    [
        (lambda _: {"image": "gone.png", "question": "What?", "answer": "red"}, r"gone\.png"),
        (lambda folder: {"image": truncated(folder), "question": "What?", "answer": "x"}, r"cut\.png.*truncated"),
        (lambda folder: {"image": not_an_image(folder), "question": "What?", "answer": "x"}, r"fake\.png"),
        (
            lambda _: {"image": ["red.png"], "question": "<image><image> Same?", "answer": "no"},
            r"2 <image> marks .*1 images",
        ),
        (lambda _: {"image": "red.png", "question": "What?", "answer": "  "}, r"answer .*empty"),
    ],
    ids=["missing image", "truncated image", "not an image", "fewer images than marks", "empty answer"],
)
def test_a_bad_row_stops_the_run_and_can_be_left_out(train, write_rows, workplace, make_row, sentence):
    path = write_rows(make_row(workplace))
    code, err = train(path)
    assert code == 1
    assert re.search(r"rows\.jsonl:9\b.*" + sentence, err), err
    assert "data.on_bad_row=skip" in err
    code, err = train(path, "data.on_bad_row=skip")
    assert code == 0, err
    assert re.search(r"rows\.jsonl:9\b.*" + sentence, err), "what was left out is said"
    assert re.search(r"9 rows.*8 .*1 ", err), "rows in = rows kept + rows refused"


def test_unknown_role(train, write_rows):
    path = write_rows(messages(("human being", "What?"), ("assistant", "red")), good=False)
    code, err = train(path)
    assert code == 1
    assert re.search(r"rows\.jsonl:1\b.*turn 1 is spoken by 'human being', but roles are", err)


def test_a_row_too_long_is_refused_dropped_or_gets_fewer_image_tokens(train, write_rows, workplace):
    Image.new("RGB", (512, 512), "red").save(workplace / "large.png")
    path = write_rows({"image": "large.png", "question": "Which colour?", "answer": "red"})
    code, err = train(path, "pack.tokens=128", "data.on_long=error")
    assert code == 1
    assert re.search(r"rows\.jsonl:9\b.*\b128\b", err)
    code, err = train(path, "pack.tokens=128", "data.on_long=drop", "run=runs/drop")
    assert code == 0, err
    assert re.search(r"rows\.jsonl:9\b", err)
    code, err = train(path, "pack.tokens=128", "data.on_long=shrink", "run=runs/shrink")
    assert code == 0, err
    assert re.search(r"1 row over the token budget: their images get at most \d+ tokens each \(rows\.jsonl:9\)", err), (
        err
    )


# --- machine ------------------------------------------------------------------------------------------------------------


def test_qlora_without_a_gpu_warns_once_for_a_tiny_model(write_rows):
    process = train_process(write_rows(), "tune.method=qlora", *QUICK)
    _, err = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 0, err
    assert err.count("Warning: 4-bit weights on a CPU are slower") == 1


def test_qlora_without_a_gpu_is_refused_for_2b_and_larger(write_rows, workplace):
    """Only the configuration of the 2B model is here; the refusal comes before any weights are looked for."""
    from lensmith.model.names import resolve_model

    folder = shutil.copytree(
        resolve_model("lensmith/tiny"), workplace / "2b", ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((folder / "config.json").read_text())
    # https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct/blob/main/config.json
    config["text_config"] |= {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    config["vision_config"] |= {"out_hidden_size": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    process = train_process(write_rows(), f"model={folder}", "tune.method=qlora", *QUICK)
    _, err = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 1, err
    assert re.search(r"tune\.method=qlora: there is no GPU here, and \S+ has [12]\.\d billion parameters", err)
    assert "Traceback" not in err


def small_disk(folder: Path) -> tuple[str, ...] | None:
    """A prefix that runs a command with a file system of 1 MiB at `folder`; None where the system does not let us."""
    prefix = (
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=1m none {folder} && exec "$@"',
        "sh",
    )
    if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
        return prefix
    return None


def test_no_space_left_names_the_folder_and_what_to_do(write_rows, workplace):
    disk = workplace / "disk"
    disk.mkdir()
    prefix = small_disk(disk)
    # Where no small disk can be mounted, a limit on file sizes cuts the same write short.
    process = train_process(
        write_rows(), f"run={disk / 'run'}", "tune.rank=64", *QUICK,
        prefix=prefix or (), limit_bytes=None if prefix else 2**19,
    )  # fmt: skip
    _, err = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    expected = r"(no space left .* free there|a file would be larger than)"
    assert re.search(f"{re.escape(str(disk))}.*{expected}", err), err
    assert re.search(r"run=|set run to", err), "the way out"


def test_ctrl_c_saves_and_says_how_to_resume(write_rows, workplace):
    settings = ("optim.effective_samples=4", "data.workers=0", "data.test=null", "optim.schedule=constant")
    run = RunDir(workplace / "runs" / "long")
    process = train_process(write_rows(), f"run={run.path}", "optim.steps=100000", *settings)
    deadline = time.monotonic() + LONG_WAIT_S
    while len(run.read_metrics()) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG_WAIT_S)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    last = run.read_metrics()[-1]["step"]
    assert f"stopped after step {last} of 100000 and saved. To go on: lensmith train {run.config_path}" in " ".join(
        err.split()
    )
    assert run.latest_checkpoint().name == f"step-{last:06d}"

    process = train_process(run.config_path, f"optim.steps={last + 2}")
    _, err = process.communicate(timeout=LONG_WAIT_S)
    assert process.returncode == 0, err
    assert f"Going on from {run.checkpoints_path / f'step-{last:06d}'}" in " ".join(err.split())
    assert [stats["step"] for stats in run.read_metrics()] == list(range(1, last + 3))
