"""`lensmith export` without the terminal: which weights, which kind, where to, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lensmith.errors import ConfigError
from lensmith.export.hub import check_token, push_folder
from lensmith.export.merge import Into, Progress
from lensmith.model.adapters import TUNED_FOLDER, find_tuned
from lensmith.rundir import RunDir, find_run
from lensmith.train.prepare import Say

Kind = Literal["adapter", "merged", "gguf", "vllm"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for; each option goes with some kinds only."""

    to: Kind
    out: Path | None = None
    into: Into = "base"
    lora: bool = False
    quants: tuple[str, ...] = ()
    llama_cpp: Path | None = None
    push: str | None = None

    def check(self) -> None:
        """Raises ConfigError for an option that would have no effect."""
        idle = {
            "--lora": self.lora and self.to != "vllm",
            "--quant": bool(self.quants) and self.to != "gguf",
            "--llama-cpp": self.llama_cpp is not None and self.to != "gguf",
            "--merge-into": self.into != "base" and (self.to == "adapter" or self.lora),
        }
        if without := next((option for option, unused in idle.items() if unused), None):
            merges = "--lora merges nothing" if self.lora and self.to == "vllm" else f"--to {self.to} does not use it"
            raise ConfigError(f"{without}: has no effect here, because {merges}. Leave it out, or choose another --to.")


def export_run(subject: str, asked: Asked, *, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Export a run or one of its checkpoints; returns what `--json` prints.

    Raises LensmithError children for whatever the user can mend; then nothing half is left.
    """
    asked.check()
    run, tuned = find_run(subject)
    RunDir.open(run.path)
    source, out = find_tuned(tuned), asked.out or run.path / "export" / asked.to
    if asked.push is not None:
        check_token(asked.push)
    for sentence in _which(run, tuned, source):
        say(sentence)
    made = _make(run, source, out, asked, progress)
    for sentence in made.sentences():
        say(sentence)
    say(f"Wrote {out}. How to use it: {out / 'README.md'}")
    result = {"to": asked.to, "folder": str(out)} | made.to_json()
    if asked.push is not None:
        result["pushed"] = push_folder(out, asked.push)
        say(f"Pushed to {result['pushed']}.")
    return result


def _make(run: RunDir, source: Path, out: Path, asked: Asked, progress: Progress | None) -> Any:
    if asked.to == "adapter":
        from lensmith.export.adapter import export_adapter

        return export_adapter(run, source, out)
    if asked.to == "vllm":
        from lensmith.export.vllm import export_vllm

        return export_vllm(run, source, out, lora=asked.lora, into=asked.into, progress=progress)
    if asked.to == "gguf":
        from lensmith.export.gguf import export_gguf

        more = {"quants": asked.quants} if asked.quants else {}
        return export_gguf(run, source, out, llama_cpp=asked.llama_cpp, into=asked.into, progress=progress, **more)
    from lensmith.export.model import export_merged

    return export_merged(run, source, out, into=asked.into, progress=progress)


def _which(run: RunDir, tuned: Path, source: Path) -> list[str]:
    """Whose weights these are, where a run has several to choose from."""
    place = source.parent if source.name == TUNED_FOLDER else source
    sentences = [f"Exporting {'the end of ' if place == run.path else ''}{place}."]
    best = run.read_best()
    if tuned == run.path and best is not None and run.checkpoint_path(best["step"]) != place:
        path = run.checkpoint_path(best["step"])
        sentences.append(f"The run's best checkpoint is {path}; for that one give it instead of the run folder.")
    return sentences
