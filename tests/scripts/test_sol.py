"""Sol-Attn in the experiments: its rule, how a pipeline is given it, and what is said where it is not installed."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import quality
import torch
import torch.nn.functional as F
from operator_bench.sol_int8 import RULES, Rule
from quality_lab.sol import SolAttention, as_preset

from psa_diffusers.errors import InputError
from psa_kernels import select_blocks

TINY = ["--prompts", "1", "--steps", "2", "--height", "64", "--width", "64", "--frames", "9"]


@pytest.fixture
def dense_sol(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A stand-in for the package whose `sol_attn` is dense; returns what it was called with."""
    calls: list[dict] = []

    def sol_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: float) -> torch.Tensor:
        calls.append({"shape": tuple(q.shape), **settings})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=settings["scale"]).transpose(1, 2)

    package = ModuleType("comfy_kitchen")
    package.__spec__ = ModuleSpec("comfy_kitchen", None)
    package.sol_attn = sol_attn
    monkeypatch.setitem(sys.modules, "comfy_kitchen", package)
    return calls


def _inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 2, tokens, 2, 64, generator=draw)
    blocks = torch.arange(tokens) // 64
    offset = torch.randn(2, int(blocks[-1]) + 1, 64, generator=draw)[:, blocks]
    return q + offset[0, :, None], k + offset[1, :, None], v


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_exact_blocks_row_by_row(rule: Rule) -> None:
    q, k, _ = _inputs(1000)  # 16 blocks, the last of 40 tokens
    found = rule.exact(q, k)
    parts = [slice(first, first + 64) for first in range(0, 1000, 64)]
    means = [torch.stack([x[1, part, 1].double().mean(0) for part in parts]) for x in (q, k)]
    keys = means[1] - means[1].mean(0)
    for row, query in enumerate(means[0]):
        scores = keys @ query / 8
        if rule.kind == "top-k":
            chosen = set(scores.argsort(descending=True)[: round(rule.value * 16)].tolist())
        else:
            sigma = (query.square() * keys.square().mean(0)).sum().sqrt() / 8
            chosen = set((scores > rule.value * sigma).nonzero().flatten().tolist())
        expected = chosen | {place for place in (row - 1, row, row + 1) if 0 <= place < 16}
        assert set(found[1, 1, row].nonzero().flatten().tolist()) == expected
    assert rule.density(q, k) == pytest.approx(found.double().mean().item()) and not found.all()


def test_our_rule_takes_the_same_blocks_but_for_the_diagonal() -> None:
    q, k, _ = _inputs(1024)
    [spec] = set(as_preset(0.25).layer_specs(1))
    ours = select_blocks(q, k, spec).levels() == 0
    index = torch.arange(16)
    beside = (index[:, None] - index).abs() <= 1
    assert torch.equal(ours | beside, Rule("top-k", 0.25).exact(q, k)) and (ours.sum(-1) == 4).all()
    assert (spec.block_query, spec.block_key, spec.rest, as_preset(0.25).order) == (64, 64, "mean", "raster")


def test_its_statistics_count_what_is_exact_and_what_is_pooled(dense_sol: list[dict]) -> None:
    qkv, rule = _inputs(1000), Rule("top-k", 0.15)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    (out, text), [stats] = SolAttention(rule)(None, None, None, qkv, SimpleNamespace(text_tokens=0))
    torch.testing.assert_close(out, dense)
    assert dense_sol == [{"shape": (2, 1000, 2, 128), "scale": 1 / 8, "topk_ratio": 0.15}]
    assert text.shape == (2, 0, 2, 64) and stats.coverage.tolist() == [[1, 1], [1, 1]]
    share = rule.exact(*qkv[:2]).float().mean((2, 3))
    torch.testing.assert_close(stats.density, share + (1 - share) / 64)
    with pytest.raises(InputError, match="block 3: has 5 text tokens"):
        SolAttention(rule)(None, SimpleNamespace(name="block 3"), None, qkv, SimpleNamespace(text_tokens=5))


def test_videos_go_through_it(tmp_path: Path, dense_sol: list[dict], one_thread: None) -> None:
    """With a stand-in that is dense, videos are those of stock diffusers."""
    quality.main(["sol", *TINY, "--output", str(tmp_path), "--settings", "20/20"])
    [row] = json.loads((tmp_path / "sol.json").read_text())["rows"]
    assert row["setting"] == "sol-int8 tau 1.3" and row["computed_by"] == "comfy_kitchen.sol_attn, tau 1.3"
    assert row["psnr"] > 60 and row["implementation"] == "comfy-kitchen, reference" and "preset" not in row
    # One sparse step of two, 8 layers, both guidance branches.
    assert dense_sol == [{"shape": (1, 192, 4, 128), "scale": 1 / 8, "tau": 1.3}] * 16
    assert 0 < row["density"] < row["density_run"] < 1


def test_without_the_package_it_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    quality.main(["sol", *TINY, "--output", str(tmp_path), "--settings", "20/20"])
    said = capsys.readouterr().out
    assert "sol-int8 tau 1.3 is left out: the package comfy-kitchen is not installed" in said
    assert "0 settings to measure, 0 are there" in said and not list(tmp_path.iterdir())
