"""`lensmith convert`: each tool's names become ours, nothing is swallowed, nothing of the file runs."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from lensmith import cli
from lensmith.config.read import read_config
from lensmith.config.schema import list_settings, read_value
from lensmith.config.tree import RunConfig
from lensmith.convert import meaning
from lensmith.convert.nouns import Noted, Without
from lensmith.convert.python_file import read_python
from lensmith.convert.run import TABLES, convert_file
from lensmith.convert.write import write_run
from lensmith.errors import LensmithError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "convert"
BENT = 300
"""Files bent by the test; 16,000 others were by hand, with none that crashed or did not read back."""
VALUE = re.compile(r"""\d[\d.e-]*|[Tt]rue|[Ff]alse|'[^']*'|"[^"]*"|\[[^\]]*\]""")
THEIR_ADAMW = {"optim.name": "adamw"}
HF_DEFAULTS = THEIR_ADAMW | {"optim.schedule": "linear", "optim.warmup": 0.0}
SETTINGS = {
    "unsloth_sft.ipynb": {
        "model": "Qwen/Qwen3-VL-4B-Instruct", "data.train": "somebody/receipts:train", "data.image.max_tokens": 768,
        "tune.method": "qlora", "tune.language": "adapted", "tune.attention": True, "tune.mlp": False,
        "tune.vision": "adapted", "tune.rank": 32, "tune.alpha": 32.0, "tune.dropout": 0.0, "pack.tokens": 4096,
        "optim.name": "adamw_8bit", "optim.learning_rate": 2e-4, "optim.vision_learning_rate": 2e-4, "optim.steps": 60,
        "optim.effective_samples": 8, "optim.schedule": "linear", "optim.warmup": 0.1, "optim.weight_decay": 0.01,
        "memory.recompute": "layers", "memory.offload": "inputs", "log.report_to": [], "seed": 3407, "run": "receipts",
    },
    "unsloth_grpo.py": {
        "model": "Qwen/Qwen3-VL-8B-Instruct", "task": "grpo", "data.train": "apples.jsonl", "data.test": 0.1,
        "tune.method": "qlora", "tune.attention": True, "tune.mlp": False, "tune.vision": "frozen", "tune.rank": 16,
        "tune.alpha": 16.0, "tune.dora": True, "pack.tokens": 16384, "optim.name": "adamw_8bit",
        "optim.learning_rate": 5e-6, "optim.epochs": 0.5, "optim.effective_samples": 8, "optim.schedule": "linear",
        "optim.warmup": 0.1, "optim.weight_decay": 0.001, "optim.max_grad_norm": 0.1, "grpo.group": 4,
        "grpo.max_new_tokens": 1024, "grpo.rewards": ["rewards.py:has_answer", "rewards.py:is_right"],
        "grpo.loss": "dr_grpo", "grpo.importance": "sequence", "grpo.scale_rewards": "none", "grpo.beta": 0.001,
        "save.every_steps": 60,
    },
    "trl_sft.py": THEIR_ADAMW | {
        "model": "Qwen/Qwen3-VL-8B-Instruct", "data.train": "HuggingFaceM4/ChartQA:train",
        "data.test": "HuggingFaceM4/ChartQA:val", "data.image.min_tokens": 64, "data.image.max_tokens": 1024,
        "tune.method": "qlora", "tune.language": "adapted", "tune.attention": True, "tune.mlp": True,
        "tune.vision": "adapted", "tune.merger": "adapted", "tune.rank": 64, "tune.alpha": 64.0, "tune.rslora": True,
        "optim.learning_rate": 1e-4, "optim.vision_learning_rate": 1e-4, "optim.epochs": 2.0,
        "optim.schedule": "constant", "optim.warmup": 0.05, "eval.every_steps": 100, "log.every_steps": 20,
        "log.report_to": ["wandb"], "save.every_steps": 200, "save.keep": 3, "precision": "bf16", "run": "runs/charts",
    },
    "trl_grpo.py": HF_DEFAULTS | {
        "model": "Qwen/Qwen3-VL-2B-Instruct", "task": "grpo",
        "data.train": "lmms-lab/multimodal-open-r1-8k-verified:train", "tune.method": "full", "tune.vision": "trained",
        "tune.merger": "trained", "optim.effective_samples": 8, "memory.recompute": "none", "grpo.group": 8,
        "grpo.max_new_tokens": 256, "grpo.temperature": 0.9, "grpo.top_p": 0.95, "grpo.top_k": 50, "grpo.beta": 0.01,
        "grpo.rewards": [{"name": "rewards.py:think_format_reward", "weight": 0.5},
                         {"name": "rewards.py:accuracy_reward", "weight": 1.0}], "run": "geometry",
    },
    "trl_cli.sh": HF_DEFAULTS | {
        "model": "Qwen/Qwen3-VL-2B-Instruct", "data.train": "somebody/signs", "tune.method": "qlora",
        "tune.language": "adapted", "tune.attention": True, "tune.mlp": False, "tune.vision": "frozen",
        "tune.merger": "frozen", "tune.rank": 16, "tune.alpha": 32.0, "tune.dropout": 0.05, "pack.tokens": 2048,
        "optim.learning_rate": 5e-5, "optim.effective_samples": 8, "run": "signs",
    },
    "llamafactory_lora.yaml": THEIR_ADAMW | {
        "model": "Qwen/Qwen3-VL-8B-Instruct",
        "data.train": [{"path": str(FIXTURES / "data" / "invoices.json")}, {"path": "somebody/forms:train"}],
        "data.test": 0.1, "data.image.max_tokens": 1024, "tune.method": "qlora", "tune.language": "adapted",
        "tune.attention": True, "tune.mlp": True, "tune.vision": "adapted", "tune.rank": 16, "tune.dropout": 0.1,
        "pack.tokens": 4096, "optim.learning_rate": 1e-4, "optim.vision_learning_rate": 1e-4, "optim.epochs": 3.0,
        "optim.effective_samples": 8, "optim.schedule": "cosine", "optim.warmup": 0.1, "eval.every_steps": 250,
        "log.every_steps": 10, "log.report_to": ["tensorboard"], "save.every_steps": 500, "precision": "bf16",
        "run": "saves/invoices",
    },
    "llamafactory_full.json": {
        "model": "Qwen/Qwen3-VL-2B-Instruct", "data.image.max_tokens": 576, "tune.method": "full",
        "tune.merger": "trained", "optim.learning_rate": 1e-5, "optim.effective_samples": 8,
        "optim.schedule": "linear", "optim.warmup": 0.0,
    },
    "swift_sft.sh": THEIR_ADAMW | {
        "model": "Qwen/Qwen3-VL-4B-Instruct",
        "data.train": [{"path": "AI-ModelScope/LaTeX_OCR"}, {"path": "forms.jsonl"}], "data.test": 0.02,
        "data.image.max_tokens": 1024, "data.on_long": "drop", "tune.method": "qlora", "tune.language": "adapted",
        "tune.attention": True, "tune.mlp": True, "tune.vision": "adapted", "tune.merger": "adapted", "tune.rank": 8,
        "tune.alpha": 32.0, "tune.dropout": 0.05, "pack.tokens": 4096, "optim.learning_rate": 1e-4,
        "optim.vision_learning_rate": 1e-5, "optim.epochs": 1.0, "optim.effective_samples": 16, "optim.warmup": 0.05,
        "optim.weight_decay": 0.1, "eval.every_steps": 100, "save.every_steps": 100, "save.keep": 2,
        "precision": "bf16",
    },
    "swift_grpo.sh": THEIR_ADAMW | {
        "model": "Qwen/Qwen3-VL-8B-Instruct", "task": "grpo", "data.train": "geometry.jsonl",
        "data.image.max_tokens": 588, "tune.method": "full", "tune.vision": "frozen", "optim.learning_rate": 1e-5,
        "optim.effective_samples": 18, "optim.warmup": 0.0, "optim.weight_decay": 0.1, "grpo.group": 6,
        "grpo.max_new_tokens": 1024, "grpo.temperature": 1.0, "grpo.loss": "grpo", "grpo.beta": 0.001,
        "grpo.rewards": [{"name": "math_boxed", "missing": 0.0, "wrong": 0.0},
                         {"name": "format", "shape": "think_answer", "weight": 0.5},
                         {"name": "repetition", "ngram": 3, "penalty": -1.0}], "grpo.mask_truncated": True,
    },
    "swift_line.txt": THEIR_ADAMW | {
        "model": "Qwen/Qwen3-VL-2B-Instruct", "data.train": "rows.jsonl", "tune.method": "lora", "tune.rank": 8,
        "tune.alpha": 16.0, "tune.dropout": 0.05, "optim.learning_rate": 1e-4, "optim.warmup": 0.0,
        "optim.weight_decay": 0.1,
    },
}  # fmt: skip
WITHOUT = {
    "unsloth_sft.ipynb": set(),
    "unsloth_grpo.py": {"adam_beta2", "max_prompt_length"},
    "trl_sft.py": {
        "gradient_accumulation_steps", "neftune_noise_alpha", "hub_model_id", "a_brand_new_argument", "modules_to_save",
        "load_dataset(path)", "report_to",
    },
    "trl_grpo.py": {"use_vllm = True (line 22)"},  # top_p stays, and the two do not go together
    "trl_cli.sh": set(),
    "llamafactory_lora.yaml": {"max_samples", "overwrite_output_dir", "deepspeed"},
    "llamafactory_full.json": {"dataset", "optim", "use_galore"},
    "swift_sft.sh": {"deepspeed", "dataset"},
    "swift_grpo.sh": {"external_plugins", "reward_funcs"},
    "swift_line.txt": set(),
}  # fmt: skip
UNREAD = {
    "unsloth_sft.ipynb": ["cell 11: not Python",
                          "cell 9, line 16: fp16 = not torch.cuda.is_bf16_supported() is computed; set precision"],
    "trl_sft.py": ["line 33: per_device_train_batch_size = int(os.environ.get('BATCH', 2)) is computed; "
                   "set optim.effective_samples"],
    "trl_grpo.py": ["line 14: learning_rate = rate is no plain value; set optim.learning_rate"],
    "swift_sft.sh": ["line 29: output_dir = output/$STAMP is set by the shell; set run"],
}  # fmt: skip


