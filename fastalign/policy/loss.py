"""Policy-gradient and value losses over packed tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.losses.policy import PolicyPreset, resolve
from fastalign.ops.columns import AGGREGATIONS
from fastalign.ops.policy.op import PolicyFunction, PolicyFwd, ValueFunction, ValueFwd
from fastalign.policy.output import PolicyOutput, ValueOutput
from fastalign.runtime.checks import (
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_outside_ops,
    check_number,
    global_count,
    one_element,
    per_token,
    row_mask,
)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    loss: str | PolicyPreset = "ppo",
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    ratio_min: float | None = None,
    ratio_max: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float | Tensor | None = None,
    kl_kind: str | None = None,
    entropy_coef: float | Tensor | None = None,
    aggregation: str | None = None,
    num_items: float | Tensor | None = None,
    is_weight: Tensor | None = None,
    is_mode: str | None = None,
    **options: Any,
) -> PolicyOutput:
    """A policy-gradient loss on packed tokens: sum of n_t (w_t s(rho_t, A_t) + kl_coef k(lp_t - ref_t) -
    entropy_coef H_t).

    The surrogate s, the ratio rho, the aggregation n and their defaults are the preset's:
    `fastalign.policy_losses` has the formulas, the table of the named losses (`available()`) and their
    papers. An option left at None takes the preset's own value.

    Args:
        logprobs: [T] policy log-probs, row-aligned (row t scores the next token); differentiable.
        old_logprobs: [T] log-probs under the policy that sampled; None: the current policy sampled, rho = 1.
            Never differentiated.
        advantages: [T], or [S] (one per sequence, needs cu_seqlens). Losses with one ratio per sequence
            (gspo, luspo, gmpo, rloo) take [S] only; where S == T they read it as [S] and all others as [T].
        loss: a name (ppo, reinforce, grpo, dr_grpo, dapo, gspo, gspo_token, cispo, rloo, luspo, sapo, gmpo,
            vespo) or a PolicyPreset.
        cu_seqlens: [S + 1] int32, from 0 to T; needed by losses and aggregations that look at sequences.
        mask: [T] bool, row-aligned: the response tokens. All others get gradient 0, whatever they hold. None,
            every token is one, is legal only where none are counted here: with aggregation="token_sum", or
            num_items and any other aggregation but seq_mean_token_mean, and with ratio="token" or
            loss="reinforce".
        ref_logprobs: [T] reference log-probs for the KL term and its metric. entropy: [T] entropy of the
            policy, differentiable.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (gmpo: the log-ratio to
            [-clip_low, clip_high]).
        ratio_min, ratio_max: the same bounds as ratios; each replaces the preset's bound on that side.
        dual_clip: c > 1: where A < 0 the term is at most -A c.
        kl_coef: weight of the KL term (number or 0-dim tensor); kl_kind: k1, k2, k3, abs (gradient: the
            estimator's own, 1, d, 1 - e^-d, sign d with d = logprobs - ref_logprobs) or k3+ (value of k3,
            gradient of k2); needs ref_logprobs. kl_bias_correction (bool): the term times rho; needs kl_coef.
            kl_clamp: the term is clamped to +-kl_clamp, without gradient beyond; None: never; "auto"
            (default): 10 for k3, which grows as e^-d, never for the others.
        entropy_coef: weight of the entropy bonus (number or 0-dim tensor).
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm (needs
            norm_length) or token_sum. A sequence without scored tokens does not count.
        num_items: tokens (token_mean) or sequences (seq_...) over all micro-batches and ranks: number or
            0-dim tensor.
        is_weight: [T] or [S] importance weights on the surrogate (not on KL and entropy), constants. is_mode:
            None (as given), "truncate" (at most is_max), "mask" (0 outside [is_min, is_max]).
        options: every other field of PolicyPreset by name: is_max, is_min, norm_length, ratio, surrogate,
            kl_bias_correction, tau_pos, ...

    Returns:
        PolicyOutput: loss (scalar) and metrics() (clip fractions, approximate KL, ratio, KL, entropy) as
        (sum, count) on the device.

    Raises:
        ValueError, TypeError: unknown loss, option or aggregation, an option without effect, shapes, dtypes,
            devices, missing cu_seqlens, mask, ref_logprobs or entropy, cu_seqlens not running monotonically
            from 0 to T (values of tensors are checked on the CPU).
    """
    for name, option in (("clip_low", clip_low), ("clip_high", clip_high), ("ratio_min", ratio_min), ("ratio_max", ratio_max),
                         ("dual_clip", dual_clip), ("kl_coef", kl_coef), ("kl_kind", kl_kind), ("entropy_coef", entropy_coef),
                         ("aggregation", aggregation), ("is_mode", is_mode)):  # fmt: skip
        if option is not None:
            options[name] = option
    preset, coefficients = resolve(loss, options)
    logprobs = per_token("logprobs", logprobs)
    if old_logprobs is not None:
        old_logprobs = per_token("old_logprobs", old_logprobs, logprobs).detach()
    if preset.needs_sequences and cu_seqlens is None:
        raise ValueError(f"{_described(preset)} needs cu_seqlens, the boundaries of the sequences")
    if preset.aggregation == "seq_mean_token_sum_norm" and preset.norm_length is None:
        raise ValueError(
            f"{_described(preset)} needs norm_length, the constant that a sequence's sum is divided by (the "
            "longest possible response)"
        )
    if mask is None and (preset.needs_lengths or (preset.aggregation != "token_sum" and num_items is None)):
        raise ValueError(
            f"{_described(preset)} counts response tokens: mask is required (row-aligned, True at response "
            "tokens)"
        )
    if ref_logprobs is None and ("kl_coef" in coefficients or preset.kl_coef != 0):
        raise ValueError("kl_coef needs ref_logprobs")
    if ref_logprobs is None and kl_kind is not None:
        raise ValueError(f"kl_kind={kl_kind!r} has no effect without ref_logprobs")
    if options.get("kl_bias_correction") and "kl_coef" not in options and preset.kl_coef == 0:
        raise ValueError("kl_bias_correction=True has no effect without kl_coef")
    if isinstance(options.get("kl_clamp"), (int, float)) and "kl_coef" not in options and preset.kl_coef == 0:
        raise ValueError(f"kl_clamp={options['kl_clamp']!r} has no effect without kl_coef")
    if entropy is None and ("entropy_coef" in coefficients or preset.entropy_coef != 0):
        raise ValueError("entropy_coef needs entropy, the policy's entropy per token")
    if is_weight is None and preset.is_mode is not None:
        raise ValueError("is_mode needs is_weight")
    if is_weight is not None and preset.surrogate == "vespo":
        raise ValueError(
            "vespo weighs by its own ratio: give the sampler's log-probs as old_logprobs instead of is_weight"
        )
    cu_seqlens = None if cu_seqlens is None else check_cu_seqlens(cu_seqlens, logprobs)
    advantages, per_sequence = per_token_or_sequence("advantages", advantages, logprobs, cu_seqlens, preset)
    given = {
        n
        for n, t in (("ref_logprobs", ref_logprobs), ("entropy", entropy), ("is_weight", is_weight))
        if t is not None
    }
    is_per_sequence = False
    if is_weight is not None:
        is_weight, is_per_sequence = per_token_or_sequence(
            "is_weight", is_weight, logprobs, cu_seqlens, preset
        )
    if ref_logprobs is not None:
        ref_logprobs = per_token("ref_logprobs", ref_logprobs, logprobs).detach()
    if entropy is not None:
        entropy = per_token("entropy", entropy, logprobs)
    # Without anything per sequence the kernels cut the tokens as they like.
    boundaries = (
        cu_seqlens
        if preset.needs_sequences or per_sequence or is_per_sequence
        else _unused(cu_seqlens, logprobs)
    )
    arguments = PolicyFwd(
        logprobs,
        old_logprobs,
        advantages,
        boundaries,
        row_mask(mask, logprobs),
        ref_logprobs,
        entropy,
        is_weight,
        *(
            one_element(n, coefficients[n], logprobs) if n in coefficients else None
            for n in ("kl_coef", "entropy_coef")
        ),
        _num_items(num_items, preset.aggregation, logprobs),
        preset.params(per_sequence, is_per_sequence),
        with_entropy_grad=False,
    )
    value, stats = PolicyFunction.apply(logprobs, entropy, arguments)
    return PolicyOutput(value, stats, preset, frozenset(given))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    clip: float | None = 0.2,
    aggregation: str = "token_mean",
    norm_length: float | None = None,
    num_items: float | Tensor | None = None,
) -> ValueOutput:
    """The value function's loss (Schulman et al. 2017, arXiv 1707.06347): l = max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2.

    d l / d v = v - R, or 0 where the clipped branch is strictly larger. There is no other factor: multiply by
    your vf_coef.

    Args:
        values: [T], differentiable, any floating type. returns: [T]. old_values: [T], the values at rollout;
            not needed with clip=None.
        clip: half the width of the range that a value may move in, >= 0; None: the plain squared error.
        mask: [T] bool, row-aligned: the response tokens. None, every token is one, is legal only with
            aggregation="token_sum", or num_items and any other aggregation but seq_mean_token_mean.
        cu_seqlens: [S + 1] int32, for the seq_... aggregations. aggregation, norm_length, num_items: as in
            `policy_loss`.

    Returns:
        ValueOutput: loss (scalar), explained_variance (0-dim), metrics() as (sum, count) on the device.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown aggregation, missing mask, cu_seqlens,
            old_values or norm_length, malformed cu_seqlens (as in `policy_loss`).
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    values = per_token("values", values)
    returns = per_token("returns", returns, values).detach()
    if clip is not None:
        check_number("clip", clip, low=0.0)
        if old_values is None:
            raise ValueError("clip needs old_values; clip=None is the plain squared error")
    old_values = None if clip is None else per_token("old_values", old_values, values).detach()
    if aggregation.startswith("seq_") and cu_seqlens is None:
        raise ValueError(f"aggregation={aggregation!r} needs cu_seqlens, the boundaries of the sequences")
    if (aggregation == "seq_mean_token_sum_norm") != (norm_length is not None):
        raise ValueError(
            f"norm_length={norm_length!r}: aggregation 'seq_mean_token_sum_norm' needs it, and no other has "
            f"it (got {aggregation!r})"
        )
    if norm_length is not None:
        check_number("norm_length", norm_length, above=0.0)
    if mask is None and (
        aggregation == "seq_mean_token_mean" or (aggregation != "token_sum" and num_items is None)
    ):
        raise ValueError(
            f"aggregation={aggregation!r} counts tokens: mask is required (row-aligned, True at response "
            "tokens)"
        )
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(cu_seqlens, values)
        cu_seqlens = cu_seqlens if aggregation.startswith("seq_") else _unused(cu_seqlens, values)
    arguments = ValueFwd(
        values,
        old_values,
        returns,
        cu_seqlens,
        row_mask(mask, values),
        _num_items(num_items, aggregation, values),
        clip=0.0 if clip is None else float(clip),
        aggregation=AGGREGATIONS.index(aggregation),
        norm_length=1.0 if norm_length is None else float(norm_length),
    )
    value, stats = ValueFunction.apply(values, arguments)
    return ValueOutput(value, stats, aggregation)


