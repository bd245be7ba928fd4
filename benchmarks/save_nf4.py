"""Writes a checkpoint in bitsandbytes' NF4, tensor by tensor: never more of it in memory than one file of the result.

    python benchmarks/save_nf4.py CHECKPOINT FOLDER
    python benchmarks/save_nf4.py --random KIT --size 32b FOLDER [--layers 8]

The result is what transformers' `save_pretrained` writes of a model that was loaded in 4 bits (weight, weight.absmax,
weight.quant_map, weight.nested_absmax, weight.nested_quant_map, weight.quant_state.bitsandbytes__nf4), for which it has to
hold the model. Stored so are the decoder's linears; tower, mergers, embedding and head stay in bf16, as tune.method=qlora
leaves them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmith.config.tree import Tune
from lensmith.model.components import component_of
from lensmith.model.names import read_architecture
from lensmith.model.quant import quantisation
from lensmith.model.stream import INDEX, FileShards, Shards

FILE_BYTES = 2**30
"""Of one file, after which the next one starts; a tensor is never cut."""
COPIED = ("*.json", "*.jinja", "*.txt")


class Writer:
    """Files that are written when they are full, and an index of them in the end."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._held: dict[str, Tensor] = {}
        self._places: dict[str, str] = {}
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor for the file at hand."""
        # A copy of its own: a file cannot hold two views of one memory.
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if sum(held.nbytes for held in self._held.values()) >= self._file_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the index."""
        self._flush()
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": self._places}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._held:
            file = f"model-{len(set(self._places.values())) + 1:05}.safetensors"
            save_file(self._held, str(self._folder / file), metadata={"format": "pt"})
            self._places |= dict.fromkeys(self._held, file)
            self.nbytes += sum(held.nbytes for held in self._held.values())
            self._held = {}


def is_stored_in_four_bits(name: str) -> bool:
    """Whether a parameter is the weight of one of the decoder's linears."""
    return component_of(name) == "language" and name.endswith("_proj.weight")


def save_nf4(
    architecture: Any, shards: Shards, folder: Path, device: torch.device, file_bytes: int = FILE_BYTES
) -> int:
    """Quantise on `device` and write config.json, files and index to an existing folder; returns the bytes of all weights."""
    from bitsandbytes.functional import quantize_4bit

    quant = quantisation(Tune(method="qlora"), architecture, dtype=torch.bfloat16)
    assert quant is not None, "a checkpoint in 16 bits is what this is for"
    writer = Writer(folder, file_bytes)
    for name in shards.names():
        tensor = shards.get(name).to(device, torch.bfloat16)
        if not is_stored_in_four_bits(name):
            writer.add(name, tensor)
            continue
        packed, state = quantize_4bit(
            tensor,
            blocksize=64,
            compress_statistics=quant.bnb_4bit_use_double_quant,
            quant_type=quant.bnb_4bit_quant_type,
        )
        writer.add(name, packed)
        for part, value in state.as_dict(packed=True).items():
            writer.add(f"{name}.{part}", value)
    writer.close()
    architecture.quantization_config = quant
    architecture.dtype = torch.bfloat16
    architecture.save_pretrained(folder)
    return writer.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", type=Path, metavar="KIT")
    parser.add_argument("--size", default="8b")
    parser.add_argument("--layers", type=int, help="of the decoder, where all are not needed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    architecture: Any
    if options.random:
        from random_weights import RandomShards, write_shell

        write_shell(options.random, options.size, options.folder)
        architecture = read_architecture(str(options.folder))
        architecture.text_config.num_hidden_layers = options.layers or architecture.text_config.num_hidden_layers
        shards: Shards = RandomShards(architecture, device)
    else:
        architecture, shards = read_architecture(str(options.checkpoint)), FileShards(options.checkpoint)
        for pattern in COPIED:
            for file in options.checkpoint.glob(pattern):
                if file.name != INDEX:
                    shutil.copy(file, options.folder)
    nbytes = save_nf4(architecture, shards, options.folder, device)
    print(f"{options.folder}: {nbytes / 2**30:.2f} GiB of weights", file=sys.stderr)


if __name__ == "__main__":
    main()
