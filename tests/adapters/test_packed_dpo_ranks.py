"""PackedDPOTrainer and TRL's on two gloo ranks: what rank 0 logs, and both models afterwards."""

from __future__ import annotations

import multiprocessing
import os
import socket

import torch
from accelerate.state import AcceleratorState, GradientState
from compute_loss import first_step, pairs
from dpo_runs import LIMIT, difference, make_trainer, train
from trl import DPOTrainer

from fastalign.adapters.transformers import PairCollator, preference
from fastalign.adapters.trl import PackedDPOTrainer

KINDS = {"theirs": DPOTrainer, "ours": PackedDPOTrainer}


def rank_of_two(rank, port, folder, results):
    """Both trainers, one after the other, and a preset without a reference."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    found = {}
    for name, kind in KINDS.items():
        trainer = make_trainer(
            kind, folder, ddp_backend="gloo", per_device_train_batch_size=2, gradient_accumulation_steps=2,
            evaluate=True, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
        found[name] = train(trainer)
        assert trainer.args.world_size == 2
        found[f"{name}, weights"] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    options = {
        "given": {"preset": "simpo"},
        "reference": None,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
    }
    found["preset"] = train(make_trainer(PackedDPOTrainer, folder, **options))
    found["transformers"] = first_step(
        preference("dpo"), pairs(), PairCollator(), folder, 2, 2, ddp_backend="gloo"
    )
    torch.save(found, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_log_and_learn_what_trl_does(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")  # what is imported already is not imported again
    ranks = [
        context.Process(target=rank_of_two, args=(rank, port, tmp_path / str(rank), tmp_path))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    error, name = difference(found[0]["theirs"], found[0]["ours"])
    assert error < LIMIT, name
    assert any("eval_rewards/margins" in record for record in found[0]["ours"])
    weights = [found[rank][f"{kind}, weights"] for rank in (0, 1) for kind in KINDS]
    assert all(torch.allclose(weights[0], other, rtol=1e-4, atol=1e-5) for other in weights)
    # A preset's metrics are of both ranks, as if one had all pairs.
    whole = train(
        make_trainer(
            PackedDPOTrainer, tmp_path, per_device_train_batch_size=4, max_steps=1, reference=None,
            given={"preset": "simpo"}
        )
    )  # fmt: skip
    for name, value in whole[0].items():
        assert abs(found[0]["preset"][0][name] - value) < LIMIT * max(1.0, abs(value)), name
    loss, gradient, _ = first_step(preference("dpo"), pairs(), PairCollator(), tmp_path, 8, 1)
    assert abs(found[0]["transformers"][0] - loss) < LIMIT
    for name, value in gradient.items():
        assert torch.allclose(found[1]["transformers"][1][name], value, rtol=1e-3, atol=1e-5), name
