"""Reference test 8: a fresh adapter changes nothing, merged = unmerged, and exactly the trained set moves."""

import json
import resource
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from lensmith.config.tree import Tune
from lensmith.errors import ConfigError, ModelError, RunError
from lensmith.model.adapters import (
    AdapterLinear,
    adapter_dtype,
    check_tune,
    find_tuned,
    inherited_names,
    kept_values,
    load_tuned,
    prepare_trainable,
    restore_tuned,
    save_tuned,
)
from lensmith.model.components import component_of, is_adapter, plain_name

pytestmark = pytest.mark.usefixtures("float64_modules")

EVERYWHERE = Tune(rank=4, language="adapted", vision="adapted", merger="adapted")
MIXED = Tune(rank=4, language="adapted", vision="trained", merger="trained")


@pytest.fixture(scope="module")
def sample(build_sample):
    return build_sample(images=[(3, 4), (2, 2)], text=[4, 3, 9])


def step(model, stock_loss, sample, *, rate=1e-2):
    """One AdamW step; two for adapters, whose A has no gradient while B is zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        stock_loss(model, [sample]).backward()
        optimizer.step()
    return model


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tune", [EVERYWHERE, MIXED, EVERYWHERE.model_copy(update={"rslora": True})])
def test_a_fresh_adapter_changes_no_logit_by_a_single_bit(build_tiny, stock_logits, sample, tune):
    before = stock_logits(build_tiny(), sample)
    assert torch.equal(stock_logits(prepare_trainable(build_tiny(), tune, seed=0), sample), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fresh_dora_adapter_changes_logits_by_rounding_only(build_tiny, build_sample, stock_logits, dtype):
    """DoRA divides by the norm it started from; in bf16 that norm is kept in fp32, else 0.2 % of every row would move."""
    sample = build_sample(dtype=dtype)
    tune = EVERYWHERE.model_copy(update={"dora": True})
    before = stock_logits(build_tiny(dtype=dtype), sample)
    after = stock_logits(prepare_trainable(build_tiny(dtype=dtype), tune, seed=0), sample)
    assert_close(after, before, rtol=0, atol=16 * torch.finfo(dtype).eps * before.abs().max().item())


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_unmerged_and_merging_twice_is_merging_once(build_tiny, stock_logits, stock_loss, sample, dora):
    tuned = step(
        prepare_trainable(build_tiny(), EVERYWHERE.model_copy(update={"dora": dora}), seed=0), stock_loss, sample
    )
    unmerged = stock_logits(tuned, sample)
    tuned.merge_adapter()
    once = values(tuned)
    assert_close(stock_logits(tuned, sample), unmerged)
    tuned.merge_adapter()
    assert all(torch.equal(once[name], value) for name, value in values(tuned).items())
    tuned.unmerge_adapter()
    assert_close(stock_logits(tuned, sample), unmerged)
    assert_close(stock_logits(tuned.merge_and_unload(), sample), unmerged)


@pytest.mark.parametrize(
    "tune",
    [
        Tune(rank=4),
        Tune(rank=4, attention=False),
        EVERYWHERE,
        MIXED,
        Tune(language="frozen", merger="trained"),
        Tune(method="full", language="trained", mlp=False),
        Tune(method="full", language="adapted", vision="adapted", merger="adapted"),
    ],
    ids=["lora", "mlp only", "everywhere", "mixed", "merger only", "full attention", "full"],
)
def test_exactly_the_trained_set_moves(build_tiny, stock_loss, sample, tune):
    tuned = prepare_trainable(build_tiny(), tune, seed=0)
    before = values(tuned)
    after = values(step(tuned, stock_loss, sample))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    wanted = {name for name in after if wanted_to_train(name, tune)}
    assert moved == wanted
    assert len(moved) > 0


def wanted_to_train(name, tune):
    """The config tree's words, spelled out once more and differently from the code under test."""
    component = component_of(name)
    state = "frozen" if component == "head" else getattr(tune, component)
    if component == "head":
        state = "trained" if tune.language == "trained" or tune.method == "full" else "frozen"
    if tune.method == "full" and state == "adapted":
        state = "trained"
    if is_adapter(name) != (state == "adapted") or state == "frozen":
        return False
    if ".self_attn." in name and component == "language":
        return tune.attention
    if ".mlp." in name and component == "language":
        return tune.mlp
    return True


def test_adapters_stand_on_every_linear_of_a_component_and_nowhere_else(build_tiny):
    tuned = prepare_trainable(build_tiny(), EVERYWHERE, seed=0)
    adapted = {plain_name(name).partition(".lora_")[0] for name, _ in tuned.named_parameters() if is_adapter(name)}
    linears = {
        name
        for name, module in build_tiny().named_modules()
        if isinstance(module, torch.nn.Linear) and component_of(name) != "head"
    }
    assert adapted == linears
    assert len(linears) == 4 * 7 + 4 * 4 + 4 * 2


