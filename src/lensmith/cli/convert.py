"""`lensmith convert`: the verb alone; what it does is in lensmith.convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lensmith.cli.app import Json, app
from lensmith.console import say
from lensmith.errors import ConfigError


@app.command(epilog="Examples: lensmith convert notebook.ipynb; lensmith convert qwen3vl_lora.yaml --to run.yaml")
def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="An Unsloth or TRL script or notebook, LLaMA-Factory's YAML, or a script with swift."
        ),
    ],
    to: Annotated[Path, typer.Option(help="The file to write; one that exists is never overwritten.")] = Path(
        "run.yaml"
    ),
    tool: Annotated[
        Literal["unsloth", "trl", "llama-factory", "ms-swift"] | None,
        typer.Option("--from", help="Whose names they are, where the file does not tell."),
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Write another tool's settings as a run.yaml, and list those that have no counterpart; runs none of its code."""
    from lensmith.convert.run import convert_file
    from lensmith.convert.write import screen, to_json, write_run

    converted = convert_file(file, tool)
    for line in screen(converted):
        say(line)
    try:
        with to.open("x", encoding="utf-8") as written:
            written.write(write_run(converted, str(to)))
    except FileExistsError as cause:
        raise ConfigError(
            f"{to}: exists already and stays as it is. Write another one: lensmith convert {file} --to other.yaml"
        ) from cause
    except FileNotFoundError as cause:
        raise ConfigError(
            f"{to}: there is no folder {to.parent}. Make it, or choose another file with --to."
        ) from cause
    say(f"Wrote {to}. Read it, then: lensmith train {to}")
    return to_json(converted, str(to))
