"""Each check of `lensmith verify` can fail: what is done to a model, a file or a processor, and the sentence that says so."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lensmith.config.read import read_config
from lensmith.config.tree import Images, Tune
from lensmith.data.encode import Encoder
from lensmith.errors import ModelError
from lensmith.evals.predict import EvalResult, Prediction
from lensmith.evals.score import judge_answers, score_judged
from lensmith.export.verify.agree import check_agree, distance, read_logits
from lensmith.export.verify.answers import check_metric
from lensmith.export.verify.check import NAMES, Verified, at_most, not_run
from lensmith.export.verify.inputs import check_inputs
from lensmith.export.verify.material import PROMPTS, drawn_prompts
from lensmith.export.verify.reload import load_plain, reload_tuned
from lensmith.export.verify.screen import verify_screen
from lensmith.export.verify.served import Endpoint, judge_served
from lensmith.export.verify.tensors import (
    _adapters,
    _product_norm,
    check_changed,
    check_health,
    check_promised,
    check_readable,
)
from lensmith.model.adapters import prepare_trainable, save_tuned
from lensmith.model.load import load_model, load_processor, local_folder
from lensmith.model.names import TINY
from lensmith.model.stream import FileShards

TUNE = Tune(rank=4, vision="trained")
ADAPTED = "model.language_model.layers.2.mlp.up_proj.weight"
TRAINED = "model.visual.blocks.1.mlp.linear_fc1.weight"
ROUNDED = "model.visual.blocks.0.norm1.weight"
FROZEN = "model.language_model.norm.weight"
CPU = torch.device("cpu")


class Tensors:
    """Shards in memory."""

    def __init__(self, tensors):
        self.tensors = dict(tensors)

    def names(self):
        return self.tensors

    def get(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def base() -> Tensors:
    shards = FileShards(local_folder(TINY))
    return Tensors({name: shards.get(name) for name in shards.names()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Tuned weights as a run saves them, without the run: adapters with random B, a tower in fp32 that moved."""
    loaded = load_model(read_config(None, [f"model={TINY}", "precision=fp32"]), device=CPU)
    model = prepare_trainable(loaded.model, TUNE, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and "lora_" not in name:
                # Less than bf16 can hold for one of them, as norms close to 1 often learn.
                parameter.mul_(
                    1 + (1e-6 if ROUNDED in name else 0.02) * torch.randn(parameter.shape, generator=generator)
                )
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    save_tuned(model, folder)
    return folder


@pytest.fixture
def tuned(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tuned"))


@pytest.fixture(scope="module")
def whole(base, saved) -> dict:
    """The merged model, by the formula and without the code under test."""
    merged = dict(base.tensors)
    adapter, config = (
        load_file(saved / "adapter_model.safetensors"),
        json.loads((saved / "adapter_config.json").read_text()),
    )
    for name, first in adapter.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            change = config["lora_alpha"] / config["r"] * adapter[name.replace("lora_A", "lora_B")] @ first
            merged[weight] = (base.get(weight).float() + change).to(torch.bfloat16)
    return merged | {name: t.to(torch.bfloat16) for name, t in load_file(saved / "trained.safetensors").items()}


@pytest.fixture
def changed(base, tuned, whole):
    """`changed(name=tensor, ...)` -> the check, after these tensors of the merged model were put in (None: taken out)."""

    def ask(spoilt=None, *, base=base, **options):
        merged = {name: tensor for name, tensor in (whole | (spoilt or {})).items() if tensor is not None}
        return check_changed(base, Tensors(merged), tuned, TUNE, tied=True, **options)

    return ask


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_merged_model_differs_from_the_base_in_exactly_the_tuned_tensors(changed):
    check = changed()
    assert check.ok, check.fix
    assert (check.value, check.bound) == (0, 0)
    assert check.told.endswith("; 1 by less than their type can hold")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda w, b: {FROZEN: w[FROZEN] * 1.01},
            f"1 tensor that the settings freeze is different in the merged model: {FROZEN}.",
        ),
        (
            lambda w, b: {ADAPTED: b.get(ADAPTED)},
            f"1 tensor that the settings tune is the same as in the base: {ADAPTED}.",
        ),
        (
            lambda w, b: {TRAINED: w[TRAINED] * 1.01},
            "1 tensor of the merged model is not what base and tuned files make of it",
        ),
        (lambda w, b: {TRAINED: b.get(TRAINED)}, f"is not what base and tuned files make of it: {TRAINED}."),
        (lambda w, b: {ADAPTED: w[ADAPTED] * 1.01}, f"is not what base and tuned files make of it: {ADAPTED}."),
        (lambda w, b: {FROZEN: None}, f"1 tensor of the base is not in the merged model: {FROZEN}."),
        (
            lambda w, b: {"lm_head.weight": torch.ones(2)},
            "1 tensor of the merged model is not in the base: lm_head.weight.",
        ),
    ],
    ids=[
        "a frozen one moved",
        "an adapted one did not",
        "a trained one is another",
        "a trained one is the base's",
        "an adapted one is another",
        "one is missing",
        "one is too many",
    ],
)
def test_a_tensor_that_should_not_be_as_it_is_fails_changed(changed, base, whole, spoil, sentence):
    check = changed(spoil(whole, base))
    assert check.ok is False
    assert check.value == 1
    assert sentence in check.fix


