"""The check's page in a real browser: nothing sticks out at any width, and nothing on it is out of a keyboard's reach."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from lensmith.check.page import write_page
from lensmith.check.run import run_check
from lensmith.config.read import read_config

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS_PX = (360, 768, 1400)
LONG = "no_place_to_break" * 40

MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg, .hidden, thead"));
  const frames = [...document.querySelectorAll(".frame")];
  const gap = frames.map(f => {
    const [a, b] = [f.querySelector("img"), f.querySelector("svg") || f].map(e => e.getBoundingClientRect());
    return Math.abs(a.width - b.width) + Math.abs(a.height - b.height);
  });
  document.body.innerHTML = "<pre id=told>" + JSON.stringify({
    width: innerWidth,
    right: Math.max(...found.map(e => e.getBoundingClientRect().right)),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: document.images.length,
    unaligned: Math.max(0, ...gap),
    reachable: [...document.querySelectorAll("a, input, summary")].every(e => e.tabIndex >= 0),
  }) + "</pre>";
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of rows with small, wide, tall and broken pictures, boxes, and words that cannot be broken."""
    place = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a": (64, 64), "wide": (40, 1200), "tall": (900, 60), "large": (700, 900)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(place / f"{name}.png")
    (place / "broken.png").write_bytes(b"no picture")
    boxes = json.dumps([{"bbox_2d": [100, 200, 900, 990], "label": LONG}])
    rows = [(f"{name}.png", f"What is {n}? {LONG if n == 3 else ''}", boxes if n % 2 else f"This {LONG}") for n, name in
            enumerate(["a", "wide", "tall", "large", "broken", "a"] * 2)]  # fmt: skip
    data = place / f"{'long_name_' * 12}.jsonl"
    data.write_text("\n".join(json.dumps({"image": i, "question": q, "answer": a}) for i, q, a in rows))
    checked = run_check(read_config(None, ["model=lensmith/tiny"], data=str(data)))
    write_page(checked.report, checked.sources, place / "report.html", seed=0)
    return place / "report.html"


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine; everything but the layout is tested without one"
)
@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_page_fits_its_window(page, tmp_path, width_px):
    outer = tmp_path / "outer.html"
    measured = page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>")
    # A frame of that width, because a headless window is never narrower than about 500 px.
    outer.write_text(f'<iframe srcdoc="{html.escape(measured)}" style="border:0" width="{width_px}" height="900"></iframe>'
                     "<script>setTimeout(() => document.body.append("
                     'document.querySelector("iframe").contentDocument.getElementById("told")), 2500)</script>')  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--virtual-time-budget=9000", "--dump-dom", outer.as_uri()]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    told = json.loads(html.unescape(re.findall(r'<pre id="told">(.*?)</pre>', dumped)[-1]))
    assert told["width"] == width_px
    assert told["right"] <= width_px, "something sticks out to the right"
    assert told["images"] >= 8
    assert told["broken"] == 0
    assert told["unaligned"] < 1, "boxes lie exactly over their picture"
    assert told["reachable"]
