"""Pretrains lensmith/tiny on drawings, in minutes on one GPU.

    python -m tools.tiny.pretrain --out OUT --minutes 4.4

Reads configuration, tokenizer and processor from --base (src/lensmith/model/tiny), starts from random weights, and
writes model.safetensors (bf16) and training.json (seed, curve, held-out scores, versions) to --out. Weights are fp32
masters under bf16 autocast; on a GPU each step is one replay of a CUDA graph per picture size, because a model this
small otherwise spends its time launching kernels.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tools.tiny.feed import ANSWER_TOKENS, PREFIX, QUESTIONS, SIZES, Pool, row_tokens
from tools.tiny.forward import Batch, GridForward, decoder_layer
from tools.tiny.muon import Muon
from tools.tiny.score import score_model
from tools.tiny.tasks import make_item
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

BASE = Path("src/lensmith/model/tiny")
BF16_SLACK = 0.02
"""Largest relative difference allowed between this forward and stock's, both in fp32 on the saved weights."""


KEEP_S = 60.0
"""Seconds between saves during training."""
MOST_SKIPPED = 20
"""Steps with a gradient that is not finite before a run is given up."""


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int = 0
    minutes: float = 4.4
    """Training time; drawing the first pictures and scoring come on top."""
    pictures: int = 192
    """Per step, each with feed.QUESTIONS questions."""
    muon_rate: float = 4e-3
    adamw_rate: float = 2e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    compile: int = 1
    """Whether torch.compile fuses the decoder layer."""
    workers: int = 14
    shard: int = 256
    capacity: int = 60_000
    """Pictures of each size held at once."""
    log_steps: int = 100
    score_items: int = 100


def rate_share(progress: float, warmup: float) -> float:
    """Linear rise, then a half cosine down to zero (Loshchilov and Hutter, arXiv:1608.03983)."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Optimizers:
    """Muon for weight matrices, AdamW for embeddings, norms and biases; one rate each, both on the same schedule."""

    def __init__(self, model: torch.nn.Module, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        named = dict(model.named_parameters())
        matrices = {
            name: p
            for name, p in named.items()
            if p.dim() > 1 and "embed_tokens" not in name and "pos_embed" not in name
        }
        # Tensors, so that a captured step reads their new values.
        self.muon_rate, self.adamw_rate = (torch.zeros((), device=device) for _ in range(2))
        self.skipped = torch.zeros((), device=device)
        """How many steps were not taken because their gradient was not finite."""
        self.muon = Muon(matrices, self.muon_rate, momentum=0.95, weight_decay=settings.weight_decay, pieces={"qkv": 3})
        cuda = device.type == "cuda"
        self.adamw = torch.optim.AdamW(
            [p for name, p in named.items() if name not in matrices],
            lr=self.adamw_rate if cuda else 0.0,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
            capturable=cuda,
        )

    def set_rates(self, share: float) -> None:
        """Sets both rates to this share of their peaks."""
        self.muon_rate.fill_(share * self.settings.muon_rate)
        self.adamw_rate.fill_(share * self.settings.adamw_rate)
        if self.adamw_rate.device.type != "cuda":  # a fused AdamW takes a tensor only where it can be captured
            self.adamw.param_groups[0]["lr"] = float(self.adamw_rate)

    def step(self) -> Float[Tensor, ""]:
        """Clips and steps; returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        usable = norm.isfinite()
        self.skipped += ~usable
        # torch's own protocol between loss scalers and fused optimizers: a step with found_inf = 1 changes nothing.
        self.adamw.found_inf = (~usable).float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.muon.step(usable)
        return norm.detach()


