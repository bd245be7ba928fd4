"""The verbs train and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lensmith.cli.app import Json, Overrides, Subject, app, read_settings
from lensmith.console import say
from lensmith.errors import ConfigError


@app.command(epilog="Examples: lensmith train data.jsonl; lensmith train run.yaml tune.rank=32 run=runs/rank-32")
def train(
    source: Annotated[
        str, typer.Argument(metavar="RUN.YAML|DATA", help="Settings, or just data; a run folder resumes.")
    ],
    overrides: Overrides = None,
    json: Json = False,
) -> dict[str, Any]:
    """Fine-tune, and show what got better; resumes where the run folder exists."""
    config = read_settings(source, overrides or ())
    if config.data.train is None:
        raise ConfigError(
            f"{source}: data.train is null, but training needs a data file. "
            "Set it in the file, or add data.train=rows.jsonl to the command."
        )
    if config.engine == "unsloth":
        from lensmith.model.unsloth import import_unsloth

        import_unsloth()  # before transformers and TRL, which it rewrites
    from lensmith.rundir import RunDir

    if (run := RunDir(config.run)).latest_checkpoint():
        say(f"{run.path} exists: resuming it. For a new run, add run=runs/another-name.")
    from lensmith.train.evaluate import train_and_compare
    from lensmith.train.progress import CountProgress, TrainProgress
    from lensmith.train.ranks import leave_group

    with TrainProgress() as progress, CountProgress("answering", progress.console) as answered:
        result = train_and_compare(config, say=progress.say, train_progress=progress, eval_progress=answered)
    leave_group()
    say(f"Done: {result.run}. Look at it: lensmith show {result.run}")
    return result.to_json()


@app.command(
    "eval",
    epilog="Examples: lensmith eval runs/sft; lensmith eval lensmith/tiny test.jsonl; "
    "lensmith eval runs/sft --by source; "
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
    by: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Break the score down by this column; may be repeated.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="The page of answers; by default eval.html in the run folder.")
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no page.")] = False,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Leave out the general questions that show what was forgotten.")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Answer questions and score the answers, before and after training, with intervals, and show gains and losses."""
    from lensmith.evals.endpoint import Endpoint
    from lensmith.train.progress import CountProgress
    from lensmith.train.subject import Show, evaluate_endpoint, evaluate_subject

    show = Show(tuple(by or ()), probe=not no_probe, html=not no_html, page=html)
    with CountProgress("answering") as answered:
        if endpoint is None:
            result = evaluate_subject(subject, data, show=show, say=say, progress=answered)
        else:
            server = Endpoint(endpoint, endpoint_model, endpoint_token, endpoint_concurrency)
            result = evaluate_endpoint(subject, server, data, show=show, say=say, progress=answered)
    return result.to_json()
