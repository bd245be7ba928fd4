"""The verbs: parse, call, print, exit code. What they do is elsewhere and loads when a verb runs.

A person reads stderr. With `--json`, stdout holds exactly one JSON object, also after an error. Exit codes: 0 done,
1 the user can fix it (one sentence, no traceback), 2 a bug (always with its traceback).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lensmith.errors import ConfigError, Interrupted, LensmithError

if TYPE_CHECKING:
    from lensmith.config.tree import RunConfig
    from lensmith.data.source import SampleSource

DONE, USER_ERROR, BUG = 0, 1, 2
YAML_SUFFIXES = {".yaml", ".yml"}
# typer carries its own copy of click from 0.25 on; the parent of its public BadParameter is UsageError in both.
UsageError: Any = typer.BadParameter.__base__


class Found(dict[str, Any]):
    """A result that is whole, and yet asks for something to be mended: the exit code says so."""


app = typer.Typer(
    help="Fine-tune Qwen3-VL on the GPU you have: images and answers in, a verified model out.",
    epilog="Start with `lensmith demo`, then `lensmith train data.jsonl`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="A.B=C", help="Settings, such as tune.rank=32.")]
Subject = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run folder, one of its checkpoints, a model folder or a model name."),
]


@app.command(epilog="Examples: lensmith demo; lensmith demo grpo")
def demo(
    what: Annotated[
        Literal["sft", "grpo"], typer.Argument(help="sft: answers about real pictures; grpo: sums, from rewards.")
    ] = "sft",
    run: Annotated[
        Path | None,
        typer.Option(help="Folder for all that the demo leaves behind; by default runs/demo or runs/demo-grpo."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the questions, the order and what is sampled.")] = 0,
    json: Json = False,
) -> dict[str, Any]:
    """Run the main job on the embedded tiny model, in minutes, on any machine: fine-tuning, or learning from rewards."""
    from lensmith.train.progress import CountProgress, TrainProgress

    with TrainProgress() as progress, CountProgress("answering", progress.console) as answered:
        shown: dict[str, Any] = {"say": progress.say, "train_progress": progress, "eval_progress": answered}
        if what == "sft":
            from lensmith.demo import run_demo

            return run_demo(run=run or Path("runs/demo"), seed=seed, **shown).to_json()
        from lensmith.demo_grpo import run_grpo_demo

        return run_grpo_demo(run=run or Path("runs/demo-grpo"), seed=seed, **shown).to_json()


@app.command(epilog="Example: lensmith init data.jsonl")
def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data file, a folder with one, or a data set name.")],
    to: Annotated[Path, typer.Option(help="The file to write; one that exists is never overwritten.")] = Path(
        "run.yaml"
    ),
    json: Json = False,
) -> dict[str, Any]:
    """Write a commented starter run.yaml."""
    from lensmith.config.starter import write_starter
    from lensmith.config.tree import Columns
    from lensmith.data.layout import guess_layout
    from lensmith.data.rows import open_rows

    rows = open_rows(data)
    _say(guess_layout(rows, Columns()).sentence)
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(write_starter(data))
    except FileExistsError as cause:
        raise ConfigError(
            f"{to}: exists already and stays as it is. Write another one: lensmith init {data} --to other.yaml"
        ) from cause
    except FileNotFoundError as cause:
        raise ConfigError(
            f"{to}: there is no folder {to.parent}. Make it, or choose another file with --to."
        ) from cause
    _say(f"Wrote {to}. Read it, then: lensmith train {to}")
    return {"wrote": str(to)}


@app.command(
    epilog="Examples: lensmith check data.jsonl; lensmith check run.yaml --quick; lensmith check run.yaml --fix clean"
)
def check(
    source: Annotated[str, typer.Argument(metavar="RUN.YAML|DATA", help="Settings, or just data.")],
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read headers and end marks only; decode no picture.")] = False,
    fix: Annotated[
        Path | None,
        typer.Option(help="Write a clean copy of the data to this folder, which must not exist or be empty."),
    ] = None,
    html: Annotated[Path, typer.Option(help="The page with the rows as the model sees them.")] = Path("report.html"),
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page.")] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="Also ask the model with wrong and grey images: does it look at them?")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Read every row and picture before training, and say what is wrong with which; exits with 1 where any is refused."""
    config = _read_settings(source, overrides or ())
    if config.data.train is None:
        raise ConfigError(
            f"{source}: data.train is null, so there is nothing to check. "
            "Set it in the file, or add data.train=rows.jsonl to the command."
        )
    from lensmith.check.fix import refuse_full_folder, write_clean
    from lensmith.check.page import refuse_foreign_page, write_page
    from lensmith.check.run import run_check
    from lensmith.check.screen import check_screen
    from lensmith.train.progress import CountProgress

    if fix is not None:
        refuse_full_folder(fix)
    if not no_html:
        refuse_foreign_page(html)
    with CountProgress("reading") as read:
        checked = run_check(config, decode=not quick, say=_say, progress=read)
    report = checked.report
    for line in check_screen(report):
        _say(line)
    result = report.to_json()
    told = _blind_test(config, checked.sources["train"], result) if blind else None
    if not no_html:
        write_page(report, checked.sources, html, seed=config.seed, blind=told)
        _say(f"Wrote {html}: rows as the model sees them.")
    if fix is not None:
        with CountProgress("copying") as copied:
            cleaned = write_clean(checked, config, fix, workers=config.data.workers, progress=copied)
        for sentence in cleaned.sentences():
            _say(sentence)
    return result if report.is_clean else Found(result)


