"""What a call of the fused head takes beyond its inputs and gradients, on a process of its own: its
workspace, whatever rows and vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BUDGET_MIB, SLACK_MIB = 64, 64
PROGRAM = """
import json, sys, torch, fastalign as fa
budget, frozen, loss = int(sys.argv[1]) << 20, sys.argv[2] == "frozen", sys.argv[3]

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def step(hidden, labels):
    rows = len(labels)
    if loss == "logprobs":
        return (fa.linear_token_logprobs(hidden, weight, labels, workspace_bytes=budget) * torch.linspace(-1, 1, rows)).sum()
    cu = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    return fa.linear_preference_loss(hidden, weight, labels, cu, ref_logprobs=torch.zeros(rows), workspace_bytes=budget).loss

torch.manual_seed(0)
weight = (torch.randn(32768, 64) * 0.2).requires_grad_(not frozen)
found = []
for rows in (64, 2048, 8192):  # the first call is for what libraries keep
    hidden, labels = torch.randn(rows, 64).requires_grad_(), torch.randint(32768, (rows,))
    weight.grad = None
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    step(hidden, labels).backward()
    gradients = sum(x.grad.numel() * 4 for x in (hidden, weight) if x.grad is not None) / 2**20
    found.append(peak() - before - gradients)
print(json.dumps(found[1:]))
"""


@pytest.mark.parametrize(("head", "loss"), [("frozen", "logprobs"), ("trained", "preference")])
def test_peak_is_the_workspace(head, loss):  # A1, A3, A4
    """All logits of the larger call would take 1 GiB. The one pair of the preference loss is longer than what
    fits at a time."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(BUDGET_MIB), head, loss], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert max(few, many) <= BUDGET_MIB + SLACK_MIB, (few, many)
    assert many <= few + 24, (few, many)
