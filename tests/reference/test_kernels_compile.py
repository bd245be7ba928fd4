"""The decoding kernels compile for an H100, here, where no GPU is: the interpreter sees neither assembly nor layouts."""

from __future__ import annotations

import pytest

H100 = ("cuda", 90, 32)


def compiled(kernel, types, constants, divisible, **options):
    """PTX and metadata. `types` by prefix of the argument's name; `divisible` names integers that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        return next((kind for start, kind in types.items() if name.startswith(start)), "i32")

    signature = {name: type_of(name) for name in kernel.arg_names}
    even = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=even)
    return triton.compile(source, target=GPUTarget(*H100), options={"enable_fp_fusion": True} | options)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_project_rows_widens_in_registers_and_multiplies_on_tensor_cores(rows, gated):
    from lensmith.model.few_rows import TILES
    from lensmith.model.few_rows_kernels import project_rows

    tile = TILES[rows]
    types = {"packed": "*u8", "scales_": "*u8", "x": "*i32", "tickets": "*i32", "alpha": "fp32"}
    types |= dict.fromkeys(("groups", "offset", "scale_map", "value_map", "parts"), "*fp32")
    types |= dict.fromkeys(("thin_width", "split_bytes"), "i32")
    types |= dict.fromkeys(("thin", "up", "residual", "out"), "*bf16")
    constants = {"ROWS": rows, "COLUMNS": tile.columns, "BLOCKS": tile.blocks, "SPLITS": 2, "RANK": 16}
    constants |= {"GATED": gated, "HAS_RESIDUAL": not gated, "COMPILED": True, "STAGES": tile.stages}
    divisible = {"width_a", "width_b", "width_c", "row_bytes", "split_bytes", "thin_width", "num_rows"}
    options = {"num_warps": tile.warps, "maxnreg": tile.registers, "enable_fp_fusion": False}
    made = compiled(project_rows, types, constants, divisible, **options)
    ptx = made.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "shfl.sync.idx.b32" in ptx
    assert "cp.async.cg.shared.global" in ptx, "packed bytes are fetched steps ahead, 16 at a time"
    # A multiprocessor has 227 KiB of shared memory for its programs.
    assert made.metadata.shared * tile.programs_per_sm <= 227 * 1024


def test_thin_rows_compiles():
    from lensmith.model.few_rows_kernels import thin_rows

    types = {"x": "*bf16", "down": "*bf16", "out": "*bf16", "parts": "*fp32", "tickets": "*i32"}
    constants = {"ROWS": 16, "WIDTH": 64, "INPUTS": 128, "SPLITS": 32, "COMPILED": True}
    assert "mma" in compiled(thin_rows, types, constants, {"num_inputs", "thin_width"}, num_warps=4).asm["ptx"]


def test_the_attention_kernels_compile():
    from lensmith.model.decode_attention_kernels import attend_parts, merge_parts, place_token

    shape = {"KV_HEADS": 8, "WIDTH": 128}
    types = {"query_stride": "i32", "prefix_lengths": "*i32", "own_lengths_stride": "i32", "own_lengths": "*i32"}
    types |= dict.fromkeys(("prefix_k", "prefix_v"), "*bf16") | {"prefix_": "i32", "scale": "fp32"}
    types |= dict.fromkeys(("own_k", "own_v"), "*bf16") | {"own_": "i32", "query": "*bf16"}
    types |= dict.fromkeys(("parts", "weights"), "*fp32")
    types = {"prefix_key": "i32", "own_key": "i32"} | types
    strides = {"query_stride", "prefix_unit", "prefix_key", "prefix_head", "own_unit", "own_key", "own_head"}
    made = compiled(attend_parts, types, shape | {"REPEATS": 4, "ROWS": 32, "KEYS": 64}, strides, num_warps=4)
    assert "mma.sync" in made.asm["ptx"]
    assert made.metadata.shared * 2 <= 227 * 1024
    types = {"parts": "*fp32", "weights": "*fp32", "out": "*bf16"}
    compiled(merge_parts, types, {"WIDTH": 128, "SPLITS": 16}, set(), num_warps=2)
    types = dict.fromkeys(("query_stride", "key_stride", "value_stride", "position_stride", "own_key"), "i32")
    types |= dict.fromkeys(("query", "key", "value", "q_weight", "k_weight", "cos", "sin", "rotated"), "*bf16")
    types |= {"own_k": "*bf16", "own_v": "*bf16", "own_": "i32", "position": "*i32", "epsilon": "fp32"}
    compiled(place_token, types, shape | {"HEADS": 32}, set(), num_warps=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (16, 8)])
def test_norm_and_rotation_of_all_heads_compile_and_move_16_bytes_at_a_time(heads, kv_heads):
    from lensmith.model.head_kernels import BLOCK, norm_rotate, norm_rotate_back

    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "WIDTH": 128, "BLOCK": BLOCK}
    strides = {"query_stride", "key_stride", "grad_query_stride", "grad_key_stride"}
    types = dict.fromkeys(strides, "i32") | {"scales": "*fp32", "q_epsilon": "fp32", "k_epsilon": "fp32"}
    types |= dict.fromkeys(("query", "key", "q_weight", "k_weight", "cos", "sin", "to_", "grad_"), "*bf16")
    for kernel in (norm_rotate, norm_rotate_back):
        ptx = compiled(kernel, types, constants, strides).asm["ptx"]
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx


def test_gated_products_and_sums_of_shared_keys_compile_and_move_16_bytes_at_a_time():
    from lensmith.model.attention_kernels import add_shared
    from lensmith.model.mlp_kernels import BLOCK, gated, gated_back

    made = [
        compiled(kernel, dict.fromkeys(("gate", "up", "out", "grad"), "*bf16"), {"BLOCK": BLOCK}, {"num_values"})
        for kernel in (gated, gated_back)
    ]
    types = dict.fromkeys(("from_", "to_"), "*bf16") | dict.fromkeys(("order", "starts"), "*i32")
    made.append(compiled(add_shared, types, {"WIDTH": 1024, "BLOCK": 1024}, {"key_stride", "value_stride"}))
    for kernel in made:
        assert "ld.global.v4" in kernel.asm["ptx"]
        assert "st.global.v4" in kernel.asm["ptx"]
