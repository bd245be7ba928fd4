"""The verbs that try a model: `lensmith ask` and `lensmith serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lensmith.cli.app import Json, Subject, app
from lensmith.console import say


@app.command(
    epilog='Examples: lensmith ask runs/sft receipt.png "What is the total?"; '
    'lensmith ask runs/sft receipt.png "What is the total?" --base'
)
def ask(
    subject: Subject,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    base: Annotated[bool, typer.Option("--base", help="Also ask the model as it was before training.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    json: Json = False,
) -> dict[str, Any]:
    """Ask one question about one image; on a terminal the answer appears as it is made."""
    from lensmith.serve.ask import answer_json, ask_subject, terminal_writer

    answers = ask_subject(
        subject, image, question, with_base=base, max_new_tokens=max_tokens, say=say, on_text=terminal_writer()
    )
    return answer_json(answers)


@app.command(epilog="Examples: lensmith serve runs/sft; LENSMITH_TOKEN=secret lensmith serve runs/sft --host 0.0.0.0")
def serve(
    subject: Subject,
    host: Annotated[str, typer.Option(help="Address to listen on; all but loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LENSMITH_TOKEN", help="What callers must send as `Authorization: Bearer`; better by LENSMITH_TOKEN."
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "vllm", "transformers"], typer.Option(help="What answers; auto is vllm where it is installed.")
    ] = "auto",
    max_upload_mib: Annotated[float, typer.Option(help="Largest request, pictures and all.", min=0.01)] = 20,
    max_waiting: Annotated[int, typer.Option(help="Questions that may wait while one is answered.", min=0)] = 8,
    json: Json = False,
) -> dict[str, Any]:
    """Try a model: a page and an OpenAI-compatible endpoint on this machine, base and tuned in one process."""
    from lensmith.serve.start import bind_address, serve_subject
    from lensmith.serve.vllm import choose_engine, exec_vllm

    bind_address(host, port, token).close()  # what cannot be listened on is refused before anything is looked at
    if choose_engine(engine, subject, say) == "vllm":
        exec_vllm(subject, host=host, port=port, token=token)
    return serve_subject(
        subject, host=host, port=port, token=token, max_upload_mib=max_upload_mib, max_waiting=max_waiting, say=say
    ).to_json()
