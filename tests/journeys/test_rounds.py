"""Questions on the way through a real run of the tiny model: what they keep, when they end it, and how it goes on."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from lensmith.config.read import read_config
from lensmith.errors import ConfigError
from lensmith.evals.score import Score
from lensmith.rundir import RunDir
from lensmith.screens import run_screen
from lensmith.train.sft import train_model


@pytest.fixture
def config(tmp_path):
    """`config(...overrides)` -> settings of twelve steps with a round of questions after every second one."""
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "teal")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "What color is it?", "answer": colour})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def make(*overrides):
        data = [f"data.train={tmp_path / 'train.jsonl'}", f"data.test={tmp_path / 'test.jsonl'}", "data.workers=0"]
        steps = ["optim.steps=12", "optim.effective_samples=4", "eval.every_steps=2", "save.keep=1"]
        return read_config(None, [*data, *steps, f"run={tmp_path / 'run'}", *overrides])

    return make


def train(config, scores, *, lower_is_better=False):
    """Trains, and answers round after round with these scores; the steps of the rounds, what was said, and the result."""
    rounds, said = [], []

    def during(model, step):
        rounds.append(step)
        value = scores[len(rounds) - 1]
        return Score("cer" if lower_is_better else "normalised", value, 0, 1, 4, lower_is_better)

    result = train_model(config, say=lambda text: said.append(str(text)), during=during)
    return rounds, "\n".join(said), result


def steps_kept(run):
    return [int(path.name.removeprefix("step-")) for path in run.list_checkpoints()]


def test_the_best_round_outlives_newer_checkpoints_and_is_told(config, tmp_path):
    rounds, _, result = train(config(), [0.2, 0.6, 0.4, 0.5, 0.3])
    run = RunDir(tmp_path / "run")
    assert rounds == [2, 4, 6, 8, 10], "the end has an evaluation of its own"
    assert result.steps == 12
    assert steps_kept(run) == [4, 12]
    assert run.read_best() == {"step": 4, "metric": "normalised", "score": 0.6, "lower_is_better": False}
    assert f"best checkpoint: {run.checkpoint_path(4)}, normalised 60.0%" in list(run_screen(run))


def test_patience_ends_a_run_with_the_weights_of_its_best_round(config, tmp_path):
    rounds, said, result = train(config("eval.patience=2"), [0.2, 0.6, 0.6, 0.5])
    run = RunDir(tmp_path / "run")
    assert rounds == [2, 4, 6, 8]
    assert (result.steps, result.samples) == (8, 32)
    assert "Stopped after step 8: 2 rounds of questions without a better score than 60.0% after step 4" in said
    ended = load_file(run.path / "tuned" / "adapter_model.safetensors")
    best = load_file(run.checkpoint_path(4) / "tuned" / "adapter_model.safetensors")
    assert ended.keys() == best.keys()
    assert all((ended[name] == best[name]).all() for name in ended)


def test_the_same_command_again_takes_no_step_more(config):
    train(config("eval.patience=2"), [0.2, 0.6, 0.6, 0.5])
    rounds, said, result = train(config("eval.patience=2"), [])
    assert rounds == []
    assert "This run ended after step 8 already: no round of questions was better (eval.patience)." in said
    assert result.samples == 0


def test_of_an_error_rate_less_is_better(config, tmp_path):
    rounds, _, _ = train(config("eval.patience=2"), [0.5, 0.3, 0.4, 0.4], lower_is_better=True)
    assert rounds == [2, 4, 6, 8]
    assert RunDir(tmp_path / "run").read_best()["step"] == 4


def test_a_round_that_gives_no_score_chooses_nothing(config, tmp_path):
    train_model(config(), during=lambda model, step: None)
    assert RunDir(tmp_path / "run").read_best() is None


def test_patience_without_rounds_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.patience.*has no effect with eval\.every_steps=null"):
        read_config(None, ["data.train=a.jsonl", "data.test=b.jsonl", "eval.patience=2"])
