"""The verbs before training: demo, init, check and plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lensmith.cli.app import Found, Json, Overrides, app, read_settings
from lensmith.console import say
from lensmith.errors import ConfigError

if TYPE_CHECKING:
    from lensmith.config.tree import RunConfig
    from lensmith.data.source import SampleSource


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
    say(guess_layout(rows, Columns()).sentence)
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
    say(f"Wrote {to}. Read it, then: lensmith train {to}")
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
    config = read_settings(source, overrides or ())
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
        checked = run_check(config, decode=not quick, say=say, progress=read)
    report = checked.report
    for line in check_screen(report):
        say(line)
    result = report.to_json()
    told = _blind_test(config, checked.sources["train"], result) if blind else None
    if not no_html:
        write_page(report, checked.sources, html, seed=config.seed, blind=told)
        say(f"Wrote {html}: rows as the model sees them.")
    if fix is not None:
        with CountProgress("copying") as copied:
            cleaned = write_clean(checked, config, fix, workers=config.data.workers, progress=copied)
        for sentence in cleaned.sentences():
            say(sentence)
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
    task: Annotated[
        Literal["sft", "grpo"] | None, typer.Option(help="Training of another kind than the settings'.")
    ] = None,
    group: Annotated[int | None, typer.Option(help="Completions per prompt, for grpo.", min=2)] = None,
    completion_tokens: Annotated[int | None, typer.Option(help="Tokens of each of them.", min=1)] = None,
    no_share_prefix: Annotated[
        bool, typer.Option("--no-share-prefix", help="Each completion with a prompt of its own.")
    ] = False,
    rollout: Annotated[
        Literal["builtin", "vllm"] | None, typer.Option(help="What makes completions, other than the settings say.")
    ] = None,
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
    config = read_settings(source, given) if source else read_config(None, given)
    question = Question(
        gpu,
        gib,
        gpus,
        images,
        image_tokens,
        task,
        group,
        completion_tokens,
        False if no_share_prefix else None,
        rollout,
    )
    found = ask_plan(config, question, say)
    for piece in plan_screen(found):
        say(piece)
    result = found.to_json()
    if picture is not None:
        from lensmith.plan.picture import draw_plan

        draw_plan(found, picture)
        say(f"Drew {picture}.")
    if fit is not None:
        write_fitting(found, fit)
        say(f"Wrote {fit}. Start it with: lensmith train {fit}")
    if measure:
        from lensmith.train.measure import measure_plan

        measured = measure_plan(config, found.work)
        say(measured_sentence(found, peak_gib=measured.peak_gib, step_s=measured.step_s))
        result |= {"measured": {"peak_gib": measured.peak_gib, "step_s": measured.step_s}}
    return result


def _blind_test(config: RunConfig, source: SampleSource, result: dict[str, Any]) -> str:
    """Ask the model with its own, other and grey images; returns what came of it, and adds the numbers to `result`."""
    from dataclasses import asdict

    from lensmith.evals.blind import blind_test
    from lensmith.model.load import load_model

    tested = blind_test(load_model(config).model, source, range(len(source)), seed=config.seed)
    say(tested.sentence)
    result["blind"] = asdict(tested)
    return tested.sentence
