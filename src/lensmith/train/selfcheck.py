"""Before the first step: the first packs again, one sample at a time, through transformers' own forward.

What packing and prefix sharing may never change is the log-probability of a learned token. The tests show it on tiny
models in float64; this shows it on the weights, kernels and data of the run at hand. It stops the run on a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lensmith.data.pack import pack_samples
from lensmith.errors import RunError
from lensmith.evals.predict import media_types, picture_inputs
from lensmith.types import IGNORE, Encoded, VisionGeometry, counted

MOST_SAMPLES = 32
"""Of each pack so many samples are replayed, evenly drawn: a wrong mask shows in any of them, and small samples come by
the hundred."""

TOLERANCE_NATS = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Largest mean absolute difference of a sample's token log-probabilities. In 16 bits both sides are rounded on their way
through dozens of layers, each about as far from the truth (docs/log.md); a wrong mask or position costs whole nats."""


@dataclass(frozen=True, slots=True)
class PackCheck:
    """How far packs were from their samples one by one."""

    packs: int
    samples: int
    tokens: int
    worst_nats: float
    """Largest mean absolute difference of a sample's token log-probabilities."""
    tolerance_nats: float

    def sentence(self) -> str:
        return (
            f"Self-check: {counted(self.packs, 'pack')} against {counted(self.samples, 'sample')} of theirs one by one, "
            f"{counted(self.tokens, 'learned token')}: log-probabilities agree within {self.worst_nats:.2g} nats "
            f"(limit {self.tolerance_nats:g})."
        )


@torch.no_grad()
def check_packs(
    model: nn.Module,
    packs: Sequence[Sequence[Encoded]],
    geometry: VisionGeometry,
    *,
    image_token_id: int,
    video_token_id: int,
    share_prefix: bool,
) -> PackCheck:
    """Replay `packs` sample by sample. Raises RunError where a sample differs by more than the tolerance of the dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance, worst, tokens, count, training = TOLERANCE_NATS[dtype], 0.0, 0, 0, model.training
    model.eval()
    for samples in packs:
        pack = pack_samples(
            samples,
            geometry,
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            share_prefix=share_prefix,
        )
        by_where = {sample.where: sample for sample in samples}
        together = model(pack=pack)
        ordered = [by_where[where] for where in pack.wheres]
        replayed = list(zip(ordered, together.split([s.num_learned for s in ordered]), strict=True))
        replayed = replayed[:: -(-len(replayed) // MOST_SAMPLES)]
        count += len(replayed)
        for sample, ours in replayed:
            alone = _stock_logprobs(model, sample, geometry, image_token_id, video_token_id)
            difference = float((ours - alone).abs().mean())
            worst, tokens = max(worst, difference), tokens + len(alone)
            if not difference <= tolerance:
                raise RunError(
                    f"{sample.where}: in a pack of {len(samples)} samples its token log-probabilities differ by "
                    f"{difference:.3g} nats on average from the sample alone; the limit in {dtype} is {tolerance:g}. "
                    "Training on would be wrong. Set pack.share_prefix=false; if it still stops, pack.together=false. "
                    "Please report this with the output of `lensmith env`."
                )
    model.train(training)
    return PackCheck(len(packs), count, tokens, worst, tolerance)


def _stock_logprobs(
    model: Any, sample: Encoded, geometry: VisionGeometry, image_token_id: int, video_token_id: int
) -> Float[Tensor, " learned"]:
    device = next(model.parameters()).device
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None].to(device)
    learned = torch.from_numpy(np.flatnonzero(sample.labels != IGNORE)).to(device)
    types = media_types(sample.input_ids, image_token_id, video_token_id)
    pictures = {name: tensor.to(device) for name, tensor in picture_inputs(sample.images, geometry).items()}
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=torch.from_numpy(types)[None].to(device),
        logits_to_keep=learned - 1,
        use_cache=False,
        **pictures,
    ).logits[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, ids[0, learned, None])[:, 0]
