"""A folder from which vLLM serves the run with the pictures, the template and the lengths of training.

Image limits are given twice: in the processor's files, and on the command line, the only place for them where an adapter is
served beside its base. There they are called `size`, because transformers takes min_pixels and max_pixels away; `size` would
reach videos too, which have limits of their own, so videos are turned off.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.config.tree import PACK_TOKENS, RunConfig
from lensmith.data.encode import Encoder
from lensmith.errors import ConfigError
from lensmith.export.adapter import Adapter, export_adapter, vllm_rank
from lensmith.export.card import read_record, write_card
from lensmith.export.merge import Into, Merged, Progress, merge_run
from lensmith.export.whole import check_replaceable, write_record, written_whole
from lensmith.model.load import load_processor
from lensmith.model.names import TINY, read_architecture, resolve_model
from lensmith.rundir import RunDir

MODEL, ADAPTER, TEMPLATE = "model", "adapter", "chat_template.jinja"
IMAGES_PER_PROMPT = 4
"""What a server lets one request hold; a run does not record how many its rows had."""
PORT = 8000

CLIENT = '''"""Ask the served model about a picture: python client.py picture.png "What is the total?"

Needs `pip install openai` and the server that serve.sh starts.
"""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI

picture, question = Path(sys.argv[1]), sys.argv[2]
kind = mimetypes.guess_type(picture.name)[0] or "image/png"
data = base64.b64encode(picture.read_bytes()).decode()
answer = OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none").chat.completions.create(
    model={name!r},
    messages=[
        {{
            "role": "user",
            "content": [
                {{"type": "image_url", "image_url": {{"url": f"data:{{kind}};base64,{{data}}"}}}},
                {{"type": "text", "text": question}},
            ],
        }}
    ],
    temperature=0,
    max_tokens={max_tokens},
)
print(answer.choices[0].message.content)
'''

USE = """```sh
sh serve.sh
python client.py picture.png 'What is in it?'
```

The command is:

```sh
{command}
```

For videos take --mm-processor-kwargs and --limit-mm-per-prompt out of it."""


@dataclass(frozen=True, slots=True)
class Served:
    """A folder for vLLM."""

    folder: Path
    name: str
    """What requests call the model."""
    command: tuple[str, ...]
    """To be run inside the folder."""
    weights: Merged | Adapter

    def sentences(self) -> list[str]:
        return [
            *self.weights.sentences(),
            f"Serve it: cd {self.folder} && sh serve.sh",
            f"  {shlex.join(self.command)}",
        ]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "command": list(self.command), "weights": self.weights.to_json()}


def export_vllm(
    run: RunDir, tuned: Path, out: Path, *, lora: bool, into: Into = "base", progress: Progress | None = None
) -> Served:
    """Weights, serve.sh, client.py and README.md, whole in `out`; `lora` leaves the base whole and adds the adapter to it.

    Raises:
        ConfigError: vLLM cannot serve this adapter.
        ModelError, RunError: as `merge_run` and `export_adapter`.
    """
    check_replaceable(out)
    config = run.read_config()
    recorded = read_record(run, tuned)
    with written_whole(out) as folder:
        weights: Merged | Adapter
        if lora:
            weights = export_adapter(run, tuned, folder / ADAPTER)
            _check_servable(weights)
        else:
            weights = merge_run(run, tuned, folder / MODEL, into=into, progress=progress)
        inner = folder / (ADAPTER if lora else MODEL)
        shutil.copyfile(inner / TEMPLATE, folder / TEMPLATE)
        command = serve_command(config, recorded.name, weights)
        script = "#!/bin/sh\n# vLLM with the image limits, the template and the lengths of training.\nset -e\n"
        script += f'cd "$(dirname "$0")"\nexec {shlex.join(command)} "$@"\n'
        (folder / "serve.sh").write_text(script, encoding="utf-8")
        client = CLIENT.format(port=PORT, name=recorded.name, max_tokens=config.eval.max_new_tokens)
        (folder / "client.py").write_text(client, encoding="utf-8")
        served = Served(out, recorded.name, tuple(command), weights)
        use = USE.format(command=shlex.join(command))
        write_card(folder, recorded, library="vllm", use=use, notes=weights.sentences()[1:])
        write_record(folder, {"to": "vllm"} | served.to_json())
    return served


def _check_servable(adapter: Adapter) -> None:
    if not adapter.servable:
        raise ConfigError(f"--lora: vLLM cannot serve this adapter beside its base. {' '.join(adapter.notes)}")


def serve_command(config: RunConfig, name: str, weights: Merged | Adapter) -> list[str]:
    """`vllm serve` with what training fixed; paths are relative to the exported folder."""
    command = ["vllm", "serve"]
    if isinstance(weights, Adapter):
        base = resolve_model(config.model) if config.model == TINY else config.model
        command += [base, "--enable-lora", "--lora-modules", f"{name}=./{ADAPTER}"]
        command += ["--max-lora-rank", str(vllm_rank(weights.rank))]
        command += ["--enable-tower-connector-lora"] if weights.tower else []
    else:
        command += [f"./{MODEL}", "--served-model-name", name]
    return [
        *command,
        *("--chat-template", f"./{TEMPLATE}"),
        *("--max-model-len", str(longest_prompt(config))),
        *("--limit-mm-per-prompt", json.dumps({"image": IMAGES_PER_PROMPT, "video": 0})),
        *("--mm-processor-kwargs", json.dumps({"size": image_limits(config)})),
        *("--host", "127.0.0.1", "--port", str(PORT)),
    ]


def image_limits(config: RunConfig) -> dict[str, int]:
    """Smallest and largest area of a picture after resizing, in pixels, by the names that the processor has for them."""
    encoder = Encoder.from_processor(load_processor(config.model), config.data.image, config.data.video)
    area = encoder.geometry.token_px**2
    return {"shortest_edge": encoder.min_tokens * area, "longest_edge": encoder.max_tokens * area}


def longest_prompt(config: RunConfig) -> int:
    """Tokens of question and answer together: no row of training was longer than a pack, and no model goes further."""
    architecture: Any = read_architecture(config.model)
    seen = config.pack.tokens or PACK_TOKENS["cuda"]
    wanted = max(seen, IMAGES_PER_PROMPT * config.data.image.max_tokens + config.eval.max_new_tokens)
    return min(wanted, architecture.text_config.max_position_embeddings)
