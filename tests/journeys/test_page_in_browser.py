"""Our pages in a real browser: nothing sticks out at any width, and nothing on them is out of a keyboard's reach."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from tests.unit.test_completion_page import stats as grpo_stats

from lensmith.check.page import write_page
from lensmith.check.run import run_check
from lensmith.config.read import read_config
from lensmith.train.page import CompletionPage
from lensmith.train.page.step import Asked, Judged
from lensmith.types import ImageRef, ImageSize

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS_PX = (360, 768, 1400)
LONG = "no_place_to_break" * 40

# A table inside .wide scrolls by itself.
MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("body *")].filter(e => !e.closest("svg, .hidden, thead, .wide table"));
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


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine; everything but the layout is tested without one"
)


def measure(page, place, width_px):
    """What MEASURE finds in a window of that width."""
    outer = place / "outer.html"
    measured = page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>")
    # A frame of that width, because a headless window is never narrower than about 500 px.
    outer.write_text(f'<iframe srcdoc="{html.escape(measured)}" style="border:0" width="{width_px}" height="900"></iframe>'
                     "<script>setTimeout(() => document.body.append("
                     'document.querySelector("iframe").contentDocument.getElementById("told")), 2500)</script>')  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--virtual-time-budget=9000", "--dump-dom", outer.as_uri()]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.findall(r'<pre id="told">(.*?)</pre>', dumped)[-1]))


@needs_browser
@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_page_fits_its_window(page, tmp_path, width_px):
    told = measure(page, tmp_path, width_px)
    assert told["width"] == width_px
    assert told["right"] <= width_px, "something sticks out to the right"
    assert told["images"] >= 8
    assert told["broken"] == 0
    assert told["unaligned"] < 1, "boxes lie exactly over their picture"
    assert told["reachable"]


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """The page of a run with unbreakable words in every place, folded completions open, and pictures of any shape."""
    place = tmp_path_factory.mktemp("run")
    sizes = []
    for name, (height, width) in {"a": (64, 64), "wide": (40, 1200), "tall": (900, 60), "large": (700, 900)}.items():
        path = place / f"{name}.png"
        Image.new("RGB", (width, height), "red").save(path)
        sizes.append(ImageSize(ImageRef(path, name), (height, width), (height, width), 1))
    texts = (LONG, f"{LONG}\n" * 60, "שלום עולם " * 200, "", "<b>short</b>")
    judged = [Judged(text, 3000, n != 1, {LONG: 0.5, "exact": None}, float(n), n - 2.0) for n, text in enumerate(texts)]
    page = CompletionPage(place / "completions.html", LONG, 1_000_000)
    for step in (999_998, 999_999):
        page.add(step, [Asked(LONG, LONG, LONG, images, judged) for images in ((), sizes[:1], sizes[2:3], sizes)])
        page.look(grpo_stats(step, rewards={LONG: 0.5, **{f"reward {n}": n / 9 for n in range(8)}}), [LONG])
    page.write(running=True, failures={LONG: 3})
    text = page.path.read_text(encoding="utf-8")
    page.path.write_text(text.replace("<details", "<details open"), encoding="utf-8")
    return page.path


@needs_browser
@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_the_page_of_completions_fits_its_window(completions, tmp_path, width_px):
    told = measure(completions, tmp_path, width_px)
    assert told["width"] == width_px
    assert told["right"] <= width_px, "something sticks out to the right"
    assert told["images"] == 12
    assert told["broken"] == 0
    assert told["reachable"]
