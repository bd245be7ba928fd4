"""The recipe's keywords: what is understood, what is said, what is refused; and the rows that it writes down."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import lensmith
from lensmith import FastVisionModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, VisionDataCollator
from lensmith.data.source import read_samples
from lensmith.errors import ConfigError, DataError, ModelError, RunError
from lensmith.recipe.names_model import COLLATOR, FROM_PRETRAINED, GET_PEFT_MODEL
from lensmith.recipe.names_training import GRPO, GRPO_TRAINER, SFT, SFT_TRAINER
from lensmith.recipe.rows import keep_rows
from lensmith.recipe.speech import RenamedWarning, forget_said
from lensmith.rundir import RunDir

ROWS = [{"question": "Which colour?", "answer": "red"}, {"question": "Which colour?", "answer": "blue"}]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forget_said()


@pytest.fixture
def base():
    model, _ = FastVisionModel.from_pretrained("lensmith/tiny", load_in_4bit=False)
    return model


@pytest.fixture
def model(base):
    return FastVisionModel.get_peft_model(base, r=4, finetune_vision_layers=False)


# --- keywords -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: SFTConfig(learning_rat=1e-4),
            r"SFTConfig: there is no keyword learning_rat .* Did you mean learning_rate\?",
        ),
        (lambda: SFTConfig(zzz=1), r"SFTConfig: there is no keyword zzz \(given 1\)\. docs/recipe\.md lists"),
        (lambda: GRPOConfig(num_generation=4), r"Did you mean num_generations\?"),
        (lambda: FastVisionModel.from_pretrained("lensmith/tiny", load_in_4_bit=True), r"Did you mean load_in_4bit\?"),
        (
            lambda: SFTConfig(max_length=1, max_seq_length=2),
            r"max_seq_length and max_length are one setting by two names",
        ),
        (
            lambda: SFTConfig(label_smoothing_factor=0.1),
            r"label_smoothing_factor=0\.1 cannot be honoured here\. Labels are not",
        ),
        (lambda: SFTConfig(deepspeed="ds.json"), r"deepspeed='ds\.json' cannot be honoured here\. Use `torchrun"),
    ],
)
def test_a_keyword_that_is_unknown_or_cannot_be_honoured_is_an_error(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()


@pytest.mark.parametrize(
    "tables",
    [FROM_PRETRAINED, GET_PEFT_MODEL, COLLATOR, SFT, GRPO, SFT_TRAINER, GRPO_TRAINER],
    ids=lambda table: str(len(table)),
)
def test_every_keyword_says_what_becomes_of_it(tables):
    assert len(tables) >= 10
    assert all(keyword.here and not keyword.here.endswith("..") for keyword in tables.values())
    assert all(keyword.here.endswith(".") for keyword in tables.values() if keyword.kind == "refused")


def test_refused_keywords_are_welcome_with_the_default_they_have_at_home(base):
    FastVisionModel.get_peft_model(base, bias="none", loftq_config=None, modules_to_save=None, init_lora_weights=True)
    SFTConfig(push_to_hub=False, label_smoothing_factor=0.0, fsdp="")


def test_a_keyword_without_effect_is_said_once(capsys):
    for _ in range(2):
        SFTConfig(packing=True, remove_unused_columns=False, dataset_text_field="")
    told = capsys.readouterr().err
    assert told.count("SFTConfig: without effect here: packing (packing is always on, and changes no loss); ") == 1
    assert "remove_unused_columns, dataset_text_field (rows are read as they are)." in told


def test_old_names_are_understood_with_one_warning():
    with pytest.warns(RenamedWarning) as warned:
        args = SFTConfig("out", max_seq_length=64, warmup_ratio=0.2, evaluation_strategy="no")
    assert len(warned) == 1
    assert "max_seq_length is max_length today, warmup_ratio is warmup_steps today, evaluation_strategy is" in str(
        warned[0].message
    )
    assert Path(warned[0].filename) == Path(__file__)
    assert (args.max_length, args.max_seq_length, args.warmup_steps, args.output_dir) == (64, 64, 0.2, "out")


def test_arguments_can_be_read_and_changed_as_notebooks_do():
    args = SFTConfig("out")
    assert (args.learning_rate, args.num_train_epochs) == (5e-5, 3.0)
    args.learning_rate = 1e-3
    assert args.learning_rate == 1e-3
    assert repr(args) == "SFTConfig(output_dir='out', learning_rate=0.001)"
    with pytest.raises(ConfigError, match="no keyword learning_rates"):
        args.learning_rates = 1
    with pytest.raises(AttributeError, match="SFTConfig has no nothing"):
        _ = args.nothing


# --- the model ------------------------------------------------------------------------------------------------------------


def test_the_guide_s_model_name_does_not_exist_and_the_sentence_says_which_do():
    with pytest.raises(ModelError, match="Qwen3-VL-7B"):
        FastVisionModel.from_pretrained("unsloth/Qwen3-VL-7B")


def test_loading_in_a_16_bit_type_without_a_gpu_becomes_float32_and_is_said(capsys):
    model, _ = FastVisionModel.from_pretrained("lensmith/tiny", dtype=torch.bfloat16, load_in_4bit=False)
    assert model.dtype is torch.float32
    assert (
        "dtype=torch.bfloat16: there is no GPU here, so the model computes in float32 on the CPU."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("keywords", "method"),
    [
        ({}, "qlora"),
        ({"load_in_4bit": False}, "lora"),
        ({"load_in_16bit": True}, "lora"),
        ({"load_in_4bit": False, "full_finetuning": True}, "full"),
    ],
)
def test_how_a_model_is_loaded_becomes_tune_method(keywords, method):
    model, _ = FastVisionModel.from_pretrained("lensmith/tiny", **keywords)
    if method != "full":
        model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False)
    trainer = SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS)
    assert trainer.config.tune.method == method


@pytest.mark.parametrize(
    ("value", "recompute", "offload"),
    [("unsloth", "layers", "inputs"), (True, "layers", "none"), (False, "none", "none")],
)
def test_use_gradient_checkpointing_is_recompute_and_offload(base, value, recompute, offload):
    model = FastVisionModel.get_peft_model(base, finetune_vision_layers=False, use_gradient_checkpointing=value)
    memory = SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS).config.memory
    assert (memory.recompute, memory.offload) == (recompute, offload)


@pytest.mark.parametrize(
    ("keywords", "found"),
    [
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {"attention": True, "mlp": False}),
        ({"target_modules": "all-linear", "finetune_attention_modules": False}, {"attention": False, "mlp": True}),
        ({"lora_alpha": 32, "use_rslora": True, "random_state": 7}, {"alpha": 32, "rslora": True}),
    ],
)
def test_adapters_are_what_was_asked_for(base, keywords, found):
    model = FastVisionModel.get_peft_model(base, finetune_vision_layers=False, **keywords)
    tune = SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS).config.tune.model_dump()
    assert {name: tune[name] for name in found} == found


def test_what_cannot_be_adapted_is_a_sentence(base, model):
    with pytest.raises(ConfigError, match="this model has adapters already"):
        FastVisionModel.get_peft_model(model)
    fresh, _ = FastVisionModel.from_pretrained("lensmith/tiny", load_in_4bit=False)
    with pytest.raises(ConfigError, match=r"target_modules is \['q_proj'\], but must be all of attention"):
        FastVisionModel.get_peft_model(fresh, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="this model has no adapter, so nothing would train"):
        SFTTrainer(fresh, SFTConfig("out"), train_dataset=ROWS)
    with pytest.raises(ConfigError, match="model is 'Qwen/x', but must come from FastVisionModel"):
        SFTTrainer("Qwen/x", SFTConfig("out"), train_dataset=ROWS)


# --- arguments ------------------------------------------------------------------------------------------------------------


def test_the_notebook_s_arguments_become_settings(model, capsys):
    args = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=30, learning_rate=2e-4,
        logging_steps=1, optim="adamw_8bit", weight_decay=0.001, lr_scheduler_type="linear", seed=3407, output_dir="outputs",
        report_to="none", remove_unused_columns=False, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True},
        max_length=2048,
    )  # fmt: skip
    config = SFTTrainer(model, args, train_dataset=ROWS).config
    optim = config.optim
    assert (optim.effective_samples, optim.steps, optim.learning_rate, optim.schedule) == (8, 30, 2e-4, "linear")
    assert round(optim.warmup * 30) == 5
    assert (optim.name, optim.weight_decay, config.seed, config.pack.tokens) == ("adamw", 0.001, 3407, 2048)
    assert (str(config.run), config.data.test, config.log.report_to) == ("outputs", None, [])
    assert "optim=adamw_8bit: there is no GPU here, so AdamW keeps its states in 32 bits." in capsys.readouterr().err


def test_grpo_fills_a_step_up_to_whole_groups_and_says_so(model, capsys):
    args = GRPOConfig("out", per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=2, beta=0.04)
    config = GRPOTrainer(model, args, train_dataset=ROWS, reward_funcs="exact").config
    assert (config.optim.effective_samples, config.grpo.group, config.grpo.beta, config.grpo.loss) == (
        2,
        2,
        0.04,
        "dapo",
    )
    assert config.grpo.rewards == [{"name": "exact", "weight": 1.0}]
    assert "A step of 1 completions is filled up to 2: whole groups of num_generations=2." in capsys.readouterr().err


def test_use_vllm_is_the_rollouts_engine_and_its_keywords_count_with_it_alone(model, capsys):
    shared = {"num_generations": 2, "per_device_train_batch_size": 2, "vllm_gpu_memory_utilization": 0.4}
    args = GRPOConfig("out", use_vllm=True, **shared)
    rollout = GRPOTrainer(model, args, train_dataset=ROWS, reward_funcs="exact").config.rollout
    assert (rollout.engine, rollout.vllm_mode, rollout.vllm_gpu_share) == ("vllm", "colocate", 0.4)
    args = GRPOConfig("out", use_vllm=True, vllm_mode="server", vllm_server_port=8001, **shared)
    rollout = GRPOTrainer(model, args, train_dataset=ROWS, reward_funcs="exact").config.rollout
    assert (rollout.vllm_mode, rollout.vllm_server) == ("server", "http://127.0.0.1:8001")
    assert 'without effect here: vllm_gpu_memory_utilization (vllm_mode is "server")' in capsys.readouterr().err
    rollout = GRPOTrainer(model, GRPOConfig("out", **shared), train_dataset=ROWS, reward_funcs="exact").config.rollout
    assert rollout.engine == "auto"
    assert "without effect here: vllm_gpu_memory_utilization (use_vllm is not True)" in capsys.readouterr().err


def test_a_wrong_value_is_told_by_the_keyword_it_was_given_as(model):
    with pytest.raises(ConfigError, match=r"SFTConfig\(learning_rate=\): optim\.learning_rate is -1"):
        SFTTrainer(model, SFTConfig("out", learning_rate=-1), train_dataset=ROWS)
    with pytest.raises(
        ConfigError, match=r"SFTConfig\(settings=\): there is no setting tune\.rnk .* Did you mean tune\.rank"
    ):
        SFTTrainer(model, SFTConfig("out", settings={"tune.rnk": 1}), train_dataset=ROWS)
    with pytest.raises(ConfigError, match=r"SFTConfig\(settings=\): tune\.rank was decided when the model was loaded"):
        SFTTrainer(model, SFTConfig("out", settings={"tune.rank": 64}), train_dataset=ROWS)
    with pytest.raises(ConfigError, match=r"max_pixels is 100, but must be a number of pixels from 1024 on"):
        SFTTrainer(model, SFTConfig("out", max_pixels=100), train_dataset=ROWS)


def test_arguments_of_another_library_and_foreign_collators_are_sentences(model):
    from trl import SFTConfig as TheirConfig

    with pytest.raises(ConfigError, match=r"args is a trl\.SFTConfig, .*: from lensmith import SFTConfig"):
        SFTTrainer(model, TheirConfig("out", bf16=False, use_cpu=True), train_dataset=ROWS)
    with pytest.raises(ConfigError, match="data_collator is a function, but rows are packed here"):
        SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS, data_collator=lambda rows: rows)
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        SFTTrainer(model, SFTConfig("out"))


def test_arguments_that_once_were_the_trainer_s_are_moved(model):
    with pytest.warns(RenamedWarning, match="understood max_seq_length, dataset_text_field as of SFTConfig"):
        trainer = SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS, max_seq_length=512, dataset_text_field="text")
    assert trainer.config.pack.tokens == 512


def test_the_collator_s_arguments_are_understood(model, capsys):
    collator = lensmith.UnslothVisionDataCollator(
        model,
        None,
        resize=512,
        max_seq_length=1024,
        train_on_responses_only=True,
        instruction_part="a",
        response_part="b",
    )
    assert isinstance(collator, VisionDataCollator)
    config = SFTTrainer(model, SFTConfig("out"), train_dataset=ROWS, data_collator=collator).config
    assert (config.data.image.max_tokens, config.pack.tokens) == (256, 1024)
    told = capsys.readouterr().err
    assert "VisionDataCollator(resize=512): images keep their shape, and cost 256 tokens at most." in told
    assert "train_on_responses_only (only answers are learned, always)" in told
    with pytest.raises(ConfigError, match="rows are packed by the trainer"):
        collator([])


# --- rows -----------------------------------------------------------------------------------------------------------------


def read_back(rows, **more) -> list:
    kept = keep_rows(rows, RunDir("out"), "train_dataset", **more)
    lines = [json.loads(line) for line in Path(kept.path).read_text().splitlines()]
    assert len(lines) == kept.num_rows
    return lines


def chat(image) -> dict:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}


def test_pictures_in_memory_become_lossless_files_once_and_all_else_stays():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    encoded = "data:image/png;base64," + base64.b64encode(b"...").decode()
    rows = [chat(picture), chat(picture), chat("a/b.png"), chat(encoded), chat("https://example.org/a.png")]
    rows.append({"question": "?", "answer": np.int64(3), "image": [picture], "extra": {"when": Path("x")}})
    lines = read_back(rows)
    named = [line["messages"][0]["content"][0]["image"] for line in lines[:5]]
    assert named[2:] == ["a/b.png", encoded, "https://example.org/a.png"]
    assert named[0] == named[1] == lines[5]["image"][0]
    assert read_back([chat(np.asarray(picture))])[0]["messages"][0]["content"][0]["image"] == named[0]
    assert (lines[5]["answer"], lines[5]["extra"]) == (3, {"when": "x"})
    with Image.open(named[0]) as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
    assert len(list(Path("out/rows/pictures").iterdir())) == 1
    assert read_samples("out/rows/train.jsonl")[0].answer == "red"


def test_lists_datasets_generators_and_paths_are_rows():
    assert read_back(ROWS) == ROWS
    assert read_back(row for row in ROWS) == ROWS
    assert read_back(datasets.Dataset.from_list(ROWS)) == ROWS
    assert read_back(datasets.Dataset.from_list(ROWS).to_iterable_dataset()) == ROWS
    assert read_back(lensmith.Dataset.from_list(ROWS)) == ROWS
    kept = keep_rows("out/rows/train.jsonl", RunDir("other"), "train_dataset")
    assert (kept.path, kept.num_rows) == ("out/rows/train.jsonl", 2)


def test_pictures_of_a_hugging_face_data_set_keep_their_bytes():
    Image.new("RGB", (8, 8), "red").save("red.jpg")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    content = Path("red.jpg").read_bytes()
    rows = datasets.Dataset.from_list([{"image": {"bytes": content, "path": None}, "text": "red"}], features=features)
    assert Path(read_back(rows)[0]["image"]).read_bytes() == content


def test_prompt_rows_get_their_answer_as_a_turn_and_keep_it_as_a_column():
    prompt = [{"role": "user", "content": "How many?"}]
    answered = [*prompt, {"role": "assistant", "content": "3"}]
    assert read_back([{"prompt": prompt, "answer": 3}]) == [{"messages": answered, "answer": 3}]
    assert read_back([{"prompt": prompt, "completion": answered[1:]}]) == [{"messages": answered}]
    with pytest.raises(DataError, match=r"train_dataset\[0\]: has a prompt, but neither a completion nor an answer"):
        read_back([{"prompt": prompt}])


def test_formatting_func_changes_rows_and_may_return_messages():
    assert read_back(ROWS, formatting_func=lambda row: {**row, "answer": "x"})[1]["answer"] == "x"
    turns = chat("a.png")["messages"]
    assert read_back(ROWS, formatting_func=lambda _: turns)[0] == {"messages": turns}
    with pytest.raises(DataError, match=r"train_dataset\[0\]: formatting_func returned a str, but a row is a dict"):
        read_back(ROWS, formatting_func=lambda _: "<|im_start|>user")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "train_dataset: holds no rows"),
        (
            {"train": ROWS, "test": ROWS},
            r"holds train, test, but one list of rows is needed, as in train_dataset=rows\['train'\]",
        ),
        (3, "is a int, but must be rows"),
        ([{"answer": object()}], r"train_dataset\[0\]: holds a object, which no file of rows can hold"),
        ([{"image": np.zeros((3, 8, 8))}], r"train_dataset\[0\]: holds a ndarray, which no file of rows can hold"),
        (["text"], r"train_dataset\[0\]: is a str, but a row is a dict"),
    ],
)
def test_what_is_no_rows_is_a_sentence(rows, sentence):
    with pytest.raises(DataError, match=sentence):
        keep_rows(rows, RunDir("out"), "train_dataset")


def test_a_folder_of_somebody_s_files_is_left_alone(model):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("...")
    with pytest.raises(RunError, match=r"mine: holds thesis\.tex but no run"):
        SFTTrainer(model, SFTConfig("mine"), train_dataset=ROWS)


def test_a_run_is_not_gone_on_with_by_other_rows():
    keep_rows(ROWS, RunDir("out"), "train_dataset")
    RunDir("out").config_path.write_text("")
    with RunDir("out").save_checkpoint(1, keep=1) as folder:
        (folder / "weights").write_text("x")
    keep_rows(ROWS, RunDir("out"), "train_dataset")
    with pytest.raises(RunError, match="holds a run that learned from other rows"):
        keep_rows(ROWS[:1], RunDir("out"), "train_dataset")


# --- Dataset --------------------------------------------------------------------------------------------------------------


def test_dataset_has_the_methods_of_recipes():
    rows = lensmith.Dataset.from_dict({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert (len(rows), rows.column_names, rows["b"], rows[-1]) == (3, ["a", "b"], ["x", "y", "z"], {"a": 3, "b": "z"})
    assert list(rows.map(lambda row: {"c": row["a"] * 2}, remove_columns=["a"], num_proc=2))[1] == {"b": "y", "c": 4}
    assert [row["a"] for row in rows.filter(lambda row: row["a"] > 1).select([1, 0])] == [3, 2]
    assert sorted(rows.shuffle(seed=1)["a"]) == [1, 2, 3]
    split = rows.train_test_split(test_size=0.34)
    assert (len(split["train"]), len(split["test"])) == (2, 1)
    assert rows.rename_column("a", "n").remove_columns("b").column_names == ["n"]
    assert repr(rows[:2]) == "Dataset({features: ['a', 'b'], num_rows: 2})"
    with pytest.raises(DataError, match="there is no column 'q' among a, b"):
        _ = rows["q"]
    with pytest.raises(DataError, match=r"Dataset\.map: there is no keyword batched"):
        rows.map(dict, batched=True)
    with pytest.raises(DataError, match="columns differ in length"):
        lensmith.Dataset.from_dict({"a": [1], "b": []})


# --- saving ---------------------------------------------------------------------------------------------------------------


def test_saving_before_training_is_a_sentence(model):
    with pytest.raises(RunError, match="save_pretrained_merged: this model has not been trained yet"):
        model.save_pretrained_merged("out")
    with pytest.raises(ConfigError, match="save_method is 'merged_4bit', but must be one of merged_16bit"):
        model.save_pretrained_merged("out", None, "merged_4bit")
    with pytest.raises(ConfigError, match="token='hf_x' cannot be honoured here"):
        model.push_to_hub_merged("me/model", token="hf_x")
    model.save_pretrained("adapter")
    assert {path.name for path in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
