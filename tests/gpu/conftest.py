"""What is true of every test in this folder: it is marked `gpu`, which CI deselects, and says so where there is no GPU.

There is no part of them that a processor could run and tests/reference does not: they measure a card's own kernels, its
memory and its time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest deselects by marker."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
