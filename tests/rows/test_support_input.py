"""Bad input of `logprobs_at` and `token_stats(support=)`: errors that name the argument, NaN where values
cannot be looked at."""

from __future__ import annotations

import pytest
import torch
from checks.support import ROWS, VOCAB, call, make_case

import fastalign as fa
from fastalign.rows import kept, support


@pytest.fixture
def small():
    return make_case(torch.float64)


def test_indices_outside_the_vocabulary(small, monkeypatch):
    """An error that names the row; NaN in that row where values cannot be looked at."""
    for bad in (VOCAB, -2):
        indices = small.indices.clone()
        indices[4, 1] = bad
        case = small._replace(indices=indices)
        with pytest.raises(IndexError, match=rf"indices of row 4 holds {bad}; legal: \[0, {VOCAB}\), and -1"):
            call(case)
        with pytest.raises(IndexError, match=f"support of row 4 holds {bad}"):
            fa.token_stats(case.logits(), case.labels, support=indices, mask=case.mask)
        with monkeypatch.context() as patch:
            for module in (kept, support):
                patch.setattr(module, "values_are_here", lambda x: False)
            for counts in (True, False):
                got = call(case, host_counts=counts, with_mass=True)
                wrong = got.logprobs.isnan()
                assert bool(wrong[4][indices[4] != -1].all()) and not bool(
                    wrong[torch.arange(ROWS) != 4].any()
                )
                assert got.log_mass.isnan().nonzero().flatten().tolist() == [4]
            found = fa.token_stats(
                case.logits(), case.labels, support=indices, mask=case.mask, outputs=("logprob", "entropy")
            )
            for x in (found.logprob, found.entropy):
                assert x.isnan().nonzero().flatten().tolist() == [4]


def test_labels_outside_the_vocabulary(small, monkeypatch):
    labels = small.labels.clone()
    labels[4] = VOCAB
    with pytest.raises(IndexError, match=rf"labels\[4\] = {VOCAB}"):
        call(small, labels=labels)
    with pytest.raises(IndexError, match=rf"labels\[4\] = {VOCAB} is outside \[0, {VOCAB}\)"):
        fa.token_stats(small.logits(), labels, support=small.indices, mask=small.mask)
    monkeypatch.setattr(support, "values_are_here", lambda x: False)
    assert call(small, labels=labels).label_logprob.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(ROWS, 2)}, TypeError, "indices must be integers, got torch.float32"),
        ({"indices": [[1]]}, TypeError, "indices must be a tensor of integers, got list"),
        ({"indices": torch.zeros(ROWS, dtype=torch.long)}, ValueError, r"indices has shape \(11,\); legal for these hidden: \(11, 'K'\)"),
        ({"indices": torch.zeros(ROWS, 2, dtype=torch.long, device="meta")}, ValueError, "indices is on meta but hidden is on cpu"),
        ({"offsets": torch.tensor([0, 1])}, ValueError, r"indices has shape \(11, 6\); legal with offsets: \[n\]"),
        ({"labels": torch.zeros(ROWS, 2, dtype=torch.long)}, ValueError, r"labels has shape \(11, 2\); legal here: \(11,\)"),
        ({"labels": torch.zeros(ROWS)}, TypeError, "labels must be integers"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\)"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 is out of range"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes"),
        ({"head_precision": "fp8"}, ValueError, "head_precision='fp8' is unknown; legal: fp32, bf16, tf32"),
        ({"batch_invariant": True}, TypeError, "logprobs_at has no option batch_invariant; legal: temperature"),
        ({"temprature": 1.0}, TypeError, "logprobs_at has no option temprature; legal: temperature"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    case = make_case()
    given = {"indices": case.indices, "labels": case.labels, "bias": case.bias, "mask": case.mask, **change}
    with pytest.raises(error, match=message):
        fa.logprobs_at(case.hidden, case.weight, **given)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2], r"offsets has shape \(2,\); legal here: \(3,\)"),
        ([1, 2, 4], r"offsets must start at 0 and end at the number of indices \(4\); it runs from 1 to 4"),
        ([0, 2, 3], "it runs from 0 to 3"),
        ([0, 5, 4], "offsets decreases at position 2"),
    ],
)
def test_bad_offsets(offsets, message):
    with pytest.raises(ValueError, match=message):
        fa.logprobs_at(
            torch.ones(2, 3), torch.ones(7, 3), torch.tensor([0, 1, 2, 3]), offsets=torch.tensor(offsets)
        )


def test_entries_without_rows():
    with pytest.raises(ValueError, match="indices has 1 entries but hidden has no row"):
        fa.logprobs_at(torch.ones(0, 3), torch.ones(7, 3), torch.tensor([0]), offsets=torch.tensor([1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"outputs": ("entropy", "mean_logit")},
            ValueError,
            "outputs has mean_logit, the mean over the vocabulary",
        ),
        (
            {"support": torch.zeros(ROWS, 0, dtype=torch.long)},
            ValueError,
            r"support has shape \(11, 0\); legal: K >= 1",
        ),
        (
            {"support": torch.zeros(ROWS, dtype=torch.long)},
            ValueError,
            r"support has shape \(11,\); legal for these logits: \(11, 'K'\)",
        ),
        ({"support": torch.zeros(ROWS, 2)}, TypeError, "support must be integers"),
        ({"inplace_backward": True}, ValueError, "inplace_backward cannot be used with support"),
    ],
)
def test_bad_arguments_of_token_stats(change, error, message):
    case = make_case()
    with pytest.raises(error, match=message):
        fa.token_stats(
            case.logits() * 1, case.labels, **{"support": case.indices, "mask": case.mask, **change}
        )
