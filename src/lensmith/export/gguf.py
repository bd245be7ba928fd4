"""Language model and image tower as GGUF files, through llama.cpp's own converter, read back before they are believed.

The converter is a script in llama.cpp's source tree and follows the models as llama.cpp learns them, so it is not copied
here but run from where the user has it. It works from a merged model, which is made beside the result and removed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lensmith.errors import ConfigError, RunError
from lensmith.export.base import open_base
from lensmith.export.card import Recorded, read_record, write_card
from lensmith.export.gguf_ask import PROGRAM, ask_picture
from lensmith.export.gguf_check import CheckedFile, check_language, check_projector
from lensmith.export.merge import Into, Merged, Progress, merge_run
from lensmith.export.ollama import write_modelfile
from lensmith.export.vllm import image_limits, longest_prompt
from lensmith.export.whole import check_replaceable, check_space, write_record, written_whole
from lensmith.model.load import load_processor
from lensmith.rundir import RunDir

SCRIPT = "convert_hf_to_gguf.py"
LLAMA_CPP = "LLAMA_CPP"
"""Environment variable with the folder of llama.cpp."""
BY_CONVERTER = ("f32", "f16", "bf16", "q8_0")
BY_QUANTIZE = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q5_0", "q4_0")
QUANTIZE_FROM = "f16"
PROJECTOR_TYPE = "f16"
"""The tower is small, and loses the most from fewer bits."""
SHOWN_LINES = 12

WAY_OUT = (
    "Clone https://github.com/ggml-org/llama.cpp and give its folder with --llama-cpp or in the variable LLAMA_CPP; "
    "its converter also needs `pip install sentencepiece`."
)


@dataclass(frozen=True, slots=True)
class Converted:
    """GGUF files that were read back."""

    folder: Path
    files: tuple[CheckedFile, ...]
    projector: CheckedFile
    merged: Merged
    command: str
    """llama.cpp's server with the run's image limits."""
    asked: str | None
    """What came of a picture given to llama.cpp; None where its program for that is not here."""

    def sentences(self) -> list[str]:
        return [
            *self.merged.sentences(),
            *(file.sentence for file in (*self.files, self.projector)),
            self.asked or f"No picture was given to llama.cpp, whose {PROGRAM} is not here.",
            f"Serve it: cd {self.folder} && {self.command}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [asdict(file) for file in self.files],
            "projector": asdict(self.projector),
            "command": self.command,
            "asked": self.asked,
            "merged": self.merged.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Tools:
    """What of llama.cpp is here."""

    converter: Path
    quantize: Path | None
    """llama-quantize, for the types that the converter cannot write."""
    ask: Path | None
    """llama-mtmd-cli, for one picture at the end."""


def find_tools(llama_cpp: Path | None, quants: Sequence[str]) -> Tools:
    """The converter in `llama_cpp`, else in $LLAMA_CPP.

    Raises:
        ConfigError: a type that neither program writes.
        RunError: a program or the gguf package that is needed is not here.
    """
    if unknown := [quant for quant in quants if quant not in (*BY_CONVERTER, *BY_QUANTIZE)]:
        raise ConfigError(
            f"--quant {unknown[0]}: not a type of GGUF file known here. Use one of {', '.join(BY_CONVERTER)}, "
            f"or through llama-quantize {', '.join(BY_QUANTIZE)}."
        )
    if importlib.util.find_spec("gguf") is None:
        raise RunError("GGUF files cannot be read back: the package gguf is missing. pip install 'lensmith[gguf]'")
    folder = llama_cpp or (Path(os.environ[LLAMA_CPP]) if os.environ.get(LLAMA_CPP) else None)
    converter = folder.expanduser() / SCRIPT if folder else None
    if converter is None or not converter.is_file():
        where = f"{converter} is not there" if converter else "no folder of llama.cpp is named"
        raise RunError(f"GGUF files are made by llama.cpp's {SCRIPT}, and {where}. {WAY_OUT}")
    quantize = _find_program(folder, "llama-quantize")
    if quantize is None and (needs := [quant for quant in quants if quant in BY_QUANTIZE]):
        raise RunError(
            f"--quant {needs[0]}: needs llama-quantize, which is neither in {folder or 'a folder of llama.cpp'} nor on "
            "PATH. Build it (cmake -B build && cmake --build build --target llama-quantize), or use --quant q8_0."
        )
    return Tools(converter.resolve(), quantize, _find_program(folder, PROGRAM))


def _find_program(folder: Path | None, name: str) -> Path | None:
    """Where llama.cpp's build puts it, else on PATH."""
    places = [folder / "build" / "bin", folder / "bin", folder] if folder else []
    name = f"{name}.exe" if os.name == "nt" else name
    found = next((place / name for place in places if (place / name).is_file()), None) or shutil.which(name)
    return Path(found).resolve() if found else None


