"""Ops over vocabulary rows: log-probs, log-probs with entropy, log-probs with backward in place."""

OPS = ("token_logprobs", "token_logprobs_entropy", "token_logprobs_backward", "token_kl", "token_kl_loss")


def test_rows(run_case):
    run_case()
