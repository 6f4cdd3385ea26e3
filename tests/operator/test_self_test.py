"""With a version of Triton that is not known, a kernel is used if it computes what the portable one computes.

The kernels are stand-ins on a CPU; `test_self_test_gpu.py` runs the real ones.
"""

from __future__ import annotations

import threading

import pytest
import torch

from psa_kernels import AttentionSpec, attention
from psa_kernels.backends import choose as choosing
from psa_kernels.backends import hopper, self_test
from psa_kernels.backends.choose import SlowerKernelWarning, choose
from psa_kernels.backends.reference import Reference
from psa_kernels.call import make_call

SMALL, LARGE = 300, 1100


class Fake(Reference):
    """The reference, which notes its calls, and after which something may happen to what it found."""

    name = "fake"

    def __init__(self, then=lambda call, out, times: None):
        self.calls, self.then = [], then

    def attend(self, call, keys, lists, out):
        super().attend(call, keys, lists, out)
        self.calls.append(call)
        self.then(call, out, len(self.calls))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path, one_thread):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_test, "_answers", {})
    monkeypatch.setattr(self_test, "Triton", Reference)
    monkeypatch.setattr(self_test, "triton_version", lambda: "9.9.0")
    monkeypatch.setattr(self_test, "TOKENS", SMALL)
    monkeypatch.setattr(self_test, "HEADS", 1)
    # Half of it holds keys and values of head_dim 16 in 16 bits of 1,750 rows: those of 1,000 tokens.
    monkeypatch.setattr(self_test, "cache_bytes", lambda _: 1750 * 4 * 16 * 2)


def a_call(dtype=torch.bfloat16, text=(0, 0), permuted=False, head_dim=16, causal=False, **fields):
    tokens = 100
    q = torch.zeros(1, tokens + sum(text), 1, head_dim, dtype=dtype)
    permutation = torch.arange(tokens) if permuted else None
    return make_call(q, q, q, AttentionSpec(**fields), *text, permutation, causal=causal)


def forget():
    """What another process would not know."""
    self_test._answers.clear()


