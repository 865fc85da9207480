"""fastalign as compute_loss_func of transformers' Trainer: the loss of a step does not depend on how it is
cut into micro-batches, and it is the loss itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from compute_loss import examples, first_step
from train.tiny import make_model, make_tokenizer

import fastalign
from fastalign import adapters
from fastalign.adapters import AdapterError
from fastalign.adapters.transformers import PairCollator, pair_labels, preference, sft, with_reference

transformers.utils.logging.set_verbosity_error()
DOCS = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def alone(model, example, side):
    """(log-probs, ids, scored) of one sequence."""
    ids = torch.tensor([*example["prompt_ids"], *example[side]])
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[len(example["prompt_ids"]) - 1 :]


# loss -> its options, and how the six pairs of a step are cut: padded or packed, pairs of a batch, batches.
LOSSES = {
    "dpo": ({"beta": 0.3}, [(0, 6, 1), (0, 2, 3), (None, 4, 2)]),
    "simpo": ({}, [(0, 2, 3)]),
    "odpo": ({}, [(None, 2, 3)]),
    "wpo": ({}, [(None, 4, 2)]),
    "cpo_simpo": ({"sft_norm": "seq_mean"}, [(0, 4, 2)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_step_is_the_mean_over_its_pairs(tmp_path, name):
    model, reference, data = make_model(), make_model(seed=1), examples()
    own, cuts = LOSSES[name]
    loss = preference(name, **own)
    data = with_reference(data, reference, PairCollator(0), batch_size=4)
    sequences = [alone(model, e, side) for e in data for side in ("chosen_ids", "rejected_ids")]
    with torch.no_grad():
        theirs = [alone(reference, e, side) for e in data for side in ("chosen_ids", "rejected_ids")]
    for i, e in enumerate(data):
        assert e["ref_chosen_logps"] == pytest.approx(float(theirs[2 * i].sum()), rel=1e-5)
    ends = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    options = {"gamma_ext": torch.tensor([e["gamma_ext"] for e in data])} if name == "odpo" else {}
    logprobs = torch.cat(sequences)
    if name == "wpo":
        rows = [model(input_ids=torch.tensor([[*e["prompt_ids"], *e[side]]])).logits[0, len(e["prompt_ids"]) - 1 : -1]
                for e in data for side in ("chosen_ids", "rejected_ids")]  # fmt: skip
        square = (2 * torch.cat(rows).log_softmax(-1)).logsumexp(-1)
        options["omega"] = fastalign.wpo_weights(logprobs, square, ends, mask=torch.ones(len(logprobs)) > 0)
    wanted = fastalign.preference_loss(
        logprobs,
        torch.cat(theirs),
        ends,
        loss=name,
        mask=torch.ones(len(logprobs)) > 0,
        **own,
        **options,
    ).loss
    wanted.backward()
    per_pair = ("gamma_ext",) if name == "odpo" else ()
    for padding, size, accumulation in cuts:
        collator = PairCollator(padding, per_pair)
        logged, found, _ = first_step(loss, data, collator, tmp_path, size, accumulation)
        assert logged == pytest.approx(float(wanted.detach()), rel=1e-4), (size, accumulation)
        for parameter, value in model.named_parameters():
            assert torch.allclose(found[parameter], value.grad, rtol=1e-3, atol=1e-5), (parameter, size)
    assert "rewards/margins" in loss.last.metrics() and loss.last.loss.grad_fn is None


def test_the_token_loss_is_trainers_own(tmp_path):
    rows = [torch.tensor([*e["prompt_ids"], *e["chosen_ids"]]) for e in examples()]

    def collate(parts):
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    theirs = first_step(None, rows, collate, tmp_path, 2, 3)
    for size, accumulation in ((6, 1), (2, 3)):
        ours = first_step(sft(), rows, collate, tmp_path, size, accumulation)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        for name, value in theirs[1].items():
            assert torch.allclose(ours[1][name], value, rtol=1e-3, atol=1e-6), name
    assert ours[2] == pytest.approx(theirs[2], rel=1e-3)


def test_a_packed_batch_says_where_its_sequences_begin():
    data = examples(3)
    batch = PairCollator()(data)
    labels = batch["labels"]
    assert labels.cu_seqlens.diff().tolist() == [
        len(e["prompt_ids"]) + len(e[side]) for side in ("chosen_ids", "rejected_ids") for e in data
    ]
    assert (labels.rows[labels.cu_seqlens[1:].long() - 1] == -100).all()
    assert labels[..., 1:].ne(-100).sum() == 3
    empty = pair_labels(torch.tensor([[5, -100], [5, 6], [5, -100], [5, 6]]))
    assert empty.ne(-100).tolist() == [False, True]  # a pair without a scored token is no pair


def test_what_would_be_divided_wrongly_is_refused():
    logits = torch.randn(4, 3, 7, requires_grad=True)
    labels = torch.tensor([[-100, 2, 3], [-100, 2, -100], [-100, 4, 3], [-100, 1, 1]])
    pairs, outputs = pair_labels(labels), {"logits": logits}
    simpo = preference("simpo")
    plain = simpo(outputs, labels, num_items_in_batch=torch.tensor(7))
    assert float(plain) == pytest.approx(float(simpo(outputs, pairs, torch.tensor(2.0))))
    assert float(simpo(outputs, pairs, torch.tensor(4.0))) == pytest.approx(float(plain) / 2)
    assert float(simpo((logits,), pairs)) == pytest.approx(float(plain))
    with pytest.raises(AdapterError, match="num_items_in_batch is of the labels of several batches"):
        simpo(outputs, labels, num_items_in_batch=torch.tensor(14))
    preference("cpo")(outputs, pairs, num_items_in_batch=2)
    with pytest.raises(
        AdapterError, match="an SFT term per token, and num_items_in_batch is of pairs; legal: sft_norm="
    ):
        preference("cpo")(outputs, pairs, num_items_in_batch=4)
    with pytest.raises(AdapterError, match="needs ref_chosen_logps and ref_rejected_logps"):
        preference("dpo")(outputs, pairs)
    known = pair_labels(labels, ref_chosen_logps=torch.zeros(2), ref_rejected_logps=torch.zeros(2))
    with pytest.raises(AdapterError, match="loss='ld_dpo' needs the reference's log-probs token by token"):
        preference("ld_dpo")(outputs, known)
    with pytest.raises(AdapterError, match="loss='odpo' needs gamma_ext of every pair"):
        preference("odpo")(outputs, known)
    with pytest.raises(AdapterError, match="loss='tdpo1' needs the reference's logits"):
        preference("tdpo1")
    with pytest.raises(AdapterError, match=r"labels has shape \(3, 2\); legal: \[2 P, T\]"):
        simpo(outputs, labels[:3, :2])
    with pytest.raises(AdapterError, match="there are 12 rows of logits and 8 labels"):
        simpo(outputs, labels[:, :2])
    with pytest.raises(AdapterError, match='the batch has no "labels"'):
        simpo(outputs, None)
    with pytest.raises(ValueError, match=r"gamma_ext has shape \(3,\); legal here: \(2,\)"):
        pair_labels(labels, gamma_ext=torch.zeros(3))
    with pytest.raises(AdapterError, match=r'"labels" are PairLabels; legal: integers \[B, T\]'):
        sft()(outputs, pairs)


def test_there_is_nothing_to_patch():
    with pytest.raises(
        AdapterError, match="transformers is not patched: fastalign.adapters.transformers.preference"
    ):
        adapters.patch("transformers")


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    section = DOCS.read_text(encoding="utf-8").split("## transformers")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/adapters.md", "exec"), names)
    assert names["trainer"].state.global_step > 0