def test_a_frozen_tensor_that_changed_in_the_base_fails_changed(changed, base):
    check = changed(base=Tensors(base.tensors | {FROZEN: base.get(FROZEN) + 1}))
    assert check.ok is False
    assert FROZEN in check.fix


def test_trained_weights_that_are_still_the_base_fail_changed(changed, base, tuned):
    rewrite(tuned / "trained.safetensors", lambda tensors: tensors.update({TRAINED: base.get(TRAINED).float()}))
    check = changed({TRAINED: base.get(TRAINED)})
    assert f"1 tensor that the settings tune is the same as in the base: {TRAINED}." in check.fix


def test_a_merge_into_dequantised_weights_moves_all_that_were_in_few_bits_and_nothing_else(base, whole, saved):
    tune = TUNE.model_copy(update={"method": "qlora", "mlp": False, "vision": "frozen"})
    moved = {ADAPTED: base.get(ADAPTED) * 1.01}
    for into_dequantised, faults in ((True, 0), (False, 1)):
        check = check_changed(
            base, Tensors(base.tensors | moved), saved, tune, tied=True, into_dequantised=into_dequantised
        )
        assert check.fix.count(f"freeze is different in the merged model: {ADAPTED}") == faults


def test_tuned_files_have_to_be_those_that_the_settings_promise(base, tuned):
    assert check_promised(base, tuned, TUNE, tied=True) is None
    assert "not promised by the settings" in check_promised(base, tuned, Tune(rank=4), tied=True).fix
    with_merger = check_promised(base, tuned, TUNE.model_copy(update={"merger": "adapted"}), tied=True)
    assert "that the settings promise are missing from adapter_model.safetensors" in with_merger.fix


def test_a_file_that_was_cut_short_is_said_to_be(tuned):
    check_readable(tuned)
    file = tuned / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be read .* cut off"):
        check_readable(tuned)
    file.unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not there"):
        check_readable(tuned)


def test_health_finds_what_is_not_finite_dead_or_far_too_large(base, tuned):
    assert check_health(base, tuned).ok

    def spoil(tensors):
        dead, broken, large = sorted(name for name in tensors if "lora_B" in name)[:3]
        tensors[dead].zero_()
        tensors[broken][0, 0] = math.inf
        tensors[large] *= 1000

    rewrite(tuned / "adapter_model.safetensors", spoil)
    rewrite(tuned / "trained.safetensors", lambda tensors: tensors[TRAINED].fill_(math.nan))
    check = check_health(base, tuned)
    assert check.ok is False
    assert check.value == 4
    for sentence in (
        "2 tuned tensors hold NaN or infinity",
        "1 adapter is still zero (B = 0)",
        "1 adapter is larger than its",
    ):
        assert sentence in check.fix


