"""One picture through llama.cpp with the files just written: that it loads both, sees a picture and answers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lensmith.errors import RunError

PROGRAM = "llama-mtmd-cli"
"""llama.cpp's command for pictures; its server needs a port and says no more."""
QUESTION = "Describe this picture in one sentence."
LONGEST_ANSWER_TOKENS = 24
LONGEST_WAIT_S = 300
"""An 8B in 8 bits answers within a minute on eight cores."""
SIDE_PX = 256


def ask_picture(program: Path, model: Path, projector: Path, limits: list[str]) -> str:
    """A sentence with what llama.cpp answered about a red square on white, or that it took too long.

    `limits`: the options with the run's image limits. Raises RunError where it fails or answers nothing.
    """
    picture = model.with_name(".asked.png")
    _draw(picture)
    command = [str(program), "-m", str(model), "--mmproj", str(projector), "--image", str(picture), "-p", QUESTION]
    command += ["--jinja", "--temp", "0", "-n", str(LONGEST_ANSWER_TOKENS), "-c", "4096", *limits]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=LONGEST_WAIT_S
        )
    except subprocess.TimeoutExpired:
        return f"{PROGRAM} did not answer about a picture within {LONGEST_WAIT_S} s, so that check is open."
    finally:
        picture.unlink()
    answer = " ".join(done.stdout.split())
    if done.returncode or not answer:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise RunError(
            f"{PROGRAM}: asked about a picture, it ended with exit code {done.returncode} and answered {answer!r}: {last} "
            "The files do not serve with this llama.cpp: update it and its converter together."
        )
    return f"{PROGRAM}, asked about a red square, answered: {answer}"


def _draw(to: Path) -> None:
    from PIL import Image

    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    picture.paste("red", (SIDE_PX // 4, SIDE_PX // 4, 3 * SIDE_PX // 4, 3 * SIDE_PX // 4))
    picture.save(to)
