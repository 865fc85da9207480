"""The names of fastalign/ops/columns.py as kernels read them: the only globals that Triton lets a kernel read
are constexpr."""

import triton.language as tl

from fastalign.ops import columns

globals().update(
    {
        name: tl.constexpr(value)
        for name, value in vars(columns).items()
        if name.isupper() and isinstance(value, int)
    }
)
