"""TRL's names: SFTConfig, GRPOConfig, the trainers, PEFT's LoraConfig, bitsandbytes and the processor.

trl 1.16.0, peft 0.21.2 and transformers 5.23.0, as installed. Older names that TRL has dropped are understood as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lensmith.convert import meaning
from lensmith.convert.nouns import SKIP, Noted, Reference, Rule, Skip, Table, Task, Without
from lensmith.convert.training import (
    ADVICE,
    GRPO_ADVICE,
    LENGTH_NOTE,
    TOWER_RATE_NOTE,
    completion_rules,
    grpo_rules,
    own_rewards,
    sample_rules,
    training_rules,
)

VERSION = "trl 1.16.0, peft 0.21.2, transformers 5.23.0"
READERS = ("json", "csv", "parquet", "imagefolder")
"""Names that load_dataset takes for file formats; the file is in data_files or data_dir."""
UNSET = {
    "data.image.max_tokens": "No image limit is set there: the processor's own is 16384 tokens, ours is 1280 "
    "(data.image.max_tokens). Raise it where small print matters; `lensmith check` says how many pictures are reduced.",
    "data.test": "Nothing is held out there; Lensmith holds out 5 % of the rows by image and asks them before and after. "
    "To train on all of them: data.test=null.",
}


def data_place(path: Any, files: Any, folder: Any, split: Any, subset: Any) -> Any:
    """What load_dataset reads, as data.train names it."""
    if path in READERS:
        chosen = folder if path == "imagefolder" else files.get("train") if isinstance(files, dict) else files
        return chosen if isinstance(chosen, str) else Without("Set data.train to the file.")
    if not isinstance(path, str):
        return SKIP
    share, _, cut = (split or "").partition("[")
    lost = [f"Only {split} of it there; Lensmith takes the whole split."] if cut else []
    if subset:
        lost.append(f"The subset {subset} cannot be named here: save it to a file first.")
    place = f"{path}:{share}" if share else path
    return Noted(place, "", " ".join(lost)) if lost else place


def from_quant(four: Any, eight: Any, lora: Any) -> Any:
    return meaning.quantisation(four, eight, adapters=lora is not None)


def tower_rate(rate: float, lora: Any, target: Any) -> Any:
    if lora is None:
        return rate
    return rate if target is not None and meaning.component(target, "vision") == "adapted" else SKIP


def _whole(lora: Any) -> Any:
    return (
        SKIP
        if lora
        else Noted("trained", "Without an adapter all of the model trains there; `frozen` needs less memory.")
    )


def pixels_of(size: Any, pixels: Any, edge: str) -> Any:
    """From max_pixels, or from the image processor's `size`, whose edges are areas in Qwen3-VL."""
    area = pixels if pixels is not None else (size or {}).get(edge)
    return meaning.image_tokens(area)


def test_place(path: Any, files: Any, split: Any, share: Any) -> Any:
    if isinstance(share, float) and 0 < share < 1:
        return Noted(share, "Held out by image, so that no picture is in both.")
    if isinstance(share, int) and share >= 1:
        return Without(f"Ours is a share, not a number of rows: set data.test to {share} / rows.")
    found = data_place(path, files, None, split, None)
    return SKIP if isinstance(found, Skip) else found


def first_length(*lengths: Any) -> Any:
    return next((length for length in lengths if length), SKIP)


def _dtype(value: Any) -> Any:
    word = str(value.name if isinstance(value, Reference) else value).removeprefix("torch.")
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(word)
    return Noted(known, "Adapters are fp32 in any case.") if known else SKIP


def lora_rules(prefix: str = "lora.", *, rank: int = 8, alpha: float = 8, dropout: float = 0.0) -> tuple[Rule, ...]:
    """For LoraConfig's numbers, which mean the same everywhere."""
    return (
        Rule({f"{prefix}r": rank}, "tune.rank"),
        Rule({f"{prefix}lora_alpha": alpha}, "tune.alpha", float, "The scale is alpha / rank, as there."),
        Rule({f"{prefix}lora_dropout": dropout}, "tune.dropout", float, assume=bool(dropout)),
        Rule({f"{prefix}use_rslora": False}, "tune.rslora"),
        Rule({f"{prefix}use_dora": False}, "tune.dora"),
    )  # fmt: skip


