"""Packing, label shift, unpad and repad against brute force; nothing crosses a boundary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastalign as fa

SEQUENCES = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=0, max_size=6)


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_pack_and_shift_against_a_loop(sequences, rng):
    masks = [[rng.random() < 0.6 for _ in s] for s in sequences]
    batch = fa.pack(sequences, masks)
    labels, positions = [], []
    for s, m in zip(sequences, masks):
        labels += [s[i + 1] if i + 1 < len(s) and m[i + 1] else -100 for i in range(len(s))]
        positions += list(range(len(s)))
    assert batch.labels.tolist() == labels and batch.position_ids.tolist() == positions
    assert batch.input_ids.tolist() == sum(sequences, []) and batch.mask.tolist() == [
        y != -100 for y in labels
    ]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.diff().tolist() == [
        len(s) for s in sequences
    ]
    assert batch.max_seqlen == max((len(s) for s in sequences), default=0)


def test_shift_labels_ignores_neighbours():
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    a = fa.shift_labels(torch.tensor([1, 2, 3, 4, 5]), cu)
    assert a.tolist() == [2, 3, -100, 5, -100]
    b = fa.shift_labels(torch.tensor([1, 2, 3, 9, 9]), cu)
    assert a[:3].tolist() == b[:3].tolist()


def test_unpad_repad_round_trip():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    x = torch.randn(3, 4, 5)
    packed, cu, indices = fa.unpad(x, mask)
    assert cu.tolist() == [0, 2, 2, 6] and torch.equal(packed[0], x[0, 1])
    back = fa.repad(packed.requires_grad_(), indices, (3, 4))
    assert torch.equal(back, x * mask.unsqueeze(-1))
    back.sum().backward()
    assert torch.equal(packed.grad, torch.ones(6, 5))


def test_errors():
    with pytest.raises(ValueError, match="masks has lengths"):
        fa.pack([[1, 2]], [[1]])
    with pytest.raises(ValueError, match="attention_mask has shape"):
        fa.unpad(torch.zeros(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="must match"):
        fa.repad(torch.zeros(2), torch.zeros(3, dtype=torch.long), (1, 4))
    with pytest.raises(ValueError, match="end at the number"):
        fa.shift_labels(torch.arange(4), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        fa.shift_labels(torch.arange(4), torch.tensor([0.0, 4.0]))


def test_token_ids_are_integers_in_one_dimension():
    cu = torch.tensor([0, 2], dtype=torch.int32)
    for error, words, call in (
        (
            TypeError,
            r"sequences\[1\] must be integers, got torch.float32",
            lambda: fa.pack([[1, 2], [1.7, 2.2]]),
        ),
        (
            TypeError,
            r"sequences\[0\] must be integers, got torch.float64",
            lambda: fa.pack([torch.ones(2, dtype=torch.float64)]),
        ),
        (TypeError, r"sequences\[0\] must be integers, got torch.bool", lambda: fa.pack([[True, False]])),
        (
            ValueError,
            r"sequences\[0\] has shape \(2, 2\); legal: 1-D",
            lambda: fa.pack([torch.ones(2, 2, dtype=torch.long)]),
        ),
        (ValueError, r"sequences\[0\] has shape \(\); legal: 1-D", lambda: fa.pack([3])),
        (
            ValueError,
            r"masks\[0\] has shape \(1, 2\); legal: 1-D",
            lambda: fa.pack([[1, 2]], [torch.ones(1, 2)]),
        ),
        (
            TypeError,
            "input_ids must be integers, got torch.float32",
            lambda: fa.shift_labels(torch.tensor([1.5, 2.5]), cu),
        ),
        (
            TypeError,
            "ignore_index must be an integer, got None",
            lambda: fa.shift_labels(torch.tensor([1, 2]), cu, ignore_index=None),
        ),
    ):
        with pytest.raises(error, match=words):
            call()
    small = fa.pack([torch.tensor([1, 2], dtype=torch.int16), [], torch.tensor([3], dtype=torch.uint8)])
    assert small.input_ids.tolist() == [1, 2, 3] and small.input_ids.dtype == torch.int64
