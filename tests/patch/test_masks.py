"""What was read can be looked at afterwards, and says the same as the statistics."""

import numpy as np
import pytest
import torch

from psa_diffusers import Preset, apply_psa
from psa_diffusers.patch.masks import BlockMask, MaskRecorder, query_block_at
from psa_diffusers.patch.token_order import token_permutation
from psa_diffusers.report.overlay import CELL_WIDTH, GAP, QUERY_COLOUR, RAMP, attention_overlay, frame_of
from psa_diffusers.report.panels import MIN_PANEL_WIDTH, bar_height
from psa_kernels import AttentionSpec, BlockLists, Importance
from psa_presets import TokenOrder
from psa_testing.tiny_pipelines import run, tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

PRESET = Preset(
    name="small", block={"query": 32, "key": 16}, thresholds=[0.3, 0.5, 0.7], min_tokens=0, order="tiles",
    tile=[1, 2, 2],
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan(num_layers=2)


def record(pipe, preset=PRESET, **wanted):
    with apply_psa(pipe, preset, strict=True) as psa:
        layers = psa.stats().layers
        recorder = MaskRecorder(layers, **wanted)
        psa.processor.record_masks(recorder)
        run(pipe)
        return recorder.masks(), psa.stats()


def test_levels_undo_from_levels():
    levels = torch.randint(0, 4, (2, 3, 5, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(BlockLists.from_levels(levels, 3).levels(), levels)


def test_the_density_of_the_masks_is_that_of_the_statistics(pipe):
    # The negative prompt's lists differ, so only with shared lists are the statistics those of one branch.
    masks, stats = record(pipe, PRESET.replace(share_guidance=True))
    assert [mask.layer for mask in masks] == stats.layers
    for index, mask in enumerate(masks):
        assert (mask.step, mask.steps, mask.grid) == (2, 4, (3, 4, 4))
        assert mask.levels.shape == (2, 2, 3)
        assert mask.detail().mean() == pytest.approx(stats.density[2][index], abs=1e-6)
        assert 1 - mask.shares()[-1] == pytest.approx(stats.coverage[2][index], abs=1e-6)


def test_one_step_head_and_query_block(pipe):
    every = record(pipe, step=3)[0][1]
    masks, _ = record(pipe, step=3, head=1, point=(0.5, 0.99, 0.0))
    row = query_block_at((0.5, 0.99, 0.0), every.order, AttentionSpec(block_query=32, block_key=16), every.grid)
    assert (masks[1].first_head, masks[1].first_row, masks[1].step) == (1, row, 3)
    assert np.array_equal(masks[1].levels, every.levels[1:, row : row + 1])
    assert every.query_tokens(row)[1, 3, 0]


def test_each_layer_has_the_order_and_blocks_of_its_rules(pipe):
    one_dense = {"match": 0, "dense": True}
    settings = {**PRESET.model_dump(exclude={"layers"}), "dense_steps": 0.0}
    raster = {"order": "raster", "block": {"query": 32, "key": 16}, "levels": (1, 2, 8)}
    mixed = Preset(**{**settings, "layers": [{"match": 1, **raster}]})
    assert [each.order for each in mixed.layer_orders(2)] == ["tiles", "raster"]
    masks, _ = record(pipe, mixed, step=0)
    alike, _ = record(pipe, Preset(**settings), step=0)
    assert [mask.order for mask in masks] == [("tiles", (1, 2, 2)), ("raster", (1, 2, 2))]
    assert np.array_equal(masks[0].levels, alike[0].levels)
    # Behind a dense first layer the second one alone decides.
    ruled, _ = record(pipe, Preset(**{**settings, "layers": [one_dense, {"match": 1, **raster}]}), step=0)
    plain, _ = record(pipe, Preset(**{**settings, **raster, "layers": [one_dense]}), step=0)
    assert np.array_equal(ruled[0].levels, plain[0].levels) and ruled[0].spec == plain[0].spec
    assert ruled[0].query_tokens(0).ravel()[:32].all()


def test_dense_steps_leave_nothing(pipe):
    assert record(pipe, step=0)[0] == []


def test_values_come_to_the_tokens_of_their_block(pipe):
    mask = record(pipe)[0][0]
    order = token_permutation("tiles", mask.grid, (1, 2, 2))
    spread = mask.over_frames(np.array([10.0, 20.0, 30.0]))
    assert [spread.ravel()[order[place]] for place in (0, 15, 16, 31, 32, 47)] == [10, 10, 20, 20, 30, 30]
    assert mask.query_tokens(1).sum() == 48 - 32


def test_a_recorder_changes_nothing(pipe):
    with apply_psa(pipe, PRESET) as psa:
        plain = run(pipe)
        psa.processor.record_masks(MaskRecorder(psa.stats().layers))
        assert torch.equal(run(pipe), plain)


def test_the_overlay_shows_levels_where_their_tokens_are():
    # One frame of 2 x 4 tokens in blocks of 4: the left half is a block, and the right half.
    preset, order = Preset(name="halves"), TokenOrder("tiles", (1, 2, 2))
    spec = AttentionSpec(block_query=4, block_key=4, importance=Importance(query_stride=4, key_stride=4))
    mask = BlockMask("blocks.0", 1, 4, (1, 2, 4), preset, spec, order, 0, 1, np.array([[[3, 0]]]))
    white = np.ones((1, 32, 64, 3), np.float32)
    picture = np.asarray(attention_overlay(white, [mask])).astype(int)
    bar, height = bar_height(MIN_PANEL_WIDTH), CELL_WIDTH // 2
    assert picture.shape == (2 * bar + height + GAP, CELL_WIDTH, 3)
    middle = picture[bar + height // 2]
    assert np.ptp(middle[CELL_WIDTH // 4]) == 0  # skipped: the grey frame alone
    exact = middle[3 * CELL_WIDTH // 4]
    assert np.abs(exact - np.array(RAMP[-1])).max() < 40
    assert (middle[CELL_WIDTH // 2] == QUERY_COLOUR).all()  # the queries are the right half


def test_a_latent_frame_is_shown_by_the_last_of_its_frames():
    assert [frame_of(time, 9, 33) for time in (0, 1, 4, 8)] == [0, 4, 16, 32]
    assert frame_of(0, 1, 1) == 0
