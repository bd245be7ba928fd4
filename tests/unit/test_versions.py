"""Versions are compared with pyproject.toml's ranges, and the answer is a line that pip understands."""

import json
import tomllib
from pathlib import Path

import pytest

from lensmith.errors import ModelError
from lensmith.model import versions
from lensmith.model.versions import (
    CHECKED,
    Misfit,
    check_versions,
    environment,
    find_misfits,
    installed_versions,
    own_requirements,
)

REQUIRED = ["transformers<5.24,>=5.17", "torch<2.16,>=2.11", "trackio>=9; extra == 'trackio'"]


PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_ranges_are_those_of_pyproject():
    written = PYPROJECT["project"]["dependencies"]
    nothing_installed = dict.fromkeys(CHECKED)
    wanted = [item.requirement for item in find_misfits(written, nothing_installed)]
    assert len(wanted) == len(CHECKED)
    assert [item.requirement for item in find_misfits(own_requirements(), nothing_installed)] == wanted


def test_the_oldest_set_is_inside_the_ranges_and_is_what_the_extra_unsloth_caps():
    pins = dict(line.split("==") for line in PYPROJECT["dependency-groups"]["oldest"] if isinstance(line, str))
    assert find_misfits(PYPROJECT["project"]["dependencies"], pins) == []
    capped = PYPROJECT["project"]["optional-dependencies"]["unsloth"]
    assert {"transformers", "trl", "datasets"} <= {item.name for item in find_misfits(capped, dict.fromkeys(pins))}
    assert find_misfits(capped, pins) == []


def test_what_these_tests_run_with_is_in_range():
    check_versions()


@pytest.mark.parametrize("version", ["5.17.0", "5.23.9"])
def test_a_version_in_range_is_no_misfit(version):
    assert find_misfits(REQUIRED, {"transformers": version}) == []


@pytest.mark.parametrize("version", ["2.15.0+cu130", "2.11.0a0+nv25"])
def test_local_builds_and_pre_releases_count_by_their_number(version):
    assert find_misfits(["torch<2.16,>=2.10"], {"torch": version}) == []


@pytest.mark.parametrize("version", ["5.16.2", "5.24.0", "4.57.1", None])
def test_a_version_outside_is_a_misfit(version):
    assert find_misfits(REQUIRED, {"transformers": version, "torch": "2.12.0"}) == [
        Misfit("transformers", version, "transformers<5.24,>=5.17")
    ]


def test_extras_that_nobody_asked_for_are_not_required():
    assert find_misfits(REQUIRED, {"trackio": None}) == []


def test_a_misfit_is_one_sentence_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(versions, "own_requirements", lambda: ["peft<0.2,>=0.1", "trl<1,>=0.9"])
    have = installed_versions(["peft", "trl"])
    with pytest.raises(ModelError) as caught:
        check_versions()
    assert str(caught.value) == (
        f"versions: found trl {have['trl']}, peft {have['peft']}; "
        "Lensmith was tested with trl<1,>=0.9, peft<0.2,>=0.1. "
        'Mend it with: pip install "trl<1,>=0.9" "peft<0.2,>=0.1"'
    )


def test_torch_and_torchvision_that_are_no_pair_are_named(monkeypatch):
    monkeypatch.setattr(versions, "_torchvision_requirements", lambda: ["torch==2.1.0"])
    with pytest.raises(ModelError, match=r"are not a pair: that torchvision needs torch==2\.1\.0\. Mend it with: pip "):
        check_versions()


def test_without_an_installed_package_nothing_is_checked_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(versions, "own_requirements", lambda: None)
    check_versions()
    assert environment()["notes"] == ["lensmith is not installed as a package here, so the versions were not checked."]


def test_the_environment_is_json_and_says_what_was_chosen_and_why():
    report = json.loads(json.dumps(environment()))
    assert set(CHECKED) <= set(report["versions"])
    assert report["precision"] in ("bfloat16", "float16", "float32")
    assert all(kernel["chosen"] and kernel["why"] for kernel in report["kernels"].values())
