"""A run that runs out of GPU memory goes on, says so, and ends at the weights it would have had.

There is no GPU here to fill, so hooks on the real model raise torch's own OutOfMemoryError for packs of a chosen size;
everything else is the real run. float64, so that another order of sums shows as rounding and nothing else does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lensmith.config.read import read_config
from lensmith.errors import RunError
from lensmith.rundir import RunDir
from lensmith.screens import run_screen
from lensmith.train.oom import MemoryGuard, Shortage
from lensmith.train.prepare import prepare_run
from lensmith.train.sft import train_prepared
from lensmith.types import Pack

pytestmark = pytest.mark.usefixtures("float64_modules")

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
STEPS, SAMPLES = 3, 6

Fails = Callable[[Any, Pack], bool]
"""Whether this pack runs out of memory, for the engine as it is."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of unequal lengths: two questions about each of nine pictures, and some about none."""
    folder = tmp_path_factory.mktemp("oom")
    lines = []
    for number in range(18):
        colour = COLOURS[number % len(COLOURS)]
        row = {"question": "Which colour is it? " * (1 + number % 4), "answer": f"It is {colour}. " * (1 + number % 3)}
        if number % 3:
            picture = folder / f"{number // 2}.png"
            Image.new("RGB", (64 + 32 * (number % 3), 64), colour).save(picture)
            row["image"] = picture.name
        lines.append(json.dumps(row))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class Run:
    """One training run, out of memory wherever `fails` says, in the forward pass or amid the backward pass."""

    def __init__(self, rows: Path, folder: Path, fails: Fails, *settings: str, backward: bool = False) -> None:
        asked = [
            f"run={folder}",
            f"data.train={rows}",
            "data.columns.image=image",
            "data.test=null",
            "pack.check_packs=0",
        ]
        asked += [f"optim.steps={STEPS}", f"optim.effective_samples={SAMPLES}", *settings]
        self.said: list[str] = []
        self.tried: list[int] = []
        self.prepared = prepare_run(read_config(None, asked), lambda told: self.said.append(str(told)))
        self.engine: Any = self.prepared.loaded.model
        self.prepared.model.double()
        self.fails, self.backward, self.running = fails, backward, None
        self.engine.register_forward_pre_hook(self._before, with_kwargs=True)
        middle = next(p for n, p in self.engine.named_parameters() if p.requires_grad and "layers.1." in n)
        middle.register_post_accumulate_grad_hook(self._amid)

    def _before(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self.running = keywords["pack"]
        self.tried.append(self.running.num_tokens)
        if not self.backward:
            self._amid()

    def _amid(self, _parameter: Any = None) -> None:
        if self.running is not None and self.fails(self.engine, self.running):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def train(self) -> dict[str, torch.Tensor]:
        train_prepared(self.prepared, say=self.said.append)
        return {n: p.detach() for n, p in self.prepared.model.named_parameters() if p.requires_grad}

    def told(self, beginning: str) -> list[str]:
        return [sentence for sentence in self.said if sentence.startswith(beginning)]


def over(limit: int) -> Fails:
    return lambda _engine, pack: pack.num_tokens > limit


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory, float64_modules) -> dict[str, torch.Tensor]:
    return Run(rows, tmp_path_factory.mktemp("undisturbed") / "run", lambda *_: False).train()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(value.abs().max() > 1e-4 for name, value in theirs.items() if "lora_B" in name), "nothing was learned"
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_in_smaller_packs_ends_at_the_same_weights(rows, tmp_path, undisturbed, backward):
    run = Run(rows, tmp_path / "run", over(150), backward=backward)
    assert_same(run.train(), undisturbed)
    assert len(run.told("Step 1: GPU memory ran out in a pack of")) >= 1
    assert "The step is taken again with that pack in two: the same gradient." in run.told("Step 1")[0]
    assert max(run.tried[-2:]) <= 150


def test_two_short_steps_in_a_row_make_packs_smaller_for_good(rows, tmp_path, undisturbed):
    run = Run(rows, tmp_path / "run", over(150))
    assert_same(run.train(), undisturbed)
    (lowered,) = run.told("GPU memory ran out in two steps in a row")
    lines = run.prepared.run.read_oom()
    assert {line["step"] for line in lines} == {1, 2}, "the third step comes in smaller packs"
    budget = lines[-1]["budget_after_tokens"]
    assert f"packs hold at most {budget:,} tokens instead of 2,048" in lowered
    assert f"pack.tokens={budget}" in lowered
    assert budget <= 150
    assert (lines[0]["budget_before_tokens"], lines[0]["budget_after_tokens"]) == (2048, 2048)
    assert all(line["remedy"] == "split" and line["tokens"] > 150 for line in lines)
    assert all(line["largest_row"] in line["rows"] and line["largest_row"].startswith("rows.jsonl:") for line in lines)
    shown = "\n".join(run_screen(RunDir.open(run.prepared.run.path)))
    assert f"GPU memory ran out {len(lines)} times, last in step 2; packs hold at most {budget:,} tokens since" in shown


