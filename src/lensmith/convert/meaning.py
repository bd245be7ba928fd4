"""Values of other tools in our units: pixels as tokens, batches as samples, module names as components.

Pure functions, one value in, one value (or Without, Noted, SKIP) out; the tables of the four tools share them.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lensmith.convert.nouns import SKIP, Noted, Reference, Without

TOKEN_PX = 32
"""Side of the square that one language token covers: patch_size 16 x spatial_merge_size 2 in Qwen3-VL's config.json."""
UNSLOTH_MODEL = re.compile(r"unsloth/(Qwen3-VL-[\w.]+?-(?:Instruct|Thinking))(?:-(?:unsloth-)?bnb-4bit|-FP8)?", re.I)
SIZES = ("2B", "4B", "8B", "32B")
"""Of the dense Qwen3-VL, https://huggingface.co/collections/Qwen/qwen3-vl."""
SIZE = re.compile(r"Qwen3-VL-(\d+B)(?!-A\d)", re.I)
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
}  # fmt: skip
LOGGERS = ("tensorboard", "wandb", "trackio")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
TOWER = {"qkv", "proj", "attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"}
"""Linear modules of Qwen3-VL's decoder and of its image tower; the mergers have linear_fc1 and linear_fc2 as well."""
ALL_LINEAR = ("all-linear", "all")


def model_name(name: Any) -> Any:
    """A hub name or folder as we load it: Unsloth's copies in 4 bits are Qwen's own weights."""
    if isinstance(name, Reference) or name is None:
        return Without("Set model to the name or folder that the script loads.")
    known = UNSLOTH_MODEL.fullmatch(name)
    if known:
        return Noted(f"Qwen/{known[1]}", "Unsloth's copy of Qwen's weights; Lensmith quantises Qwen's own on loading.")
    if (size := SIZE.search(name)) and size[1].upper() not in SIZES:
        return Noted(name, f"There is no Qwen3-VL of {size[1]}: name one of {', '.join(SIZES)}.")
    if re.search(r"-a\d+b", name.lower()):
        return Noted(
            name, "A mixture of experts: Lensmith trains the dense Qwen3-VL, 2B, 4B, 8B and 32B. Name one of them."
        )
    if "qwen3-vl" not in name.lower() and "qwen3vl" not in name.lower():
        return Noted(
            name, "Lensmith trains Qwen3-VL and nothing else: if this is another family, name one of its models."
        )
    return name


