"""Makes the tokenizer, processor and configuration of lensmith/tiny: everything but its weights.

    python -m tools.tiny.tokenizer --out src/lensmith/model/tiny --template qwen3_vl.jinja

The vocabulary is a byte-level BPE with Qwen's own pre-tokenisation rule (so numbers are single digits), trained on text
that tasks.py makes and on its word list; no outside corpus. After it come Qwen3-VL's special tokens in the order in
which they follow the vocabulary of the real checkpoints. The chat template is the real one, a copy of which TRL carries
(trl/chat_templates/qwen3_vl.jinja, Apache-2.0, by the Qwen team).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.tiny.tasks import WORDS, make_item

VOCAB_SIZE = 2048
SEED = 20261123
NUM_ITEMS = 3000
QUESTIONS_PER_ITEM = 8

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
NOT_SKIPPED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
"""Added tokens that decoding keeps when it skips special ones, as in the real tokenizer_config.json."""

TOKEN_PX = 32
MIN_TOKENS, MAX_TOKENS = 4, 1280
"""Language tokens per image: the processor's limits, TOKEN_PX squared pixels each."""


def corpus() -> Iterator[str]:
    """Questions and answers as they will be asked, and each word alone, after a space and with a capital."""
    for index in range(NUM_ITEMS):
        width, height = ((64, 64), (128, 128))[index % 2]
        for question in make_item(SEED, index, width, height, QUESTIONS_PER_ITEM).questions:
            yield question.text
            yield question.answer
    yield from ("user\nassistant\nsystem\n" for _ in range(NUM_ITEMS))
    for word in WORDS:
        yield from [f"{word}", f"the {word}", f"a {word} is", word] * 6
        yield f"{word.capitalize()} {word.upper()}"


def train_tokenizer() -> Any:
    """A Qwen2Tokenizer of VOCAB_SIZE tokens, special ones included."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(NOT_SKIPPED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    for text in (*SPECIAL, *NOT_SKIPPED):
        bpe.add_tokens([AddedToken(text, special=text in SPECIAL, normalized=False)])
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "extra_special_tokens": [text for text in SPECIAL if text not in ("<|endoftext|>", "<|im_end|>")],
        "model_max_length": 4096,
        "padding_side": "left",
    }
    # Through files, as the real one is loaded: the class itself would number its end mark before all other special tokens.
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for how_it_was_loaded in ("is_local", "local_files_only"):  # would be saved as settings
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    return tokenizer


def build_processor(tokenizer: Any, template: str) -> Any:
    """Qwen3VLProcessor with the real checkpoints' image settings, but for the least and most pixels of an image."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = [0.5, 0.5, 0.5]
    pixels = {"shortest_edge": MIN_TOKENS * TOKEN_PX**2, "longest_edge": MAX_TOKENS * TOKEN_PX**2}
    geometry = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": half, "image_std": half}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **geometry),
        tokenizer,
        Qwen3VLVideoProcessor(size=dict(pixels), **geometry),
        chat_template=template,
    )


def build_config(tokenizer: Any) -> Any:
    """About 5.2 million parameters with all that makes Qwen3-VL hard: deepstack, M-RoPE sections, grouped KV heads."""
    from transformers import Qwen3VLConfig

    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            # Time, height, width; interleaved, so three times the second and third must stay within head_dim / 2.
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": 192,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="bfloat16",
    )


def write_folder(out: Path, template: str) -> None:
    """Writes config.json, generation_config.json, the tokenizer's and the processor's files into `out`."""
    from transformers import GenerationConfig

    tokenizer = train_tokenizer()
    build_processor(tokenizer, template).save_pretrained(out)
    config = build_config(tokenizer)
    config.save_pretrained(out)
    GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--template", type=Path, help="chat template; by default TRL's copy of the real one")
    options = parser.parse_args()
    if options.template is None:
        import trl

        options.template = Path(trl.__file__).parent / "chat_templates" / "qwen3_vl.jinja"
    write_folder(options.out, options.template.read_text(encoding="utf-8"))
