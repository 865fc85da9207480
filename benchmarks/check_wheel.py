"""What check_wheel.sh runs where the wheel was installed: it is that installation, no compiler is in sight, and
ops and their gradients on the C++ kernels are those of plain PyTorch."""

from __future__ import annotations

import shutil
import sysconfig
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

found = [name for name in ("g++", "gcc", "cc", "c++", "clang", "nvcc", "ninja") if shutil.which(name)]
assert not found, f"a compiler is on PATH: {found}"
with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*compiled extension")
    import fastalign as fa

assert Path(fa.__file__).is_relative_to(sysconfig.get_path("purelib")), fa.__file__
assert fa.backends()["cpu"] == "available", fa.backends()["cpu"]

torch.manual_seed(0)
logits, labels = torch.randn(9, 1000, requires_grad=True), torch.arange(9)
upstream = torch.linspace(-1.0, 1.0, 9)
with fa.use_backend("cpu"):
    found = fa.token_logprobs(logits, labels)
    wanted = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits, upstream)[0] for x in (found, wanted)), rtol=1e-5, atol=1e-6
    )
    cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    ref = found.detach() + 0.1
    difference = (found - ref)[:5].sum() - (found - ref)[5:].sum()
    torch.testing.assert_close(
        fa.preference_loss(found, ref, cu_seqlens, loss="dpo", beta=0.1).loss, -F.logsigmoid(0.1 * difference)
    )
    out = fa.gae(torch.ones(9), torch.zeros(9), cu_seqlens, gamma=1.0, lam=1.0)
    torch.testing.assert_close(out.advantages, torch.tensor([5.0, 4, 3, 2, 1, 4, 3, 2, 1]))
print(f"fastalign {fa.__version__} beside torch {torch.__version__}: {fa.backends()}")