def test_the_seed_alone_draws_the_adapter(build_tiny):
    def drawn(seed):
        state = torch.random.get_rng_state()
        tuned = prepare_trainable(build_tiny(), Tune(rank=4), seed=seed)
        assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state was used up"
        return tuned.get_parameter(
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"
        ).detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_adapters_of_a_bf16_model_are_fp32_and_compute_in_bf16(build_tiny, build_sample, stock_loss):
    sample = build_sample(dtype=torch.bfloat16)
    tuned = prepare_trainable(build_tiny(dtype=torch.bfloat16), EVERYWHERE, seed=0)
    assert {p.dtype for name, p in tuned.named_parameters() if is_adapter(name)} == {torch.float32}
    assert adapter_dtype(torch.bfloat16) is adapter_dtype(torch.float16) is torch.float32
    seen = []
    for module in tuned.modules():
        if isinstance(module, AdapterLinear):
            module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    stock_loss(tuned, [sample]).backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_what_trains_its_own_fp16_weights_is_widened_to_fp32(build_tiny):
    """A loss scaler refuses fp16 gradients; tower and mergers compute in one type, so both are widened."""
    tuned = prepare_trainable(build_tiny(dtype=torch.float16), Tune(language="adapted", merger="trained"), seed=0)
    kinds = {(component_of(name), p.dtype) for name, p in tuned.named_parameters() if not is_adapter(name)}
    assert kinds == {
        ("vision", torch.float32),
        ("merger", torch.float32),
        ("language", torch.float16),
        ("head", torch.float16),
    }
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_values_are_kept_where_another_library_rounds_them(build_tiny):
    tuned = prepare_trainable(build_tiny(dtype=torch.float32), Tune(rank=4), seed=0)
    before = values(tuned)
    with kept_values(tuned):
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    assert all(torch.equal(before[name], value) for name, value in values(tuned).items())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", [EVERYWHERE, MIXED, Tune(language="frozen", merger="trained")])
def test_saved_and_loaded_is_the_same_model_bitwise(build_tiny, stock_logits, stock_loss, sample, tune, tmp_path):
    tuned = step(prepare_trainable(build_tiny(), tune, seed=0), stock_loss, sample)
    save_tuned(tuned, tmp_path / "tuned")
    after = stock_logits(tuned, sample)
    assert torch.equal(stock_logits(load_tuned(build_tiny(), tmp_path), sample), after)
    resumed = prepare_trainable(build_tiny(), tune, seed=1)
    restore_tuned(resumed, tmp_path)
    assert torch.equal(stock_logits(resumed, sample), after)
    going_on = prepare_trainable(build_tiny(), tune.model_copy(update={"start_from": str(tmp_path)}), seed=1)
    assert torch.equal(stock_logits(going_on, sample), after)
    assert {n for n, p in going_on.named_parameters() if p.requires_grad} == {
        n for n, p in tuned.named_parameters() if p.requires_grad
    }


