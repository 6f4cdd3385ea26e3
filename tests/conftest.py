"""Fixtures that several test files use."""

import gc
import multiprocessing
import os
import sys
from dataclasses import replace

import pytest

from psa_testing.skip_table import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

# What is imported and collected stays until the end: a quarter of that time went into looking for garbage in it.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """From here on garbage is collected, of tests alone."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def one_thread():
    """Tiny models gain nothing from threads, and wait long for them where other processes want the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo():
    """What other tests compiled is gone, and so is afterwards what this one has."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def forks(monkeypatch):
    """A context of multiprocessing whose processes fork from one that has imported everything, once for all tests.

    They see neither this process's environment nor what it captures of stdout and stderr.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    multiprocessing.set_forkserver_preload(["psa_testing.preloaded"])
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder of saved tiny pipelines by name, and of `small.yaml`, a preset for their few tokens."""
    from psa_testing.tiny_pipelines import tiny_wan, tiny_wan_expanded, tiny_wan_i2v

    folder = tmp_path_factory.mktemp("models")
    tiny_wan(num_layers=2).save_pretrained(folder / "wan")
    tiny_wan(two_stage=True, num_layers=2).save_pretrained(folder / "experts")
    tiny_wan_i2v(num_layers=2).save_pretrained(folder / "i2v")
    tiny_wan_expanded().save_pretrained(folder / "expanded")
    (folder / "small.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.7]\n")
    return folder


@pytest.fixture
def ask(saved, tmp_path):
    """Makes a request for a small run into tmp_path / "out"."""
    from psa_diffusers.runs.request import Request
    from psa_testing.tiny_runs import FRAMES, SIZE, STEPS

    def make(*prompts, **changes):
        request = Request(
            prompts=prompts or ("a cat", "a dog"),
            model=str(saved / "wan"),
            preset=str(saved / "small.yaml"),
            output=str(tmp_path / "out"),
            steps=STEPS,
            height=SIZE,
            width=SIZE,
            frames=FRAMES,
            fps=8,
            seed=3,
        )
        return replace(request, **changes)

    return make
