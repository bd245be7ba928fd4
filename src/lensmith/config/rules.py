"""What single settings cannot know of each other: settings without effect, and settings that contradict.

Each rule is a small generator over the config. A setting without effect is an error only where somebody wrote it;
written by nobody, it is left out of `lensmith show` and of the resolved config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lensmith.config.schema import read_value
from lensmith.config.tree import RunConfig


@dataclass(frozen=True, slots=True)
class Problem:
    """A setting that does nothing, or cannot hold together with another one."""

    path: str
    why: str
    """Goes on after the setting and its value, and ends with the way out."""


Rule = Callable[[RunConfig], Iterator[Problem]]


def settings_without_effect(config: RunConfig) -> dict[str, Problem]:
    """Path -> why it does nothing in this config, whoever set it."""
    problems = (problem for rule in WITHOUT_EFFECT for problem in rule(config))
    # Saying of something that it is off, where it is off anyway, is true and no mistake.
    return {problem.path: problem for problem in problems if read_value(config, problem.path) not in (None, False, 0)}


def contradictions(config: RunConfig) -> list[Problem]:
    """Settings that cannot hold together, whoever set them."""
    return [problem for rule in CONTRADICTIONS for problem in rule(config)]


def adapts(config: RunConfig) -> bool:
    """Whether any component gets an adapter; with `full`, `adapted` is read as `trained`."""
    tune = config.tune
    return tune.method != "full" and "adapted" in (tune.language, tune.vision, tune.merger)


def _adapter_settings_need_an_adapter(config: RunConfig) -> Iterator[Problem]:
    if adapts(config):
        return
    if config.tune.method == "full":
        why = "has no effect with tune.method=full, which trains the weights themselves. Remove it, or set tune.method=lora."
    else:
        why = "has no effect while no component is adapted. Remove it, or set tune.language=adapted."
    for name in ("rank", "alpha", "dropout", "rslora", "dora"):
        yield Problem(f"tune.{name}", why)


def _projections_need_a_moving_language(config: RunConfig) -> Iterator[Problem]:
    if config.tune.language == "frozen":
        for name in ("attention", "mlp"):
            why = "has no effect while tune.language=frozen. Remove it, or set tune.language=adapted."
            yield Problem(f"tune.{name}", why)


def _quantised_vision_needs_qlora(config: RunConfig) -> Iterator[Problem]:
    if config.tune.method != "qlora":
        yield Problem(
            "tune.quantise_vision",
            f"has no effect with tune.method={config.tune.method}, which stores nothing in 4 bits. "
            "Remove it, or set tune.method=qlora.",
        )


def _steps_replace_epochs(config: RunConfig) -> Iterator[Problem]:
    if config.optim.steps is not None:
        yield Problem(
            "optim.epochs", f"has no effect beside optim.steps={config.optim.steps}, which decides. Remove one of them."
        )


def _rates_need_a_moving_part(config: RunConfig) -> Iterator[Problem]:
    for name, state in (("vision", config.tune.vision), ("merger", config.tune.merger)):
        if state == "frozen":
            yield Problem(
                f"optim.{name}_learning_rate",
                f"has no effect while tune.{name}=frozen. Remove it, or set tune.{name}=adapted.",
            )


def _dropout_turns_sharing_off(config: RunConfig) -> Iterator[Problem]:
    if adapts(config) and config.tune.dropout > 0:
        yield Problem(
            "pack.share_prefix",
            f"has no effect with tune.dropout={config.tune.dropout:g}: branches of one prefix would need dropout masks "
            "of their own, so nothing is shared. Remove it, or set tune.dropout=0.",
        )


def _rounds_of_questions_need_a_test_set(config: RunConfig) -> Iterator[Problem]:
    if config.data.test is None:
        yield Problem(
            "eval.every_steps",
            "has no effect with data.test=null: nothing is held out to ask. Remove it, or name a data.test.",
        )


def _patience_needs_rounds(config: RunConfig) -> Iterator[Problem]:
    if config.eval.every_steps is None:
        yield Problem(
            "eval.patience",
            "has no effect with eval.every_steps=null: it counts rounds of questions. Remove it, or set eval.every_steps.",
        )
    elif config.task == "grpo":
        yield Problem(
            "eval.patience",
            "has no effect with task=grpo: a run of rewards keeps the checkpoint of its best reward. Remove it.",
        )


def _image_range_is_not_empty(config: RunConfig) -> Iterator[Problem]:
    image = config.data.image
    if image.min_tokens is not None and image.min_tokens > image.max_tokens:
        yield Problem(
            "data.image.min_tokens",
            f"which is more than data.image.max_tokens={image.max_tokens}. Lower it, or raise data.image.max_tokens.",
        )


def _a_moving_language_has_projections(config: RunConfig) -> Iterator[Problem]:
    tune = config.tune
    if tune.language != "frozen" and not (tune.attention or tune.mlp):
        yield Problem(
            "tune.language",
            "but tune.attention and tune.mlp are both false, which leaves it nothing. "
            "Set one of them to true, or tune.language=frozen.",
        )


def _something_is_trained(config: RunConfig) -> Iterator[Problem]:
    tune = config.tune
    if {tune.language, tune.vision, tune.merger} == {"frozen"}:
        yield Problem(
            "tune.language",
            "and so are tune.vision and tune.merger: nothing would be trained. Set one of them to adapted or trained.",
        )


def _few_bit_weights_stay_put(config: RunConfig) -> Iterator[Problem]:
    tune = config.tune
    bits = {"qlora": 4, "lora_8bit": 8}.get(tune.method)
    if bits is None:
        return
    for name in ("language", "vision", "merger") if tune.quantise_vision else ("language",):
        if getattr(tune, name) == "trained":
            yield Problem(
                f"tune.{name}",
                f"but tune.method={tune.method} stores it in {bits} bits, which no optimizer can move. "
                f"Set tune.{name}=adapted, or tune.method=lora.",
            )


def _inputs_wait_only_where_layers_run_twice(config: RunConfig) -> Iterator[Problem]:
    if config.memory.recompute == "none" and config.memory.offload == "inputs":
        yield Problem(
            "memory.offload",
            "has no effect with memory.recompute=none: no layer keeps its input for a second run. Remove it, or set "
            "memory.recompute=layers.",
        )


def _rounding_is_for_weights_that_train(config: RunConfig) -> Iterator[Problem]:
    tune = config.tune
    if tune.method != "full" and "trained" not in (tune.language, tune.vision, tune.merger):
        yield Problem(
            "optim.rounding",
            "has no effect while only adapters train: they are fp32, and nothing is rounded. Remove it, or set "
            "tune.method=full.",
        )


def _layers_that_come_and_go_run_twice(config: RunConfig) -> Iterator[Problem]:
    memory = config.memory
    if memory.stream_layers and (
        memory.recompute == "none" or (memory.recompute != "layers" and memory.recompute < memory.stream_layers)
    ):
        yield Problem(
            "memory.stream_layers",
            f"but memory.recompute={memory.recompute}: a layer whose weights come and go has to run again in the backward "
            "pass. Set memory.recompute=layers, or stream no more layers than it names.",
        )
    if memory.stream_layers and config.tune.method == "lora_8bit":
        yield Problem(
            "memory.stream_layers",
            "but tune.method=lora_8bit: bitsandbytes keeps its own hold of 8-bit weights on the GPU. "
            "Set tune.method=qlora, or memory.stream_layers=0.",
        )


def _frozen_head_settings(config: RunConfig) -> Iterator[Problem]:
    if _language_trains(config):
        return
    if config.memory.head == "host" and config.memory.head_bits != 16:
        yield Problem(
            "memory.head_bits",
            "but memory.head=host keeps the head out of GPU memory altogether. Remove one of the two.",
        )


def _what_trains_stays_on_the_gpu(config: RunConfig) -> Iterator[Problem]:
    memory, tune = config.memory, config.tune
    moved = [name for name in ("embedding", "head") if getattr(memory, name) == "host"]
    moved += ["head_bits"] if memory.head_bits != 16 else []
    moved += ["stream_layers"] if memory.stream_layers else []
    if _language_trains(config):
        for name in moved:
            yield Problem(
                f"memory.{name}",
                "but the decoder trains its own weights, and only frozen ones can live in host memory or in few bits. "
                "Remove it, or set tune.method=lora and tune.language=adapted.",
            )
    if memory.tower == "host":
        for name in ("vision", "merger"):
            if getattr(tune, name) != "frozen":
                yield Problem(
                    "memory.tower",
                    f"but tune.{name}={getattr(tune, name)}; only a frozen tower can leave the GPU. Remove one.",
                )


def _steps_inside_the_backward_pass(config: RunConfig) -> Iterator[Problem]:
    if not config.optim.in_backward:
        return
    if config.tune.method != "full":
        yield Problem(
            "optim.in_backward",
            f"but tune.method={config.tune.method} has few gradients to save. Remove it, or set tune.method=full.",
        )
    if config.optim.max_grad_norm is not None:
        yield Problem(
            "optim.in_backward",
            f"but optim.max_grad_norm={config.optim.max_grad_norm:g} needs all gradients at once to take their norm. "
            "Set optim.max_grad_norm=null.",
        )


def _language_trains(config: RunConfig) -> bool:
    tune = config.tune
    return tune.language == "trained" or (tune.method == "full" and tune.language == "adapted")


def _kept_features_need_a_frozen_tower(config: RunConfig) -> Iterator[Problem]:
    for name, state in (("vision", config.tune.vision), ("merger", config.tune.merger)):
        if state != "frozen":
            yield Problem(
                "memory.vision_cache_gib",
                f"has no effect with tune.{name}={state}: features change with every step, so none can be kept. "
                f"Remove it, or set tune.{name}=frozen.",
            )
    if config.memory.vision_cache_gib is None:
        yield Problem(
            "memory.vision_cache_dir",
            "has no effect while memory.vision_cache_gib is null, which keeps nothing. Remove it, or say with "
            "memory.vision_cache_gib how many GiB the folder may hold.",
        )


def _rollouts_belong_to_grpo(config: RunConfig) -> Iterator[Problem]:
    if config.task == "grpo":
        return
    for section in ("grpo", "rollout"):
        for name in type(getattr(config, section)).model_fields:
            yield Problem(f"{section}.{name}", "has no effect with task=sft. Remove it, or set task=grpo.")


def _vllm_settings_need_vllm(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if config.task != "grpo":
        return  # nothing of the section has an effect then, and another rule says so
    if rollout.engine != "vllm":
        for name in ("vllm_mode", "vllm_gpu_share", "vllm_server"):
            yield Problem(
                f"rollout.{name}",
                f"has no effect with rollout.engine={rollout.engine}. Remove it, or set rollout.engine=vllm.",
            )
        return
    other, mode = ("vllm_server", "server") if rollout.vllm_mode == "colocate" else ("vllm_gpu_share", "colocate")
    yield Problem(
        f"rollout.{other}",
        f"has no effect with rollout.vllm_mode={rollout.vllm_mode}. Remove it, or set rollout.vllm_mode={mode}.",
    )
    yield Problem(
        "rollout.batch",
        "has no effect with rollout.engine=vllm, which decides itself how many completions it writes together. Remove it.",
    )


def _vllm_computes_what_training_does(config: RunConfig) -> Iterator[Problem]:
    """All named by the engine: it is what gives way, because the others say what is trained and how completions are drawn."""
    if config.task != "grpo" or config.rollout.engine != "vllm":
        return
    for name in ("top_p", "top_k", "min_p"):
        if (value := getattr(config.grpo, name)) is not None:
            yield Problem(
                "rollout.engine",
                f"but grpo.{name}={value:g}: vLLM tells log-probabilities after that filter and training computes them before "
                f"it, so nobody could see that the two models differ. Set rollout.engine=builtin, or grpo.{name}=null.",
            )
    tune, memory, away = config.tune, config.memory, "Set rollout.engine=builtin"
    if tune.dora:
        yield Problem(
            "rollout.engine", f"but tune.dora=true, and vLLM is handed W + scale B A. {away}, or tune.dora=false."
        )
    if tune.method == "lora_8bit":
        yield Problem(
            "rollout.engine",
            "but tune.method=lora_8bit, whose products round their inputs too: no whole weights compute what training does. "
            f"{away}, or tune.method=qlora.",
        )
    for name, off in (("stream_layers", 0), ("head_bits", 16)):
        if (value := getattr(memory, name)) != off:
            yield Problem(
                "rollout.engine",
                f"but memory.{name}={value}, and vLLM is handed whole weights that stay. {away}, or memory.{name}={off}.",
            )
    for name in ("vision", "merger") if config.rollout.vllm_mode == "server" else ():
        if getattr(tune, name) != "frozen":
            yield Problem(
                "rollout.engine",
                f"but tune.{name}={getattr(tune, name)} with rollout.vllm_mode=server: a server keeps features of pictures and "
                f"cannot be told that they are old. Set rollout.vllm_mode=colocate, or tune.{name}=frozen.",
            )


def _groups_fill_a_step(config: RunConfig) -> Iterator[Problem]:
    if config.task == "grpo" and config.optim.effective_samples % config.grpo.group:
        yield Problem(
            "optim.effective_samples",
            f"but grpo.group={config.grpo.group}: a step holds whole groups, so it must be a multiple of the group. "
            f"Set it to {max(1, config.optim.effective_samples // config.grpo.group) * config.grpo.group}.",
        )


def _grpo_needs_gradients_in_one_piece(config: RunConfig) -> Iterator[Problem]:
    if config.task == "grpo" and config.optim.in_backward:
        yield Problem("optim.in_backward", "but task=grpo takes several packs a step. Remove one of the two.")


def _completions_fit_their_packs(config: RunConfig) -> Iterator[Problem]:
    if config.task == "grpo" and config.pack.tokens is not None and config.grpo.max_new_tokens >= config.pack.tokens:
        yield Problem(
            "grpo.max_new_tokens",
            f"but pack.tokens={config.pack.tokens} leaves no room for a prompt. Raise pack.tokens or lower it.",
        )


def _what_unsloth_decides_itself(config: RunConfig) -> Iterator[Problem]:
    if config.engine != "unsloth":
        return
    why = "has no effect with engine=unsloth, which {}. Remove it, or set engine=lensmith."
    places = "keeps the whole model on the GPU, and the inputs of recomputed layers in host memory"
    for name in ("offload", "embedding", "head", "head_bits", "tower", "stream_layers", "vision_cache_gib"):
        yield Problem(f"memory.{name}", why.format(places))
    yield Problem("tune.quantise_vision", why.format("chooses itself what it stores in few bits"))
    for name in ("share_prefix", "check_packs"):
        yield Problem(
            f"pack.{name}", why.format("knows no packs: each sample is a row of its own, padded to the longest")
        )


def _what_unsloth_cannot_do(config: RunConfig) -> Iterator[Problem]:
    if config.engine != "unsloth":
        return
    if config.task == "grpo":
        yield Problem(
            "engine", "but task=grpo shares prompts in packs, which Unsloth does not know. Set engine=lensmith."
        )
    if config.tune.method == "full":
        yield Problem(
            "engine", "but tune.method=full trains weights in bf16 by an optimizer of ours. Set engine=lensmith."
        )
    for name in ("language", "vision", "merger"):
        if getattr(config.tune, name) == "trained":
            yield Problem(
                f"tune.{name}", f"but engine=unsloth adapts only. Set tune.{name}=adapted, or engine=lensmith."
            )
    if isinstance(config.memory.recompute, int):
        yield Problem(
            "memory.recompute",
            "but engine=unsloth recomputes all layers or none. Set it to layers, or engine=lensmith.",
        )


WITHOUT_EFFECT: tuple[Rule, ...] = (
    _rollouts_belong_to_grpo,
    _vllm_settings_need_vllm,
    _adapter_settings_need_an_adapter,
    _projections_need_a_moving_language,
    _quantised_vision_needs_qlora,
    _steps_replace_epochs,
    _rates_need_a_moving_part,
    _dropout_turns_sharing_off,
    _rounds_of_questions_need_a_test_set,
    _patience_needs_rounds,
    _kept_features_need_a_frozen_tower,
    _inputs_wait_only_where_layers_run_twice,
    _rounding_is_for_weights_that_train,
    _what_unsloth_decides_itself,
)
CONTRADICTIONS: tuple[Rule, ...] = (
    _what_unsloth_cannot_do,
    _groups_fill_a_step,
    _grpo_needs_gradients_in_one_piece,
    _completions_fit_their_packs,
    _vllm_computes_what_training_does,
    _image_range_is_not_empty,
    _a_moving_language_has_projections,
    _something_is_trained,
    _few_bit_weights_stay_put,
    _layers_that_come_and_go_run_twice,
    _frozen_head_settings,
    _what_trains_stays_on_the_gpu,
    _steps_inside_the_backward_pass,
)
