"""Asking a server: what is sent is what training saw, a busy one is asked again, and every failure is a sentence."""

import base64
import http.server
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from lensmith.config.tree import Boxes, Images
from lensmith.data.encode import Encoder
from lensmith.data.images import read_patches, size_image
from lensmith.errors import ConfigError, EndpointError
from lensmith.evals import endpoint
from lensmith.evals.endpoint import TRIES, Endpoint, answer_through_endpoint, chat_messages, picture_url
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text, VideoRef

MODELS = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}


def reply(text="teal", reason="stop", tokens=3):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": tokens}}


@contextmanager
def server(*replies):
    """An address, and what was asked there: path, headers, content. The last of the replies is repeated."""
    asked, left = [], list(replies)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, dict(self.headers), json.loads(content)))
            self.tell(*(left.pop(0) if len(left) > 1 else left[0]))

        def do_GET(self):
            self.tell(200, MODELS)

        def tell(self, status, content, headers=None):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as opened:
        threading.Thread(target=opened.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}", asked
        opened.shutdown()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited between tries; nobody waits them here."""
    waited = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder.from_processor(processor, Images(max_tokens=64))


@pytest.fixture
def picture(tmp_path):
    """500 x 300 noisy pixels, which 64 tokens reduce."""
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)).save(path)
    return ImageRef(path, str(path))


def sample(*images, question="what?", answer="teal", **more):
    marks = tuple(ImageMark(index) for index in range(len(images)))
    turns = (Message("system", (Text("Be brief."),)), Message("user", (*marks, Text(question))))
    return Sample("rows.jsonl:1", (*turns, Message("assistant", (Text(answer),))), images, **more)


def ask(url, encoder, samples, **more):
    return answer_through_endpoint(Endpoint(url, **more), samples, encoder, max_new_tokens=7)


def test_what_a_server_gets_is_the_pixels_that_training_saw_bit_for_bit(encoder, picture):
    size = size_image(picture, encoder.geometry, min_tokens=encoder.min_tokens, max_tokens=64)
    content = base64.b64decode(picture_url(size).partition(",")[2])
    sent = ImageRef(content, "sent")
    there = size_image(sent, encoder.geometry, min_tokens=encoder.min_tokens, max_tokens=16384)
    assert there.original_px == there.seen_px == size.seen_px != size.original_px
    assert read_patches(there, encoder.geometry).equal(read_patches(size, encoder.geometry))


def test_a_strip_that_would_be_refused_goes_as_it_is(encoder, tmp_path):
    Image.new("RGB", (32 * 190, 32)).save(tmp_path / "strip.png")
    size = size_image(ImageRef(tmp_path / "strip.png", "strip"), encoder.geometry, min_tokens=250, max_tokens=400)
    assert max(size.seen_px) > 200 * min(size.seen_px)
    assert Image.open(io.BytesIO(base64.b64decode(picture_url(size).partition(",")[2]))).size == (32 * 190, 32)


def test_the_last_answer_is_not_shown_and_the_reply_is_read(encoder, picture):
    with server(reply("teal\n", "length", 7)) as (url, asked):
        (told,) = ask(url, encoder, [sample(picture)], model="m", token="secret")
    assert (told.answer, told.tokens, told.stopped) == ("teal\n", 7, False)
    assert (told.where, told.question, told.reference) == ("rows.jsonl:1", "what?", "teal")
    ((path, headers, content),) = asked
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (content["model"], content["max_tokens"], content["temperature"]) == ("m", 7, 0)
    assert [turn["role"] for turn in content["messages"]] == ["system", "user"]
    assert content["messages"][0]["content"] == "Be brief."
    assert [part["type"] for part in content["messages"][1]["content"]] == ["image_url", "text"]


def test_boxes_are_sent_as_the_model_speaks_and_come_back_as_the_data_does(encoder, picture):
    asked_of = sample(
        picture, question='What is at {"bbox_2d": [50, 30, 250, 150]}?', boxes=Boxes(convention="xyxy_px")
    )
    sizes = encoder.encode_prompt(asked_of).images
    assert "[100, 100, 500, 500]" in chat_messages(asked_of, sizes)[1]["content"][1]["text"]
    with server(reply('{"bbox_2d": [100, 100, 500, 500]}')) as (url, _):
        assert ask(url, encoder, [asked_of])[0].answer == '{"bbox_2d": [50, 30, 250, 150]}'


def test_answers_keep_the_order_of_the_questions_and_the_first_model_is_said(encoder):
    said, counted = [], []
    with server(*(reply(str(number)) for number in range(6))) as (url, asked):
        told = answer_through_endpoint(
            Endpoint(f"{url}/v1/", concurrency=1), [sample(question=str(n)) for n in range(6)], encoder,
            max_new_tokens=7, say=said.append, progress=lambda *done: counted.append(done),
        )  # fmt: skip
    assert [(p.question, p.answer) for p in told] == [(str(n), str(n)) for n in range(6)]
    assert {content["model"] for _, _, content in asked} == {"first"}
    assert said == [f"Asking 'first' at {url}/v1, the first of first, second; --endpoint-model names another."]
    assert counted[-1] == (6, 6)


def test_a_busy_server_is_asked_again_and_as_late_as_it_wants(encoder, waits):
    busy, full = (503, {}), (429, {"error": {"message": "line full"}}, {"Retry-After": "7"})
    with server(busy, full, busy, reply()) as (url, asked):
        assert ask(url, encoder, [sample()], model="m")[0].answer == "teal"
    assert len(asked) == 4
    assert waits == [1, 7, 4]


def test_waiting_is_told_once(encoder, waits):
    said = []
    with server((503, {}), (503, {}), reply()) as (url, _):
        answer_through_endpoint(Endpoint(url, "m"), [sample()], encoder, max_new_tokens=7, say=said.append)
    assert said == ["rows.jsonl:1: 503 {}. Asking again in 1 s; further waits are not told."]


def test_a_server_that_stays_busy_or_away_is_given_up_in_one_sentence(encoder, waits):
    with server((429, {"error": {"message": "Line full."}})) as (url, asked), pytest.raises(EndpointError) as told:
        ask(url, encoder, [sample()], model="m")
    assert len(asked) == TRIES
    assert sum(waits) == 31
    assert str(told.value) == (
        f"rows.jsonl:1: {url}/v1 did not answer in 6 tries; at last: 429 Line full. "
        "Look whether the server runs and at this address; where it is busy, lower --endpoint-concurrency."
    )
    with pytest.raises(EndpointError, match=r"the list of models: .* did not answer in 1 try; at last: .*refused"):
        ask(url, encoder, [sample()])


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ((401, {"error": {"message": "no token"}}), r"refused: 401 no token\. Give the token it was started with"),
        ((404, {"error": "no model m"}), r"refused: 404 no model m\. Look at the address and at --endpoint-model"),
        ((400, b"<html>"), r"refused: 400 <html>\. Asking again would not help"),
        ((307, b"", {"Location": "http://127.0.0.1:1/v1"}), r"refused: 307 .*\. It redirects; give the address"),
        ((200, b"hello"), r"answered with .*hello.*, which is not how OpenAI's API answers"),
        ((200, {"choices": []}), r"answered with .*choices.*, which is not how OpenAI's API answers"),
    ],
)
def test_what_would_not_help_to_ask_again_is_not_asked_again(encoder, waits, told, sentence):
    with server(told) as (url, asked), pytest.raises(EndpointError, match=f"rows.jsonl:1: {url}/v1 {sentence}"):
        ask(url, encoder, [sample()], model="m")
    assert len(asked) == 1
    assert not waits


def test_what_is_no_address_and_what_has_no_words_is_said(encoder, picture):
    for url in ("127.0.0.1:8000", "ftp://host/v1", "http://"):
        with pytest.raises(ConfigError, match=r"not the address of a server\. Write it as http://127"):
            ask(url, encoder, [sample()])
    with pytest.raises(EndpointError, match=r"rows\.jsonl:1: holds 1 videos, and OpenAI's API has no words for them"):
        ask("http://127.0.0.1:1", encoder, [sample(videos=(VideoRef(picture, "v"),))])
