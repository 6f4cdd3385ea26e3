"""Time the prefill of a language model of transformers, dense and sparse: the decoder of Qwen2.5-VL-7B, random weights.

    python scripts/bench_prefill.py --output docs/benchmarks/prefill.json

Needs a CUDA device with some 40 GiB, but for `--tiny`. The prompt is a span of video tokens and 512 of text; no vision
tower runs. Weights and tokens are random, so times say what a density costs, and nothing of answers. `ratio` is dense
time by sparse time; `fallbacks` are the reasons why calls ran dense, and should be empty. Prints rows; writes JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from operator_bench.timing import measure
from results import publish
from transformers import Qwen2Config, Qwen2Model

from psa_transformers import apply_psa

DENSITIES = (0.35, 0.25, 0.15)
TOKENS = (16384, 32768, 65536, 131072)
LARGE = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
TOY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
TOY_TOKENS = (1536,)


def main() -> None:
    options = _arguments()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_prefill: no CUDA device; --tiny runs a toy on the CPU")
    device = "cpu" if options.tiny else "cuda"
    model = random_model(TOY if options.tiny else LARGE, 1 if options.tiny else options.layers, device)
    rows = []
    for tokens in TOY_TOKENS if options.tiny else options.tokens:
        for row in rows_of(model, tokens, options.preset, device, options.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
    what = "prefill of a decoder with random weights, medians"
    layers = model.config.num_hidden_layers
    publish(what, rows, options.output, device=device, commit=options.commit, layers=layers, preset=options.preset)


def random_model(sizes: dict[str, int], layers: int, device: str) -> Any:
    """A decoder of these sizes, in half precision on a GPU."""
    torch.manual_seed(0)
    limit = max(TOKENS)
    config = Qwen2Config(**sizes, num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=limit)
    with torch.device(device):
        return Qwen2Model._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()


def rows_of(model: Any, tokens: int, preset: str, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """The dense row of a length, then one of each density."""
    ids = torch.randint(0, 1024, (1, tokens), device=device)

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True)

    ms, extra = timed(prefill, repeats, device)
    dense = ms
    yield {"tokens": tokens, "method": "sdpa", "density": 1.0, "ms": ms, "extra_gib": extra, "ratio": 1.0}
    for density in DENSITIES:
        with apply_psa(model, preset, density=density, min_tokens=0) as psa:
            ms, extra = timed(prefill, repeats, device)
            stats = psa.stats()
        row = {"tokens": tokens, "method": f"psa-{stats.implementation}", "density": density, "ms": ms}
        row |= {"extra_gib": extra, "ratio": round(dense / ms, 3), "density_found": stats.density}
        yield row | {"fallbacks": stats.fallbacks}


def timed(call: Any, repeats: int, device: str) -> tuple[float, float | None]:
    """Median milliseconds, and GiB beyond the weights where that can be told."""
    if device == "cpu":
        start = perf_counter()
        call()
        return round(1e3 * (perf_counter() - start), 3), None
    ms, extra = measure(call, repeats)
    return round(ms, 3), round(extra, 3)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--layers", type=int, default=28, help="fewer take less memory and time")
    parser.add_argument("--preset", default="psa-auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU, which measures nothing of use")
    return parser.parse_args()


if __name__ == "__main__":
    main()
