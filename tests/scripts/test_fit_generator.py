"""The logic of scripts/fit_generator.py on toy tensors; its figures need trained models."""

from __future__ import annotations

from dataclasses import replace

import fit_generator
import pytest
import torch
from attention_judges.judges import Judge, Sample
from attention_judges.pairs import modelled_errors

GRID, TEXT = (2, 8, 10), 3


@pytest.fixture(scope="module")
def known():
    def samples(_folders, names):
        draw = torch.Generator().manual_seed(0)
        for name in sorted(names):
            q, k, v = torch.randn(3, 1, 160 + TEXT, 2, 16, generator=draw)
            yield Sample(name, 2 * q, k, v, GRID, TEXT)

    judge = Judge("toy", "random", ("0 0", "1 0"), samples, 16, 16, ("hilbert",))
    return fit_generator.known_of(judge, [])


def test_measured_errors_choose_best(known):
    by_truth = {id(each.pairs): each.errors for each in known}
    best = fit_generator.objective(known, lambda pairs, _: by_truth[id(pairs)])
    tuned = fit_generator.objective(known, lambda pairs, spec: modelled_errors(pairs, spec, *fit_generator.TUNED))
    assert 0 < best < tuned


def test_constants_are_those_of_the_grid_that_err_least(known, monkeypatch):
    monkeypatch.setattr(fit_generator, "GRID", ((2.0, 4.0, 0.25, 1.0), (0.0, 0.0, 0.0, 0.0), (1.4, 16.0, 0.25, 1.0)))
    found = fit_generator.fitted_constants(known)
    losses = {
        each: fit_generator.objective(known, lambda pairs, spec, each=each: modelled_errors(pairs, spec, *each))
        for each in fit_generator.GRID
    }
    assert found == min(losses, key=losses.get) != (0.0, 0.0, 0.0, 0.0)


def test_a_net_begins_with_the_constants_and_lowers_what_it_is_trained_on(known, monkeypatch):
    constants = (1.4, 16.0, 0.25, 1.0)
    spec = replace(known[0].spec, density=0.25)
    net = fit_generator.Net(3, constants)
    torch.testing.assert_close(net(known[0].pairs, spec), modelled_errors(known[0].pairs, spec, *constants))
    with torch.no_grad():
        before = sum(fit_generator.softened_error(each, net, 0.25).item() for each in known)
    monkeypatch.setattr(fit_generator, "STEPS", 12)
    trained = fit_generator.fitted_net(known, constants)
    with torch.no_grad():
        after = sum(fit_generator.softened_error(each, trained, 0.25).item() for each in known)
    assert after < before
