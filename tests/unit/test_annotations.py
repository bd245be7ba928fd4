"""COCO, YOLO and LabelMe are read as they are: a row per picture, boxes converted on the way to the model."""

import gc
import json
import pickle
import tracemalloc

import pytest
from PIL import Image

from lensmith.config.tree import Boxes, Data, Images, Source
from lensmith.data.annotations import MOST_NAMED
from lensmith.data.encode import Encoder
from lensmith.data.rows import open_rows
from lensmith.data.source import SampleSource, read_samples
from lensmith.errors import DataError, RowError
from lensmith.types import IGNORE

COCO = {
    "info": {"description": "two pictures"},
    "images": [
        {"id": 12, "file_name": "a.png", "height": 480, "width": 640},
        {"id": 7, "file_name": "b.png", "height": 240, "width": 320},
    ],
    "annotations": [
        {"id": 1, "image_id": 12, "category_id": 3, "bbox": [64, 48, 256, 192], "segmentation": [[64, 48, 320, 240]]},
        {"id": 2, "image_id": 12, "category_id": 1, "bbox": [0.5, 0, 64, 48.25], "iscrowd": 1},
        {"id": 4, "image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dög"}],
}


def draw(path, size_px=(480, 640)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_px[::-1], "white").save(path)


def write_coco(path, indent=None, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(COCO | changes, ensure_ascii=False, indent=indent), encoding="utf-8")
    return path


def write_yolo(root, settings="names: [cat, dog]\ntrain: images/train\nval: images/val\n"):
    for part in ("train", "val"):
        draw(root / "images" / part / "0001.png")
        draw(root / "images" / part / "0002.png")
        (root / "labels" / part).mkdir(parents=True)
        (root / "labels" / part / "0001.txt").write_text("1 0.3 0.3 0.4 0.4\n\n0 0.1 0.1 0.2 0.1 0.2 0.3 0.1 0.3\n")
    if settings:
        (root / "data.yaml").write_text(settings)
    return root


def write_labelme(path, *shapes, **others):
    content = {"version": "5.5", "flags": {}, "shapes": shapes, "imagePath": "a.png", "imageData": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"imageHeight": 480, "imageWidth": 640} | others, indent=2))
    return path


def answers(rows):
    return [json.loads(row.fields["answer"]) for row in rows]


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_file_gives_a_row_per_picture(tmp_path, indent):
    rows = open_rows(write_coco(tmp_path / "instances.json", indent))
    assert [row.where for row in rows] == ["instances.json#image 12", "instances.json#image 7"]
    assert rows[0].fields["image"] == "a.png"
    assert rows[0].fields["question"] == (
        'Locate every instance that belongs to the following categories: "cat, dög". Report bbox coordinates in JSON format.'
    )
    assert rows[0].fields["answer"] == (
        '[{"bbox_2d": [64, 48, 256, 192], "label": "dög"}, {"bbox_2d": [0.5, 0, 64, 48.25], "label": "cat"}]'
    )
    assert rows[1].fields["answer"] == "[]"
    assert rows.boxes == Boxes(convention="xywh_px")
    (sentence,) = rows.sentences
    assert sentence.startswith(
        "instances.json: COCO annotations of 2 pictures; 3 annotations; 1 crowd, by its box; 1 of no listed picture, left "
        "out; 1 picture without any, which answers []; segmentations are not used. Each is asked: Locate"
    )
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_folder_with_a_coco_file_beside_its_pictures_is_read(tmp_path):
    write_coco(tmp_path / "train" / "_annotations.coco.json")
    assert len(open_rows(tmp_path / "train")) == 2


@pytest.mark.parametrize("place", ["annotations/a.png", "train2017/a.png", "images/a.png", "images/train2017/a.png"])
def test_coco_pictures_are_found_in_the_usual_places(tmp_path, place):
    draw(tmp_path / place)
    rows = open_rows(write_coco(tmp_path / "annotations" / "instances_train2017.json"))
    assert rows.root == (tmp_path / place).parent


