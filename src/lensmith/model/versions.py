"""Which versions Lensmith was tested with, which are installed, and what runs on this machine because of it.

The ranges are written once, in pyproject.toml, and read back from the installed package; torch and torchvision are
compared by what torchvision itself says it needs. Nothing here imports torch until `environment` is asked.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lensmith.errors import ModelError

if TYPE_CHECKING:
    import torch

CHECKED = ("torch", "torchvision", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
"""The libraries whose insides we touch; a version outside the tested range can train wrongly without an error."""

REPORTED = (*CHECKED, "liger-kernel", "huggingface-hub", "numpy", "pillow", "pydantic")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Misfit:
    """One library that is not as required."""

    name: str
    installed: str | None
    """Null: not installed."""
    requirement: str
    """As pip reads it: `transformers<5.24,>=5.17`."""


def check_versions() -> None:
    """Raises ModelError, with the pip line that mends it, if a library is outside the range the tests ran with.

    Without an installed `lensmith` distribution (its source folder on PYTHONPATH) there is nothing to compare with;
    `environment` says so.
    """
    if (requirements := own_requirements()) is None:
        return
    misfits = find_misfits(requirements, installed_versions(CHECKED))
    if not misfits:
        misfits = find_misfits(_torchvision_requirements(), installed_versions(["torch"]))
        if misfits:
            raise ModelError(_pair_sentence(misfits[0], requirements))
    if misfits:
        raise ModelError(_range_sentence(misfits))


def own_requirements() -> list[str] | None:
    """What lensmith requires, in pip's notation; None where lensmith is not installed as a distribution."""
    try:
        return metadata.requires("lensmith") or []
    except metadata.PackageNotFoundError:
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def find_misfits(requirements: Iterable[str], installed: Mapping[str, str | None]) -> list[Misfit]:
    """Those of `installed` that a requirement names and excludes, in the order of `installed`. Pure."""
    from packaging.requirements import Requirement

    wanted: dict[str, Requirement] = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            wanted[requirement.name.lower()] = requirement
    return [
        Misfit(name, version, f"{requirement.name}{requirement.specifier}")
        for name, version in installed.items()
        # A local build such as 2.15.0+cu130 or a pre-release counts by its number.
        if (requirement := wanted.get(name))
        and (version is None or not requirement.specifier.contains(version, prereleases=True))
    ]


def _range_sentence(misfits: list[Misfit]) -> str:
    found = ", ".join(f"{item.name} {item.installed or 'is not installed'}" for item in misfits)
    line = " ".join(f'"{item.requirement}"' for item in misfits)
    tested = ", ".join(item.requirement for item in misfits)
    return f"versions: found {found}; Lensmith was tested with {tested}. Mend it with: pip install {line}"


def _torchvision_requirements() -> list[str]:
    try:
        return [text for text in metadata.requires("torchvision") or [] if text.startswith("torch")]
    except metadata.PackageNotFoundError:
        return []


def _pair_sentence(misfit: Misfit, requirements: list[str]) -> str:
    names = ("torch", "torchvision")
    ranges = [item.requirement for item in find_misfits(requirements, dict.fromkeys(names))]
    line = " ".join(f'"{text}"' for text in ranges)
    torchvision = installed_versions(["torchvision"])["torchvision"]
    return (
        f"versions: torch {misfit.installed} and torchvision {torchvision} are not a pair: that torchvision needs "
        f"{misfit.requirement}. Mend it with: pip install --upgrade {line}"
    )


def environment() -> dict[str, Any]:
    """Everything a bug report needs, as JSON-able values: versions, GPUs, which kernels are used and why.

    Keys: `versions`, `python`, `platform`, `gpus` (name, capability, memory_gib), `cuda`, `precision`, `kernels`
    (each `{"chosen", "why"}`) and `notes`, a list of sentences.
    """
    import torch

    from lensmith.model.load import choose_device, choose_precision

    device = choose_device()
    dtype = choose_precision("auto", device)
    notes = []
    if own_requirements() is None:
        notes.append("lensmith is not installed as a package here, so the versions were not checked.")
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
            }
        )
    return {
        "versions": {"lensmith": installed_versions(["lensmith"])["lensmith"], **installed_versions(REPORTED)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "precision": str(dtype).removeprefix("torch."),
        "kernels": _kernels(device, dtype),
        "notes": notes,
    }


def _kernels(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """What runs faster here than plain torch, and why or why not."""
    from lensmith.model.attention import varlen_available
    from lensmith.model.kernels import liger_available

    installed = installed_versions(["liger-kernel", "bitsandbytes"])
    liger, four_bit = installed["liger-kernel"], installed["bitsandbytes"]
    if device.type != "cuda":
        return {
            "attention": {"chosen": "torch scaled_dot_product_attention", "why": "no GPU"},
            "norms_rope_mlp": {"chosen": "torch", "why": "no GPU; Triton kernels need one"},
            "four_bit": {"chosen": f"bitsandbytes {four_bit}", "why": "its CPU kernels: for tiny models only"},
        }
    varlen, fused = varlen_available(device, dtype), liger_available()
    return {
        "attention": {
            "chosen": "torch variable-length flash" if varlen else "torch scaled_dot_product_attention, in buckets",
            "why": "16-bit type, compute capability 8.0 or newer"
            if varlen
            else "needs a 16-bit type and capability 8.0",
        },
        "norms_rope_mlp": {
            "chosen": f"liger-kernel {liger}" if fused else "torch",
            "why": "a GPU, and it can be imported" if fused else "liger-kernel cannot be imported",
        },
        "four_bit": {"chosen": f"bitsandbytes {four_bit}", "why": "its CUDA kernels"},
    }