def test_plain_peft_reads_the_adapter(build_tiny, stock_logits, stock_loss, sample, tmp_path):
    tuned = step(prepare_trainable(build_tiny(), EVERYWHERE, seed=0), stock_loss, sample)
    save_tuned(tuned, tmp_path / "tuned")
    plain = PeftModel.from_pretrained(build_tiny(), str(tmp_path / "tuned"))
    assert_close(stock_logits(plain, sample), stock_logits(tuned, sample))
    assert {file.name for file in (tmp_path / "tuned").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_trained_weights_keep_transformers_own_names(build_tiny, tmp_path):
    save_tuned(prepare_trainable(build_tiny(), MIXED, seed=0), tmp_path / "tuned")
    names = set(load_file(tmp_path / "tuned" / "trained.safetensors"))
    assert names == {name for name, _ in build_tiny().named_parameters() if name.startswith("model.visual.")}


def test_a_merger_trained_first_is_the_start_of_a_decoder_adapted_later(
    build_tiny, stock_logits, stock_loss, sample, tmp_path
):
    first = step(prepare_trainable(build_tiny(), Tune(language="frozen", merger="trained"), seed=0), stock_loss, sample)
    save_tuned(first, tmp_path / "first")
    second = prepare_trainable(build_tiny(), Tune(rank=4, start_from=str(tmp_path / "first")), seed=0)
    assert torch.equal(stock_logits(second, sample), stock_logits(first, sample))
    assert not any(p.requires_grad for n, p in second.named_parameters() if component_of(n) == "merger")


def test_what_an_earlier_run_trained_is_saved_with_what_goes_on_from_it(
    build_tiny, stock_logits, stock_loss, sample, tmp_path
):
    first = step(prepare_trainable(build_tiny(), Tune(language="frozen", merger="trained"), seed=0), stock_loss, sample)
    save_tuned(first, tmp_path / "first")
    tune = Tune(rank=4, start_from=str(tmp_path / "first"))
    second = step(prepare_trainable(build_tiny(), tune, seed=0), stock_loss, sample)
    save_tuned(second, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert torch.equal(
        stock_logits(load_tuned(build_tiny(), tmp_path / "second"), sample), stock_logits(second, sample)
    )
    inherited = inherited_names(tmp_path / "second" / "trained.safetensors")
    assert set(inherited) == {name for name, _ in build_tiny().named_parameters() if component_of(name) == "merger"}
    restored = prepare_trainable(build_tiny(), tune.model_copy(update={"start_from": str(tmp_path / "second")}), seed=1)
    restore_tuned(restored, tmp_path / "second")
    assert torch.equal(stock_logits(restored, sample), stock_logits(second, sample))
    save_tuned(restored, tmp_path / "third")
    assert inherited_names(tmp_path / "third" / "trained.safetensors") == inherited


def test_saving_into_a_folder_that_exists_replaces_only_its_own_files(build_tiny, tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter_config.json").write_text("old")
    save_tuned(prepare_trainable(build_tiny(), Tune(rank=4), seed=0), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.parametrize("tune", [Tune(rank=16), Tune(language="frozen", vision="trained")], ids=["adapter", "trained"])
def test_a_full_disk_is_a_sentence_and_leaves_the_last_save_whole(build_tiny, tmp_path, tune):
    """A limit on file size stands in for a full disk: the same call fails at the same place."""
    folder = tmp_path / "tuned"
    model = prepare_trainable(build_tiny(), tune, seed=0)
    save_tuned(model, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match=r"tuned: no space left while saving: [\d.]+ GiB to write, [\d.]+ GiB free"):
            save_tuned(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["tuned"]


def test_a_runs_newest_checkpoint_is_found_behind_its_finished_weights(build_tiny, tmp_path):
    model = prepare_trainable(build_tiny(), Tune(rank=4), seed=0)
    for step_number in (9, 10):
        save_tuned(model, tmp_path / "checkpoints" / f"step-{step_number:06d}" / "tuned")
    assert find_tuned(tmp_path).parent.name == "step-000010"
    save_tuned(model, tmp_path / "tuned")
    assert find_tuned(tmp_path) == tmp_path / "tuned"
    with pytest.raises(ModelError, match=r"nowhere: is not a folder, so there is neither adapter_config\.json nor"):
        find_tuned(tmp_path / "nowhere")


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"language": "frozen"}, r"all frozen, so nothing would train\. .*tune\.language=adapted"),
        ({"attention": False, "mlp": False}, r"language is adapted, but attention and mlp are both false"),
        ({"method": "qlora", "language": "trained"}, r"tune\.language=trained with method qlora: .* tune\.method=lora"),
        (
            {"method": "qlora", "vision": "trained", "quantise_vision": True},
            r"tune\.vision=trained with method qlora: .*Set tune\.vision=adapted",
        ),
    ],
)
def test_contradictions_are_answered_before_anything_loads(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_tune(Tune(**settings))


@pytest.fixture(scope="module")
def saved(build_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "charts"
    save_tuned(prepare_trainable(build_tiny(), Tune(rank=4), seed=0), folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 8}, r"charts: made with rank 4, this run has rank 8\. Set tune\.rank=4"),
        ({"rank": 4, "alpha": 4}, r"charts: made with alpha 8, this run has alpha 4\.0\. Set tune\.alpha=8"),
        ({"rank": 4, "rslora": True}, r"made with rslora False, this run has rslora True\. Set tune\.rslora=false"),
        (
            {"rank": 4, "merger": "adapted"},
            r"lacks 16 of the 72 tensors of this run's adapter, .*It tunes language, this run language, merger",
        ),
        ({"rank": 4, "mlp": False}, r"24 of its 56 tensors have no place in this model"),
        ({"language": "frozen", "merger": "trained"}, r"holds an adapter, but with tune\.method=lora nothing here is"),
    ],
)
def test_an_adapter_that_does_not_fit_the_settings_is_answered(build_tiny, saved, settings, sentence):
    with pytest.raises(ModelError, match=sentence):
        prepare_trainable(build_tiny(), Tune(**settings, start_from=str(saved)), seed=0)


def test_an_adapter_of_another_size_is_answered(build_tiny, saved, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(saved, folder)
    from safetensors.torch import save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(4, 96)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=r"is \[4, 96\] there and \[\d+, \d+\] in this model\. It was made for a model of"
    ):
        load_tuned(build_tiny(), folder)


def test_trls_frozen_copy_of_an_adapter_is_not_saved_with_it(build_tiny, tmp_path):
    """GRPO with grpo.beta: TRL adds an adapter "ref", which PEFT would write into a folder of its own."""
    model = prepare_trainable(build_tiny(), Tune(rank=2), seed=0)
    model.add_adapter("ref", model.peft_config["default"])
    save_tuned(model, tmp_path / "tuned")
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
