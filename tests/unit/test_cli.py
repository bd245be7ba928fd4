"""The command line keeps its promises: quick help, one JSON object on stdout, three exit codes, no traceback for users."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import typer
from rich.console import Console

import lensmith
from lensmith import cli
from lensmith.config.tree import RunConfig
from lensmith.rundir import RunDir
from lensmith.screens import BARS, sparkline
from lensmith.train.progress import LINE_EVERY_S, CountProgress, TrainProgress
from lensmith.types import StepStats

REPOSITORY = Path(__file__).resolve().parents[2]
HELP_BOUND_S = 1.0
"""Meant are 0.3 s on a quiet machine; CI machines are not quiet. Loading torch alone takes longer than this."""
HEAVY = ("torch", "transformers", "trl", "peft", "numpy", "datasets")
VERBS = {
    "demo", "init", "check", "plan", "train", "eval", "ask", "serve", "config", "show", "env", "export", "verify", "convert",
}  # fmt: skip
PUBLIC = [
    "Dataset",
    "FastVisionModel",
    "GRPOConfig",
    "GRPOTrainer",
    "LensmithError",
    "RunConfig",
    "RunDir",
    "SFTConfig",
    "SFTTrainer",
    "Sample",
    "UnslothVisionDataCollator",
    "VisionDataCollator",
    "encode_sample",
    "evaluate_model",
    "extract_boxed_answer",
    "load_model",
    "pack_samples",
    "read_config",
    "read_samples",
    "train_model",
]


@pytest.fixture
def lensmith_verb(capsys, tmp_path, monkeypatch):
    """`lensmith_verb("show", "runs/x")` -> exit code, stdout, stderr; in this process and an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def stats(step: int, **changed: float) -> StepStats:
    values = {
        "loss": 2.0 / step,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "samples": 16,
        "tokens": 2000,
        "learned_tokens": 100,
        "step_s": 0.5,
        "data_wait_s": 0.05,
        "peak_gib": 0.0,
    }
    return StepStats(step=step, **(values | changed))


@pytest.fixture
def finished_run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "done")
    run.start(RunConfig.model_validate({"run": run.path, "tune": {"rank": 4}}), {"versions": {"torch": "2.15"}})
    for step in range(1, 101):
        run.append_metrics(stats(step))
    for name, answer in (("before", "blue"), ("after", "red")):
        line = {"where": "t.jsonl:1", "question": "Which colour?", "reference": "red", "answer": answer}
        run.predictions_path(name).write_text(json.dumps(line) + "\n")
    with run.save_checkpoint(100, keep=1) as folder:
        (folder / "weights").write_text("x")
    return run


def test_help_is_quick_and_loads_nothing_heavy():
    script = (
        "import sys, lensmith.cli as c; code = c.main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules], code, file=sys.stderr)"
    )
    took_s = []
    for _ in range(2):  # the first start may have to write bytecode
        started = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        took_s.append(time.perf_counter() - started)
    assert ended.stderr.strip() == "[] 0"
    assert min(took_s) < HELP_BOUND_S
    assert all(verb in ended.stdout for verb in VERBS)


@pytest.mark.parametrize(
    "module", ["lensmith", "lensmith.types", "lensmith.rundir", "lensmith.config.read", "lensmith.screens"]
)
def test_light_modules_load_nothing_heavy(module):
    script = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_the_verbs_are_these_and_each_has_help_and_an_example():
    group = typer.main.get_command(cli.app)
    assert set(group.commands) == VERBS
    for name, verb in group.commands.items():
        assert verb.help
        assert f"lensmith {name}" in verb.epilog
        assert "--json" in {option for parameter in verb.params for option in parameter.opts}


def test_public_names_are_these_and_load_on_first_use():
    assert sorted(lensmith.__all__) == PUBLIC
    assert dir(lensmith) == lensmith.__all__
    for name, module in lensmith.HOMES.items():
        assert getattr(lensmith, name) is getattr(import_module(module), name)
    with pytest.raises(AttributeError, match=r"no attribute 'trian_model'; it has .*train_model"):
        _ = lensmith.trian_model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "lensmith train: Missing argument"),
        (["train", "x.jsonl", "--lr", "3"], "lensmith train: No such option: --lr"),
        (["show"], "`lensmith show --help` shows how."),
        (["show", "nowhere"], "nowhere: no run here"),
        (["config", "lr=3"], "Did you mean optim.learning_rate?"),
        (["train", "tune.rank=3"], "data.train is null, but training needs a data file."),
        (["eval", "lensmith/tiny"], "no data file is given, so there are 0 questions to ask"),
    ],
)
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_mistake_is_one_sentence_and_exit_code_1(lensmith_verb, arguments, sentence, json_flag):
    code, out, err = lensmith_verb(*arguments, *json_flag)
    assert code == 1
    assert sentence in err
    assert "Traceback" not in err
    if json_flag:
        told = json.loads(out)
        assert told == {"error": err.strip(), "exit_code": 1}
    else:
        assert out == ""


