"""The side by side with other packages: who takes part, what whole steps compute, and that nobody is left out
without a word."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch

import fastalign as fa
from fastalign.bench import SHAPES, command, eager, measure, side_by_side
from fastalign.bench.cases import make_case
from fastalign.bench.peers import PEERS
from fastalign.bench.shapes import PEER_OPS, STEP_OPS, STEPS, Sequences, shapes_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", STEP_OPS)
def test_steps_are_right(op, dtype):
    """Loss and gradients of every line against fp64; ours on both backends. Padded and packed are one step."""
    case = make_case(op, STEPS["tiny"]._replace(dtype=dtype), CPU, backends=("cpu", "reference"))
    results = {r.name: r for r in measure.measure(case, CPU, seconds=0, least=1, most=1, memory=False)}
    assert {"fastalign cpu", "fastalign reference", "trl's fused head, padded"} <= set(results)
    assert {r.status for r in results.values()} == {"ok"}, results
    assert len(case.truth) == 1 + 4 * 64 and (case.truth != 0).sum() > 100
    measure.add_floor([*results.values()])
    assert (
        results["fastalign cpu"].floor > 0
        and results["backbones and the head's products alone"].floor is None
    )


def test_a_wrong_gradient_of_a_step_gets_no_time(monkeypatch):
    right = fa.policy_loss
    monkeypatch.setattr(fa, "policy_loss", lambda *a, **k: right(*a, **{**k, "kl_coef": 0.05}))
    case = make_case("grpo_step", STEPS["tiny"], CPU, backends=("cpu",))
    case.contestants = case.contestants[:1]
    (ours,) = measure.measure(case, CPU, seconds=0, least=1, most=1, memory=False)
    assert ours.status == "wrong" and ours.ms is None


def fake(monkeypatch, name, **functions):
    """A package that is not installed here, for its signatures."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for function, body in functions.items():
        setattr(module, function, body)


def test_verl_is_called_as_it_is_defined(monkeypatch):
    """By its 0.9.1 signatures: (B, L) with a mask of floats, advantages whitened behind the returns; the old
    log-probs come first in the policy loss."""

    def gae(token_level_rewards, values, response_mask, gamma, lam):
        _, returns = eager.gae_masked_loop(token_level_rewards, values, response_mask, gamma, lam)
        return torch.zeros_like(returns), returns

    def policy(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None):
        assert (
            config.clip_ratio_low is None
            and config.get("clip_ratio_c", 3.0) == 3.0
            and not config.global_batch_info
        )
        return eager.ppo_loss(log_prob, old_log_prob, advantages, response_mask, config.clip_ratio), {}

    fake(
        monkeypatch,
        "verl.trainer.ppo.core_algos",
        compute_gae_advantage_return=gae,
        compute_policy_loss_vanilla=policy,
    )
    for op in ("gae", "policy_loss"):
        case = make_case(op, SHAPES["tiny"][op][0], CPU, compile=False, backends=("cpu",))
        case.contestants = [c for c in case.contestants if c.name.startswith("verl")]
        results = measure.measure(case, CPU, seconds=0, least=1, most=1, memory=False)
        assert [r.status for r in results if r.kind == "peer" and r.ms] == ["ok"], results
    long = make_case("gae", Sequences(1, 8193), CPU, compile=False, backends=("cpu",))
    assert any(why == "not run beyond 8192 steps" for name, why in long.missing.items() if "verl" in name)


def test_kernels_for_gpus_are_named_on_a_cpu(monkeypatch):
    fake(
        monkeypatch,
        "liger_kernel.transformers.functional",
        liger_cross_entropy=None,
        liger_fused_linear_cross_entropy=None,
    )
    fake(monkeypatch, "cut_cross_entropy", linear_cross_entropy=None)
    case = make_case("linear_token_logprobs", SHAPES["tiny"]["linear_token_logprobs"][0], CPU, compile=False)
    for name in ("liger-kernel liger_fused_linear_cross_entropy", "cut-cross-entropy linear_cross_entropy"):
        assert case.missing[name] == "installed; its kernels are Triton's, which need a GPU"


def test_the_command(tmp_path, monkeypatch, capsys):
    """Table, JSON and picture, of a few of its ops; every peer has a line, with a time or with a reason."""
    monkeypatch.setitem(SHAPES, "cpu-quick", SHAPES["tiny"])
    monkeypatch.setitem(STEPS, "cpu-quick", STEPS["tiny"])
    monkeypatch.setitem(command.EFFORT, "cpu-quick", (0.0, 1, 1))
    monkeypatch.setattr(command, "ceiling_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(command, "PEER_OPS", ops := ("linear_token_logprobs", "gae", "grpo_step"))
    files = [str(tmp_path / name) for name in ("peers.json", "peers.png")]
    options = [
        "--peers",
        "--quick",
        "--no-compile",
        "--device",
        "cpu",
        "--json",
        files[0],
        "--plot",
        files[1],
    ]
    assert command.main(options) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "peers.json").read_text())
    assert [case["op"] for case in report["cases"]] == [*ops]
    for case in report["cases"]:
        names = {r["name"]: r for r in case["results"]}
        for peer in PEERS.get(case["op"], ()):
            assert names[peer.name]["ms"] or names[peer.name]["message"], peer.name
            assert names[peer.name]["ms"] or peer.name in out.split("without a time")[1]
    rows = {r["op"]: r for r in report["side_by_side"]}
    assert set(rows) == {*ops} and "side by side" in out and "of floor" in out
    assert all(r["times"] == pytest.approx(r["other_ms"] / r["ms"]) for r in rows.values())
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_who_is_faster_is_told_either_way():
    def result(name, kind, ms, mb=0.0):
        return measure.Result(name, kind, ms=ms, extra_mb=mb).as_dict()

    lost = [
        result("fastalign cpu", "ours", 4.0, 3.0),
        result("fastalign recomputing", "eager", 0.5),
        result("b", "peer", 2.0, 9.0),
    ]
    lost += [result("c", "compiled", 3.0, 8.0), measure.Result("d", "peer", "n/a", "not here").as_dict()]
    report = {"cases": [{"op": "gae", "shape": "s", "results": lost}]}
    (row,) = report["side_by_side"] = side_by_side.rows(report)
    assert (row["other"], row["times"], row["mb"], row["other_mb"]) == ("b", 0.5, 3.0, 8.0)
    text = side_by_side.render(report)
    assert "0.50" in text and "d (gae): n/a: not here" in text


@pytest.mark.parametrize("options", [["--peers"], ["--op", "dpo_step"]])
def test_without_transformers(options, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(SystemExit) as stop:
        command.main(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "transformers" in error and len(error.strip().splitlines()) == 1


def test_every_suite_has_the_steps():
    assert set(STEPS) == set(SHAPES)
    assert all(shapes_of(suite, op) for suite in SHAPES for op in PEER_OPS)
