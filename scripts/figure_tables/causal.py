"""Tables of causal calls of the operator."""

from __future__ import annotations

from figure_tables.source import Row, duration, find, load, machine, need, origin, table, times

CAUSAL = "benchmarks/causal"
DENSITIES = (0.35, 0.25, 0.15)
OURS = {
    f"psa-{rule}-{kind}": f"`{rule}`, {title}"
    for rule in ("count", "budget")
    for kind, title in (("hopper", "Hopper"), ("triton", "portable"))
}
PEERS, PEER = "benchmarks/causal-peers", "flexprefill"
TEXT = "total, last 512 dense"


def lengths() -> list[int]:
    return list(dict.fromkeys(row["tokens"] for row in load(CAUSAL)["rows"]))


def call(tokens: int, method: str, density: float = 1.0, stage: str = "total") -> Row:
    return need(CAUSAL, tokens=tokens, method=method, density=density, stage=stage)


def causal() -> str:
    """Sparse causal calls beside dense ones."""
    body = []
    for tokens in lengths():
        cudnn, fa3 = (call(tokens, method)["ms"] for method in ("sdpa-cudnn", "fa3"))
        first = [f"{tokens:,}", duration(cudnn), duration(fa3)]
        for method, title in OURS.items():
            cells = [times(call(tokens, method, density)["ms"], fa3) for density in DENSITIES]
            body.append([*first, title, *cells])
            first = ["", "", ""]
    head = ["tokens", "cuDNN dense", "FlashAttention-3 dense", "rule, kernel", *(f"density {d}" for d in DENSITIES)]
    return f"{table(head, body)}\n\n{_around()}\n\nOn {machine(CAUSAL)}, {origin(CAUSAL)}."


def flex_prefill() -> str:
    """FlexPrefill beside the rules of PSA, in one run: times, and errors on its random inputs."""
    body = []
    for tokens in dict.fromkeys(row["tokens"] for row in load(PEERS)["rows"] if row["method"] == PEER):
        dense = need(PEERS, tokens=tokens, method="fa3")["ms"]
        first = [f"{tokens:,}", duration(dense)]
        for method, title in ((PEER, "FlexPrefill"), *OURS.items()):
            rows = [find(PEERS, tokens=tokens, method=method, density=d, stage="total") for d in DENSITIES]
            if not all(rows):
                continue
            cells = [f"{times(row['ms'], dense)}, {row['error']:.2f}" for row in rows]
            body.append([*first, title, *cells, f"{max(row['extra_over_output'] for row in rows):.2f}"])
            first = ["", ""]
    head = ["tokens", "FlashAttention-3 dense", "method", *(f"density {d}" for d in DENSITIES), "extra memory, outputs"]
    return f"{table(head, body)}\n\nOn {machine(PEERS)}, {origin(PEERS)}."


def _around() -> str:
    """What text at the end adds to a call, and memory."""
    cases = [(tokens, method, density) for tokens in lengths() for method in OURS for density in DENSITIES]
    rows = [(call(*case), call(*case, stage=TEXT)) for case in cases]
    most = max(with_text["ms"] / whole["ms"] - 1 for whole, with_text in rows)
    extra = [whole["extra_over_output"] for whole, _ in rows]
    return (
        f"With the last 512 tokens dense, as text after a video, they take up to {100 * most:.0f} % longer. Beyond\n"
        f"the output a call takes {min(extra):.2f} to {max(extra):.2f} of the output's memory."
    )


def understanding() -> str:
    """The one figure of README on understanding."""
    tokens = max(lengths())
    dense, sparse = call(tokens, "fa3")["ms"], call(tokens, "psa-count-hopper", 0.15)["ms"]
    return (
        f"The attention of one layer of Qwen2.5-VL-7B over {tokens:,} tokens takes {times(sparse, dense)} at density\n"
        f"0.15, and {duration(dense)} with FlashAttention-3, on {machine(CAUSAL)}."
    )
