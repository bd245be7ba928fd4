"""On a GPU: the guide's code blocks as they stand but for import lines, the model's name and a small picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lensmith
from lensmith.model.engine import find_engine
from lensmith.rundir import RunDir

GUIDE = Path(__file__).parents[1] / "fixtures" / "guide.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_guide_runs_as_written_in_bf16_with_inputs_offloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Image.new("RGB", (64, 64), "teal").save("path/to/chart.png")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    code = [
        re.sub(r"^from (unsloth|trl|datasets) import", "from lensmith import", block, flags=re.M) for block in blocks
    ]
    names: dict[str, Any] = {"extract_boxed_answer": lensmith.extract_boxed_answer}
    for block in code[:3]:
        exec(block.replace("unsloth/Qwen3-VL-7B", "lensmith/tiny"), names)
    names["train_dataset"] = names["create_vlm_dataset"]()
    exec(code[3], names)
    exec(code[4], names)
    names["trainer"].train()
    engine = find_engine(names["model"])
    assert (engine.place.type, engine.dtype) == ("cuda", torch.bfloat16)
    assert engine.host_buffers is not None
    for run, steps in (("qwen3vl_finetuned", 3), ("qwen3vl_grpo", 3)):
        assert len(RunDir(run).read_metrics()) == steps
