"""What of the model trains: LoRA on the linears of adapted components, the own weights of trained ones, and their files.

Adapter weights are always fp32 and always computed with in the type of the activations: the optimizer sees every small
update, and nothing wider than the model's own type is kept for the backward pass. A folder of tuned weights holds what
PEFT writes (`adapter_config.json`, `adapter_model.safetensors`) and, for trained components, `trained.safetensors`
with transformers' own parameter names; plain PEFT and safetensors read it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lensmith.config.tree import Tune
from lensmith.errors import ConfigError, ModelError, RunError
from lensmith.model.components import component_of, is_adapter, num_parameters, plain_name, states_of
from lensmith.model.lora import Shadows
from lensmith.model.quant import BITS
from lensmith.types import Component

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED_WEIGHTS = "trained.safetensors"
INHERITED = "inherited"
"""Mark of a parameter that an earlier run trained and this one keeps; in the metadata of TRAINED_WEIGHTS the list of them."""
TUNED_FOLDER = "tuned"
"""Inside a run or checkpoint folder: where `save_tuned` is expected to have written."""

ALPHA_PER_RANK = 2
"""tune.alpha where it is not set, per tune.rank."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 2**30


def check_tune(tune: Tune) -> None:
    """Raises ConfigError for settings of `tune` that contradict each other; needs no model, so it comes first."""
    states = states_of(tune)
    if set(states.values()) == {"frozen"}:
        raise ConfigError(
            "tune: language, vision and merger are all frozen, so nothing would train. "
            "Set one of them to adapted or trained, for example tune.language=adapted."
        )
    if states["language"] != "frozen" and not (tune.attention or tune.mlp):
        raise ConfigError(
            f"tune: language is {states['language']}, but attention and mlp are both false, which leaves it nothing. "
            "Set one of them to true, or tune.language=frozen."
        )
    if tune.method not in BITS:
        return
    stored = ("language", "vision", "merger") if tune.quantise_vision else ("language",)
    if trained := [name for name in stored if states[name] == "trained"]:
        raise ConfigError(
            f"tune.{trained[0]}=trained with method {tune.method}: weights stored in {BITS[tune.method]} bits cannot be "
            f"trained themselves. Set tune.{trained[0]}=adapted, or tune.method=lora (16-bit weights)."
        )


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """fp32 whatever the model's type is (float64 stays). Arithmetic is in the model's type, see `AdapterLinear`.

    bf16 has 8 bits: around 0.02, where LoRA's A lives, its steps are 1.2e-4, so that an update of 2e-5, late in a
    cosine schedule, rounds away, and with it torch's AdamW second moments, which take the parameter's type. Costs 2
    more bytes per adapter parameter: 0.1 GiB at 8B and rank 16. An fp16 loss scaler needs fp32 parameters anyway.
    """
    return torch.promote_types(base, torch.float32)


class AdapterLinear(nn.Linear):
    """A linear whose weight is fp32 and whose arithmetic and result have the type of its input."""

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def prepare_trainable(model: nn.Module, tune: Tune, *, seed: int) -> nn.Module:
    """Freezes everything, then makes exactly what `tune` names trainable; a PeftModel if anything is adapted.

    A fresh adapter changes nothing: its B is zero. `seed` draws its A, the same on every device. With
    `tune.start_from` adapter and trained weights come from there instead.

    Raises ConfigError for contradictions, ModelError if `start_from` does not fit.
    """
    check_tune(tune)
    states, base_dtype = states_of(tune), weight_dtype(model)
    model.requires_grad_(False)
    if base_dtype is torch.float16:
        _widen_trained(model, states)
    if pattern := adapted_modules(tune):
        model = _add_adapter(model, _lora_config(tune, pattern), base_dtype, seed=seed)
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and trains_itself(plain_name(name), tune):
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"tune.{component_of(name)}=trained: {plain_name(name)} is stored in 4 bits in this checkpoint "
                    f"and cannot be trained itself. Set tune.{component_of(name)}=adapted, or name a 16-bit checkpoint."
                )
            parameter.requires_grad_(True)
    if tune.start_from is not None:
        start_from(model, tune)
    return model


