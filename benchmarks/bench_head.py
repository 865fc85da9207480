"""The fused head: log-probs from hidden states and the head's weight, forward, backward, and with a frozen
head."""

from fastalign.bench.shapes import HEAD_OPS

OPS = HEAD_OPS


def test_head(run_case):
    run_case()
