"""Detection data sets read as they are: COCO's JSON, YOLO's folders, LabelMe's files. One row per picture.

    instances_train.json                COCO: {"images": [...], "annotations": [...], "categories": [...]}
    set/  or set/data.yaml              YOLO: images/train/a.jpg is labelled by labels/train/a.txt
    set/  with images/ and labels/      the same without data.yaml; set/images/val names one part
    set/  of a.json, b.json, ...        LabelMe: {"shapes": [...], "imagePath": "a.jpg"}, one per picture

The question is Qwen3-VL's own wording; the answer is a JSON list as Qwen3-VL writes it, `[{"bbox_2d": [...], "label":
"cat"}, ...]`, its numbers still in the format's convention, which `Rows.boxes` declares so that they are converted. A
picture without annotations answers `[]`: in these formats that means that nothing is to be found.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from lensmith.config.tree import Boxes
from lensmith.data.box_text import is_coordinate
from lensmith.data.boxes import ANNOTATED_PX
from lensmith.data.coco import Coco, is_lines, read_coco
from lensmith.data.rows import DATA_SUFFIXES, Rows
from lensmith.errors import DataError, RowError
from lensmith.types import Row, counted

if TYPE_CHECKING:
    from lensmith.config.tree import BoxConvention

QUESTION = (
    'Locate every instance that belongs to the following categories: "{}". Report bbox coordinates in JSON format.'
)
"""The wording of Qwen3-VL's grounding cookbook, so that tuning starts from what the model can already do."""
QUESTION_OF_MANY = "Locate every object and say what it is. Report bbox coordinates in JSON format."
MOST_NAMED = 100
"""With more categories than this the question does not name them: they would cost more tokens than many a picture."""

LABELME_KEYS = ("version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")
LABELME_START = re.compile(rf'(?:\xef\xbb\xbf)?\s*\{{\s*"(?:{"|".join(LABELME_KEYS)})"\s*:'.encode("latin-1"))
PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml")
PARTS = ("train", "val", "valid", "test")
"""How the parts of a YOLO data set are called."""


def open_annotations(place: Path) -> Rows | None:
    """The rows of a COCO, YOLO or LabelMe data set; None where the file or folder is none of these.

    Raises:
        DataError: it is one but cannot be read, with the way out.
    """
    if place.is_dir():
        return _open_yolo(place) or _open_labelme(place)
    if place.name in YOLO_FILES:
        return _open_yolo(place.parent)
    if place.suffix.lower() != ".json" or not place.stat().st_size:
        return None
    coco = read_coco(place)
    return CocoRows(place, coco) if coco is not None else LabelMeRows([place]) if _is_labelme(place) else None


class AnnotatedRows(Rows):
    """One row per picture: its path, the question, and its annotations as a JSON list."""

    convention: BoxConvention
    """How the format writes boxes."""

    def __init__(self, name: str, root: Path, labels: Collection[str]) -> None:
        """`labels`: what the question asks for, where it is known."""
        self.name, self.root, self.boxes = name, root, Boxes(convention=self.convention)
        self.question = QUESTION.format(", ".join(labels)) if 0 < len(labels) <= MOST_NAMED else QUESTION_OF_MANY

    def _say(self, kind: str, *details: str) -> None:
        about = "; ".join(filter(None, (f"{kind} of {counted(len(self), 'picture')}", *details)))
        question = self.question if len(self.question) <= 160 else f"{self.question[:157]}..."
        self.sentences = (f"{self.name}: {about}. Each is asked: {question}",)

    def _row(self, where: str, image: str, found: Iterable[tuple[str, Sequence[float]]], **others: Any) -> Row:
        """`found`: label and numbers of each annotation; two numbers are a point."""
        answer = [
            {"bbox_2d" if len(box) == 4 else "point_2d": [_plain(number) for number in box], "label": label}
            for label, box in found
        ]
        text = json.dumps(answer, ensure_ascii=False)
        return Row(where, {"image": image, "question": self.question, "answer": text, **others})