@app.command(
    epilog="Examples: lensmith plan run.yaml --gpu 8 --fit fits.yaml; lensmith plan --model 8b --method qlora --gpu 24"
)
def plan(
    source: Annotated[
        str | None, typer.Argument(metavar="RUN.YAML|DATA", help="Settings, or just data; neither is needed.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="8, 12, 16, 24, 40, 48 or 80 GiB, or a name such as 4090; by default this machine's."),
    ] = None,
    gib: Annotated[float | None, typer.Option(help="Memory of any other card.", min=1)] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that share weights by FSDP2, on paper.", min=1)] = 1,
    model: Annotated[str | None, typer.Option(help="2b, 4b, 8b, 30b-a3b, 32b, a name or a folder.")] = None,
    method: Annotated[str | None, typer.Option(help="lora, qlora, lora_8bit or full.")] = None,
    pack_tokens: Annotated[int | None, typer.Option(help="Tokens in one forward pass.")] = None,
    images: Annotated[
        int | None, typer.Option(help="Pictures in a pack, instead of data; per prompt for grpo.", min=0)
    ] = None,
    image_tokens: Annotated[int | None, typer.Option(help="Tokens of each of them.", min=1)] = None,
    task: Annotated[Literal["sft", "grpo"], typer.Option(help="What kind of training.")] = "sft",
    group: Annotated[int, typer.Option(help="Completions per prompt, for grpo.", min=2)] = 8,
    completion_tokens: Annotated[int, typer.Option(help="Tokens of each of them.", min=1)] = 512,
    no_share_prefix: Annotated[
        bool, typer.Option("--no-share-prefix", help="Each completion with a prompt of its own.")
    ] = False,
    rollout: Annotated[Literal["builtin", "vllm"], typer.Option(help="What makes completions.")] = "builtin",
    fit: Annotated[Path | None, typer.Option(help="Write the settings that fit to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the plan as this .png or .svg.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run the worst pack once on the GPU and compare.")] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Say what a run needs of a GPU, by part, and the smallest change that makes it fit; needs no GPU and no download."""
    from lensmith.config.read import read_config
    from lensmith.plan.ask import Question, ask_plan, model_setting, write_fitting
    from lensmith.plan.screen import measured_sentence, plan_screen

    flags = {"model": model and model_setting(model), "tune.method": method, "pack.tokens": pack_tokens}
    given = [*(overrides or ()), *(f"{path}={value}" for path, value in flags.items() if value is not None)]
    config = _read_settings(source, given) if source else read_config(None, given)
    question = Question(
        gpu, gib, gpus, images, image_tokens, task, group, completion_tokens, not no_share_prefix, rollout
    )
    found = ask_plan(config, question, _say)
    for piece in plan_screen(found):
        _say(piece)
    result = found.to_json()
    if picture is not None:
        from lensmith.plan.picture import draw_plan

        draw_plan(found, picture)
        _say(f"Drew {picture}.")
    if fit is not None:
        write_fitting(found, fit)
        _say(f"Wrote {fit}. Start it with: lensmith train {fit}")
    if measure:
        from lensmith.train.measure import measure_plan

        measured = measure_plan(config, found.work)
        _say(measured_sentence(found, peak_gib=measured.peak_gib, step_s=measured.step_s))
        result |= {"measured": {"peak_gib": measured.peak_gib, "step_s": measured.step_s}}
    return result


@app.command(epilog="Examples: lensmith train data.jsonl; lensmith train run.yaml tune.rank=32 run=runs/rank-32")
def train(
    source: Annotated[
        str, typer.Argument(metavar="RUN.YAML|DATA", help="Settings, or just data; a run folder resumes.")
    ],
    overrides: Overrides = None,
    json: Json = False,
) -> dict[str, Any]:
    """Fine-tune, and show what got better; resumes where the run folder exists."""
    config = _read_settings(source, overrides or ())
    if config.data.train is None:
        raise ConfigError(
            f"{source}: data.train is null, but training needs a data file. "
            "Set it in the file, or add data.train=rows.jsonl to the command."
        )
    from lensmith.rundir import RunDir

    if (run := RunDir(config.run)).latest_checkpoint():
        _say(f"{run.path} exists: resuming it. For a new run, add run=runs/another-name.")
    from lensmith.train.evaluate import train_and_compare
    from lensmith.train.progress import CountProgress, TrainProgress

    with TrainProgress() as progress, CountProgress("answering", progress.console) as answered:
        result = train_and_compare(config, say=progress.say, train_progress=progress, eval_progress=answered)
    _say(f"Done: {result.run}. Look at it: lensmith show {result.run}")
    return result.to_json()


@app.command(
    "eval",
    epilog="Examples: lensmith eval runs/sft; lensmith eval lensmith/tiny test.jsonl; "
    "lensmith eval runs/sft --endpoint http://127.0.0.1:8000/v1",
)
def evaluate(
    subject: Subject,
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="Questions; by default those the run held out.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this OpenAI-compatible server instead, on the same pixels.")
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of its models; by default the first it lists.")
    ] = None,
    endpoint_token: Annotated[
        str | None, typer.Option(envvar="LENSMITH_TOKEN", help="What it asks for; better by LENSMITH_TOKEN.")
    ] = None,
    endpoint_concurrency: Annotated[int, typer.Option(help="Questions that it is asked at once.", min=1)] = 8,
    json: Json = False,
) -> dict[str, Any]:
    """Answer questions and score the answers, before and after training, with intervals."""
    from lensmith.evals.endpoint import Endpoint
    from lensmith.train.evaluate import evaluate_endpoint, evaluate_subject
    from lensmith.train.progress import CountProgress

    with CountProgress("answering") as answered:
        if endpoint is None:
            result = evaluate_subject(subject, data, say=_say, progress=answered)
        else:
            server = Endpoint(endpoint, endpoint_model, endpoint_token, endpoint_concurrency)
            result = evaluate_endpoint(subject, server, data, say=_say, progress=answered)
    return result.to_json()


@app.command("config", epilog="Examples: lensmith config; lensmith config run.yaml tune.rank=32")
def show_config(
    source: Annotated[str | None, typer.Argument(metavar="RUN.YAML", help="By default the schema as a table.")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> dict[str, Any]:
    """Print the resolved settings, or every setting there is."""
    from lensmith.config.schema import list_settings
    from lensmith.config.write import config_diff, dump_config, plain
    from lensmith.screens import settings_table, write_default

    if source is None:
        _say(settings_table())
        rows = [(s, write_default(s.path)) for s in list_settings()]
        return {
            "settings": [
                {"path": s.path, "accepts": s.allowed, "default": default, "meaning": s.doc} for s, default in rows
            ]
        }
    config = _read_settings(source, overrides or ())
    _say(dump_config(config).rstrip())
    return {"config": plain(config), "differs": config_diff(config)}


@app.command(epilog="Example: lensmith show runs/sft")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    json: Json = False,
) -> dict[str, Any]:
    """Show what was run: settings, curve, cost and answers."""
    from lensmith.rundir import RunDir
    from lensmith.screens import describe_run, run_screen

    opened = RunDir.open(run)
    for line in run_screen(opened):
        _say(line)
    return describe_run(opened)


@app.command(epilog="Example: lensmith env")
def env(json: Json = False) -> dict[str, Any]:
    """Print versions, GPU and what runs on it and why; for bug reports."""
    from lensmith.config.write import write_value
    from lensmith.model.versions import environment

    found = environment()
    for name, value in found.items():
        _say(f"{name}: {write_value(value)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. `argv` defaults to the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wants_json = "--json" in arguments
    _quieten_libraries()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # What libraries plan to rename is for us to follow, not for users to read.
            warnings.simplefilter("ignore", FutureWarning)
            if wants_json and "--help" not in arguments:
                # Libraries print where they like; stdout belongs to the one JSON object.
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            result = typer.main.get_command(app).main(arguments, prog_name="lensmith", standalone_mode=False)
        code = result if isinstance(result, int) else USER_ERROR if isinstance(result, Found) else DONE
    except BaseException as error:  # noqa: BLE001 (the one place where every error becomes an exit code; bugs show all)
        result, code = _report(error)
    if wants_json and isinstance(result, dict) and os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, ensure_ascii=False, default=str))
    return code


def _quieten_libraries() -> None:
    """Their notes about themselves would bury ours; each line can be had back by setting the variable it sets."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns once per data worker
    # pydantic asks every installed package for plugins, at each start; none of ours has one.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _report(error: BaseException) -> tuple[dict[str, Any], int]:
    """Say what went wrong on stderr; returns the JSON object and the exit code."""
    sentence = _explain(error)
    if sentence is None:
        traceback.print_exception(error, file=sys.stderr)
        sentence = f"{type(error).__name__}: {error}"
        print(
            "\nThis is a bug in Lensmith. Please report it with the lines above and the output of `lensmith env`.",
            file=sys.stderr,
        )
        return {"error": sentence, "exit_code": BUG}, BUG
    print(sentence, file=sys.stderr)
    return {"error": sentence, "exit_code": USER_ERROR}, USER_ERROR


def _explain(error: BaseException) -> str | None:
    """A sentence for what the user can mend; None for a bug."""
    if isinstance(error, LensmithError):
        return str(error)
    if isinstance(error, UsageError):
        usage: Any = error
        verb = usage.ctx.command_path if usage.ctx else "lensmith"
        return f"{verb}: {usage.format_message()} `{verb} --help` shows how."
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return str(Interrupted("Stopped by Ctrl-C before anything was saved. Start the same command again."))
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch for it
        return (
            f"GPU memory ran out: {str(error).splitlines()[0]} "
            "Lower pack.tokens, keep memory.recompute=layers, or set tune.method=qlora."
        )
    from lensmith.rundir import explain_full_disk

    return explain_full_disk(error, Path.cwd())


def _blind_test(config: RunConfig, source: SampleSource, result: dict[str, Any]) -> str:
    """Ask the model with its own, other and grey images; returns what came of it, and adds the numbers to `result`."""
    from dataclasses import asdict

    from lensmith.evals.blind import blind_test
    from lensmith.model.load import load_model

    tested = blind_test(load_model(config).model, source, range(len(source)), seed=config.seed)
    _say(tested.sentence)
    result["blind"] = asdict(tested)
    return tested.sentence


def _read_settings(source: str, overrides: Sequence[str]) -> RunConfig:
    """Settings from a YAML file, a run folder, a data file, or overrides alone."""
    from lensmith.config.read import read_config
    from lensmith.rundir import RunDir

    path = Path(source)
    folder = path.parent if path.name == "config.yaml" else path
    if (run := RunDir(folder)).exists and run.environment_path.exists():
        # The folder may have moved since, or be named from elsewhere.
        return read_config(run.config_path, [f"run={folder}", *overrides])
    if path.suffix in YAML_SUFFIXES:
        return read_config(path, overrides)
    if "=" in source and not path.exists():
        return read_config(None, [source, *overrides])
    return read_config(None, overrides, data=source)


def _say(text: Any) -> None:
    """For the person: stderr, once, whatever the number of processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    from rich.console import Console

    Console(file=sys.stderr).print(text, markup=False, highlight=False, soft_wrap=True)


from lensmith import cli_export, cli_serve, cli_verify  # noqa: E402, F401  (verbs of their own, which need what stands above)
