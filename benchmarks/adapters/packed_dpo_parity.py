"""PackedDPOTrainer against TRL's padded DPOTrainer over every field of DPOConfig that touches the loss, on two
steps of a tiny Llama in fp32: the largest difference in loss, gradient norm and metrics, relative above 1.

    python benchmarks/adapters/packed_dpo_parity.py [--json FILE]

Exit status 1 where a difference exceeds 1e-5."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests" / part) for part in ("", "adapters")]

import torch  # noqa: E402
from dpo_runs import LIMIT, both, difference, mixtral  # noqa: E402
from peft import LoraConfig  # noqa: E402

from fastalign.adapters.trl.refusals import DIVERGENCES, LOSS_TYPES, UNWEIGHTED  # noqa: E402

FIXED = {
    "exo_pair": {"label_smoothing": 0.05},
    "robust": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
}
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
ACCUMULATED = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}


def cases():
    """(name, options of `dpo_runs.both`)"""
    for loss in LOSS_TYPES:
        own = {"loss_type": [loss], **FIXED.get(loss, {})}
        yield loss, own
        yield f"{loss}, accumulated", own | ACCUMULATED
        yield f"{loss}, beta 0.5, ld_alpha 0.3", own | {"beta": 0.5, "ld_alpha": 0.3}
        yield f"{loss}, precomputed", own | {"precompute_ref_log_probs": True}
        yield f"{loss}, cut to 7 from the left", own | {"max_length": 7, "truncation_mode": "keep_end"}
        if loss not in ("aot", "aot_unpaired", *UNWEIGHTED):
            yield f"{loss}, use_weighting", own | {"use_weighting": True}
        if loss in WITH_DIVERGENCE:
            for divergence in DIVERGENCES[1:]:
                yield f"{loss}, {divergence}", own | {"f_divergence_type": divergence}
    alpha = {"f_divergence_type": "alpha_divergence"}
    for value in (0.2, 1.0, 1.4):
        yield f"alpha_divergence {value}", alpha | {"f_alpha_divergence_coef": value}
    mixture = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield "mixture", mixture
    yield "mixture without weights, accumulated", {"loss_type": ["ipo", "sft"]} | ACCUMULATED
    yield "mixture, use_weighting, ld_alpha", {
        "loss_type": ["ipo", "nca_pair"], "loss_weights": [2.0, 0.5], "use_weighting": True, "ld_alpha": 0.0,
    }  # fmt: skip
    for smoothing in (0.0, 0.2):
        yield f"sigmoid, label_smoothing {smoothing}", {"label_smoothing": smoothing}
    yield "discopop_tau", {"loss_type": ["discopop"], "discopop_tau": 0.3}
    yield "max_length 12", {"max_length": 12}
    yield "max_length None", {"max_length": None}
    yield "precompute_ref_batch_size", {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 7}
    yield "sync_ref_model", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
    yield "padding_free", {"padding_free": True}
    for reentrant in (False, True):
        options = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        yield f"gradient checkpointing, reentrant {reentrant}", options
    yield "evaluation", {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1}
    for coef in (None, 0.0, 2.0):
        yield f"Mixtral, router_aux_loss_coef {coef}", {"router_aux_loss_coef": coef, "make": experts}
    yield "LoRA", {"make": lora}
    yield "LoRA, checkpointing, precomputed", {
        "make": lora, "gradient_checkpointing": True, "precompute_ref_log_probs": True,
    }  # fmt: skip
    yield "LoRA that keeps the head", {"make": lora_with_head}
    yield "bf16", {"bf16": True}


def experts():
    return {"policy": mixtral(0), "reference": mixtral(1)}


def lora():
    return {"reference": None, "given": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}}


def lora_with_head():
    config = LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head"])
    return {"reference": None, "given": {"peft_config": config}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, worst = [], 0.0
    for name, options in cases():
        if arguments.only not in name:
            continue
        options = dict(options)
        make = options.pop("make", dict)
        with tempfile.TemporaryDirectory() as folder:
            error, where = difference(*both(folder, make, **options))
        limit = LIMIT if "bf16" not in name else 1e-2  # of rounding to 8 bits
        found.append({"case": name, "difference": error, "in": where, "limit": limit})
        print(f"{error:.1e}  {name} ({where})" + ("" if error < limit else "  TOO LARGE"), flush=True)
        worst = max(worst, error / limit)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "cases": found}, indent=1) + "\n")
    print(f"{len(found)} cases, {sum(case['difference'] >= case['limit'] for case in found)} too large")
    return int(worst >= 1)


if __name__ == "__main__":
    sys.exit(main())