def test_the_size_of_an_update_is_the_norm_of_its_product(saved):
    modules = _adapters(saved)
    assert len(modules) == 42
    for _, parts, scale in modules[:5]:
        first, second = parts["lora_A.weight"], parts["lora_B.weight"]
        assert _product_norm(first, second) == pytest.approx(float((second @ first).norm()), rel=1e-5)
        assert scale == 2


def test_plain_peft_loads_every_key_and_a_renamed_one_is_counted_twice(tuned):
    folder = local_folder(TINY)
    model, check = reload_tuned(load_plain(folder, device=CPU, dtype=torch.float32), tuned)
    assert check.ok, check.fix
    assert model.get_parameter("base_model.model." + TRAINED).equal(load_file(tuned / "trained.safetensors")[TRAINED])

    def rename(tensors):
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name.replace("language_model", "text_model")] = tensors.pop(name)

    rewrite(tuned / "adapter_model.safetensors", rename)
    _, check = reload_tuned(load_plain(folder, device=CPU, dtype=torch.float32), tuned)
    assert check.ok is False
    assert check.value == 2
    assert "1 key missing: " in check.fix
    assert "1 key without a place in the model: " in check.fix


def test_an_adapter_of_another_shape_fails_reload(tuned):
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    model, check = reload_tuned(load_plain(local_folder(TINY), device=CPU, dtype=torch.float32), tuned)
    assert model is None
    assert check.ok is False


@pytest.fixture(scope="module")
def processor_encoder() -> Encoder:
    return Encoder.from_processor(load_processor(TINY), Images())


def test_logits_tell_a_scaled_tensor_and_a_model_that_answers_like_the_base(processor_encoder):
    prompts = [processor_encoder.encode_prompt(sample) for sample in drawn_prompts()]
    model = load_plain(local_folder(TINY), device=CPU, dtype=torch.float32)
    base = read_logits(model, processor_encoder, prompts)
    with torch.no_grad():
        model.get_parameter(ADAPTED).mul_(1.5)
        tuned = read_logits(model, processor_encoder, prompts)
        model.get_parameter("model.language_model.layers.3.self_attn.o_proj.weight").mul_(1.5)
        scaled = read_logits(model, processor_encoder, prompts)
    asked = {"dtypes": (torch.bfloat16,), "prompts": "drawn here"}
    assert distance(tuned, tuned) == 0
    good = check_agree(base, {"adapter": tuned, "reloaded": tuned}, **asked)
    assert good.ok, good.fix
    other = check_agree(base, {"adapter": tuned, "reloaded": scaled}, **asked)
    assert other.ok is False
    assert "reloaded is 0." in other.fix
    same = check_agree(base, {"adapter": base, "reloaded": base}, **asked)
    assert same.ok is False
    assert "the tuned model answers like the base" in same.fix
    broken = check_agree(base, {"adapter": tuned, "reloaded": [one * math.nan for one in tuned]}, **asked)
    assert broken.ok is False


def test_drawn_prompts_are_always_the_same_and_all_different():
    once, again = drawn_prompts(), drawn_prompts()
    assert once == again
    assert len({sample.images[0].source for sample in once}) == PROMPTS


@pytest.fixture
def served(tmp_path, processor_encoder) -> Path:
    """A folder with the processor as a run saves it."""
    load_processor(TINY).save_pretrained(tmp_path / "served")
    return tmp_path / "served"


def test_the_saved_processor_reads_what_training_read(served, processor_encoder):
    check = check_inputs([served], processor_encoder, drawn_prompts(), "drawn here")
    assert check.ok, check.fix