def _widen_trained(model: nn.Module, states: Mapping[Component, str]) -> None:
    """fp32 for what trains its own fp16 weights, because a loss scaler refuses fp16 gradients.

    Whole trees, since each computes in one type: tower and mergers together, or everything with the decoder.
    """
    if states["language"] == "trained":
        model.float()
    elif "trained" in (states["vision"], states["merger"]):
        model.get_submodule("model.visual").float()


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The type the model computes in: that of its first weight that is not stored in 4 bits."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def adapted_modules(tune: Tune) -> str | None:
    """Regular expression for the full names of the linears that get an adapter; None if there are none."""
    states = states_of(tune)
    patterns = []
    if states["language"] == "adapted":
        parts = [r"self_attn\.(q_proj|k_proj|v_proj|o_proj)"] if tune.attention else []
        parts += [r"mlp\.(gate_proj|up_proj|down_proj)"] if tune.mlp else []
        patterns.append(rf"model\.language_model\.layers\.\d+\.({'|'.join(parts)})")
    if states["vision"] == "adapted":
        patterns.append(r"model\.visual\.blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.linear_fc1|mlp\.linear_fc2)")
    if states["merger"] == "adapted":
        patterns.append(r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc1|linear_fc2)")
    return "|".join(f"({pattern})" for pattern in patterns) or None


def trains_itself(name: str, tune: Tune) -> bool:
    """Whether this parameter of the model (not of an adapter) is one that `tune` trains."""
    if states_of(tune)[component_of(name)] != "trained":
        return False
    # tune.attention and tune.mlp leave decoder weights out; other components have no such switch.
    language = name.startswith("model.language_model.")
    return not language or not ((".self_attn." in name and not tune.attention) or (".mlp." in name and not tune.mlp))


def lora_alpha(tune: Tune) -> float:
    """tune.alpha, or what it is where it is not set."""
    return tune.alpha if tune.alpha is not None else ALPHA_PER_RANK * tune.rank


def _lora_config(tune: Tune, pattern: str) -> LoraConfig:
    return LoraConfig(
        r=tune.rank,
        lora_alpha=lora_alpha(tune),  # pyright: ignore[reportArgumentType]  PEFT divides it; fractions are fine
        lora_dropout=tune.dropout,
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        target_modules=pattern,
        bias="none",
    )


def _add_adapter(model: nn.Module, config: LoraConfig, base_dtype: torch.dtype, *, seed: int) -> PeftModel:
    """PEFT around the model, its linears exchanged for AdapterLinear; the one place that knows PEFT's layers."""
    with torch.random.fork_rng(devices=[]):
        # PEFT's initialisation takes no generator. It draws on the CPU, then moves: the same on every device.
        torch.default_generator.manual_seed(seed)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    dtype, place = adapter_dtype(base_dtype), getattr(model, "place", None)
    for layer in tuned.modules():
        if not isinstance(layer, LoraLayer):
            continue
        layer.cast_input_dtype_enabled = False  # PEFT would widen and keep every input otherwise
        for pairs in (layer.lora_A, layer.lora_B):
            for key, linear in pairs.items():
                pairs[key] = _widened(linear, dtype, place)
        magnitudes: Any = layer.lora_magnitude_vector
        for key, magnitude in magnitudes.items():
            # DoRA starts from the norm of each row. PEFT took it in the base's type; 16-bit rounding of it would
            # already change the model.
            magnitude.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[key].weight,
                lora_B=layer.lora_B[key].weight,
                scaling=layer.scaling[key],
            )
            magnitude.weight.data = magnitude.weight.data.to(dtype)
            magnitude.weight.requires_grad_(not config.inference_mode)
    if base_dtype is not dtype:
        model.shadows = Shadows(tuned, base_dtype)  # pyright: ignore[reportArgumentType]
    return tuned  # pyright: ignore[reportReturnType]


