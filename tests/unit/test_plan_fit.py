"""The ladder: the first sufficient changes, cheapest first, nothing superfluous, and a sentence where nothing helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tools import fit_plan

from lensmith.config.read import read_config
from lensmith.config.rules import contradictions
from lensmith.config.tree import RunConfig
from lensmith.config.write import config_diff, write_value
from lensmith.errors import ConfigError
from lensmith.plan.answer import Asked, Plan, answer_plan, check_fits, on_smallest_card
from lensmith.plan.cards import BY_SIZE, card_of_size, find_card
from lensmith.plan.coefficients import Coefficients
from lensmith.plan.facts import SIZES, read_facts
from lensmith.plan.fit import LADDER, Situation, apply_changes, find_changes, with_settings
from lensmith.plan.memory import plan_memory
from lensmith.plan.records import Record, read_records
from lensmith.plan.time import plan_time
from lensmith.plan.work import Rollout, Work, group_work, scaled_work, shared_work, work_of

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
METHODS = ("lora", "qlora", "lora_8bit", "full")
GRID_TOLERANCE = 0.01
"""Records made by the formulas themselves hold no error that a fit could not take away."""


def settings(*overrides: str) -> RunConfig:
    return read_config(None, overrides)


def plan(size: str, *overrides: str, gpu: str) -> Plan:
    return answer_plan(settings(*overrides), Asked(SIZES[size], find_card(gpu)))


def taken(found: Plan) -> list[dict[str, Any]]:
    assert found.steps is not None
    return [dict(step.change.settings) for step in found.steps]


def test_what_fits_is_left_alone():
    found = plan("8B", "tune.method=qlora", gpu="24")
    assert found.fits
    assert found.steps == ()
    assert found.fitting == found.config


def test_8b_in_four_bits_fits_8_gib_by_what_costs_no_quality():
    found = plan("8B", "tune.method=qlora", "pack.tokens=6000", gpu="8")
    assert not found.fits
    assert taken(found) == [{"memory.embedding": "host"}, {"memory.tower": "host"}, {"memory.offload": "inputs"}]
    assert found.steps is not None
    peaks = [step.peak_gib for step in found.steps]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= find_card("8").usable_gib < peaks[-2]
    assert all(step.change.quality == "none" for step in found.steps)


@pytest.mark.parametrize("gpu", BY_SIZE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", ["2B", "8B", "32B"])
def test_every_proposal_fits_contradicts_nothing_and_needs_each_change(size, method, gpu):
    found = plan(size, f"tune.method={method}", gpu=str(gpu))
    if found.steps is None:
        assert found.way_out
        return
    changes = tuple(step.change for step in found.steps)
    asked = Asked(SIZES[size], find_card(str(gpu)))
    assert found.fitting is not None
    assert asked.fits(found.fitting)
    assert contradictions(found.fitting) == []
    for change in changes[:-1]:
        rest = apply_changes(found.config, [other for other in changes if other is not change])
        assert not asked.fits(rest) or contradictions(rest)


def test_no_more_layers_are_recomputed_than_needed():
    found = plan("8B", "tune.method=qlora", "memory.recompute=none", gpu="40")
    (change,) = taken(found)
    count = change["memory.recompute"]
    fewer = with_settings(found.config, {"memory.recompute": count - 4})
    assert not Asked(SIZES["8B"], find_card("40")).fits(fewer)


def test_room_to_spare_is_said():
    found = plan("8B", "tune.method=qlora", gpu="24")
    assert found.faster is not None
    assert found.faster.slower < 1
    assert found.faster.peak_gib <= find_card("24").usable_gib
    assert plan("2B", "tune.method=qlora", "memory.recompute=none", gpu="80").faster is None


def test_a_change_that_later_ones_make_superfluous_is_not_proposed():
    wanted = {"tune.method": "qlora"}
    changes = find_changes(
        settings("tune.method=lora"), Situation(SIZES["8B"]), lambda config: config.tune.method == "qlora"
    )
    assert changes is not None
    assert [dict(change.settings) for change in changes] == [wanted]


def test_packs_never_get_shorter_than_the_longest_row():
    situation = Situation(SIZES["8B"], sample_tokens=3000)
    tried: list[int | None] = []
    find_changes(settings("tune.method=qlora"), situation, lambda config: bool(tried.append(config.pack.tokens)))
    assert {tokens for tokens in tried if tokens and tokens >= 3000} == {4096}


def test_nothing_enough_names_the_largest_model_and_the_smallest_card():
    found = answer_plan(settings("tune.method=qlora"), Asked(SIZES["32B"], card_of_size(2)))
    assert found.steps is None
    assert "the largest model that can be made to fit 2 GiB is 4B" in found.way_out
    assert "the smallest card that can be made to do for 32B has 8 GiB" in found.way_out


def test_check_fits_is_quiet_where_it_fits_and_one_sentence_where_not():
    config = settings("model=Qwen/Qwen3-VL-8B-Instruct", "tune.method=qlora", "pack.tokens=6000")
    assert check_fits(config, 24).fits
    with pytest.raises(
        ConfigError, match=r"planned to reserve \d+\.\d GiB, and of this card's 8\.0 GiB torch can have 7\.2"
    ) as told:
        check_fits(config, 8)
    assert "It fits with memory.embedding=host memory.tower=host memory.offload=inputs;" in str(told.value)
    with pytest.raises(
        ConfigError, match=r"No settings are enough: the largest model .* is 4B; the smallest card .* 8 GiB"
    ):
        check_fits(config, 2)


def test_the_smallest_card_is_the_first_that_fits_as_it_is():
    found = on_smallest_card(lambda card: answer_plan(settings("tune.method=qlora"), Asked(SIZES["4B"], card)))
    assert (found.card.gib, found.fits) == (8, True)
    huge = on_smallest_card(lambda card: answer_plan(settings("tune.method=full"), Asked(SIZES["32B"], card)))
    assert (huge.card.gib, huge.fits) == (80, False)


def test_every_rung_says_what_it_costs():
    assert len(LADDER) == 13
    assert all(rung.time and rung.quality for rung in LADDER)


# --- work and time ----------------------------------------------------------------------------------------------------


def test_pairs_of_attention_count_a_shared_prefix_once():
    assert Work(tokens=800, learned=0, samples=8).pairs == 8 * 100**2 / 2
    rollout = Rollout(group=4, completion_tokens=100, prompt_tokens=1000)
    shared = group_work(rollout, images=1, image_tokens=900, budget_tokens=8192, effective_samples=4)
    assert shared == Work(1400, 400, samples=4, images=1, image_tokens=900, key_tokens=1000 + 4 * 1100)
    assert shared.pairs == 1000**2 / 2 + 4 * 100 * (1000 + 50)
    alone = group_work(
        replace(rollout, share_prefix=False), images=1, image_tokens=900, budget_tokens=8192, effective_samples=4
    )
    assert (alone.tokens, alone.images, alone.key_tokens) == (4400, 4, None)


def test_a_group_over_the_budget_takes_several_packs():
    rollout = Rollout(group=8, completion_tokens=1000, prompt_tokens=1000)
    work = group_work(rollout, images=1, image_tokens=900, budget_tokens=5000, effective_samples=8)
    assert (work.tokens, work.samples, work.packs_per_step) == (5000, 4, 2)


def test_whole_groups_share_a_pack_as_far_as_the_budget_goes():
    rollout = Rollout(group=4, completion_tokens=250, prompt_tokens=1000)
    work = group_work(rollout, images=1, image_tokens=900, budget_tokens=8192, effective_samples=20)
    assert (work.tokens, work.samples, work.prefixes, work.images) == (4 * 2000, 16, 4, 4)
    assert work.packs_per_step == 2
    alone = replace(rollout, share_prefix=False)
    work = group_work(alone, images=1, image_tokens=900, budget_tokens=8192, effective_samples=20)
    assert (work.tokens, work.samples, work.packs_per_step) == (6 * 1250, 6, 4)


@pytest.mark.parametrize(
    ("name", "group", "completion", "image", "samples"), [("w2", 4, 256, 1024, 8), ("long", 16, 64, 2500, 16)]
)
def test_a_step_of_grpo_takes_what_was_measured(name, group, completion, image, samples):
    """Seconds within 25 %. They are two shapes, and the rollout's two coefficients come from them: no proof for a third."""
    measured = json.loads((RESULTS / f"grpo-{name}-8b.json").read_text(encoding="utf-8"))
    config = settings("task=grpo", "tune.method=qlora", f"optim.effective_samples={samples}", f"grpo.group={group}")
    rollout = Rollout(group=group, completion_tokens=completion, prompt_tokens=image + 50)
    work = group_work(rollout, images=1, image_tokens=image, budget_tokens=8192, effective_samples=samples)
    facts, card = SIZES["8B"], find_card("80")
    assert plan_time(facts, config, work, card, rollout=rollout).step_s == pytest.approx(measured["value"], rel=0.25)
    peak_gib = plan_memory(facts, config, work, rollout=rollout).peak_gib
    assert peak_gib == pytest.approx(measured["peak_reserved_gib"], rel=0.15)


