"""`engine: unsloth`: what it asks for, what it leaves to Unsloth, and what is said where it cannot run.

Whether it trains is shown where Unsloth runs: tests/gpu/test_unsloth_gpu.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lensmith.config.read import read_config
from lensmith.errors import ConfigError
from lensmith.model.unsloth import import_unsloth


def settings(*overrides: str) -> list[str]:
    return ["model=lensmith/tiny", "data.train=rows.jsonl", "engine=unsloth", *overrides]


def test_the_ordinary_settings_of_a_run_hold_for_unsloth_too():
    config = read_config(None, settings("tune.method=qlora", "tune.vision=adapted", "memory.recompute=none"))
    assert config.engine == "unsloth"


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("task=grpo", "Set engine=lensmith"),
        ("tune.method=full", "Set engine=lensmith"),
        ("tune.merger=trained", "Set tune.merger=adapted"),
        ("memory.recompute=12", "Set it to layers"),
        ("memory.embedding=host", "Remove it, or set engine=lensmith"),
        ("memory.stream_layers=4", "Remove it, or set engine=lensmith"),
        ("pack.check_packs=3", "Remove it, or set engine=lensmith"),
    ],
)
def test_what_unsloth_does_not_do_is_an_error_with_a_way_out(override, way_out):
    with pytest.raises(ConfigError, match=way_out):
        read_config(None, settings(override))


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="says what is said without Unsloth")
def test_without_unsloth_the_sentence_says_how_to_get_it():
    with pytest.raises(ConfigError, match=r'pip install "lensmith\[unsloth\]".*or set engine=lensmith'):
        import_unsloth()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_the_sentence_says_what_runs_there(tmp_path, monkeypatch):
    # A package of that name, so that only the GPU is missing; it is never imported.
    package = tmp_path / "unsloth-2026.10.9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.10.9\n", encoding="utf-8")
    (tmp_path / "unsloth.py").write_text("raise AssertionError\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"Unsloth 2026\.10\.9 needs a GPU.*Set engine=lensmith"):
        import_unsloth()
