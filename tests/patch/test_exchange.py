"""Copies into the memory of other ranks, against collectives; without GPUs that memory is files."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.multiprocessing
from diffusers import ContextParallelConfig

from psa_diffusers.patch import text_padding
from psa_diffusers.patch.parallel import pitched_copy
from psa_diffusers.patch.parallel.local_copy import copy_within
from psa_diffusers.patch.parallel.pitched_copy import copy_rows, has_whole_rows
from psa_diffusers.patch.text_padding import attend_real_text
from psa_kernels import AttentionSpec
from psa_testing import exchange_ranks, parallel_ranks
from psa_testing.families import PARALLEL


@pytest.mark.parametrize("ranks", [2, 3])
def test_copies_equal_collectives(on_ranks, tmp_path, ranks):
    on_ranks(ranks, exchange_ranks.equal_collectives, "cpu", str(tmp_path))


def test_where_copies_do_not_arrive_collectives_are_used(on_ranks, tmp_path):
    on_ranks(2, exchange_ranks.fall_back, str(tmp_path))


# Without text, with text after the video and before it, and with numbers of tokens that differ. An older diffusers
# lacks the last one.
MODELS = [name for name in ("wan", "hunyuan-video", "cogvideox-5b", "minimax-h3") if name in PARALLEL]


@pytest.mark.parametrize(("name", "run"), [*((name, -1) for name in MODELS), ("wan", 0)])
def test_pipelines_equal_one_process(on_ranks, tmp_path, name, run):
    """With one head a rank, and with two, whose outputs travel one after the other."""
    run = PARALLEL[name].runs[run]
    if run.any_length and not hasattr(ContextParallelConfig, "ulysses_anything"):
        pytest.skip("this diffusers has no ulysses_anything")
    check = parallel_ranks.equals_one_process
    on_ranks(run.count, exchange_ranks.through_files, str(tmp_path), check, name, run.inputs, run.first, run.config)


@pytest.mark.parametrize("dense_too", [False, True])
def test_outputs_that_are_computed_again_are_read_only_then(on_ranks, tmp_path, dense_too):
    on_ranks(2, exchange_ranks.through_files, str(tmp_path), parallel_ranks.spoiled_heads, dense_too)


def test_compiled_blocks(on_ranks, tmp_path):
    check = parallel_ranks.compiled_blocks
    on_ranks(2, exchange_ranks.through_files, str(tmp_path), check, "hunyuan-video")


@pytest.mark.skipif(
    not hasattr(ContextParallelConfig, "ulysses_anything"), reason="this diffusers has no ulysses_anything"
)
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this PyTorch cannot leave out compiled forwards")
def test_forwards_that_were_compiled_before_they_are_shared(on_ranks, tmp_path):
    uneven = next(run for run in PARALLEL["minimax-h3"].runs if run.any_length)
    check = parallel_ranks.forwards_compiled_before
    on_ranks(2, exchange_ranks.through_files, str(tmp_path), check, "minimax-h3", uneven.inputs)


class Stream:
    cuda_stream = 7


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 1, 3, 8), (3, 4, 1, 8), (1, 4, 2, 1), (2, 0, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_copied_as_the_driver_is_told(monkeypatch, shape, dtype):
    """The driver is replaced by one that moves the bytes that it is told to."""
    calls = []

    def driver(pointer, stream):
        said = ctypes.cast(pointer, ctypes.POINTER(pitched_copy._Copy2D)).contents
        calls.append(stream.value)
        for row in range(said.height):
            ctypes.memmove(said.dst + row * said.dst_pitch, said.src + row * said.src_pitch, said.width)
        return 0

    monkeypatch.setattr(pitched_copy, "_driver", lambda: driver)
    batch, tokens, heads, width = shape
    wide = torch.randn(batch, tokens + 2, heads + 3, width).to(dtype)
    x = wide[:, 1 : tokens + 1, 2 : heads + 2]
    target = torch.full((batch, tokens + 4, heads + 1, width), float("nan"), dtype=dtype)
    to = target[:, 3 : tokens + 3, 1:]
    assert has_whole_rows(x) and has_whole_rows(to)
    copy_rows(to, x, Stream())
    expected = torch.full_like(target, float("nan"))
    expected[:, 3 : tokens + 3, 1:] = x
    assert torch.equal(target.isnan(), expected.isnan()) and torch.equal(to, x)
    assert calls == [7] * (batch if tokens else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("heads", "width", "first"), [(3, 8, 2), (3, 6, 1), (2, 5, 1), (4, 1, 3), (1, 16, 0)])
def test_rows_of_any_width_and_place_are_copied_to_the_last_bit(dtype, heads, width, first):
    """Widths and places that larger numbers fit, and such as they do not; NaN among what is copied."""
    wide = torch.randint(0, 256, (2, 6, heads + 4, width * dtype.itemsize), dtype=torch.uint8).view(dtype)
    x = wide[:, 1:5, first : first + heads]
    target = torch.zeros(2, 7, heads + 2, width, dtype=dtype)
    copy_within(target[:, 2:6, 1 : heads + 1], x)
    expected = torch.zeros_like(target)
    expected[:, 2:6, 1 : heads + 1] = x
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def test_rows_are_copied_as_large_numbers_where_they_can_be(monkeypatch):
    seen = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: seen.append(x.dtype) or copy(to, x))
    x = torch.randn(1, 5, 4, 8).bfloat16()
    copy_within(torch.empty_like(x)[:, :, 1:3], x[:, :, 2:])
    copy_within(torch.empty(1, 5, 4, 6, dtype=torch.bfloat16), x[..., :6])
    copy_within(torch.empty(1, 5, 4, 7, dtype=torch.bfloat16), x[..., 1:])
    copy_within(torch.empty(1, 5, 8, 4, dtype=torch.bfloat16).transpose(2, 3), x)
    assert seen == [torch.int64, torch.int32, torch.bfloat16, torch.bfloat16]


def test_an_error_of_the_driver_is_raised(monkeypatch):
    monkeypatch.setattr(pitched_copy, "_driver", lambda: lambda *_: 700)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"cuMemcpy2DAsync of \(1, 2, 3, 4\) torch.float32: the driver's error 700"):
        copy_rows(x.clone(), x, Stream())


def test_rows_with_gaps_are_told_apart():
    x = torch.zeros(1, 4, 3, 8)
    assert not has_whole_rows(x.transpose(2, 3)) and not has_whole_rows(x[..., :4]) and has_whole_rows(x[:, ::2])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_between_gpus_equal_collectives(tmp_path):
    ranks = torch.cuda.device_count()
    started = (ranks, str(tmp_path), exchange_ranks.equal_collectives, ("cuda", str(tmp_path)), "nccl")
    torch.multiprocessing.start_processes(parallel_ranks.start, started, nprocs=ranks, start_method="spawn")


@pytest.mark.parametrize(
    ("rule", "lengths", "early"),
    [
        ("count", None, True),
        ("count", [5, 5], True),
        ("mass", None, True),
        ("budget", None, False),
        ("count", [5, 3], False),
    ],
    ids=str,
)
def test_values_are_awaited_after_blocks_were_chosen_where_the_rule_allows_it(monkeypatch, rule, lengths, early):
    """The values are not there before, and the output is what it is when they are."""
    events = []
    select = text_padding.select_blocks

    def selecting(*arguments, **settings):
        events.append("chosen")
        return select(*arguments, **settings)

    monkeypatch.setattr(text_padding, "select_blocks", selecting)
    settings = {"density": 0.4} if rule == "budget" else {}
    spec = AttentionSpec(rule=rule, block_query=16, block_key=16, **settings)
    q, k, v = torch.randn(3, 2, 107, 2, 8).unbind()
    places = {"before": 0, "after": 7, "lengths": lengths, "permutation": None, "return_lists": True}
    expected = attend_real_text(q, k, v, spec, None, **places)
    late = torch.full_like(v, float("nan"))

    def arrive():
        events.append("there")
        late.copy_(v)

    events.clear()
    out = torch.full_like(q, float("nan"))
    found = attend_real_text(q, k, late, spec, None, await_values=arrive, out=out, **places)
    assert (events[:2] == ["chosen", "there"]) is early and events.count("there") == 1
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(found[3].counts, expected[3].counts)
    assert (found[0].data_ptr() == out.data_ptr()) is (lengths is None)
