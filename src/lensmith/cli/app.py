"""What all verbs share: how they are called, what they print, and the exit code.

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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lensmith.errors import Interrupted, LensmithError

if TYPE_CHECKING:
    from lensmith.config.tree import RunConfig

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


def read_settings(source: str, overrides: Sequence[str]) -> RunConfig:
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
