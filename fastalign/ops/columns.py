"""Columns and codes by name: where what stands in the tensors that ops share, and the numbers that stand for
the names of options. Names and values are those of the enums in csrc/math (kTabValid is TAB_VALID); a test
holds them together. Triton's: fastalign/ops/math/columns.py."""

from __future__ import annotations

# --- codes: the position of a name in its tuple. Unpacking fails where a name has come or gone. ---

# Of pairs; the links and the last three of lists too.
TRANSFORMS = ("identity", "logsig", "negexp", "alpha", "logodds")
IDENTITY, LOGSIG, NEGEXP, ALPHA, LOGODDS = range(len(TRANSFORMS))
NO_LINK = -1
LINKS = ("logistic", "hinge", "squared", "exp", "truncquad", "savage", "sigmoid", "linear", "exo", "discopop")
LOGISTIC, HINGE, SQUARED, EXP, TRUNCQUAD, SAVAGE, SIGMOID, LINEAR, EXO, DISCOPOP = range(len(LINKS))
# The links that read tau, and the largest tau that is legal: beyond it the stable form is not bounded.
TAU_LINKS = {"discopop": 1.0}
LABELS = ("hard", "smooth", "robust", "soft")
HARD, SMOOTH, ROBUST, SOFT = range(len(LABELS))
SFT_NORMS = ("token_mean_global", "seq_mean", "seq_sum")
TOKEN_MEAN_GLOBAL, SEQ_MEAN, SEQ_SUM = range(len(SFT_NORMS))
REDUCTIONS = ("mean", "sum", "none")
MEAN, SUM, NONE = range(len(REDUCTIONS))
# Of lists.
KINDS = ("pairwise", "plackett_luce", "pro", "infonca", "nca", "exo")
PAIRWISE, PLACKETT_LUCE, PRO, INFONCA, NCA, EXO_LIST = range(len(KINDS))
PAIR_GAINS = ("one", "lambda")
GAIN_ONE, GAIN_LAMBDA = range(len(PAIR_GAINS))
# Of the policy and value losses.
SURROGATES = ("clip", "reinforce", "cispo", "sapo", "gmpo", "vespo")
CLIP, REINFORCE, CISPO, SAPO, GMPO, VESPO = range(len(SURROGATES))
RATIOS = ("token", "seq_mean", "seq_mean_token", "seq_sum")
RATIO_TOKEN, RATIO_SEQ_MEAN, RATIO_SEQ_MEAN_TOKEN, RATIO_SEQ_SUM = range(len(RATIOS))
AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_sum",
)
TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM, TOKEN_SUM = range(
    len(AGGREGATIONS)
)
KL_KINDS = ("k1", "k2", "k3", "abs", "k3+")  # k3+: the value of k3 with the gradient of k2
K1, K2, K3, ABS, K3_PLUS = range(len(KL_KINDS))
IS_MODES = (None, "truncate", "mask")
IS_AS_GIVEN, IS_TRUNCATE, IS_MASK = range(len(IS_MODES))

# Bits of the row ops' `outputs`, in the order of their results; those that need reference logits last.
ROW_OUTPUTS = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1", "ref_logprob", "kl_policy_ref",
               "kl_ref_policy")  # fmt: skip
(OUT_LOGPROB, OUT_ENTROPY, OUT_LOGSUMEXP, OUT_LOG_SUM_SQ, OUT_MEAN_LOGIT, OUT_IS_TOP1, OUT_REF_LOGPROB, OUT_KL_POLICY_REF,
 OUT_KL_REF_POLICY) = (1 << i for i in range(len(ROW_OUTPUTS)))  # fmt: skip

# --- columns; the last name of each is their number ---------------------------------------------------------

# The row state [rows, STATE_WIDTH]; from COL_REF_M on 0 without reference logits.
(COL_M, COL_S0, COL_S1, COL_S2, COL_SZ, COL_UMAX, COL_TOP, COL_LARGEST, COL_VALID, COL_REF_M, COL_REF_S0, COL_T, COL_TR,
 COL_REF_UMAX, STATE_WIDTH) = range(15)  # fmt: skip

