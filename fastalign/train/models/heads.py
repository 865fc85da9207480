"""What is trained on top of a causal LM's hidden states."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastalign.train.errors import UserError


class ValueHead(torch.nn.Module):
    """One value per hidden state, in float32 whatever the model computes in. It starts at 0 everywhere: no
    value is better than a random one."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = torch.nn.Linear(hidden_size, 1)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] -> values [...]."""
        return self.linear(hidden.float()).squeeze(-1)

    def load_beside(self, directory: str | Path, method: str) -> bool:
        """Take over the head that a run of `method` saved beside its model; False where there is none, or it
        is another method's (whose values are of something else). A head of another size, or a file that is
        none, raises UserError."""
        path, record = Path(directory) / "value_head.safetensors", Path(directory) / "train_config.json"
        if not (path.is_file() and record.is_file()):
            return False
        try:
            if json.loads(record.read_text(encoding="utf-8")).get("method") != method:
                return False
            self.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: not a value head for this model ({str(error).splitlines()[0]})"
            ) from None
        return True
