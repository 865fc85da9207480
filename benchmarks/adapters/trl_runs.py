"""Short runs of TRL's real trainers on tiny random models, with and without fastalign in them: what they log
is compared. The cases are those of trl_sweep.py, and some of them run in tests/adapters/test_trl_trainers.py.

`python benchmarks/adapters/trl_runs.py CASE MODEL OUT.json`, under torch.distributed.run, runs one on several
ranks."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 5
GRANTED = (1e-4, 1e-6)  # of a number, and besides
# Logged, and of the clock.
OF_THE_CLOCK = ("runtime", "per_second", "step_time", "flos", "time/", "profiling/")
TRAINERS = {
    "dpo": ("trl", "DPO"), "kto": ("trl", "KTO"), "grpo": ("trl", "GRPO"), "rloo": ("trl", "RLOO"),
    "sft": ("trl", "SFT"),
    "reward": ("trl", "Reward"), "distillation": ("trl", "Distillation"), "cpo": ("trl.experimental.cpo", "CPO"),
    "orpo": ("trl.experimental.orpo", "ORPO"), "tpo": ("trl.experimental.tpo", "TPO"),
}  # fmt: skip
ONLINE = ("grpo", "rloo", "distillation")


class Case(NamedTuple):
    """A run. options: of the trainer's config, beyond COMMON. model: a row of MODELS, for "lora" and
    "lora-..." with an adapter of PEFT. rollout: GRPO's completions come with other log-probs, as an engine
    gives them."""

    trainer: str
    options: dict[str, Any] = {}
    model: str = "llama"
    rollout: bool = False

    @property
    def name(self) -> str:
        said = ",".join(f"{name}={value}" for name, value in self.options.items())
        extra = [self.model] * (self.model != "llama") + ["rollout"] * self.rollout
        return " ".join([self.trainer, *extra, said]).strip()


COMMON = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1,
    "report_to": [], "use_cpu": True,
    "bf16": False, "fp16": False, "gradient_checkpointing": False, "save_strategy": "no",
    "disable_tqdm": True, "seed": 3,
    "dataloader_pin_memory": False,
}  # fmt: skip
PER_TRAINER = {
    "grpo": {"num_generations": 2, "max_completion_length": 6},
    "rloo": {"num_generations": 2, "max_completion_length": 6},
    "distillation": {"max_completion_length": 6},
}  # fmt: skip
SIZE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
# What a head may have: a bias, a cap, a scale, ties, and the loss of a mixture of experts beside it.
MODELS = {
    "llama": ("Llama", {}), "dropout": ("Phi", {"resid_pdrop": 0.2}), "bias": ("Phi", {}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "scale": ("Cohere", {"logit_scale": 0.5}),
    "divided": ("Granite", {"logits_scaling": 3.0, "tie_word_embeddings": True}),
    "experts": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
}  # fmt: skip


# --- model and data -----------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Of letters."""
    import tokenizers
    import transformers

    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .:"]
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="<s>")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    own.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


