"""A served run answers on a real port as it does at home, to those it should, and lets go of those who leave."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from contextlib import contextmanager

import pytest
import uvicorn
from PIL import Image
from tests.journeys.test_page_in_browser import BROWSER

from lensmith import cli
from lensmith.config.read import read_config
from lensmith.data.encode import Encoder
from lensmith.errors import ConfigError, ModelError
from lensmith.evals.predict import ASK_TOKENS, answer_samples
from lensmith.model.adapters import load_tuned
from lensmith.model.load import load_model
from lensmith.serve import generate
from lensmith.serve.app import Limits, build_app
from lensmith.serve.ask import printable
from lensmith.serve.generate import Sampling
from lensmith.serve.schema import MAX_NEW_TOKENS
from lensmith.serve.start import LOOPBACK_NAMES, bind_address
from lensmith.serve.subject import open_subject
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

COLOURS = {"red": "square", "green": "circle", "blue": "triangle", "teal": "square"}
"""Pictures, and what is learned to be said of them: words that the embedded model knows and would not say of its own."""
SETTINGS = ["model=lensmith/tiny", "optim.effective_samples=4", "data.test=0.25", "eval.max_new_tokens=8",
            "data.workers=0", "data.image.max_tokens=64", "optim.learning_rate=2e-3"]  # fmt: skip
QUESTION = "Which colour?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, rows, the run `lora`, and the run `merger` that trained weights of its own besides."""
    folder = tmp_path_factory.mktemp("serve")
    rows = []
    for colour, answer in COLOURS.items():
        Image.new("RGB", (640, 400), colour).save(folder / f"{colour}.png")
        rows += [{"image": f"{colour}.png", "question": q, "answer": answer} for q in (QUESTION, "Name the colour.")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "rows.jsonl", *SETTINGS, "optim.steps=12", "run=lora"]) == 0
        assert cli.main(["train", "rows.jsonl", *SETTINGS, "optim.steps=2", "tune.merger=trained", "run=merger"]) == 0
    return folder


@contextmanager
def serving(subject, limits=None, *, token=None):
    """The address of a server, and its application."""
    limits = limits or Limits(max_upload_mib=1, max_waiting=1)
    app = build_app(subject, limits, token=token, hosts=LOOPBACK_NAMES)
    with bind_address("127.0.0.1", 0, token) as opened:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield opened.getsockname()[1], app
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def subject(place):
    return open_subject(str(place / "lora"), say=print)


@pytest.fixture(scope="module")
def served(subject):
    with serving(subject) as found:
        yield found


@pytest.fixture(scope="module")
def port(served):
    return served[0]


def call(port, path="/v1/chat/completions", body=None, **headers):
    """Status and parsed answer; `body` is JSON, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    connection.request("GET" if content is None else "POST", path, content, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, json.loads(text) if reply.headers["content-type"].startswith("application/json") else text


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def question(url=None, text=QUESTION, **more):
    picture = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}], **more}


def refusal(answered, status):
    assert answered[0] == status, answered[1]
    assert set(answered[1]["error"]) == {"message", "type", "param", "code"}
    return answered[1]["error"]["message"]


# --- answers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_home(place):
    """What an evaluation answers about each picture, before and after training, with weights loaded apart from the server's."""
    config = read_config(place / "lora" / "config.yaml")
    loaded = load_model(config)
    encoder = Encoder.from_processor(loaded.processor, config.data.image)
    refs = [ImageRef(place / f"{colour}.png", key=colour) for colour in COLOURS]
    samples = [Sample(ref.key, (Message("user", (ImageMark(0), Text(QUESTION))),), (ref,)) for ref in refs]

    def ask(model):
        answers = answer_samples(model, encoder, loaded.processor, samples, max_new_tokens=ASK_TOKENS, batch=1)
        return [answer.answer.strip() for answer in answers]

    base = ask(loaded.model)
    tuned = ask(load_tuned(loaded.model, place / "lora"))
    return {"base": base, "tuned": tuned}


def test_base_and_tuned_answer_as_they_do_at_home_whichever_is_asked_first(place, port, at_home):
    assert at_home["base"] != at_home["tuned"]
    for which in ("tuned", "base", "base", "tuned", "lora"):
        said = []
        for colour in COLOURS:
            status, answer = call(port, body=question(data_url((place / f"{colour}.png").read_bytes()), model=which))
            assert (status, answer["model"], answer["choices"][0]["finish_reason"]) == (200, which, "stop")
            said.append(answer["choices"][0]["message"]["content"].strip())
            assert 50 < answer["usage"]["prompt_tokens"] < 64 + 20, "the picture costs what data.image allows, not 240"
        assert said == at_home["base" if which == "base" else "tuned"]


