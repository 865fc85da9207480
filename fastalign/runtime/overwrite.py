"""Writing a gradient over a tensor of the graph: refused where it would destroy what the user owns, done only
where nobody else can read it.

What makes it safe is checked at the moment of writing, not promised by the caller:

1. Nobody else has the memory. A tensor that shares it (a view, `detach()`, `.data`, a parameter, a producer
such as tanh or softmax that saved its
   output, whatever saved-tensor hooks packed) is one more user of the storage, and storages count their
   users; autograd itself adds gradients in place by the same test. Memory that came from elsewhere (NumPy,
   DLPack, shared memory) has users that are not counted, and is never overwritten. Where there is another
   user, the gradient gets memory of its own.
2. Nobody reads it later through the tensor itself. Its version counter moves, so that autograd raises where
another function saved it; and since
   torch does not look at versions under saved-tensor hooks, nor in a closure that a checkpoint runs again,
   the tensor is emptied: its last dim becomes 0, and any use of it fails.
"""

from __future__ import annotations

import gc
import sys
import warnings

import torch
from torch import Tensor

from fastalign.runtime import ffi

_warned = False


def check_overwritable(tensor: Tensor, name: str) -> None:
    """What `name`=True refuses at once: leaves (parameters, inputs; also as views) and memory that overlaps
    itself."""
    owner = tensor._base if tensor._is_view() else tensor
    if tensor.requires_grad and (tensor.is_leaf or (owner.is_leaf and owner.requires_grad)):
        raise ValueError(
            f"{name}=True would overwrite a leaf tensor; pass the output of a layer, or leave it False"
        )
    if _self_overlapping(tensor):
        raise ValueError(
            f"{name}=True needs logits whose rows do not share memory (expanded or overlapping views cannot "
            "be written)"
        )


def _self_overlapping(tensor: Tensor) -> bool:
    """True if two elements may share an address (stride 0, or strides that do not nest)."""
    span = 1
    for stride, size in sorted((st, sz) for sz, st in zip(tensor.shape, tensor.stride()) if sz != 1):
        if stride < span:
            return True
        span = stride * size
    return False


# Private, and in some builds of older versions of torch only there with CUDA.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _users(storage: torch.UntypedStorage) -> tuple[int, int] | None:
    """(tensors and others that hold the storage, references to its Python object): constants for a storage of
    one tensor. None: not known."""
    return None if _use_count is None else (_use_count(storage._cdata), sys.getrefcount(storage))


_one = torch.empty(1)
_users_of_one = _users(_one.untyped_storage())


def is_ours_alone(tensor: Tensor) -> bool:
    """Whether no tensor but this one (and the base that it is a view of) uses its memory. False for tensor
    subclasses and under the compiler, and where torch does not tell."""
    if _use_count is None or torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    users, references = _users(tensor.untyped_storage())
    if (
        ffi.TRITON_INTERPRETED and references > _users_of_one[1]
    ):  # the interpreter leaves storages in cycles of dead objects
        gc.collect()
        users, references = _users(tensor.untyped_storage())
    if tensor._is_view() and tensor._base.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
        users -= 1
    if (users, references) != _users_of_one:
        return False
    storage = tensor.untyped_storage()
    return storage.resizable() and not (tensor.device.type == "cpu" and storage.is_shared())


def may_overwrite(tensor: Tensor, name: str) -> bool:
    """Whether a gradient may be written over `tensor`; where not, `name` saves no memory, which is said
    once."""
    global _warned
    if is_ours_alone(tensor):
        return True
    if not (_warned or torch.compiler.is_compiling()):
        _warned = True
        why = "something else shares the memory of the logits (a slice or detached copy of them that is still held, a layer that saved its output, "
        why += "saved-tensor hooks)"
        if _use_count is None:
            why = f"torch {torch.__version__} does not tell who shares the memory of the logits"
        warnings.warn(
            f"fastalign: {name}=True saved no memory: {why}, so the gradient got memory of its own",
            stacklevel=2,
        )
    return False


def retire(tensor: Tensor) -> None:
    """Take the memory away from a tensor, and from the base that it is a view of: what it held is gone, and
    nobody may take the gradient for it."""
    torch.autograd.graph.increment_version(tensor)
    for x in (tensor._base, tensor) if tensor._is_view() else (tensor,):
        x.data = x.new_empty((*x.shape[:-1], 0))