LORA_ADVICE = {
    "lora.task_type": Without("Always that of a language model.", matters=False),
    "lora.bias": Without("Biases are never trained beside adapters.", matters=False),
    "lora.modules_to_save": Without("Only components train: tune.language, vision and merger; never the head alone."),
    "lora.init_lora_weights": Without("Adapters start at zero change, PEFT's default."),
    "lora.exclude_modules": Without("Say with tune.language, attention, mlp, vision and merger what is tuned."),
    "lora.layers_to_transform": Without("Adapters go into all layers of a component."),
    "lora.layers_pattern": Without("Adapters go into all layers of a component."),
    "lora.rank_pattern": Without("One rank for all modules: tune.rank."),
    "lora.alpha_pattern": Without("One alpha for all modules: tune.alpha."),
    "lora.loftq_config": Without("Adapters start at zero change, PEFT's default."),
    "lora.inference_mode": Without("Not needed.", matters=False),
}
DATA_RULES = (
    Rule({"data.path": None, "data.data_files": None, "data.data_dir": None, "data.split": None, "data.name": None},
         "data.train", data_place, assume=False),
    Rule({"data_eval.path": None, "data_eval.data_files": None, "data_eval.split": None, "split.test_size": None},
         "data.test", test_place, assume=False),
)  # fmt: skip
DATA_ADVICE = {
    "data.streaming": Without("Rows are never read into memory.", matters=False),
    "data.token": Without("Log in with `hf auth login`; a token does not belong into a file."),
    "data.trust_remote_code": Without("Loading scripts of data sets are never run."),
    "data.num_proc": Without("See data.workers.", matters=False),
    "data.cache_dir": Without("Set HF_HOME.", matters=False),
    "data_eval.name": Without("A subset cannot be named here: save it to a file first."),
    "data_eval.data_dir": Without("Set data.test to the file."),
    "split.seed": Without("One seed draws everything: seed."),
    "split.shuffle": Without("Rows are drawn by the seed.", matters=False),
}
WIRING = Without("How the script is wired.", matters=False)
SFT_ADVICE = {
    "config.packing": Without("Samples are always packed, and never see each other.", matters=False),
    "config.packing_strategy": Without("Samples are always packed, and never see each other.", matters=False),
    "config.padding_free": Without("Nothing is padded.", matters=False),
    "config.pad_to_multiple_of": Without("Nothing is padded.", matters=False),
    "config.dataset_text_field": Without("Rows with pictures have columns or messages: data.columns.", matters=False),
    "config.dataset_kwargs": Without("Rows are prepared by the workers.", matters=False),
    "config.dataset_num_proc": Without("See data.workers.", matters=False),
    "config.completion_only_loss": Without("Only answers are learned."),
    "config.assistant_only_loss": Without("Only answers are learned.", matters=False),
    "config.truncation_mode": Without("Text is never cut: data.on_long."),
    "config.activation_offloading": Without("Set memory.offload=inputs where memory is short."),
    "config.eos_token": Without("The chat template's own end mark.", matters=False),
    "config.pad_token": Without("Nothing is padded.", matters=False),
    "config.chat_template_path": Without("The checkpoint's own chat template."),
    "config.loss_type": Without("Cross-entropy over answer tokens, summed and divided once per step."),
}
CONFIG_ADVICE = {
    "config.model_init_kwargs": Without("Weights are loaded in 16 bits, or in 4 or 8 by tune.method."),
    "config.trust_remote_code": Without("No code of a checkpoint is ever run.", matters=False),
    "config.use_cache": Without("Not needed.", matters=False),
}
OTHER_ADVICE = {
    **{f"trainer.{name}": WIRING for name in ("args", "train_dataset", "eval_dataset", "processing_class", "tokenizer",
       "data_collator", "peft_config", "reward_processing_classes", "callbacks")},
    **{f"trainer.{name}": Without("An older place for what SFTConfig holds.") for name in ("packing", "dataset_text_field")},
    "trainer.formatting_func": Without("Name the columns with data.columns, or write rows with `messages`."),
    "trainer.compute_metrics": Without("Name or write a metric: eval.metric, docs/evaluation.md."),
    "load.attn_implementation": Without("Chosen by the machine; `lensmith env` says which.", matters=False),
    "load.device_map": Without("One process per GPU; `lensmith plan` says what fits.", matters=False),
    "load.trust_remote_code": Without("No code of a checkpoint is ever run.", matters=False),
    "load.quantization_config": WIRING,
    "load.low_cpu_mem_usage": Without("Weights never lie in memory twice.", matters=False),
    "load.use_cache": Without("Not needed.", matters=False),
    "load.token": Without("Log in with `hf auth login`; a token does not belong into a file."),
    "load.revision": Without("Give a local folder to hold a model at a revision."),
    "load.cache_dir": Without("Set HF_HOME.", matters=False),
    "quant.bnb_4bit_quant_type": Without("qlora is NF4.", same=("nf4",)),
    "quant.bnb_4bit_compute_dtype": Without("The run's precision.", matters=False),
    "quant.bnb_4bit_use_double_quant": Without("Decided by tune.method=qlora.", matters=False),
    "quant.bnb_4bit_quant_storage": Without("Not needed.", matters=False),
    "quant.llm_int8_skip_modules": Without("Tower and mergers stay in 16 bits unless tune.quantise_vision."),
    "processor.pretrained_model_name_or_path": Without("The processor is the model's own.", matters=False),
    "processor.use_fast": Without("Not needed.", matters=False),
    "processor.trust_remote_code": Without("No code of a checkpoint is ever run.", matters=False),
    "processor.padding_side": Without("Nothing is padded.", matters=False),
    "responses.instruction_part": Without("Only answers are learned.", matters=False),
    "responses.response_part": Without("Only answers are learned.", matters=False),
}  # fmt: skip


