"""What this copy of the package is: where its modules and its ops stand, and whether a compiled extension
belongs to it. hub/generate.py puts another file in this one's place, so that its copy lives beside an installed
fastalign in one process."""

PACKAGE = __name__.removesuffix(".runtime.identity")
NAMESPACE = "fastalign"  # torch.ops.<NAMESPACE>
NO_EXTENSION = ""  # why this copy comes without the compiled extension, if it does


def add_op_namespace_prefix(op: str) -> str:
    """The full name of an op."""
    return f"{NAMESPACE}::{op}"