def test_streamed_pieces_are_the_whole_answer(place, port):
    url = data_url((place / "red.png").read_bytes())
    for more in (
        {},
        {"temperature": 2, "seed": 1, "max_tokens": 30},
        {"max_tokens": 1, "model": "base", "temperature": 2, "seed": 3},
    ):
        _, whole = call(port, body=question(url, **more))
        asked = question(url, stream=True, stream_options={"include_usage": True}, **more)
        status, text = call(port, body=asked)
        assert status == 200
        *events, end, rest = text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
        assert "".join(pieces) == whole["choices"][0]["message"]["content"]
        assert chunks[-1]["usage"] == whole["usage"]
        assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_the_same_seed_draws_the_same_answer(port):
    drawn = [
        call(port, body=question(temperature=2, seed=seed))[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_trained_components_go_back_to_the_base_and_come_again(place):
    """A run that trained its merger has two versions of it; the base's must be the checkpoint's own, bit for bit."""
    opened = open_subject(str(place / "merger"), say=print)
    weights = lambda: {name: p.clone() for name, p in opened.model.named_parameters() if "merger" in name}  # noqa: E731
    sample = Sample("q", (Message("user", (Text(QUESTION),)),), ())
    tuned = weights()
    opened.answer("base", sample, Sampling(1))
    base, own = weights(), dict(load_model(read_config(place / "merger" / "config.yaml")).model.named_parameters())
    assert any(not base[name].equal(tuned[name]) for name in tuned)
    for name in base:
        assert base[name].equal(own[name.removeprefix("base_model.model.")])
    opened.answer("tuned", sample, Sampling(1))
    assert all(weights()[name].equal(tuned[name]) for name in tuned)


def test_a_base_that_has_no_room_is_not_served_and_it_is_said(place, monkeypatch):
    monkeypatch.setattr("lensmith.serve.subject._free_host_bytes", lambda: 1000)
    said = []
    opened = open_subject(str(place / "merger"), say=said.append)
    assert set(opened.names) == {"tuned", "merger"}
    assert said[-1] == (
        "Only the tuned model answers: it trained 0.0 GiB of own weights, and the base's version of them is over 50% of the "
        "0.0 GiB of free host memory. For the base, serve lensmith/tiny."
    )


def test_models_and_health_are_told(port):
    assert [model["id"] for model in call(port, "/v1/models")[1]["data"]] == ["tuned", "base", "lora"]
    assert call(port, "/health") == (200, {"status": "ok", "inside": 0})
    assert "there are GET /," in refusal(call(port, "/v1/completions", question()), 404)


def test_eval_through_our_own_endpoint_is_eval_at_home(place, port, monkeypatch, capsys):
    monkeypatch.chdir(place)
    scores = {}
    for name, more in {
        "home": (),
        "tuned": ("--endpoint", f"http://127.0.0.1:{port}", "--endpoint-concurrency", "2"),
    }.items():
        assert cli.main(["eval", "lora", *more, "--json"]) == 0
        scores[name] = json.loads(capsys.readouterr().out)["after"]
    assert scores["home"] == scores["tuned"]
    assert cli.main(["eval", "lora", "--endpoint", f"http://127.0.0.1:{port}/v1", "--endpoint-model", "base"]) == 0
    read = lambda name: (place / "lora" / f"predictions-{name}.jsonl").read_text()  # noqa: E731
    assert read("endpoint") == read("before")
    assert read("before") != read("after"), "else this test shows nothing"


# --- refusals -----------------------------------------------------------------------------------------------------------


def bomb(side):
    """A PNG of side x side black pixels in a few KiB."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pictures_are_bounded_and_never_fetched(port):
    message = refusal(call(port, body=question(data_url(bomb(9000)))), 400)
    assert (
        "messages[0].content[0]: the picture has 9,000 x 9,000 pixels, 81,000,000 in all, and one may have 64,"
        in message
    )
    assert "unfolds to an unreasonable size" in refusal(call(port, body=question(data_url(bomb(16000)))), 400)
    for url in ("http://127.0.0.1:1/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "a.png"):
        message = refusal(call(port, body=question(url)), 400)
        assert message.startswith(f"messages[0].content[0]: {url} is an address. This server fetches nothing on behalf")
    assert "is not a picture that Pillow can read" in refusal(
        call(port, body=question(data_url(b"%PDF-1.7 hello"))), 400
    )
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    assert "the picture is EPS; send one of JPEG" in refusal(call(port, body=question(data_url(postscript))), 400)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    assert "its pixels cannot be decoded" in refusal(call(port, body=question(data_url(buffer.getvalue()[:1000]))), 400)
    assert "base64 is broken" in refusal(call(port, body=question("data:image/png;base64,a b")), 400)
    buffer = io.BytesIO()
    Image.new("RGB", (2100, 10)).save(buffer, "PNG")
    assert "longer than 200 : 1" in refusal(call(port, body=question(data_url(buffer.getvalue()))), 400)


def test_too_large_an_upload_is_refused_while_it_is_read(port):
    large = json.dumps(question(text="a" * 2**21)).encode()
    assert "the request is 2.0 MiB or more, and 1.0 MiB may be sent" in refusal(call(port, body=large), 413)
    connection = socket.create_connection(("127.0.0.1", port), 10)  # in pieces, without saying how much will come
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 2**16 + b"\r\n") * 20
                       + b"0\r\n\r\n")  # fmt: skip
    assert connection.recv(2**16).startswith(b"HTTP/1.1 413 ")
    connection.close()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stop": ["."]}, "unknown field 'stop'; it would have no effect here, so leave it out. This endpoint takes messages"),
        ({"n": 2}, "n: input should be 1, and it is 2."),
        ({"temperature": 3}, "temperature: input should be less than or equal to 2, and it is 3."),
        ({"max_tokens": 10**6}, f"max_tokens: input should be less than or equal to {MAX_NEW_TOKENS}, and it is 1000000."),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens is 2 and max_completion_tokens is 3, and both mean"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: input should be 'system', 'user' or"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0] holds neither text nor a picture; leave it out."),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "the last turn is by the"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "bold": 1}]}]},
         "unknown field 'bold' in messages[0].content[0]; it would"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]: input tag"),
        ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "tokens long and the answer may have 512, together"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_or_makes_no_sense_is_named(port, fields, sentence):
    assert sentence in refusal(call(port, body=question() | fields), 400)


def test_what_is_no_json_is_refused(port):
    assert "the request is not JSON" in refusal(call(port, body=b"{"), 400)
    assert "nested too deep" in refusal(call(port, body=b"[" * 100_000), 400)
    assert "send one JSON object" in refusal(call(port, body=b"[]"), 400)
    assert "Content-Type: application/json" in refusal(call(port, body=question(), Content_Type="text/plain"), 415)
    assert "model 'gpt-4' is not served here. Ask for 'tuned' or 'base'" in refusal(
        call(port, body=question(model="gpt-4")), 404
    )


def test_another_name_that_leads_here_is_refused(port):
    for path in ("/", "/health", "/v1/models"):
        assert "is meant for 'evil.example:80'" in refusal(call(port, path, Host="evil.example:80"), 421)
    for host in ("localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1."):
        assert call(port, "/health", Host=host)[0] == 200


def test_a_token_opens_and_nothing_else_does(subject):
    with serving(subject, token="right") as (port, _):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer righ"}, {"Authorization": "right"},
                      {"Authorization": "Bearer r\xefght"}):  # fmt: skip
            assert "token" in refusal(call(port, "/v1/models", **given), 401)
            assert "token" in refusal(call(port, body=question(), **given), 401)
        assert call(port, "/v1/models", Authorization="Bearer right")[0] == 200
        assert call(port, "/health")[0] == call(port, "/")[0] == 200


def test_others_are_let_in_with_a_token_only(capsys):
    for host in ("0.0.0.0", "::"):
        assert cli.main(["serve", "lensmith/tiny", "--host", host, "--port", "0"]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"--host {host}: others can reach this address, and there is no token that they would have to send. "
            "Set LENSMITH_TOKEN (or --token) to a secret of your choice, or stay with --host 127.0.0.1."
        )
    bind_address("0.0.0.0", 0, "secret").close()


def test_a_taken_port_is_named_before_anything_is_loaded():
    with bind_address("127.0.0.1", 0, None) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port}: cannot be listened on \(.*\)\. Use another port: --port {port + 1}"
        ):
            bind_address("127.0.0.1", port, None)


# --- the line -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(monkeypatch):
    """The model cannot end an answer; one of 2,000 tokens takes it half a minute."""
    plain = generate.greedy_settings

    def settings(*arguments):
        made = plain(*arguments)
        made.suppress_tokens = [*made.suppress_tokens, *made.eos_token_id]
        return made

    monkeypatch.setattr(generate, "greedy_settings", settings)


def until(condition, within_s=5.0):
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, f"not within {within_s} s"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_the_line_is_bounded_and_who_leaves_frees_it(served, endless, stream):
    port, app = served
    line = app.state.chat.line
    body = json.dumps(question(stream=stream, max_tokens=2_000)).encode()
    callers = []
    for expected in (1, 2):
        caller = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        caller.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        callers.append(caller)
        until(lambda expected=expected: line.inside == expected)
    if stream:
        assert callers[0].getresponse().read(6) == b"data: ", "the first is being answered"
    message = refusal(call(port, body=question()), 429)
    assert message == "one question is being answered and 1 wait, which is all that may; ask again in a moment."
    callers[1].close()  # leaves while waiting
    until(lambda: line.inside == 1)
    callers[0].close()  # leaves while being answered
    until(lambda: line.inside == 0)
    assert call(port, body=question(max_tokens=2))[0] == 200


@pytest.mark.parametrize("broken", ["lensmith.serve.generate.pad_prompts", "lensmith.serve.schema.read_header"])
def test_a_bug_is_a_reply_without_its_secrets_and_the_next_question_is_answered(
    place, port, monkeypatch, capfd, broken
):
    def raise_bug(*_):
        raise ValueError("something of this machine")

    asked = question(data_url((place / "red.png").read_bytes()))
    with monkeypatch.context() as patch:
        patch.setattr(broken, raise_bug)
        for stream in (True, False):
            message = refusal(call(port, body=asked | {"stream": stream}), 500)
            assert message.startswith("a bug in Lensmith (ValueError); what the server prints has the traceback")
    assert capfd.readouterr().err.count("ValueError: something of this machine") == 2
    assert call(port, body=asked)[0] == 200


# --- the verbs ----------------------------------------------------------------------------------------------------------


def test_ask_says_what_it_said_and_the_base_beside_it(place, at_home, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert cli.main(["ask", "lora", "red.png", QUESTION, "--base", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["answer"], told["base"]["answer"]) == (at_home["tuned"][0], at_home["base"][0])
    assert told["stopped"]
    assert err.splitlines()[-4:] == ["base:", at_home["base"][0], "tuned:", at_home["tuned"][0]]
    assert cli.main(["ask", "lora", "red.png", QUESTION, "--max-tokens", "1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"answer", "tokens", "prompt_tokens", "stopped"}
    assert cli.main(["ask", "lensmith/tiny", "red.png", QUESTION, "--base"]) == 1
    assert "only its base model can answer here, so there are not two to compare." in capsys.readouterr().err


def test_the_page_runs_its_own_script_and_nothing_else(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/")
    reply = connection.getresponse()
    page, policy = reply.read().decode(), reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert 'data-kinds="base tuned"' in page
    assert "http://" not in page
    assert "https://" not in page
    assert reply.headers["access-control-allow-origin"] is None


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine; everything but the script is tested without one"
)
def test_a_browser_runs_the_page_under_its_policy(port):
    """The answers' places are made by the script, so they are there where the policy let it run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom",
               "--virtual-time-budget=2000", f"http://127.0.0.1:{port}/"]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r"<article class=\"card answer (\w+)\"><h2>(\w+)</h2>", dumped) == [
        ("base", "Base"),
        ("tuned", "Tuned"),
    ]


