"""Videos are read, cut and learned as transformers reads, cuts and learns them: frames, ids, pixels, positions, loss.

The reference is Qwen3VLProcessor with the limits that training writes into it, on the frames that PyAV decodes, and the
stock model on what that processor makes of them.
"""

import copy
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.video_utils import VideoMetadata

from lensmith.config.tree import Images, Video
from lensmith.data.encode import Encoder
from lensmith.data.frames import VideoHeader
from lensmith.data.images import grid_of, read_patches, write_policy
from lensmith.data.pack import pack_samples
from lensmith.data.positions import mrope_positions
from lensmith.data.video import VideoLimits, choose_frames, fit_clip_px, write_video_policy
from lensmith.evals.predict import answer_samples, pad_prompts
from lensmith.model.engine import Engine
from lensmith.types import IGNORE, ImageMark, ImageRef, Message, Sample, Text, VideoMark, VideoRef

pytestmark = pytest.mark.usefixtures("float64_modules")

MAX_TOKENS = 64
"""Of a video here, small enough to be reached."""
VOCAB_SIZE = 2048
"""Of the tiny model here: the ids of lensmith/tiny's tokenizer fit in."""
NUM_SIZES, NUM_CHOICES = 10_000, 3_000


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Noise of several lengths, sizes and rates: whole and odd numbers of frames, over the budget, under four frames."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    refs = {}
    for name, codec, num, fps, size_px in [
        ("even.mp4", "libx264", 20, Fraction(10), (48, 80)),
        ("odd.mkv", "libx264", 25, Fraction(10), (64, 64)),
        ("large.mp4", "libx264", 40, Fraction(10), (160, 240)),
        ("short.avi", "mpeg4", 3, Fraction(25), (96, 64)),
        ("slow.webm", "libvpx-vp9", 9, Fraction(1), (50, 34)),
        ("film.mp4", "libx264", 72, Fraction(24000, 1001), (64, 96)),
    ]:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=fps)
            stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size_px, "yuv420p", 7
            for _ in range(num):
                picture = rng.integers(0, 256, (*size_px, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode())
        refs[name] = VideoRef(ImageRef(folder / name, name), name)
    return refs


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder.from_processor(processor, Images(max_tokens=16), Video(max_tokens=MAX_TOKENS, max_frames=16))


@pytest.fixture(scope="module")
def serving(processor, encoder):
    """The processor as a run saves it."""
    saved = copy.deepcopy(processor)
    write_policy(saved, encoder.min_tokens, encoder.max_tokens)
    write_video_policy(saved, encoder.video)
    return saved


def whole(video: VideoRef) -> tuple[torch.Tensor, VideoMetadata]:
    """All frames as PyAV decodes them, and what transformers' own reader would say about them."""
    with av.open(str(video.source.source)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), VideoMetadata(len(frames), fps=float(rate))


def ask(video: VideoRef | None, question: str, answer: str, *, image: ImageRef | None = None) -> Sample:
    """The image first, then the video, then the question."""
    images, videos = (tuple(ref for ref in (found,) if ref is not None) for found in (image, video))
    marks = (*(ImageMark(0) for _ in images), *(VideoMark(0) for _ in videos))
    messages = (Message("user", (*marks, Text(question))), Message("assistant", (Text(answer),)))
    return Sample(f"{question}:1", messages, images, videos=videos)


def served(serving, samples, *, prompts: bool = False):
    """What the processor makes of the samples, left-padded; it takes the frames and writes the times itself."""
    texts, images, videos, metadata = [], [], [], []
    for sample in samples:
        kinds = {ImageMark: "image", VideoMark: "video"}
        turns = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": kinds[type(part)]}
                    for part in message.parts
                ],
            }
            for message in (sample.messages[:-1] if prompts else sample.messages)
        ]
        texts.append(serving.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompts))
        images += [Image.open(ref.source) for ref in sample.images]
        for video in sample.videos:
            frames, told = whole(video)
            videos.append(frames)
            metadata.append(told)
    pictures = {"images": images} if images else {}
    films = {"videos": videos, "video_metadata": metadata} if videos else {}
    return serving(text=texts, **pictures, **films, return_tensors="pt", padding=True, padding_side="left")


@pytest.mark.parametrize("name", ["even.mp4", "odd.mkv", "large.mp4", "short.avi", "slow.webm", "film.mp4"])
def test_frames_ids_pixels_and_positions_are_those_of_the_processor(encoder, serving, videos, build_tiny, name):
    sample = ask(videos[name], "What is it?", "Noise.")
    encoded, theirs = encoder.encode(sample), served(serving, [sample])
    assert encoded.input_ids.tolist() == theirs["input_ids"][0, : len(encoded.input_ids)].tolist()
    pixels = torch.cat([read_patches(image, encoder.geometry) for image in encoded.images])
    assert_close(pixels, theirs["pixel_values_videos"], rtol=0, atol=0)
    model = build_tiny(vocab_size=VOCAB_SIZE)
    index, _ = model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], video_grid_thw=theirs["video_grid_thw"]
    )
    ours = mrope_positions(
        encoded.input_ids,
        [grid_of(image, encoder.geometry) for image in encoded.images],
        image_token_id=encoder.image_token_id,
        video_token_id=encoder.video_token_id,
        merge=encoder.geometry.merge,
    )
    np.testing.assert_array_equal(ours[1:], index[:, 0].numpy())


