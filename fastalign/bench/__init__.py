"""`fastalign bench` and what benchmarks/ imports: shapes, cases, and how they are measured."""

from fastalign.bench.command import main
from fastalign.bench.shapes import SHAPES

__all__ = ["SHAPES", "main"]
