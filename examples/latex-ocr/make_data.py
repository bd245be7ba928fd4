"""Pictures of formulas and their LaTeX, drawn by matplotlib: train.jsonl and test.jsonl with a folder of PNGs each.

python make_data.py rows --train 4096 --test 256 --seed 0

No formula of the test is in the training rows. The grammar is small, so that a model of five million parameters can learn
it in minutes; a larger one is a line in TERMS.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from PIL import Image

QUESTION = "Write the LaTeX of this formula."
LETTERS, DIGITS = "abcnxyz", "123456789"
TERMS = ("{0}", "{0}^{{{1}}}", "{0}_{{{1}}}", "\\sqrt{{{0}}}", "\\frac{{{0}}}{{{1}}}")
SIGNS = ("+", "-", "=")
FONTS = ("cm", "stix", "dejavusans", "dejavuserif")
"""Those that matplotlib brings along, so that every machine draws the same."""
WIDTH_PX, HEIGHT_PX = 192, 64
"""Twelve language tokens of 32 x 32 pixels."""
SIZES = (26, 34)
MARGIN_PX = 3


def make_formula(draw: random.Random) -> str:
    """One or two terms, such as `\\frac{3}{x}+y^{2}`."""
    terms = [draw.choice(TERMS).format(draw.choice(LETTERS + DIGITS), draw.choice(LETTERS + DIGITS)) for _ in "ab"]
    return terms[0] + draw.choice(SIGNS) + terms[1] if draw.random() < 2 / 3 else terms[0]


def draw_formula(formula: str, draw: random.Random) -> Image.Image:
    """Black on white, WIDTH_PX x HEIGHT_PX, in any font, size and place."""
    parser, font = MathTextParser("agg"), FontProperties(math_fontfamily=draw.choice(FONTS))
    for size in range(draw.randint(*SIZES), 0, -1):
        font.set_size(size)
        ink = np.asarray(parser.parse(f"${formula}$", dpi=72, prop=font).image)
        if ink.shape[0] <= HEIGHT_PX - 2 * MARGIN_PX and ink.shape[1] <= WIDTH_PX - 2 * MARGIN_PX:
            break
    picture = np.full((HEIGHT_PX, WIDTH_PX), 255, dtype=np.uint8)
    top = draw.randint(MARGIN_PX, HEIGHT_PX - MARGIN_PX - ink.shape[0])
    left = draw.randint(MARGIN_PX, WIDTH_PX - MARGIN_PX - ink.shape[1])
    picture[top : top + ink.shape[0], left : left + ink.shape[1]] -= ink
    return Image.fromarray(picture).convert("RGB")


def write_rows(folder: Path, counts: dict[str, int], seed: int) -> None:
    """`counts` rows of each part below `folder`; the same seed draws the same pictures."""
    draw = random.Random(seed)
    tested: set[str] = set()
    for part in ("test", "train"):  # what is drawn for the test is left out of what follows
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        while len(rows) < counts[part]:
            formula = make_formula(draw)
            if formula in tested:
                continue
            name = f"{part}/{len(rows):05d}.png"
            draw_formula(formula, draw).save(folder / name)
            rows.append({"image": name, "question": QUESTION, "answer": formula})
        tested |= {row["answer"] for row in rows} if part == "test" else set()
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("rows"))
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write_rows(asked.folder, {"test": asked.test, "train": asked.train}, asked.seed)
    print(f"Wrote {asked.train:,} training and {asked.test:,} test rows below {asked.folder}.")


if __name__ == "__main__":
    main()
