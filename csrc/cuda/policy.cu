// Policy and value losses (math/policy.h). Forward, one launch: a block per sequence, or per tile of tokens where sequences do not matter, reads its
// tokens once for their number and log-ratio if the loss needs these first, then writes their slopes and one row of sums; the block that arrives last
// adds the rows in a fixed order. Backward, one launch: slopes times the upstream gradient. Unscored tokens are selected away.
#include "cuda/moments.cuh"
#include "math/policy.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

constexpr unsigned kWarps = kSequenceThreads / kWarp;
// Shared memory, in floats: reductions (also two doubles per warp), then the flag of the last block.
template <int kStats> constexpr unsigned kSharedSize = kStats * kWarps + 1;

__device__ inline float at(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
template <class Args> __device__ bool is_scored(const Args& a, int64_t token) { return !a.mask || a.mask[token]; }

// The tokens of a block, and those that it must write: also the ones that a malformed cu_seqlens leaves to nobody.
struct Piece {
  Segment own;
  int64_t begin, end;
};
template <class Args> __device__ Piece piece_of(const Args& a, int64_t k) {
  if (!a.cu_seqlens) {
    const int64_t begin = k * kPolicyTile, end = begin + kPolicyTile < a.tokens ? begin + kPolicyTile : a.tokens;
    return {{begin, end, true}, begin, end};
  }
  const Share mine = share(a.cu_seqlens, a.sequences, a.tokens, k);
  return {segment(a.cu_seqlens, a.sequences, a.tokens, k), mine.begin, mine.end};
}

struct TokenInputs { float logprob, lr, advantage; };
__device__ TokenInputs token_inputs(const PolicyArgs& a, const PolicyParams<float>& p, int64_t t, int64_t sequence) {
  const float logprob = at(a.logprobs, t);
  return {logprob, log_ratio(logprob, a.old_logprobs ? at(a.old_logprobs, t) : logprob),
          at(a.advantages, p.advantages_per_sequence ? sequence : t)};
}

// One scored token: its slope before the divisor, its sums into `sums`.
__device__ float policy_token(const PolicyArgs& a, const PolicyParams<float>& p, int64_t t, int64_t sequence, float sequence_log_rho,
                              float factor, float divisor, float (&sums)[kPolicyStats], MomentSums<float>& ratios) {
  const TokenInputs x = token_inputs(a, p, t, sequence);
  const float log_rho = p.ratio == kRatioToken ? clamp_log_ratio(p.surrogate, x.lr) : sequence_log_rho, rho = exp(log_rho);
  const Surrogate<float> r = surrogate<StdMath>(p, x.logprob, x.lr, log_rho, rho, x.advantage);
  float value = r.value, slope = r.slope * factor;
  if (a.is_weight) {
    const float given = at(a.is_weight, p.is_per_sequence ? sequence : t);
    const ImportanceWeight<float> w = importance_weight(p, given);
    const bool dropped = p.is_mode == kIsMask && w.clipped;
    value = dropped ? 0.0f : w.used * value;
    slope = dropped ? 0.0f : w.used * slope;
    sums[kPolicy_is_weight] += given;
    sums[kPolicy_is_clipped] += w.clipped ? 1.0f : 0.0f;
  }
  float total = value;
  if (a.ref_logprobs) {
    const ValueSlope<float> plain = kl_term<StdMath>(p.kl_kind, x.logprob, at(a.ref_logprobs, t)), k = clamp_kl(p, plain);
    const float coef = a.kl_coef ? at(a.kl_coef, 0) : p.kl_coef;
    if (coef != 0) {
      total += coef * (p.kl_bias_correction ? rho * k.value : k.value);
      slope += coef * (p.kl_bias_correction ? rho * (k.value + k.slope) : k.slope);
    }
    sums[kPolicy_kl] += plain.value;
  }
  if (a.entropy) {
    const float h = at(a.entropy, t), coef = a.entropy_coef ? at(a.entropy_coef, 0) : p.entropy_coef;
    if (coef != 0) total -= coef * h;
    sums[kPolicy_entropy] += h;
  }
  sums[kPolicy_loss] += total / divisor;
  sums[kPolicy_policy] += value / divisor;
  sums[kPolicy_tokens] += 1;
  sums[kPolicy_ratio] += rho - 1;
  ratios.push(rho);
  sums[kPolicy_approx_kl] += x.lr * x.lr / 2;
  sums[kPolicy_clip_low] += r.low ? 1.0f : 0.0f;
  sums[kPolicy_clip_high] += r.high ? 1.0f : 0.0f;
  sums[kPolicy_clip_dual] += r.dual ? 1.0f : 0.0f;
  sums[kPolicy_nonfinite] += is_finite(total) ? 0.0f : 1.0f;
  return slope;
}

// A block's row of sums; then, in the last block, the totals of all rows, the number of items and the loss.
template <int kStats, int kMoments, class Args, class Finish>
__device__ void reduce_rows(const Args& a, int aggregation, int64_t pieces, bool ok, int tokens, int sequences, float (&sums)[kStats],
                            const MomentSums<float> (&seen)[kMoments], const int (&m2_columns)[kMoments], float* shared, Finish finish) {
  static_assert(kStats % 2 == 0, "doubles stand behind the rows");
  float* rows = static_cast<float*>(a.rows);
  double *means = reinterpret_cast<double*>(rows + pieces * kStats), *room = reinterpret_cast<double*>(shared);  // mean, m2 of every block
#pragma unroll
  for (int m = 0; m < kMoments; ++m) {
    const Moments<double> block = merge_threads(seen[m], room);
    if (threadIdx.x) continue;
    double* own = means + 2 * (blockIdx.x * int64_t(kMoments) + m);
    own[0] = block.mean, own[1] = block.m2;
  }
  sum_block(sums, shared);
  if (threadIdx.x == 0) {
    sums[sequences] = a.cu_seqlens && sums[tokens] > 0 ? 1.0f : 0.0f;
    if (!ok) sums[1] = NAN;  // the loss
    finish(sums);
#pragma unroll
    for (int c = 0; c < kStats; ++c) rows[blockIdx.x * int64_t(kStats) + c] = sums[c];
  }
  if (!last_block(a.counter, reinterpret_cast<unsigned*>(shared + kStats * kWarps))) return;
#pragma unroll
  for (int c = 0; c < kStats; ++c) sums[c] = 0;
  for (int64_t k = threadIdx.x; k < pieces; k += blockDim.x)
#pragma unroll
    for (int c = 0; c < kStats; ++c) sums[c] += rows[k * kStats + c];
  sum_block(sums, shared);
#pragma unroll
  for (int m = 0; m < kMoments; ++m) {
    const auto part = [&](int64_t k) {
      const double* of = means + 2 * (k * kMoments + m);
      return Moments<double>{rows[k * kStats + tokens], of[0], of[1]};
    };
    sums[m2_columns[m]] = float(merge_block(pieces, part, room).m2);
  }
  if (threadIdx.x) return;
  sums[0] = loss_items(aggregation, static_cast<const float*>(a.num_items), sums[tokens], sums[sequences]);
  float* stats = static_cast<float*>(a.stats);
#pragma unroll
  for (int c = 0; c < kStats; ++c) stats[c] = sums[c];
  *static_cast<float*>(a.loss) = sums[1] / sums[0];
}

__global__ void __launch_bounds__(kSequenceThreads, 4) policy_fwd_kernel(PolicyArgs a, PolicyParams<float> p, int64_t pieces) {
  FA_DYNAMIC_SHARED(float, shared);
  const int64_t k = blockIdx.x;
  const Piece piece = piece_of(a, k);
  float measured[2] = {0, 0}, log_rho = 0;  // scored tokens, the sum of their log-ratios
  if (p.ratio != kRatioToken || p.aggregation == kSeqMeanTokenMean) {
    for (int64_t t = piece.own.begin + threadIdx.x; t < piece.own.end; t += blockDim.x) {
      if (!is_scored(a, t)) continue;
      const TokenInputs x = token_inputs(a, p, t, k);
      measured[0] += 1;
      measured[1] += sequence_term(p, x.lr, x.advantage);
    }
    sum_block(measured, shared);
    log_rho = sequence_log_ratio(p, measured[1], measured[0]);
  }
  const float factor = p.ratio == kRatioSeqSum && (p.surrogate == kClip || p.surrogate == kSapo) ? measured[0] : 1.0f;
  const float divisor = token_divisor(p.aggregation, measured[0], p.norm_length);
  float sums[kPolicyStats] = {};
  MomentSums<float> seen[kPolicyMoments];
  for (int64_t t = piece.begin + threadIdx.x; t < piece.end; t += blockDim.x) {
    const bool inside = t >= piece.own.begin && t < piece.own.end, scored = inside && is_scored(a, t);
    const float slope = scored ? policy_token(a, p, t, k, log_rho, factor, divisor, sums, seen[0]) : 0.0f;
    static_cast<float*>(a.slopes)[t] = inside ? (scored ? slope / divisor : 0.0f) : NAN;
    if (a.entropy_slopes) {
      const float coef = a.entropy_coef ? at(a.entropy_coef, 0) : p.entropy_coef;
      static_cast<float*>(a.entropy_slopes)[t] = inside ? (scored ? -coef / divisor : 0.0f) : NAN;
    }
  }
  reduce_rows(a, p.aggregation, pieces, piece.own.ok, kPolicy_tokens, kPolicy_sequences, sums, seen, {kPolicy_ratio_m2}, shared,
              [&](float (&row)[kPolicyStats]) {
                if (clips_sequences(p))
                  for (int c = kPolicy_clip_low; c <= kPolicy_clip_dual; ++c) row[c] = row[c] > 0 ? 1.0f : 0.0f;
              });
}

__global__ void __launch_bounds__(kSequenceThreads) value_fwd_kernel(ValueArgs a, int64_t pieces) {
  FA_DYNAMIC_SHARED(float, shared);
  const int64_t k = blockIdx.x;
  const Piece piece = piece_of(a, k);
  float length[1] = {0};
  if (a.aggregation == kSeqMeanTokenMean) {
    for (int64_t t = piece.own.begin + threadIdx.x; t < piece.own.end; t += blockDim.x) length[0] += is_scored(a, t);
    sum_block(length, shared);
  }
  const float divisor = token_divisor(a.aggregation, length[0], float(a.norm_length));
  float sums[kValueStats] = {};
  MomentSums<float> seen[kValueMoments];
  for (int64_t t = piece.begin + threadIdx.x; t < piece.end; t += blockDim.x) {
    const bool inside = t >= piece.own.begin && t < piece.own.end, scored = inside && is_scored(a, t);
    float slope = 0;
    if (scored) {
      const float value = at(a.values, t), target = at(a.returns, t);
      const ValueError<float> r =
          value_error(value, a.old_values ? at(a.old_values, t) : value, target, float(a.clip), a.old_values != nullptr);
      slope = r.slope / divisor;
      sums[kValue_loss] += r.value / divisor;
      sums[kValue_tokens] += 1;
      sums[kValue_clipped] += r.clipped ? 1.0f : 0.0f;
      sums[kValue_value] += value;
      sums[kValue_returns] += target;
      seen[0].push(target);
      seen[1].push(r.error);
      sums[kValue_error] += r.error;
      sums[kValue_error_sq] += r.error * r.error;
      sums[kValue_nonfinite] += is_finite(r.value) ? 0.0f : 1.0f;
    }
    static_cast<float*>(a.slopes)[t] = inside ? slope : NAN;
  }
  reduce_rows(a, a.aggregation, pieces, piece.own.ok, kValue_tokens, kValue_sequences, sums, seen, {kValue_returns_m2, kValue_error_m2},
              shared, [](float (&)[kValueStats]) {});
}

__global__ void __launch_bounds__(kSequenceThreads) policy_bwd_kernel(PolicyBackwardArgs a) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= a.tokens) return;
  const float grad = at(a.grad, 0), items = at(a.stats, 0);
  static_cast<float*>(a.grad_logprobs)[t] = times_slope(grad, at(a.slopes, t)) / items;
  if (a.entropy_slopes) static_cast<float*>(a.grad_entropy)[t] = times_slope(grad, at(a.entropy_slopes, t)) / items;
}