def test_a_bug_shows_its_traceback_and_exits_with_2(lensmith_verb, finished_run):
    finished_run.metrics_path.write_text('{"no": "steps"}\n')
    code, out, err = lensmith_verb("show", str(finished_run.path), "--json")
    assert code == 2
    assert json.loads(out) == {"error": "KeyError: 'step_s'", "exit_code": 2}
    assert "Traceback (most recent call last)" in err
    assert "This is a bug in Lensmith. Please report it with the lines above and the output of `lensmith env`." in err


def test_config_prints_for_a_person_on_stderr_and_json_on_stdout(lensmith_verb):
    code, out, err = lensmith_verb("config", "tune.rank=4", "seed=1", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["config"]["tune"]["rank"] == 4
    assert told["differs"] == {"tune.rank": 4, "seed": 1}
    assert "  rank: 4" in err
    assert lensmith_verb("config", "tune.rank=4")[1] == ""


def test_config_without_a_file_lists_every_setting(lensmith_verb):
    code, out, err = lensmith_verb("config", "--json")
    assert code == 0
    settings = {setting["path"]: setting for setting in json.loads(out)["settings"]}
    assert settings["tune.rank"]["default"] == "16"
    assert all(path in err for path in settings)


def test_show_tells_settings_curve_cost_and_answers(lensmith_verb, finished_run):
    code, out, err = lensmith_verb("show", str(finished_run.path))
    assert (code, out) == (0, "")
    for part in (
        "tune.rank: 4",
        "loss, 2.000 -> 0.020 over 100 steps",
        "█",
        "1,600 samples in 50.0 s: 32.0 samples/s",
        "10% of it waiting for data",
        "step-000100",
        "before: blue",
        "after: red",
    ):
        assert part in err
    told = json.loads(lensmith_verb("show", str(finished_run.path), "--json")[1])
    assert (told["steps"], told["samples"], told["settings"]["tune.rank"]) == (100, 1600, 4)
    assert set(told["predictions"]) == {"before", "after"}


def test_env_is_json_with_versions(lensmith_verb):
    code, out, _ = lensmith_verb("env", "--json")
    assert code == 0
    assert json.loads(out)["versions"]["torch"]


def test_sparkline_goes_from_the_lowest_to_the_highest_bar():
    assert sparkline([]) == ""
    assert sparkline([1.0]) == BARS[0]
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert len(sparkline(list(range(1000)), columns=60)) == 60


def test_progress_without_a_terminal_says_a_line_every_few_seconds_and_the_last():
    text, now = io.StringIO(), [0.0]
    with TrainProgress(Console(file=text, width=200), clock=lambda: now[0]) as progress:
        for step in range(11, 31):  # resumed after step 10
            now[0] += 1.0
            progress.update(stats(step, step_s=1.0, peak_gib=7.5), 30)
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["11/30", *(f"{step}/30" for step in (16, 21, 26)), "30/30"]
    assert LINE_EVERY_S == 5.0
    assert "2,000 tokens/s" in lines[0]
    assert "7.5 GiB" in lines[0]
    assert "waiting for data 5%" in lines[0]
    assert lines[0].endswith("0:19 left")
    assert lines[-1].endswith("0:00 left")


def test_progress_on_a_terminal_is_a_bar():
    text = io.StringIO()
    with TrainProgress(Console(file=text, force_terminal=True, width=160)) as progress:
        progress.update(stats(1), 4)
        progress.say("above the bar")
        progress.update(stats(4), 4)
    assert "4/4" in text.getvalue()
    assert "above the bar" in text.getvalue()
    counted = io.StringIO()
    with CountProgress("answering", Console(file=counted, force_terminal=True)) as answered:
        answered(1, 2)
        answered(2, 2)
    assert "answering" in counted.getvalue()


def test_generated_pages_are_current():
    ended = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_links_between_pages_lead_somewhere():
    pages = [page for glob in ("*.md", "docs/**/*.md", "examples/**/*.md") for page in REPOSITORY.glob(glob)]
    assert len(pages) >= 8
    for page in pages:
        for link in page.read_text().split("](")[1:]:
            target = link.split(")")[0].split("#")[0]
            if target and not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
