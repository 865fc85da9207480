"""`PackedDPOTrainer`: TRL's DPOTrainer without padding, with TRL's losses or any preference preset of
fastalign."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin
from trl import DPOConfig, DPOTrainer

import fastalign
from fastalign.adapters.common import AdapterError
from fastalign.adapters.preset import Columns, PresetLoss, placed
from fastalign.adapters.trl import ADAPTER
from fastalign.adapters.trl.packed_forward import PackedForward, Pass
from fastalign.adapters.trl.refusals import check_config, check_inputs
from fastalign.train.files import replace_file

_SIGNATURE = inspect.signature(DPOTrainer.__init__)
RULES_FILE = "fastalign_rules.pt"  # in a checkpoint: what the rules of a preset remember


class PackedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer on packed sequences: no pad token reaches the models, their log-probs are made without
    logits, and losses and metrics are TRL's on the same pairs, whatever the DPOConfig says of them.

    Args:
        preset: in place of `loss_type`, a loss of `fastalign.losses.available()`: its name, a
            `fastalign.Preset`, or a mixture [(name or Preset, weight), ...].
        preset_options: its options, as `fastalign.preference_loss` takes them; among them `state`, the rule
            object of beta_dpo, alpha_dpo and bco, which checkpoints keep, and `clamp` of wpo. What the loss
            needs of every pair (`gamma_ext`, `soft_labels`, `target`, `omega`) are columns of the data sets,
            of these names.
        others: DPOTrainer's own.

    With a preset the metrics are those of `PreferenceOutput.metrics()` under TRL's names, and TRL's of tokens. A
    loss without a reference loads and runs none.

    Raises:
        AdapterError, a RuntimeError: another TRL than the one that this was tested with; an option that packed
            sequences cannot honour, or that contradicts the preset; a model whose packed sequences would see
            each other. All but the last before any work.
    """

    def __init__(
        self,
        *args: Any,
        preset: str | fastalign.Preset | Sequence[tuple[str | fastalign.Preset, float]] | None = None,
        preset_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        version = ADAPTER.installed()
        if version is None or not ADAPTER.tested(version):
            raise AdapterError(f"trl is {version}; PackedDPOTrainer was tested with {ADAPTER.versions}")
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        given, config = bound.arguments, bound.arguments.get("args")
        if preset is None and preset_options is not None:
            raise AdapterError("preset_options are options of a preset; give preset, too")
        self.preset = None if preset is None else PresetLoss(preset, preset_options or {})
        check_inputs(given, self.preset)
        if config is not None:
            check_config(config, self.preset)
        self._forwards: dict[int, PackedForward] = {}
        self._passes: list[Pass] | None = None
        if self.preset is not None and not self.preset.needs_reference:
            given["ref_model"] = _NoReference()  # None would make TRL load one
        with _unwarned(config):
            super().__init__(*bound.args[1:], **bound.kwargs)
        self.padding_free = True
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # by accelerate's own configuration
            raise AdapterError(
                "the models would be sharded (FSDP or DeepSpeed); legal: data parallel training"
            )
        if isinstance(self.processing_class, ProcessorMixin):
            raise AdapterError("processing_class is of a vision model; PackedDPOTrainer takes text alone")
        if self.preset is not None:
            self._serve_preset(self.preset)
        self._pack_models()

    def _serve_preset(self, preset: PresetLoss) -> None:
        self.beta = preset.beta
        if not preset.needs_reference:
            self.ref_model = None
        if preset.columns:
            self.data_collator = Columns(self.data_collator, preset.columns)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.preset is not None:
            own = [name for name in self.preset.columns if name not in self._signature_columns]
            self._signature_columns = [*self._signature_columns, *own]

    def _pack_models(self) -> None:
        """Attach to policy and reference; while TRL's constructor still runs where it precomputes."""
        for model in (self.model, self.ref_model):
            if model is None or id(base := _base(model)) in self._forwards:
                continue
            forward = PackedForward(base, self.accelerator, self.args.max_length)
            if model is self.model:
                self._policy = forward
                weighs = self.use_weighting or (self.preset is not None and self.preset.weighs)
                forward.outputs += ("entropy", "mean_logit", "is_top1") + ("log_sum_sq_probs",) * weighs
            forward.attach(self._note)
            self._forwards[id(base)] = forward

    def _note(self, found: Pass) -> None:
        if self._passes is not None:
            self._passes.append(found)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[list[Pass]]:
        """Within: forward passes are noted in this list."""
        self._passes = []
        try:
            yield self._passes
        finally:
            self._passes = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._policy.attending():
            return super().training_step(*args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        self._pack_models()
        columns = self.preset.columns if self.preset is not None else ()
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in columns})

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.preset is None:
            return super()._compute_loss(model, inputs, return_outputs)
        per_pair = {name: inputs[name] for name in self.preset.columns}
        inputs = {name: value for name, value in inputs.items() if name not in per_pair}
        sums, reference = self._reference(inputs)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        self._policy.against = reference.scores if reference and self.preset.needs_kl else None
        try:
            with self._noting() as passes:  # TRL's metrics; its loss is not needed
                found = super()._compute_loss(model, inputs | sums, return_outputs)
        finally:
            self.precompute_ref_logps, self._policy.against = precomputed, None
        policy, batch = passes[0], passes[0].batch
        if reference is not None:
            ref_logprobs = reference.stats.logprob
        else:
            ref_logprobs = placed(torch.cat(list(sums.values())), batch.cu_seqlens, batch.mask)
        output = self.preset(
            policy.stats, ref_logprobs, batch.cu_seqlens, batch.mask, per_pair, training=self.model.training
        )
        self._record(output.metrics())
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * policy.aux_loss
        return (loss, found[1]) if return_outputs else loss

    def _reference(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Pass | None]:
        """(the batch's columns of sums, as TRL precomputes them; the pass that they are of, if one was
        run)."""
        names = ("ref_chosen_logps", "ref_rejected_logps")
        if self.precompute_ref_logps:
            return {name: inputs[name] for name in names}, None
        if not self.preset.needs_reference:
            zero = torch.zeros(inputs["input_ids"].shape[0] // 2, device=inputs["input_ids"].device)
            return dict.fromkeys(names, zero), None
        with self._noting() as passes:
            sums = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return dict(zip(names, sums)), passes[0]

    def _record(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of the preset, over all ranks, in the place of TRL's of its own loss."""
        kept = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in kept if name.startswith(("rewards/", "logps/"))]:
            kept[name].pop()
            if not kept[name]:
                del kept[name]
        for name, metric in metrics.items():
            parts = self.accelerator.gather(torch.stack([metric.sum, metric.count]).float()[None]).sum(0)
            kept[name].append(float(type(metric)(*parts)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.preset is not None and self.preset.rules and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            replace_file(folder / RULES_FILE, lambda path: torch.save(self.preset.state_dict(), path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.preset is not None and self.preset.rules:
            self.preset.load_state_dict(torch.load(Path(checkpoint) / RULES_FILE, weights_only=True))


class _NoReference(torch.nn.Module):
    """What TRL's constructor takes for a reference, where the loss has none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()

    def forward(self) -> None:
        raise TypeError("this loss has no reference")


def _base(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


@contextlib.contextmanager
def _unwarned(config: DPOConfig | None) -> Iterator[None]:
    """Within: padding_free is off, of which TRL's constructor only says that it is not available."""
    if config is None or not config.padding_free:
        yield
        return
    config.padding_free = False
    try:
        yield
    finally:
        config.padding_free = True