CALLS = [
    a_call(),
    a_call(torch.float16, text=(3, 0)),
    a_call(text=(0, 5), permuted=True, block_key=32, levels=(2, 4), thresholds=(0.5, 1.0)),
    a_call(head_dim=32, levels=(1,), thresholds=(0.5,)),
    a_call(rule="budget", density=0.3),
    a_call(text=(3, 2), causal=True),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_what_computes_the_same_is_used(call):
    fake, state = Fake(), torch.get_rng_state()
    assert self_test.obstacle(fake, call) is None
    assert torch.equal(torch.get_rng_state(), state)
    large = call.spec.rule == "count" and len(call.spec.levels) > 1
    assert len(fake.calls) == 2 * (2 + large)
    for made in fake.calls:
        assert (made.q.dtype, made.q.shape[-1], made.spec.levels) == (call.q.dtype, call.q.shape[-1], call.spec.levels)
        assert (made.layout.text_before > 0, made.layout.text_after > 0) == (
            call.layout.text_before > 0,
            call.layout.text_after > 0,
        )
        assert (made.layout.permutation is None) == (call.layout.permutation is None)
        assert (made.causal is None) == (call.causal is None)
    rows = [sum(made.layout.video_keys / factor for factor in made.spec.levels) for made in fake.calls]
    assert (max(rows) > 1750 * 16 / call.q.shape[-1]) is large


def test_lists_of_causal_calls_are_past_and_sums_run_over():
    """Of queries in the second half, which read keys of the first."""
    causal = self_test._Variant("fake", torch.device("cpu"), torch.float32, 16, 128, 64, (1, 2), "native", True, True,
                                False, False, True)  # fmt: skip
    call, lists = self_test._small_call(causal, 2, 1000, runs_over=True)
    assert call.check_lists(lists) is lists and lists.counts[:, :, 1:].sum(-1).min() > 0
    out = torch.empty_like(call.q)
    Reference().attend(call, None, lists, out)
    first, second = call.k[0, call.layout.text_before], call.k[0, 900]
    logits = (call.q[0, 900] * torch.stack([first, second])).sum(-1) * call.scale
    assert (logits[0] - logits[1]).min() > 100 and out[:, call.layout.text_before :].isfinite().all()


def test_what_is_known_is_not_tested_again():
    fake, call = Fake(), CALLS[0]
    for _ in range(2):
        assert self_test.obstacle(fake, call) is None
        assert self_test.obstacle(fake, call) is None
        assert len(fake.calls) == 6
        forget()
    assert self_test.obstacle(fake, CALLS[1]) is None
    assert len(fake.calls) == 12


@pytest.mark.parametrize(
    ("name", "value"), [("triton_version", "9.9.1"), ("_package_version", "9"), ("_sources", "other")]
)
def test_another_version_is_tested_anew(name, value, monkeypatch):
    fake = Fake()
    assert self_test.obstacle(fake, CALLS[0]) is None
    forget()
    monkeypatch.setattr(self_test, name, lambda: value)
    assert self_test.obstacle(fake, CALLS[0]) is None
    assert len(fake.calls) == 12


def spoil(call, out, rows, value):
    out[:, call.layout.text_before + rows] = value


WRONG = {
    "one row": lambda call, out, times: spoil(call, out, SMALL - 1, 0),
    "not a number": lambda call, out, times: spoil(call, out, 0, torch.nan),
    "launched a second time": lambda call, out, times: times % 2 or out.mul_(1.1),
    "in large calls": lambda call, out, times: call.layout.video_keys == SMALL or out.mul_(1.1),
    "where sums run over": lambda call, out, times: call.k.max() < 30 or spoil(call, out, 7, torch.inf),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_something_else_is_not_used(name):
    fake = Fake(WRONG[name])
    told = self_test.obstacle(fake, CALLS[1])
    assert told.startswith("triton 9.9.0: its self-test failed: an output differs from the portable kernel's by ")
    assert "expected at most 0.01" in told and "to try again, remove " in told and "\n" not in told
    tested = len(fake.calls)
    assert self_test.obstacle(fake, CALLS[1]) == told
    forget()
    assert self_test.obstacle(fake, CALLS[1]) == told and len(fake.calls) == tested


def test_what_raises_is_not_used():
    def raises(*_):
        raise RuntimeError("PTX is not\nsupported")

    told = self_test.obstacle(Fake(raises), CALLS[0])
    assert told.startswith("triton 9.9.0: its self-test failed: RuntimeError: PTX is not supported; to try again")


def test_integers_may_differ_by_more(monkeypatch):
    call = a_call(precision="int8_qk")
    assert self_test.obstacle(Fake(), call) is None
    forget()
    spoiled = Fake(lambda call, out, times: spoil(call, out, 7, 0))
    spoiled.name = "spoiled"
    assert "expected at most 0.1 " in self_test.obstacle(spoiled, call)
    # Another that computes natively stands in, and is tested as what it is.
    native = Fake()
    native.name, native.precisions = "native", ("native",)
    assert self_test.obstacle(native, call) is None
    assert {made.spec.precision for made in native.calls} == {"native"}


class NoMemory(Fake):
    def attend(self, *_):
        raise torch.OutOfMemoryError("no memory")


class NoPortable(Reference):
    def attend(self, *_):
        raise RuntimeError("no compiler")


@pytest.mark.parametrize("portable", [False, True])
def test_what_cannot_be_tested_now_is_tested_by_the_next_process(portable, monkeypatch):
    with monkeypatch.context() as patch:
        if portable:
            patch.setattr(self_test, "Triton", NoPortable)
        told = self_test.obstacle(Fake() if portable else NoMemory(), CALLS[0])
    assert told == "triton 9.9.0: " + (
        "its self-test has nothing to compare with: RuntimeError: no compiler"
        if portable
        else "no memory is left for its self-test"
    )
    assert self_test.obstacle(Fake(), CALLS[0]) == told
    forget()
    assert self_test.obstacle(Fake(), CALLS[0]) is None


@pytest.mark.parametrize("what", ["a function is compiled", "a CUDA graph is captured"])
def test_nothing_runs_where_nothing_may(what, monkeypatch):
    fake = Fake()
    with monkeypatch.context() as patch:
        if "graph" in what:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        told = self_test.obstacle(fake, CALLS[0])
        assert told.startswith(f"triton 9.9.0: it is not tested while {what}; call it once ") and not fake.calls
    assert self_test.obstacle(fake, CALLS[0]) is None and fake.calls
    tested = len(fake.calls)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert self_test.obstacle(fake, CALLS[0]) is None and len(fake.calls) == tested


def test_threads_test_once():
    fake, found = Fake(), []
    threads = [threading.Thread(target=lambda: found.append(self_test.obstacle(fake, CALLS[0]))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [None] * 4 and len(fake.calls) == 6


def test_the_choice_is_not_asked_by_the_test_that_it_asks_for(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("asked again")

    for module in (choosing, attention):
        monkeypatch.setattr(module, "choose", asked)
    assert self_test.obstacle(Fake(), CALLS[0]) is None


def test_a_changed_source_changes_the_digest(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(self_test.verdicts, "__file__", str(tmp_path / "verdicts.py"))
    for content in ("a = 1", "a = 2"):
        (tmp_path / "kernel.py").write_text(content)
        found.append(self_test._sources.__wrapped__())
    assert len(set(found)) == 2


@pytest.fixture
def unknown(on_a_gpu, monkeypatch):
    """Makes a call on a GPU with a version of Triton that is not known, whose self-test says what it is told to."""
    pytest.importorskip("triton")

    def make(answer, *arguments, **options):
        call = on_a_gpu(*arguments, **options)
        monkeypatch.setattr(hopper, "KNOWN_VERSIONS", ("0.",))
        asked = []
        monkeypatch.setattr(self_test, "obstacle", lambda backend, call: asked.append(backend.name) or answer)
        return call, asked

    return make


def test_a_version_that_works_is_used(unknown):
    call, asked = unknown(None, AttentionSpec())
    assert choose(call).name == "hopper" and asked == ["hopper"]


def test_a_version_that_does_not_is_told_of(unknown):
    call, _ = unknown("triton 9.9.0: wrong", AttentionSpec())
    with pytest.warns(SlowerKernelWarning, match="the hopper kernel cannot be used, .*: triton 9.9.0: wrong"):
        assert choose(call).name == "triton"
    with pytest.raises(RuntimeError, match=r"strict: the hopper kernel cannot be used: triton 9\.9\.0: wrong"):
        choose(call, "auto", True)
    with pytest.raises(ValueError, match=r"implementation='hopper': triton 9\.9\.0: wrong"):
        choose(call, "hopper")


@pytest.mark.filterwarnings("ignore::psa_kernels.backends.choose.SlowerKernelWarning")
@pytest.mark.parametrize("precision", ["native", "int8_qk"])
def test_only_what_would_be_used_is_tested(precision, unknown):
    for options in ({"dtype": torch.float32}, {"head_dim": 96}, {"tokens": 1024}, {"capability": (10, 0)}):
        call, asked = unknown(None, AttentionSpec(precision=precision), **options)
        choose(call)
        assert not asked
    call, asked = unknown(None, AttentionSpec(precision="int8_qk"), dtype=torch.float16)
    with pytest.warns(SlowerKernelWarning, match="precision='int8_qk' cannot be used"):
        assert choose(call).name == "hopper"
    assert asked == ["hopper"]


def test_a_version_that_is_known_is_not_tested(on_a_gpu, monkeypatch):
    pytest.importorskip("triton")
    call = on_a_gpu(AttentionSpec())
    monkeypatch.setattr(self_test, "obstacle", lambda *_: pytest.fail("tested"))
    assert choose(call).name == "hopper"
