"""Completions by a vLLM server: TRL's real client over real HTTP, a small server that speaks its protocol.

What stands in: plain transformers behind the server (tests/fixtures/vllm_stand_in.py), and for the transfer of weights from
GPU to GPU by NCCL, which there is none of here, a copy in memory of the same names and tensors.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tests.fixtures.vllm_stand_in import LLM
from tests.reference.test_vllm_rollout import GAP, GROUP, PROMPTS, STEPS, make_trainer, ring, some_rows  # noqa: F401
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient

from lensmith.config.read import read_config
from lensmith.errors import ConfigError, RunError
from lensmith.model.names import resolve_model
from lensmith.train import vllm_ready
from lensmith.train.grpo_stats import GrpoStats
from lensmith.train.vllm_ready import check_vllm, check_vllm_installed, check_vllm_room, serve_command, vllm_sentence

CUDA = torch.device("cuda")
INFO: dict[str, Any] = {
    "weight_transfer_config": {"backend": "nccl"}, "model_config": {"logprobs_mode": "processed_logprobs"},
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """`info`: what /server_info answers, None without development mode; `seen`: all paths asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.info: dict[str, Any] | None = INFO
        self.max_model_len, self.seen, self.bodies = 4096, [], []
        self.llm: Any = None
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def say(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "stand-in", "max_model_len": self.max_model_len}]}
        if path == "/v1/chat/completions/render":
            parts = body["messages"][0]["content"]
            pictures = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts]
            grids = self.llm.see([Image.open(io.BytesIO(data)) for data in pictures])["image_grid_thw"]
            lengths = [{"offset": 0, "length": int(grid.prod()) // 4} for grid in grids]
            kept = [base64.b64encode(data).decode() for data in pictures]
            return {"features": {"mm_placeholders": {"image": lengths}, "kept": kept}}
        if path == "/inference/v1/generate":
            kept = (body["features"] or {}).get("kept", [])
            seen = self.llm.see([Image.open(io.BytesIO(base64.b64decode(data))) for data in kept])
            return {"choices": [self.choice(body, seen) for _ in range(body["sampling_params"]["n"])]}
        return {"success": True}

    def choice(self, body: Any, seen: Any) -> Any:
        with self.lock:
            ids, logprobs = self.llm.write(body["token_ids"], seen, SimpleNamespace(**body["sampling_params"]))
        content = [
            {"token": f"token_id:{token}", "logprob": p, "top_logprobs": []}
            for token, p in zip(ids, logprobs, strict=True)
        ]
        return {"token_ids": ids, "logprobs": {"content": content}}


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        if self.path.startswith("/server_info"):
            self.reply(404 if self.server.info is None else 200, {"vllm_config": self.server.info})
        else:
            self.reply(200, self.server.say(self.path, None))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.path)
        self.server.bodies.append((self.path, json.loads(body or "null")))
        self.reply(200, self.server.say(self.path, self.server.bodies[-1][1]))

    def reply(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server(monkeypatch):
    found = importlib.util.find_spec
    installed = lambda name, *more: object() if name == "vllm" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", installed)
    started = Server()
    threading.Thread(target=started.serve_forever, daemon=True).start()
    yield started
    started.shutdown()
    started.server_close()


def config_of(server: Any, *settings: str) -> Any:
    return read_config(
        None,
        [
            "task=grpo",
            "rollout.engine=vllm",
            "rollout.vllm_mode=server",
            f"rollout.vllm_server={server.address}",
            *settings,
        ],
    )


@pytest.fixture
def transfer(server, monkeypatch, processor):
    """The server's weights, and TRL's client without NCCL."""
    size = {"shortest_edge": 1024, "longest_edge": 1280 * 1024}
    server.llm = LLM(model=resolve_model("lensmith/tiny"), dtype="float32", seed=0, mm_processor_kwargs={"size": size})
    for module in (vllm_generation, vllm_client):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)

    def send(self: Any, metadata: Any, tensors: Any) -> None:
        for (name, dtype, shape), (sent, values) in zip(metadata, tensors, strict=True):
            assert (name, dtype, shape) == (sent, str(values.dtype).removeprefix("torch."), list(values.shape))
            server.llm.load_weights([(sent, values)])

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", send)


def test_a_server_gets_prompts_pictures_settings_and_weights_as_training_has_them(
    tmp_path,
    source,
    processor,
    server,
    transfer,
):
    found: list[GrpoStats] = []
    address = f"rollout.vllm_server={server.address}"
    make_trainer(tmp_path / "run", source, processor, found, "rollout.vllm_mode=server", address).train()
    assert [stats.logprob_gap is not None and stats.logprob_gap < GAP for stats in found] == [True] * STEPS
    assert ring(found) == []
    asked = [body for path, body in server.bodies if path == "/inference/v1/generate"]
    assert len(asked) == STEPS * PROMPTS
    assert all(body["sampling_params"]["n"] == GROUP for body in asked)
    assert server.seen.count("/reset_prefix_cache") == STEPS


def test_a_server_that_resizes_pictures_again_stops_the_run(
    tmp_path,
    source,
    processor,
    server,
    transfer,
):
    server.llm.processor.image_processor.size = {"shortest_edge": 64 * 1024, "longest_edge": 1280 * 1024}
    address = f"rollout.vllm_server={server.address}"
    trainer = make_trainer(tmp_path / "run", source, processor, [], "rollout.vllm_mode=server", address)
    with pytest.raises(
        RunError, match=r"cuts pictures into \[\d+\] tokens where training sees \[8\].*mm-processor-kwargs"
    ):
        trainer.train()


def test_a_server_that_does_all_that_is_needed_is_said(server, processor):
    config = config_of(server)
    check_vllm(config, CUDA, processor)
    told = vllm_sentence(config, torch.bfloat16)
    assert told.startswith(f"Completions come from vLLM on the server {server.address}; it gets the weights")
    assert "over 0.1 nats a token apart rings an alarm" in told


def test_what_a_server_lacks_is_said_with_the_command_that_has_it(server, processor):
    config = config_of(server)
    start = serve_command(config, processor)
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve lensmith/tiny" in start
    for info, reason in (
        (None, "answers 404 to"),
        ({**INFO, "weight_transfer_config": None}, "it cannot take weights while it runs"),
        ({**INFO, "model_config": {"logprobs_mode": "raw_logprobs"}}, "tells raw_logprobs, and training computes"),
    ):
        server.info = info
        with pytest.raises(ConfigError) as caught:
            check_vllm(config, CUDA, processor)
        assert reason in str(caught.value)
        assert str(caught.value).endswith(start)


def test_a_server_that_does_not_answer_is_said_before_weights_are_read(server, processor):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=r"rollout.vllm_server=http://127.*: no vLLM answers there .*Start one with"):
        check_vllm(config_of(server), CUDA, processor)


