"""What takes the place of TRL's fused divergence of a student from a teacher (DistillationTrainer)."""

from __future__ import annotations

from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as TheirDivergence
from trl.trainer.utils import maybe_gather_lm_head_ctx

import fastalign
from fastalign.adapters.trl.head import check_head, head_rows, multiplied_as

# TRL's beta -> our output. Between 0 and 1 TRL has a Jensen-Shannon divergence, which ours does not know.
DIRECTIONS = {0.0: "kl_ref_policy", 1.0: "kl_policy_ref"}


class ChunkedDivergence:
    """`fastalign.linear_token_stats` with a reference, called as TRL calls its autograd function."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) for beta = 0, KL(student || teacher) for beta = 1, and the student's
        entropy, which has no gradient: [N] fp32 each. For a beta between them, and where the two heads have
        different scales or caps, this is TRL's own function.

        Args:
            student_hidden: [N, H]; student_weight: [V, H]; student_bias: [V]. teacher_hidden: [N, H'];
                teacher_weight: [V, H']; teacher_bias: [V]: constants.
        """
        transform = (student_logit_scale, student_final_logit_softcapping)
        if beta not in DIRECTIONS or transform != (teacher_logit_scale, teacher_final_logit_softcapping):
            return TheirDivergence.apply(
                student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
                beta, temperature, student_logit_scale, student_final_logit_softcapping, teacher_logit_scale,
                teacher_final_logit_softcapping,
            )  # fmt: skip
        check_head("the student's lm_head.weight", student_weight)
        check_head("the teacher's lm_head.weight", teacher_weight)
        name, autocast = DIRECTIONS[beta], multiplied_as(student_hidden, student_weight)

        def rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            with maybe_gather_lm_head_ctx(teacher_weight, teacher_bias), autocast():
                stats = fastalign.linear_token_stats(
                    hidden, weight, bias=bias, ref_hidden=teacher_hidden, ref_weight=teacher_weight,
                    ref_bias=teacher_bias, outputs=(name, "entropy"), differentiable=(name,),
                    temperature=temperature, logit_scale=student_logit_scale,
                    softcap=student_final_logit_softcapping,
                )  # fmt: skip
            return getattr(stats, name).float(), stats.entropy.float()

        with maybe_gather_lm_head_ctx(student_weight, student_bias):
            divergence, entropy = head_rows(rows, 1, student_hidden, student_weight, student_bias)
        return divergence, entropy
