"""Muon: momentum whose update is orthogonalised, for a network's matrices and convolutions.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the scale of arXiv:2502.16982, so that
one learning rate serves it and AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_UPDATE_RMS = 0.2  # of AdamW's updates, typically


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay, used as torch's optimizers are."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters [out, ...]; all axes but the first are one side of a matrix."""
        self._parameters = list(parameters)
        self._averages = [torch.zeros_like(parameter) for parameter in self._parameters]
        self.param_groups = [{"lr": lr, "momentum": momentum, "weight_decay": weight_decay}]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        group = self.param_groups[0]
        with torch.no_grad():
            for parameter, average in zip(self._parameters, self._averages, strict=True):
                if parameter.grad is None:
                    continue
                average.lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"])
                matrix = direction.reshape(len(direction), -1)
                update = orthogonalize(matrix) * (_UPDATE_RMS * max(matrix.shape) ** 0.5)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the momenta, for a checkpoint."""
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the momenta of a checkpoint."""
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return about U V^T of the matrix's singular value decomposition, by Newton and Schulz."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Tell whether Muon suits a parameter: hidden matrices, not embeddings, input or output."""
    ends = ("embed", "conv_in", "conv_out", "head.")
    return parameter.ndim >= 2 and not any(end in name for end in ends)