def test_one_short_step_lowers_nothing(rows, tmp_path):
    first: list[int] = []

    def once(_engine: Any, pack: Pack) -> bool:
        first.append(pack.num_tokens)
        return len(first) == 1

    run = Run(rows, tmp_path / "run", once)
    run.train()
    assert len(run.told("Step 1: GPU memory ran out")) == 1
    assert not run.told("GPU memory ran out in two steps")
    assert len(run.prepared.run.read_oom()) == 1


def test_a_resumed_run_begins_with_the_smaller_packs(rows, tmp_path, undisturbed):
    Run(rows, tmp_path / "run", over(150), "save.every_steps=2").train()
    (tmp_path / "run" / "checkpoints" / "step-000003").rename(tmp_path / "lost")
    again = Run(rows, tmp_path / "run", over(150), "save.every_steps=2")
    assert_same(again.train(), undisturbed)
    assert again.told("Packs hold at most")
    assert "because GPU memory ran out before; to try larger ones again, remove" in again.told("Packs hold at most")[0]
    assert max(again.tried) <= 150


def test_a_sample_too_large_alone_gets_every_saving_first(rows, tmp_path, undisturbed):
    run = Run(rows, tmp_path / "run", lambda engine, _: engine.host_buffers is None, "memory.recompute=none")
    assert_same(run.train(), undisturbed)
    (told,) = [sentence for sentence in run.said if "From now on every layer is recomputed" in sentence]
    assert "memory.recompute=layers and memory.offload=inputs" in told
    assert run.engine.recompute == "layers"
    assert [line["remedy"] for line in run.prepared.run.read_oom()].count("recompute") == 1


def test_a_sample_that_never_fits_ends_the_run_with_its_name(rows, tmp_path):
    run = Run(rows, tmp_path / "run", lambda *_: True)
    with pytest.raises(
        RunError, match=r"rows\.jsonl:\d+: step 1: GPU memory ran out in this row alone.*Lower data\.image"
    ):
        run.train()
    lines = run.prepared.run.read_oom()
    assert [line["remedy"] for line in lines][-2:] == ["recompute", "too_large"]
    assert lines[-1]["tokens"] == lines[-1]["largest_tokens"]


def test_weights_that_have_moved_end_the_run(rows, tmp_path):
    run = Run(rows, tmp_path / "run", over(150))
    memory = MemoryGuard(run.engine, run.prepared.run, run.said.append, budget_tokens=2048, in_backward=True)
    packs = run.prepared.dataset[0].packs

    def fail(_pack: Pack) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(
        RunError, match=r"optim\.in_backward=true some weights had moved .*Lower optim\.effective_samples"
    ):
        memory.take_step(1, packs, fail, lambda: None)


def test_other_errors_are_not_taken_for_this_one(rows, tmp_path):
    run = Run(rows, tmp_path / "run", over(150))
    memory = MemoryGuard(run.engine, run.prepared.run, run.said.append, budget_tokens=2048)

    def fail(_pack: Pack) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory.take_step(1, run.prepared.dataset[0].packs, fail, lambda: None)


def test_sentences_say_how_much_was_free():
    shortage = Shortage(
        step=12, rank=0, rows=("a.jsonl:3", "a.jsonl:9"), tokens=8190, learned_tokens=60, patches=20000,
        largest_row="a.jsonl:9", largest_tokens=6100, remedy="split", budget_before_tokens=8192,
        budget_after_tokens=8192, reserved_gib=22.9, free_gib=0.25, total_gib=23.64,
    )  # fmt: skip
    assert shortage.sentence() == (
        "Step 12: GPU memory ran out (0.2 of 23.6 GiB were free) in a pack of 8,190 tokens and 2 samples, the largest "
        "a.jsonl:9 with 6,100 tokens. The step is taken again with that pack in two: the same gradient."
    )
    alone = replace(shortage, remedy="too_large", rows=("a.jsonl:9",), tokens=6100)
    assert "a.jsonl:9: step 12: GPU memory ran out (0.2 of 23.6 GiB were free) in this row alone" in alone.sentence()
    assert "6,100 tokens" in alone.sentence()


RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {folder!r})
from test_oom import Run
from lensmith.train.ranks import rank

fails = lambda engine, pack: rank() == 1 and pack.num_tokens > 80
run = Run(Path({rows!r}), Path({run!r}), fails, backward=True)
tuned = run.train()
if rank() == 0:
    print("\\n".join(run.said), file=sys.stderr)
    torch.save(tuned, {out!r})
"""


@pytest.mark.slow
def test_one_process_of_two_running_out_makes_both_take_the_step_again(rows, tmp_path, undisturbed):
    """Slow because three Python processes import torch. Both would wait for ever if they did not agree."""
    script, out = tmp_path / "ranks.py", tmp_path / "tuned.pt"
    here = str(Path(__file__).parent)
    script.write_text(
        textwrap.dedent(RANKS).format(folder=here, rows=str(rows), run=str(tmp_path / "run"), out=str(out))
    )
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"Step \d: GPU memory ran out in a pack of", done.stderr)
    lines = RunDir.open(tmp_path / "run").read_oom()
    assert {line["rank"] for line in lines} == {1}
    tuned = torch.load(out)
    for name, value in undisturbed.items():
        torch.testing.assert_close(tuned[name], value, rtol=1e-4, atol=1e-6)
