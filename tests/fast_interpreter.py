"""Two thirds of an interpreted kernel's time go into one habit of Triton's interpreter: whenever a
@triton.jit function calls another, it searches all of triton.language for functions to replace, though the
launch has replaced them already. Here it searches once per module. And it runs a scan element by element;
here all elements combine at once, at distances 1, 2, 4, ..., as lanes of a warp do."""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter


def install():
    searched: set[int] = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in searched:
            searched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:  # as the interpreter itself reports whatever a kernel raises
            raise interpreter.InterpreterError(repr(error)) from error

    def scan(self, inputs):
        arrays, types = [x.handle.data.copy() for x in inputs], [x.dtype for x in inputs]
        assert self.axis == 0 and arrays[0].ndim == 1, "scans of one dimension only"
        distance = 1
        while distance < len(arrays[0]):
            earlier, later = (
                [self.to_tensor(x, t) for x, t in zip(part, types)]
                for part in ([np.roll(x, distance) for x in arrays], arrays)
            )
            for x, combined in zip(arrays, self.combine_fn.fn(*earlier, *later)):
                x[distance:] = combined.handle.data[distance:]
            distance *= 2
        return [self.to_tensor(x, t) for x, t in zip(arrays, types)]

    interpreter.InterpretedFunction.__call__ = call
    interpreter.ScanOps.generic_scan = scan
