"""Check of logits: adapter, merged and reloaded from disk say the same, and something else than the base.

The distance of two models on a prompt is the root mean square of the difference of their logits over that of the logits
themselves, around their mean; over the last KEPT_TOKENS tokens, the largest over all prompts. Merging rounds every weight
to the type it is stored in, which is what the tolerance allows for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensmith.data.encode import Encoder
from lensmith.evals.predict import answering, pad_prompts
from lensmith.export.verify.check import Check
from lensmith.export.verify.served import Served, not_asked
from lensmith.types import Encoded

KEPT_TOKENS = 16
"""The answer of most rows, and the end of the prompt before it."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""Largest distance, by the coarser of the types that the merged model is stored and computed in: about a dozen roundings of
bf16 (2^-8) and of fp16 (2^-11); in fp32 what sums in another order may come to. docs/verify.md has measured distances."""

Logits = list[Float[Tensor, "tokens vocab"]]


def read_logits(model: Any, encoder: Encoder, prompts: Sequence[Encoded]) -> Logits:
    """fp32 logits of the last KEPT_TOKENS tokens of each prompt, on the CPU, through the model's ordinary forward."""
    found = []
    with answering(model):
        for prompt in prompts:
            inputs = pad_prompts([prompt], encoder, model)
            kept = min(KEPT_TOKENS, prompt.num_tokens)
            found.append(model(**inputs, use_cache=False, logits_to_keep=kept).logits[0].float().cpu())
    return found


def distance(ours: Logits, theirs: Logits) -> float:
    """The largest over all prompts; NaN where a logit is not finite."""
    each = [
        float((a - b).square().mean().sqrt() / (b - b.mean(-1, keepdim=True)).square().mean().sqrt())
        for a, b in zip(ours, theirs, strict=True)
    ]
    return math.nan if any(math.isnan(one) for one in each) else max(each)


def check_agree(
    base: Logits,
    forms: dict[str, Logits],
    *,
    dtypes: Sequence[torch.dtype],
    prompts: str,
    remarks: Sequence[str] = (),
    served: Served | None = None,
) -> Check:
    """Hold all forms of the tuned model against the first, and the base against it.

    Args:
        forms: logits by what they came from, at least two.
        dtypes: types that any of them is stored or computed in.
        prompts: where the prompts are from.
        remarks: what else is to be told.
        served: what a server answered to the same prompts.
    """
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    (first, reference), *others = forms.items()
    apart = {name: distance(logits, reference) for name, logits in others}
    tuned = distance(base, reference)
    worst = math.nan if any(map(math.isnan, apart.values())) else max(apart.values())
    names = ", ".join(f"{name} {value:.2g}" for name, value in apart.items())
    told = f"distance from {first} on {len(reference)} prompts {prompts}: {names}, base {tuned:.2g}"
    sentences = [
        f"{name} is {value:.2g} away from {first}, more than {tolerance:g}: it is not the model that was trained. "
        "Export it again from this run."
        for name, value in apart.items()
        if not value <= tolerance
    ]
    if not tuned > tolerance:
        sentences.append(
            f"The base is only {tuned:.2g} away from {first}, within the tolerance of {tolerance:g}: the tuned model answers "
            "like the base. Train longer or with a higher learning rate, and see that the right run was exported."
        )
    if served is not None and not served.ok:
        sentences.append(served.fix)
    told = "; ".join([told, *remarks, not_asked() if served is None else served.told])
    return Check("agree", not sentences, worst, tolerance, told, " ".join(sentences))
