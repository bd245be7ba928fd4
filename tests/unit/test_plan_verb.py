"""`lensmith plan` as a user meets it: promised JSON, 80 columns, sentences, and an answer before torch would have loaded."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from lensmith import cli
from lensmith.config.read import read_config
from lensmith.data.loader import StepDataset, plan_steps
from lensmith.plan.answer import Asked, answer_plan
from lensmith.plan.cards import find_card
from lensmith.plan.facts import SIZES
from lensmith.plan.screen import measured_sentence, plan_screen, stacked_bar
from lensmith.plan.work import scanned_work

WITHOUT_DATA = [
    "plan",
    "--model",
    "8b",
    "--method",
    "qlora",
    "--pack-tokens",
    "6000",
    "--images",
    "8",
    "--image-tokens",
    "700",
]
PROMISED = ["fits", "gpu_gib", "peak_gib", "parts", "step_s", "changes"]
PLAN_BOUND_S = 0.5
"""Of processor time in the verb. Meant are 0.3 s on a quiet machine; CI machines are not quiet, so the best of three counts."""
LIGHT = {
    "annotated_doc",
    "annotated_types",
    "cython_runtime",  # of yaml's C part
    "lensmith",
    "pydantic",
    "pydantic_core",
    "rich",
    "shellingham",
    "typer",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
"""All that a plan without data may load beside Python's own: nine tenths of the 0.27 s it takes are imports."""
MOST_MODULES = 400
"""331 when this was written, with Python 3.11's own."""


