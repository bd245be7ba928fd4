"""A merged model is the trained one: plain transformers + PEFT are the judge, on the base's own names and types."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from lensmith.config.read import read_config
from lensmith.errors import ConfigError, ModelError, RunError
from lensmith.export import merge as merging
from lensmith.export.base import EMBEDDING, HEAD
from lensmith.export.merge import merge_run
from lensmith.export.whole import RECORD
from lensmith.model.adapters import ADAPTER_CONFIG, load_tuned, prepare_trainable, save_tuned
from lensmith.model.components import is_adapter
from lensmith.model.load import load_model
from lensmith.model.names import resolve_model
from lensmith.rundir import RunDir

TINY = Path(resolve_model("lensmith/tiny"))
SMALL_FILE = 4_000_000
"""Bytes: the tiny model then takes three files."""


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """`make_run("tune.method=qlora")` -> a finished run whose tuned weights were moved at random, far enough to see."""
    made: dict[tuple[str, ...], RunDir] = {}

    def make(*settings: str) -> RunDir:
        if settings not in made:
            folder = tmp_path_factory.mktemp("run")
            config = read_config(None, [f"run={folder}", *settings])
            loaded = load_model(config)
            run = RunDir(folder)
            run.start(config, {"precision": str(loaded.dtype).removeprefix("torch.")})
            model = prepare_trainable(loaded.model, config.tune, seed=0)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        scale = 0.04 if is_adapter(name) else 0.01
                        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            save_tuned(model, folder / "tuned")
            made[settings] = run
        return made[settings]

    return make


@pytest.fixture(scope="module")
def inputs():
    """One picture and a question about it."""
    processor = AutoProcessor.from_pretrained(TINY)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(text=[text], images=[Image.new("RGB", (96, 64), "teal")], return_tensors="pt")


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.double()


def stock(folder: Path, dtype=torch.float64):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def judged(run: RunDir):
    """Base and tuned weights as anyone without Lensmith would load them, in float64."""
    model, tuned = stock(TINY), run.path / "tuned"
    if (tuned / "trained.safetensors").is_file():
        _, extra = model.load_state_dict(load_file(tuned / "trained.safetensors"), strict=False)
        assert not extra
    return PeftModel.from_pretrained(model, tuned) if (tuned / ADAPTER_CONFIG).is_file() else model


def widened_base(run: RunDir, folder: Path) -> Path:
    """The run's base once more in fp32, so that the merge rounds next to nothing; the run is told to use it."""
    if not (folder / "config.json").is_file():
        stock(TINY, torch.float32).save_pretrained(folder)
        AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    text = run.config_path.read_text().replace("model: lensmith/tiny", f"model: {folder}")
    run.config_path.write_text(text)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("tune.rslora=true", "tune.alpha=24"),
        ("tune.dora=true",),
        ("tune.vision=adapted", "tune.merger=adapted"),
        ("tune.merger=trained",),
        ("tune.method=full", "tune.vision=trained"),
    ],
    ids=["lora", "rslora", "dora", "tower", "trained-merger", "full"],
)
def test_a_merged_model_answers_like_its_adapter(make_run, inputs, tmp_path, settings):
    run = make_run(*settings)
    merged = merge_run(run, run.path, tmp_path / "merged", file_bytes=SMALL_FILE)
    ours, theirs, base = (logits(m, inputs) for m in (stock(tmp_path / "merged"), judged(run), stock(TINY)))
    moved = float((theirs - base).abs().mean())
    # bf16 keeps 8 bits, so each weight is off by up to 2^-9 of itself.
    assert float((ours - theirs).abs().mean()) < 0.05 * moved
    assert merged.tensors == len(read_all(TINY))


@pytest.mark.parametrize("settings", [(), ("tune.dora=true",), ("tune.merger=trained", "tune.rslora=true")])
def test_merged_into_an_fp32_base_it_answers_the_same_to_six_digits(make_run, inputs, tmp_path, settings):
    run = make_run("precision=fp32", *settings)
    expected = logits(judged(run), inputs)
    widened_base(run, tmp_path / "base")
    merged = merge_run(run, run.path, tmp_path / "merged")
    assert_close(logits(stock(tmp_path / "merged"), inputs), expected, rtol=1e-4, atol=1e-4)
    assert merged.lost is not None
    assert merged.lost < 1e-5


def test_names_types_shapes_and_untouched_bytes_are_the_bases(make_run, tmp_path):
    run = make_run()
    merged = merge_run(run, run.path, tmp_path / "merged", file_bytes=SMALL_FILE)
    base, ours = read_all(TINY), read_all(tmp_path / "merged")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    changed = {tensor.name for tensor in merged.changed}
    assert {name for name in base if not torch.equal(base[name], ours[name])} == changed
    assert len(changed) == 6 * 7
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in base.values())
    assert len(set(index["weight_map"].values())) == 3


