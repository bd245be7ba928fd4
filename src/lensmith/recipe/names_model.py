"""What the keywords of FastVisionModel and of the data collator mean here, with the defaults they have at home.

Signatures: unslothai/unsloth, unsloth/models/loader.py and vision.py; unslothai/unsloth-zoo, unsloth_zoo/vision_utils.py;
2026.10. docs/recipe.md is written from these tables.
"""

from __future__ import annotations

from lensmith.recipe.keywords import Keyword, idle, refused

PIXELS_PER_TOKEN = 32 * 32
"""One language token is a patch of 16 pixels merged 2 x 2 (Qwen3-VL's config.json)."""
UNSLOTH_SEED = 3407
_NO_VLLM = "the model that trains is no vLLM's; GRPOConfig(use_vllm=True) has one beside it"

FROM_PRETRAINED: dict[str, Keyword] = {
    "model_name": Keyword("unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", "`model`; lensmith/tiny where left out"),
    "max_seq_length": Keyword(
        2048, "`pack.tokens` where given: a row over it gets smaller images or is refused, its text is never cut"
    ),
    "dtype": Keyword(None, "`precision`: bf16, fp16 on older GPUs, fp32 on a CPU"),
    "load_in_4bit": Keyword(True, "`tune.method=qlora`; the image tower stays in 16 bits"),
    "load_in_8bit": Keyword(False, "`tune.method=lora_8bit`"),
    "load_in_16bit": Keyword(False, "`tune.method=lora`"),
    "full_finetuning": Keyword(False, "`tune.method=full`"),
    "use_gradient_checkpointing": Keyword(
        "unsloth", '`memory.recompute=layers`; "unsloth" adds `memory.offload=inputs`, False is `memory.recompute=none`'
    ),
    "random_state": Keyword(UNSLOTH_SEED, "`seed`, unless the trainer's arguments have one"),
    "offload_embedding": Keyword(False, "`memory.embedding=host`"),
    "max_pixels": Keyword(None, "`data.image.max_tokens` = max_pixels / 1024; 1280 tokens where left out"),
    "min_pixels": Keyword(None, "`data.image.min_tokens` = min_pixels / 1024"),
    "settings": Keyword(None, "of our own: any setting of docs/config.md, as in `{'memory.head': 'host'}`"),
    "device_map": idle("sequential", "each process computes on its own GPU, or on the CPU"),
    "fast_inference": idle(False, _NO_VLLM),
    "gpu_memory_utilization": idle(0.5, _NO_VLLM),
    "float8_kv_cache": idle(False, _NO_VLLM),
    "max_lora_rank": idle(64, _NO_VLLM),
    "disable_log_stats": idle(True, _NO_VLLM),
    "fix_tokenizer": idle(True, "the checkpoint's own tokenizer is used as it is"),
    "trust_remote_code": idle(False, "no code of a checkpoint is ever run"),
    "return_logits": idle(False, "training never makes the logits of unlearned tokens"),
    "fullgraph": idle(True, "nothing is compiled"),
    "unsloth_force_compile": idle(False, "nothing is compiled"),
    "unsloth_tiled_mlp": idle(False, "`lensmith plan` shows what saves memory here"),
    "use_exact_model_name": idle(False, "names are always taken as they are written"),
    "attn_implementation": idle(None, "attention over packs is chosen by what is installed; `lensmith env` says which"),
    "local_files_only": idle(False, "a folder, or what is in the cache, is used before the Hub is asked"),
    "token": refused(
        None, "Run `hf auth login`, or set the variable HF_TOKEN; a token in a script is soon in a repository."
    ),
    "revision": refused(None, "Download that revision with `hf download --revision` and name its folder."),
    "rope_scaling": refused(None, "Set it in the config.json of a copy of the model."),
    "resize_model_vocab": refused(None, "The vocabulary stays the checkpoint's."),
    "auto_model": refused(None, "Lensmith trains Qwen3-VL alone."),
    "qat_scheme": refused(None, "Quantise after training, with `lensmith export --to gguf`."),
    "load_in_fp8": refused(False, "Use load_in_4bit=True or load_in_8bit=True."),
    "float32_mixed_precision": refused(None, "Adapters are fp32 always; set dtype=torch.float32 for the rest."),
    "target_parameters": refused(None, "It is for mixtures of experts, which Lensmith does not train."),
    "text_only": refused(False, "Rows without images train as they are."),
    "whisper_language": refused(None, "It is for speech models."),
    "whisper_task": refused(None, "It is for speech models."),
}
FROM_PRETRAINED_RENAMED = {
    "model_name_or_path": "model_name",
    "pretrained_model_name_or_path": "model_name",
    "max_length": "max_seq_length",
    "torch_dtype": "dtype",
}

