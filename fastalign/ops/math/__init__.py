"""The formulas of csrc/math as @triton.jit functions."""
