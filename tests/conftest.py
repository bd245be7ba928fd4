"""What all tests share: a tiny random Qwen3-VL, random samples for it, and stock modules that keep float64.

Everything is a fixture that returns a function, so that each test says what it wants and when:

    def test_something(build_tiny, build_sample, stock_loss, float64_modules):
        model = build_tiny()                                     # float64, eval-free, all parameters trainable
        sample = build_sample(images=[(3, 4)], text=[4, 9], learned=6)
        stock_loss(model, [sample]).backward()

`float64_modules` patches transformers' own modules for as long as the test module runs; a reference and its candidate
both see the patch. The tiny model has what makes Qwen3-VL hard: four layers with deepstack into the first three, three
M-RoPE sections, two KV heads for four query heads, and norms and biases that are not ones and zeros.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lensmith.model.versions import CHECKED, find_misfits, installed_versions

if TYPE_CHECKING:
    import torch

    Sample = dict[str, Any]

VOCAB_SIZE = 300
TEXT_IDS = (5, 280)
"""Half-open range of ids that stand for words; those from 290 on are special."""
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 290, 291, 292, 293
PATCH_PX, MERGE, FRAMES = 16, 2, 2
"""As in every real Qwen3-VL."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--group", default="dev", help="pyproject.toml's group of versions that the tests must run with")


def pytest_report_header(config: pytest.Config) -> str:
    return "versions: " + ", ".join(f"{name} {version}" for name, version in installed_versions(CHECKED).items())


