"""The Triton kernels compiled for every supported architecture, which needs no GPU: they spill nothing and fit.

With other versions of Triton than the installed one: `PYTHONPATH=<a folder with it> pytest <this file>`; what those are
known to spill is in `known_spills.py`. What is compiled are the tile shapes that the launchers choose for bfloat16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from known_spills import known_stack

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from psa_kernels.allocation.triton import allocation_kernel, row_shape  # noqa: E402
from psa_kernels.correction.triton import ROWS, add_kernel, left_out_kernel, warps_of  # noqa: E402
from psa_kernels.importance import representatives  # noqa: E402
from psa_kernels.importance import triton as importance  # noqa: E402
from psa_kernels.pool_and_attend_hopper import pool_and_clear_kernel  # noqa: E402
from psa_kernels.pyramid.triton import pool_kernel  # noqa: E402
from psa_kernels.quantise import triton as quantise  # noqa: E402
from psa_kernels.quantise import triton_channels  # noqa: E402
from psa_kernels.sparse import triton as sparse  # noqa: E402
from psa_kernels.triton_rows import must_be_told, padded_dim  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from operator_bench import naive  # noqa: E402

# Shared memory that one program may use, in bytes, and the tensor-core instruction of the architecture.
TARGETS = {
    80: (166_912, "HMMA"),
    89: (101_376, "HMMA"),
    90: (232_448, "HGMMA"),
    100: (232_448, "UTCHMMA"),
    120: (101_376, "HMMA"),
}
OTHER_TYPES = {
    "ids_ptr": "*i16",
    "counts_ptr": "*i32",
    "permutation": "*i32",
    "coarsest_ptr": "*i32",
    "lse_ptr": "*fp32",
    "only_ptr": "*i32",
    "scratch_ptr": "*u16",
    "tops_ptr": "*fp32",
    "importance_ptr": "*fp32",
    "scale": "fp32",
    "factor": "fp32",
    "prices_ptr": "*i16",
    "words_ptr": "*i32",
    **dict.fromkeys(("fractions_ptr", "energy_ptr", "spread_ptr", "centres_ptr", "outputs_ptr"), "*fp16"),
    **dict.fromkeys(("tops_ptr", "energy_tops_ptr", "spread_tops_ptr", "varied_ptr", "totals_ptr"), "*fp32"),
    **dict.fromkeys(("centre_tops_ptr", "centre_squares_ptr", "output_tops_ptr", "output_squares_ptr"), "*fp32"),
}


def compile_and_check(kernel, target, constants, options, tensor_cores=True, programs=1, types=None, stack=0):
    """Compile a kernel, and check that it fits and spills nothing, or no more than `stack` bytes."""
    names = kernel.arg_names
    known = OTHER_TYPES | (types or {})
    types = {
        name: "constexpr" if name in constants else known.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in names
    }
    # What the launcher finds out about the arguments: pointers and strides are multiples of 16.
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or "stride" in name or "width" in name]
    source = ASTSource(kernel, types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    most_shared, instruction = TARGETS[target]
    # Of what a multiprocessor has, each program takes one KiB more than it asks for.
    assert compiled.metadata.shared <= (most_shared + 1024) // programs - 1024
    usage = cuobjdump(compiled, "-res-usage")
    if stack:
        assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= stack
    else:
        check_stack(compiled, usage)
    assert int(re.search(r"REG:(\d+)", usage).group(1)) * 32 * options["num_warps"] * programs <= 65536
    if tensor_cores:
        assert re.search(rf"\b{instruction}\b", instructions(compiled))
    return compiled


def check_stack(compiled, usage):
    """Nothing is spilled; or what is known of this version of Triton, and that not where time is spent."""
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    case = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
    most, touched = known_stack(triton.__version__, case)
    assert stack <= most
    if stack:
        assert len(stack_accesses_in_products(cuobjdump(compiled, "--dump-sass"))) <= touched


def stack_accesses_in_products(sass):
    """Accesses to the stack in the innermost loops that multiply on tensor cores: from a branch's target back to it."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    loops = []
    for place, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.* `?\(?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) in places and int(target.group(1), 16) < int(address, 16):
            loop = range(places[int(target.group(1), 16)], place)
            # Longer ones jump back from code that was moved out of the way, or go over whole items.
            if len(loop) < 1000 and any("MMA" in lines[at][1] for at in loop):
                loops.append(loop)
    innermost = [loop for loop in loops if not any(other != loop and set(other) <= set(loop) for other in loops)]
    return [lines[at][1] for loop in innermost for at in loop if re.search(r"\b(STL|LDL)\b", lines[at][1])]


def cuobjdump(compiled, option):
    return tool("cuobjdump", compiled, option)


def instructions(compiled):
    """The machine code without the places of branches, which is had in less time."""
    return tool("nvdisasm", compiled, "--print-code", "--no-dataflow")


def tool(name, compiled, *options):
    """What a tool says of a kernel. It stands beside the kernel in Triton's cache, for a disassembler starts slowly."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        pytest.skip(f"this build of triton has no {name}")
    cache, kernel = triton.runtime.cache.get_cache_manager(compiled.hash), compiled.metadata.name
    kept = f"{kernel}.{name}{''.join(options)}.txt"
    if not cache.has_file(kept):
        command = [path, *options, cache.get_file(f"{kernel}.cubin")]
        cache.put(subprocess.run(command, capture_output=True, text=True, check=True).stdout, kept)
    return Path(cache.get_file(kept)).read_text()


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_access_to_the_stack_in_a_loop_that_multiplies_is_seen(place):
    """The inner loop goes from the third instruction to the fifth, the outer one begins with the second."""
    texts = ["MOV R1, R2", "IADD3 R3, R3, 1", "HGMMA.64x128x16.F32.BF16 R24, R4", "NOP", "@P0 BRA 0x20", "@P1 BRA 0x10"]
    texts[place] = "LDL.LU R2, [R1]"
    sass = "\n".join(f"        /*{16 * number:04x}*/    {text} ;" for number, text in enumerate(texts))
    assert bool(stack_accesses_in_products(sass)) is (place == 3)


@pytest.mark.parametrize(
    ("head_dim", "permuted", "group"),
    [*((head_dim, permuted, 1) for head_dim in (64, 96, 128) for permuted in (False, True)), (128, False, 7)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, head_dim, permuted, group):
    tile = sparse.tile_shape(divmod(target, 10), head_dim, 2, 128)
    warps = tile.pop("num_warps")
    constants = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": 64 if head_dim == 64 else 128,
        "BLOCK_QUERY": 128,
        "BLOCK_KEY": 64,
        "FACTORS": (1, 2, 4),
        "LISTED": 3,
        "NEGATIVE_SCALE": False,
        "PERMUTED": permuted,
        "STORE_LSE": False,
        "WIDE": False,
        "ONLY": False,
        "lse_ptr": None,
        "FLAGS": 64,
        "only_ptr": None,
        "LATE_SUM": target // 10 in sparse.LATE_SUM,
        "GROUP": group,
        "ALIGNED": must_be_told(2, head_dim),
        **tile,
        **({} if permuted else {"permutation": None}),
    }
    compile_and_check(sparse.attention_kernel, target, constants, {"num_warps": warps})


@pytest.mark.parametrize(
    ("columns", "statistic", "group"),
    [*((columns, statistic, 1) for columns in (4, 8, 16, 32) for statistic in ("max", "mean")), (8, "max", 7)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_importance(target, columns, statistic, group):
    tile = importance.tile_shape(divmod(target, 10), 128, 2, columns)
    options = {name: tile.pop(name) for name in ("num_warps", "maxnreg")}
    programs = tile.pop("programs")
    constants = {
        "PADDED_DIM": 128,
        "SAMPLES": 16,
        "COLUMNS": columns,
        "LARGEST": statistic == "max",
        "NEGATIVE_SCALE": False,
        "WARPS": options["num_warps"],
        "READ": importance.READ,
        "GROUP": group,
        **tile,
    }
    compile_and_check(importance.importance_kernel, target, constants, options, programs=programs)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("target", TARGETS)
def test_representatives(target, count):
    constants = {
        "HEAD_DIM": 128,
        "PADDED_DIM": 128,
        "COUNT": count,
        "TILE": 64,
        "SIZES": (2, 1, 4, 1, 2, 4),
        "STRIDES": (1, 2, 16, 2, 8, 4),
        "PERMUTED": True,
        "WIDE": False,
        "CHUNK": representatives.CHUNK,
    }
    compile_and_check(representatives.tile_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)
    both = {name: constants.pop(name) for name in ("COUNT", "TILE", "SIZES", "STRIDES")}
    constants |= {f"{which}_{name}": value for which in ("QUERY", "KEY") for name, value in both.items()}
    ones = ("batch", "query_heads", "key_heads", "query_chunks", "key_chunks")
    # With one sample and head the launcher makes constants of these.
    constants |= dict.fromkeys(ones, 1) if target == 90 and count == 1 else {}
    compile_and_check(representatives.tiles_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)


@pytest.mark.parametrize("factors", [(1,), (2, 64)], ids=str)
def test_branches_that_the_interpreter_does_not_compile(factors):
    """Types must agree in every branch; scalars that equal 1 are compiled as constants."""
    ones = ("heads", "video_queries", "video_keys", "list_width", "pyramid_rows", "text_before", "text_keys")
    constants = {
        "HEAD_DIM": 40,
        "PADDED_DIM": 64,
        "BLOCK_QUERY": 128,
        "BLOCK_KEY": 64,
        "FACTORS": factors,
        "LISTED": 1,
        "NEGATIVE_SCALE": True,
        "PERMUTED": True,
        "STORE_LSE": True,
        "WIDE": True,
        "ONLY": True,
        "LATE_SUM": True,
        "GROUP": 1,
        "ALIGNED": False,
        "FLAGS": 64,
        "TILE_M": 64,
        "TILE_N": 32,
        "STAGES": 2,
        **dict.fromkeys(ones, 1),
    }
    compile_and_check(sparse.attention_kernel, 90, constants, {"num_warps": 4})


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_pyramid(target, values):
    constants = {
        "HEAD_DIM": 128,
        "PADDED_DIM": 128,
        "FACTORS": (2, 4),
        "GROUPS": 16,
        "CAP": True,
        "BLOCK_KEY": 64,
        "LEVELS": (1, 2, 4),
        "THRESHOLDS": (0.7, 0.65),
        "PERMUTED": True,
        "WIDE": False,
        "VALUES": values,
    }
    compile_and_check(pool_kernel, target, constants, {"num_warps": 4}, tensor_cores=False)
    if values and target == 90:
        constants |= {"CAP": False, "coarsest_ptr": None, "FACTORS": (1, 2, 4)}
        types = {"counters_ptr": "*i32"}
        compile_and_check(pool_and_clear_kernel, target, constants, {"num_warps": 4}, tensor_cores=False, types=types)


@pytest.mark.parametrize(
    ("head_dim", "ones", "group"),
    [(64, False, 1), (64, True, 1), (128, False, 1), (128, True, 1), (128, False, 7)],
    ids=str,
)
def test_quantise(head_dim, ones, group):
    """For Hopper, where several programs share a multiprocessor."""
    floats = ("partial_ptr", "means_ptr", "rotated_means_ptr", "largest_ptr", "key_largest_ptr", "factors_ptr")
    types = {**dict.fromkeys(floats, "*fp32"), "out_ptr": "*i8"}
    runs = {"RUN": quantise.RUN, "ROWS": quantise.ROWS}
    for kernel, constants, warps, programs, multiplies in (
        (triton_channels.matrices_kernel, {"ROWS": triton_channels.ROWS}, 8, 1, False),
        (quantise.statistics_kernel, {"CHUNK": quantise.CHUNK, "ROWS": quantise.ROWS}, 8, 2, True),
        (quantise.summary_kernel, {"CHUNKS": quantise.FEW_CHUNKS}, 4, 1, False),
        (quantise.keys_kernel, runs, 4, 3, True),
        (quantise.queries_kernel, runs, 4, 3, True),
    ):
        constants = {"HEAD_DIM": head_dim, **constants}
        if "GROUP" in kernel.arg_names:
            constants["GROUP"] = group
        if ones:
            names = ("heads", "rows", "tokens", "query_tokens", "key_tokens", "chunks", "first_chunk")
            constants |= {name: 1 for name in names if name in kernel.arg_names}
        options = {"num_warps": warps} | ({"num_stages": 2} if warps == 4 and multiplies else {})
        compile_and_check(kernel, 90, constants, options, multiplies, programs, types)


@pytest.mark.parametrize("key_blocks", [591, 1182, 4725])
@pytest.mark.parametrize("rule", ["count", "mass"])
@pytest.mark.parametrize("target", TARGETS)
def test_allocation(target, rule, key_blocks):
    row = row_shape(key_blocks, rule == "mass")
    options = {"num_warps": row.pop("num_warps")}
    constants = {
        "ENDS": (107, 178, 320),
        "FLOOR": 0,
        "THRESHOLDS": (0.09, 0.15, 0.27),
        "MASS": rule == "mass",
        "CAP": True,
        **row,
    }
    compile_and_check(allocation_kernel, target, constants, options, tensor_cores=False)


def test_allocation_without_finest_blocks():
    # psa-2 leaves its first two levels empty; the compiler must not fold what is known of them into nothing.
    row = row_shape(81, False)
    options = {"num_warps": row.pop("num_warps")}
    constants = {"ENDS": (0, 0, 81), "FLOOR": 0, "THRESHOLDS": (0.0, 0.0, 1.0), "MASS": False, "CAP": False, **row}
    compile_and_check(allocation_kernel, 90, constants, options, tensor_cores=False)


@pytest.mark.parametrize("tuning", [naive.TUNINGS[0], naive.TUNINGS[-1]], ids=str)
def test_the_naive_peer_of_the_benchmark(tuning):
    constants = {
        "HEAD_DIM": 128,
        "BLOCK_QUERY": 128,
        "BLOCK_KEY": 64,
        "FACTORS": (1, 2, 4),
        "WIDE": False,
        "LATE_SUM": True,
        "TILE_M": tuning.queries,
        "STAGES": tuning.stages,
    }
    compile_and_check(naive.naive_kernel, 90, constants, {"num_warps": tuning.warps})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [left_out_kernel, add_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_corrections(target, kernel, head_dim):
    half = head_dim // 2
    constants = {"HEAD_DIM": head_dim, "HALF": half, "PADDED_HALF": padded_dim(half), "ROWS": ROWS, "WIDE": True}
    types = {"pairs_ptr": "*u8", "units_ptr": "*fp32", "weights_ptr": "*fp32"}
    options = {"num_warps": warps_of(padded_dim(half))}
    compiled = compile_and_check(kernel, target, constants, options, tensor_cores=False, types=types)
    # Nothing is read or written number by number.
    assert not re.search(r"\b(LDG|STG)\.[\w.]*\b[US](8|16)\b", instructions(compiled))
