"""The autoencoder's 3-D convolutions as 2-D ones over stacked frames, for training: several times faster on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d


@contextmanager
def frame_convolutions() -> Iterator[None]:
    """Within it every WanCausalConv3d computes the same function with `_forward`."""
    original = WanCausalConv3d.forward
    WanCausalConv3d.forward = _forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = original


def _forward(self: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, channels, frames, height, width] as ever; the frames a kernel spans become its input channels.

    cuDNN is at its best with 2-D convolutions whose channels come last in memory, so both ends stay that way.
    """
    past = self._padding[4]
    if cache_x is not None and past > 0:
        x = torch.cat([cache_x, x], dim=2)
        past -= cache_x.shape[2]
    span, stride = self.kernel_size[0], self.stride[0]
    frames = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, past, 0))
    count = (frames.shape[1] - span) // stride + 1
    last = (count - 1) * stride + 1
    stacked = torch.cat([frames[:, k : k + last : stride] for k in range(span)], dim=-1)
    output = F.conv2d(
        stacked.flatten(0, 1).permute(0, 3, 1, 2),
        self.weight.permute(0, 2, 1, 3, 4).flatten(1, 2),
        self.bias,
        stride=self.stride[1:],
        padding=(self._padding[2], self._padding[0]),
    )
    return output.unflatten(0, (x.shape[0], count)).transpose(1, 2)