def export_gguf(
    run: RunDir,
    tuned: Path,
    out: Path,
    *,
    quants: Sequence[str] = ("q8_0",),
    llama_cpp: Path | None = None,
    into: Into = "base",
    progress: Progress | None = None,
) -> Converted:
    """One GGUF file per type in `quants`, one for the image tower, Modelfile and README.md, whole in `out`.

    Raises:
        ConfigError, RunError: as `find_tools`; the converter failed; a file does not hold what was merged.
    """
    check_replaceable(out)
    quants = list(dict.fromkeys(quant.lower() for quant in quants))
    tools = find_tools(llama_cpp, quants)
    recorded = read_record(run, tuned)
    # In 16 bits at most: the merged model, each file, the one that llama-quantize starts from, the tower.
    check_space(out, (len(quants) + 3) * sum(entry.nbytes for entry in open_base(run, recorded.config).entries))
    name = re.sub(r"[^\w.-]+", "-", recorded.name)
    with written_whole(out) as folder:
        model = folder / ".merged"
        merged = merge_run(run, tuned, model, into=into, progress=progress)
        projector = folder / f"mmproj-{name}-{PROJECTOR_TYPE}.gguf"
        _convert(tools, model, projector, PROJECTOR_TYPE, name, "--mmproj")
        files = [_write_type(tools, model, folder / f"{name}-{quant}.gguf", quant, name) for quant in quants]
        (folder / f".{QUANTIZE_FROM}.gguf").unlink(missing_ok=True)
        checked = tuple(check_language(file, model) for file in files)
        tower = check_projector(projector, model)
        limits = _image_options(recorded)
        asked = None if tools.ask is None else ask_picture(tools.ask, files[0], projector, limits)
        command = _serve_command(recorded, files[0].name, projector.name, limits)
        write_modelfile(folder, recorded.config, load_processor(str(model)), (files[0].name, projector.name))
        shutil.rmtree(model)
        converted = Converted(out, checked, tower, merged, command, asked)
        write_card(folder, recorded, library="gguf", use=f"```sh\n{command}\n```", notes=merged.sentences()[1:])
        write_record(folder, {"to": "gguf"} | converted.to_json())
    return converted


def _write_type(tools: Tools, model: Path, file: Path, quant: str, name: str) -> Path:
    if quant in BY_CONVERTER:
        _convert(tools, model, file, quant, name)
        return file
    source = file.parent / f".{QUANTIZE_FROM}.gguf"
    if not source.is_file():
        _convert(tools, model, source, QUANTIZE_FROM, name)
    assert tools.quantize is not None, "find_tools refuses such a type without llama-quantize"
    _run([str(tools.quantize), str(source), str(file), quant.upper()], "llama-quantize")
    return file


def _convert(tools: Tools, model: Path, to: Path, quant: str, name: str, *more: str) -> None:
    command = [sys.executable, str(tools.converter), str(model), "--outfile", str(to), "--outtype", quant]
    _run([*command, "--model-name", name, *more], SCRIPT)
    if not to.is_file():
        raise RunError(
            f"{SCRIPT}: ended well and wrote no {to.name}. Its version may be too old for Qwen3-VL: update it."
        )


def _run(command: list[str], name: str) -> None:
    """Raises RunError with the end of what the program said, where it failed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        said = "\n".join(line for line in done.stdout.splitlines() if line.strip())
        said = "\n".join(said.splitlines()[-SHOWN_LINES:])
        raise RunError(
            f"{name}: ended with exit code {done.returncode}, and nothing was exported. Its last lines:\n{said}\n"
            f"{_hint(said)}"
        )


def _hint(said: str) -> str:
    if missing := re.search(r"No module named '([\w.]+)'", said):
        return f"Install what it lacks: pip install {missing[1]}"
    if "pre-tokenizer was not recognized" in said or "get_vocab_base_pre" in said:
        return (
            "It knows tokenizers by a checksum, and not this one: it converts the Qwen3-VL releases, not lensmith/tiny."
        )
    return "Update llama.cpp (git pull), or report it there if its newest version fails too."


def _image_options(recorded: Recorded) -> list[str]:
    """llama.cpp counts tokens where the processor counts pixels; a GGUF file holds neither limit."""
    limits, most = image_limits(recorded.config), recorded.config.data.image.max_tokens
    least = limits["shortest_edge"] * most // limits["longest_edge"]
    return ["--image-min-tokens", str(least), "--image-max-tokens", str(most)]


def _serve_command(recorded: Recorded, model: str, projector: str, limits: list[str]) -> str:
    command = [
        "llama-server",
        "-m",
        model,
        "--mmproj",
        projector,
        "--jinja",
        "-c",
        str(longest_prompt(recorded.config)),
    ]
    return shlex.join([*command, *limits])
