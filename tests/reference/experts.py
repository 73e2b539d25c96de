"""A mixture of experts by its definition, a token and an expert at a time, differentiated by torch's autograd."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def forward(x: Tensor, chosen: Tensor, weights: Tensor, experts: Sequence[tuple[Linear, Linear, Linear]]) -> Tensor:
    """Σ over the chosen experts of weight · down(silu(gate(x)) · up(x)), for each row of x."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for place in range(chosen.shape[1]):
            gate, up, down = experts[int(chosen[token, place])]
            g, u = gate(x[token : token + 1]), up(x[token : token + 1])
            total = total + weights[token, place] * down(g / (1 + torch.exp(-g)) * u)[0]
        rows.append(total)
    return torch.stack(rows)
