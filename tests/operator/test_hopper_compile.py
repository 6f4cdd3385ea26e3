"""The attention kernel for Hopper compiled without a GPU: it fits, and its loops do what they were written for."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import check_stack, cuobjdump  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from psa_kernels.limits import MAX_HOPPER_LEVELS  # noqa: E402
from psa_kernels.sparse.hopper.kernel import attention_kernel  # noqa: E402
from psa_kernels.sparse.hopper.launch import pipeline  # noqa: E402
from psa_kernels.sparse.hopper.tiles import panel_columns, tile_layout  # noqa: E402

TYPES = {"scale": "fp32", "lse_ptr": "*fp32", "ids_ptr": "*i16", "factors_ptr": "*fp32"}
POINTERS_TO_INTS = ("counts_ptr", "permutation", "counter_ptr", "redo_ptr")
CASES = [
    # head_dim, block_key, levels, dtype, further constants
    (128, 64, (1, 2, 4), "bf16", {"IN_STEP": True}),
    (64, 64, (1, 2, 4), "bf16", {"TEXT": True}),
    (128, 128, (1, 2, 4, 8), "fp16", {"PERMUTED": True, "STORE_LSE": True}),
    (128, 64, (1, 2, 4), "fp16", {}),
    (128, 64, (1, 2, 4), "bf16", {"GROUP": 7}),
    (128, 32, (2, 4), "bf16", {"BLOCK_QUERY": 256, "STORE_LSE": True}),
    (128, 64, (1, 2, 4), "bf16", {"GROUP": 7, "CAUSAL": True, "IN_STEP": True}),
    (128, 32, (2, 4), "bf16", {"GROUP": 7, "CAUSAL": True, "TEXT": True}),
    (128, 128, (1, 2, 4, 8), "fp16", {"GROUP": 4, "CAUSAL": True}),
    (64, 64, (1, 2, 4), "bf16", {"GROUP": 3, "CAUSAL": True}),
]
INT8_CASES = [
    (128, 64, (1, 2, 4), {}),
    (64, 32, (1, 2, 4), {"TEXT": True}),
    (128, 128, (1, 2, 4, 8, 16), {"TEXT": True, "PERMUTED": True, "STORE_LSE": True}),
]


def compile_kernel(head_dim, block_key, levels, dtype, constants, int8=False):
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_QUERY": 128,
        "BLOCK_KEY": block_key,
        "FACTORS": levels,
        "TEXT": False,
        "PERMUTED": False,
        "STORE_LSE": False,
        "ONLINE": dtype == "fp16",
        "IN_STEP": False,
        "GROUP": 1,
        "CAUSAL": False,
        **pipeline(head_dim),
        **constants,
    }
    boxes = {f"{x}_{i}": block_key // factor for x in "kv" for i, factor in enumerate(levels)}
    if constants["TEXT"]:
        boxes |= {f"{x}_text_{side}": block_key for x in "kv" for side in ("before", "after")}
    if constants["CAUSAL"]:
        boxes |= {f"{x}_text_after": block_key for x in "kv"}
    else:
        constants |= dict.fromkeys(("lead", "shift"))
    absent = [f"{x}_{i}" for x in "kv" for i in [*range(MAX_HOPPER_LEVELS), "text_before", "text_after"]]
    constants |= {name: None for name in absent if name not in boxes}
    if not int8:
        constants["factors_ptr"] = None
    types = {}
    for name in attention_kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in boxes:
            type_, bits = ("i8", 8) if int8 and name.startswith("k") else (dtype, 16)
            box = f"1, 1, {boxes[name]}, {panel_columns(head_dim, bits)}"
            types[name] = f"tensordesc<{type_}[{box}],{tile_layout(head_dim, bits, 4)!r}>"
        elif int8 and name == "q_ptr":
            types[name] = "*i8"
        elif name in POINTERS_TO_INTS:
            types[name] = "*i32"
        else:
            types[name] = TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
    aligned = [i for i, type_ in enumerate(types.values()) if type_.startswith("*")]
    source = GluonASTSource(
        attention_kernel, types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def loops_over_tiles(sass):
    """Instructions of each innermost loop that multiplies: from the target of a branch back to the branch."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    found = []
    for place, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) in places and int(target.group(1), 16) < int(address, 16):
            body = [line for _, line in lines[places[int(target.group(1), 16)] : place]]
            # Products with keys, HGMMA or IGMMA, and with values: what else multiplies only ends items.
            if len(body) < 700 and sum("GMMA" in line for line in body) > 8 and "MUFU.EX2" in "".join(body):
                found.append(body)
    return found