def test_coco_annotation_that_cannot_be_used_spoils_its_picture_alone(tmp_path):
    annotations = [
        {"id": 17, "image_id": 12, "category_id": 5, "bbox": [0, 0, 1, 1]},
        {"id": 18, "image_id": 7, "category_id": 1, "bbox": [0, 0, None, 1]},
    ]
    rows = open_rows(write_coco(tmp_path / "instances.json", annotations=annotations))
    with pytest.raises(
        RowError, match=r"instances\.json#annotation 17: \(of image 12\) is of a category that .* correct"
    ):
        rows[0]
    with pytest.raises(RowError, match=r"instances\.json#annotation 18: \(of image 7\) has no bbox of four numbers"):
        rows[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(COCO)[:-30], r"begins like COCO annotations but is not whole JSON .* cut off: write it again"),
        (json.dumps(COCO | {"images": []}), r'0 entries under "images"'),
        (
            json.dumps(COCO | {"images": [*COCO["images"], {"id": 7, "file_name": "c.png"}]}),
            r"the id 7, b\.png and c\.png,",
        ),
        (
            json.dumps(COCO | {"images": [{"id": "x", "file_name": "c.png"}]}),
            r"image 0 .* \(c\.png\) has no whole number",
        ),
        (json.dumps(COCO | {"annotations": COCO["annotations"][2:]}), r"none of the 1 annotations has .* such as 12"),
    ],
)
def test_damaged_coco_file_says_so(tmp_path, content, sentence):
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        open_rows(tmp_path / "instances.json")


@pytest.mark.parametrize("indent", [None, 2])
def test_coco_file_without_any_annotation_answers_nothing_everywhere(tmp_path, indent):
    assert answers(open_rows(write_coco(tmp_path / "instances.json", indent, annotations=[]))) == [[], []]


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"images": ["a.png"], "messages": [{"role": "user", "content": "?"}], "annotations": "none"}, 1),
        ({"images": ["a.png"], "annotations": ["a cat"]}, 3),
        ({"version": 1, "shapes": [], "answer": "none"}, 3),
    ],
)
def test_rows_that_begin_like_annotations_are_rows(tmp_path, row, count):
    (tmp_path / "rows.json").write_text(f"{json.dumps(row)}\n" * count)
    assert [read.where for read in open_rows(tmp_path / "rows.json")] == [f"rows.json:{n + 1}" for n in range(count)]


