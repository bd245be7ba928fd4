"""Settings are read as people mean them, and every mistake is answered with file, line, value and way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lensmith.config.read import read_config
from lensmith.config.rules import CONTRADICTIONS, WITHOUT_EFFECT
from lensmith.config.schema import list_sections, list_settings
from lensmith.config.starter import write_starter
from lensmith.config.suggest import ALSO, FOREIGN
from lensmith.config.tree import RunConfig
from lensmith.config.write import config_diff, dump_config, write_value
from lensmith.config.yaml12 import parse_yaml
from lensmith.errors import ConfigError


@pytest.fixture
def write_yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def sentence(source: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(source, overrides)
    return str(caught.value)


def test_nothing_at_all_gives_the_defaults():
    assert read_config(None) == RunConfig()


def test_a_bare_data_file_is_the_training_data(tmp_path):
    rows = tmp_path / "rows: 1.jsonl"
    rows.write_text("{}")
    assert read_config(None, ["tune.rank=4"], data=str(rows)).data.train == str(rows)


def test_numbers_in_scientific_notation_are_numbers(write_yaml):
    assert yaml.safe_load("2e-4") == "2e-4", "PyYAML has learned YAML 1.2; the loader of our own may go"
    config = read_config(
        write_yaml("optim: {learning_rate: 2e-4, weight_decay: .5, warmup: 1e-1}"), ["optim.epochs=1e1"]
    )
    assert (config.optim.learning_rate, config.optim.weight_decay, config.optim.warmup) == (2e-4, 0.5, 0.1)
    assert config.optim.epochs == 10


@pytest.mark.parametrize("word", ["no", "on", "off", "yes", "y", "N"])
def test_short_words_are_words(write_yaml, word):
    assert yaml.safe_load("no") is False
    config = read_config(write_yaml(f"data: {{train: {word}, columns: {{answer: {word}}}}}"))
    assert config.data.train == config.data.columns.answer == word


def test_words_for_yes_and_no_still_switch_a_switch(write_yaml):
    config = read_config(write_yaml("tune: {attention: off, dora: on}\ndata: {allow_urls: yes}"))
    assert (config.tune.attention, config.tune.dora, config.data.allow_urls) == (False, True, True)


def test_core_schema_of_yaml_12():
    text = "[010, 0o10, 0x1F, 1_000, 12:30, 2024-01-01, ~, null, True, .inf, -1.5E3, '1']"
    expected = [10, 8, 31, "1_000", "12:30", "2024-01-01", None, None, True, float("inf"), -1500.0, "1"]
    assert parse_yaml(text, "x").tree == expected


def test_an_override_wins_over_the_file(write_yaml):
    path = write_yaml("tune: {rank: 8, alpha: 4}\nseed: 1")
    config = read_config(path, ["tune.rank=32", "data.image={max_tokens: 64, min_tokens: 9}", "log.report_to=[wandb]"])
    assert (config.tune.rank, config.tune.alpha, config.seed) == (32, 4, 1)
    assert (config.data.image.max_tokens, config.data.image.min_tokens) == (64, 9)
    assert config.log.report_to == ["wandb"]


def test_a_section_with_every_line_commented_out_is_the_default(write_yaml):
    assert read_config(write_yaml("seed: 2\noptim:\n  # epochs: 1\ndata:\n  image:\n")) == RunConfig(seed=2)


def test_paths_start_from_the_file_and_then_from_here(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("beside/a.jsonl", "here/a.jsonl", "here/b.jsonl"):
        (tmp_path / name).write_text("{}")
    source = tmp_path / "beside/run.yaml"
    source.write_text("data: {train: [{path: a.jsonl}, {path: b.jsonl, weight: 2}], test: missing.jsonl}")
    monkeypatch.chdir(tmp_path / "here")
    data = read_config(source).data
    assert [file.path for file in data.train] == [str(tmp_path / "beside/a.jsonl"), str(tmp_path / "here/b.jsonl")]
    assert [file.weight for file in data.train] == [1, 2]
    assert data.test == "missing.jsonl"
    assert read_config(source, ["data.train=a.jsonl"]).data.train == str(tmp_path / "here/a.jsonl")


def test_unknown_setting_names_file_line_value_and_the_near_one(write_yaml):
    path = write_yaml("model: lensmith/tiny\noptim:\n  learning_rat: 3\n")
    text = sentence(path)
    assert f"{path}:3: there is no setting optim.learning_rat (set to 3). Did you mean optim.learning_rate?" in text
    assert "`lensmith config` lists every setting" in text


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", "optim.learning_rate"),
        ("tune.rnk", "tune.rank"),
        ("rank", "tune.rank"),
        ("optim.rank", "tune.rank"),
        ("batch_size", "optim.effective_samples"),
        ("tune.lora_r", "tune.rank"),
        ("max_pixels", "data.image.max_tokens"),
        ("num-train-epochs", "optim.epochs"),
        ("max_seq_length", "pack.tokens"),
        ("load_in_4bit", "tune.method"),
        ("data.max_tokens", "data.image.max_tokens"),
        ("evaluation", "eval"),
        ("tunes", "tune"),
    ],
)
def test_did_you_mean(wrong, meant):
    text = sentence(None, f"{wrong}=3")
    assert text.startswith(f"command line: there is no setting {wrong} (set to 3). Did you mean ")
    assert meant in text.split("Did you mean")[1]


def test_a_name_near_to_nothing_gets_no_suggestion():
    assert "Did you mean" not in sentence(None, "flux_capacitor=1")


def test_names_from_other_tools_lead_to_settings_that_exist():
    known = {setting.path for setting in list_settings()}
    assert set(FOREIGN.values()) <= known | set(list_sections())
    assert set(ALSO) <= set(FOREIGN)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tune.rank=16.5", "tune.rank is 16.5, but must be a whole number, at least 1."),
        ("tune.rank=true", "tune.rank is true, but must be a whole number, at least 1."),
        ("tune.rank=0", "tune.rank is 0, but must be a whole number, at least 1."),
        ("optim.learning_rate=fast", "optim.learning_rate is 'fast', but must be a number above 0, or null."),
        ("optim.learning_rate=.inf", "optim.learning_rate is inf, but must be a number above 0, or null."),
        (
            "tune.method=qlra",
            "tune.method is 'qlra', but must be one of lora, qlora, lora_8bit, full. Did you mean qlora?",
        ),
        ("data.test=5", "data.test is 5, but must be text, a number above 0 and below 1, or null."),
        ("data.allow_urls=maybe", "data.allow_urls is 'maybe', but must be true or false."),
        ("optim=adamw", "optim is 'adamw', but must be a section with name, learning_rate,"),
        (
            "data.train=[{path: a, wieght: 2}]",
            "there is no setting data.train[0].wieght (set to 2). Did you mean weight?",
        ),
        ("data.train=[{weight: 2}]", "data.train[0].path is missing; a data file in a list is written {path:"),
        ("data.train=[a.jsonl]", "data.train[0] is 'a.jsonl', but a data file in a list is written {path:"),
        ("data.train=[{path: a, weight: 0}]", "data.train[0].weight is 0, but a data file in a list is written {path:"),
        (
            "log.report_to=[wanb]",
            "log.report_to[0] is 'wanb', but must be one of tensorboard, wandb, trackio. Did you mean wandb?",
        ),
    ],
)
def test_wrong_type_says_the_value_and_what_is_allowed(override, reason):
    assert reason in sentence(None, override)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write_yaml):
    text = sentence(write_yaml("lr: 1\ntune:\n  rank: x\n  method: y\n"), "sead=1")
    assert text.startswith("4 settings cannot be used:")
    assert [line.split(":")[1] for line in text.splitlines()[1:4]] == ["1", "3", "4"]
    assert "command line: there is no setting sead (set to 1). Did you mean seed?" in text


def test_not_yaml_names_the_line(write_yaml):
    assert ":2: this is not YAML" in sentence(write_yaml("seed: 1\nmodel: a: b\n"))


def test_a_key_that_stands_twice_is_an_error(write_yaml):
    text = sentence(write_yaml("seed: 1\ntune: {rank: 3}\nseed: 2\n"))
    assert ":3: 'seed' stands here and on line 1; only one of them can hold." in text


def test_a_list_is_not_a_config(write_yaml):
    assert "must hold settings such as `model: lensmith/tiny`" in sentence(write_yaml("- a\n- b\n"))


def test_a_missing_file_names_those_that_are_there(write_yaml):
    path = write_yaml("seed: 1")
    assert "no such file; in its folder there is run.yaml." in sentence(path.with_name("rnu.yaml"))


def test_an_override_without_a_value_says_how_to_write_it():
    assert "'tune.rank' is not a setting. Write section.name=value" in sentence(None, "tune.rank")


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["tune.method=full", "tune.rank=16"], "tune.rank"),
        (["tune.method=full", "tune.dropout=0.1"], "tune.dropout"),
        (["tune.language=trained", "tune.alpha=16"], "tune.alpha"),
        (["tune.language=frozen", "tune.vision=adapted", "tune.attention=true"], "tune.attention"),
        (["tune.language=frozen", "tune.merger=trained", "tune.mlp=true"], "tune.mlp"),
        (["tune.quantise_vision=true"], "tune.quantise_vision"),
        (["optim.steps=10", "optim.epochs=3"], "optim.epochs"),
        (["optim.vision_learning_rate=1e-5"], "optim.vision_learning_rate"),
        (["optim.merger_learning_rate=1e-5"], "optim.merger_learning_rate"),
        (["tune.dropout=0.1", "pack.share_prefix=true"], "pack.share_prefix"),
        (["data.test=null", "eval.every_steps=100"], "eval.every_steps"),
        (["eval.patience=2"], "eval.patience"),
        (["task=grpo", "eval.every_steps=10", "eval.patience=2"], "eval.patience"),
        (["memory.vision_cache_dir=kept"], "memory.vision_cache_dir"),
        (["memory.vision_cache_gib=4", "tune.merger=adapted"], "memory.vision_cache_gib"),
        (["memory.recompute=none", "memory.offload=inputs"], "memory.offload"),
        (["optim.rounding=nearest"], "optim.rounding"),
        (["grpo.group=4"], "grpo.group"),
        (["engine=unsloth", "memory.tower=host"], "memory.tower"),
        (["engine=unsloth", "memory.offload=none"], "memory.offload"),
        (["engine=unsloth", "tune.method=qlora", "tune.quantise_vision=true"], "tune.quantise_vision"),
        (["task=grpo", "rollout.vllm_mode=server"], "rollout.vllm_mode"),
        (["task=grpo", "rollout.engine=builtin", "rollout.vllm_gpu_share=0.3"], "rollout.vllm_gpu_share"),
        (["task=grpo", "rollout.engine=vllm", "rollout.vllm_server=http://127.0.0.1:8000"], "rollout.vllm_server"),
        (
            ["task=grpo", "rollout.engine=vllm", "rollout.vllm_mode=server", "rollout.vllm_gpu_share=0.3"],
            "rollout.vllm_gpu_share",
        ),
        (["task=grpo", "rollout.engine=vllm", "rollout.batch=8"], "rollout.batch"),
    ],
)
def test_a_setting_without_effect_is_an_error_even_at_its_default(overrides, path):
    text = sentence(None, *overrides)
    assert text.startswith(f"command line: {path} has no effect ")
    assert "Remove" in text


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.image.min_tokens=99", "data.image.max_tokens=9"], "is 99, which is more than data.image.max_tokens=9."),
        (["tune.attention=false", "tune.mlp=false"], "tune.attention and tune.mlp are both false"),
        (["tune.language=frozen"], "nothing would be trained"),
        (["tune.method=qlora", "tune.language=trained"], "which no optimizer can move"),
        (
            ["tune.method=qlora", "tune.quantise_vision=true", "tune.vision=trained"],
            "tune.vision is 'trained', but tune.",
        ),
        (["memory.recompute=none", "memory.stream_layers=4"], "memory.stream_layers is 4, but memory.recompute=none"),
        (["memory.recompute=2", "memory.stream_layers=4"], "stream no more layers than it names"),
        (["tune.method=lora_8bit", "tune.language=trained"], "tune.method=lora_8bit stores it in 8 bits"),
        (["tune.method=lora_8bit", "memory.stream_layers=4"], "memory.stream_layers is 4, but tune.method=lora_8bit"),
        (["memory.head=host", "memory.head_bits=8"], "memory.head_bits is 8, but memory.head=host"),
        (["tune.method=full", "memory.embedding=host"], "memory.embedding is 'host', but the decoder trains"),
        (["tune.merger=trained", "memory.tower=host"], "but tune.merger=trained; only a frozen tower"),
        (["optim.in_backward=true"], "but tune.method=lora has few gradients to save"),
        (["tune.method=full", "optim.in_backward=true"], "but optim.max_grad_norm=1 needs all gradients at once"),
        (
            ["task=grpo", "optim.effective_samples=12"],
            "a step holds whole groups, so it must be a multiple of the group",
        ),
        (["task=grpo", "grpo.max_new_tokens=600", "pack.tokens=600"], "pack.tokens=600 leaves no room for a prompt"),
        (
            ["task=grpo", "tune.method=full", "optim.max_grad_norm=null", "optim.in_backward=true"],
            "but task=grpo takes several packs a step",
        ),
        (["engine=unsloth", "task=grpo"], "engine is 'unsloth', but task=grpo shares prompts in packs"),
        (
            ["task=grpo", "rollout.engine=vllm", "grpo.min_p=0.1"],
            "rollout.engine is 'vllm', but grpo.min_p=0.1: vLLM tells log-probabilities after that filter",
        ),
        (["task=grpo", "rollout.engine=vllm", "tune.method=lora_8bit"], "whose products round their inputs too"),
        (["task=grpo", "rollout.engine=vllm", "tune.dora=true"], "but tune.dora=true, and vLLM is handed"),
        (
            ["task=grpo", "rollout.engine=vllm", "memory.head_bits=8"],
            "but memory.head_bits=8, and vLLM is handed whole",
        ),
        (
            ["task=grpo", "rollout.engine=vllm", "rollout.vllm_mode=server", "tune.merger=adapted"],
            "but tune.merger=adapted with rollout.vllm_mode=server: a server keeps features of pictures",
        ),
    ],
)
def test_settings_that_contradict_are_an_error(overrides, reason):
    assert reason in sentence(None, *overrides)


def test_every_rule_has_a_case_above():
    assert (len(WITHOUT_EFFECT), len(CONTRADICTIONS)) == (14, 13), (
        "add a case to the two tests above, then mend this line"
    )


def test_an_override_may_take_the_effect_from_a_setting_in_the_file(write_yaml):
    path = write_yaml("tune: {rank: 8, method: lora}\noptim: {epochs: 5}")
    assert read_config(path, ["tune.method=full", "optim.steps=10"]).optim.steps == 10
    text = sentence(write_yaml("tune: {rank: 8, method: full}"), "optim.steps=10")
    assert ":1: tune.rank has no effect with tune.method=full" in text


def test_saying_that_something_is_off_where_it_is_off_anyway_is_fine():
    overrides = [
        "tune.method=full",
        "tune.dora=false",
        "tune.dropout=0",
        "tune.quantise_vision=false",
        "eval.every_steps=null",
    ]
    assert read_config(None, overrides).tune.method == "full"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tune.method=full", "optim.steps=3", "optim.learning_rate=1e-5", "run=no"],
        ["tune.dropout=0.5", "data.test=0.05", "data.columns.answer='1'", "data.train=[{path: 'a, b: #c'}]"],
    ],
)
def test_the_resolved_config_reads_back_as_itself(write_yaml, overrides):
    config = read_config(None, overrides)
    text = dump_config(config)
    assert read_config(write_yaml(text)) == config
    for setting in list_settings():
        assert f"{setting.leaf}: " in text


@pytest.mark.parametrize("value", [1e-5, 2e-4, 1.5e-9, 0.0, 3.0, True, None, "no", "1e3", "a b", "x: y", "äö", "", 7])
def test_a_written_value_is_the_same_to_yaml_11_and_12(value):
    assert yaml.safe_load(write_value(value)) == parse_yaml(write_value(value), "x").tree == value


def test_the_diff_names_what_somebody_changed():
    config = read_config(None, ["tune.method=full", "optim.steps=3", "run=runs/x"])
    assert config_diff(config) == {"tune.method": "full", "optim.steps": 3, "run": "runs/x"}


def test_the_starter_file_can_be_run_as_it_is(write_yaml, tmp_path):
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("{}")
    text = write_starter("my rows.jsonl")
    config = read_config(write_yaml(text))
    assert config.data.train == str(rows)
    assert set(config_diff(config)) == {"data.train", "run"}
    assert all(line.split("#")[0].strip() == "" or ":" in line for line in text.splitlines())


def test_every_setting_is_described_in_words():
    settings = list_settings()
    assert len(settings) > 50
    for setting in settings:
        assert setting.doc, f"{setting.path} has no docstring in config/tree.py"
        assert setting.allowed
        assert "typing" not in setting.allowed
        assert "<" not in setting.allowed
