// The pair kernel (math/pair.h) on packed sequences: one launch forward, one backward.
//
// Forward: one block per side of a pair sums over its sequence's tokens (a sequence may be in several pairs). The block that arrives last
// evaluates all pairs and reduces the loss, both in a fixed order. Backward: one block per sequence walks the pairs it is in, in index
// order. Unscored tokens are selected away, never multiplied by 0: they may hold anything.
#include "cuda/sequence.cuh"
#include "math/pair.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

// Shared memory, in floats: reductions, then the ranks' counts, then the flag of the last block.
constexpr unsigned kWarps = kSequenceThreads / kWarp, kReduceSize = kSumWidth * kWarps, kSharedSize = kReduceSize + kWarps + 1;

__device__ inline float at(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
__device__ inline float value(const PairTensor& t, int64_t pair, float otherwise) {
  return t.data ? at(t.data, pair * t.stride) : otherwise;
}

template <class Args> __device__ int64_t sequence_of(const Args& a, int64_t pair, int side) {
  return a.pair_index ? a.pair_index[2 * pair + side] : 2 * pair + side;
}
template <class Args> __device__ bool is_scored(const Args& a, int64_t token) { return !a.mask || a.mask[token]; }

template <class Args> __device__ TokenRatio<float> ratio_of(const Args& a, const PairParams<float>& p, int64_t token) {
  return token_ratio(p, at(a.logprobs, token), p.reference != 0 ? at(a.ref_logprobs, token) : 0.0f);
}

// One side's sums, by the whole block.
__device__ void side_sums(const PreferenceArgs& a, const PairParams<float>& p, int64_t pair, int side, float* shared) {
  const Segment own = segment(a.cu_seqlens, a.sequences, a.tokens, sequence_of(a, pair, side));
  const Segment partner = segment(a.cu_seqlens, a.sequences, a.tokens, sequence_of(a, pair, 1 - side));
  const bool ranked = p.ld_alpha != 1;
  float partner_length[1] = {0};
  if (ranked) {
    for (int64_t t = partner.begin + threadIdx.x; t < partner.end; t += blockDim.x) partner_length[0] += is_scored(a, t);
    sum_block(partner_length, shared);
  }

  float sums[kSumWidth] = {};
  unsigned running = 0;
  for (int64_t first = own.begin; first < own.end; first += blockDim.x) {
    const int64_t t = first + threadIdx.x;
    const bool inside = t < own.end, scored = inside && is_scored(a, t);
    const unsigned rank = ranked ? block_rank(scored, reinterpret_cast<unsigned*>(shared + kReduceSize), running) : 0;
    if (!inside) continue;
    const float logprob = at(a.logprobs, t);
    if (scored) {
      const float weight = (a.weights ? at(a.weights, t) : 1.0f) * (ranked ? tail_weight(p, float(rank), partner_length[0]) : 1.0f);
      sums[kSumPolicy] += weight * logprob;
      sums[kSumRatio] += weight * ratio_of(a, p, t).value;
      sums[kSumLength] += 1;
      if (a.kl) sums[kSumKl] += at(a.kl, t);
    }
    if (p.sft_include_prompt ? t != own.end - 1 : scored) {
      sums[kSumSft] += logprob;
      sums[kSumSftLength] += 1;
    }
  }
  sum_block(sums, shared);
  if (threadIdx.x) return;
  float* out = static_cast<float*>(a.sums) + (2 * pair + side) * kSumWidth;
  for (int i = 0; i < kSumWidth; ++i) out[i] = own.ok ? sums[i] : NAN;
  if (!own.ok) out[kSumLength] = 1;  // the pair must count, or its NaN would be dropped as an empty pair
}

// Sums to table, pair losses and loss, by one block. The pairs are evaluated twice: the normalisers count the valid ones first.
__device__ void write_table(const PreferenceArgs& a, const PairParams<float>& p, float* shared) {
  const float* sums = static_cast<const float*>(a.sums);
  float counts[2] = {0, 0}, loss[1] = {0};  // valid pairs, their NLL tokens
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass) sum_block(counts, shared);
    const float pairs = a.num_items ? at(a.num_items, 0) : counts[0], sft_tokens = a.num_sft_tokens ? at(a.num_sft_tokens, 0) : counts[1];
    for (int64_t i = threadIdx.x; i < a.pairs; i += blockDim.x) {
      const SideSums<float> chosen = load_side(sums + 2 * i * kSumWidth), rejected = load_side(sums + (2 * i + 1) * kSumWidth);
      const PairTensors<float> tensors{
          value(a.beta, i, p.beta),     value(a.omega, i, 1.0f),      value(a.soft_label, i, 1.0f),         value(a.gamma_ext, i, 0.0f),
          value(a.target, i, p.target), value(a.anchor, i, p.anchor), a.valid == nullptr || a.valid[i] != 0};
      const PairResult<float> r = evaluate_pair(p, chosen, rejected, tensors);
      if (pass == 0) {
        counts[0] += r.valid ? 1.0f : 0.0f;
        counts[1] += r.valid ? chosen.sft_length : 0.0f;
        continue;
      }
      float* row = static_cast<float*>(a.table) + i * kTableWidth;
      store_row(p, r, pair_divisor(p, pairs), sft_divisor(p, pairs, counts[0], sft_tokens, chosen.sft_length), row);
      const float both = row[kTabPair] + row[kTabNll];
      static_cast<float*>(a.pair_loss)[i] = both;
      loss[0] += both;
    }
  }
  sum_block(loss, shared);
  if (threadIdx.x == 0) *static_cast<float*>(a.loss) = loss[0];
}