def test_coco_file_stays_as_arrays(tmp_path):
    """20,000 annotations with polygons: 6 MB of text, of which 44 bytes per annotation stay, and 130 per picture."""
    images = [{"id": n, "file_name": f"{n:012}.jpg", "height": 480, "width": 640} for n in range(2_000)]
    polygon = [[number / 7 for number in range(12)]]
    boxes = [
        {"id": n, "image_id": n % 2_000, "category_id": 1, "bbox": [1.5, 2, 3, 4], "segmentation": polygon}
        for n in range(20_000)
    ]
    path = write_coco(
        tmp_path / "instances.json", images=images, annotations=boxes, categories=[{"id": 1, "name": "cat"}]
    )
    size = path.stat().st_size
    del images, boxes
    gc.collect()
    tracemalloc.start()
    rows = open_rows(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(answers(rows[-1:])[0]) == 10
    assert held < 20_000 * 48 + 2_000 * 150
    assert peak < 1.5 * size, "its text and the arrays, never the objects; json.load takes four times the file"


def test_yolo_folder_is_read_as_data_yaml_says(tmp_path):
    rows = open_rows(write_yolo(tmp_path / "set"))
    assert [row.where for row in rows] == ["labels/train/0001.txt", "images/train/0002.png"]
    assert [row.fields["image"] for row in rows] == ["images/train/0001.png", "images/train/0002.png"]
    assert answers(rows) == [
        [
            {"bbox_2d": [0.3, 0.3, 0.4, 0.4], "label": "dog"},
            {"bbox_2d": [0.15, 0.2, 0.1, 0.2], "label": "cat"},
        ],
        [],
    ]
    assert rows.boxes == Boxes(convention="cxcywh_unit")
    assert '"cat, dog"' in rows[0].fields["question"]
    assert len(open_rows(tmp_path / "set" / "data.yaml")) == 2
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_one_part_of_a_yolo_set_is_named_by_its_folder_of_images(tmp_path):
    rows = open_rows(write_yolo(tmp_path / "set") / "images" / "val")
    assert rows[0].where == "labels/val/0001.txt"
    assert answers(rows)[0][0]["label"] == "dog"


def test_yolo_folder_without_data_yaml(tmp_path):
    root = write_yolo(tmp_path / "set", settings=None)
    with pytest.raises(DataError, match=r"2 parts \(train, val\) and no data\.yaml; name the part .*images/train"):
        open_rows(root)
    rows = open_rows(root / "images" / "train")
    assert [found["label"] for found in answers(rows)[0]] == ["1", "0"]
    assert "no data.yaml or classes.txt, so labels are class numbers" in rows.sentences[0]
    (root / "classes.txt").write_text("cat\ndog\n")
    assert answers(open_rows(root / "images" / "train"))[0][0]["label"] == "dog"


def test_yolo_folder_as_roboflow_writes_it(tmp_path):
    draw(tmp_path / "train" / "images" / "a.png")
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nnames: {0: cat}\nnc: 1\n")
    for place in (tmp_path, tmp_path / "train"):
        assert answers(open_rows(place)) == [[{"bbox_2d": [0.5, 0.5, 1, 1], "label": "cat"}]]


@pytest.mark.parametrize("train", ["../elsewhere", "/etc", "images/gone", "[a, b]", "a" * 300])
def test_data_yaml_cannot_lead_out_of_its_folder(tmp_path, train):
    (tmp_path / "elsewhere").mkdir()
    root = write_yolo(tmp_path / "set", f"names: [cat]\npath: /\ntrain: {train}\n")
    with pytest.raises(DataError, match=r"data\.yaml says train: .*, which is no folder of images in here; name one"):
        open_rows(root)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1 0.3 0.3 0.4", r"labels/train/0001\.txt:2: holds 4 numbers: 1 0\.3 0\.3 0\.4; a line is a class number and"),
        ("1 0.3 0.3 0.4 0.4 0.9", r":2: holds 6 numbers"),
        ("cat 0.3 0.3 0.4 0.4", r":2: holds 'cat 0\.3 0\.3 0\.4 0\.4'"),
        ("1 nan 0.3 0.4 0.4", r":2: holds 5 numbers: 1 nan"),
        ("2 0.3 0.3 0.4 0.4", r":2: is of class 2, but there are names for 2 classes, counted from 0; add the name"),
        ("0.5 0.3 0.3 0.4 0.4", r":2: is of class 0\.5"),
    ],
)
def test_bad_yolo_line_is_named_by_file_and_line(tmp_path, line, sentence):
    root = write_yolo(tmp_path / "set")
    (root / "labels" / "train" / "0001.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    rows = open_rows(root)
    with pytest.raises(RowError, match=sentence):
        rows[0]
    assert rows[1].fields["answer"] == "[]"


def test_keypoints_of_a_pose_set_are_not_a_polygon(tmp_path):
    root = write_yolo(tmp_path / "set", "names: [cat, dog]\ntrain: images/train\nkpt_shape: [3, 2]\n")
    (root / "labels" / "train" / "0001.txt").write_text("0 0.5 0.5 0.2 0.2 0.1 0.1 0.2 0.2 0.3 0.3\n")
    assert answers(open_rows(root))[0] == [{"bbox_2d": [0.5, 0.5, 0.2, 0.2], "label": "cat"}]


def test_labelme_shapes_become_boxes_and_points(tmp_path):
    shapes = [
        {"label": "cat", "points": [[320, 240], [64, 48]], "shape_type": "rectangle"},
        {"label": "leaf", "points": [[10, 20], [30, 10], [20, 40.5]], "shape_type": "polygon"},
        {"label": "ball", "points": [[100, 100], [103, 104]], "shape_type": "circle"},
        {"label": "nose", "points": [[5, 6]], "shape_type": "point"},
    ]
    draw(tmp_path / "a.png")
    write_labelme(tmp_path / "a.json", *shapes)
    write_labelme(tmp_path / "b.json", imagePath="..\\b.png")
    rows = open_rows(tmp_path)
    assert [row.where for row in rows] == ["a.json", "b.json"]
    assert answers(rows) == [
        [
            {"bbox_2d": [64, 48, 320, 240], "label": "cat"},
            {"bbox_2d": [10, 10, 30, 40.5], "label": "leaf"},
            {"bbox_2d": [95, 95, 105, 105], "label": "ball"},
            {"point_2d": [5, 6], "label": "nose"},
        ],
        [],
    ]
    assert (rows[0].fields["image"], rows[1].fields["image"]) == ("a.png", "../b.png")
    assert rows.boxes == Boxes(convention="xyxy_px")
    assert len(open_rows(tmp_path / "a.json")) == 1


def test_picture_inside_a_labelme_file_stands_in_for_one_that_is_gone(tmp_path):
    write_labelme(tmp_path / "a.json", imageData="iVBORw0KGgo=")
    assert open_rows(tmp_path)[0].fields["image"] == "data:;base64,iVBORw0KGgo="
    draw(tmp_path / "a.png")
    assert open_rows(tmp_path)[0].fields["image"] == "a.png"


def test_bad_labelme_file_spoils_only_itself(tmp_path):
    write_labelme(tmp_path / "a.json")
    write_labelme(tmp_path / "b.json", {"label": "cat", "points": [[1, "2"]], "shape_type": "point"})
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[]")
    rows = open_rows(tmp_path)
    assert rows[0].fields["answer"] == "[]"
    for number, sentence in enumerate(
        [r'b\.json#shape 0: has no "points"', r"c\.json: cannot be", r"d\.json: has no list"], 1
    ):
        with pytest.raises(RowError, match=sentence):
            rows[number]


def test_question_does_not_name_more_categories_than_it_can(tmp_path):
    categories = [{"id": n, "name": f"kind {n}"} for n in range(MOST_NAMED + 1)]
    rows = open_rows(write_coco(tmp_path / "instances.json", categories=categories))
    assert rows[0].fields["question"].startswith("Locate every object and say what it is.")


@pytest.fixture(scope="module")
def learned(processor):
    """What is learned of each row of a config's training data."""
    encoder = Encoder.from_processor(processor, Images())

    def read(data):
        source = SampleSource(read_samples(data), encoder)
        texts = [source.encoded(row) for row in range(len(source))]
        return [processor.tokenizer.decode(e.labels[e.labels != IGNORE], skip_special_tokens=True) for e in texts]

    return read


def test_annotations_reach_the_model_from_0_to_1000(tmp_path, learned):
    """The second COCO picture is half as large as its file says: its boxes refer to what was annotated."""
    draw(tmp_path / "coco" / "a.png")
    draw(tmp_path / "coco" / "b.png", (120, 160))
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box}
        for n, (image, box) in enumerate([(12, [64, 48, 256, 192]), (7, [32, 24, 128, 96])])
    ]
    write_coco(tmp_path / "coco" / "instances.json", annotations=annotations)
    draw(tmp_path / "labelme" / "a.png")
    shape = {"label": "cat", "points": [[320, 240], [64, 48]], "shape_type": "rectangle"}
    write_labelme(tmp_path / "labelme" / "a.json", shape)
    write_yolo(tmp_path / "yolo")
    said = '[{"bbox_2d": [100, 100, 500, 500], "label": "cat"}'
    found = [learned(Data(train=str(tmp_path / name))) for name in ("coco", "labelme", "yolo")]
    assert found[0] == [f"{said}]", f"{said}]"]
    assert found[1] == [f"{said}]"]
    assert found[2][0].startswith(said.replace("cat", "dog"))


def test_declaration_of_a_file_goes_before_that_of_the_config_and_that_before_the_format(tmp_path, learned):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    path = str(write_coco(tmp_path / "instances.json"))
    corners, spoken = Boxes(convention="xyxy_px"), Boxes()
    for data, box in [
        (Data(train=path), "[100, 100, 500, 500]"),
        (Data(train=path, boxes=corners), "[100, 100, 400, 400]"),
        (Data(train=[Source(path=path, boxes=spoken)], boxes=corners), "[64, 48, 256, 192]"),
    ]:
        assert box in learned(data)[0]
    assert read_samples(Data(train=path, boxes=corners)).sentences[-1] == (
        "instances.json: boxes are read as corners in pixels and learned as corners from 0 to 1000."
    )
