"""What is trained on top of a causal LM's hidden states."""

from __future__ import annotations

import torch


class ValueHead(torch.nn.Module):
    """One value per hidden state, in float32 whatever the model computes in. It starts at 0 everywhere: no value is better than a random one."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> values [...]."""
        return self.linear(hidden.float()).squeeze(-1)
