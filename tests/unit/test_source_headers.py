"""A source reads each picture's header once, remembers a bounded number, and asks again only where a cut must be ruled out."""

import json

import pytest
from PIL import Image

from lensmith.config.tree import Data, Images
from lensmith.data.encode import Encoder
from lensmith.data.source import SampleSource, open_source
from lensmith.errors import RowError


@pytest.fixture
def source(processor, tmp_path) -> SampleSource:
    """Three rows: a whole picture, one with something behind its end, one cut off."""
    Image.effect_noise((300, 200), 50).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "longer.jpg").write_bytes(content + b"what some cameras write")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    rows = [
        {"image": f"{name}.jpg", "question": "What is it?", "answer": "noise"} for name in ("whole", "longer", "cut")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = Encoder.from_processor(processor, Images())
    return open_source(Data(train=str(tmp_path / "rows.jsonl")), encoder, which="train")


def test_header_is_read_once(source, tmp_path):
    ref = source.sample(0).images[0]
    header = source.header(ref, check=True)
    (tmp_path / "whole.jpg").unlink()
    assert source.header(ref, check=True) is header
    assert (header.format, header.mode, header.upright_px) == ("JPEG", "L", (200, 300))


def test_what_stands_behind_the_end_is_decoded_once_to_rule_out_a_cut(source, tmp_path):
    ref = source.sample(1).images[0]
    assert not source.header(ref).is_whole
    assert source.header(ref, check=True).is_whole
    (tmp_path / "longer.jpg").unlink()
    assert source.header(ref, check=True).is_whole


def test_cut_is_refused_also_where_the_header_is_known(source):
    ref = source.sample(2).images[0]
    assert source.header(ref).upright_px == (200, 300)
    for _ in range(2):
        with pytest.raises(RowError) as caught:
            source.header(ref, check=True)
        assert caught.value.code == "truncated_image"


def test_headers_remembered_are_bounded_and_the_oldest_go_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr("lensmith.data.source.KNOWN_HEADERS", 2)
    refs = [source.sample(row).images[0] for row in range(3)]
    for ref in refs:
        source.header(ref)
    for name in ("whole", "longer", "cut"):
        (tmp_path / f"{name}.jpg").unlink()
    assert not source.header(refs[2]).is_whole
    with pytest.raises(RowError, match=r"whole\.jpg: there is no such file"):
        source.header(refs[0])