@pytest.mark.parametrize(("head_dim", "block_key", "levels", "dtype", "constants"), CASES, ids=str)
def test_kernel_fits_and_overlaps(head_dim, block_key, levels, dtype, constants):
    compiled = compile_kernel(head_dim, block_key, levels, dtype, constants)
    assert compiled.metadata.shared <= 232_448
    usage = cuobjdump(compiled, "-res-usage")
    assert int(re.search(r"REG:(\d+)", usage).group(1)) == 168  # times 12 warps: all registers there are
    if not constants.get("PERMUTED"):
        check_stack(compiled, usage)
    sass = cuobjdump(compiled, "--dump-sass")
    loops = loops_over_tiles(sass)
    assert len(loops) == 2  # one for each warpgroup that computes
    for body in loops:
        instructions = [re.sub(r"^@!?U?P\d+ ", "", line).split()[0] for line in body]
        assert not [name for name in instructions if name.startswith(("STL", "LDL"))]
        assert sum(name.startswith("HGMMA") for name in instructions) == head_dim // 16 + 128 // 16
        exponentials = [place for place, name in enumerate(instructions) if name == "MUFU.EX2"]
        assert len(exponentials) == 64 + (2 if dtype == "fp16" else 0)
        # Rows are summed up across threads once, after all tiles; only a running maximum needs them to exchange more.
        assert ("SHFL.BFLY" in instructions) is (dtype == "fp16")
        # The last wait for a product comes after the exponentials, so that the tensor cores run meanwhile.
        waits = [place for place, name in enumerate(instructions) if name.startswith("WARPGROUP.DEPBAR")]
        assert waits and waits[-1] > exponentials[-1]
    assert len(re.findall("UTMALDG", sass)) > 0
    assert len(re.findall("LDGSTS.E.BYPASS.128", sass)) == 128 * head_dim * 2 // (32 * 16)


@pytest.mark.parametrize(("head_dim", "block_key", "levels", "constants"), INT8_CASES, ids=str)
def test_kernel_multiplies_integers(head_dim, block_key, levels, constants):
    compiled = compile_kernel(head_dim, block_key, levels, "bf16", constants, int8=True)
    assert compiled.metadata.shared <= 232_448
    usage = cuobjdump(compiled, "-res-usage")
    assert int(re.search(r"REG:(\d+)", usage).group(1)) == 168
    if not constants.get("PERMUTED"):
        check_stack(compiled, usage)
    sass = cuobjdump(compiled, "--dump-sass")
    loops = loops_over_tiles(sass)
    assert len(loops) == 2
    for body in loops:
        instructions = [re.sub(r"^@!?U?P\d+ ", "", line).split()[0] for line in body]
        assert not [name for name in instructions if name.startswith(("STL", "LDL"))]
        # 32 entries at a time instead of 16.
        assert sum(name.startswith("IGMMA.64x128x32.S8.S8") for name in instructions) == head_dim // 32
        assert sum(name.startswith("HGMMA") for name in instructions) == 128 // 16
        exponentials = [place for place, name in enumerate(instructions) if name == "MUFU.EX2"]
        assert len(exponentials) == 64 and "SHFL.BFLY" not in instructions
        # One conversion an entry, the cheap kind; weights go to the next product without leaving their thread.
        assert sum(name == "I2FP.F32.S32" for name in instructions) == 64
        assert not [name for name in instructions if name.startswith(("I2F.", "STS", "STSM"))]
        waits = [place for place, name in enumerate(instructions) if name.startswith("WARPGROUP.DEPBAR")]
        assert waits and waits[-1] > exponentials[-1]
    assert len(re.findall("LDGSTS.E.BYPASS.128", sass)) == 128 * head_dim // (32 * 16)