def test_each_moment_stands_under_its_time_between_its_own_marks(encoder, videos, processor):
    encoded = encoder.encode(ask(videos["odd.mkv"], "Q", "A"))
    spelled = processor.tokenizer.decode(encoded.input_ids)
    moment = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    # Five frames at 0, 0.6, 1.2, 1.8 and 2.4 s; the last one is alone, so it is seen twice.
    told = "".join(f"<{time} seconds>{moment}" for time in (0.3, 1.5, 2.4))
    assert spelled == (
        f"<|im_start|>user\n<|vision_start|>{told}<|vision_end|>Q<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE]) == "A<|im_end|>"
    assert processor.tokenizer.decode(encoded.input_ids[: encoded.prefix_tokens]).endswith(
        "<|vision_end|><|vision_end|>"
    )


def test_frames_are_those_that_the_processor_samples(serving):
    rng, videos = np.random.default_rng(0), copy.deepcopy(serving.video_processor)
    for _ in range(NUM_CHOICES):
        total, fps = int(np.exp(rng.uniform(0, 9))), float(rng.choice([1, 10, 23.976, 25, 29.97, 30, 60, 7.3]))
        wanted, most = float(rng.choice([0.1, 0.5, 1, 2, 4.5, 100])), int(rng.integers(4, 200))
        limits = VideoLimits(wanted, videos.min_frames, most, 4096, 12288)
        videos.max_frames = most
        theirs = videos.sample_frames(VideoMetadata(total, fps=fps), fps=wanted)
        ours = choose_frames(VideoHeader((32, 32), total, fps), limits, wanted)
        np.testing.assert_array_equal(ours, theirs)


def test_sizes_are_those_of_smart_resize_wherever_it_keeps_to_its_maximum(encoder):
    rng, geometry, over, met = np.random.default_rng(0), encoder.geometry, 0, 0
    for _ in range(NUM_SIZES):
        height, width = np.exp(rng.uniform(3, 8, 2)).astype(int).tolist()
        moments = int(rng.integers(1, 65))
        most, min_px = int(moments * np.exp(rng.uniform(0, 6))), int(rng.choice([4096, 128 * 32 * 32]))
        try:
            theirs = smart_resize(2 * moments, height, width, 2, 32, min_px, most * 2 * 32**2)
        except ValueError:
            continue  # over 200 : 1
        if theirs[0] * theirs[1] * moments > most * 32**2:
            over += 1
        else:
            assert fit_clip_px(height, width, 2 * moments, geometry, min_px, most) == theirs
            met += 1
    assert 0 < over < met, "both kinds were met"


@pytest.fixture
def samples(videos, tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    picture = ImageRef(tmp_path / "a.png", "picture")
    return [
        ask(videos["even.mp4"], "What is it?", "Noise."),
        ask(videos["odd.mkv"], "Is it in there?", "No, not at all.", image=picture),
        ask(videos["even.mp4"], "Anything else?", "Nothing."),
        ask(None, "No video?", "None."),
        ask(None, "And this?", "A picture.", image=picture),
    ]


def with_ids_of(model, processor):
    """The model told which ids stand for pictures."""
    ids = processor.tokenizer.convert_tokens_to_ids
    model.config.image_token_id, model.config.video_token_id = ids("<|image_pad|>"), ids("<|video_pad|>")
    model.config.vision_start_token_id = ids("<|vision_start|>")
    model.config.vision_end_token_id = ids("<|vision_end|>")
    return model


def test_a_pack_with_videos_trains_as_the_stock_model_on_what_the_processor_makes(
    build_tiny, encoder, serving, samples
):
    model = with_ids_of(build_tiny(cls=Engine, vocab_size=VOCAB_SIZE), serving)
    encoded = [encoder.encode(sample) for sample in samples]
    nats = []
    for sample, ours in zip(samples, encoded, strict=True):
        inputs = served(serving, [sample])
        doubles = {name: value.double() for name, value in inputs.items() if value.is_floating_point()}
        logits = model(**{**inputs, **doubles}, use_cache=False).logits[0]
        learned = np.flatnonzero(ours.labels != IGNORE)
        nats.append(-logits.log_softmax(-1)[learned - 1, ours.labels[learned]].sum())
    expected = torch.stack(nats).sum()
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    pack = pack_samples(
        encoded,
        encoder.geometry,
        image_token_id=encoder.image_token_id,
        video_token_id=encoder.video_token_id,
        pixel_dtype=torch.float64,
    )
    assert sum(segment.parent is not None for segment in pack.segments) == 2, "two questions share their video"
    loss = -model(pack=pack).sum()
    loss.backward()
    assert_close(loss.detach(), expected.detach())
    for name, parameter in model.named_parameters():
        if name in theirs:
            assert_close(parameter.grad, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_prompts_are_what_the_processor_makes_and_are_answered_alike(build_tiny, encoder, serving, samples):
    model = with_ids_of(build_tiny(cls=Engine, vocab_size=VOCAB_SIZE), serving).eval()
    ours = pad_prompts([encoder.encode_prompt(sample) for sample in samples], encoder, model)
    theirs = served(serving, samples, prompts=True)
    assert set(ours) == set(theirs)
    for name in ("attention_mask", "mm_token_type_ids", "image_grid_thw", "pixel_values", "pixel_values_videos"):
        assert_close(ours[name], theirs[name], rtol=0, atol=0, check_dtype=False)
    assert_close(ours["video_grid_thw"].prod(-1).sum(), theirs["video_grid_thw"].prod(-1).sum())
    with torch.no_grad():
        logits = [
            model(
                **{name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
            ).logits
            for inputs in (ours, theirs)
        ]
    assert_close(logits[0][:, -1], logits[1][:, -1])
    answers = answer_samples(model, encoder, serving, samples, max_new_tokens=4, batch=2)
    assert [answer.where for answer in answers] == [sample.where for sample in samples]
