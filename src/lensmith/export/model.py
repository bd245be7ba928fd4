"""A merged model with everything that others need to use it: card and Modelfile."""

from __future__ import annotations

from pathlib import Path

from lensmith.export.card import read_record, write_card
from lensmith.export.merge import Into, Merged, Progress, merge_run
from lensmith.export.ollama import write_modelfile
from lensmith.model.load import load_processor
from lensmith.rundir import RunDir

USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto", device_map="auto")  # this folder
processor = AutoProcessor.from_pretrained(".")  # with the image limits of training
```

Ollama: `ollama create NAME -f Modelfile --quantize q4_K_M`"""


def export_merged(
    run: RunDir, tuned: Path, out: Path, *, into: Into = "base", progress: Progress | None = None
) -> Merged:
    """As `merge_run`, with README.md and a Modelfile."""
    recorded = read_record(run, tuned)

    def finish(folder: Path, merged: Merged) -> None:
        write_card(folder, recorded, library="transformers", use=USE, notes=merged.sentences()[1:])
        write_modelfile(folder, recorded.config, load_processor(str(folder)), ["."])

    return merge_run(run, tuned, out, into=into, progress=progress, finish=finish)
