"""Ops over packed per-token scalars: segment sums, KL estimates, the preference loss forward and backward, advantages."""

OPS = ("sequence_sum", "kl_estimate", "preference_loss", "gae")


def test_packed(run_case):
    run_case()