def test_weights_reach_a_server_from_a_gpu_alone(server, processor):
    with pytest.raises(
        ConfigError, match=r"training would run on the cpu here\. Train on a GPU, or set rollout.engine="
    ):
        check_vllm(config_of(server), torch.device("cpu"), processor)


def test_a_server_too_short_for_the_longest_row_says_both_lengths(server):
    server.max_model_len = 700
    train = SimpleNamespace(videos=SimpleNamespace(videos=0), tokens=torch.tensor([10, 300]))
    with pytest.raises(ConfigError, match=r"serves 700 tokens at most.*has 812\. Start it with --max-model-len 812"):
        check_vllm_room(config_of(server), train, CUDA)  # type: ignore[arg-type]


def test_without_vllm_the_run_ends_before_anything_is_loaded():
    config = read_config(None, ["task=grpo", "rollout.engine=vllm"])
    with pytest.raises(ConfigError) as caught:
        check_vllm_installed(config)
    assert str(caught.value) == (
        "rollout.engine=vllm, rollout.vllm_mode=colocate: vLLM is not installed in this environment. "
        'pip install "lensmith[vllm]", or set rollout.engine=builtin, which needs no second copy of the weights.'
    )


def test_videos_are_not_for_vllm():
    train = SimpleNamespace(videos=SimpleNamespace(videos=2), tokens=torch.tensor([10]))
    with pytest.raises(ConfigError, match=r"2 videos in data.train, and TRL hands pictures alone to vLLM"):
        check_vllm_room(read_config(None, ["task=grpo", "rollout.engine=vllm"]), train, CUDA)  # type: ignore[arg-type]


def test_a_share_of_the_gpu_in_which_vllm_does_not_fit_says_the_least_that_does():
    config = read_config(None, ["task=grpo", "rollout.engine=vllm", "model=Qwen/Qwen3-VL-8B-Instruct"])
    with pytest.raises(ConfigError, match=r"0\.3: 12\.0 of this GPU's 40\.0 GiB.* takes 16\.\d\. Set .*=0\.46 or more"):
        vllm_ready._check_share(config, longest=2000, gib=40.0)
    with pytest.raises(ConfigError, match=r"Serve it from other GPUs, or set rollout.engine=builtin"):
        vllm_ready._check_share(config, longest=2000, gib=16.0)
    vllm_ready._check_share(config, longest=2000, gib=80.0)


def test_auto_is_the_builtin_engine_and_says_so():
    told = vllm_sentence(read_config(None, ["task=grpo"]), torch.float32)
    assert told.startswith("rollout.engine=auto: Completions come from the built-in engine")
