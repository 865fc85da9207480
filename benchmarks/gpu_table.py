"""What the GPU gate measures of the row kernels: one JSON line per case, on disk as soon as it is known.
Started by benchmarks/gpu_gate.py.

    gpu_table.py FILE table      ops x shapes x backends, results checked against fp64 on sampled rows; then the packed ops
    gpu_table.py FILE sweep      blocks per row (CUDA), threads and registers (Triton) at the first shape
    gpu_table.py FILE variant    the first shape alone, for an extension built otherwise (--extension, --label)
    gpu_table.py FILE profile    each op once, for a profiler that starts and stops with the CUDA profiler's range

After a CUDA error, which is for good in a process, or a case that does not answer, it starts itself again and
goes on with the next case: cases whose lines are in FILE are not repeated."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_lines import Lines, read_lines

SAMPLES = 15
CLUSTERS = (0, 1, 2, 4, 8)  # 0: the choice by row length
SWEPT = ("logprob", "logprob+entropy", "backward logprob", "kl", "backward kl", "fused kl", "fused logprob")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("mode", choices=("table", "sweep", "variant", "profile"))
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--label", default="", help="stands in every line")
    parser.add_argument("--extension", type=Path, help="this file as fastalign._C")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, to walk through everything on a CPU"
    )
    return parser.parse_args()


def load_extension(path: Path) -> None:
    """Before fastalign is imported: `path` is its compiled extension."""
    spec = importlib.util.spec_from_file_location("fastalign._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastalign._C"] = module


class Table:
    """Everything that needs torch."""

    def __init__(self, options: argparse.Namespace):
        import torch

        from fastalign.bench import measure, timing
        from fastalign.bench.shapes import SHAPES

        self.options, self.lines = options, Lines(options.file, options.mode, options.label)
        self.device, self.timer = torch.device(options.device), timing.Timer(torch.device(options.device))
        self.backends = options.backends.split(",")
        self.suite = SHAPES["tiny" if options.tiny else "cuda"]
        self.shapes = self.suite["token_logprobs"]
        size = 1 << 20 if options.tiny else measure.ceiling_bytes(self.device)
        reads, limits = (
            measure.read_bandwidth(self.device, size, rounds=5),
            measure.ceilings(self.device, size, rounds=5),
        )
        self.ceilings = {
            "copy_gbs": limits["copy_gbs"],
            "read_gbs": max(reads.values()),
            "matmul_tflops": limits["matmul_tflops"],
        }
        name = torch.cuda.get_device_name(self.device) if self.timer.cuda else "cpu"
        self.lines.emit(op="ceilings", **self.ceilings, buffer_bytes=size, device=name)

    def time(self, call: Callable[[], Any]) -> dict[str, float]:
        for _ in range(2):
            call()
        samples = [self.timer.seconds([call]) for _ in range(3 if self.options.tiny else SAMPLES)]
        return {"ms": 1e3 * statistics.median(samples), "best_ms": 1e3 * min(samples)}

    def bandwidth(self, traffic: float, ms: float) -> dict[str, float]:
        gbs = traffic / ms / 1e6
        return {
            "gbs": gbs,
            "of_copy": gbs / self.ceilings["copy_gbs"],
            "of_read": gbs / self.ceilings["read_gbs"],
        }

    def inputs(self, shape: Any) -> tuple[Any, ...]:
        """(logits, reference logits near them, labels [rows, 1], upstream gradients [rows])"""
        import torch

        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.empty(shape.rows, shape.vocab, dtype=torch.bfloat16, device=self.device).normal_(
            std=2.0, generator=generator
        )
        ref = torch.empty_like(x).normal_(std=0.3, generator=generator).add_(x)
        labels = torch.randint(shape.vocab, (shape.rows, 1), device=self.device, generator=generator)
        return x, ref, labels, torch.linspace(0.5, 1.5, shape.rows, device=self.device)

    def calls(self, x: Any, ref: Any, y: Any, g: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
        """name -> (passes over logits that the op cannot do without, the op alone: no autograd around it)"""
        from fastalign.ops.token_stats.contract import (
            OUTPUT_BITS,
            RowGradients,
            Rows,
            TokenStatsBwd,
            TokenStatsFused,
            TokenStatsFwd,
        )
        from fastalign.ops.token_stats.fused import token_stats_fused
        from fastalign.ops.token_stats.op import token_stats_bwd, token_stats_fwd
        from fastalign.rows.spec import LOG2E

        bit = OUTPUT_BITS
        logprob, both, kl = bit["logprob"], bit["logprob"] | bit["entropy"], bit["kl_policy_ref"]
        pair = logprob | bit["ref_logprob"] | kl
        every = sum(
            bit[name]
            for name in ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
        )

        def rows(labels: Any = None, other: Any = None) -> Rows:
            return Rows(x, other, labels, None, None, LOG2E, 0.0, 1.0, -100, 0, x.shape[1])

        def forward(outputs: int, other: Any = None) -> Any:
            return token_stats_fwd(TokenStatsFwd(rows(y, other), outputs, None, None))

        def backward(state: Any, rows: Rows, **upstream: Any) -> Callable[[], Any]:
            return lambda: token_stats_bwd(TokenStatsBwd(rows, state, RowGradients(**upstream)))

        def fused(rows: Rows, outputs: int, **upstream: Any) -> Callable[[], Any]:
            return lambda: token_stats_fused(TokenStatsFused(rows, outputs, RowGradients(**upstream)))

        state, pair_state = forward(both)[-2], forward(pair, ref)[-2]
        return {
            "logprob": (1, lambda: forward(logprob)),
            "logprob+entropy": (1, lambda: forward(both)),
            "all outputs": (1, lambda: forward(every)),
            "backward logprob": (2, backward(state, rows(y), g_logprob=g[:, None])),
            "backward logprob+entropy": (2, backward(state, rows(y), g_logprob=g[:, None], g_entropy=g)),
            "kl": (2, lambda: forward(kl, ref)),
            "logprobs+kl": (2, lambda: forward(pair, ref)),
            "backward kl": (3, backward(pair_state, rows(None, ref), g_kl_policy_ref=g)),
            "fused kl": (3, fused(rows(None, ref), kl, g_kl_policy_ref=g)),
            "fused logprob": (2, fused(rows(y), logprob, g_logprob=g[:, None])),
        }

    def check(self, x: Any, ref: Any, y: Any) -> dict[str, Any]:
        """Largest errors against fp64 on eight rows, each over what the house rule grants
        (`testing.assert_close`): above 1 is wrong."""
        import torch

        import fastalign as fa
        from fastalign import testing

        pick = torch.linspace(0, x.shape[0] - 1, 8, device=self.device).long()
        leaf = x.detach().requires_grad_()
        stats = fa.token_stats(leaf, y[:, 0], outputs=("logprob", "entropy"))
        (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), leaf)
        got = {
            "logprob": stats.logprob[pick],
            "entropy": stats.entropy[pick],
            "grad": grad[pick],
            "kl": fa.token_kl(x.detach(), ref)[pick],
        }
        truths = []
        for dtype in (torch.float64, torch.float32):
            rows, other = x.detach()[pick].to(dtype).requires_grad_(), ref[pick].to(dtype)
            want = testing.token_stats_truth(rows, y[pick, 0], dtype=dtype)
            (slope,) = torch.autograd.grad(want["logprob"].sum() + want["entropy"].sum(), rows)
            p, q = torch.log_softmax(rows.detach(), -1), torch.log_softmax(other, -1)
            truths.append(
                {
                    "logprob": want["logprob"].detach(),
                    "entropy": want["entropy"].detach(),
                    "grad": slope,
                    "kl": (p.exp() * (p - q)).sum(-1),
                }
            )
        truth, plain = truths
        line: dict[str, Any] = {}
        for name, value in got.items():
            line[name] = float((value.detach().double() - truth[name]).abs().max())
            scale = (
                torch.full_like(truth[name], max(1.0, float(truth[name].abs().max())))
                if name == "grad"
                else None
            )
            try:
                testing.assert_close(value.detach(), truth[name], plain[name], what=name, scale=scale)
            except AssertionError as error:
                line.setdefault("wrong", []).append(str(error)[:200])
        return line

    def measure_ops(
        self,
        shape: Any,
        inputs: tuple[Any, ...],
        backend: str,
        setting: str = "",
        only: tuple[str, ...] | None = None,
    ) -> None:
        """The lines of one backend at one shape."""
        import fastalign as fa

        with fa.use_backend(backend):
            calls: dict[str, tuple[int, Callable[[], Any]]] = {}
            with self.lines.case(op="states", shape=str(shape), backend=backend, setting=setting) as line:
                if line is not None:
                    self.calls(*inputs)
                    self.timer.synchronize()
            if not self.failed(op="states", shape=str(shape), backend=backend, setting=setting):
                calls = self.calls(*inputs)
            for op, (passes, call) in calls.items():
                if only is not None and op not in only:
                    continue
                with self.lines.case(op=op, shape=str(shape), backend=backend, setting=setting) as line:
                    if line is not None:
                        line |= self.time(call)
                        line |= self.bandwidth(passes * inputs[0].nbytes, line["ms"])

    def failed(self, **key: Any) -> bool:
        """Whether the line on disk tells of an error."""
        wanted = self.lines.key({**self.lines.common, **key})
        return any(
            self.lines.key(line) == wanted and "error" in line for line in read_lines(self.options.file)
        )

    # --- modes ----------------------------------------------------------------------------------------------

    def table(self) -> None:
        import torch

        import fastalign as fa

        for shape in self.shapes:
            inputs = x, ref, y, _ = self.inputs(shape)
            for backend in self.backends:
                with (
                    fa.use_backend(backend),
                    self.lines.case(op="check", shape=str(shape), backend=backend, setting="") as line,
                ):
                    if line is not None:
                        line |= self.check(x, ref, y)
                self.measure_ops(shape, inputs, backend)
            if shape == self.shapes[0]:
                plain = {
                    "F.cross_entropy": lambda x=x, y=y: torch.nn.functional.cross_entropy(
                        x, y[:, 0], reduction="none"
                    ),
                    "log_softmax.gather": lambda x=x, y=y: torch.log_softmax(x, -1).gather(-1, y),
                }
                for op, call in plain.items():
                    with self.lines.case(op=op, shape=str(shape), backend="torch", setting="") as line:
                        if line is not None:
                            line |= self.time(call)
                            line |= self.bandwidth(x.nbytes, line["ms"])
            del inputs, x, ref, y
        self.packed()

    def packed(self) -> None:
        """The ops on packed tokens as `fastalign bench` measures them, which checks them too; launch-bound
        ones as graph replays."""
        from fastalign.bench import measure
        from fastalign.bench.cases import make_case

        cache = 0 if self.options.tiny else measure.cache_bytes(self.device)
        for op in ("sequence_sum", "kl_estimate", "preference_loss", "listwise_loss", "policy_loss", "gae"):
            for shape in self.suite[op]:
                for backend in self.backends:
                    with self.lines.case(op=op, shape=str(shape), backend=backend, setting="") as line:
                        if line is None:
                            continue
                        case = make_case(
                            op, shape, self.device, backends=(backend,), compile=False, cache_bytes=cache
                        )
                        case.contestants = [c for c in case.contestants if c.kind in ("ours", "floor")]
                        found = measure.measure(
                            case,
                            self.device,
                            seconds=0.5,
                            least=3 if self.options.tiny else 10,
                            most=20,
                            memory=False,
                        )
                        ours = next(r for r in found if r.kind == "ours")
                        line |= {
                            k: v
                            for k, v in vars(ours).items()
                            if k in ("ms", "host_ms", "graph_ms", "error", "message") and v not in (None, "")
                        }
                        if "error" in line:
                            line["max_error"] = line.pop("error")
                        if ours.status != "ok":
                            line["error"] = f"{ours.status}: {ours.message}"[:300]
                        elif ours.ms:
                            line |= self.bandwidth(case.traffic, ours.graph_ms or ours.ms)
                        floor = next((r for r in found if r.kind == "floor" and r.ms), None)
                        if floor is not None:
                            line["floor_ms"] = floor.graph_ms or floor.ms

    def sweep(self) -> None:
        from fastalign.runtime import ffi

        shape = self.shapes[0]
        inputs = self.inputs(shape)
        for backend in self.backends:
            if backend == "cuda":
                for cluster in CLUSTERS:
                    ffi._extension.set_cluster_size(cluster)
                    self.measure_ops(shape, inputs, backend, f"cluster {cluster}", SWEPT)
                ffi._extension.set_cluster_size(0)
            elif backend == "triton":
                self.sweep_triton(shape, inputs)
            else:
                self.measure_ops(shape, inputs, backend, "", SWEPT)

    def sweep_triton(self, shape: Any, inputs: tuple[Any, ...]) -> None:
        from fastalign.ops.token_stats import triton as rows

        names = ("THREADS", "FWD_REGISTERS", "PAIR_FWD_REGISTERS", "BWD_REGISTERS", "PAIR_BWD_REGISTERS")
        own = {name: getattr(rows, name) for name in names}
        for threads in (own["THREADS"], 256, 64):
            for registers in ("own", "128", "none"):
                for name in names[1:]:
                    setattr(rows, name, {"own": own[name], "128": 128, "none": None}[registers])
                rows.THREADS = threads
                self.measure_ops(
                    shape, inputs, "triton", f"{threads} threads, registers {registers}", SWEPT[:5]
                )
        for name, value in own.items():
            setattr(rows, name, value)

    def variant(self) -> None:
        self.measure_ops(self.shapes[0], self.inputs(self.shapes[0]), self.backends[0])

    def profile(self) -> None:
        import torch

        import fastalign as fa

        shape = self.shapes[0]._replace(rows=min(self.shapes[0].rows, 4096))
        inputs = self.inputs(shape)
        for backend in self.backends:
            with fa.use_backend(backend):
                for op, (_, call) in self.calls(*inputs).items():
                    call()
                    self.timer.synchronize()
                    if self.timer.cuda:
                        torch.cuda.profiler.start()
                    call()
                    self.timer.synchronize()
                    if self.timer.cuda:
                        torch.cuda.profiler.stop()
                    self.lines.emit(op=op, shape=str(shape), backend=backend, setting="profiled")


def main() -> int:
    options = arguments()
    if options.extension is not None:
        load_extension(options.extension)
    table = Table(options)
    getattr(table, options.mode)()
    mine = [
        line
        for line in read_lines(options.file)
        if line.get("mode") == options.mode and line.get("label") == options.label
    ]
    wrong = [f"{line['op']}, {line.get('shape')}, {line.get('backend')}: {line.get('error') or line['wrong']}" for line in mine
             if "wrong" in line or ("error" in line and options.mode == "table")]  # fmt: skip
    print(
        "\n".join(["wrong or without a number:", *wrong]) if wrong else "every case has its number",
        flush=True,
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