@pytest.fixture
def convert_json(capsys, tmp_path, monkeypatch):
    """`convert_json(path)` -> exit code, the JSON object, stderr; in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, dict, str]:
        code = cli.main(["convert", *arguments, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def test_every_fixture_is_tested():
    assert {path.name for path in FIXTURES.iterdir() if path.is_file()} == set(SETTINGS) == set(WITHOUT)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_becomes_exactly_these_settings(name):
    converted = convert_file(FIXTURES / name)
    assert {one.path: one.value for one in converted.settings} == SETTINGS[name]
    assert {one.name for one in converted.without if one.matters} == WITHOUT[name]
    assert [f"{one.where}: {one.what}" for one in converted.unread] == UNREAD.get(name, [])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_verb_writes_a_file_that_reads_back_and_runs_nothing(convert_json, tmp_path, name):
    code, told, err = convert_json(str(FIXTURES / name))
    assert code == 0, err
    config = read_config(Path("run.yaml"))
    for path, value in SETTINGS[name].items():
        held = read_value(config, path)
        plain = [{"path": one.path} for one in held] if path == "data.train" and isinstance(held, list) else held
        assert str(plain) == str(value) if path == "run" else plain == value
    assert {one["path"] for one in told["settings"]} == set(SETTINGS[name])
    assert told["wrote"] == "run.yaml"
    # Each fixture that can leaves a file behind when it runs.
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_each_setting_stands_beside_what_it_was():
    text = write_run(convert_file(FIXTURES / "llamafactory_lora.yaml"), "run.yaml")
    assert "LLaMA-Factory settings" in text
    assert "  rank: 16                                # lora_rank = 16 (line 10)" in text
    assert "    # One token is 32 x 32 pixels.\n    max_tokens: 1024" in text
    assert "# per_device_train_batch_size = 1, gradient_accumulation_steps = 8 (lines 31 and 32)" in text.replace(
        "  # ", "# "
    )
    assert "# - deepspeed = 'examples/deepspeed/ds_z2_config.json' (line 39): `torchrun -m lensmith train" in text


def test_data_that_the_file_does_not_name_is_a_line_to_fill_in():
    text = write_run(convert_file(FIXTURES / "llamafactory_full.json"), "run.yaml")
    assert "data:\n  # train: rows.jsonl   <- fill in" in text
    assert "set data.train to the file_name of somewhere_else" in " ".join(text.replace("#", "").split())


def test_a_run_yaml_that_exists_stays_as_it_is(convert_json, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    code, told, _ = convert_json(str(FIXTURES / "swift_line.txt"))
    assert code == 1
    assert "run.yaml: exists already and stays as it is" in told["error"]
    assert (tmp_path / "run.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.py", "print('hello')", "calls no SFTConfig, SFTTrainer, GRPOConfig or GRPOTrainer"),
        ("a.py", "from trl import DPOTrainer\nDPOTrainer(model)", "trains with DPOTrainer"),
        ("a.py", "def broken(:", "a.py:1: not Python"),
        ("a.py", "x = " + "(" * 5000, "not Python"),
        ("a.py", "import trl\nx = " + "+".join("1" * 2_000), "nested too deeply"),
        ("a.ipynb", '{"worksheets": []}', "not a notebook of format 4"),
        ("a.yaml", "colour: red", "settings of no tool that is known"),
        ("a.yaml", "model: m\ntune: {rank: 3}", "Lensmith's own settings already"),
        ("a.yaml", "- 1", "holds no settings but a list"),
        ("a.yaml", "finetuning_type: lora\nstage: dpo", "stage=dpo"),
        ("a.json", '{"a": ', "this is not YAML"),
        ("a.sh", "echo hello", "no training command in it"),
        ("a.sh", "swift rlhf --rlhf_type dpo --model m", "trains with rlhf_type=dpo"),
        ("a.sh", "llamafactory-cli train x.yaml", "lensmith convert x.yaml"),
        ("a.sh", "swift sft", "no arguments in it"),
        ("a.csv", "image,question", "a file ending in '.csv' is none that is known"),
        ("nothing", None, "no such file"),
    ],
)
def test_a_file_that_is_nothing_of_the_kind_is_one_sentence(convert_json, tmp_path, name, text, sentence):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, told, err = convert_json(name)
    assert code == 1, err
    assert sentence in told["error"]
    assert not (tmp_path / "run.yaml").exists()


def test_a_binary_file_is_one_sentence(convert_json, tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in convert_json("a.py")[1]["error"]


def test_from_says_whose_names_they_are(convert_json, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 3e-5\n")
    assert "settings of no tool" in convert_json("a.yaml")[1]["error"]
    told = convert_json("a.yaml", "--from", "llama-factory")[1]
    assert told["tool"] == "llama-factory"
    assert ("optim.learning_rate", 3e-5) in [(one["path"], one["value"]) for one in told["settings"]]


def test_a_value_that_no_setting_takes_is_listed_and_the_rest_stays(convert_json, tmp_path):
    shutil.copy(FIXTURES / "llamafactory_full.json", tmp_path / "a.json")
    settings = json.loads((tmp_path / "a.json").read_text()) | {
        "num_train_epochs": -2,
        "lora_rank": "many",
        "seed": "x",
    }
    (tmp_path / "a.json").write_text(json.dumps(settings | {"finetuning_type": "lora"}))
    code, told, err = convert_json("a.json")
    assert code == 0, err
    whys = {one["why"] for one in told["without_counterpart"]}
    assert {"optim.epochs must be a number above 0.", "tune.rank must be a whole number, at least 1."} <= whys
    assert read_config(tmp_path / "run.yaml").optim.learning_rate == 1e-5


def test_a_group_of_theirs_divides_a_step_of_ours(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("GRPOConfig(num_generations=6, per_device_train_batch_size=size())\n")
    assert {one.path: one.value for one in convert_file(path).settings}["optim.effective_samples"] == 18


def test_bent_files_are_converted_or_refused_in_a_sentence(tmp_path):
    """What a hand may do to a file: other values, things cut out and put in."""
    draw = random.Random(0)
    bits = (
        "-1",
        "None",
        "[]",
        "{}",
        "'x'",
        "1e999",
        "True",
        "0",
        "\n",
        "$X",
        "`ls`",
        "=",
        ":",
        "--beta",
        "(",
        ")",
        "é",
        "nan",
    )
    files = sorted(path for path in FIXTURES.iterdir() if path.is_file())
    refused = 0
    for _ in range(BENT):
        file = draw.choice(files)
        text = file.read_text()
        for _ in range(draw.randint(1, 4)):
            values = list(VALUE.finditer(text))
            if values and draw.random() < 0.7:
                start, stop = draw.choice(values).span()
            else:
                start = draw.randrange(len(text))
                stop = start + draw.randint(0, 8)
            text = text[:start] + draw.choice(bits) + text[stop:]
        bent = tmp_path / f"bent{file.suffix}"
        bent.write_text(text)
        try:
            converted = convert_file(bent)
        except LensmithError:
            refused += 1
            continue
        (tmp_path / "run.yaml").write_text(write_run(converted, "run.yaml"))
        read_config(tmp_path / "run.yaml")
    assert 0 < refused < BENT / 2


def test_only_what_is_plain_is_read():
    script = """