# The pair kernel's sums [P, 2, SUM_WIDTH], the second axis being the sides, and its table [P, TABLE_WIDTH].
CHOSEN, REJECTED = range(2)
SUM_POLICY, SUM_RATIO, SUM_LENGTH, SUM_KL, SUM_SFT, SUM_SFT_LENGTH, SUM_WIDTH = range(7)
(TAB_CHOSEN, TAB_REJECTED, TAB_KL_CHOSEN, TAB_KL_REJECTED, TAB_SFT, TAB_REWARD_CHOSEN, TAB_REWARD_REJECTED, TAB_LOGIT, TAB_VALID, TAB_PAIR,
 TAB_NLL, TABLE_WIDTH) = range(12)  # fmt: skip
# Both sides at once.
RATIO_SLOPES = slice(TAB_CHOSEN, TAB_REJECTED + 1)
KL_SLOPES = slice(TAB_KL_CHOSEN, TAB_KL_REJECTED + 1)
REWARDS = slice(TAB_REWARD_CHOSEN, TAB_REWARD_REJECTED + 1)

# The list kernel's table [L, LIST_TABLE_WIDTH].
(LIST_TERM, LIST_NLL, LIST_VALID, LIST_PAIRS, LIST_CORRECT, LIST_MARGIN, LIST_TOP, LIST_BEST, LIST_WORST,
 LIST_TABLE_WIDTH) = range(10)  # fmt: skip

# Statistics of the policy and value losses: sums over the scored tokens of a call. Both begin with items and
# loss.
STATS = (
    "items", "loss", "policy", "tokens", "sequences", "ratio", "ratio_m2", "approx_kl", "clip_low",
    "clip_high", "clip_dual", "kl", "entropy", "is_weight", "is_clipped", "nonfinite",
)  # fmt: skip
VALUE_STATS = ("items", "loss", "tokens", "sequences", "clipped", "value", "returns", "returns_m2", "error", "error_sq",
               "error_m2", "nonfinite")  # fmt: skip
MOMENTS, VALUE_MOMENTS = ("ratio_m2",), ("returns_m2", "error_m2")  # sums of squared deviations from the mean
(POLICY_ITEMS, POLICY_LOSS, POLICY_POLICY, POLICY_TOKENS, POLICY_SEQUENCES, POLICY_RATIO, POLICY_RATIO_M2, POLICY_APPROX_KL, POLICY_CLIP_LOW,
 POLICY_CLIP_HIGH, POLICY_CLIP_DUAL, POLICY_KL, POLICY_ENTROPY, POLICY_IS_WEIGHT, POLICY_IS_CLIPPED,
 POLICY_NONFINITE) = range(len(STATS))  # fmt: skip
(VALUE_ITEMS, VALUE_LOSS, VALUE_TOKENS, VALUE_SEQUENCES, VALUE_CLIPPED, VALUE_VALUE, VALUE_RETURNS, VALUE_RETURNS_M2, VALUE_ERROR,
 VALUE_ERROR_SQ, VALUE_ERROR_M2, VALUE_NONFINITE) = range(len(VALUE_STATS))  # fmt: skip
POLICY_WIDTH, VALUE_WIDTH = len(STATS), len(VALUE_STATS)

# The moments that GAE gives, and those of one piece of a policy loss, whose count stands in the piece's
# statistics.
MOMENT_COUNT, MOMENT_MEAN, MOMENT_M2, MOMENT_WIDTH = range(4)
PART_MEAN, PART_M2, PART_WIDTH = range(3)

# --- sizes --------------------------------------------------------------------------------------------------

MAX_LIST = 64  # responses per list: a block of 64 threads on the GPU
# Tokens that are handled at once where workspaces are laid out by them.
GAE_TILE, POLICY_TILE = 1024, 2048