def test_another_template_or_another_image_limit_fails_inputs(served, processor_encoder):
    template = (served / "chat_template.jinja").read_text()
    for spoilt, sentence in (
        (template.replace("<|im_start|>assistant", "<|im_start|>model"), "token ids in training"),
        ("{{ raise_exception('no') }}", "its chat template refuses the question (no)"),
    ):
        (served / "chat_template.jinja").write_text(spoilt)
        check = check_inputs([served], processor_encoder, drawn_prompts(), "drawn here")
        assert (check.ok, check.value) == (False, PROMPTS)
        assert sentence in check.fix
        assert "Copy chat_template.jinja" in check.fix
    (served / "chat_template.jinja").write_text(template)
    settings = json.loads((served / "processor_config.json").read_text())
    settings["image_processor"]["size"]["longest_edge"] = 4 * 1024
    (served / "processor_config.json").write_text(json.dumps(settings))
    check = check_inputs([served], processor_encoder, drawn_prompts(), "drawn here")
    assert "px in training" in check.fix
    assert "pass size={'shortest_edge': 4096, 'longest_edge': 1310720}" in check.fix


def answers(texts: list[str]) -> EvalResult:
    references = ["red"] * len(texts)
    judged = judge_answers(texts, references, "exact")
    score = score_judged(judged)
    told = tuple(Prediction("", "", "red", text, 1, True) for text in texts)
    return EvalResult("exact", "", score, score, score, told, judged, 0.0)


def test_answers_that_became_wrong_fail_metric_and_a_few_that_changed_do_not():
    good, noisy, bad = answers(["red"] * 12), answers(["red"] * 10 + ["blue"] * 2), answers(["red"] * 4 + ["blue"] * 8)
    assert check_metric(good, good).ok
    assert check_metric(good, noisy).ok
    check = check_metric(good, bad)
    assert check.ok is False
    assert check.value == pytest.approx(2 / 2**8)
    assert "8 right answers became wrong" in check.fix


def test_the_json_object_is_exactly_what_was_promised_and_holds_no_nan():
    checks = [at_most(name, math.nan, 1, "", "broken") for name in NAMES[:3]] + [
        not_run(name, "why") for name in NAMES[3:]
    ]
    told = Verified(Path("run"), tuple(checks)).to_json()
    assert told["ok"] is False
    assert told["checks"][0] == {"name": "changed", "ok": False, "value": None, "bound": 1, "fix": "broken"}
    assert told["checks"][-1] == {"name": "metric", "ok": None, "value": None, "bound": None, "fix": "why"}
    json.dumps(told, allow_nan=False)


def test_the_screen_says_the_verdicts_in_words():
    from rich.console import Console

    checks = (
        at_most("changed", 2, 0, "found", "mend it"),
        not_run("blind", "no rows"),
        at_most("health", 0, 0, "all", ""),
    )
    console = Console(width=80, color_system=None, record=True)
    for piece in verify_screen(Verified(Path("run"), checks)):
        console.print(piece)
    text = console.export_text()
    for words in ("FAILED", "not run", "passed", "changed: mend it", "blind: no rows", "Not ready: changed failed."):
        assert words in text


def test_a_server_with_answers_of_the_base_fails_also_where_few_of_them_differ():
    merged, base = list("abcdefgh"), list("abcdefxy")
    endpoint = Endpoint("http://here/v1", "it")
    assert judge_served(endpoint, merged, merged=merged, base=base).ok
    assert judge_served(endpoint, list("abcdefg-"), merged=merged, base=base).ok, "one answer may turn"
    assert not judge_served(endpoint, base, merged=merged, base=base).ok
    assert not judge_served(endpoint, list("abcd----"), merged=merged, base=base).ok
    blunt = judge_served(endpoint, merged, merged=merged, base=merged)
    assert blunt.ok
    assert "cannot be told" in blunt.told
