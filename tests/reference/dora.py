"""DoRA by its equation (arXiv 2402.09353), dense, in fp64, differentiated by torch's autograd."""

import torch
from torch import Tensor


def forward(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """x · (m ⊙ V/‖V‖)ᵀ + bias, the norm a constant for the gradient (section 4.3); no magnitude means LoRA.

    A row of V that is zero has no direction: it is left as it is (its output is 0), and scaled by 1 for the gradient.
    """
    V = W + scaling * (B @ A)
    if magnitude is not None:
        norm = V.detach().norm(dim=1)
        unit = torch.where(norm > 0, 1 / norm.clamp(min=1e-300), 0.0)
        V = torch.where((norm > 0)[:, None], (magnitude * unit)[:, None] * V, V)
    y = x @ V.t()
    return y if bias is None else y + bias
