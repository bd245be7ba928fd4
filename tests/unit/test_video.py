"""Videos of every kind are seen as they play; what cannot be seen is told with its frame."""

import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from lensmith.check.run import run_check
from lensmith.config.read import read_config
from lensmith.config.tree import Columns, Data, Images, Video
from lensmith.data import frames as frames_module
from lensmith.data.encode import Encoder
from lensmith.data.frames import probe_file, read_moment
from lensmith.data.layout import guess_layout
from lensmith.data.refs import RefReader
from lensmith.data.rows import open_rows
from lensmith.data.samples import to_sample
from lensmith.data.scan import scan_source
from lensmith.data.source import open_source
from lensmith.data.video import VideoLimits, check_video, read_video_limits, size_video, write_video_policy
from lensmith.errors import ConfigError, RowError
from lensmith.types import ImageRef, Moment, Text, VideoRef, VisionGeometry

GEOMETRY = VisionGeometry(16, 2, 2, (0.5,) * 3, (0.5,) * 3, min_tokens=4)
LIMITS = VideoLimits(fps=2.0, min_frames=4, max_frames=128, min_px=4096, max_tokens=12288)
GREY_STEP = 8
"""Frame n of a test video is grey 8 n: far enough apart that no codec here mistakes one for another."""
GREY_SLACK = 3


