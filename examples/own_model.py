"""The bare operator in somebody's own model: no diffusers, no pipeline, one call in place of torch's.

python examples/own_model.py
"""

import torch
import torch.nn.functional as F
import typer

from psa_kernels import AttentionSpec, psa_attention


class VideoSelfAttention(torch.nn.Module):
    """Self-attention over the tokens of a video, `[batch, tokens, width]`; dense while `spec` is None."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = torch.nn.Linear(width, 3 * width)
        self.to_out = torch.nn.Linear(width, width)
        self.spec: AttentionSpec | None = None
        self.density = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [batch, tokens, heads, head_dim], with a last stride of 1; the other strides are free.
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).chunk(3, dim=-1))
        if self.spec is None:
            dense = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            out = dense.transpose(1, 2)
        else:
            out, stats = psa_attention(q, k, v, self.spec, return_stats=True)
            self.density = float(stats.density.mean())
        return self.to_out(out.flatten(-2))


@torch.inference_mode()  # the operator has no gradient
def main(tokens: int = 4096, width: int = 256, heads: int = 4, device: str = "cpu") -> None:
    torch.manual_seed(0)
    layer = VideoSelfAttention(width, heads).to(device)
    x = torch.randn(1, tokens, width, device=device)
    dense = layer(x)
    everything = AttentionSpec(levels=(1,), thresholds=(1.0,))
    for name, spec in {"the default": AttentionSpec(), "all blocks in full": everything}.items():
        layer.spec = spec
        error = float((layer(x) - dense).norm() / dense.norm())
        print(f"{name}: density {layer.density:.3f}, relative error {error:.2e}")


if __name__ == "__main__":
    typer.run(main)