class CocoRows(AnnotatedRows):
    """The pictures of one COCO file; its annotations are kept as arrays."""

    convention = "xywh_px"

    def __init__(self, path: Path, coco: Coco) -> None:
        super().__init__(path.name, _coco_root(path, next(filter(None, coco.names), "")), coco.labels)
        self._coco = coco
        self._say(
            "COCO annotations",
            counted(coco.num_annotations, "annotation"),
            f"{counted(coco.crowds, 'crowd')}, by {'its' if coco.crowds == 1 else 'their'} box" if coco.crowds else "",
            f"{coco.strays:,} of no listed picture, left out" if coco.strays else "",
            f"{counted(coco.empty, 'picture')} without any, which answer{'s' * (coco.empty == 1)} []"
            if coco.empty
            else "",
            "segmentations are not used" if coco.segmentations else "",
            f"pictures in {self.root}" if self.root != path.parent else "",
        )

    def __len__(self) -> int:
        return len(self._coco.names)

    def read(self, index: int) -> Row:
        coco, number = self._coco, int(self._coco.image_ids[index])
        where = f"{self.name}#image {number}"
        if not coco.names[index]:
            raise RowError(
                where, "malformed_row", 'has no "file_name"; add the path of the picture, or remove the image.'
            )
        found = []
        for annotation in coco.annotations(index):
            if annotation.fault:
                raise RowError(
                    f"{self.name}#annotation {annotation.id}",
                    "malformed_row",
                    f"(of image {number}) {annotation.fault}; correct the annotation or remove it.",
                )
            found.append((annotation.label, annotation.box))
        size_px = coco.size_px(index)
        return self._row(where, coco.names[index], found, **({ANNOTATED_PX: size_px} if size_px else {}))


class YoloRows(AnnotatedRows):
    """The pictures of a YOLO data set; only their paths are kept, a picture's labels are read with its row."""

    convention = "cxcywh_unit"

    def __init__(self, root: Path, folders: Sequence[Path], labels: Mapping[int, str], *, keypoints: bool) -> None:
        """`folders`: of pictures, below `root`; `keypoints`: whether lines hold a box and then keypoints, not a polygon."""
        super().__init__(root.name, root, labels.values())
        self._labels, self._keypoints = labels, keypoints
        self._pictures = [path for folder in folders for path in _pictures_in(folder, root)]
        if not self._pictures:
            raise DataError(
                f"{folders[0]}: holds no pictures ({', '.join(PICTURE_SUFFIXES)}); name the folder that does, "
                f"as in {root / 'images' / 'train'}"
            )
        parts = ", ".join(folder.relative_to(root).as_posix() for folder in folders)
        unnamed = "" if labels else "no data.yaml or classes.txt, so labels are class numbers"
        self._say("YOLO labels", f"pictures in {parts}", "those without labels answer []", unnamed)

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> Row:
        picture = self._pictures[index]
        where = _label_file(picture)
        try:
            lines = (Path(self.root) / where).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            return self._row(picture, picture, [])
        except (OSError, UnicodeDecodeError) as cause:
            raise RowError(where, "malformed_row", f"cannot be read as text ({cause}); write it again.") from cause
        found = [
            self._annotation(f"{where}:{number}", line.split()) for number, line in enumerate(lines, 1) if line.strip()
        ]
        return self._row(where, picture, found)

    def _annotation(self, where: str, cells: list[str]) -> tuple[str, Sequence[float]]:
        """A class and centre and size; or a class and the corners of a polygon, of which the box is taken."""
        try:
            kind, *numbers = map(float, cells)
        except ValueError as cause:
            raise _bad_label(where, f"holds {' '.join(cells)[:60]!r}") from cause
        is_polygon = len(numbers) >= 6 and len(numbers) % 2 == 0 and not self._keypoints
        is_box = len(numbers) == 4 or (self._keypoints and len(numbers) > 4)
        if not (is_box or is_polygon) or not all(map(is_coordinate, (kind, *numbers))):
            raise _bad_label(where, f"holds {counted(len(cells), 'number')}: {' '.join(cells)[:60]}")
        if kind != int(kind) or (self._labels and kind not in self._labels):
            raise RowError(
                where,
                "malformed_row",
                f"is of class {kind:g}, but there are names for {len(self._labels)} classes, counted from 0; "
                "add the name to data.yaml or classes.txt, or correct the line.",
            )
        label = self._labels.get(int(kind), f"{kind:.0f}")
        return label, _around(numbers[::2], numbers[1::2]) if is_polygon else numbers[:4]


