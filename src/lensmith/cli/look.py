"""The verbs that show what is: config, show and env."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lensmith.cli.app import Json, Overrides, app, read_settings
from lensmith.console import say

if TYPE_CHECKING:
    pass


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
        say(settings_table())
        rows = [(s, write_default(s.path)) for s in list_settings()]
        return {
            "settings": [
                {"path": s.path, "accepts": s.allowed, "default": default, "meaning": s.doc} for s, default in rows
            ]
        }
    config = read_settings(source, overrides or ())
    say(dump_config(config).rstrip())
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
        say(line)
    return describe_run(opened)


@app.command(epilog="Example: lensmith env")
def env(json: Json = False) -> dict[str, Any]:
    """Print versions, GPU and what runs on it and why; for bug reports."""
    from lensmith.config.write import write_value
    from lensmith.model.versions import environment

    found = environment()
    for name, value in found.items():
        say(f"{name}: {write_value(value)}")
    return found
