"""Ops over packed per-token scalars: segment sums, KL estimates, the pair and list losses forward and backward, advantages."""

OPS = ("sequence_sum", "kl_estimate", "preference_loss", "listwise_loss", "gae")


def test_packed(run_case):
    run_case()