def pytest_sessionstart(session: pytest.Session) -> None:
    """A set of versions that is not the one asked for would be tested twice and the other one never."""
    name = session.config.getoption("--group")
    pyproject = tomllib.loads((session.config.rootpath / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [line for line in pyproject["dependency-groups"][name] if isinstance(line, str)]
    for item in find_misfits(wanted, installed_versions(CHECKED)):
        raise pytest.UsageError(
            f"--group {name}: found {item.name} {item.installed}; pyproject.toml has {item.requirement}. "
            f"Run them with: make test-{name}"
        )


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(layers=4, vocab_size=300, tied=False)` -> a new Qwen3VLConfig of about 0.2 million parameters."""

    def make(*, layers: int = 4, vocab_size: int = VOCAB_SIZE, tied: bool = False) -> Any:
        from transformers import Qwen3VLConfig

        text = {
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.15,
        }
        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_heads": 2,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "in_channels": 3,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2, 3],
            "initializer_range": 0.15,
        }
        return Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
            tie_word_embeddings=tied,
        )

    return make


@pytest.fixture(scope="session")
def build_tiny(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """`build_tiny(dtype=float64, seed=0, cls=None, layers=4, vocab_size=300, tied=False)` -> a new random model.

    `cls` is the class to build, transformers' own Qwen3VLForConditionalGeneration by default: the same seed gives
    the same weights for any class with the same modules. In training mode, attention by SDPA.
    """

    def build(
        *,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        cls: type | None = None,
        layers: int = 4,
        vocab_size: int = VOCAB_SIZE,
        tied: bool = False,
    ) -> Any:
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # transformers' initialisation takes no generator
            model = (cls or Qwen3VLForConditionalGeneration)(
                tiny_config(layers=layers, vocab_size=vocab_size, tied=tied)
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.add_(0.2 * torch.randn_like(parameter))
                    elif parameter.dim() == 1:
                        parameter.copy_(0.1 * torch.randn_like(parameter))
        model = model.to(dtype or torch.float64)
        model.set_attn_implementation("sdpa")
        return model.train()

    return build


@pytest.fixture(scope="session")
def build_sample() -> Callable[..., Sample]:
    """`build_sample(images=[(3, 4)], text=[4, 9], learned=6, seed=0, dtype=float64)` -> one sample as tensors.

    `images`: height and width of each, in language tokens; `text`: lengths of the runs of words before, between and
    after them; `learned`: how many of the last tokens carry a label. Keys: input_ids [tokens], labels [tokens],
    pixel_values [patches, values] or None, image_grid_thw [images, 3] or None, mm_token_type_ids [tokens].
    """

    def build(
        *,
        images: Sequence[tuple[int, int]] = ((3, 4),),
        text: Sequence[int] = (4, 9),
        learned: int = 6,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Sample:
        import torch

        assert len(text) == len(images) + 1, "one run of words before each image and one after the last"
        assert learned <= text[-1], "only words of the last run can be learned"
        generator = torch.Generator().manual_seed(seed)

        def words(length: int) -> torch.Tensor:
            return torch.randint(*TEXT_IDS, (length,), generator=generator)

        ids, pixels, grids = [words(text[0])], [], []
        for (height, width), length in zip(images, text[1:], strict=True):
            ids.append(torch.tensor([VISION_START_ID, *[IMAGE_ID] * (height * width), VISION_END_ID]))
            ids.append(words(length))
            grid = (1, height * MERGE, width * MERGE)
            values = 3 * FRAMES * PATCH_PX**2
            pixels.append(0.5 * torch.randn(grid[1] * grid[2], values, generator=generator, dtype=torch.float64))
            grids.append(torch.tensor(grid))
        input_ids = torch.cat(ids)
        labels = torch.full_like(input_ids, -100)
        labels[-learned:] = input_ids[-learned:]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": torch.cat(pixels).to(dtype or torch.float64) if pixels else None,
            "image_grid_thw": torch.stack(grids) if grids else None,
            "mm_token_type_ids": (input_ids == IMAGE_ID).int(),
        }

    return build


@pytest.fixture(scope="session")
def stock_logits() -> Callable[..., torch.Tensor]:
    """`stock_logits(model, sample)` -> [tokens, vocab]: one sample through the model's ordinary forward."""

    def forward(model: Any, sample: Sample) -> torch.Tensor:
        import torch

        pictures = {key: sample[key] for key in ("pixel_values", "image_grid_thw") if sample[key] is not None}
        return model(
            input_ids=sample["input_ids"][None],
            attention_mask=torch.ones_like(sample["input_ids"])[None],
            mm_token_type_ids=sample["mm_token_type_ids"][None],
            use_cache=False,
            **pictures,
        ).logits[0]

    return forward


@pytest.fixture(scope="session")
def stock_loss(stock_logits: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`stock_loss(model, samples)` -> nats per learned token over all samples, each through the model on its own."""

    def loss(model: Any, samples: Sequence[Sample]) -> torch.Tensor:
        import torch.nn.functional as F

        nats = [
            F.cross_entropy(stock_logits(model, sample)[:-1], sample["labels"][1:], reduction="sum")
            for sample in samples
        ]
        return sum(nats) / sum(int((sample["labels"][1:] != -100).sum()) for sample in samples)

    return loss


@pytest.fixture(scope="module")
def float64_modules() -> Iterator[None]:
    """Stock RMSNorm and both rotary embeddings keep float64 instead of rounding through float32.

    Works on transformers 5.17 (which broadcasts positions by hand) to 5.23; `recomposition_frequencies` is the part
    that both share. Code under test must look `apply_rotary_pos_emb_vision` up in transformers' module at call time.
    """
    import torch
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

    def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(hidden)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden.dtype)

    def rotate_vision(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.unsqueeze(-2).to(query.dtype), sin.unsqueeze(-2).to(query.dtype)
        return query * cos + stock.rotate_half(query) * sin, key * cos + stock.rotate_half(key) * sin

    @torch.no_grad()
    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Text positions are [3 or 1, batch, tokens], vision positions [patches, 2].
        if isinstance(self, stock.Qwen3VLTextRotaryEmbedding):
            position_ids = position_ids.expand(3, -1, -1)
        angles = position_ids[..., None].double() * self.inv_freq.to(x.device, torch.double)
        cos, sin = (self.recomposition_frequencies(part) for part in (angles.cos(), angles.sin()))
        return cos.to(x.dtype), sin.to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock.Qwen3VLTextRMSNorm, "forward", rms_norm)
        patch.setattr(stock, "apply_rotary_pos_emb_vision", rotate_vision)
        patch.setattr(stock.Qwen3VLTextRotaryEmbedding, "forward", rotary)
        patch.setattr(stock.Qwen3VLVisionRotaryEmbedding, "forward", rotary)
        yield


@pytest.fixture(scope="session")
def processor() -> Any:
    """The Qwen3VLProcessor of lensmith/tiny: the real chat template and special tokens, a vocabulary of 2,000."""
    from transformers import AutoProcessor

    import lensmith.model

    return AutoProcessor.from_pretrained(Path(lensmith.model.__file__).parent / "tiny")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`interpreted(function, *arguments)` runs a top-level function where Triton interprets its kernels on the CPU.

    In a process of its own, because Triton decides when it is imported; it ends with the module, so that tests which count
    processes find none.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process, which inherits the variable; this one must not keep it
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