def test_serve_answers_until_it_is_stopped_and_that_is_no_error(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with bind_address("127.0.0.1", 0, None) as free:
        port = free.getsockname()[1]
    told = []

    def look_and_stop():
        while not told:
            with contextlib.suppress(OSError):
                told.append(call(port, body=question(model="lora")))
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=look_and_stop)
    watcher.start()
    code = cli.main(["serve", "lora", "--port", str(port), "--json"])
    watcher.join()
    out, err = capsys.readouterr()
    assert (code, told[0][0]) == (0, 200)
    url = f"http://127.0.0.1:{port}"
    assert json.loads(out) == {"url": url, "models": ["tuned", "base", "lora"], "answered": 1}
    assert err.splitlines() == [
        "Engine: transformers, because vLLM is not installed.",
        "lensmith/tiny: fp32 on the CPU.",
        f"Serving lora, tuned and base, without a token. Try it: {url}/",
        f"For OpenAI clients: base_url={url}/v1. Stop with Ctrl-C.",
        "Stopped.",
    ]


def test_an_answer_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\n\tc\r é") == r"a\x1b[2Jb" + "\n\tc" + r"\r" + " é"


def test_a_name_that_is_nothing_is_said(subject):
    with pytest.raises(ModelError, match=r"model 'x' is not served here\. Ask for 'tuned' or 'base' or 'lora'"):
        subject.find("x")
