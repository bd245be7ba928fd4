"""4-bit storage of the frozen decoder: which modules, which not, and a check that bitsandbytes did as it was told.

transformers' own default keeps only `lm_head` and quantises the image tower and its mergers; giving it
`["model.visual"]` instead drops that default and quantises an untied head. So both are named, and afterwards looked at.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lensmith.config.tree import Tune
from lensmith.errors import ModelError
from lensmith.model.components import COMPONENTS, component_of, plain_name
from lensmith.types import Component

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig

VISION_MODULE = "model.visual"
"""Image tower and mergers. A bare `visual` would match nothing: the pattern starts at the front of the name."""
HEAD_MODULE = "lm_head"

BITS = {"qlora": 4, "lora_8bit": 8}
"""tune.method to the bits of a decoder weight, where these are few."""

FEW_BIT_WORDS = 8192
"""Words of a head in few bits that are widened together: 64 MiB at 8B."""


def quantisation(tune: Tune, config: PreTrainedConfig, *, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How to load the model: NF4 with double quantisation for qlora, int8 for lora_8bit, None to load it as it is.

    `config` is the model's own; a checkpoint that is stored in 4 bits already is loaded as it is. `dtype` is what
    4-bit weights are widened to for each product. NF4 and double quantisation: arXiv:2305.14314, section 3; int8 with
    a scale per output and outliers in 16 bits: arXiv:2208.07339.
    """
    if tune.method not in BITS or is_quantised_checkpoint(config):
        return None
    from transformers import BitsAndBytesConfig

    skipped = [HEAD_MODULE] if tune.quantise_vision else [VISION_MODULE, HEAD_MODULE]
    if tune.method == "lora_8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )
    assert quant.bnb_4bit_compute_dtype is dtype, "transformers ignored our compute dtype"
    return quant


