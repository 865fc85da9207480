"""Distributions renormalised over a support, on every backend of the row kernels. More of it, on the CPU, in
tests/rows/test_support.py."""

from __future__ import annotations

import pytest
import torch
from checks.support import check_logprobs_at, check_token_stats, check_two_models

CAPPED = {"softcap": 4.0, "logit_scale": 1.25, "temperature": 0.8}


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "logit_scale": 0.5}, CAPPED], ids=["plain", "scaled", "capped"]
)
def test_token_stats(backend, device, options):
    check_token_stats(device, **options)


def test_token_stats_of_half_precision(backend, device):
    check_token_stats(device, torch.float16 if backend == "cuda" else torch.bfloat16)


def test_two_models(backend, device):
    check_two_models(device)


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_logprobs_at(backend, device, options):
    check_logprobs_at(device, **options)
