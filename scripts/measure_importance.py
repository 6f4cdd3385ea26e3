"""How well each estimate of importance chooses blocks, and how far attention over them is from dense, on the CPU.

    python scripts/measure_importance.py --output docs/benchmarks/importance.json

Inputs are q, k, v of the bundled demo model (all heads of some layers and steps of dense runs) and smooth random fields
with outliers. Both are cut into blocks as the presets do. Takes about five minutes of CPU time; prints a table, and as
the last line one JSON document, the one that --output receives.

Columns: `flops`, the estimate's dot products as a share of dense attention's; `recall`, the share of the exact softmax
mass that the 15 % and the 25 % most important blocks of a row hold, over what the best choice of as many holds;
`error`, the relative L2 distance of the output from dense attention, with psa-3's thresholds (density 0.25) and with
0.6 times those (0.15), geometric mean over heads; `x paper`, that error over the one of the paper's estimate (sampled,
max, strides 4 and 4) on the same head, likewise, with its standard error over heads (which are not independent).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from results import publish

from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import AttentionSpec, Importance, psa_attention
from psa_kernels.allocation.reference import allocate
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import make_layout
from psa_presets import load_preset

DEMO = Path(__file__).resolve().parents[1] / "psa_diffusers" / "demo"
PROMPTS = (
    "a large red striped circle moving right over a green checkerboard",
    "a small blue star circling over orange stripes",
)
STEPS = 6
CAPTURED_STEPS = (1, 3, 5)
CAPTURED_LAYERS = (1, 4, 6)

STRIDES = ((4, 4), (8, 4), (8, 8), (16, 8), (16, 16))
ESTIMATES = [
    Importance(estimator, statistic, *strides)
    for estimator, statistic, strides in product(("sampled", "pooled"), ("max", "mean"), STRIDES)
]
PAPER = Importance("sampled", "max", 4, 4)
# The mean over all pairs of tokens is the exact mass of a pair of blocks.
EXACT = Importance("sampled", "mean", 1, 1)
SHARES = (0.15, 0.25)
THRESHOLDS = {density: load_preset("psa-3").at_density(density).thresholds for density in (0.25, 0.15)}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int, int]]


class Recorder:
    """The processor of one layer that keeps q, k, v of the calls it is told to, and leaves the rest to the original."""

    def __init__(self, original: object, kept: list[tuple[torch.Tensor, ...]]) -> None:
        self.original, self.kept, self.armed = original, kept, False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if self.armed:
            self.kept.append(Wan.project(attn, hidden_states, rotary_emb))
            self.armed = False  # the second call of a step is that without the prompt
        return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def demo_inputs() -> Iterator[Inputs]:
    """q, k, v `[1, N, H, D]` of some layers and steps of dense runs, and the token grid."""
    pipe = WanPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    kept: list[tuple[torch.Tensor, ...]] = []
    attentions = [pipe.transformer.blocks[layer].attn1 for layer in CAPTURED_LAYERS]
    recorders = [Recorder(attn.processor, kept) for attn in attentions]
    for attn, recorder in zip(attentions, recorders, strict=True):
        attn.set_processor(recorder)

    def after_step(_pipe, step: int, _timestep, values: dict) -> dict:
        for recorder in recorders:
            recorder.armed = step + 1 in CAPTURED_STEPS
        return values

    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
        size = {"height": 192, "width": 192, "num_frames": 33}
        pipe(prompt, generator=generator, callback_on_step_end=after_step, **options, **size)
    # Every fourth call: each layer and each step, in turn.
    for q, k, v in kept[::4]:
        yield q, k, v, (9, 24, 24)


def synthetic_inputs() -> Iterator[Inputs]:
    """Fields of several smoothness that queries and keys share in part, with noise and a few much longer tokens."""
    grid, heads, head_dim = (8, 32, 24), 2, 64
    tokens = math.prod(grid)
    for seed, spacing in enumerate((2, 3, 5)):
        draw = torch.Generator().manual_seed(seed)

        def field(spacing: int = spacing, draw: torch.Generator = draw) -> torch.Tensor:
            coarse = [max(2, math.ceil(size / spacing)) for size in grid]
            noise = torch.randn(heads, head_dim, *coarse, generator=draw)
            smooth = F.interpolate(noise, size=grid, mode="trilinear", align_corners=True)
            return F.normalize(smooth.flatten(2), dim=1).permute(2, 0, 1)[None] * head_dim**0.5

        shared = field()
        q, k, v = (part * shared + field() for part in (0.8, 0.8, 0.0))
        q, k, v = (x.contiguous() + 0.4 * torch.randn(x.shape, generator=draw) for x in (q, k, v))
        for x in (q, k):
            x[:, torch.randperm(tokens, generator=draw)[: tokens // 200]] *= 2
        yield q, k, v, grid


def measure(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int, int]) -> dict:
    """Figures of every estimate on every head: `{estimate or None for the best choice: [figures of a head]}`."""
    permutation = token_permutation("hilbert", grid)
    layout = make_layout(q.shape[1], k.shape[1], 0, 0, permutation)
    scale = q.shape[-1] ** -0.5
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    mass = block_importance(q, k, layout, AttentionSpec(importance=EXACT), scale)
    figures = {}
    for how in (None, *ESTIMATES):
        found = mass if how is None else block_importance(q, k, layout, AttentionSpec(importance=how), scale)
        heads = [{} for _ in range(q.shape[2])]
        for share in SHARES:
            count = math.ceil(share * mass.shape[-1])
            best = mass.topk(count).values.sum(-1)
            covered = mass.gather(-1, found.topk(count).indices).sum(-1)
            for head, recall in zip(heads, (covered / best).mean(-1)[0].tolist(), strict=True):
                head[f"recall_{share}"] = recall
        for density, thresholds in THRESHOLDS.items():
            spec = AttentionSpec(thresholds=thresholds)
            lists = allocate(found, None, spec)
            out = psa_attention(q, k, v, spec, permutation=permutation, lists=lists)
            errors = (out - dense).square().sum((1, 3)).sqrt() / dense.square().sum((1, 3)).sqrt()
            for head, error in zip(heads, errors[0].tolist(), strict=True):
                head[f"error_{density}"] = error
        figures[how] = heads
    return figures


def summarise(source: str, measured: list[dict]) -> list[dict]:
    """One row an estimate: means over all heads of all inputs."""
    heads = {how: [head for figures in measured for head in figures[how]] for how in measured[0]}
    rows = []
    for how, found in heads.items():
        row = {"inputs": source, "heads": len(found)}
        if how is None:
            row |= {"estimate": "best choice (exact mass)"}
        else:
            row |= {
                "estimate": f"{how.estimator} {how.statistic} {how.query_stride}/{how.key_stride}",
                "flops": round(0.5 / (how.query_stride * how.key_stride), 5),
            }
        for share in SHARES:
            row[f"recall_{share}"] = round(statistics.mean(head[f"recall_{share}"] for head in found), 4)
        for density in THRESHOLDS:
            key = f"error_{density}"
            ratios = [math.log(head[key] / paper[key]) for head, paper in zip(found, heads[PAPER], strict=True)]
            times = math.exp(statistics.mean(ratios))
            row[key] = round(statistics.geometric_mean(head[key] for head in found), 4)
            row[f"times_paper_{density}"] = round(times, 3)
            row[f"times_paper_error_{density}"] = round(times * statistics.stdev(ratios) / len(ratios) ** 0.5, 3)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> Iterator[str]:
    yield f"{'inputs':10}{'estimate':25}{'flops':>7}{'recall 15 %':>13}{'25 %':>7}" + "".join(
        f"{f'error {density}':>12}{'x paper':>16}" for density in THRESHOLDS
    )
    for row in rows:
        flops = f"{row['flops']:>7.2%}" if "flops" in row else f"{'-':>7}"
        line = f"{row['inputs']:10}{row['estimate']:25}{flops}{row['recall_0.15']:>13.3f}{row['recall_0.25']:>7.3f}"
        for density in THRESHOLDS:
            times, error = row[f"times_paper_{density}"], row[f"times_paper_error_{density}"]
            line += f"{row[f'error_{density}']:>12.4f}{f'{times:.3f} +- {error:.3f}':>16}"
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    with torch.no_grad():
        for source, inputs in (("synthetic", synthetic_inputs()), ("demo", demo_inputs())):
            rows += summarise(source, [measure(*tensors) for tensors in inputs])
    print("\n".join(table(rows)))
    publish(
        "blocks chosen by estimates of importance, against exact mass and dense attention; block_query 128, block_key "
        "64, hilbert order, fp32",
        rows,
        options.output,
        demo={"prompts": len(PROMPTS), "steps": STEPS, "captured": CAPTURED_STEPS, "layers": CAPTURED_LAYERS},
    )


if __name__ == "__main__":
    main()