def write_video(path, *, num=24, fps=10, size_px=(48, 64), codec="libx264", gop=8, times_ms=None, turned=0):
    """A video whose frame n is one grey, 8 n; `times_ms`: when each is shown, for a rate that changes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size_px, "yuv420p", gop
        if turned:
            stream.set_display_rotation(turned)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        container.start_encoding()
        for number in range(num):
            picture = np.full((*size_px, 3), GREY_STEP * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video_of(path, **settings) -> VideoRef:
    return VideoRef(ImageRef(path, str(path)), str(path), **settings)


def sizes_of(path, limits=LIMITS, **settings):
    return size_video(video_of(path, **settings), GEOMETRY, limits)


def numbers_seen(sizes) -> list[int]:
    """Which frames the pixels show, by their greys."""
    greys = [float(frame.float().mean()) for size in sizes for frame in read_moment(size.ref, size.seen_px)]
    numbers = [round(grey / GREY_STEP) for grey in greys]
    assert np.abs(np.array(greys) - GREY_STEP * np.array(numbers)).max() <= GREY_SLACK
    return numbers


@pytest.mark.parametrize(
    ("name", "codec", "was_counted"),
    [
        ("a.mp4", "libx264", False),
        ("a.mov", "libx264", False),
        ("a.avi", "mpeg4", False),
        ("a.mkv", "libx264", True),
        ("a.webm", "libvpx-vp9", True),
        ("a.ts", "libx264", True),
    ],
)
def test_frames_are_told_without_decoding_and_seen_where_told(tmp_path, name, codec, was_counted):
    path = write_video(tmp_path / name, codec=codec)
    header = probe_file(video_of(path))
    assert (header.size_px, header.num_frames, header.fps, header.times_s) == ((48, 64), 24, 10.0, None)
    assert header.was_counted == was_counted
    sizes = sizes_of(path)
    assert [size.ref.frames for size in sizes] == [(0, 8), (15, 23)]
    assert [size.ref.time_s for size in sizes] == pytest.approx([0.4, 1.9])
    assert {(size.seen_px, size.tokens, size.original_px) for size in sizes} == {((64, 64), 4, (48, 64))}
    assert numbers_seen(sizes) == [0, 8, 15, 23]


@pytest.mark.parametrize("fps", [0.7, 1.0, 3.0, 7.0, 10.0, 30.0])
@pytest.mark.parametrize("gop", [1, 5, 100])
def test_frames_are_the_same_wherever_key_frames_stand(tmp_path, fps, gop):
    sizes = sizes_of(write_video(tmp_path / "a.mp4", num=30, gop=gop), fps=fps)
    clip = sizes[0].ref.clip
    assert len(set(clip.frames)) == min(30, max(4, int(3 * fps)))
    assert numbers_seen(sizes) == list(clip.frames)


def test_a_rate_over_that_of_the_video_takes_every_frame_once(tmp_path):
    sizes = sizes_of(write_video(tmp_path / "a.mp4", num=6, fps=5), fps=60.0)
    assert sizes[0].ref.clip.frames == (0, 1, 2, 3, 4, 5)


def test_an_odd_last_frame_and_a_single_one_are_seen_twice(tmp_path):
    clip = sizes_of(write_video(tmp_path / "five.mp4", num=5), fps=10.0)[0].ref.clip
    assert clip.frames == (0, 1, 2, 3, 4, 4)
    (only,) = sizes_of(write_video(tmp_path / "one.mp4", num=1))
    assert (only.ref.frames, only.ref.time_s) == ((0, 0), 0.0)
    assert numbers_seen([only]) == [0, 0]


def test_frames_of_a_changing_rate_are_spread_over_time_and_told_when_they_are_shown(tmp_path):
    times_ms = [0, 100, 200, 300, 400, 500, 2000, 4000, 4100]
    path = write_video(tmp_path / "a.mkv", num=9, times_ms=times_ms)
    header = probe_file(video_of(path))
    np.testing.assert_allclose(header.times_s, np.array(times_ms) / 1000)
    sizes = sizes_of(path, limits=VideoLimits(1.0, 4, 128, 4096, 12288))
    clip = sizes[0].ref.clip
    # Moments at 0, 1.37, 2.73 and 4.1 s: on the screen then are the frames that began at 0, 0.5, 2 and 4.1 s.
    assert clip.frames == (0, 5, 6, 8)
    assert clip.times_s == pytest.approx((0.0, 0.5, 2.0, 4.1))
    assert numbers_seen(sizes) == [0, 5, 6, 8]


@pytest.mark.parametrize("turned", [90, -90, 180])
def test_a_video_filmed_on_its_side_is_seen_upright(tmp_path, turned):
    path = write_video(tmp_path / "a.mp4", size_px=(32, 96), turned=turned)
    upright = (32, 96) if turned == 180 else (96, 32)
    assert probe_file(video_of(path)).size_px == upright
    assert sizes_of(path)[0].original_px == upright
    assert read_moment(sizes_of(path)[0].ref, upright).shape == (2, 3, *upright)


def test_turning_is_counterclockwise_by_the_angle_of_the_display_matrix(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "bgr0"
        stream.set_display_rotation(90)
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, 48:] = 255  # the right end, which a quarter turn to the left takes to the top
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    seen = read_moment(sizes_of(path)[0].ref, (64, 32)).float().mean((0, 1, 3))
    assert seen[:16].min() > 250
    assert seen[16:].max() < 5


def test_a_gif_keeps_its_times_and_its_clear_parts_are_white(tmp_path):
    pictures = [Image.new("RGBA", (40, 40), (0, 0, 0, 0)) for _ in range(3)]
    for number, picture in enumerate(pictures):
        picture.paste((255, 0, 0, 255), (0, 0, 10 * (number + 1), 40))
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[200, 500, 200], disposal=2)
    header = probe_file(video_of(path))
    assert (header.num_frames, header.was_counted) == (3, True)
    np.testing.assert_allclose(header.times_s, [0.0, 0.2, 0.7])
    first = read_moment(sizes_of(path)[0].ref, (32, 32))[0].float()
    assert first[:, :, 24:].min() > 250, "clear is white"
    assert first[1:, :, :4].max() < 5, "red is red"


def test_frames_that_are_pictures_have_the_times_they_are_given(tmp_path):
    refs = []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 48), (GREY_STEP * number,) * 3).save(path)
        refs.append(ImageRef(path, str(path)))
    told = size_video(VideoRef(tuple(refs), "list", times_s=(10.0, 10.5, 13.0, 20.0, 21.0)), GEOMETRY, LIMITS)
    assert [size.ref.time_s for size in told] == [10.25, 16.5, 21.0]
    assert numbers_seen(told) == [0, 1, 2, 3, 4, 4]
    rated = size_video(VideoRef(tuple(refs), "list", fps=4.0), GEOMETRY, LIMITS)
    assert [size.ref.time_s for size in rated] == [0.125, 0.625, 1.0]
    silent = size_video(VideoRef(tuple(refs), "list"), GEOMETRY, LIMITS)
    assert [size.ref.time_s for size in silent] == [0.25, 1.25, 2.0], "as if taken at data.video.fps"
    few = size_video(VideoRef(tuple(refs), "list"), GEOMETRY, VideoLimits(2.0, 2, 2, 4096, 64))
    assert few[0].ref.frames == (0, 4)
    Image.new("RGB", (32, 32)).save(tmp_path / "2.png")
    with pytest.raises(RowError, match="frame 3 is 32 x 32 px but frame 1 is 64 x 48; the frames of a video must have"):
        size_video(VideoRef(tuple(refs), "other"), GEOMETRY, LIMITS)


def test_a_video_stays_within_its_tokens_whatever_its_shape():
    rng = np.random.default_rng(0)
    from lensmith.data.video import fit_clip_px

    for _ in range(2000):
        height, width = np.exp(rng.uniform(1, 8, 2)).astype(int).tolist()
        moments = int(rng.integers(1, 65))
        most = int(rng.integers(moments, 20 * moments))
        if max(height, width) > 190 * min(height, width):
            continue
        rows, columns = (side // 32 for side in fit_clip_px(height, width, 2 * moments, GEOMETRY, 4096, most))
        assert min(rows, columns) >= 1
        assert rows * columns * moments <= most


def test_a_strip_over_200_to_1_is_refused_by_name(tmp_path):
    path = write_video(tmp_path / "strip.mp4", size_px=(16, 4000), num=1)
    with pytest.raises(RowError, match=r"strip\.mp4: is \d+ x \d+ px, longer than 200 : 1") as caught:
        sizes_of(path)
    assert caught.value.code == "extreme_aspect"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b""), "is not a video that FFmpeg can read"),
        (lambda path: path.write_bytes(b"no video at all" * 99), "is not a video that FFmpeg can read"),
        (write_sound, "holds no video, only audio; name another file, or remove the row"),
        (lambda path: write_video(path, num=0), "holds no video; name another file, or remove the row"),
        (
            lambda path: write_video(path.with_suffix(".avi"), num=0, codec="mpeg4").rename(path),
            "holds a video of 0 frames; encode it",
        ),
    ],
    ids=["empty file", "text", "only sound", "nothing", "no frames"],
)
def test_what_holds_no_video_says_so(tmp_path, make, sentence):
    path = tmp_path / "odd.mp4"
    make(path)
    with pytest.raises(RowError, match=sentence) as caught:
        sizes_of(path)
    assert caught.value.code == "unreadable_video"
    assert str(caught.value).startswith(str(path))


def test_a_video_that_is_gone_is_a_missing_file(tmp_path):
    with pytest.raises(RowError) as caught:
        sizes_of(tmp_path / "none.mp4")
    assert caught.value.code == "missing_file"


def index_first(path):
    """Move an .mp4's index in front of its frames, as for the web; what is cut off then still has a whole header."""
    moved = path.with_name("web.mp4")
    with av.open(str(path)) as source, av.open(str(moved), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return moved


def noisy_video(path, num=24):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, "yuv420p", 6
        for _ in range(num):
            picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def test_a_video_that_was_cut_off_names_the_first_frame_that_is_gone(tmp_path):
    path = index_first(noisy_video(tmp_path / "a.mp4"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    sizes = sizes_of(path, fps=10.0)
    assert len(sizes[0].ref.clip.frames) == 24, "the header is whole"
    with pytest.raises(RowError, match=r"frame 24 of 24 at 2\.3 s cannot be decoded \(.*\); the file is damaged"):
        check_video(sizes)
    with pytest.raises(RowError, match=r"web\.mp4: frame \d+ of 24 at \d\.\d s cannot be decoded") as caught:
        read_moment(sizes[0].ref, sizes[0].seen_px)
    assert caught.value.code == "unreadable_video"


def test_a_damaged_frame_is_named_instead_of_painted_over(tmp_path):
    path = index_first(noisy_video(tmp_path / "a.mp4"))
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, size = places[12]  # of a key frame
    content[start + size // 4 : start + size] = b"\xff" * (size - size // 4)
    path.write_bytes(content)
    sizes = sizes_of(path, fps=10.0)
    with pytest.raises(RowError, match=r"frame 1\d of 24 at 1\.\d s cannot be decoded"):
        read_moment(sizes[0].ref, sizes[0].seen_px)


def spoil(path):
    """The file as it was by its looks, with nothing in it."""
    state = path.stat()
    path.write_bytes(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_video_that_was_replaced_is_seen_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert numbers_seen(sizes_of(path)) == [0, 8, 15, 23]
    write_video(path, num=10)
    assert numbers_seen(sizes_of(path)) == [0, 3, 6, 9]


def test_a_video_is_decoded_once_for_all_its_moments_and_rows(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    sizes = sizes_of(path)
    read_moment(sizes[0].ref, sizes[0].seen_px)
    spoil(path)
    assert numbers_seen(sizes) == [0, 8, 15, 23]
    with pytest.raises(RowError):
        read_moment(sizes[0].ref, (32, 32))


def test_what_is_remembered_of_videos_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "KEPT_BYTES", 2 * 4 * 3 * 64 * 64)
    sizes = [sizes_of(write_video(tmp_path / f"{number}.mp4")) for number in range(3)]
    for each in sizes:
        read_moment(each[0].ref, each[0].seen_px)
        spoil(each[0].ref.clip.video.source.source)
    for each in sizes[1:]:
        assert numbers_seen(each) == [0, 8, 15, 23]
    with pytest.raises(RowError):
        read_moment(sizes[0][0].ref, sizes[0][0].seen_px)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos a.mp4 and b.mp4 of 24 frames, pictures 0.png to 3.png."""
    place = tmp_path_factory.mktemp("rows")
    for name in ("a.mp4", "b.mp4"):
        write_video(place / name)
    for number in range(4):
        Image.new("RGB", (64, 48), (40 * number,) * 3).save(place / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def sample_of(folder):
    def read(fields, columns=None):
        path = folder / "rows.jsonl"
        path.write_text(json.dumps({"answer": "yes", **fields}) + "\n")
        rows = open_rows(path)
        return to_sample(rows[0], guess_layout(rows, columns or Columns()), RefReader(folder))

    return read


def shape(sample):
    """Texts, `V0` for the first video, `I0` for the first image."""
    names = {"VideoMark": "V", "ImageMark": "I"}
    parts = sample.messages[0].parts
    return [part.text if isinstance(part, Text) else f"{names[type(part).__name__]}{part.index}" for part in parts]


FRAMES = ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("fields", "parts", "videos"),
    [
        ({"video": "a.mp4", "question": "What?"}, ["V0", "What?"], ["a.mp4"]),
        (
            {"videos": ["a.mp4", "b.mp4"], "question": "<video> or <video>?"},
            ["V0", " or ", "V1", "?"],
            ["a.mp4", "b.mp4"],
        ),
        ({"video": "a.mp4;b.mp4", "question": "Which?"}, ["V0", "V1", "Which?"], ["a.mp4", "b.mp4"]),
        ({"video": FRAMES, "question": "<video>\nWhat?"}, ["V0", "What?"], [FRAMES]),
        ({"video": json.dumps(FRAMES), "question": "What?"}, ["V0", "What?"], [FRAMES]),
        ({"videos": [FRAMES, FRAMES[:2]], "question": "Which?"}, ["V0", "V1", "Which?"], [FRAMES, FRAMES[:2]]),
        ({"video": {"path": "a.mp4", "bytes": None}, "question": "What?"}, ["V0", "What?"], ["a.mp4"]),
        ({"image": "0.png", "video": "a.mp4", "question": "Is it in?"}, ["I0", "V0", "Is it in?"], ["a.mp4"]),
        ({"image": "0.png", "video": "a.mp4", "question": "<video> <image>?"}, ["V0", " ", "I0", "?"], ["a.mp4"]),
        ({"video": None, "question": "What?"}, ["What?"], []),
    ],
)
def test_every_way_to_name_a_video_is_read(sample_of, fields, parts, videos):
    sample = sample_of(fields)
    assert shape(sample) == parts
    named = [
        video.source.source.name if isinstance(video.source, ImageRef) else [ref.source.name for ref in video.source]
        for video in sample.videos
    ]
    assert named == videos


def test_a_video_in_a_message_says_more_about_itself(sample_of):
    def chat(**part):
        content = [{"type": "video", **part}, {"type": "text", "text": "What?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A test."}]
        return sample_of({"messages": turns})

    (video,) = chat(video="a.mp4", fps=1, nframes=None).videos
    assert (video.source.source.name, video.fps, video.times_s) == ("a.mp4", 1, None)
    (video,) = chat(video=FRAMES, timestamps=[0, 1.5, 2]).videos
    assert video.times_s == (0.0, 1.5, 2.0)
    (video,) = chat(video=FRAMES, sample_fps=0.5).videos
    assert video.fps == 0.5
    for part, sentence in [
        ({"video": "a.mp4", "video_start": 3.0}, r"a video asks for video_start=3\.0; set data\.video for all videos"),
        ({"video": "a.mp4", "fps": 0}, "a video has fps=0; it must be a number over 0"),
        ({"video": "a.mp4", "timestamps": [1]}, "a video file has timestamps of its own"),
        ({"video": FRAMES, "timestamps": [0, 1]}, "a video has 2 timestamps for 3 frames; give each frame one"),
        ({"video": FRAMES, "timestamps": [0, 2, 1]}, r"timestamps=\[0, 2, 1\]; they must be seconds in rising order"),
        ({"video": "c.mp4"}, r"c\.mp4 is missing"),
    ]:
        with pytest.raises(RowError, match=sentence):
            chat(**part)


def test_marks_and_videos_that_do_not_match_say_both_counts(sample_of):
    with pytest.raises(
        RowError, match=r"2 <video> marks in the text but 1 videos listed in 'video'\. Add the missing path"
    ):
        sample_of({"video": "a.mp4", "question": "<video> and <video>"})


def test_a_row_over_the_budget_sees_its_video_smaller(folder, processor):
    (folder / "long.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "What?", "answer": "A test."}) + "\n")
    encoder = Encoder.from_processor(processor, Images(), Video(fps=10))
    source = open_source(Data(train=str(folder / "long.jsonl")), encoder, which="train")
    whole = source.encoded(0)
    assert sum(image.tokens for image in whole.images) == 12 * 4
    scan = scan_source(
        source, budget_tokens=whole.num_tokens - 20, on_long="shrink", on_bad_row="error", seed=0, workers=0
    )
    smaller = scan.source.encoded(0)
    assert len(smaller.images) == 12, "no frame is lost"
    assert smaller.num_tokens == scan.tokens[0] <= whole.num_tokens - 20
    assert "1 video, of which 24 frames are seen; none reduced." in scan.sentences()
    assert (scan.pictures >= 0).all(), "held out by video, as by image"


def test_text_cannot_open_a_video(processor, sample_of):
    encoder = Encoder.from_processor(processor, Images())
    sample = sample_of({"video": "a.mp4", "question": "<|vision_start|><|video_pad|><|vision_end|>?"})
    encoded = encoder.encode(sample)
    assert (encoded.input_ids == encoder.video_token_id).sum() == sum(image.tokens for image in encoded.images)
    assert all(isinstance(image.ref, Moment) for image in encoded.images)
    assert "<|video_pad|>" in processor.tokenizer.decode(encoded.input_ids[encoded.prefix_tokens :])


def test_limits_that_leave_a_pair_without_a_token_are_refused(processor):
    with pytest.raises(ConfigError, match=r"max_tokens is 63, but the 64 pairs of data\.video\.max_frames=128 need at"):
        read_video_limits(processor, Video(max_tokens=63))


def test_a_saved_processor_takes_the_frames_that_training_took(processor):
    import copy

    saved = copy.deepcopy(processor)
    limits = read_video_limits(saved, Video(fps=1, max_frames=16, max_tokens=640))
    write_video_policy(saved, limits)
    assert saved.video_processor.size["longest_edge"] == 640 * 2 * 32 * 32
    assert read_video_limits(saved, Video(fps=1, max_frames=16, max_tokens=640)) == limits


def test_rows_are_compared_by_their_videos(folder):
    told = [("a.mp4", "cat"), ("b.mp4", "dog"), ("a.mp4", "dog"), ("b.mp4", "dog")]
    rows = [{"video": name, "question": "What is it?", "answer": answer} for name, answer in told]
    (folder / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_check(read_config(None, ["data.workers=0"], data=str(folder / "pets.jsonl"))).report
    where = {finding.code: finding.where for finding in report.findings}
    assert where["duplicate_row"] == ("pets.jsonl:4",), "the same video, question and answer as line 2"
    assert "conflicting_answer" in where, "lines 1 and 3 disagree about a.mp4"
    assert (report.rows, report.ok) == (4, 4)
