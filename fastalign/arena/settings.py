"""The settings of `fastalign arena`, and what they make of an entry's stages: configurations of
`fastalign.train`, checked before any work."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from fastalign.arena.entries import ENTRIES, Entry, Stage
from fastalign.arena.labels import FORMS
from fastalign.train.config import TrainConfig
from fastalign.train.errors import UserError
from fastalign.train.methods import METHODS, make_method
from fastalign.train.online_config import OnlineConfig
from fastalign.train.settings import MAX_SEED, NOT_BELOW_0, POSITIVE, Bound, Settings, setting

# Responses to a prompt that one example of the data has.
_PER_EXAMPLE = {"pairs": 2, "soft_pairs": 2, "rso_pairs": 2, "best_worst": 2, "labels": 1, "scores": 1}
_HALF = Bound("lie in [0, 0.5)", lambda x: 0 <= x < 0.5)
_SEED = Bound(f"lie in [0, {MAX_SEED // 1000 - 100}]", lambda x: 0 <= x <= MAX_SEED // 1000 - 100)
_FEW = Bound("lie in [1, 100]", lambda x: 1 <= x <= 100)
_TWO = Bound("be 2 or more", lambda x: x >= 2)


@dataclasses.dataclass(frozen=True)
class ArenaConfig(Settings):
    """A contest. The sizes are those of the quick run, which the full run shares."""

    output: str = setting(
        "fastalign-arena",
        "directory for the report and a file per finished cell; a second call goes on from these",
        metavar="DIR",
    )
    method: tuple[str, ...] = setting(
        (),
        "run this one (repeatable); default: all; a wrong name lists the legal ones",
        metavar="NAME",
    )
    quick: bool = setting(False, "one seed, each method at one coefficient: the default")
    full: bool = setting(False, "three seeds, and the frontier over every method's coefficients")
    seeds: int | None = setting(
        None, "how many seeds, SFT models and all; default: 1, with --full 3", POSITIVE, _FEW
    )
    seed: int = setting(0, "the first of them", _SEED)
    label_noise: float = setting(
        0.1, "probability that the annotator's label is wrong, for every kind of label", _HALF
    )
    kl_bound: float = setting(
        15.0, "a gain counts up to this KL to the SFT model, in nats per sequence", POSITIVE
    )
    steps: int = setting(30, "optimizer steps of each method", POSITIVE)
    responses_per_step: int = setting(64, "responses that a step learns from", POSITIVE)
    per_prompt: int = setting(4, "responses to a prompt in the data of offline methods", _TWO)
    judged: int = setting(256, "fresh samples by which a policy is judged", _TWO)
    sft_steps: int = setting(300, "optimizer steps of the SFT model", POSITIVE)
    hidden: int = setting(96, "hidden size of the model", POSITIVE)
    layers: int = setting(2, "its layers", POSITIVE)
    heads: int = setting(4, "its attention heads", POSITIVE)
    max_new_tokens: int = setting(72, "longest response of online methods in tokens", POSITIVE, NOT_BELOW_0)
    workers: int | None = setting(
        None,
        "methods that are trained at once, each on one thread, which changes no number; default: one per core",
        POSITIVE,
    )  # fmt: skip
    progress: bool = setting(True, "show a progress bar on a terminal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick and self.full:
            raise UserError("--quick and --full exclude each other")
        if self.responses_per_step % (2 * self.per_prompt):
            raise UserError(
                f"--responses-per-step is {self.responses_per_step}: it must be a multiple of twice "
                f"--per-prompt, {2 * self.per_prompt}"
            )
        if self.hidden % (2 * self.heads):
            raise UserError(f"--hidden is {self.hidden}: it must be a multiple of 2 x --heads {self.heads}")

    def number_of_seeds(self) -> int:
        return self.seeds or (3 if self.full else 1)

    def responses(self) -> int:
        """The budget: responses that are sampled and labelled for a method, as many as its steps learn
        from."""
        return self.steps * self.responses_per_step

    def output_dir(self) -> Path:
        return Path(self.output).expanduser().resolve()

    def numbers(self) -> dict[str, Any]:
        """The settings that a cell's numbers depend on."""
        free = {"output", "method", "quick", "full", "seeds", "seed", "kl_bound", "workers", "progress"}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in free}


def check_entries(config: ArenaConfig) -> list[Entry]:
    """The chosen entries, every stage of which `fastalign.train` accepts. Raises `UserError`."""
    for name in config.method:
        if name not in ENTRIES:
            near = difflib.get_close_matches(name, ENTRIES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--method {name!r} is unknown{hint}; legal: {', '.join(ENTRIES)}")
    chosen = [entry for name, entry in ENTRIES.items() if name in config.method or not config.method]
    for entry in chosen:
        for beta in entry.betas(config.full):
            given: dict[str, str] = {}
            for stage in entry.stages:
                made = stage_config(config, stage, beta, config.seed, "out", "sft", given)
                memory = {"texts_in_memory": bool(made.ptx_coef)} if stage.online else {}
                make_method(stage.method, made, **memory)
                given = {stage.gives: "out"} if stage.gives else {}
    return chosen


def stage_config(
    config: ArenaConfig,
    stage: Stage,
    beta: float | None,
    seed: int,
    output: str,
    sft: str,
    given: dict[str, str],
) -> Any:
    """What `fastalign.train` gets for a stage: the arena's own settings, and the stage's. `given`: what the
    stage before has made, setting -> directory."""
    options, settings = stage.numbers(beta)
    row = METHODS[stage.method]
    common: dict[str, Any] = {
        "output": output, "loss": stage.loss, "loss_options": options, "learning_rate": stage.rate, "seed": seed,
        "max_steps": max(1, round(config.steps * stage.share)), "progress": False, "tensorboard": False,
        "log_every": config.steps, **settings, **given,
    }  # fmt: skip
    if stage.held_to_sft:
        common["ref_model"] = sft
    if stage.online:
        each = stage.scored * settings.get("samples_per_prompt", row.defaults["samples_per_prompt"])
        if "minibatches" in row.settings:  # a step is one update, as of every other method
            common = {"minibatches": 1, "rollout_epochs": 1, **common}
        return OnlineConfig(
            batch_size=config.responses_per_step // each,
            max_new_tokens=config.max_new_tokens,
            sample_batch=config.responses_per_step,
            **common,
        )
    if "token_metrics" in row.settings:
        common["token_metrics"] = False
    if stage.gives == "reward_model":
        common["model"] = sft
    per_example = _PER_EXAMPLE.get(stage.data, config.per_prompt)
    assert stage.data in FORMS, stage
    return TrainConfig(batch_size=config.responses_per_step // per_example, **common)
