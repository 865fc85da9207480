"""Preference pairs: DPO, every other loss of `fastalign.losses`, and mixtures of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import fastalign
from fastalign.preference.rules import RULES
from fastalign.runtime.checks import check_number, shown
from fastalign.runtime.metric import Total, merge_metrics
from fastalign.train.config import TrainConfig, check_booleans
from fastalign.train.data.formats import PREFERENCE, TASK_PREFERENCE
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import LogprobFn, Method, Scored, Split, token_metrics
from fastalign.train.methods.tasks import TaskWeights, members
from fastalign.train.metrics import Metrics
from fastalign.train.vain import note_examples

# Column of the data -> the option of the loss that takes one number per pair.
COLUMNS = {"soft_label": "soft_labels", "weight": "omega", "margin": "gamma_ext", "target": "target"}
# A function that makes weights from the policy (`Preset.weights`) -> the row statistic that it reads.
WEIGHTS = {"wpo_weights": "log_sum_sq_probs"}
# What a rule returns -> the metric that shows it.
_RULE_METRICS = {"beta": "beta_used", "valid": "kept_fraction", "gamma_ext": "margin_used", "anchor": "delta"}


class PreferenceMethod(Method):
    """DPO and its variants.

    A loss that looks at all pairs of a step (a rule with memory, sorting) is joint: with more than one pack
    per step the policy runs twice. Weights that a loss makes from the policy (WPO) are computed; the other
    numbers per pair are columns of the data.

    Args:
        logprob_fn: (logits [T, V], labels [T], -100 where nothing is scored) -> log-probs [T], in place of
            `fastalign.token_stats`; for comparisons. It yields no token metrics, so `config.token_metrics`
            must be off.
        loss_fn: in place of `fastalign.preference_loss`, called in the same way.
    """

    name, format, default_loss = "dpo", PREFERENCE, "dpo"

    def __init__(
        self,
        config: TrainConfig,
        *,
        logprob_fn: LogprobFn | None = None,
        loss_fn: Callable[..., Any] | None = None,
    ):
        super().__init__(config, logprob_fn=logprob_fn)
        self.loss_fn = loss_fn or fastalign.preference_loss
        self.parts, self.rules, self.clamp = resolve_loss(self.config, exact_kl=self.exact_kl)
        presets = [preset for preset, _ in self.parts]
        self.needs_reference = any(p.needs_reference for p in presets)
        self.check_reference()
        self.joint = any(p.rule is not None or p.order is not None or p.nonfinite == "drop" for p in presets)
        self.include_prompt = any(p.sft_include_prompt for p in presets)
        self.tasks = TaskWeights.of(config)
        if self.tasks is not None and any(p.rule is not None for p in presets):
            raise UserError(
                f"--task-weights: --loss {self.config.loss} has a memory of all pairs, whatever their task"
            )
        self.weights = next((p.weights for p in presets if p.weights), "")
        if self.weights:
            statistic = WEIGHTS[self.weights]
            if logprob_fn is not None:
                raise UserError(
                    f"logprob_fn yields no {statistic}, from which {presets[0].name.upper()}'s weights are "
                    "made"
                )
            self.outputs += (statistic,)
        self.format = (PREFERENCE if self.tasks is None else TASK_PREFERENCE).requiring(
            *(column for column, option in COLUMNS.items() if self._requires(option))
        )
        self.columns: tuple[str, ...] = ()
        # A lone loss travels as itself: it alone may have numbers per pair.
        self.mixture = len(self.parts) > 1 or self.parts[0][1] != 1.0
        self.loss_argument = self.parts if self.mixture else presets[0]
        self._dry_run()

    def _dry_run(self) -> None:
        """Evaluate the loss on a pair of one token each: what it refuses, it refuses now."""
        token = torch.zeros(2)
        options: dict[str, Any] = {
            option: torch.ones(1) for option in COLUMNS.values() if self._requires(option)
        }
        options |= {"omega": torch.ones(1)} if self.weights else {}
        options |= {"kl_ref_policy": token} if self.exact_kl else {}
        options |= {"state": [rule.eval() for rule in self.rules]} if self.rules else {}
        ends = torch.tensor([0, 1, 2], dtype=torch.int32)
        try:
            fastalign.preference_loss(token, token, ends, loss=self.loss_argument, mask=token == 0, **options)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None

    def _requires(self, option: str) -> bool:
        preset = self.parts[0][0]
        made = option == "omega" and bool(preset.weights)  # from the policy, not read
        return option in preset.requires and not made or option == "soft_labels" and preset.needs_soft_labels

    def _reads(self, column: str) -> bool:
        """Whether the loss has a use for a column that the data has."""
        preset = self.parts[0][0]
        if self.mixture or preset.order is not None:
            return (
                False  # a mixture shares no numbers per pair among its losses; a sorted pair has no partner
            )
        return {
            "soft_label": preset.takes_soft_labels,
            "weight": True,
            "margin": preset.pair_weight != 0,
            "target": "target" in preset.requires,
        }[column]

    def wanted_columns(self) -> tuple[str, ...]:
        """The columns that the loss cannot do without, and that of soft labels where it takes them."""
        soft = ("soft_label",) if self._reads("soft_label") else ()
        return tuple(dict.fromkeys((*self.format.required, *soft)))

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        loops = [
            f"{preset.name} is dpo's loss; the method is the loop: {fastalign.losses.LOOPS[preset.name]}"
            for preset, _ in self.parts
            if preset.name in fastalign.losses.LOOPS
        ]
        for text in loops:
            print(f"note: {text}")
        if not any(preset.sft_weight for preset, _ in self.parts):
            note_examples(
                (torch.equal(e.chosen, e.rejected) for e in train),
                "pair",
                "chosen and rejected are the same tokens",
            )
        found = [column for column in COLUMNS if column in train[0].values]
        self.columns = tuple(column for column in found if self._reads(column))
        for column in found:
            print(
                f"column {column}: "
                f"{'used' if column in self.columns else f'not used by --loss {self.config.loss}'}"
            )
        lacking = [column for column in self.columns if evaluation and column not in evaluation[0].values]
        if lacking:
            raise UserError(f"the evaluation data lacks the column {lacking[0]!r} that the training data has")

        if self.tasks is not None:
            self.tasks.read(train, evaluation)

    def state_dict(self) -> dict[str, Any]:
        tasks = {} if self.tasks is None else {"tasks": self.tasks.state_dict()}
        return {rule.rule: rule.state_dict() for rule in self.rules} | tasks

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.tasks is not None:
            self.tasks.load_state_dict(state["tasks"])
        for rule in self.rules:
            rule.load_state_dict(state[rule.rule])

    def labels(self, packed: fastalign.PackedBatch) -> torch.Tensor:
        # An SFT term over the prompt needs the log-probs of its tokens too; the mask keeps them out of
        # everything else.
        return (
            fastalign.shift_labels(packed.input_ids, packed.cu_seqlens)
            if self.include_prompt
            else packed.labels
        )

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        if self.joint:  # the one call sees every pair and counts for itself
            return {}
        examples = [split.examples[i] for i in indices]
        if self.tasks is None:
            return self._counts(examples)
        of_task = members(examples).items()
        return {"tasks": {name: self._counts([examples[i] for i in own]) for name, own in of_task}}

    def _counts(self, examples: Sequence[TokenExample]) -> dict[str, int]:
        """The denominators of a loss over these examples."""
        prompt = sum(len(example.prompt) - 1 for example in examples) if self.include_prompt else 0
        return {
            "num_items": len(examples),
            "num_sft_tokens": prompt + sum(len(example.chosen) for example in examples),
        }

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed, logprob = scored.packed, scored.policy["logprob"]
        metrics, options = {}, {COLUMNS[column]: scored.column(column) for column in self.columns}
        if self.weights:
            make, statistic = getattr(fastalign, self.weights), scored.policy[WEIGHTS[self.weights]]
            omega = make(logprob, statistic, packed.cu_seqlens, mask=packed.mask, clamp=self.clamp)
            options["omega"] = omega * options.get("omega", 1.0)
            metrics["omega_mean"] = (omega.sum(), omega.numel())
        if self.rules:
            options["state"] = [rule.train(training) for rule in self.rules]
        if self.exact_kl:
            options["kl_ref_policy"] = scored.policy["kl_ref_policy"]
        call = partial(
            self.loss_fn,
            logprob,
            scored.fixed.get("ref_logprobs"),
            packed.cu_seqlens,
            loss=self.loss_argument,
            mask=packed.mask,
        )
        if self.tasks is None:
            output = call(**known, **options)
            loss, found = output.loss, output.metrics()
        else:
            loss, found = self._by_task(call, scored, known.get("tasks", {}), options)
        for rule in self.rules:
            shown = {_RULE_METRICS[name]: value.double() for name, value in rule.used.items()}
            metrics |= {name: (value.sum(), value.numel()) for name, value in shown.items()}
        chosen = torch.arange(len(packed.cu_seqlens) - 1, device=packed.mask.device) % 2 == 0
        return loss, {**found, **metrics, **token_metrics(scored, chosen)}

    def _by_task(
        self, call: Callable[..., Any], scored: Scored, counts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Metrics]:
        """The weighted sum of the tasks' losses, each over its own pairs. `counts`: task -> its denominators."""
        total, metrics, per_pair = 0.0, {}, [name for name in options if name in COLUMNS.values()]
        for name, own in members(scored.examples).items():
            rows = torch.tensor(own, device=scored.packed.labels.device)
            numbers = {option: options[option][rows] for option in per_pair}
            output = call(
                pairs=torch.stack([2 * rows, 2 * rows + 1], 1),
                **counts.get(name, {}),
                **{**options, **numbers},
            )
            total = total + self.tasks.weights[name] * output.loss
            metrics = merge_metrics(
                metrics, output.metrics() | {f"task/{name}/loss": Total(output.loss.detach(), len(own))}
            )
        return total, metrics

    def updated(self, rate: float, metrics: Mapping[str, float]) -> dict[str, float]:
        if self.tasks is None:
            return {}
        used = dict(self.tasks.weights)
        self.tasks.update(
            {name: metrics[f"task/{name}/loss"] for name in used if f"task/{name}/loss" in metrics}
        )
        return {f"task/{name}/weight": weight for name, weight in used.items()}


