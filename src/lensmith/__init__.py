"""Fine-tune Qwen3-VL on the GPU you have: images and answers in, a verified model out.

The public names load on first use, so that `import lensmith` costs nothing.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "Dataset": "lensmith.recipe.dataset",
    "FastVisionModel": "lensmith.recipe.model",
    "GRPOConfig": "lensmith.recipe.arguments",
    "GRPOTrainer": "lensmith.recipe.trainer",
    "LensmithError": "lensmith.errors",
    "RunConfig": "lensmith.config.tree",
    "RunDir": "lensmith.rundir",
    "SFTConfig": "lensmith.recipe.arguments",
    "SFTTrainer": "lensmith.recipe.trainer",
    "Sample": "lensmith.types",
    "UnslothVisionDataCollator": "lensmith.recipe.collator",
    "VisionDataCollator": "lensmith.recipe.collator",
    "encode_sample": "lensmith.data.encode",
    "evaluate_model": "lensmith.evals.predict",
    "extract_boxed_answer": "lensmith.train.rewards",
    "load_model": "lensmith.model.load",
    "pack_samples": "lensmith.data.pack",
    "read_config": "lensmith.config.read",
    "read_samples": "lensmith.data.source",
    "train_model": "lensmith.train.sft",
}
"""Public name -> the module it lives in."""

__all__ = list(HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  (resolved below; a test imports each)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'lensmith' has no attribute '{name}'; it has {', '.join(HOMES)}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
