"""`lensmith verify`: the verb alone; what it does is in lensmith.export.verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lensmith.cli.app import Found, Json, app
from lensmith.console import say


@app.command(epilog="Examples: lensmith verify runs/sft; lensmith verify runs/sft --merged runs/sft/export/merged")
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    merged: Annotated[
        Path | None, typer.Option(help="A merged model to verify; by default one is made and removed again.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions to ask, at most.", min=6)] = 64,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Also ask this OpenAI-compatible server of the merged model, as in http://localhost:8000/v1."
        ),
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Prove that the model a run leaves behind is the one it trained, in seven checks; exits with 1 where one fails."""
    from lensmith.export.verify.gate import verify_run
    from lensmith.export.verify.screen import verify_screen
    from lensmith.train.progress import CountProgress

    with CountProgress("answering") as answered:
        verified = verify_run(run, merged=merged, questions=questions, endpoint=endpoint, say=say, progress=answered)
    for piece in verify_screen(verified):
        say(piece)
    return verified.to_json() if verified.ok else Found(verified.to_json())
