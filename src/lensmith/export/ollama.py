"""A Modelfile for Ollama, next to a merged model or to GGUF files.

Ollama runs Qwen3-VL in an engine of its own, whose GGUF files hold decoder and tower together; those of llama.cpp, in two
files, are refused or answer without the picture (ollama/ollama issues 12897 and 14575). It makes its own from a merged
model's safetensors, quantised on the way, and so that is where the Modelfile that works is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lensmith.config.tree import RunConfig
from lensmith.export.vllm import longest_prompt

TEMPLATE = '''TEMPLATE """{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""'''
"""Turns as Qwen3-VL's chat_template.jinja writes them, without tools."""
TURN_END = "<|im_end|>"


def write_modelfile(folder: Path, config: RunConfig, processor: Any, sources: Sequence[str]) -> None:
    """`sources`: what to make the model from, relative to `folder`: `.` for a merged model, or GGUF file and projector."""
    lines = ["# ollama create NAME -f Modelfile"]
    if list(sources) == ["."]:
        lines = ["# ollama create NAME -f Modelfile --quantize q4_K_M      (or without --quantize, for 16 bits)"]
    else:
        lines += [
            "# Ollama's engine for Qwen3-VL reads files of its own, not llama.cpp's pair. If it refuses these or answers",
            "# without the picture, export with --to merged and use the Modelfile there.",
        ]
    lines += [f"FROM {source if source == '.' else f'./{source}'}" for source in sources]
    if TURN_END in (processor.chat_template or ""):
        lines += [TEMPLATE, f'PARAMETER stop "{TURN_END}"']
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {longest_prompt(config)}"]
    lines += ["# Ollama resizes pictures by its own limits; data.image of the run cannot be set here."]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