from trl import SFTConfig
RATE = 1e-4
size = 4
size = 8
def build(depth=3):
    width = 2
    return SFTConfig(
        output_dir=f"runs/{depth}", learning_rate=RATE, per_device_train_batch_size=size, max_steps=-1,
        num_train_epochs=depth, seed=2 * (3 + 4), save_steps=2 ** 1000000000, weight_decay=1 / 0,
        logging_steps=[1, 2][0], warmup_steps="a" * 1000000000,
    )
"""
    found = read_python(Path("a.py"), script)
    read = {one.name: one.value for one in found.arguments if isinstance(one.value, int | float | str)}
    assert read == {"config.learning_rate": 1e-4, "config.max_steps": -1, "config.seed": 14}
    assert {one.name.rpartition(".")[2] for one in found.unread} == {
        "output_dir", "save_steps", "weight_decay", "logging_steps", "warmup_steps",
    }  # fmt: skip


def test_of_two_trainings_the_first_is_converted_and_the_other_named(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("SFTConfig(seed=1)\nGRPOConfig(seed=2, beta=0.1)\n")
    converted = convert_file(path)
    assert (converted.task, {one.path: one.value for one in converted.settings}["seed"]) == ("sft", 1)
    assert [one.where for one in converted.unread] == ["line 2"]
    assert "a second training, of another kind" in converted.unread[0].what


def test_it_is_said_where_questions_were_learned_as_well():
    def told(script: str) -> bool:
        return any("questions are learned there" in remark for remark in read_python(Path("a.py"), script).remarks)

    assert told("SFTConfig(seed=1)")
    assert not told("SFTConfig(seed=1, assistant_only_loss=True)")
    assert not told("SFTConfig(seed=1)\ntrainer = train_on_responses_only(trainer)")
    assert not told("GRPOConfig(seed=1)")


def test_a_size_that_does_not_exist_is_said():
    answer = meaning.model_name("unsloth/Qwen3-VL-7B")
    assert answer.note == "There is no Qwen3-VL of 7B: name one of 2B, 4B, 8B, 32B."


def test_shell_variables_are_filled_in_where_they_are_plain(tmp_path):
    path = tmp_path / "a.sh"
    path.write_text(
        'M=Qwen/Qwen3-VL-2B-Instruct\nD=$(ls)\nswift sft --model "${M}" --dataset $D --seed 7 | tee log --no\n'
    )
    converted = convert_file(path)
    assert {"model", "seed"} <= {one.path for one in converted.settings}
    assert [one.what for one in converted.unread] == ["dataset = $D is set by the shell; set data.train"]
    assert not converted.without


@pytest.mark.parametrize(
    ("value", "reached"),
    [
        ("all-linear", {"attention", "mlp", "vision", "merger"}),
        (["q_proj", "v_proj"], {"attention"}),
        (["gate_proj", "up_proj", "down_proj"], {"mlp"}),
        (["q_proj", "qkv", "attn.proj"], {"attention", "vision"}),
        (["model.layers.3.self_attn.o_proj", "linear_fc1"], {"attention", "vision", "merger"}),
    ],
)
def test_module_names_reach_these_parts(value, reached):
    assert meaning.targets(value) == reached


def test_some_modules_of_a_part_are_all_of_it_here_and_it_is_said():
    answer = meaning.reaches(["q_proj", "v_proj"], "attention")
    assert isinstance(answer, Noted)
    assert answer.value is True
    assert "k_proj, o_proj more than there" in answer.note
    assert isinstance(meaning.targets(r".*visual.*"), Without)


def test_a_step_of_completions_holds_whole_groups():
    assert meaning.completions(2, 4, 4) == 8
    assert meaning.completions(1, 6, 4).value == 8


@pytest.mark.parametrize("tool", TABLES)
@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_tables_name_settings_that_exist_and_defaults_that_translate(tool, task):
    table = TABLES[tool](task)
    paths = {setting.path for setting in list_settings()}
    assert {rule.ours for rule in table.rules} <= paths
    assert set(table.unset) <= paths
    for rule in table.rules:
        if rule.assume:
            rule.translate(*rule.names.values())
    assert RunConfig().optim.learning_rate is None  # why a tool's own default has to be carried over


@pytest.mark.parametrize(
    ("written", "settings"),
    [
        ("use_vllm=True", {"rollout.engine": "vllm"}),
        (
            "use_vllm=True, vllm_gpu_memory_utilization=0.4",
            {"rollout.engine": "vllm", "rollout.vllm_gpu_share": 0.4},
        ),
        (
            "use_vllm=True, vllm_mode='server', vllm_server_host='10.0.0.7', vllm_gpu_memory_utilization=0.4",
            {"rollout.engine": "vllm", "rollout.vllm_mode": "server", "rollout.vllm_server": "http://10.0.0.7:8000"},
        ),
        ("vllm_mode='server'", {}),
    ],
)
def test_vllm_of_a_trl_script_becomes_the_rollouts_engine(tmp_path, written, settings):
    script = tmp_path / "grpo.py"
    script.write_text(
        "from peft import LoraConfig\nfrom trl import GRPOConfig, GRPOTrainer\n"
        f"GRPOTrainer('Qwen/Qwen3-VL-2B-Instruct', reward_funcs=[f], "
        f"peft_config=LoraConfig(target_modules=['q_proj']), args=GRPOConfig('out', {written})).train()\n"
    )
    found = {one.path: one.value for one in convert_file(script).settings if one.path.startswith("rollout.")}
    assert found == settings
