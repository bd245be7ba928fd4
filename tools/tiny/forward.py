"""A forward pass for batches in which all pictures have one size, over the stock model's own modules.

The stock forward is made for any mix of sizes: it attends image by image and builds masks and positions per call. With
one grid per batch all of that is constant, every tensor has a fixed shape, and the whole step can be one CUDA graph.
Same weights, same numbers: tests/unit/test_tiny_drawings.py and the end of pretrain.py compare it with stock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

MEAN = STD = 0.5
"""The processor's image_mean and image_std, equal for all channels."""


@dataclass(slots=True)
class Batch:
    """P pictures of one size, Q questions about each; every row is prefix, question, answer, padding."""

    pixels: UInt8[Tensor, "P height width 3"]
    ids: Int[Tensor, "P Q T"]
    first: Int[Tensor, "P Q"]
    """Index of the answer's first token."""
    last: Int[Tensor, "P Q"]
    """Index of the end mark after the answer."""


class GridForward:
    """The model for pictures of `width` x `height` pixels, after the prefix `<|im_start|>user\\n<|vision_start|>`."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        width: int,
        height: int,
        prefix: list[int],
        row_tokens: int,
        *,
        half: torch.dtype = torch.float32,
        layer: Callable[..., Tensor] | None = None,
    ) -> None:
        """`half` is the precision of matrix products in the decoder; `layer` a compiled `decoder_layer`."""
        self.model = model
        self.vision = model.model.visual
        self.language = model.model.language_model
        config: Any = model.config.vision_config  # transformers types it as None or a dictionary, too
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        self.rows, self.columns = height // self.patch, width // self.patch
        device = self.vision.pos_embed.weight.device
        grid = torch.tensor([[1, self.rows, self.columns]], device=device)
        self.table_index, self.table_weight = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=self.vision.num_grid_per_side,
            mode=self.vision.interpolation_mode,
            align_corners=self.vision.interpolation_align_corners,
            spatial_merge_size=self.merge,
            kwargs={},
        )
        places = get_vision_position_ids(grid, self.merge, kwargs={})
        like = torch.zeros(1, device=device)
        self.patch_rope = self.vision.rotary_pos_emb(like, places)
        num_image = self.rows * self.columns // self.merge**2
        self.image_span = slice(len(prefix), len(prefix) + num_image)
        self.prefix_ids = [*prefix, *[model.config.image_token_id] * num_image, model.config.vision_end_token_id]
        row = torch.zeros(1, row_tokens, dtype=torch.long, device=device)
        row[0, : len(self.prefix_ids)] = torch.tensor(self.prefix_ids, device=device)
        kinds = (row == model.config.image_token_id).int()
        rope_index: Callable[..., tuple[Tensor, Tensor]] = model.model.get_rope_index
        positions, _ = rope_index(row, mm_token_type_ids=kinds, image_grid_thw=grid)
        self.token_rope = self.language.rotary_emb(like, positions[-3:])
        self.half = half
        self.layer: Callable[..., Tensor] = layer or decoder_layer

    def patches(self, pixels: UInt8[Tensor, "P height width 3"]) -> Float[Tensor, "P patches values"]:
        """What the processor makes of each picture: patches in merge order; channels, frames, rows, columns in each."""
        P, m, s = len(pixels), self.merge, self.patch
        x = (pixels.float() / 255 - MEAN) / STD
        x = x.view(P, self.rows // m, m, s, self.columns // m, m, s, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        x = x.reshape(P, self.rows * self.columns, 3, 1, s * s).expand(-1, -1, -1, self.frames, -1)
        return x.reshape(P, self.rows * self.columns, -1)

    def see(self, pixels: UInt8[Tensor, "P height width 3"]) -> list[Float[Tensor, "P image_tokens width"]]:
        """The merger's output, then the deepstack mergers' in order."""
        vision, P = self.vision, len(pixels)
        weight = vision.patch_embed.proj.weight
        x = F.linear(self.patches(pixels), weight.flatten(1), vision.patch_embed.proj.bias)
        x = x + (vision.pos_embed(self.table_index) * self.table_weight[:, :, None]).sum(1)
        cos, sin = (part.unsqueeze(-2) for part in self.patch_rope)
        deep = []
        for index, block in enumerate(vision.blocks):
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).view(P, x.shape[1], 3, attn.num_heads, -1)
            q, k, v = qkv.unbind(2)
            q, k = (t * cos + stock.rotate_half(t) * sin for t in (q, k))
            seen = F.scaled_dot_product_attention(
                q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)
            )
            x = x + attn.proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            if index in vision.deepstack_visual_indexes:
                merger = vision.deepstack_merger_list[vision.deepstack_visual_indexes.index(index)]
                deep.append(merger(x.flatten(0, 1)).view(P, -1, merger.linear_fc2.out_features))
        merged = vision.merger(x.flatten(0, 1))
        return [merged.view(P, -1, merged.shape[-1]), *deep]

    def hidden(
        self, pixels: UInt8[Tensor, "P height width 3"], ids: Int[Tensor, "P Q T"]
    ) -> Float[Tensor, "rows T width"]:
        """Final hidden states of all rows; rows are pictures times questions."""
        _, Q, T = ids.shape
        span = self.image_span
        feature, *deep = (f.repeat_interleave(Q, dim=0) for f in self.see(pixels))
        x = self.language.embed_tokens(ids.flatten(0, 1))
        x = torch.cat([x[:, : span.start], feature.to(x.dtype), x[:, span.stop :]], dim=1)
        for index, layer in enumerate(self.language.layers):
            x = self.layer(
                x, *self.token_rope, *layer_weights(layer), layer.input_layernorm.variance_epsilon, self.half
            )
            if index < len(deep):
                x = x + F.pad(deep[index].to(x.dtype), (0, 0, span.start, T - span.stop))
        return self.language.norm(x)

    def losses(self, batch: Batch, answer_tokens: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean nats per answer token (end mark included), and the share of answers right if each token is given."""
        T = batch.ids.shape[-1]
        hidden = self.hidden(batch.pixels, batch.ids)
        ids, first, last = batch.ids.flatten(0, 1), batch.first.flatten(), batch.last.flatten()
        target_at = first[:, None] + torch.arange(answer_tokens, device=ids.device)
        learn: Bool[Tensor, "rows A"] = target_at <= last[:, None]
        target_at = target_at.clamp(max=T - 1)
        targets = ids.gather(1, target_at)
        asked = hidden.gather(1, (target_at - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.model.lm_head(asked).float()  # fp32: softmax over the vocabulary
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        right = ((logits.argmax(-1) == targets) | ~learn).all(1).float().mean()
        return (nats * learn).sum() / learn.sum(), right


def layer_weights(layer: stock.Qwen3VLTextDecoderLayer) -> tuple[Tensor, ...]:
    """The layer's parameters in the order in which `decoder_layer` takes them."""
    attn, mlp = layer.self_attn, layer.mlp
    modules = (
        *(layer.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj, attn.q_norm, attn.k_norm, attn.o_proj),
        *(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    return tuple(module.weight for module in modules)


def decoder_layer(
    x: Float[Tensor, "rows T width"],
    cos: Float[Tensor, "1 T head"],
    sin: Float[Tensor, "1 T head"],
    before_attention: Float[Tensor, " width"],
    query: Float[Tensor, "queries width"],
    key: Float[Tensor, "keys width"],
    value: Float[Tensor, "keys width"],
    query_norm: Float[Tensor, " head"],
    key_norm: Float[Tensor, " head"],
    out: Float[Tensor, "width queries"],
    before_mlp: Float[Tensor, " width"],
    gate: Float[Tensor, "inner width"],
    up: Float[Tensor, "inner width"],
    down: Float[Tensor, "width inner"],
    eps: float,
    half: torch.dtype,
) -> Float[Tensor, "rows T width"]:
    """Stock's decoder layer as a function of tensors only, so that one compiled copy serves all layers.

    Causal attention over the whole row: padding comes last, so nothing that is learned can see it.
    """
    head = len(query_norm)

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        wide = values.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        return (values * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]).to(half)

    n = norm(x, before_attention).to(half)
    q, k, v = (F.linear(n, weight.to(half)).unflatten(-1, (-1, head)) for weight in (query, key, value))
    q, k = rotate(norm(q, query_norm)), rotate(norm(k, key_norm))
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(seen.transpose(1, 2).flatten(2), out.to(half))
    n = norm(x, before_mlp).to(half)
    return x + F.linear(F.silu(F.linear(n, gate.to(half))) * F.linear(n, up.to(half)), down.to(half))