def resolve_loss(
    config: TrainConfig, *, exact_kl: bool = False
) -> tuple[list[tuple[fastalign.Preset, float]], list[Any], float | None]:
    """(losses with their weights, rule objects, upper bound of weights made from the policy) that --loss and
    --set name. Raises `UserError` that lists the legal names, or says why the trainer cannot serve it."""
    weights = _mixture(config.loss or PreferenceMethod.default_loss)
    options: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for key, value in config.loss_options.items():
        name, dot, option = key.rpartition(".")
        if len(weights) > 1 and not dot:
            raise UserError(
                f"--set {key}: in a mixture an option belongs to one of its losses, for example "
                f"{next(iter(weights))}.{key}"
            )
        if dot and name not in weights:
            raise UserError(f"--set {key}: --loss {config.loss} has no part {name!r}")
        if option in ("soft_labels", "omega", "gamma_ext"):
            column = next(column for column, takes in COLUMNS.items() if takes == option)
            raise UserError(f"--set {key}: it is one number per pair; give the data a column {column!r}")
        options[name if dot else next(iter(weights))][option] = value
    parts, rules, clamp = [], {}, 1.0
    for name, weight in weights.items():
        try:
            preset, own = fastalign.losses.get(name), dict(options[name])
            if preset.rule is not None and preset.rule not in rules:
                rules[preset.rule] = _make_rule(preset.rule, own, config.seed)
            if preset.weights and "clamp" in own:
                clamp = own.pop("clamp")
            check_booleans(own, preset)
            preset = preset.replace(**own)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        _check_served(name, preset, mixed=len(weights) > 1 or weight != 1.0, exact_kl=exact_kl)
        parts.append((preset, weight))
    try:
        check_number("clamp", 1.0 if clamp is None else clamp, above=0.0)
    except (ValueError, TypeError):
        raise UserError(
            f"--set clamp={shown(clamp)}: a positive number, or None for weights without an upper bound"
        ) from None
    return parts, list(rules.values()), clamp


