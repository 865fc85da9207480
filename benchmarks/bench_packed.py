"""Ops over packed per-token scalars: segment sums, KL estimates, pair, list and policy losses forward and
backward, advantages."""

OPS = ("sequence_sum", "kl_estimate", "preference_loss", "listwise_loss", "gae", "policy_loss")


def test_packed(run_case):
    run_case()
