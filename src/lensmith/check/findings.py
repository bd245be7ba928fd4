"""Every code that `lensmith check` can report: what it means, how bad it is, and the one thing to change.

docs/check.md's table is written from CODES, so the page and the program cannot disagree. Errors refuse the row, or stop
the data set; warnings and notes are told, and training goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lensmith.errors import RowCode

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

CheckCode = Literal[
    "box_out_of_range",
    "box_inverted",
    "box_convention",
    "shrunk_images",
    "leak_train_test",
    "conflicting_answer",
    "duplicate_row",
    "near_duplicate",
    "same_answers",
    "endless_answer",
    "media_token_in_text",
    "animated_image",
    "mode_converted",
    "exif_rotated",
]
"""What only `lensmith check` finds; RowCode is what stops a row in training too."""

Code = RowCode | CheckCode


@dataclass(frozen=True, slots=True)
class Kind:
    """One line of the catalogue."""

    severity: Severity
    """Of the finding as a rule; `too_long` is an error where smaller images do not help."""
    meaning: str
    example: str
    fix: str


CODES: dict[Code, Kind] = {
    "not_json": Kind(
        "error",
        "A line that is not JSON, or not UTF-8 text.",
        '`{"image": "a.png", "answer": ` (cut off)',
        "Write each row as one JSON object on one line, in UTF-8.",
    ),
    "malformed_row": Kind(
        "error",
        "Cells, turns or parts that are not what they should be.",
        '`{"messages": "hello"}`',
        "Write the row like those around it; data.columns says which column holds what.",
    ),
    "unknown_role": Kind(
        "error",
        "A turn by anyone but system, user (human) and assistant (gpt).",
        '`{"role": "narrator", ...}`',
        "Rename the role to system, user or assistant.",
    ),
    "marks_mismatch": Kind(
        "error",
        "More or fewer images than marks, or an image outside a user turn.",
        "two `<image>`, one path",
        "Add the missing path or remove the mark, so that there is one image for each mark.",
    ),
    "empty_question": Kind(
        "error", "A user turn without text and image, or none at all.", '`"question": ""`, no image', "Write the question."
    ),
    "empty_answer": Kind(
        "error", "An answer of nothing but white space.", '`"answer": " "`', "Write the answer, or remove the row."
    ),
    "no_answer": Kind(
        "error", "Turns, but none by the assistant.", "one user turn and nothing after it", "Add the assistant's turn."
    ),
    "missing_file": Kind(
        "error",
        "The row names a file that is not there.",
        "`imgs/a.png` beside a folder `images/`",
        "Put the file there, or set data.image_root to the folder that paths start from.",
    ),
    "outside_root": Kind(
        "error",
        "A path that leads out of the folder of images.",
        "`../../etc/passwd`",
        "Move the file inside, name its folder in data.image_root, or set data.allow_outside=true.",
    ),
    "url_not_allowed": Kind(
        "error",
        "An image at an address, while data.allow_urls is false.",
        "`https://example.org/a.png`",
        "Download the images and name the files, or set data.allow_urls=true.",
    ),
    "private_address": Kind(
        "error",
        "An address inside a private network; never fetched.",
        "`http://192.168.0.1/a.png`",
        "Download the image yourself and name the file.",
    ),
    "unreadable_image": Kind(
        "error",
        "Not a picture, an empty file, or a format that needs a plug-in.",
        "an HTML page saved as `a.png`",
        "Convert the file to PNG or JPEG, or remove the row.",
    ),
    "truncated_image": Kind(
        "error",
        "A picture that was cut off or damaged.",
        "half of a JPEG",
        "Copy or download the file again.",
    ),
    "unreadable_video": Kind(
        "error",
        "A video that cannot be opened, or a frame of it that cannot be decoded.",
        "an audio file called `a.mp4`",
        "Copy or download the file again, or convert it to mp4 (H.264).",
    ),
    "unreadable_document": Kind(
        "error",
        "A PDF that is damaged or locked.",
        "a PDF with a password",
        "Save it again without a password.",
    ),
    "decompression_bomb": Kind(
        "error",
        "A small file that unfolds to an unreasonable size (Pillow's limit).",
        "a 100 kB PNG of 20,000 x 20,000 px",
        "Reduce the picture, or remove the row.",
    ),
    "extreme_aspect": Kind(
        "error",
        "Sides of over 200 : 1, which the model's processor refuses.",
        "5,000 x 20 px",
        "Crop the picture or cut it up.",
    ),
    "template_refused": Kind(
        "error",
        "The checkpoint's chat template does not take these turns.",
        "a template that wants user and assistant in turns",
        "Write the turns in the order that the template expects.",
    ),
    "too_long": Kind(
        "warning",
        "More tokens than pack.tokens. An error where data.on_long=error, or where even the smallest images are too many.",
        "9,000 tokens, budget 8,192",
        "Raise pack.tokens, lower data.image.max_tokens, or shorten the row.",
    ),
    "box_out_of_range": Kind(
        "error",
        "A box that no convention fits, or not the declared one: negative, or beyond the picture.",
        "`[-5, 10, 2000, 30]`",
        "Correct the box; data.boxes says what its numbers mean.",
    ),
    "box_inverted": Kind(
        "error",
        "A box whose second corner is left of or above the first.",
        "`[400, 300, 100, 200]`",
        "Swap the corners, or declare the right convention in data.boxes.convention.",
    ),
    "box_convention": Kind(
        "error",
        "Boxes in another convention than the declared one, or than 0 to 1000 where none is declared.",
        "`[0.1, 0.2, 0.5, 0.6]`",
        "Declare what the numbers mean, as in data.boxes.convention=xyxy_px; they are then converted.",
    ),
    "shrunk_images": Kind(
        "error",
        "The budget reduces the median image to less than half its side; a note once data.image.allow_shrink is set.",
        "4,000 x 3,000 px seen at 1,300 x 980",
        "Raise data.image.max_tokens (and pack.tokens), cut the images up, or set data.image.allow_shrink=true.",
    ),
    "leak_train_test": Kind(
        "warning",
        "A test row whose picture is also trained on, under whatever name.",
        "`a.png` in train, its copy `b.png` in test",
        "Remove the picture from one side, or let data.test hold out a share, which keeps each file on one side.",
    ),
    "conflicting_answer": Kind(
        "warning",
        "Different answers to one question about one picture; case and final punctuation do not count.",
        '"cat" and "dog"',
        "Keep the right answer, or make the questions differ.",
    ),
    "duplicate_row": Kind(
        "warning",
        "A further copy of a row: the same texts and the same pictures by content.",
        "the same line twice",
        "Remove the copies; to weigh a row more, repeat its file with a weight in data.train.",
    ),
    "near_duplicate": Kind(
        "note",
        "The texts of another row, with a picture that looks the same.",
        "one photo saved twice as JPEG",
        "Keep one of them if they are copies.",
    ),
    "same_answers": Kind(
        "warning",
        "Nearly all answers are alike, so the images need not be looked at.",
        '990 of 1,000 answers are "yes"',
        "Add rows with other answers.",
    ),
    "endless_answer": Kind(
        "warning",
        "An answer that ends in a loop, as cut-off generations do.",
        '"... the cat the cat the cat the cat"',
        "Cut the answer where the loop begins, or remove the row.",
    ),
    "media_token_in_text": Kind(
        "note",
        "A media token written in a text. It stays plain characters, and opens no image.",
        "`<|image_pad|>` or `<image>` in an answer",
        "Remove it unless it is meant literally.",
    ),
    "animated_image": Kind(
        "note", "More than one frame, of which the first is seen.", "a GIF", "Save the frame that is meant, or use it as video."
    ),
    "mode_converted": Kind(
        "note",
        "Palette, alpha, CMYK or 16 bits; converted to 8-bit RGB, with transparency on white.",
        "a PNG with a transparent background",
        "Nothing to do; serve pictures converted the same way.",
    ),
    "exif_rotated": Kind(
        "note",
        "Stored on its side or mirrored, with an EXIF note; turned upright.",
        "a phone photo held upright",
        "Nothing to do; check that boxes refer to the upright picture.",
    ),
}  # fmt: skip
"""Code -> what it is, in the order of docs/check.md."""