def _model(loaded: Any, trained: Any) -> Any:
    return meaning.model_name(loaded if isinstance(loaded, str) else trained)


def model_rules() -> tuple[Rule, ...]:
    return (
        Rule({"load.pretrained_model_name_or_path": None, "trainer.model": None}, "model", _model, assume=False),
        Rule({"quant.load_in_4bit": False, "quant.load_in_8bit": False, "lora.": None}, "tune.method", from_quant, beside=1),
        Rule({"lora.": None}, "tune.vision", _whole),
        Rule({"lora.": None}, "tune.merger", _whole),
        Rule({"processor.size": None, "processor.max_pixels": None}, "data.image.max_tokens",
             lambda size, area: pixels_of(size, area, "longest_edge"), "One token is 32 x 32 pixels.", assume=False),
        Rule({"processor.size": None, "processor.min_pixels": None}, "data.image.min_tokens",
             lambda size, area: pixels_of(size, area, "shortest_edge"), "One token is 32 x 32 pixels.", assume=False),
        Rule({"load.dtype": None, "load.torch_dtype": None}, "precision",
             lambda dtype, older: _dtype(dtype if dtype is not None else older), assume=False),
    )  # fmt: skip


def target_rules(names: Sequence[str] = ("lora.target_modules",)) -> tuple[Rule, ...]:
    """Which parts get adapters, from a list of modules or all-linear."""
    key = dict.fromkeys(names)

    def given(answer: Any) -> Any:
        return lambda value: SKIP if value is None else answer(value)

    return (
        Rule(key, "tune.language", given(meaning.language), assume=False),
        Rule(key, "tune.attention", given(lambda value: meaning.reaches(value, "attention")), assume=False),
        Rule(key, "tune.mlp", given(lambda value: meaning.reaches(value, "mlp")), assume=False),
        Rule(key, "tune.vision", given(lambda value: meaning.component(value, "vision")), assume=False),
        Rule(key, "tune.merger", given(lambda value: meaning.component(value, "merger")), assume=False),
    )


def trl_table(task: Task) -> Table:
    defaults = {"learning_rate": 2e-5 if task == "sft" else 1e-6, "logging_steps": 10}
    common = (*model_rules(), *DATA_RULES, *lora_rules(), *target_rules(), *training_rules("config.", **defaults),
              Rule({"config.gradient_checkpointing": True}, "memory.recompute", meaning.recompute),
              Rule({"config.learning_rate": defaults["learning_rate"], "lora.": None, "lora.target_modules": None},
                   "optim.vision_learning_rate", tower_rate, TOWER_RATE_NOTE, beside=2))  # fmt: skip
    advice = {f"config.{name}": told for name, told in ADVICE.items()} | CONFIG_ADVICE | OTHER_ADVICE
    advice |= LORA_ADVICE | DATA_ADVICE
    if task == "sft":
        length = {"config.max_length": None, "config.max_seq_length": None, "trainer.max_seq_length": None}
        rules = (
            *common,
            *sample_rules("config."),
            Rule(length, "pack.tokens", first_length, LENGTH_NOTE, assume=False),
        )
        return Table("trl", VERSION, rules, advice | SFT_ADVICE, UNSET)
    rules = (
        *common, *completion_rules("config."), *grpo_rules("config."),
        Rule({"trainer.reward_funcs": None, "config.reward_weights": None}, "grpo.rewards", own_rewards, assume=False),
    )  # fmt: skip
    return Table("trl", VERSION, rules, advice | {f"config.{name}": told for name, told in GRPO_ADVICE.items()}, UNSET)