template <class Args> int64_t pieces_of(const Args& a) { return a.cu_seqlens ? a.sequences : ceil_div(a.tokens, kPolicyTile); }

}  // namespace

void policy_fwd(const PolicyArgs& a, int device, void* stream) {
  require_float32(a.dtype, "policy_loss");
  const int64_t pieces = pieces_of(a);
  if (pieces == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(policy_fwd_kernel, dim3(grid_size(pieces, "policy_loss")), dim3(kSequenceThreads), kSharedSize<kPolicyStats> * sizeof(float),
            stream, a, policy_params<float>(a.scalars, a.switches), pieces);
}

void value_fwd(const ValueArgs& a, int device, void* stream) {
  require_float32(a.dtype, "value_loss");
  const int64_t pieces = pieces_of(a);
  if (pieces == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(value_fwd_kernel, dim3(grid_size(pieces, "value_loss")), dim3(kSequenceThreads), kSharedSize<kValueStats> * sizeof(float),
            stream, a, pieces);
}

void policy_bwd(const PolicyBackwardArgs& a, int device, void* stream) {
  require_float32(a.dtype, "policy_loss");
  if (a.tokens == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(policy_bwd_kernel, dim3(grid_size(ceil_div(a.tokens, kSequenceThreads), "policy_loss")), dim3(kSequenceThreads), 0, stream, a);
}

}  // namespace cuda
}  // namespace fastalign
