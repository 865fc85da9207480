"""The shapes that are measured: the one list behind `fastalign bench`, benchmarks/ and the GPU gate."""

from __future__ import annotations

from typing import NamedTuple


class Rows(NamedTuple):
    """Logits [rows, vocab] in `dtype`."""

    rows: int
    vocab: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.rows} x {self.vocab} {self.dtype}"


class Pairs(NamedTuple):
    """`pairs` preference pairs whose sequences have `length` tokens each: 2 * pairs * length packed tokens,
    fp32."""

    pairs: int
    length: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs x 2 x {self.length} tokens float32"


class Sequences(NamedTuple):
    """`sequences` packed sequences of `length` tokens each, fp32."""

    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length} tokens float32"


class Head(NamedTuple):
    """Hidden states [rows, hidden] and a head's weight [vocab, hidden] in `dtype`."""

    rows: int
    hidden: int
    vocab: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} x {self.vocab} {self.dtype}"


class Step(NamedTuple):
    """A training step on `sequences` responses of up to `length` tokens with their prompts, of a random Llama."""

    sequences: int
    length: int
    layers: int
    hidden: int
    vocab: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences of up to {self.length} tokens, {self.layers} layers x {self.hidden}, "
            f"vocabulary {self.vocab}, {self.dtype}"
        )


PACKED_OPS = ("sequence_sum", "preference_loss", "listwise_loss", "kl_estimate")


Shape = Rows | Pairs | Sequences | Head | Step


HEAD_OPS = ("linear_token_logprobs", "linear_token_logprobs_backward", "linear_token_logprobs_frozen")


def _suite(
    forward: tuple[Rows, ...],
    backward: tuple[Rows, ...],
    kl: tuple[Rows, ...],
    packed: tuple[Pairs, ...],
    rollout: tuple[Sequences, ...],
    head: tuple[Head, ...],
) -> dict[str, tuple[Shape, ...]]:
    rows = {
        "token_logprobs": forward,
        "token_logprobs_entropy": forward[:1],
        "token_logprobs_backward": backward,
    }
    minibatch = tuple(s._replace(length=min(s.length, 1024)) for s in rollout[:1])
    rows |= {"token_kl": kl, "token_kl_loss": kl}
    rows |= dict.fromkeys(HEAD_OPS, head)
    return rows | dict.fromkeys(PACKED_OPS, packed) | {"gae": rollout, "policy_loss": minibatch}


_REFERENCE = Rows(2048, 128256)  # 525 MB of logits, the shape that CPU numbers are quoted for
_ROLLOUT = Sequences(64, 4096)
_GPU = (Rows(16384, 128256), Rows(8192, 151936), Rows(32768, 32768), Rows(4096, 262144), Rows(4096, 50257))

_GPU_HEAD = (
    Head(4096, 4096, 128256, "bfloat16"),
    Head(16384, 4096, 128256, "bfloat16"),
    Head(8192, 2048, 151936, "bfloat16"),
)

# suite -> op -> shapes
SHAPES = {
    "cpu": _suite(
        (_REFERENCE, Rows(1024, 128256, "float32")),
        (_REFERENCE,),
        (Rows(512, 128256),),
        (Pairs(64, 1024),),
        (_ROLLOUT,),
        (Head(1024, 1024, 65536),),
    ),
    "cpu-quick": _suite(
        (Rows(256, 128256),),
        (Rows(256, 128256),),
        (Rows(128, 128256),),
        (Pairs(64, 256),),
        (_ROLLOUT,),
        (Head(256, 256, 32768),),
    ),
    "cuda": _suite(
        _GPU,
        _GPU,
        _GPU[:2],
        (Pairs(64, 1024),),
        (_ROLLOUT, Sequences(512, 4096), Sequences(4096, 128), Sequences(2, 1 << 20)),
        _GPU_HEAD,
    ),
    "cuda-quick": _suite(
        (Rows(4096, 128256),),
        (Rows(4096, 128256),),
        (Rows(4096, 128256),),
        (Pairs(64, 1024),),
        (_ROLLOUT,),
        _GPU_HEAD[:1],
    ),
    # for tests of the benchmark itself
    "tiny": _suite(
        (Rows(16, 1000),),
        (Rows(16, 1000),),
        (Rows(16, 1000),),
        (Pairs(2, 8),),
        (Sequences(3, 20),),
        (Head(16, 8, 1000),),
    ),
}
OPS = tuple(SHAPES["cpu"])

# Whole steps, and the side by side with other packages (`fastalign bench --peers`), which has them too.
STEPS = {
    "cpu": Step(16, 256, 4, 256, 32000),
    "cpu-quick": Step(8, 96, 2, 128, 16000),
    "cuda": Step(16, 1024, 8, 2048, 128256, "bfloat16"),
    "cuda-quick": Step(16, 512, 4, 1024, 128256, "bfloat16"),
    "tiny": Step(4, 12, 1, 16, 50),
}
STEP_OPS = ("dpo_step", "grpo_step")
PEER_OPS = (
    "token_logprobs", "token_logprobs_entropy", "token_logprobs_backward", *HEAD_OPS, "preference_loss",
    "policy_loss", "gae", *STEP_OPS,
)  # fmt: skip


def shapes_of(suite: str, op: str) -> tuple[Shape, ...]:
    return (STEPS[suite],) if op in STEP_OPS else SHAPES[suite][op]