class LabelMeRows(AnnotatedRows):
    """The pictures of LabelMe files; only the paths of the files are kept."""

    convention = "xyxy_px"

    def __init__(self, files: Sequence[Path]) -> None:
        folder = files[0].parent
        super().__init__(files[0].name if len(files) == 1 else folder.name, folder, _lines(folder / "labels.txt"))
        self._files = [file.name for file in files]
        self._say("LabelMe annotations", "polygons, circles and masks by their box", "files without shapes answer []")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Row:
        where = self._files[index]
        try:
            content = json.loads((Path(self.root) / where).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as cause:
            raise RowError(where, "not_json", f"cannot be read as JSON ({cause}); save it again.") from cause
        shapes = content.get("shapes") if isinstance(content, dict) else None
        if not isinstance(shapes, list):
            raise RowError(where, "malformed_row", 'has no list of "shapes"; take the file out of the folder.')
        found = [self._annotation(f"{where}#shape {number}", shape) for number, shape in enumerate(shapes)]
        height, width = content.get("imageHeight"), content.get("imageWidth")
        known = isinstance(height, int) and isinstance(width, int) and height > 0 < width
        others = {ANNOTATED_PX: (height, width)} if known else {}
        return self._row(where, self._picture(content, where), found, **others)

    def _picture(self, content: dict[str, Any], where: str) -> str:
        """The file beside it, or else the copy of it that LabelMe writes into its own."""
        path, data = content.get("imagePath"), content.get("imageData")
        name = path.replace("\\", "/") if isinstance(path, str) else ""  # written on Windows
        if isinstance(data, str) and data and not (name and _is_there(Path(self.root) / name)):
            return f"data:;base64,{data}"
        if not name:
            raise RowError(where, "malformed_row", 'has neither "imagePath" nor "imageData"; name the picture.')
        return name

    def _annotation(self, where: str, shape: Any) -> tuple[str, Sequence[float]]:
        points = shape.get("points") if isinstance(shape, dict) else None
        if not isinstance(points, list) or not points or not all(map(_is_point, points)):
            raise RowError(
                where, "malformed_row", 'has no "points" as a list of [x, y]; correct the shape or remove it.'
            )
        kind, xs, ys = shape.get("shape_type"), [point[0] for point in points], [point[1] for point in points]
        if len(points) == 1:
            return str(shape.get("label")), points[0]
        if kind == "circle" and len(points) == 2:  # its centre and a point on its rim
            radius = ((xs[1] - xs[0]) ** 2 + (ys[1] - ys[0]) ** 2) ** 0.5
            xs, ys = [xs[0] - radius, xs[0] + radius], [ys[0] - radius, ys[0] + radius]
        return str(shape.get("label")), (min(xs), min(ys), max(xs), max(ys))


def _open_yolo(folder: Path) -> YoloRows | None:
    settings = _yolo_settings(folder)
    if settings is not None and "train" in settings:
        folders = _named_folders(folder, settings)
        return YoloRows(folder, folders, _class_names(folder), keypoints="kpt_shape" in settings)
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        if any(path.suffix.lower() in DATA_SUFFIXES for path in folder.iterdir()):
            return None
        parts = [part for part in PARTS if (folder / "images" / part).is_dir()]
        if len(parts) > 1:
            raise DataError(
                f"{folder}: holds a YOLO data set in {len(parts)} parts ({', '.join(parts)}) and no data.yaml; "
                f"name the part to read, as in {folder / 'images' / parts[0]}"
            )
        root, pictures = folder, folder / "images"
    else:
        above = [parent for parent in (folder, *folder.parents) if parent.name == "images"]
        if not above or not (above[0].parent / "labels" / folder.relative_to(above[0])).is_dir():
            return None
        root, pictures = above[0].parent, folder
    settings = _yolo_settings(root) or _yolo_settings(root.parent) or {}
    return YoloRows(root, [pictures], _class_names(root), keypoints="kpt_shape" in settings)


def _yolo_settings(folder: Path) -> dict[str, Any] | None:
    """What data.yaml says; None without one, or where it is about something else."""
    path = next((folder / name for name in YOLO_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as cause:
        raise DataError(f"{path}: cannot be read as YAML ({cause}); correct it, or name a folder of images") from cause
    return settings if isinstance(settings, dict) and "names" in settings else None


def _named_folders(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The folders of pictures that data.yaml calls `train`; a data file cannot lead out of its own folder."""
    train = settings["train"]
    folders = []
    for name in train if isinstance(train, list) else [train]:
        # Roboflow writes ../train/images for the folder beside data.yaml; `path` is often one of another machine.
        starts = [folder / str(settings.get("path", "")), folder]
        ways = [start / trimmed for start in starts for trimmed in (str(name), str(name).removeprefix("../"))]
        inside = [
            way for way in ways if _is_there(way) and way.is_dir() and way.resolve().is_relative_to(folder.resolve())
        ]
        if not inside:
            raise DataError(
                f"{folder}: its data.yaml says train: {name}, which is no folder of images in here; "
                f"name one yourself, as in {folder / 'images' / 'train'}"
            )
        folders.append(folder / inside[0].resolve().relative_to(folder.resolve()))
    return folders


def _class_names(root: Path) -> dict[int, str]:
    """Names of the classes by their numbers, from data.yaml or classes.txt; none where neither is there."""
    for folder in (root, root.parent):
        names = (_yolo_settings(folder) or {}).get("names")
        if isinstance(names, (list, dict)):
            numbered = names.items() if isinstance(names, dict) else enumerate(names)
            return {number: str(name) for number, name in numbered if isinstance(number, int)}
    return dict(enumerate(_lines(root / "classes.txt") or _lines(root / "labels" / "classes.txt")))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _pictures_in(folder: Path, root: Path) -> Iterator[str]:
    """Paths below the root, in order; links to folders are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        below = Path(place).relative_to(root)
        yield from ((below / file).as_posix() for file in sorted(files) if file.lower().endswith(PICTURE_SUFFIXES))


def _label_file(picture: str) -> str:
    """Where YOLO looks for labels: the last folder called images becomes labels; else beside the picture."""
    path = PurePosixPath(picture).with_suffix(".txt")
    parts = list(path.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 1 - parts[::-1].index("images", 1)
        parts[last] = "labels"
    return PurePosixPath(*parts).as_posix()


def _bad_label(where: str, what: str) -> RowError:
    return RowError(
        where,
        "malformed_row",
        f"{what}; a line is a class number and x, y, width, height from 0 to 1, or the x, y of a polygon.",
    )


def _open_labelme(folder: Path) -> LabelMeRows | None:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in DATA_SUFFIXES and path.is_file())
    if not files or {path.suffix.lower() for path in files} != {".json"} or not _is_labelme(files[0]):
        return None
    return LabelMeRows(files)


def _is_labelme(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return bool(LABELME_START.match(content)) and not is_lines(content) and content.find(b'"shapes"') >= 0


def _coco_root(path: Path, name: str) -> Path:
    """The folder that its file names start from: its own, or one of the usual places beside annotations/."""
    folder, part = path.parent, path.stem.rpartition("_")[2]
    above = folder.parent
    places = (folder, folder / "images", above / part, above / "images" / part, above / "images", above)
    return next((place for place in places if name and _is_there(place / name)), folder)


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder of that name, which comes from a data file and may be none that a disk takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _around(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """Centre and size of the box around some points."""
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_coordinate, value))


def _plain(number: float) -> float:
    """Whole numbers without `.0`, others with at most six digits behind the point."""
    return int(number) if number == int(number) else round(number, 6)
