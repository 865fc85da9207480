"""TRL's real trainers with fastalign in them: a selection of benchmarks/adapters/trl_sweep.py, by its code.
Loss, gradient norm and every logged metric are those of TRL alone; a wrong function in the same place is
found."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import pytest
import torch
import trl
from trl.kernels import chunked_logprob
from trl.trainer import utils

from fastalign.adapters.common import Adapter, Seam
from fastalign.adapters.trl import ADAPTER
from fastalign.adapters.trl.head import ChunkedLogProb

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "adapters"
sys.path.insert(0, str(FOLDER))
import trl_fields  # noqa: E402
import trl_runs  # noqa: E402
from trl_runs import Case  # noqa: E402

FOUR = {"gradient_accumulation_steps": 4}
CASES = [
    case._replace(options={"max_steps": 3, **case.options})
    for case in (
        Case("dpo", {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.5, 0.3, 0.2], **FOUR}),
        Case("dpo", {"use_weighting": True, "gradient_checkpointing": True}, "lora-softcap"),
        Case("kto", model="bias"),
        Case("grpo",
            {"beta": 0.1, "num_iterations": 2, "temperature": 0.7, "entropy_coef": 0.1,
                "top_entropy_quantile": 0.6}),
        Case("sft", model="scale"), Case("cpo"), Case("tpo"), Case("distillation", {"temperature": 0.8}),
    )
]  # fmt: skip


@functools.cache
def theirs(index):
    return trl_runs.run(CASES[index])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_a_trainer_logs_the_same(index):
    with ADAPTER.patch():
        ours = trl_runs.run(CASES[index])
    found = trl_runs.compare(ours, theirs(index))
    assert found.kind == "equal", found
    assert len(ours["losses"]) >= 3 * CASES[index].options.get("gradient_accumulation_steps", 1) - 2


# --- the comparison can fail --------------------------------------------------------------------------------


class Shifted:
    """Log-probs that are a thousandth off."""

    @staticmethod
    def apply(*arguments):
        logprobs, *others = ChunkedLogProb.apply(*arguments)
        return (logprobs * 1.001, *others)


class Hot:
    """The temperature is ignored."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, *others):
        return ChunkedLogProb.apply(hidden, weight, bias, targets, 1.0, *others)


class NoGradient:
    """The entropy has no gradient."""

    @staticmethod
    def apply(*arguments):
        logprobs, entropy, *others = ChunkedLogProb.apply(*arguments)
        return (logprobs, entropy.detach(), *others)


class OtherMean:
    """Only a metric is wrong."""

    @staticmethod
    def apply(*arguments):
        logprobs, entropy, squares, mean, top = ChunkedLogProb.apply(*arguments)
        return (logprobs, entropy, squares, None if mean is None else mean + 0.01, top)


def next_row(logits, index, temperature=1.0, row_mask=None):
    return torch.log_softmax(logits.roll(1, 1), -1).gather(-1, index[..., None]).squeeze(-1)


HEAD = "trl.kernels.chunked_logprob:ChunkedLogProbFunction"


@pytest.mark.parametrize(
    ("index", "where", "wrong"),
    [(0, HEAD, Shifted), (3, HEAD, Hot), (3, HEAD, NoGradient), (0, HEAD, OtherMean),
        (5, "trl.trainer.utils:selective_log_softmax", next_row)],
)  # fmt: skip
def test_a_wrong_function_is_found(index, where, wrong):
    seam = Seam(where, f"{__name__}:{wrong.__name__}", "wrong")
    with Adapter("trl", "trl", ADAPTER.versions, (seam,)).patch():
        found = trl_runs.compare(trl_runs.run(CASES[index]), theirs(index))
    assert found.kind == "different" and found.worst > 1 and found.at


@pytest.mark.parametrize("trainer", trl_fields.TABLES)
def test_every_field_of_the_configs_is_in_the_sweep(trainer):
    """A field that TRL adds must be given a value to try, another than its default, or a reason."""
    fields = getattr(trl, f"{trainer.upper()}Config").__dataclass_fields__
    table = trl_fields.TABLES[trainer]
    assert sorted(trl_fields.own_fields(trainer)) == sorted(table)
    for field, probe in {**trl_fields.SHARED, **table}.items():
        if isinstance(probe, trl_fields.Probe):
            usual = {
                field: fields[field].default,
                **trl_runs.COMMON,
                **trl_runs.PER_TRAINER.get(trainer, {}),
            }[field]
            without, tried = (case.options.get(field) for case in probe.cases(trainer, field))
            assert without is None and tried == probe.value != usual, field


# --- what the head is given ---------------------------------------------------------------------------------


def test_only_labelled_rows_reach_the_head(monkeypatch):
    model = trl_runs.make_model("llama")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.arange(12).view(2, 6) + 2
    labels = ids.masked_fill(ids % 6 < 4, -100)
    before = model(input_ids=ids, labels=labels, fused_lm_head=True)
    with ADAPTER.patch():
        rows, apply = [], ChunkedLogProb.apply
        monkeypatch.setattr(
            ChunkedLogProb, "apply", lambda x, *others: rows.append(len(x)) or apply(x, *others)
        )
        after = model(input_ids=ids, labels=labels, fused_lm_head=True)
        nothing = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert rows == [int((labels[:, 1:] != -100).sum()), 0]
    for name in ("loss", "log_probs", "entropy"):
        assert torch.allclose(getattr(after, name), getattr(before, name), rtol=1e-5), name
    nothing.loss.backward()
    assert nothing.loss == 0 and not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_is_gone_between_forward_and_backward(monkeypatch, autocast):
    """As under ZeRO-3: outside TRL's context the weight is empty. TRL's own function is held to the same."""
    whole = torch.randn(23, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(whole.clone())
    weight.ds_status = "NOT_AVAILABLE"

    @contextlib.contextmanager
    def gathered(*parameters):
        assert any(p is weight for p in parameters) and weight.numel() == 0
        weight.data = whole.clone()
        yield
        weight.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)

    def gradients(function):
        hidden = x.clone().requires_grad_()
        weight.data = torch.empty(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), gathered(weight):
            logprobs, entropy, squares, *_ = function.apply(hidden, weight, None, torch.arange(5), 0.8, 16)
        assert not squares.requires_grad
        return torch.autograd.grad(logprobs.sum() + entropy.square().sum(), (hidden, weight))

    other = gradients(chunked_logprob.ChunkedLogProbFunction)
    mine = gradients(ChunkedLogProb)
    for a, b in zip(mine, other):
        assert a.shape == b.shape and torch.allclose(a, b, atol=0.05 if autocast else 1e-6)