@pytest.fixture
def lensmith_plan(capsys, tmp_path, monkeypatch):
    """`lensmith_plan("--gpu", "8")` -> exit code, stdout, stderr; in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def rows(tmp_path) -> Path:
    """24 rows about 12 pictures; the largest is 12.png of row 24."""
    for number in range(1, 13):
        Image.new("RGB", (64 * number, 96)).save(tmp_path / f"{number}.png")
    lines = [
        {
            "image": f"{(row + 1) // 2}.png",
            "question": f"What is in picture {row}?",
            "answer": "nothing " * (row % 5 + 1),
        }
        for row in range(1, 25)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_json_has_the_promised_keys_first_and_exits_with_0_also_where_it_does_not_fit(lensmith_plan):
    for gpu, fits in (("24", True), ("8", False)):
        code, out, _ = lensmith_plan(*WITHOUT_DATA[1:], "--gpu", gpu, "--json")
        told = json.loads(out)
        assert (code, told["fits"], told["gpu_gib"]) == (0, fits, float(gpu))
        assert list(told)[:6] == PROMISED
        assert sum(told["parts"].values()) == pytest.approx(told["peak_gib"] + told["parts"]["CUDA context"], abs=0.01)
        assert bool(told["changes"]) is not fits
    assert told["changes"][0]["settings"] == {"memory.embedding": "host"}


def test_a_plan_without_data_loads_no_torch_and_takes_under_300_ms():
    script = (
        "import sys, time, contextlib, io; import lensmith.cli, lensmith.config.read, rich.console\n"
        "start = time.process_time()\n"
        "with contextlib.redirect_stderr(io.StringIO()):\n"
        f"    code = lensmith.cli.main({[*WITHOUT_DATA, '--gpu', '8']})\n"
        "print(time.process_time() - start, [n for n in ('torch', 'transformers', 'numpy', 'PIL') if n in sys.modules], code)"
    )
    took_s = []
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds, rest = ended.stdout.strip().split(" ", 1)
        took_s.append(float(seconds))
        assert rest == "[] 0"
    assert min(took_s) < PLAN_BOUND_S


def test_help_and_a_plan_without_data_load_only_light_packages_and_few_modules():
    """What guards the 300 ms of a start whatever else the machine does; wall clock is measured by hand."""
    script = (
        "import sys; before = set(sys.modules); import lensmith.cli\n"
        "lensmith.cli.main({})\n"
        "new = set(sys.modules) - before\n"
        "print(*sorted({{n.partition('.')[0] for n in new}} - sys.stdlib_module_names), len(new), file=sys.stderr)"
    )
    for verb in (["--help"], [*WITHOUT_DATA, "--gpu", "8", "--json"], [*WITHOUT_DATA, "--gpu", "8"]):
        ended = subprocess.run([sys.executable, "-c", script.format(verb)], capture_output=True, text=True, check=True)
        *packages, count = ended.stderr.splitlines()[-1].split()
        assert {name for name in packages if not name.startswith("_")} <= LIGHT, verb
        assert int(count) < MOST_MODULES, verb


def test_the_screen_is_at_most_80_columns_and_holds_the_whole_answer():
    config = read_config(None, ["model=Qwen/Qwen3-VL-8B-Instruct", "tune.method=qlora", "pack.tokens=6000"])
    text = io.StringIO()
    console = Console(file=text, width=80)
    for piece in plan_screen(answer_plan(config, Asked(SIZES["8B"], find_card("8")))):
        console.print(piece, markup=False, highlight=False)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    for part in (
        "8B, qlora, adamw_8bit: does not fit RTX 4060 (8 GiB).",
        "decoder nf4",
        "CUDA context",
        "reserved by torch",
        "The peak is as the backward pass begins.",
        "Planned for packs of 6,000 tokens",
        "s per step on RTX 4060",
        "The smallest change that makes it fit",
        "memory.embedding=host",
        "GiB of host memory are page-locked: embedding 1.2",
    ):
        assert part in shown


@pytest.mark.parametrize(("gpu", "inside"), [("24", True), ("8", False)])
def test_the_bar_ends_before_or_after_the_card(gpu, inside):
    config = read_config(None, ["tune.method=qlora"])
    found = answer_plan(config, Asked(SIZES["8B"], find_card(gpu)))
    bar = stacked_bar(found.memory, found.card.gib).plain
    before, after = bar.split("|")
    assert (after.strip() == "") is inside
    assert (len(before) + len(after)) == 72
    widest = max(found.memory.parts, key=lambda name: found.memory.parts[name])
    assert next(iter(found.memory.parts)) == widest
    assert bar.count("a") == pytest.approx(
        72 * found.memory.parts[widest] / max(found.card.gib, sum(found.memory.parts.values())), abs=1
    )


def test_without_a_card_the_smallest_that_fits_is_named(lensmith_plan, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no driver to ask
    code, out, err = lensmith_plan("--model", "4b", "--method", "qlora", "--json")
    assert (code, json.loads(out)["gpu_gib"], json.loads(out)["fits"]) == (0, 8, True)
    assert "No GPU here and none named (--gpu 24)" in err


def test_a_run_of_rewards_is_planned_by_its_own_settings_and_rows(lensmith_plan, tmp_path):
    from PIL import Image

    for number, side in enumerate((64, 256)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n % 2}.png", "question": "What is it?", "answer": "this"} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    settings = ["task=grpo", "grpo.group=4", "grpo.max_new_tokens=40", "optim.effective_samples=8", "data.test=null"]
    code, out, err = lensmith_plan(str(data), *settings, "--gpu", "8", "--json")
    told = json.loads(out)
    assert code == 0
    assert "the longest there is: rows.jsonl:2." in err
    assert {"completions", "scoring"} <= set(told["step_parts_s"])
    prompt = int(err.partition("prompts of ")[2].partition(" tokens")[0])
    assert prompt > 64, "the larger picture is 64 tokens"
    assert told["pack_tokens"] == 2 * (prompt + 4 * 40), "both groups of a step in one pack"
    longer = json.loads(lensmith_plan(str(data), *settings, "--completion-tokens", "80", "--gpu", "8", "--json")[1])
    assert longer["pack_tokens"] == 2 * (prompt + 4 * 80), "a flag goes before the settings"


def test_grpo_and_its_flags_are_planned(lensmith_plan):
    shared = [
        "--model",
        "8b",
        "--method",
        "qlora",
        "--task",
        "grpo",
        "--group",
        "8",
        "--completion-tokens",
        "512",
        "--gpu",
        "24",
    ]
    first = json.loads(lensmith_plan(*shared, "--json")[1])
    assert {"completions", "scoring"} <= set(first["step_parts_s"])
    apart = json.loads(lensmith_plan(*shared, "--no-share-prefix", "--json")[1])
    assert apart["step_s"] > first["step_s"]
    assert json.loads(lensmith_plan(*shared, "--rollout", "vllm", "--json")[1])["parts"]["rollout copy"] > 16


def test_the_rollouts_engine_of_the_settings_is_planned(lensmith_plan, tmp_path):
    """Beside the training vLLM has its share of the card; on a server nothing of it."""
    path, card = tmp_path / "run.yaml", ("--gpu", "80", "--json")
    path.write_text("model: Qwen/Qwen3-VL-8B-Instruct\ntask: grpo\nrollout: {engine: vllm, vllm_gpu_share: 0.4}\n")
    parts = json.loads(lensmith_plan(str(path), *card)[1])["parts"]
    assert parts["rollout copy"] + parts["KV cache"] == pytest.approx(0.4 * 80, abs=0.01)
    path.write_text("model: Qwen/Qwen3-VL-8B-Instruct\ntask: grpo\nrollout: {engine: vllm, vllm_mode: server}\n")
    served = json.loads(lensmith_plan(str(path), *card)[1])["parts"]
    assert "rollout copy" not in served


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "7b"], "no folder of that name, and no size in it that Qwen3-VL has (2B, 4B, 8B, 30B-A3B, 32B)"),
        (["--gpu", "h10"], "--gpu h10: not one of 8, 12, 16, 24, 40, 48, 80 GiB"),
        (["--gpu", "8", "--gib", "9"], "--gpu 8 and --gib 9 name two cards"),
        (["--pack-tokens", "500", "--images", "8", "--image-tokens", "700"], "8 images of 700 tokens are 5,600 tokens"),
        (["--method", "loar"], "tune.method"),
        (["--gpu", "8", "--picture", "plan.pdf"], "--picture plan.pdf: a picture is a .png or .svg file"),
        (["--gpu", "8", "--fit", "no/such.yaml"], "--fit no/such.yaml: there is no folder no"),
        (
            ["--model", "32b", "--gib", "2", "--fit", "x.yaml"],
            "--fit x.yaml: nothing to write, because no settings make",
        ),
    ],
)
def test_a_mistake_is_one_sentence(lensmith_plan, arguments, sentence):
    code, out, err = lensmith_plan(*arguments)
    assert (code, out) == (1, "")
    assert sentence in err
    assert "Traceback" not in err


def test_fit_writes_a_config_that_fits_and_never_overwrites(lensmith_plan, tmp_path):
    arguments = [*WITHOUT_DATA[1:5], "--gpu", "8", "--fit", "fits.yaml"]
    assert lensmith_plan(*arguments)[0] == 0
    text = (tmp_path / "fits.yaml").read_text()
    assert re.match(r"# Planned for RTX 4060 \(8 GiB\): [67]\.\d GiB reserved of 7\.2 that can be used\.\n", text)
    again = json.loads(lensmith_plan("fits.yaml", "--gpu", "8", "--json")[1])
    assert (again["fits"], again["changes"]) == (True, [])
    code, _, err = lensmith_plan(*arguments)
    assert code == 1
    assert "fits.yaml: exists already and stays as it is" in err


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_picture_is_drawn(lensmith_plan, tmp_path, name):
    assert lensmith_plan(*WITHOUT_DATA[1:], "--gpu", "8", "--picture", name)[0] == 0
    assert (tmp_path / name).stat().st_size > 5_000


def test_data_is_read_by_its_headers_and_the_worst_pack_is_named(lensmith_plan, rows):
    code, out, err = lensmith_plan(str(rows), "data.test=null", "pack.tokens=300", "--gpu", "8", "--json")
    told = json.loads(out)
    assert code == 0
    assert "24 rows in = 24 kept" in err
    assert told["run_h"] is not None
    assert any(where.endswith("rows.jsonl:24") for where in told["worst_pack"])
    assert "12.png" in told["worst_image"]
    assert "768 x 96 as seen: 72 tokens" in told["worst_image"]


def test_rows_of_a_model_whose_tokenizer_is_not_here_are_said_to_be_unread(lensmith_plan, rows):
    code, out, err = lensmith_plan(str(rows), "--model", "8b", "--gpu", "24", "--json")
    assert (code, json.loads(out)["worst_pack"]) == (0, None)
    assert "The rows were not looked at: the tokenizer of Qwen/Qwen3-VL-8B-Instruct is not on this machine" in err


@pytest.mark.parametrize("share", [True, False])
def test_planned_packs_are_those_that_training_makes(rows, processor, share):
    from lensmith.data.encode import Encoder
    from lensmith.data.scan import scan_source
    from lensmith.data.source import open_source

    config = read_config(
        None,
        [
            f"data.train={rows}",
            "pack.tokens=260",
            f"pack.share_prefix={str(share).lower()}",
            "optim.effective_samples=8",
        ],
    )
    encoder = Encoder.from_processor(processor, config.data.image)
    source = open_source(config.data, encoder, which="train")
    scan = scan_source(source, budget_tokens=260, on_long="shrink", on_bad_row="error", seed=0)
    planned = scanned_work(scan, config)
    steps = plan_steps(scan, effective_samples=8, seed=0, epochs=3, share_prefix=share)
    dataset = StepDataset(
        scan, steps, encoder.geometry, image_token_id=encoder.image_token_id, budget_tokens=260, share_prefix=share
    )
    made = [pack for step in range(steps.per_epoch) for pack in dataset[step].packs]
    assert len(planned.packs) == len(made) >= 3
    by_rows = {frozenset(f"rows.jsonl:{scan.rows[m] + 1}" for m in one.members): one.work for one in planned.packs}
    for pack in made:
        work = by_rows[frozenset(pack.wheres)]
        assert work.tokens == pack.num_tokens
        assert work.learned == int((pack.labels != -100).sum())
        assert work.images == len(pack.grids)
        assert work.image_tokens == int(pack.grids.prod(1).sum()) // 4
        keys = sum(s.length + (pack.segments[s.parent].length if s.parent is not None else 0) for s in pack.segments)
        assert (work.key_tokens or work.tokens) == keys
    assert planned.steps == len(steps.steps)


def test_measured_is_told_beside_predicted():
    found = answer_plan(read_config(None, ["tune.method=qlora"]), Asked(SIZES["8B"], find_card("24")))
    peak = found.memory.peak_gib
    assert (
        f"Measured: {peak / 1.1:.2f} GiB reserved where {peak:.2f} were predicted (+10.0%), 1.50 s"
        in measured_sentence(found, peak_gib=peak / 1.1, step_s=1.5)
    )


def test_a_measurement_without_a_gpu_has_no_memory_to_compare():
    found = answer_plan(read_config(None, ["tune.method=qlora"]), Asked(SIZES["8B"], find_card("24")))
    told = measured_sentence(found, peak_gib=0.0, step_s=1.5)
    assert told == "Measured on a CPU: 1.50 s for the pack; there is no GPU memory to compare."


def test_a_stuck_or_missing_driver_is_no_card(monkeypatch, tmp_path):
    from lensmith.plan.cards import find_own_card

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = find_own_card()
    assert found is not None
    assert (found.name, found.gib, found.bf16_tflops) == ("NVIDIA GeForce RTX 4090", 24.0, 165.2)
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    started = time.perf_counter()
    assert find_own_card() is None
    assert time.perf_counter() - started < 5


def test_measure_runs_a_group_of_completions_behind_their_prompt(lensmith_plan):
    arguments = ["--model", "lensmith/tiny", "--task", "grpo", "--group", "4", "--completion-tokens", "20"]
    code, out, told = lensmith_plan(*arguments, "--images", "1", "--image-tokens", "64", "--measure", "--json")
    assert code == 0
    assert json.loads(out)["measured"]["step_s"] > 0
    assert "Measured on a CPU" in told


def test_a_run_on_another_engine_is_not_planned_as_one_of_ours(capsys):
    assert cli.main([*WITHOUT_DATA, "engine=unsloth", "--json"]) == 1
    assert "Add engine=lensmith to the command" in json.loads(capsys.readouterr().out)["error"]