// stages & 1: one block per side. Without it: a single block, sums given.
__global__ void __launch_bounds__(kSequenceThreads, 4) preference_fwd_kernel(PreferenceArgs a, PairParams<float> p) {
  FA_DYNAMIC_SHARED(float, shared);
  if (a.stages & 1) side_sums(a, p, blockIdx.x / 2, int(blockIdx.x % 2), shared);
  if (a.stages == 3 && !last_block(a.counter, reinterpret_cast<unsigned*>(shared + kReduceSize + kWarps))) return;
  if (a.stages & 2) write_table(a, p, shared);
}

// Calls f(pair, side) for every pair that sequence s is in, in index order; 32 pairs are looked at a time. Called by whole warps.
template <class F> __device__ __forceinline__ void for_each_pair(const PreferenceBackwardArgs& a, int64_t s, F&& f) {
  const int64_t lane = threadIdx.x % kWarp;
  // Without an index, sequence s is in pair s / 2 or in none.
  const int64_t begin = a.pair_index ? 0 : s / 2 / kWarp * kWarp, end = a.pair_index ? a.pairs : begin + kWarp;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t mine = first + lane;
    const bool member = mine < a.pairs && (sequence_of(a, mine, 0) == s || sequence_of(a, mine, 1) == s);
    for (unsigned members = __ballot_sync(kFullMask, member); members; members &= members - 1) {
      const int64_t pair = first + __ffs(int(members)) - 1;
#pragma unroll 1
      for (int side = 0; side < 2; ++side)
        if (sequence_of(a, pair, side) == s) f(pair, side);
    }
  }
}

__global__ void __launch_bounds__(kSequenceThreads) preference_bwd_kernel(PreferenceBackwardArgs a, PairParams<float> p) {
  FA_DYNAMIC_SHARED(unsigned, counts);
  const int64_t s = blockIdx.x;
  const Segment own = segment(a.cu_seqlens, a.sequences, a.tokens, s);
  // Every token is written even where cu_seqlens does not cover it, or its sequence is not ok: with NaN.
  const Share mine = share(a.cu_seqlens, a.sequences, a.tokens, s);
  const bool ranked = p.ld_alpha != 1;
  unsigned running = 0;
  for (int64_t first = mine.begin; first < mine.end; first += blockDim.x) {
    const int64_t t = first + threadIdx.x;
    const bool inside = own.holds(t), scored = inside && is_scored(a, t);
    const unsigned rank = ranked ? block_rank(scored, counts, running) : 0;
    float of_ratio = 0, of_kl = 0, of_sft = 0;
    for_each_pair(a, s, [&](int64_t pair, int side) {
      const float g = at(a.grad, pair * a.grad_stride);
      const int64_t row = pair * kTableWidth;
      const float tail = ranked ? tail_weight(p, float(rank), at(a.sums, (2 * pair + 1 - side) * kSumWidth + kSumLength)) : 1.0f;
      of_ratio += times_slope(times_slope(g, at(a.table, row + kTabChosen + side)), tail);
      of_kl += times_slope(g, at(a.table, row + kTabKlChosen + side));
      if (side == 0 && p.sft_weight != 0) of_sft += times_slope(g, at(a.table, row + kTabSft));
    });
    if (t >= mine.end) continue;
    float gradient = p.sft_include_prompt ? (t != own.end - 1 ? of_sft : 0.0f) : (scored ? of_sft : 0.0f);
    const bool open = scored && ratio_of(a, p, t).open;
    if (open) gradient += a.weights ? times_slope(of_ratio, at(a.weights, t)) : of_ratio;
    static_cast<float*>(a.grad_logprobs)[t] = inside ? gradient : NAN;
    if (a.grad_kl) static_cast<float*>(a.grad_kl)[t] = inside ? (scored ? of_kl : 0.0f) : NAN;
  }
}

}  // namespace

void preference_fwd(const PreferenceArgs& a, int device, void* stream) {
  require_float32(a.dtype, "preference_loss");
  if (a.pairs == 0) return;
  const DeviceGuard guard(device);
  const unsigned blocks = a.stages & 1 ? grid_size(2 * a.pairs, "preference_loss") : 1;
  FA_LAUNCH(preference_fwd_kernel, dim3(blocks), dim3(kSequenceThreads), kSharedSize * sizeof(float), stream, a,
            pair_params<float>(a.scalars, a.switches));
}

void preference_bwd(const PreferenceBackwardArgs& a, int device, void* stream) {
  require_float32(a.dtype, "preference_loss");
  if (a.sequences == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(preference_bwd_kernel, dim3(grid_size(a.sequences, "preference_loss")), dim3(kSequenceThreads), kWarps * sizeof(unsigned),
            stream, a, pair_params<float>(a.scalars, a.switches));
}

}  // namespace cuda
}  // namespace fastalign
