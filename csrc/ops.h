// Every exported function, once, CPU and CUDA side by side. Arguments are plain structs of pointers, sizes and strides;
// a null pointer is an input not given or an output not asked for. Outputs are allocated by the caller.
#pragma once
#include <cstdint>
#include "math/row_state.h"

namespace fastalign {

// [rows, vocab] logits as (outer, inner) rows: row r lies at (r / inner) * stride_outer + (r % inner) * stride_inner elements.
struct RowsView {
  void* data;
  int64_t rows, inner, stride_outer, stride_inner, vocab;
};

// What both directions are told of the rows.
struct RowArgs {
  RowsView logits, ref;         // ref: the reference logits, same dtype, rows and vocab, strides of their own; data null: none
  int dtype;
  const int64_t* labels;        // [rows, targets], or null
  int64_t targets;
  const uint8_t* mask;          // [rows]: 0 = row not scored; or null
  int64_t ignore_index;         // an ignored target gives 0; a row whose targets are all ignored is masked like mask = 0
  double factor, cap_scale;     // see math/row_state.h
  const void* temperature_ptr;  // 0-dim tensor in the accumulation dtype, or null: `temperature`
  double temperature;
  int64_t vocab_start, vocab_total;
};

// What is finished from row states, in the accumulation dtype; null when not asked for. logprob and ref_logprob are [rows, targets], the
// others [rows].
struct RowResults {
#define FA_FIELD(bit, name) void* name;
  FA_ROW_RESULTS(FA_FIELD)
#undef FA_FIELD
};

struct TokenStatsArgs : RowArgs, RowResults {
  int outputs;                  // RowOutput bits
  const void* state_in;         // [rows, kStateWidth]: states of the shards before this one, merged in; or null
  const void* target_in;        // [rows, targets], with ref [2, rows, targets]: u of the targets found so far (-inf: not yet); or null
  void *state, *target;         // accumulation dtype; target is [rows, targets], with ref [2, rows, targets]: policy, then reference
};

// ref is read only where a KL has an upstream gradient.
struct TokenStatsBackwardArgs : RowArgs {
  RowsView grad;                // logits' dtype; may be the same memory (in place)
  const void* state;            // [rows, kStateWidth]
  // accumulation dtype or null; all [rows] but for the first, [rows, targets]
  const void *g_logprob, *g_entropy, *g_logsumexp, *g_kl_policy_ref, *g_kl_ref_policy;
};

// Forward and backward of one call, for upstream gradients that are known beforehand: the rows may be read once. backward.state is
// forward.state, a workspace; backward.grad may be the same memory as the logits.
struct TokenStatsFusedArgs {
  TokenStatsArgs forward;
  TokenStatsBackwardArgs backward;
};

// States of parts of the vocabulary, merged in index order; what no part holds of the labels is -inf.
struct RowStatesMergeArgs {
  const void *states, *part_targets;  // [parts, rows, kStateWidth]; [parts, entries] or null
  int64_t parts, rows, entries;
  int dtype;                    // kFloat32 or kFloat64, of every floating tensor here
  void *state, *target;
};

// The outputs from finished states, without logits. Names as in RowArgs and TokenStatsArgs.
struct RowStatesFinishArgs : RowResults {
  const void *state, *target;
  int64_t rows;
  int dtype;                    // kFloat32 or kFloat64, of every floating tensor here
  const int64_t* labels;
  int64_t targets;
  const uint8_t* mask;
  int64_t ignore_index;
  double factor;
  const void* temperature_ptr;
  double temperature;
  int64_t vocab_total;
};

// x *= scale, without touching x where scale is 1.
struct ScaleRowsArgs {
  RowsView x;
  int dtype;
  const void* scale;            // one element, accumulation dtype
};

struct SequenceSumArgs {
  const void* x;                // [tokens]
  const int32_t* cu_seqlens;    // [sequences + 1]
  int64_t tokens, sequences;
  int dtype;                    // kFloat32 or kFloat64, of every floating tensor here
  const uint8_t* mask;          // [tokens] or null
  const void* weights;          // [tokens] or null
  void *sums, *counts;          // [sequences]: sum of w x over scored tokens; number of scored tokens
};

struct SequenceSumBackwardArgs {
  const void* grad;             // [sequences]: gradient of `sums`
  const int32_t* cu_seqlens;
  int64_t tokens, sequences;
  int dtype;
  const uint8_t* mask;
  const void* weights;
  void* grad_x;                 // [tokens]
};

struct KlEstimateArgs {
  const void *logprobs, *ref_logprobs;  // [n]
  int64_t n;
  int dtype, kind;
  void *value, *slope;                  // [n]; slope may be null
};

// A value per pair: data[i * stride]; stride 0 is one value for all; null: the preset's scalar.
struct PairTensor {
  const void* data;
  int64_t stride;
};

struct PreferenceArgs {
  const void *logprobs, *ref_logprobs, *kl;  // [tokens]; ref and kl may be null
  const int32_t* cu_seqlens;                 // [sequences + 1]
  int64_t tokens, sequences, pairs;
  const int32_t* pair_index;                 // [pairs, 2], or null: (0, 1), (2, 3), ...
  const uint8_t* mask;                       // [tokens] or null
  const void* weights;                       // [tokens] or null
  int dtype;
  PairTensor beta, omega, soft_label, gamma_ext, target, anchor;
  const uint8_t* valid;                      // [pairs] or null
  const void *num_items, *num_sft_tokens;    // one element, or null: counted here
  const double* scalars;                     // PairParams, host
  const int* switches;
  int stages;                                // 1: sums only, 2: table from the given sums, 3: both
  void* sums;                                // [pairs, 2, kSumWidth]: output of stage 1, input of stage 2 alone
  void *loss, *pair_loss, *table;            // [], [pairs], [pairs, kTableWidth]: outputs of stage 2
  uint32_t* counter;                         // device scratch: a zero of this launch's own (CUDA only)
};

struct PreferenceBackwardArgs {
  const void* grad;                          // [] or [pairs]: gradient of loss (mean, sum) or of pair_loss (none)
  int64_t grad_stride;                       // 0 or 1
  const void *logprobs, *ref_logprobs;       // [tokens]: read only for a token clamp
  const int32_t* cu_seqlens;
  int64_t tokens, sequences, pairs;
  const int32_t* pair_index;
  const uint8_t* mask;
  const void* weights;
  int dtype;
  const double* scalars;
  const int* switches;
  const void *sums, *table;
  void *grad_logprobs, *grad_kl;             // [tokens]; grad_kl may be null
};

// Tokens that one CUDA block scans at a time; a tile never crosses a sequence's bounds.
constexpr int64_t kGaeTile = 1024;

struct GaeArgs {
  const void *rewards, *values;         // [tokens]
  const int32_t* cu_seqlens;            // [sequences + 1]
  int64_t tokens, sequences;
  int dtype;                            // kFloat32 or kFloat64, of every floating tensor here but the workspace
  const uint8_t* mask;                  // [tokens] or null
  const void* bootstrap;                // [sequences], the value beyond each sequence's last token; or null: 0
  const void *gamma_ptr, *lam_ptr;      // one element each, or null: `gamma`, `lam`
  double gamma, lam;
  void *advantages, *returns;           // [tokens]
  void* moments;                        // [3]: count, mean and m2 of the scored advantages
  void* workspace;                      // [4 * (tokens / kGaeTile + sequences)], double
  uint32_t* counter;                    // as in PreferenceArgs
};

struct ListwiseArgs {
  const void* sums;                          // [sequences, kSumWidth]: as the pair kernel writes them
  int64_t sequences;
  const int32_t* list_offsets;               // [lists + 1]
  int64_t lists;
  const void* scores;                        // [sequences]
  int dtype;
  PairTensor beta;                           // per list
  const void *num_items, *num_sft_tokens;    // one element, or null: counted here
  const double* scalars;                     // ListParams, host
  const int* switches;
  void *loss, *list_loss, *slopes, *rewards, *table;   // [], [lists], [sequences], [sequences], [lists, kListTableWidth]
  uint32_t* counter;                         // device scratch: a zero of this launch's own (CUDA only)
};

// Tensors are [tokens] unless said otherwise. Without cu_seqlens the tokens are cut into tiles of kPolicyTile, and nothing of the loss may be per sequence.
struct PolicyArgs {
  const void *logprobs, *old_logprobs, *advantages;  // old may be null: the same as logprobs. advantages: [tokens] or [sequences]
  const int32_t* cu_seqlens;                         // [sequences + 1] or null
  int64_t tokens, sequences;
  const uint8_t* mask;
  const void *ref_logprobs, *entropy, *is_weight;    // null where not given; is_weight: [tokens] or [sequences]
  int dtype;
  const void *kl_coef, *entropy_coef, *num_items;    // one element, or null: the preset's, and counted here
  const double* scalars;                             // PolicyParams, host
  const int* switches;
  void *loss, *slopes, *entropy_slopes, *stats;      // [], [tokens], [tokens] or null, [kPolicyStats]
  void* rows;                                        // device scratch: [sequences or tiles, kPolicyStats + 4 kPolicyMoments] (CUDA only)
  uint32_t* counter;                                 // device scratch: a zero of this launch's own (CUDA only)
};

struct ValueArgs {
  const void *values, *old_values, *returns;         // old_values null: not clipped
  const int32_t* cu_seqlens;
  int64_t tokens, sequences;
  const uint8_t* mask;
  int dtype;
  const void* num_items;
  double clip;
  int aggregation;
  double norm_length;
  void *loss, *slopes, *stats;                       // [], [tokens], [kValueStats]
  void* rows;                                        // [sequences or tiles, kValueStats + 4 kValueMoments] (CUDA only)
  uint32_t* counter;
};

// grad_x = grad * slopes / stats[0], for one or two tensors of slopes.
struct PolicyBackwardArgs {
  const void *grad, *slopes, *entropy_slopes, *stats;  // [], [tokens], [tokens] or null
  int64_t tokens;
  int dtype;
  void *grad_logprobs, *grad_entropy;
};

// FA_OPS(X): one line per op; X(name, argument struct). Declarations, bindings and the emulator all expand this list.
#define FA_OPS(X)                                      \
  X(token_stats_fwd, TokenStatsArgs)                   \
  X(token_stats_bwd, TokenStatsBackwardArgs)           \
  X(token_stats_fused, TokenStatsFusedArgs)            \
  X(row_states_merge, RowStatesMergeArgs)              \
  X(row_states_finish, RowStatesFinishArgs)            \
  X(scale_rows, ScaleRowsArgs)                         \
  X(sequence_sum_fwd, SequenceSumArgs)                 \
  X(sequence_sum_bwd, SequenceSumBackwardArgs)         \
  X(kl_estimate_fwd, KlEstimateArgs)                   \
  X(preference_fwd, PreferenceArgs)                    \
  X(preference_bwd, PreferenceBackwardArgs)            \
  X(gae_fwd, GaeArgs)                                  \
  X(listwise_fwd, ListwiseArgs)                        \
  X(policy_fwd, PolicyArgs)                            \
  X(value_fwd, ValueArgs)                              \
  X(policy_bwd, PolicyBackwardArgs)

namespace cpu {
#define FA_DECLARE(name, args) void name(const args& a);
FA_OPS(FA_DECLARE)
#undef FA_DECLARE
}  // namespace cpu
namespace cuda {
#define FA_DECLARE(name, args) void name(const args& a, int device, void* stream);
FA_OPS(FA_DECLARE)
#undef FA_DECLARE
void set_cluster_size(int size);  // blocks per row of token_stats_fwd and _fused: 1, 2, 4, 8; 0: by row length; for tests and tuning
void set_gae_scheme(int scheme);  // 1: a block per sequence, 2: a block per tile, 0: by tokens and sequences; for tests and tuning
}  // namespace cuda

}  // namespace fastalign