def _widened(linear: nn.Module, dtype: torch.dtype, place: torch.device | None) -> AdapterLinear:
    """`place`: where the model computes, which need not be where its frozen weights live."""
    assert isinstance(linear, nn.Linear), f"PEFT made a {type(linear).__name__} where a linear was expected"
    assert linear.bias is None, "LoraConfig(bias='none') gives adapters no bias"
    wide = AdapterLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    wide.weight = nn.Parameter(linear.weight.detach().to(place, dtype), requires_grad=linear.weight.requires_grad)
    return wide


@contextmanager
def kept_values(model: nn.Module) -> Iterator[None]:
    """Trainable parameters leave the block with the values and types they entered it with.

    For TRL's SFTTrainer, whose constructor rounds a quantised model's adapters to bf16.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, values in before:
        parameter.data = values


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters that belong to the model itself, by their names in it."""
    return {
        plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter(name)
    }


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved beside an adapter: the trained tensors, and those that an earlier run had trained (`tune.start_from`) and
    this one leaves as they are. Without them the saved model would not be the one that trained."""
    inherited = {
        plain_name(name): parameter for name, parameter in model.named_parameters() if hasattr(parameter, INHERITED)
    }
    return inherited | trained_tensors(model)


def inherited_names(file: Path) -> tuple[str, ...]:
    """The names in a `trained.safetensors` whose tensors an earlier run had trained; none where there is no such file."""
    if not file.is_file():
        return ()
    with safe_open(file, "pt") as opened:  # pyright: ignore[reportGeneralTypeIssues]
        return tuple(json.loads((opened.metadata() or {}).get(INHERITED, "[]")))


def save_tuned(model: nn.Module, folder: Path) -> None:
    """Writes adapter and trained weights into `folder`, which appears whole or not at all.

    They are written beside it and renamed; in a folder that exists, each file is replaced in one step.
    Raises RunError when the disk is full.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_tuned(model, partial)
        if folder.is_dir():
            for file in partial.iterdir():
                file.replace(folder / file.name)
        else:
            partial.rename(folder)
    except (OSError, SafetensorError) as cause:
        if not _means_no_space(cause):
            raise
        need_bytes = sum(num_parameters(p) * p.element_size() for p in model.parameters() if p.requires_grad)
        free = shutil.disk_usage(folder.parent).free
        raise RunError(
            f"{folder}: no space left while saving: {need_bytes / _GIB:.2f} GiB to write, {free / _GIB:.2f} GiB free "
            "there. Free some space or set run to a folder on another disk; what was saved before is untouched."
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tuned(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the vocabulary was resized; it never is here.
        # TRL's GRPO keeps a frozen copy beside it, "ref", where grpo.beta asks for a reference.
        PeftModel.save_pretrained(model, str(folder), save_embedding_layers=False, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is a form with nothing filled in
    if kept := kept_tensors(model):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        inherited = json.dumps(sorted(set(kept) - set(trained_tensors(model))))
        save_file(tensors, folder / TRAINED_WEIGHTS, metadata={"format": "pt", INHERITED: inherited})
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())  # a rename must never outlive the bytes it names


def _means_no_space(cause: OSError | SafetensorError) -> bool:
    if isinstance(cause, OSError):
        return cause.errno in _NO_SPACE
    # safetensors is written in Rust and passes the system's error on as text.
    found = re.search(r"os error (\d+)", str(cause))
    return found is not None and int(found[1]) in _NO_SPACE


def find_tuned(folder: Path) -> Path:
    """Where the tuned weights of a folder are: itself, its `tuned` folder, or its newest checkpoint.

    Raises ModelError if there are none.
    """
    checkpoints = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    for place in (folder, folder / TUNED_FOLDER, *(p for step in checkpoints for p in (step, step / TUNED_FOLDER))):
        if (place / ADAPTER_CONFIG).is_file() or (place / TRAINED_WEIGHTS).is_file():
            return place
    what = "holds neither " if folder.is_dir() else "is not a folder, so there is neither "
    raise ModelError(
        f"{folder}: {what}{ADAPTER_CONFIG} nor {TRAINED_WEIGHTS}. "
        "Give the folder of an adapter, or that of a run that saved at least once."
    )


def load_tuned(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """The model with the adapter and trained weights of an adapter or run folder; a PeftModel if there is an adapter.

    Raises ModelError if the folder holds none, or others than this model has places for.
    """
    source = find_tuned(Path(folder))
    if (source / ADAPTER_CONFIG).is_file():
        config = LoraConfig.from_pretrained(str(source))
        config.inference_mode = not trainable  # pyright: ignore[reportAttributeAccessIssue]
        model = _add_adapter(model, config, weight_dtype(model), seed=0)  # pyright: ignore[reportArgumentType]
    _fill(model, source)
    return model


def restore_tuned(model: nn.Module, folder: Path) -> None:
    """Puts a checkpoint's weights back into the model they were saved from, already prepared with the same settings.

    Raises ModelError if the folder holds none, or not exactly what this model would save.
    """
    source = find_tuned(Path(folder))
    own = kept_tensors(model)
    found = load_file(source / TRAINED_WEIGHTS) if (source / TRAINED_WEIGHTS).is_file() else {}
    _check_fit(source, found, own, complete=True)
    _fill(model, source)


def start_from(model: nn.Module, tune: Tune) -> None:
    """Fill adapter and trained weights from the run, checkpoint or folder `tune.start_from`.

    Raises ModelError where it does not fit what `tune` makes trainable.
    """
    folder = Path(str(tune.start_from))
    source = find_tuned(folder)
    where = f"tune.start_from={folder}"
    if (source / ADAPTER_CONFIG).is_file():
        theirs = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(model, PeftModel):
            raise ModelError(
                f"{where}: holds an adapter, but with tune.method={tune.method} nothing here is adapted. Adapt what it "
                "adapts (tune.language=adapted, method lora or qlora), or merge it first and set model to the result."
            )
        ours = model.peft_config["default"].to_dict()
        named = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
        for key, setting in named.items():
            if theirs.get(key) != ours[key]:
                raise ModelError(
                    f"{where}: made with {setting} {theirs.get(key)}, this run has {setting} {ours[key]}. "
                    f"Set tune.{setting}={json.dumps(theirs.get(key))}, or start without it."
                )
    _fill(model, source)
    if (source / TRAINED_WEIGHTS).is_file():
        with safe_open(source / TRAINED_WEIGHTS, "pt") as opened:  # pyright: ignore[reportGeneralTypeIssues]
            theirs = set(opened.keys())
        for name, parameter in model.named_parameters():
            if plain_name(name) in theirs and not parameter.requires_grad:
                setattr(parameter, INHERITED, True)


def _fill(model: nn.Module, source: Path) -> None:
    """Copies the tensors of a tuned folder into the places of the same names; all of them must be there."""
    if (source / ADAPTER_CONFIG).is_file():
        assert isinstance(model, PeftModel)
        tensors = load_file(source / ADAPTER_WEIGHTS)
        _check_fit(source, tensors, get_peft_model_state_dict(model, save_embedding_layers=False), complete=True)
        set_peft_model_state_dict(model, tensors)
    if (source / TRAINED_WEIGHTS).is_file():
        tensors = load_file(source / TRAINED_WEIGHTS)
        places = {plain_name(name): p for name, p in model.named_parameters() if not is_adapter(name)}
        _check_fit(source, tensors, places, complete=False)
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)


def _check_fit(source: Path, found: Mapping[str, Tensor], places: Mapping[str, Any], *, complete: bool) -> None:
    if extra := sorted(set(found) - set(places)):
        raise ModelError(
            f"{source}: {len(extra)} of its {len(found)} tensors have no place in this model, first {extra[0]}. "
            f"It tunes {_components(found)}, this run {_components(places)}: use the same model and tune settings."
        )
    if complete and (missing := sorted(set(places) - set(found))):
        raise ModelError(
            f"{source}: lacks {len(missing)} of the {len(places)} tensors of this run's adapter, first {missing[0]}. "
            f"It tunes {_components(found)}, this run {_components(places)}: use the same tune settings."
        )
    for name, tensor in found.items():
        if tensor.shape != places[name].shape:
            raise ModelError(
                f"{source}: {name} is {list(tensor.shape)} there and {list(places[name].shape)} in this model. "
                "It was made for a model of another size; set model to that one."
            )


def _components(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(component_of(name)) for name in names}))
