"""Two thirds of an interpreted kernel's time go into one habit of Triton's interpreter: whenever a @triton.jit function calls another, it searches
all of triton.language for functions to replace, though the launch has replaced them already. Here it searches once per module."""

from __future__ import annotations

from triton.runtime import interpreter


def install():
    searched: set[int] = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in searched:
            searched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
