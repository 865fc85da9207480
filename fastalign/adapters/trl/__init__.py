"""fastalign in TRL: the functions of vocabulary rows that its trainers share. See docs/adapters.md."""

from __future__ import annotations

from typing import Any

from fastalign.adapters.common import Adapter, Report, Seam

__all__ = ["ADAPTER", "PackedDPOTrainer", "patch", "unpatch"]

ADAPTER = Adapter(
    trainer="trl",
    distribution="trl",
    versions=">=1.16,<1.17",
    seams=(
        Seam(
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction",
            "fastalign.adapters.trl.head:ChunkedLogProb",
            "fewer products where the logits fit 512 MiB or the head is frozen; logits are not rounded to bf16",
        ),
        Seam(
            "trl.trainer.utils:_use_triton",
            "fastalign.adapters.trl.head:scores_labelled_rows",
            "the head is given the labelled rows alone on the CPU too, as on a GPU",
            everywhere=False,
        ),
        Seam(
            "trl.kernels.chunked_divergence:ChunkedDivergenceFunction",
            "fastalign.adapters.trl.divergence:ChunkedDivergence",
            "beta 0 and 1 where both heads have the same scale and cap; TRL's own serves every other call",
        ),
        Seam(
            "trl.trainer.utils:selective_log_softmax",
            "fastalign.adapters.trl.rows:selective_log_softmax",
            "nothing as large as the logits is made but their gradient; sums are fp32, rounded once",
        ),
        Seam(
            "trl.trainer.utils:entropy_from_logits",
            "fastalign.adapters.trl.rows:entropy_from_logits",
            "the same; -inf logits have probability 0 instead of giving NaN; chunk_size has no effect",
        ),
        Seam(
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            "fastalign.adapters.trl.rows:selective_log_softmax_and_entropy",
            "both in one pass on every device",
        ),
    ),
    registers=("fastalign.adapters.trl.PackedDPOTrainer: a subclass of TRL's DPOTrainer, without a patch",),
)


def patch(*, untested: bool = False) -> Report:
    """Put ours in the place of TRL's functions: `Adapter.patch`."""
    return ADAPTER.patch(untested=untested)


def unpatch() -> None:
    """Take that back; without effect where nothing is patched."""
    ADAPTER.unpatch()


def __getattr__(name: str) -> Any:
    """`PackedDPOTrainer` is a subclass of TRL's, which is not imported before it is asked for."""
    if name == "PackedDPOTrainer":
        from fastalign.adapters.trl.packed import PackedDPOTrainer

        return PackedDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
