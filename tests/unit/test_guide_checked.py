"""docs/guide-checked: its figures are those of the files, its two languages say the same, its claims about calls are true.

What a call takes is read from the source of the installed packages, because importing TRL takes longer than all of this.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from tools.guide_checked import figures
from tools.guide_checked.page import PAGES, PLACE, draw_page, draw_rows, read_advice, read_topics

from lensmith.config.read import read_config
from lensmith.data.images import fit_px
from lensmith.types import VisionGeometry

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
NUM_CLAIMS = 44
CLAIMS = [claim for topic in read_topics() for claim in topic.claims]
NUMBER = re.compile(r"\d[\d.,]*\d|\d")
TYPED = re.compile(r"\d\.\d+ ?GiB|\d ?%|\d ?tokens/s|\d+\.\d+ ?s\b|\d ?(times|倍)")
"""What only a figure may say."""


@pytest.mark.parametrize("language", PAGES)
def test_the_page_is_current(language):
    assert (REPOSITORY / "docs" / PAGES[language]).read_text(encoding="utf-8") == draw_page(language)


def test_every_claim_of_the_guide_is_there():
    assert len(CLAIMS) == NUM_CLAIMS


@pytest.mark.parametrize("figure", figures.SINGLE)
def test_a_measured_figure_is_the_number_in_its_file(figure):
    result, key, form = figures.SINGLE[figure]
    (content,) = (
        content
        for content in (json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json"))
        if isinstance(content, dict) and content["name"] == result
    )
    for part in key.split("."):
        content = content[part]
    assert figures.all_figures()[figure].text == format(content, form)


@pytest.mark.parametrize("case", figures.CASES)
def test_a_figure_of_a_case_is_the_number_in_its_file(case):
    file, wanted = figures.CASES[case]
    cases = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["cases"]
    (found,) = (
        one for one in cases if all({**one, "settings": " ".join(one["settings"])}.get(k) == wanted[k] for k in wanted)
    )
    shown = figures.all_figures()
    assert shown[f"{case}.gib"].text == f"{found['peak_gib']:.1f}"
    assert shown[f"{case}.s"].text == f"{found['step_s']:.2f}"


def test_a_picture_costs_a_token_per_32_px_squared_within_the_limits():
    geometry = VisionGeometry(16, 2, 2, (0.5,) * 3, (0.5,) * 3, 64)
    for name, (width, height) in figures.PICTURES.items():
        for kind, most in (("tokens", 16_384), ("capped", 1280)):
            rows_px, columns_px = fit_px(height, width, geometry, 64, most)
            assert figures.all_figures()[f"{kind}.{name}"].text == f"{rows_px * columns_px // 1024:,}"
    assert figures.all_figures()["tokens.1024x1024"].text == "1,024"
    assert figures.all_figures()["qwen25.1024x1024"].text == f"{round(1024 / 28) ** 2:,}"


def test_both_languages_have_the_same_rows_and_numbers():
    for topic in read_topics():
        rows = zip(draw_rows(topic, "en"), draw_rows(topic, "zh"), strict=True)
        for english, chinese in rows:
            assert sorted(NUMBER.findall(english)) == sorted(NUMBER.findall(chinese)), english
    english, chinese = draw_page("en"), draw_page("zh")
    assert sorted(NUMBER.findall(english)) == sorted(NUMBER.findall(chinese))
    assert english.count("\n| ") == chinese.count("\n| ")
    assert english.count("\n## ") == chinese.count("\n## ")


def test_no_number_that_is_ours_is_typed_by_hand():
    for claim in CLAIMS:
        for text in (*claim.found.values(), *claim.instead.values()):
            assert not TYPED.search(PLACE.sub("", text)), text
        assert sorted(claim.figures("en")) == sorted(claim.figures("zh"))


def test_what_is_not_measured_says_so_and_cites_no_measurement():
    unmeasured = [claim for claim in CLAIMS if claim.verdict == "unmeasured"]
    assert unmeasured
    for claim in unmeasured:
        kinds = {source.kind for name in claim.figures("en") for source in figures.all_figures()[name].sources}
        assert "measured" not in kinds
        assert "not measured yet" in claim.found["en"].lower(), claim.says
        assert "尚未" in claim.found["zh"], claim.says


@pytest.mark.parametrize("row", read_advice(), ids=lambda row: row["figure"])
def test_what_is_recommended_can_be_set_and_fits_its_card_by_plan(row, capsys):
    settings = shlex.split(row["settings"])
    read_config(None, settings)
    task = [one for one in settings if one.startswith(("task=", "grpo."))]
    kept = [one for one in settings if one not in task]
    command = ["plan", *kept, "--model", "8b", *shlex.split(row["work"]), "--gpu", str(row["card_gib"]), "--json"]
    assert figures.run_verb(command) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def source_of(module: str) -> ast.Module:
    """The parsed source of a module of an installed package, without importing it."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def fields_of(module: str) -> dict[str, str]:
    """Name -> how the dataclass field of that name is written."""
    found = ast.walk(source_of(module))
    return {
        one.target.id: ast.unparse(one) for one in found if isinstance(one, ast.AnnAssign) and hasattr(one.target, "id")
    }


def parameters_of(module: str, name: str) -> set[str]:
    """What a class takes when it is made."""
    (found,) = (one for one in ast.walk(source_of(module)) if isinstance(one, ast.ClassDef) and one.name == name)
    (init,) = (one for one in found.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
    assert init.args.kwarg is None
    return {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}


def test_the_calls_of_the_guide_fail_and_pass_as_the_page_says():
    shared = fields_of("transformers.training_args") | fields_of("trl.trainer.base_config")
    sft, grpo = shared | fields_of("trl.trainer.sft_config"), shared | fields_of("trl.trainer.grpo_config")
    assert len(shared) > 50
    assert "max_seq_length" not in sft
    assert "warmup_ratio" not in sft
    assert "max_new_tokens" not in grpo
    assert {"max_length", "warmup_steps", "dataset_text_field", "remove_unused_columns", "bf16", "logging_steps",
            "save_steps", "num_train_epochs"} <= set(sft)  # fmt: skip
    assert {"max_completion_length", "num_generations"} <= set(grpo)
    assert "default=2e-05" in sft["learning_rate"]
    assert "default=1e-06" in grpo["learning_rate"]
    for module, name in (("sft_trainer", "SFTTrainer"), ("grpo_trainer", "GRPOTrainer")):
        taken = parameters_of(f"trl.trainer.{module}", name)
        assert "processing_class" in taken
        assert "tokenizer" not in taken


def test_the_guides_rows_cannot_be_made_a_data_set():
    parts = [{"type": "image", "image": "path/to/chart.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]
    with pytest.raises(pa.ArrowInvalid, match="cannot mix list and non-list, non-null values"):
        Dataset.from_list([{"messages": messages}])


def test_none_of_the_guides_target_modules_is_in_the_tower():
    in_tower, in_decoder = set(), set()
    for one in ast.walk(source_of("transformers.models.qwen3_vl.modeling_qwen3_vl")):
        if isinstance(one, ast.ClassDef):
            linears = {
                part.targets[0].attr
                for part in ast.walk(one)
                if isinstance(part, ast.Assign)
                and isinstance(part.targets[0], ast.Attribute)
                and ast.unparse(part.value).startswith("nn.Linear")
            }
            (in_tower if "Vision" in one.name else in_decoder).update(linears)
    assert in_tower == {"qkv", "proj", "linear_fc1", "linear_fc2"}
    guide = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert guide <= in_decoder
    assert not guide & in_tower
