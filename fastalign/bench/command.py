"""`fastalign bench`: every op against plain PyTorch, torch.compile and other packages on this machine, as a
table, JSON and a plot."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastalign.bench import side_by_side
from fastalign.bench.cases import make_case
from fastalign.bench.measure import (
    Result,
    add_bandwidth,
    add_floor,
    cache_bytes,
    ceiling_bytes,
    ceilings,
    measure,
    read_bandwidth,
)
from fastalign.bench.shapes import OPS, PEER_OPS, STEP_OPS, shapes_of
from fastalign.cli.console import Parser, table
from fastalign.runtime import backends

# Seconds of timing per case, samples at least and at most.
EFFORT = {
    "cpu": (8.0, 5, 50),
    "cpu-quick": (1.5, 3, 20),
    "cuda": (5.0, 20, 100),
    "cuda-quick": (2.0, 20, 50),
    "tiny": (0.0, 2, 2),
}
HOW = (
    "ms: median of calls taken in turns with the other lines', on rotating inputs. GB/s: the op's least "
    "traffic (each input read once, each result "
    "written once) over that time; of read: of the bandwidth at which this machine merely reads the same "
    "bytes, in the same run; of floor: of the time that the last line's bare work takes. max error: "
    "against fp64 on sampled rows; a line that is not right gets no time. extra MB: peak memory of one call "
    "beyond its inputs. CPU samples that carry "
    "page faults or system time which are not the op's (the system took memory away in between) are set "
    "aside. On a GPU ms is the device's time alone; "
    "graph ms, where a call is launch-bound, that of a call in a replayed graph, and host ms the host's time "
    "to issue one."
)


def main(argv: list[str]) -> int:
    """0: done; 1: a result of fastalign was wrong; 2: a wrong option."""
    parser = Parser(prog="fastalign bench", description=__doc__.split(":", 1)[1].strip(), allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="small shapes: half a minute instead of up to three"
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=(*OPS, *STEP_OPS),
        metavar="OP",
        help=f"only this op (repeatable): {', '.join((*OPS, *STEP_OPS))}",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="the side by side with torch.compile, TRL, verl, Liger and cut-cross-entropy, as far as they are installed: "
        f"{', '.join(PEER_OPS)}, and a table of the fastest of them for each",
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=backends.BACKENDS,
        metavar="NAME",
        help="only this backend of fastalign (repeatable); default: all that can serve the call, the reference only where it is alone",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one"
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="without torch.compile's lines, which take most of the time on a GPU",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers to FILE, after every case"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times to FILE (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
    for name in arguments.backend or ():
        if why := backends.why_not(name, device.type):
            parser.error(f"--backend {name}: {why}")
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"the directory of {path} does not exist")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {arguments.plot}: the name must end in .png, .svg or .pdf")

    ops = arguments.op or (PEER_OPS if arguments.peers else OPS)
    if {*ops} & {*STEP_OPS} and importlib.util.find_spec("transformers") is None:
        parser.error(
            f"{' and '.join(STEP_OPS)} need transformers, which is not installed: pip install 'fastalign[peers]'"
        )

    report = run(
        f"{device.type}-quick" if arguments.quick else device.type,
        device,
        ops,
        peers=arguments.peers,
        backends=tuple(arguments.backend) if arguments.backend else None,
        compile=not arguments.no_compile,
        save=arguments.json,
    )
    if arguments.plot is not None:
        plot(report, arguments.plot)
    return 1 if report["failures"] else 0


def run(
    suite: str,
    device: torch.device,
    ops: Sequence[str],
    *,
    backends: tuple[str, ...] | None = None,
    compile: bool = True,
    peers: bool = False,
    save: Path | None = None,
    show: Any = print,
) -> dict[str, Any]:
    """Measure `ops` at the shapes of `suite`, print every table as it is ready, and return what is written to
    `save` after every case (until the last, without "seconds"). peers: with the tables of side_by_side.py."""
    started, load = time.perf_counter(), _load()
    seconds, least, most = EFFORT[suite]
    size = 1 << 20 if suite == "tiny" else ceiling_bytes(device)
    speeds, limits = read_bandwidth(device, size), ceilings(device, size)
    machine_gbs = max(speeds.values())
    report: dict[str, Any] = {
        "suite": suite,
        "machine": describe(device),
        "read_gbs": speeds,
        "ceilings": limits,
        "cases": [],
        "failures": [],
    }
    show(
        f"{report['machine']['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"reads {machine_gbs:.1f} GB/s "
        f"({', '.join(f'{name} {speed:.1f}' for name, speed in speeds.items())}), copies "
        f"{limits['copy_gbs']:.1f} GB/s (read + written), bf16 matmul {limits['matmul_tflops']:.2f} "
        f"TFLOP/s\n{HOW}\n"
    )
    for op in ops:
        for shape in shapes_of(suite, op):
            case = make_case(
                op,
                shape,
                device,
                backends=backends,
                compile=compile,
                cache_bytes=0 if suite == "tiny" else cache_bytes(device),
            )
            results = measure(case, device, seconds=seconds, least=least, most=most)
            gbs = add_bandwidth(case, results, machine_gbs)
            add_floor(results)
            report["cases"].append(
                {
                    "op": op,
                    "shape": str(shape),
                    "traffic_bytes": case.traffic,
                    "read_gbs": gbs,
                    "results": [result.as_dict() for result in results],
                }
            )
            report["failures"] += [
                f"{op} {shape}: {r.name}: {r.message}"
                for r in results
                if r.kind == "ours" and r.status in ("wrong", "n/a")
            ]
            show(f"{op}, {shape}\n{render(results)}\n")
            _save(report, save)
            del case
    report["seconds"] = time.perf_counter() - started
    report["load_average"] = {"start": load, "end": _load()}
    if peers:
        report["side_by_side"] = side_by_side.rows(report)
        show(f"{side_by_side.render(report)}\n")
    _save(report, save)
    for failure in report["failures"]:
        print(f"fastalign bench: {failure}", file=sys.stderr)
    show(
        f"took {report['seconds']:.0f} s; load average {load} at the start, {report['load_average']['end']} "
        "at the end (own threads included)"
    )
    return report


def _save(report: dict[str, Any], path: Path | None) -> None:
    """All of it or nothing of it: a run that is killed leaves the cases before."""
    if path is not None:
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    import fastalign
    from fastalign.cli import info

    facts = {**info.versions(), **info.machine(), "extension": info.extension(), "cores": os.cpu_count()}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["processor"]
    facts["backends"] = fastalign.backends()
    return facts


def _load() -> float | None:
    """Runnable processes, the average of the last minute; on a busy machine ratios still mean something,
    times do not."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def render(results: list[Result]) -> str:
    """The table of one case; `x` is the time relative to the first line of ours. Below it, the samples that
    were set aside."""
    own = next((r.ms for r in results if r.kind == "ours" and r.ms), None)
    graphs = any(r.graph_ms is not None for r in results)
    rows = []
    for r in results:
        if r.ms is None:
            rows.append(
                [r.name, r.status if r.status != "ok" else "n/a", "", "", "", "", "", r.message[:90]]
                + ["", ""] * graphs
            )
            continue
        rows.append(
            [
                r.name,
                f"{r.ms:.3f}",
                f"{r.ms / own:.2f}" if own else "",
                "" if r.gbs is None else f"{r.gbs:.1f}",
                "" if r.share is None else f"{r.share:.0%}",
                "" if r.floor is None else f"{r.floor:.0%}",
                "" if r.error is None else f"{r.error:.1e}",
                "" if r.extra_mb is None else f"{r.extra_mb:.1f}",
                *[f"{ms:.4f}" if ms is not None else "" for ms in (r.graph_ms, r.host_ms) if graphs],
            ]
        )
    lines = [
        table(
            ["", "ms", "x", "GB/s", "of read", "of floor", "max error", "extra MB"]
            + ["graph ms", "host ms"] * graphs,
            rows,
        )
    ]
    if aside := [f"{r.set_aside} of {r.set_aside + r.samples} of {r.name}" for r in results if r.set_aside]:
        lines.append(f"set aside for page faults or system time of the machine: {', '.join(aside)}")
    if (attempts := max((r.attempts for r in results), default=1)) > 1:
        lines.append(
            f"most samples of a line were disturbed {attempts - 1} times: timing was begun {attempts} times, "
            "and the last counts"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """One panel per case: the times as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = report["cases"]
    heights = [0.6 + 0.3 * sum(r["ms"] is not None for r in case["results"]) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(9, sum(heights) + 0.5),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    colours = {
        "ours": "tab:red",
        "ours in another way": "lightcoral",
        "read": "tab:grey",
        "floor": "lightgrey",
        "eager": "tab:blue",
        "compiled": "tab:cyan",
        "peer": "tab:green",
    }
    for axis, case in zip(axes[:, 0], cases):
        timed = [r for r in case["results"] if r["ms"] is not None][::-1]
        shown = [
            "ours in another way" if r["kind"] == "eager" and r["name"].startswith("fastalign") else r["kind"]
            for r in timed
        ]
        bars = axis.barh(
            [r["name"] for r in timed], [r["ms"] for r in timed], color=[colours[kind] for kind in shown]
        )
        axis.bar_label(
            bars,
            labels=[f"{r['ms']:.3g}" if r["ms"] < 100 else f"{r['ms']:.0f}" for r in timed],
            padding=3,
            fontsize=8,
        )
        axis.margins(x=0.1)
        axis.set_title(f"{case['op']}, {case['shape']}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel(f"ms, {report['machine']['device']}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