def _described(preset: PolicyPreset) -> str:
    return f"loss {preset.name!r} (ratio={preset.ratio!r}, aggregation={preset.aggregation!r})"


def per_token_or_sequence(
    name: str, tensor: Any, like: Tensor, cu_seqlens: Tensor | None, preset: PolicyPreset
) -> tuple[Tensor, bool]:
    """A constant [T] or [S] tensor in the type of the log-probs, and whether it is [S]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    is_per_sequence = (
        tensor.dim() == 1
        and tensor.shape[0] == sequences
        and (preset.needs_sequence_values or tensor.shape != like.shape)
    )
    if preset.needs_sequence_values and not is_per_sequence:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; loss {preset.name!r} has one ratio per sequence and "
            "takes one value per sequence: "
            f"({sequences},) (gspo_token takes one per token)"
        )
    if is_per_sequence:
        like = like.new_empty(sequences)
    elif tensor.shape != like.shape:
        legal = f"({like.shape[0]},)" + (
            " (or one per sequence, with cu_seqlens)" if sequences is None else f" or ({sequences},)"
        )
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; legal here: {legal}")
    return per_token(name, tensor, like).detach(), is_per_sequence


def _unused(cu_seqlens: Tensor | None, like: Tensor) -> None:
    """Boundaries that the loss does not need: their values are checked here, for the op, which checks the
    others, does not see them."""
    if cu_seqlens is not None:
        check_cu_seqlens_outside_ops(cu_seqlens, like.shape[0])


def _num_items(value: Any, aggregation: str, like: Tensor) -> Tensor | None:
    if value is not None and aggregation == "token_sum":
        raise ValueError('num_items has no effect with aggregation="token_sum", which divides by nothing')
    return global_count("num_items", value, like)
