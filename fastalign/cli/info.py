"""`fastalign info`: versions, how the extension was built, the machine, and which backend serves which op,
with the reason where not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import fastalign
from fastalign.cli.console import Parser, table
from fastalign.runtime import ffi
from fastalign.runtime.backends import BACKENDS, why_not
from fastalign.runtime.op import OPS

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def main(argv: list[str]) -> int:
    parser = Parser(prog="fastalign info", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print only the op x backend table of the README, as it is on any machine",
    )
    if parser.parse_args(argv).markdown:
        print(table_markdown())
        return 0
    for title, facts in (("versions", versions()), ("extension", extension()), ("machine", machine())):
        print(f"{title}:")
        width = max(map(len, facts))
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items()) + "\n")
    print(availability())
    return 0


def versions() -> dict[str, str]:
    """name -> version, "not installed" for what is missing."""
    found = {
        "fastalign": fastalign.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        transformers = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers = "not installed"
    return found | {"triton": ffi.triton_version or "not installed", "transformers": transformers}


def extension() -> dict[str, Any]:
    """Build flags of fastalign._C, and the instruction set that its CPU kernels use here."""
    info = ffi.build_info()
    if not info:
        return {"fastalign._C": why_not("cpu", "cpu")}
    facts = {
        "version": info["version"],
        "compiler": info["compiler"],
        "CPU kernels": "yes" if info["cpu"] else "no",
    }
    if info["cpu"]:
        facts["instruction set"] = f"{info['cpu_isa']} (of {', '.join(info['cpu_isas'])})"
    facts["CUDA kernels"] = (
        f"yes, for {info['cuda_archs']}, by {info['cuda_compiler']}" if info["cuda"] else "no"
    )
    return facts


def machine() -> dict[str, Any]:
    """The processor, torch's threads, and the CUDA or ROCm devices."""
    facts: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if not torch.cuda.is_available():
        return facts | {"GPU": "none that torch can use"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        level = device.gcnArchName if torch.version.hip else f"sm_{device.major}{device.minor}"
        facts[f"GPU {i}"] = f"{device.name}, {level}, {device.total_memory / 2**30:.0f} GiB"
    return facts


def _processor() -> str:
    """The CPU's name where the system tells it, and torch's view of its instruction set."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
            )
    except OSError:
        name = ""
    return f"{name or platform.processor() or 'unknown'} ({torch.backends.cpu.get_cpu_capability()})"


def availability() -> str:
    """The table op x backend on this machine: the devices whose tensors a backend serves, or the number of
    the reason below the table. `*` marks the backend that is chosen on its device for fp32."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    here = fastalign.backends()
    reasons: list[str] = []
    rows = []
    for name, op in OPS.items():
        row = [name]
        for backend in BACKENDS:
            served, why = [], "" if here[backend] == "available" else here[backend]
            for device in devices:
                tensor = torch.empty(0, device=device)
                declined = op.why_not(backend, tensor)
                if declined is None:
                    served.append(device + "*" * (_chosen(name, tensor) == backend))
                else:
                    why = why or declined
            if not served and why not in reasons:
                reasons.append(why)
            row.append(", ".join(served) or f"no [{reasons.index(why) + 1}]")
        rows.append(row)
    notes = ["* chosen for fp32", *(f"[{i}] {reason}" for i, reason in enumerate(reasons, start=1))]
    return "\n".join([table(["op", *BACKENDS], rows), "", *notes])


def _chosen(name: str, tensor: torch.Tensor) -> str:
    """The backend that `explain` names."""
    return fastalign.explain(name, tensor).splitlines()[0].rpartition(": ")[2]


def table_markdown() -> str:
    """The table op x backend of the README: which storage types each backend takes. The same on every
    machine."""
    rows = [
        [f"`{name}`", *(" ".join(_SHORT[dtype] for dtype in op.takes(backend)) for backend in BACKENDS)]
        for name, op in OPS.items()
    ]
    return table(["op", *BACKENDS], rows)