GET_PEFT_MODEL: dict[str, Keyword] = {
    "r": Keyword(16, "`tune.rank`"),
    "lora_alpha": Keyword(16, "`tune.alpha`"),
    "lora_dropout": Keyword(0.0, "`tune.dropout`; above 0 it turns prefix sharing off"),
    "target_modules": Keyword(
        None, "`tune.attention` and `tune.mlp`: all seven projections, the four of attention, or the three"
    ),
    "finetune_vision_layers": Keyword(
        True, "`tune.vision`; **frozen where left out**: the tower rarely needs it and costs memory, time and stability"
    ),
    "finetune_language_layers": Keyword(True, "`tune.language`"),
    "finetune_attention_modules": Keyword(True, "`tune.attention`, of the decoder"),
    "finetune_mlp_modules": Keyword(True, "`tune.mlp`, of the decoder"),
    "use_gradient_checkpointing": FROM_PRETRAINED["use_gradient_checkpointing"],
    "random_state": Keyword(UNSLOTH_SEED, "draws the adapter, and is `seed` unless the trainer's arguments have one"),
    "use_rslora": Keyword(False, "`tune.rslora`"),
    "use_dora": Keyword(False, "`tune.dora`"),
    "task_type": idle("CAUSAL_LM", "the task is the model's"),
    "max_seq_length": idle(
        2048, "from_pretrained and the trainer's arguments have it; Unsloth does not use it here either"
    ),
    "temporary_location": idle("_unsloth_temporary_saved_buffers", "nothing is buffered on disk"),
    "ensure_weight_tying": idle(False, "tied weights stay tied"),
    "bias": refused("none", "Adapters here have no biases."),
    "finetune_last_n_layers": refused(None, "Adapters go to all layers."),
    "layers_to_transform": refused(None, "Adapters go to all layers."),
    "layers_pattern": refused(None, "Adapters go to all layers."),
    "modules_to_save": refused(None, "Embedding and head stay as they are; settings of `tune` train whole components."),
    "init_lora_weights": refused(True, "A fresh adapter changes nothing here: PEFT's default."),
    "loftq_config": refused({}, "Adapters start at zero beside NF4 weights."),
    "qat_scheme": refused(None, "Quantise after training, with `lensmith export --to gguf`."),
    "target_parameters": refused(None, "It is for mixtures of experts, which Lensmith does not train."),
    "finetune_audio_layers": refused(False, "Qwen3-VL hears nothing."),
}
GET_PEFT_MODEL_RENAMED = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}

COLLATOR: dict[str, Keyword] = {
    "max_seq_length": Keyword(None, "`pack.tokens`, as from_pretrained has it"),
    "formatting_func": Keyword(None, "called with each row before it is read"),
    "resize": Keyword(
        "min",
        '**images keep their size** up to max_pixels ("min" shrinks them to 512 px at home); (width, height) limits tokens',
    ),
    "completion_only_loss": idle(True, "only answers are learned, always"),
    "train_on_responses_only": idle(False, "only answers are learned, always"),
    "instruction_part": idle(None, "what is an answer is known from the roles, not searched in the text"),
    "response_part": idle(None, "what is an answer is known from the roles, not searched in the text"),
    "force_match": idle(True, "what is an answer is known from the roles, not searched in the text"),
    "ignore_index": idle(-100, "labels never leave the engine"),
    "num_proc": idle(None, "dataloader_num_workers has it"),
    "pad_to_multiple_of": idle(None, "nothing is padded"),
    "snap_to_patch_size": idle(False, "images always end on a whole token, as the checkpoint's processor cuts them"),
    "resize_dimension": idle(0, "images are resized as the checkpoint's processor does"),
    "last_response_only": refused(False, "Every answer of a row is learned; split a long chat into rows."),
}
COLLATOR_RENAMED = {"max_length": "max_seq_length", "tokenizer": "processor"}
