"""Drawn pictures with a question about a number and a boxed answer, in the manner of MathVista: three .jsonl files.

python make_data.py rows --form 2048 --train 2048 --test 256 --seed 0

form.jsonl is for the short fine-tuning that teaches what a boxed answer is, train.jsonl for GRPO, test.jsonl for asking
before and after. No picture is in two of them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

BOXED = "Put the number in \\boxed{}."
WIDTH_PX, HEIGHT_PX = 128, 64
"""Eight language tokens of 32 x 32 pixels; eight cells, of which each holds one shape at most."""
CELL_PX, SHAPE_PX = 32, (14, 24)
COLOURS = ("red", "blue", "green", "purple", "orange", "black")
QUESTIONS = {
    "circles": "How many circles are there?",
    "squares": "How many squares are there?",
    "in all": "How many shapes are there in all?",
    "more": "How many more circles than squares are there?",
}


def draw_row(draw: random.Random) -> tuple[Image.Image, str, str, int]:
    """A picture, its kind of question, the question and the number."""
    squares = draw.randint(1, 3)
    circles = draw.randint(squares, 5)
    kind = draw.choice(list(QUESTIONS))
    number = {"circles": circles, "squares": squares, "in all": circles + squares, "more": circles - squares}[kind]
    picture = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), draw.choice(("white", "lightyellow", "lightgray")))
    pen = ImageDraw.Draw(picture)
    cells = [(x, y) for x in range(0, WIDTH_PX, CELL_PX) for y in range(0, HEIGHT_PX, CELL_PX)]
    for place, (x, y) in enumerate(draw.sample(cells, circles + squares)):
        side = draw.randint(*SHAPE_PX)
        left, top = x + draw.randint(2, CELL_PX - side - 2), y + draw.randint(2, CELL_PX - side - 2)
        shape = pen.ellipse if place < circles else pen.rectangle
        shape((left, top, left + side, top + side), fill=draw.choice(COLOURS))
    return picture, kind, f"{QUESTIONS[kind]} {BOXED}", number


def write_rows(folder: Path, counts: dict[str, int], seed: int) -> None:
    """`counts` rows of each part below `folder`; the same seed draws the same pictures."""
    draw = random.Random(seed)
    seen: set[bytes] = set()
    for part, count in counts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            picture, kind, question, number = draw_row(draw)
            if picture.tobytes() in seen:
                continue
            seen.add(picture.tobytes())
            name = f"{part}/{len(rows):05d}.png"
            picture.save(folder / name)
            rows.append({"image": name, "question": question, "answer": f"\\boxed{{{number}}}", "kind": kind})
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("rows"))
    parser.add_argument("--form", type=int, default=2048)
    parser.add_argument("--train", type=int, default=2048)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write_rows(asked.folder, {"test": asked.test, "form": asked.form, "train": asked.train}, asked.seed)
    print(f"Wrote {asked.form:,}, {asked.train:,} and {asked.test:,} rows below {asked.folder}.")


if __name__ == "__main__":
    main()