def make_model(name: str, seed: int = 0, head: str = "ForCausalLM", **options: Any) -> Any:
    import torch
    import transformers

    family, extra = MODELS[name]
    config = getattr(transformers, f"{family}Config")(vocab_size=31, **{**SIZE, **extra, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{head}")(config)
    if getattr(model, "lm_head", None) is not None and model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def make_rows(trainer: str, count: int = 24) -> list[dict[str, Any]]:
    """Of uneven lengths."""
    words = ["cat", "a dog", "the mat", "good", "is", "sat on it", "o", "bad. no"]
    rows = []
    for i in range(count):
        prompt = f"{words[i % 8]} {words[(3 * i + 1) % 8]}:" if i % 3 else f"{words[i % 5]}:"
        chosen, rejected = " " + " ".join(words[i % 4 : i % 4 + 1 + i % 3]), f" {words[(5 * i + 2) % 8]}"
        if trainer in ONLINE:
            rows.append({"prompt": prompt, **({"completion": chosen} if trainer == "distillation" else {})})
        elif trainer == "kto":
            rows.append({"prompt": prompt, "completion": rejected if i % 3 else chosen, "label": i % 3 == 0})
        elif trainer == "sft":
            rows.append({"prompt": prompt, "completion": chosen})
        else:
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            rows.append({**row, "reference": f" {words[(i + 3) % 8]}"} if trainer == "tpo" else row)
    return rows


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def length(completions: list[str], **_: Any) -> list[float]:
    return [0.1 * len(text) for text in completions]


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that do not depend on the policy, and what an engine would have logged for them."""
    ids = [trainer.processing_class(text)["input_ids"] for text in prompts]
    completions = [
        [2 + (7 * i + 3 * j + len(own)) % 29 for j in range(2 + i % 4)] for i, own in enumerate(ids)
    ]
    logprobs = [[-3.2 - 0.1 * ((i + j) % 5) for j in range(len(own))] for i, own in enumerate(completions)]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}


# --- a run --------------------------------------------------------------------------------------------------


def run(case: Case, saved: Path | None = None) -> dict[str, Any]:
    """{"losses": of every micro-batch, "logs": what the trainer logged}, or {"error": in one line}. saved: the
    model of `save`, which on several ranks only one process can write."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = build(case, Path(folder), saved)
            losses: list[float] = []
            step = trainer.training_step

            def watched(*args: Any, **kwargs: Any) -> Any:
                loss = step(*args, **kwargs)
                losses.append(float(loss))
                return loss

            trainer.training_step = watched
            trainer.train()
        except Exception as error:  # what TRL refuses is a result too
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        logs = [
            {k: v for k, v in entry.items() if isinstance(v, (int, float)) and not _of_the_clock(k)}
            for entry in trainer.state.log_history
        ]
        return {"losses": losses, "logs": logs}


def _of_the_clock(name: str) -> bool:
    return any(part in name for part in OF_THE_CLOCK)


def save(case: Case, folder: Path) -> Path:
    """The model and the tokenizer of a case."""
    make_model(_kind(case)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def _kind(case: Case) -> str:
    return case.model.removeprefix("lora").strip("-") or "llama"


def build(case: Case, folder: Path, saved: Path | None = None) -> Any:
    """The trainer of a case, TRL's own. `folder` is empty."""
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    package, prefix = TRAINERS[case.trainer]
    module = importlib.import_module(package)
    tokenizer = make_tokenizer()
    lora, kind = case.model.startswith("lora"), _kind(case)
    options = {
        **COMMON,
        **PER_TRAINER.get(case.trainer, {}),
        **case.options,
        "output_dir": str(folder / "out"),
    }
    transformers.set_seed(options["seed"])
    # The reference has another seed: no margin and no KL is 0 at the first step.
    given: dict[str, Any] = {"processing_class": tokenizer}
    synced = any("ref_model" in name for name in options)  # TRL's own reference, of the saved model
    if case.trainer in ("grpo", "rloo") or synced or "model_init_kwargs" in options:
        given["model"] = str(saved or save(case, folder / "model"))
    else:
        head = "ForSequenceClassification" if case.trainer == "reward" else "ForCausalLM"
        given["model"] = make_model(
            kind, head=head, **({"num_labels": 1} if case.trainer == "reward" else {})
        )
    if case.trainer in ("dpo", "kto") and not lora and not synced:
        given["ref_model"] = make_model(kind, seed=1)
    if case.trainer == "distillation":
        given["teacher_model"] = make_model(kind, seed=1, hidden_size=24)
    if case.trainer in ("grpo", "rloo"):
        given["reward_funcs"] = [vowels, length] if options.get("reward_weights") else vowels
    if lora:
        import peft

        given["peft_config"] = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0
        )
    if case.rollout:
        given["rollout_func"] = rollout
    args = getattr(module, f"{prefix}Config")(**options)
    torch.manual_seed(options["seed"])
    trainer = getattr(module, f"{prefix}Trainer")(
        args=args, train_dataset=datasets.Dataset.from_list(make_rows(case.trainer)), **given
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if any(name.startswith("vllm_importance") for name in case.options):
        # The engine is not there, and what the trainer does with its log-probs is.
        trainer.use_vllm, trainer._last_loaded_step = True, None
        trainer.vllm_generation = type("NoEngine", (), {"sync_weights": lambda self: None})()
    return trainer


@contextlib.contextmanager
def contestant(name: str) -> Iterator[None]:
    """ "ours": TRL patched; "theirs": as it is."""
    from fastalign.adapters.trl import ADAPTER

    with ADAPTER.patch() if name == "ours" else contextlib.nullcontext():
        yield


# --- comparison ---------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Of two runs of a case. kind: "equal", "both refused" or "different". worst: the largest difference as a
    multiple of what is granted; at: of what."""

    kind: str
    worst: float
    at: str


def compare(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    granted: tuple[float, float] = GRANTED,
    without: Sequence[str] = (),
) -> Difference:
    """Loss of every micro-batch, and every number that was logged, gradient norms among them; without the
    metrics of these names. granted: a share of TRL's number, and a difference."""
    if "error" in ours or "error" in theirs:
        same = ours.get("error") == theirs.get("error")
        kind = "both refused" if same else "different"
        return Difference(kind, 0.0 if same else math.inf, str(ours.get("error") or theirs.get("error")))
    mine, other = _numbers(ours, without), _numbers(theirs, without)
    if mine.keys() != other.keys():
        return Difference("different", math.inf, ", ".join(sorted(mine.keys() ^ other.keys())[:4]))
    assert any(name.endswith("grad_norm") for name in mine) and any(name.startswith("loss ") for name in mine)
    worst, at = 0.0, ""
    for name, a in mine.items():
        b = other[name]
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        most = granted[1] + granted[0] * abs(b)
        found = abs(a - b) / most if math.isfinite(a) and math.isfinite(b) else math.inf
        if found > worst:
            worst, at = found, f"{name}: {a:.9g} beside {b:.9g}"
    return Difference("equal" if worst <= 1 else "different", worst, at)


def _numbers(run: dict[str, Any], without: Sequence[str]) -> dict[str, float]:
    found = {f"loss {i}": x for i, x in enumerate(run["losses"])}
    for i, entry in enumerate(run["logs"]):
        found |= {f"step {i} {name}": float(value) for name, value in entry.items() if name not in without}
    return found


def both(
    case: Case, granted: tuple[float, float] = GRANTED, without: Sequence[str] = ()
) -> tuple[Difference, dict[str, Any]]:
    """A case with and without ours, and TRL's own run."""
    runs = {}
    for name in ("theirs", "ours"):
        with contestant(name):
            runs[name] = run(case)
    return compare(runs["ours"], runs["theirs"], granted, without), runs["theirs"]


def main(case: str, saved: str, out: str) -> None:
    """Both runs of a case on this rank; the first writes what it saw."""
    import torch

    torch.set_num_threads(1)
    trainer, options, model = json.loads(case)
    found: dict[str, Any] = {"ranks": int(os.environ.get("WORLD_SIZE", 1))}
    for name in ("theirs", "ours"):
        with contestant(name):
            found[name] = run(Case(trainer, options, model), Path(saved))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