def is_quantised_checkpoint(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint on disk is stored in 4 bits.

    Raises ModelError if it is stored in another way that cannot be trained.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        raise ModelError(
            f"model={config.name_or_path}: stored as {stored.get('quant_method')}, and only bitsandbytes 4-bit or "
            "unquantised weights can be trained. Use the 16-bit checkpoint; tune.method=qlora stores it in 4 bits."
        )
    return True


def quantised_linears(model: nn.Module) -> dict[Component, tuple[int, int]]:
    """For each component: how many of its linears are stored in 4 or 8 bits, and how many linears it has.

    The linears of an adapter do not count.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    counts: dict[Component, tuple[int, int]] = dict.fromkeys(COMPONENTS, (0, 0))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            component = component_of(plain_name(name))
            stored, linears = counts[component]
            counts[component] = (stored + isinstance(module, Linear4bit | Linear8bitLt), linears + 1)
    return counts


def check_quantised(model: nn.Module, tune: Tune) -> None:
    """Raises ModelError unless exactly the intended components are in few bits; right after loading for such a method.

    Not for ready-made 4-bit checkpoints, whose makers chose otherwise.
    """
    wanted = {"language", "vision", "merger"} if tune.quantise_vision else {"language"}
    if tune.method not in BITS:
        wanted = set()
    for component, (stored, linears) in quantised_linears(model).items():
        if stored != (linears if component in wanted else 0):
            raise ModelError(
                f"{tune.method}: {stored} of {linears} linears of {component} are stored in few bits where "
                f"{'all' if component in wanted else 'none'} should be; a different transformers or bitsandbytes may "
                "name modules differently. Run `lensmith env`, and please report this with its output."
            )


def is_four_bit(linear: nn.Module) -> bool:
    """Whether a linear's weight is stored in 4 bits."""
    return hasattr(linear.weight, "quant_state")


_dense: dict[torch.device, torch.Tensor] = {}
"""On each GPU the one buffer that 4-bit weights are widened into, as large as the largest of them: 96 MiB at 8B."""
_places: dict[tuple[Any, ...], torch.Tensor] = {}
"""The front of that buffer as a matrix, by device, shape and type."""


def dense_weight(linear: Any, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
    """The weight of a linear as a matrix in `dtype`. That of a 4-bit one is good until the next call: use it at once."""
    weight = linear._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    # Asked of the scales, which are a plain tensor: called twenty times per layer and step, what bitsandbytes' own class
    # takes to answer is felt.
    device = state.absmax.device
    if device.type != "cuda":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state).to(dtype)
    out = _places.get((device, state.shape, state.dtype))
    if out is None:
        out = _make_place(device, state)
    if _kernel_reads(state):
        from lensmith.model.nf4 import widen

        widen(weight, state, out)
    else:
        from bitsandbytes.functional import dequantize_4bit

        dequantize_4bit(weight.data, state, out=out)
    return out if state.dtype is dtype else out.to(dtype)


def give_buffer_back() -> None:
    """Let go of the memory that 4-bit weights are widened into. It is as large as the largest so far, and a smaller model that
    comes after would be charged for it."""
    _dense.clear()
    _places.clear()


def _make_place(device: torch.device, state: Any) -> Tensor:
    size, buffer = math.prod(state.shape) * state.dtype.itemsize, _dense.get(device)
    if buffer is None or buffer.nbytes < size:
        _places.clear()  # they would keep the smaller buffer
        with torch.inference_mode(mode=False):  # it is written to in training too
            buffer = _dense[device] = torch.empty(size, dtype=torch.uint8, device=device)
    place = buffer[:size].view(state.dtype).view(state.shape)
    _places[device, state.shape, state.dtype] = place
    return place


@cache
def has_triton() -> bool:
    """Whether Triton's compiler is here (Linux; with torch's CUDA builds)."""
    return importlib.util.find_spec("triton") is not None


def _kernel_reads(state: Any) -> bool:
    if not has_triton():
        return False
    from lensmith.model.nf4 import can_widen

    return can_widen(state)


def settle_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every 4-bit linear compute in `dtype` and the same in training as in evaluation. Right after loading.

    A ready-made checkpoint brings its maker's compute type (bf16, as a rule) also to cards without it. And on a CPU
    with AVX512-BF16, bitsandbytes 0.50 repacks the weights in place at the first forward in eval mode: their scales are
    rounded to bf16, so the model evaluated is another than the one trained, and widths that are no multiple of 64 fail.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False


class FewBitHead(nn.Module):
    """A frozen language head stored in 8 or 4 bits and widened piece by piece.

    8 bits: bitsandbytes' dynamic map over blocks of 256 (arXiv:2110.02861); 4 bits: NF4 over blocks of 64. Errors of the
    log-probabilities are measured in docs/memory.md.
    """

    def __init__(self, weight: Float[Tensor, "vocab width"], bits: Literal[8, 4]) -> None:
        super().__init__()
        self.shape, self.dtype, self.bits = weight.shape, weight.dtype, bits
        self.stored = [self._store(piece) for piece in weight.split(FEW_BIT_WORDS)]

    @property
    def num_words(self) -> int:
        return self.shape[0]

    def _store(self, piece: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        if self.bits == 4:
            return quantize_4bit(piece.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        return quantize_blockwise(piece.contiguous(), blocksize=256)

    def pieces(self, words: int) -> Iterator[tuple[int, Float[Tensor, "words width"]]]:
        """See `HeadWeight`; never more than FEW_BIT_WORDS words."""
        from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

        widen = dequantize_4bit if self.bits == 4 else dequantize_blockwise
        for number, (values, state) in enumerate(self.stored):
            piece = widen(values, state).to(self.dtype)
            for start in range(0, len(piece), words):
                yield number * FEW_BIT_WORDS + start, piece[start : start + words]

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        return torch.cat([hidden @ piece.T for _, piece in self.pieces(FEW_BIT_WORDS)], dim=-1)