def _mixture(text: str) -> dict[str, float]:
    """`sigmoid=0.8,sft` -> {"sigmoid": 0.8, "sft": 1.0}."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if name in weights:
            raise UserError(f"--loss {text}: {name!r} is named twice")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise UserError(
                f"--loss {text}: the weight of {name!r} must be a number, got {weight!r}"
            ) from None
        if not (weights[name] > 0 and math.isfinite(weights[name])):
            raise UserError(
                f"--loss {text}: the weight of {name!r} must be positive, got {weight}; leave out a loss that "
                "should not count"
            )
    return weights


def _make_rule(kind: str, options: dict[str, Any], seed: int) -> Any:
    """The rule object; takes its own options out of `options`."""
    legal = [name for name in inspect.signature(RULES[kind]).parameters if name != "group"]
    own = {"seed": seed} if "seed" in legal else {}
    own |= {name: options.pop(name) for name in legal if name in options}
    return RULES[kind](**own)


def _check_served(name: str, preset: fastalign.Preset, *, mixed: bool, exact_kl: bool) -> None:
    """What cannot work on a file of pairs, and where to find it."""
    needs = [*preset.requires, *(["soft_labels"] if preset.needs_soft_labels else [])]
    elsewhere: Mapping[str, bool] = {
        "the KL between whole distributions; 'fastalign train tdpo' computes it": preset.needs_kl
        and not exact_kl,
        "the scores of a reward model; 'fastalign train reward' trains one": preset.of_scores,
        f"one number per pair ({', '.join(needs)}), which the losses of a mixture cannot share; use it alone": mixed
        and bool(needs),
    }
    for reason, applies in elsewhere.items():
        if applies:
            raise UserError(f"--loss {name} needs {reason}")
    if exact_kl and not mixed and not preset.needs_kl:
        raise UserError(
            f"--loss {name} uses no KL between whole distributions: 'fastalign train dpo' trains it, at less "
            "cost"
        )
    other = [field for field in needs if field not in COLUMNS.values()]
    if other:
        raise UserError(f"--loss {name} needs {other[0]}, for which the data has no column")