def test_smaller_packs_hold_fewer_images():
    work = work_of(6000, images=8, image_tokens=700, effective_samples=16)
    assert (work.image_tokens, work.packs_per_step) == (5600, 2)
    half = scaled_work(work, settings("pack.tokens=3000", "data.image.max_tokens=600"))
    assert (half.tokens, half.images, half.image_tokens, half.packs_per_step) == (3000, 4, 2400, 4)


def test_recomputation_costs_a_third_of_the_decoders_products():
    work, card = Work(tokens=8192, learned=100), find_card("4090")
    exact = Coefficients(matmul=1.0, bandwidth=1e9)
    times = [
        plan_time(
            SIZES["8B"], settings(f"memory.recompute={how}", "tune.rank=1"), work, card, coefficients=exact
        ).step_s
        for how in ("none", "layers")
    ]
    # Three passes instead of two; a little less, because attention's backward pass is dearer than its forward pass.
    assert times[1] / times[0] == pytest.approx(1.5, rel=0.04)


def test_time_of_products_is_two_operations_per_weight_token_and_pass():
    work, card = Work(tokens=8192, learned=8192, samples=8192), find_card("4090")
    exact = Coefficients(matmul=1.0, bandwidth=1e9, layer_launch_ms=0.001, few_bit_launch_ms=0)
    found = plan_time(SIZES["8B"], settings("tune.rank=1", "tune.mlp=false"), work, card, coefficients=exact)
    adapters = 36 * ((4096 + 4096) * 2 + 2 * (4096 + 1024))
    operations = 2 * 8192 * (6_945_767_424 * 3 + adapters * 4) + 36 * 4 * 4096 * 8192 / 2 * 4.5
    assert found.parts["decoder"] == pytest.approx(operations / 165.2e12, rel=1e-6)


