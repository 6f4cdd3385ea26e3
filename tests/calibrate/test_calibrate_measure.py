"""Measuring changes no video, and tells what sparse attention would have done."""

import pytest
import torch

from psa_diffusers import Preset, apply_psa
from psa_diffusers.calibrate.choose import layer_by_layer, ranked
from psa_diffusers.calibrate.measure import Measurement, curves_of
from psa_diffusers.calibrate.scaling import SCALES, scaled_settings
from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.token_order import token_permutation
from psa_testing.tiny_pipelines import run as run_pipeline
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")


def test_measuring_changes_nothing_and_tells_what_a_sparse_run_would():
    pipe = tiny_wan(num_layers=2)
    base = Preset(block={"query": 32, "key": 16}, min_tokens=0, dense_steps=0.0)
    compared = {"raster": base.replace(order="raster"), "hilbert": base}
    plain = run_pipeline(pipe)
    with Measurement(pipe, compared, {1}) as measurement:
        assert torch.allclose(run_pipeline(pipe), plain, atol=1e-4)
    figures = measurement.figures()
    assert torch.equal(run_pipeline(pipe), plain)
    scaled = Preset(**{**base.model_dump(), **scaled_settings(base.layer_specs(1)[0], SCALES[1])})
    with apply_psa(pipe, scaled) as psa:
        run_pipeline(pipe, guidance_scale=1.0)
        stats = psa.stats()
    assert list(figures) == stats.layers
    for index, rows in enumerate(figures.values()):
        assert rows["hilbert"]["densities"][1] == pytest.approx(stats.density[1][index], abs=1e-6)
        for row in rows.values():
            assert row["errors"][0] > row["errors"][-1] > 0 and row["blocks"] == [3]
    curve = curves_of([figures], compared, stats.layers)[1]["hilbert"]
    assert curve.density_at(SCALES[1]) == pytest.approx(stats.density[1][1], abs=1e-6)


def measured(pipe, shapes, steps, **call):
    with Measurement(pipe, shapes, steps) as measurement:
        run_pipeline(pipe, **call)
    return measurement.figures()


def test_of_two_forwards_a_step_only_the_first_is_measured():
    """At the first step the first forward is the same with and without guidance."""
    pipe = tiny_wan(num_layers=2)
    base = Preset(block={"query": 32, "key": 16}, min_tokens=0, dense_steps=0.0)
    compared = {"hilbert": base, "mass": base.replace(rule="mass", thresholds=[0.2, 0.3, 0.4])}
    alone = measured(pipe, compared, {0}, guidance_scale=1.0)
    assert measured(pipe, compared, {0}, guidance_scale=6.0) == alone
    assert {name: list(rows) for name, rows in alone.items()} == {name: [*compared] for name in alone}
    # Measuring a later step as well makes a difference, so what is equal above is not so by chance.
    assert measured(pipe, compared, {0, 1}, guidance_scale=6.0) != alone


def test_the_order_that_suits_a_layer_is_found(monkeypatch):
    """Tokens attend to those of their run of 16: in raster order in the first layer, on the curve in the second."""
    pipe = tiny_wan(num_layers=2)
    grid, size = (4, 8, 8), 16
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for block, order in zip(pipe.transformer.blocks, ("raster", "hilbert"), strict=True):
        place = torch.empty(256, dtype=torch.long)
        place[token_permutation(order, grid)] = torch.arange(256) // size
        groups[block.attn1] = place

    base = Preset(block={"query": 32, "key": size}, min_tokens=0, dense_steps=0.0, thresholds=[0.1, 0.1, 0.15])
    compared = {name: base.replace(order=name) for name in ("raster", "hilbert", "tiles")}
    project = Wan.project

    def constructed(attn, call):
        q, _, v = project(attn, call)
        codes = torch.nn.functional.normalize(torch.randn(256 // size, q.shape[-1], generator=generator), dim=-1)
        mine = (12 * codes)[groups[attn]][None, :, None].expand_as(q)
        return mine.contiguous(), mine.contiguous(), torch.randn(v.shape, generator=generator)

    monkeypatch.setattr(Wan, "project", staticmethod(constructed))
    with Measurement(pipe, compared, {1}) as measurement:
        run_pipeline(pipe, height=128, width=128, num_frames=13)
    curves = curves_of([measurement.figures()], compared, measurement.processor.stats().layers)
    assert layer_by_layer(curves, 0.12) == {0: "raster", 1: "hilbert"}
    assert ranked(curves, 0.12)[-1] == "tiles"
