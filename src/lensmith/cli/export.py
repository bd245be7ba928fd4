"""`lensmith export`: the verb alone; what it does is in lensmith.export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lensmith.cli.app import Json, app
from lensmith.console import say


@app.command(
    epilog="Examples: lensmith export runs/sft --to merged; lensmith export runs/sft --to gguf --quant q4_k_m "
    "--llama-cpp ~/llama.cpp"
)
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    to: Annotated[
        Literal["adapter", "merged", "gguf", "vllm"],
        typer.Option(help="PEFT's adapter; a whole model; files for llama.cpp; a folder that vLLM serves."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default export/ in the run folder, by kind.")
    ] = None,
    merge_into: Annotated[
        Literal["base", "nf4-dequantised"],
        typer.Option(help="After qlora: into the full-precision base, or into what NF4 left of it."),
    ] = "base",
    lora: Annotated[bool, typer.Option("--lora", help="For vllm: the adapter beside its base, not merged.")] = False,
    quant: Annotated[
        list[str] | None, typer.Option(help="For gguf: f16, bf16, q8_0, q4_k_m and so on; may be repeated. [q8_0]")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="For gguf: the folder of llama.cpp; by default the variable LLAMA_CPP.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to the Hub, as a private repository.")
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Write what others load: an adapter, a merged model, GGUF files or a folder for vLLM, with a model card."""
    from lensmith.export.run import Asked, export_run
    from lensmith.train.progress import CountProgress

    asked = Asked(to, out, merge_into, lora, tuple(quant or ()), llama_cpp, push)
    with CountProgress("merging") as merged:
        return export_run(run, asked, say=say, progress=merged)