def test_streamed_layers_take_what_their_copies_take_where_packs_are_small():
    work = Work(tokens=256, learned=64)
    config = settings("tune.method=lora", "memory.stream_layers=36")
    found = plan_time(SIZES["8B"], config, work, find_card("4090"), coefficients=Coefficients(pcie=1.0))
    crossing = 2 * 36 * SIZES["8B"].layer * 2 / 32e9
    assert found.parts["decoder"] + found.parts["decoder, copies"] == pytest.approx(crossing)


# --- coefficients -----------------------------------------------------------------------------------------------------


def make_grid(true: Coefficients) -> list[Record]:
    """Records as a GPU would give them whose coefficients are `true`."""
    grid = []
    for size in ("2B", "4B", "8B"):
        for method in ("lora", "qlora"):
            for recompute in ("none", "layers"):
                for tokens in (1024, 6144):
                    work = Work(tokens, tokens // 10, samples=2, images=2, image_tokens=tokens // 2)
                    record = Record(
                        f"{size}-{method}-{recompute}-{tokens}",
                        size,
                        "NVIDIA H100 80GB HBM3",
                        (f"tune.method={method}", f"memory.recompute={recompute}"),
                        work,
                        peak_gib=0,
                        step_s=0,
                    )
                    peak_gib, step_s = record.predict(true)
                    grid.append(replace(record, peak_gib=peak_gib, step_s=step_s))
    return sorted(grid, key=lambda record: record.name)


def test_the_fit_finds_what_a_grid_was_made_with_and_is_judged_by_the_other_half(tmp_path, capsys):
    true = Coefficients(kept_activations=1.1, live_layer=1.3, fragmentation_gib=0.4, matmul=0.45, bandwidth=0.6)
    grid = make_grid(true)
    fitted, judged = fit_plan.split(grid)
    assert len(fitted) == len(judged) == 12
    before = fit_plan.report_errors(judged, Coefficients())
    after = fit_plan.report_errors(judged, fit_plan.fit(fitted, Coefficients()))
    assert before["peak_worst"] > 0.05 > GRID_TOLERANCE > after["peak_worst"]
    assert before["step_worst"] > 0.1 > 3 * GRID_TOLERANCE > after["step_worst"]

    cases = [case_of(record) for record in grid]
    failed = {"size": "8b", "settings": [], "error": "OutOfMemoryError: 81 GiB"}
    (tmp_path / "grid.json").write_text(json.dumps({"gpu_or_cpu": grid[0].card, "cases": [failed, *cases]}))
    assert (
        fit_plan.main(
            [str(tmp_path / "grid.json"), "--out", str(tmp_path / "c.json"), "--picture", str(tmp_path / "p.png")]
        )
        == 0
    )
    told = json.loads((tmp_path / "c.json").read_text())
    assert told["errors"] == after
    assert json.loads(capsys.readouterr().out) == told
    assert (tmp_path / "p.png").stat().st_size > 0
    Coefficients(**told["values"])


def test_one_odd_hour_does_not_bend_the_fit_and_shares_of_a_rate_stay_possible():
    true = Coefficients(matmul=0.45, bandwidth=0.6, layer_launch_ms=2.0)
    grid = make_grid(true)
    odd = [replace(record, step_s=1.6 * record.step_s) if n % 8 == 0 else record for n, record in enumerate(grid)]
    found = fit_plan.fit(odd, Coefficients())
    errors = fit_plan.report_errors(grid, found)
    assert errors["step_median"] < 3 * GRID_TOLERANCE
    assert errors["step_worst"] < fit_plan.OUTLIER
    slow = [replace(record, step_s=10 * record.step_s) for record in grid]
    found = fit_plan.fit(slow, Coefficients())
    for name, (lowest, highest) in fit_plan.BOUNDS.items():
        assert lowest * 0.999 <= getattr(found, name) <= highest * 1.001


def test_a_tower_that_waits_for_launches_is_not_taken_for_slow_arithmetic():
    """A pack of one small picture, by coefficients that differ in the tower's launching only."""
    work, card, config = Work(1024, 80, images=1, image_tokens=700), find_card("H200"), settings("tune.method=qlora")
    quick, slow = (
        plan_time(SIZES["8B"], config, work, card, coefficients=Coefficients(tower_launch_ms=ms)) for ms in (0.01, 2.0)
    )
    assert quick.parts["tower"] == slow.parts["tower"]
    added = slow.parts["launching kernels"] - quick.parts["launching kernels"]
    assert added == pytest.approx(27 * 2.0 / 1e3, rel=0.2)  # 27 blocks, once; less where the GPU was busy anyway
    without = Work(1024, 80)
    bare = plan_time(SIZES["8B"], config, without, card, coefficients=Coefficients(tower_launch_ms=2.0))
    assert "tower" not in bare.parts


# --- GRPO -------------------------------------------------------------------------------------------------------------


def test_a_measured_group_is_read_with_its_shared_prompts(tmp_path):
    case = {"size": "8b", "settings": ["tune.method=qlora"], "tokens": 4308, "images": 2, "image_tokens": 1024}
    case |= {"learned": 2048, "samples": 8, "peak_gib": 9.0, "step_s": 0.5}
    grid = {"gpu_or_cpu": "NVIDIA H100 80GB HBM3", "cases": [case, {**case, "group": 4}]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    alone, shared = read_records(tmp_path / "grid.json")
    assert (alone.work.key_tokens, alone.work.group) == (None, 1)
    prompt = (4308 - 2048) // 2
    assert shared.work == replace(alone.work, key_tokens=2 * prompt + 8 * (prompt + 256), prefixes=2)
    assert shared.work.pairs == 2 * prompt**2 / 2 + 8 * 256 * (prompt + 128)
    assert shared.name == f"{alone.name}, groups of 4"


def test_sharing_prompts_saves_memory_and_time_in_proportion_to_the_tokens_saved():
    config, card = settings("tune.method=qlora"), find_card("H100")
    together = shared_work(Work(4308, 2048, samples=8, images=2, image_tokens=2048), prefixes=2)
    each = Work(8 * (1130 + 256), 2048, samples=8, images=8, image_tokens=8192)
    alive = [plan_memory(SIZES["8B"], config, work).moments["backward"] for work in (together, each, Work(1, 1))]
    times = [plan_time(SIZES["8B"], config, work, card, coefficients=Coefficients(layer_launch_ms=0.01)).parts
             for work in (together, each)]  # fmt: skip
    # Keys and values of shared prompts are copied for each branch, so the saving is a little less.
    assert 4308 / 11088 < (alive[0] - alive[2]) / (alive[1] - alive[2]) < 0.55
    assert times[0]["decoder"] / times[1]["decoder"] == pytest.approx(4308 / 11088, rel=0.08)
    assert times[0]["tower"] / times[1]["tower"] == pytest.approx(2 / 8)


def case_of(record: Record) -> dict[str, Any]:
    """A record as benchmarks/memory_grid.py writes it."""
    work = record.work
    pack = {"tokens": work.tokens, "learned": work.learned, "samples": work.samples, "images": work.images}
    image = {"image_tokens": work.image_tokens // work.images}
    found = {"peak_gib": record.peak_gib, "step_s": record.step_s}
    return {"size": record.model, "settings": list(record.settings), **pack, **image, **found}


def test_a_record_on_an_unknown_card_says_where_to_add_it():
    record = Record("odd", "2B", "Quadro 9", (), Work(100, 10), 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"odd: Quadro 9 is not in lensmith\.plan\.cards"):
        record.predict(Coefficients())


def test_a_fitting_config_is_read_back_to_the_same(tmp_path):
    found = plan("8B", "tune.method=qlora", "pack.tokens=6000", gpu="8")
    assert found.fitting is not None
    again = settings(*(f"{path}={write_value(value)}" for path, value in config_diff(found.fitting).items()))
    assert again == found.fitting
    assert read_facts("8b") == SIZES["8B"]
