"""Muon: momentum whose update is orthogonalised, for weight matrices and convolution kernels.

Keller Jordan, https://kellerjordan.github.io/posts/muon (2024).
"""

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Takes matrices [out, in] and kernels [out, in, ...], seen as [out, the rest]; those of one shape go together."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._step_together(parameters, group["lr"], group["momentum"])

    def _step_together(self, parameters: list[torch.Tensor], lr: float, momentum: float) -> None:
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[p].setdefault("average", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        nesterov = torch._foreach_lerp(gradients, averages, momentum)
        matrices = torch.stack(nesterov).flatten(2)
        updates = orthogonalised(matrices) * max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
        updates = updates.to(parameters[0].dtype).view(-1, *parameters[0].shape)
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-lr)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Roughly U V^T of each matrix [n, rows, columns] = U S V^T, by a quintic Newton-Schulz iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