def test_a_tied_head_stays_tied_when_the_embedding_was_trained(make_run, inputs, tmp_path):
    run = make_run("tune.method=full", "tune.vision=trained")
    merge_run(run, run.path, tmp_path / "merged")
    assert "lm_head.weight" not in read_all(tmp_path / "merged")
    model = stock(tmp_path / "merged")
    trained = load_file(run.path / "tuned" / "trained.safetensors")["model.language_model.embed_tokens.weight"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_close(model.lm_head.weight, trained.bfloat16().double())


def test_a_head_trained_apart_from_a_tied_embedding_is_refused(make_run, tmp_path):
    run = make_run("tune.merger=trained", "tune.rank=2")
    from safetensors.torch import save_file

    path = run.path / "tuned" / "trained.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(2048, 192)}, path)
    with pytest.raises(ModelError, match=r"trained lm_head\.weight apart from the embedding"):
        merge_run(run, run.path, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_merged_into_nf4_it_is_the_model_that_was_trained(make_run, inputs, tmp_path):
    run = make_run("tune.method=qlora")
    trained = load_model(run.read_config())
    expected = logits(load_tuned(trained.model, run.path), inputs)
    merged = {into: merge_run(run, run.path, tmp_path / into, into=into) for into in ("base", "nf4-dequantised")}
    apart = {into: float((logits(stock(tmp_path / into), inputs) - expected).abs().mean()) for into in merged}
    assert apart["nf4-dequantised"] < 0.1 * apart["base"]
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "quantization_config" not in config
    # NF4 of normally distributed weights in blocks of 64 is off by about 9 %.
    assert all(0.05 < (m.nf4_error or 0) < 0.13 for m in merged.values())
    assert "Trained beside NF4" in " ".join(merged["base"].sentences())


def test_the_nf4_difference_is_that_of_the_two_folders(make_run, tmp_path):
    run = make_run("tune.method=qlora")
    merged = merge_run(run, run.path, tmp_path / "base")
    merge_run(run, run.path, tmp_path / "nf4", into="nf4-dequantised")
    full, nf4 = read_all(tmp_path / "base"), read_all(tmp_path / "nf4")
    for tensor in merged.changed:
        a, b = full[tensor.name].double(), nf4[tensor.name].double()
        assert tensor.nf4 == pytest.approx(float((a - b).norm() / b.norm()), rel=0.01)


def test_what_rounding_takes_is_measured(make_run, tmp_path):
    run = make_run()
    merged = merge_run(run, run.path, tmp_path / "merged")
    base, ours = read_all(TINY), read_all(tmp_path / "merged")
    tensors = load_file(run.path / "tuned" / "adapter_model.safetensors")
    for tensor in merged.changed:
        key = f"base_model.model.{tensor.name.removesuffix('.weight')}"
        update = 2.0 * tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        left = ours[tensor.name].double() - base[tensor.name].double() - update
        assert tensor.change == pytest.approx(float(update.norm() / base[tensor.name].double().norm()), rel=1e-4)
        assert tensor.lost == pytest.approx(float(left.norm() / update.norm()), rel=1e-2)
        assert math.isfinite(tensor.lost)


def test_nf4_is_refused_where_nothing_was_in_nf4(make_run, tmp_path):
    run = make_run()
    with pytest.raises(ConfigError, match=r"tune\.method=lora, so no weight was in NF4"):
        merge_run(run, run.path, tmp_path / "merged", into="nf4-dequantised")


def test_the_processor_resizes_as_training_did(make_run, tmp_path):
    run = make_run("data.image.max_tokens=40", "data.image.min_tokens=9")
    merge_run(run, run.path, tmp_path / "merged")
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_processor.size == {
        "shortest_edge": 9 * 1024,
        "longest_edge": 40 * 1024,
    }
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_the_merge_of_a_cut_off_export_leaves_nothing_and_keeps_the_one_before(make_run, tmp_path, monkeypatch):
    run, out = make_run(), tmp_path / "merged"

    def cut_off(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_run(run, run.path, out, progress=cut_off)
    assert not list(tmp_path.iterdir())
    merge_run(run, run.path, out)
    before = (out / RECORD).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        merge_run(run, run.path, out, progress=cut_off)
    assert (out / RECORD).read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_somebodys_folder_is_left_alone(make_run, tmp_path):
    run = make_run()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds thesis\.tex but no lensmith_export\.json"):
        merge_run(run, run.path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_without_room_is_said_before_anything_is_written(make_run, tmp_path, monkeypatch):
    run = make_run()
    monkeypatch.setattr(merging, "SMALL_FILES_BYTES", 2**60)
    with pytest.raises(RunError, match=r"needs 1073741824\.\d+ GiB, and .* nothing was written"):
        merge_run(run, run.path, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_model_is_refused(make_run, tmp_path, build_tiny):
    run = make_run("tune.rank=3")
    tensors = load_file(run.path / "tuned" / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name.replace("layers.5", "layers.95"): tensor for name, tensor in tensors.items()},
        run.path / "tuned" / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"7 of its 42 changed tensors are not in lensmith/tiny"):
        merge_run(run, run.path, tmp_path / "merged")


def test_written_files_hold_what_safetensors_says_of_them(make_run, tmp_path):
    run = make_run()
    merge_run(run, run.path, tmp_path / "merged")
    with safe_open(str(tmp_path / "merged" / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture(scope="module")
def nf4_checkpoint(tmp_path_factory) -> Path:
    """lensmith/tiny as transformers stores it in 4 bits."""
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("nf4")
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=quant)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)
    return folder


def test_a_checkpoint_stored_in_4_bits_is_merged_into_its_widened_weights(make_run, nf4_checkpoint, inputs, tmp_path):
    run = make_run(f"model={nf4_checkpoint}", "tune.method=qlora")
    trained = load_model(run.read_config())
    expected = logits(load_tuned(trained.model, run.path), inputs)
    merged = merge_run(run, run.path, tmp_path / "merged")
    ours = read_all(tmp_path / "merged")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in read_all(TINY).items()
    }
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "stored in 4 bits itself" in " ".join(merged.sentences())
    assert float((logits(stock(tmp_path / "merged"), inputs) - expected).abs().mean()) < 0.02


def test_weights_that_the_run_before_had_trained_are_merged_too(make_run, tmp_path):
    before = make_run("tune.language=frozen", "tune.merger=trained")
    run = make_run(f"tune.start_from={before.path}")
    merged = merge_run(run, run.path, tmp_path / "merged")
    theirs = load_file(before.path / "tuned" / "trained.safetensors")
    ours = read_all(tmp_path / "merged")
    assert theirs
    assert all(torch.equal(ours[name], tensor.to(ours[name].dtype)) for name, tensor in theirs.items())
    assert f"{len(theirs)} tensors that an earlier run had trained are merged as well" in merged.notes[0]


def test_an_adapter_on_weights_that_the_run_before_had_trained_is_added_to_those(make_run, inputs, tmp_path):
    before = make_run("tune.language=frozen", "tune.merger=trained")
    run = make_run(f"tune.start_from={before.path}", "tune.merger=adapted", "tune.language=frozen")
    merge_run(run, run.path, tmp_path / "merged")
    model = stock(TINY)
    model.load_state_dict(load_file(before.path / "tuned" / "trained.safetensors"), strict=False)
    earlier = logits(model, inputs)
    theirs = logits(PeftModel.from_pretrained(model, run.path / "tuned"), inputs)
    ours = logits(stock(tmp_path / "merged"), inputs)
    assert float((ours - theirs).abs().mean()) < 0.1 * float((theirs - earlier).abs().mean())


def test_an_adapter_that_got_no_update_is_named(make_run, tmp_path):
    run = make_run("tune.rank=5")
    path = run.path / "tuned" / "adapter_model.safetensors"
    tensors = load_file(path)
    from safetensors.torch import save_file

    save_file({name: 0 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}, path)
    merged = merge_run(run, run.path, tmp_path / "merged")
    assert "Warning: 42 of 42 trained tensors equal the base's" in merged.sentences()[-1]
    assert merged.lost is None


def test_the_files_that_older_readers_look_at_have_the_limits_too(make_run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in TINY.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    (base / "preprocessor_config.json").write_text(json.dumps({"size": size, "patch_size": 16}))
    (base / "LICENSE").write_text("of the base")
    (base / "README.md").write_text("of the base")
    run = make_run(f"model={base}", "data.image.max_tokens=40")
    merged = merge_run(run, run.path, tmp_path / "merged")
    older = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert older == {"size": {"shortest_edge": 4096, "longest_edge": 40 * 1024}, "patch_size": 16}
    assert "LICENSE" in merged.files
    assert "README.md" not in merged.files


def test_a_tied_head_that_the_base_also_stores_follows_the_embedding(make_run, tmp_path):
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    for file in TINY.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = read_all(TINY)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(f"model={base}", "tune.method=full")
    merged = merge_run(run, run.path, tmp_path / "merged")
    ours = read_all(tmp_path / "merged")
    assert torch.equal(ours[HEAD], ours[EMBEDDING])
    assert not torch.equal(ours[EMBEDDING], tensors[EMBEDDING])
    assert "also stores its tied head" in merged.notes[0]