def image_tokens(pixels: Any) -> Any:
    """An area in pixels as language tokens, rounded down but for one."""
    return SKIP if pixels is None else max(1, pixels // TOKEN_PX**2)


def optimizer(name: str) -> Any:
    known = OPTIMIZERS.get(str(name).removeprefix("OptimizerNames.").lower())
    return known or Without(f"Lensmith has adamw, adamw_8bit and paged_adamw_8bit; optim.name is left open for {name}.")


def schedule(name: str) -> Any:
    known = SCHEDULES.get(str(name))
    note = "Lensmith warms up before a constant rate too, where optim.warmup is above 0."
    if known == "constant" and name == "constant":
        return Noted(known, note)
    return known or Without(
        f"Lensmith has cosine, linear and constant; optim.schedule is left at its default for {name}."
    )


def loggers(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value or [])
    if names in ([], ["none"]):
        return []
    kept = [name for name in names if name in LOGGERS]
    if not kept:
        return Without(f"There is no logger {', '.join(names)}; metrics.jsonl has every step, log.report_to {LOGGERS}.")
    lost = [name for name in names if name not in LOGGERS]
    return Noted(kept, "", f"There is no logger {', '.join(lost)}; metrics.jsonl has every step.") if lost else kept


def log_steps(steps: Any, report_to: Any) -> Any:
    if loggers(report_to) == [] or isinstance(loggers(report_to), Without):
        return Without("metrics.jsonl has every step; the setting is about loggers, and there is none.", matters=False)
    return max(1, round(steps)) if steps >= 1 else Without("A share of the steps cannot be said: set log.every_steps.")


def warmup(ratio: float, steps: float, max_steps: int, *, per: str = "warmup_steps") -> Any:
    """Share of the steps. `steps` from 1 on are a number of steps, below 1 a share (transformers 5)."""
    if ratio:
        return ratio
    if steps is None or steps < 1:
        return float(steps or 0)
    if max_steps and max_steps > steps:
        return round(steps / max_steps, 6)
    return Without(f"Ours is a share of the steps, whose number this file does not say: optim.warmup = {per} / steps.")


def epochs(value: Any, max_steps: int) -> Any:
    if max_steps and max_steps > 0:
        return Without("max_steps decides how long the run is, there as here.", matters=False)
    return float(value) if value else SKIP


def steps(value: Any) -> Any:
    return value if value and value > 0 else SKIP


def samples(batch: int, accumulation: int | None, processes: int = 1) -> int:
    """Samples of one optimizer step, all GPUs together."""
    return batch * (accumulation or 1) * processes


def completions(batch: int, accumulation: int | None, group: int, processes: int = 1) -> Any:
    """Completions of one optimizer step, in whole groups."""
    meant = samples(batch, accumulation, processes)
    whole = max(1, math.ceil(meant / group)) * group
    if whole == meant:
        return meant
    return Noted(whole, f"There a step has {meant}; here it holds whole groups of {group}, so it was rounded up.")


def precision(bf16: Any, fp16: Any) -> Any:
    if bf16 is True or fp16 is True:
        return "bf16" if bf16 is True else "fp16"
    return SKIP


def recompute(value: Any) -> Any:
    return "layers" if value else "none"


def offload(value: Any) -> Any:
    return "inputs" if value == "unsloth" else SKIP


def save_steps(steps_: Any, strategy: str) -> Any:
    if strategy == "epoch":
        return None
    if strategy == "no":
        return Without("Lensmith always saves, so that a run can go on: save.keep bounds how many checkpoints stay.")
    if steps_ < 1:
        return Without("A share of the steps cannot be said: set save.every_steps to a number of steps.")
    return round(steps_)


def eval_steps(steps_: Any, strategy: str, fallback: Any = None) -> Any:
    if strategy in ("no", None, False):
        return SKIP
    if strategy == "epoch":
        return Without("Rounds are counted in steps: set eval.every_steps to the steps of one epoch.")
    steps_ = steps_ or fallback
    return round(steps_) if steps_ and steps_ >= 1 else Without("Set eval.every_steps to a number of steps.")


def clip(value: Any) -> Any:
    return value or None


def open_share(value: Any) -> Any:
    """top_p: 1 keeps all, as null does here."""
    return SKIP if value is None or value >= 1 else value


def open_count(value: Any) -> Any:
    """top_k: 0 and -1 keep all, as null does here."""
    return SKIP if value is None or value <= 0 else value


def quantisation(four: Any, eight: Any, *, full: Any = False, adapters: bool = True) -> Any:
    if full is True or not adapters:
        if four or eight:
            return Noted("full", "Weights in 4 or 8 bits cannot be trained themselves, so they are loaded in 16 here.")
        return "full"
    return "qlora" if four else "lora_8bit" if eight else "lora"


def targets(value: Any) -> frozenset[str] | Without:
    """Which of attention, mlp, vision and merger a list of module names, or all-linear, reaches.

    Names are matched as PEFT does: the last part of a module's path, or the path itself.
    """
    if (isinstance(value, str) and value in ALL_LINEAR) or (
        isinstance(value, list) and len(value) == 1 and value[0] in ALL_LINEAR
    ):
        return frozenset({"attention", "mlp", "vision", "merger"})
    names = [value] if isinstance(value, str) and re.fullmatch(r"[\w.]+", value) else value
    if isinstance(names, str) or names is None:
        return Without(
            "A pattern of module names: say with tune.language, attention, mlp, vision and merger what it meant."
        )
    leaves = {str(name).rpartition(".")[2] if str(name) not in TOWER else str(name) for name in names}
    reached = {"attention"} if leaves & ATTENTION else set()
    reached |= {"mlp"} if leaves & MLP else set()
    reached |= {"vision"} if leaves & TOWER else set()
    reached |= {"merger"} if leaves & {"linear_fc1", "linear_fc2"} else set()
    if not reached:
        return Without(f"None of {', '.join(map(str, names))} is a linear module of Qwen3-VL.")
    return frozenset(reached)


def reaches(value: Any, part: str) -> Any:
    """Whether attention or mlp of the decoder get adapters, with a word where the file names only some of the modules."""
    found = targets(value)
    if isinstance(found, Without):
        return found
    if not isinstance(value, str) and part in found and not isinstance(value, Reference):
        named = {str(name).rpartition(".")[2] for name in value}
        whole = ATTENTION if part == "attention" else MLP
        if named & whole and not whole <= named:
            more = ", ".join(sorted(whole - named))
            return Noted(True, f"tune.{part} covers all of {', '.join(sorted(whole))}: {more} more than there.")
    return part in found


def component(value: Any, part: str) -> Any:
    """State of the tower or the mergers."""
    found = targets(value)
    if isinstance(found, Without):
        return SKIP
    return "adapted" if part in found else "frozen"


def language(value: Any) -> Any:
    found = targets(value)
    if isinstance(found, Without):
        return SKIP
    return "adapted" if found & {"attention", "mlp"} else "frozen"


def rollout_engine(use: Any) -> Any:
    """vLLM where it is asked for; where not, completions come from the built-in engine anyway."""
    if not use:
        return SKIP
    return Noted("vllm", 'Needs pip install "lensmith[vllm]". Without this line the built-in engine writes them.')


def vllm_mode(mode: Any, use: Any) -> Any:
    return mode if use else Without("Goes with use_vllm.", matters=False)


def vllm_share(share: Any, mode: Any, use: Any) -> Any:
    return share if use and mode == "colocate" else Without("Goes with vLLM beside the training.", matters=False)


def vllm_server(address: Any, host: Any, port: Any, mode: Any, use: Any) -> Any:
    if not use or mode != "server":
        return Without("Goes with a vLLM server.", matters=False)
    first = [one[0] if isinstance(one, list) else one for one in (address, host, port)]
    return first[0] or server_address(*first[1:])


def server_address(host: str, port: int) -> str:
    """0.0.0.0 is where a server listens; who asks it from the same machine says 127.0.0.1."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