class Step:
    """One optimizer step on pictures of one size; one CUDA graph once captured."""

    def __init__(self, forward: GridForward, optimizers: Optimizers) -> None:
        self.forward, self.optimizers = forward, optimizers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch | None = None
        self.seen: tuple[Tensor, ...] = ()

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Loss, share of answers right, gradient norm before clipping; as tensors that the next call overwrites."""
        if self.graph is None or self.batch is None:
            return self._step(batch)
        for name in ("pixels", "ids", "first", "last"):
            getattr(self.batch, name).copy_(getattr(batch, name))
        self.graph.replay()
        return self.seen

    def _step(self, batch: Batch) -> tuple[Tensor, ...]:
        # cache_enabled=False: a cached bf16 copy of a weight must not outlive the graph that made it.
        with torch.autocast(batch.ids.device.type, torch.bfloat16, cache_enabled=False):
            loss, right = self.forward.losses(batch, ANSWER_TOKENS)
        for parameter in self.optimizers.parameters:
            parameter.grad.zero_()  # type: ignore[union-attr]
        loss.backward()
        return loss.detach(), right.detach(), self.optimizers.step()

    def capture(self, batch: Batch) -> None:
        """Makes later calls replay one CUDA graph. Takes four steps on `batch`; call it while the rate is zero."""
        self.batch = Batch(*(getattr(batch, name).clone() for name in ("pixels", "ids", "first", "last")))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate their workspaces outside of the graph
            for _ in range(3):
                self._step(self.batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.seen = self._step(self.batch)
        self.graph = graph


def train(settings: Settings, base: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """Trains from random weights for settings.minutes; leaves model.safetensors in `out`, returns the report."""
    pool = Pool(
        settings.seed,
        base / "tokenizer.json",
        device,
        workers=settings.workers,
        shard=settings.shard,
        capacity=settings.capacity,
    )
    torch.manual_seed(settings.seed)
    config: Any = AutoConfig.from_pretrained(base)
    model: Any = Qwen3VLForConditionalGeneration(config)
    model.float().to(device).train()
    optimizers = Optimizers(model, settings, device)
    prefix = AutoTokenizer.from_pretrained(base)(PREFIX).input_ids
    torch.backends.cuda.enable_cudnn_sdp(False)  # FlashAttention is the better kernel for rows of 40 tokens
    layer = torch.compile(decoder_layer, dynamic=True) if settings.compile else None
    steps = {
        size: Step(
            GridForward(model, *size, prefix, row_tokens(size, prefix), half=torch.bfloat16, layer=layer),
            optimizers,
        )
        for size in SIZES
    }
    while not pool.ready(settings.shard):
        pool.receive(wait=True)
    for size in SIZES if device.type == "cuda" else ():
        steps[size].capture(pool.batch(size, settings.pictures))
    start = time.monotonic()
    number, curve = _steps(settings, steps, pool, lambda: save(model, out))
    pool.close()
    save(model, out)
    return {
        "settings": asdict(settings),
        "steps": number,
        "pictures_drawn": sum(pool.drawn.values()),
        "questions_seen": number * settings.pictures * QUESTIONS,
        "train_s": round(time.monotonic() - start, 1),
        "curve": curve,
    }


def _steps(
    settings: Settings, steps: dict[tuple[int, int], Step], pool: Pool, keep: Callable[[], None]
) -> tuple[int, list[dict[str, float]]]:
    """Steps on random sizes until the time is up, calling `keep` every KEEP_S; their number, and the curve."""
    order = random.Random(settings.seed)
    curve: list[dict[str, float]] = []
    optimizers = steps[next(iter(SIZES))].optimizers
    sums = torch.zeros(3, device=pool.device)
    start = kept = time.monotonic()
    number = 0
    while (progress := (time.monotonic() - start) / (60 * settings.minutes)) < 1:
        pool.receive(wait=False)
        optimizers.set_rates(rate_share(progress, settings.warmup))
        size = order.choices(list(SIZES), list(SIZES.values()))[0]
        sums += torch.stack(steps[size](pool.batch(size, settings.pictures)))
        number += 1
        if number % settings.log_steps:
            continue
        loss, right, norm = (sums / settings.log_steps).tolist()
        sums.zero_()
        seconds = time.monotonic() - start
        skipped = int(optimizers.skipped)
        curve.append({"step": number, "s": round(seconds, 1), "loss": round(loss, 4), "right": round(right, 4)})
        print(
            json.dumps({**curve[-1], "norm": norm, "skipped": skipped, "drawn": sum(pool.drawn.values())}), flush=True
        )
        if skipped > MOST_SKIPPED or not math.isfinite(loss):
            raise RuntimeError(f"step {number}: loss {loss}, {skipped} steps skipped; lower the rates")
        if time.monotonic() - kept > KEEP_S:
            keep()
            kept = time.monotonic()
    return number, curve


def save(model: Qwen3VLForConditionalGeneration, out: Path) -> None:
    """Writes the weights in bf16, as plain transformers does; a stop in between leaves the last complete ones."""
    fresh = out / "new"
    rounded: Any = copy.deepcopy(model)
    rounded.to(torch.bfloat16).save_pretrained(fresh)
    (fresh / "model.safetensors").replace(out / "model.safetensors")
    shutil.rmtree(fresh)


@torch.inference_mode()
def compare_with_stock(folder: Path) -> float:
    """Largest difference between this script's logits and stock's on a few drawings, over the largest logit."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    prefix = processor.tokenizer(PREFIX).input_ids
    worst = 0.0
    for size in SIZES:
        item = make_item(0, 0, *size, 1)
        content = [{"type": "image", "image": item.image}, {"type": "text", "text": item.questions[0].text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"]
        forward = GridForward(model, *size, prefix, ids.shape[1])
        ours = model.lm_head(forward.hidden(torch.from_numpy(item.pixels.copy())[None], ids[None]))
        theirs = model(**inputs).logits
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    out, base, device = options.pop("out"), options.pop("base"), torch.device(options.pop("device"))
    settings = Settings(**options)
    out.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python -m tools.tiny.pretrain", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        **train(settings, base, out, device),
    }
    (out / "training.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    folder = out / "whole"
    shutil.copytree(base, folder, dirs_exist_ok=True)
    shutil.copy(out / "model.safetensors", folder)
    report["stock_difference"] = compare_with_stock(folder)
    report["held_out"] = score_model(folder, settings.score_items, str(device))
    shutil.rmtree(folder)
    (out / "training.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(json.dumps(report["held_out"]), f"differs from stock by {report['stock_difference']:.1e}", flush=True)
    if report["stock_difference"] > BF16_SLACK:
        raise RuntimeError(f"the training forward differs from stock by {report['stock_difference']:.3f}")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow", "numpy")}


if __name__ == "__main__":
    main()
