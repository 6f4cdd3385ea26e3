"""The end of a patch waits for forwards of other threads, and for nothing else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from psa_testing.tiny_language_models import SMALL, SPARSE, forward, tiny
from psa_transformers import apply_psa
from psa_transformers.running import Running

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def worker():
    """A thread that stays alive after what it ran."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def ends(running) -> bool:
    """Whether there is a moment between forwards."""

    def wait():
        with running.between_forwards():
            done.set()

    done = threading.Event()
    threading.Thread(target=wait, daemon=True).start()
    return done.wait(5)


def test_a_hook_that_is_compiled_to_nothing(worker):
    """At dynamo's limit of graphs, forwards run by themselves, but hooks that it has compiled before stay nothing."""
    running = Running([torch.nn.Linear(2, 2)])
    worker.submit(running.enter, 0).result()
    assert ends(running)


def test_forwards_beyond_the_limit_of_graphs(worker):
    torch._dynamo.reset()
    model, given = tiny("llama")

    def run():
        # Settings of dynamo are each thread's own.
        with torch.no_grad(), torch._dynamo.config.patch(cache_size_limit=1):
            for length in (100, 120, 140):
                compiled(input_ids=given["input_ids"][:, :length])

    psa = apply_psa(model, SPARSE, **SMALL)
    compiled = torch.compile(model, backend=(graphs := CompileCounter()), dynamic=False)
    with pytest.warns(UserWarning, match="a compiled forward of many tokens"):
        worker.submit(run).result()
    assert graphs.frame_count == 1
    assert ends(psa._running) and not any("not the patched model's" in reason for reason in psa.stats().fallbacks)
    psa.restore()
    torch._dynamo.reset()


def test_an_error_does_not_keep_a_patch(worker):
    model, given = tiny("llama")
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    psa = apply_psa(model, SPARSE, **SMALL)
    with pytest.raises(ZeroDivisionError):
        worker.submit(forward, model, given).result()
    assert ends(psa._running)
    psa.restore()
    hook.remove()


def test_it_says_what_it_waits_for(worker, monkeypatch):
    model, given = tiny("llama")
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go_on.wait(5)

    model.model.layers[0].register_forward_pre_hook(hold)
    monkeypatch.setattr("psa_transformers.running.LONG", 0.0)
    psa = apply_psa(model, SPARSE, **SMALL)
    worker.submit(forward, model, given)
    inside.wait(5)
    monkeypatch.setattr("warnings.warn", lambda message, **_: (said.append(message), go_on.set()))
    said: list[str] = []
    psa.restore()
    (message,) = said
    assert message.startswith("restore() waits for a forward of the model to end, in ThreadPoolExecutor")
    assert psa.stats().sparse_calls == 2
