// One pass over every vocabulary row: the row state (math/row_state.h) and what the caller wants finished from it.
//
// A row is served by one warp (short rows), one block, or one cluster of blocks (sm_90 and later), by its length alone: results do not
// depend on what else is in the batch. Warps take turns at stretches of 32 * kUnroll vectors; a lane's vectors of one stretch are a
// bundle: the maximum of the bundle first, one rescale of the running sums, then one exp2 per element. The states of the threads are
// merged by a fixed tree.
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/vector.cuh"

namespace fastalign {
namespace cuda {
namespace {

// The vectors i, i + 32, ... below `limit`. What they hold beyond the row or the limit reads as -inf: no probability, never the maximum.
template <class T> __device__ void load_bundle(const RowVectors<T>& vectors, const T* x, int vocab, int i, int limit, uint4 (&v)[kUnroll]) {
  const unsigned loaded = vectors.load(i, limit, v);
  if (loaded == (1u << kUnroll) - 1) return;
#pragma unroll 1
  for (int k = 0; k < kUnroll; ++k) {  // the ends of a row, element by element
    if (loaded >> k & 1) continue;
    const int vector = i + k * int(kWarp), element = vectors.element(vector);
    float lanes[kLanes<T>];
#pragma unroll
    for (int l = 0; l < kLanes<T>; ++l) lanes[l] = vector < limit && element + l < vocab ? to_acc(x[element + l]) : -INFINITY;
    const uint4 gathered = pack(lanes, T{});
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)  // a selection: indexing v by k would move it to local memory
      if (j == k) v[j] = gathered;
  }
}

// Adds one bundle of vectors to the thread's state.
template <class T, int kSums, bool kCap>
__device__ __forceinline__ void push(RowState<float>& s, const uint4 (&v)[kUnroll], int vocab, int i, int limit,
                                     const RowTransform<float>& f) {
  constexpr int L = kLanes<T>;
  const auto lanes = [&](int k) { return i + k * int(kWarp) < limit ? vocab - (i + k * int(kWarp)) * L : 0; };
  const float raw_max = largest(v, T{}), bundle_max = kCap ? tanhf(raw_max * f.cap_scale) : raw_max;  // tanh keeps the order
  // Bundles come in rising order: only a strictly larger maximum moves the first place where it was seen.
  const bool moves = bundle_max > s.umax || s.top < 0;
  int top = vocab;

  // Everything so far moves to the new reference point. Both may still be -inf (a masked stretch of the vocabulary): count from 0 then.
  s.umax = fmaxf(s.umax, bundle_max);
  const float m = s.umax * f.c, reference = s.umax == -INFINITY ? 0.0f : m, scale = fast_exp2(s.m - reference);
  if (kSums & kSum1)
    s.s1 = fmaf(fmaxf(s.m - reference, -finite_limit<float>()), s.s0, s.s1) * scale;  // the bound: no 0 * inf before the first mass
  s.s0 *= scale;
  if (kSums & kSum2) s.s2 *= scale * scale;
  s.m = m;

#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    float u[L];
    unpack(v[k], u, T{});
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (kCap) u[l] = l < lanes(k) ? tanhf(u[l] * f.cap_scale) : -INFINITY;
      if (kSums & kSumZ) s.sz += l < lanes(k) ? u[l] : 0.0f;
      if ((kSums & kTop) && u[l] >= bundle_max) top = min(top, (i + k * int(kWarp)) * L + l);
      const float d = f.bits(u[l], reference);
      u[l] = fast_exp2(d);
      if (kSums & kSum1) s.s1 = fmaf(u[l], fmaxf(d, -200.0f), s.s1);  // e is 0 down there, and 0 * -inf would be NaN
      if (kSums & kSum2) s.s2 = fmaf(u[l], u[l], s.s2);
    }
#pragma unroll
    for (int width = L / 2; width; width /= 2)  // pairwise: shorter chains and a smaller error than one running sum
#pragma unroll
      for (int l = 0; l < width; ++l) u[l] += u[l + width];
    s.s0 += u[0];
  }
  if ((kSums & kTop) && moves && top < vocab) s.top = top;  // not found: nothing but NaN
}

// u of label k of the row, where this shard of the vocabulary or one before it holds the label; -inf where none did.
template <class T> __device__ float target_u(const TokenStatsArgs& a, int64_t row, int64_t k, const T* x, const RowTransform<float>& f) {
  const int column = local_column(a, a.labels[row * a.targets + k]);
  if (column >= 0) return f.u(to_acc(x[column]));
  return a.target_in ? static_cast<const float*>(a.target_in)[row * a.targets + k] : -INFINITY;
}

__device__ inline void put(void* out, int64_t i, float value) {
  if (out) static_cast<float*>(out)[i] = value;
}

__device__ void write_unscored(const TokenStatsArgs& a, int64_t row, unsigned lane) {
  for (int64_t k = row * a.targets + lane; k < (row + 1) * a.targets; k += kWarp) put(a.logprob, k, 0), put(a.target, k, -INFINITY);
  if (lane) return;
  void* const outputs[] = {a.entropy, a.logsumexp, a.log_sum_sq, a.mean_logit, a.is_top1};
  for (void* out : outputs) put(out, row, 0);
  if (a.state) store_state(RowState<float>::empty(), false, static_cast<float*>(a.state) + row * kStateWidth);
}

// Lane k finishes labels k, k + 32, ...; `first` is lane k's first target, fetched before the row was streamed. Lane 0 writes the rest.
template <class T>
__device__ void write_row(const TokenStatsArgs& a, int64_t row, unsigned lane, const RowState<float>& s, float first, const T* x,
                          const RowTransform<float>& f) {
  for (int64_t k = lane; k < a.targets; k += kWarp) {
    const float u = k < kWarp ? first : target_u(a, row, k, x, f);
    const bool ignored = a.labels[row * a.targets + k] == a.ignore_index;
    put(a.logprob, row * a.targets + k, ignored ? 0.0f : row_logprob(s, u, f));
    put(a.target, row * a.targets + k, u);
  }
  if (lane) return;
  if (a.entropy) put(a.entropy, row, row_entropy(s));
  if (a.logsumexp) put(a.logsumexp, row, row_logsumexp(s));
  if (a.log_sum_sq) put(a.log_sum_sq, row, row_log_sum_sq(s));
  if (a.mean_logit) put(a.mean_logit, row, row_mean_logit(s, float(a.vocab_total), f));
  if (a.is_top1) put(a.is_top1, row, row_is_top1(s, a.labels[row * a.targets]));
  if (a.state) store_state(s, true, static_cast<float*>(a.state) + row * kStateWidth);
}

// The kernel that keeps every sum needs more than the 64 registers that four blocks per SM leave.
template <class T, int kSums, bool kCap>
__global__ void __launch_bounds__(kRowThreads, kSums& kTop ? 3 : 4)
    token_stats_fwd_kernel(TokenStatsArgs a, RowScale scale, unsigned cluster) {
  FA_DYNAMIC_SHARED(RowState<float>, partial);
  const int64_t row = int64_t(blockIdx.x / cluster) * blockDim.y + threadIdx.y;
  if (row >= a.logits.rows) return;  // whole warps: several rows share a block only where a row is a warp
  const unsigned rank = cluster > 1 ? cluster_rank() : 0, thread = threadIdx.x;
  const bool finisher = rank == 0 && thread < kWarp;
  const RowLabels labels = row_labels(a, row);
  if (!labels.scored) {  // never read: the row may hold anything
    if (finisher) write_unscored(a, row, thread);
    return;
  }

  const RowTransform<float> f = scale.transform();
  const T* x = row_pointer<const T>(a.logits, row);
  const float first = finisher && thread < a.targets ? target_u(a, row, thread, x, f) : 0.0f;

  const int vocab = int(a.logits.vocab), count = (vocab + kLanes<T> - 1) / kLanes<T>;
  const int begin = int(int64_t(count) * rank / cluster), end = int(int64_t(count) * (rank + 1) / cluster);
  const RowVectors<T> vectors(x, vocab, 0);
  RowState<float> s = RowState<float>::empty();
  for (int i = begin + bundle_start(thread); i < end; i += kUnroll * int(blockDim.x)) {
    uint4 v[kUnroll];
    load_bundle(vectors, x, vocab, i, end, v);
    push<T, kSums, kCap>(s, v, vocab, i, end, f);
  }
  if (s.top >= 0) s.top += int(a.vocab_start);
  s = merge_row<kSums>(s, partial, cluster);

  if (!finisher) return;
  if (thread == 0 && a.state_in) s = keep<kSums>(merge(load_state(static_cast<const float*>(a.state_in) + row * kStateWidth), s));
  if (labels.bad) s.s0 = NAN;
  s.m = __shfl_sync(kFullMask, s.m, 0);  // all that row_logprob reads
  s.s0 = __shfl_sync(kFullMask, s.s0, 0);
  write_row(a, row, thread, s, first, x, f);
}

unsigned forced_cluster = 0;

// Blocks per row. A block's share must be long against its start and its share of the merges, which other blocks hide only in part; shorter
// shares would serve small batches better, but the choice may not depend on the number of rows.
unsigned cluster_size(int64_t row_bytes) {
  for (unsigned size : {1u, 2u, 4u})
    if (row_bytes <= size * int64_t(96 << 10)) return size;
  return 8;
}

template <class T, int kSums, bool kCap> void launch_row_kernel(const TokenStatsArgs& a, int device, void* stream) {
  const int64_t row_bytes = a.logits.vocab * int64_t(sizeof(T));
  const bool by_warp = row_bytes <= kShortRow && !forced_cluster;
  unsigned cluster = forced_cluster ? forced_cluster : cluster_size(row_bytes);
  if (cluster > 1 && !clusters_supported(token_stats_fwd_kernel<T, kSums, kCap>, device)) {
    if (forced_cluster) throw std::invalid_argument("fastalign: set_cluster_size: this device or build has no thread-block clusters");
    cluster = 1;
  }
  const dim3 block = by_warp ? dim3(kWarp, kRowThreads / kWarp) : dim3(threads_for(row_bytes / cluster));
  const unsigned blocks = grid_size(ceil_div(a.logits.rows, block.y) * cluster, "token_stats");
  const size_t shared = by_warp ? 0 : (block.x / kWarp + 1) * sizeof(RowState<float>);
  FA_LAUNCH_CLUSTER((token_stats_fwd_kernel<T, kSums, kCap>), dim3(blocks), block, shared, cluster, stream, a, row_scale(a), cluster);
}

}  // namespace

void set_cluster_size(int size) {
  if (size != 0 && size != 1 && size != 2 && size != 4 && size != 8)
    throw std::invalid_argument("fastalign: set_cluster_size takes 0 (automatic), 1, 2, 4 or 8");
  forced_cluster = unsigned(size);
}

void token_stats_fwd(const TokenStatsArgs& a, int device, void* stream) {
  if (a.ref.data) throw std::invalid_argument("fastalign: the CUDA kernels do not take reference logits yet");
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
    using T = decltype(tag);
    const auto by_cap = [&](auto sums) {
      constexpr int kSums = decltype(sums)::value;
      a.cap_scale != 0 ? launch_row_kernel<T, kSums, true>(a, device, stream) : launch_row_kernel<T, kSums, false>(a, device, stream);
    };
    // Three sets of sums: the usual losses, those with an entropy term, everything.
    if (a.outputs & (kOutLogSumSq | kOutMeanLogit | kOutIsTop1)) by_cap(std::integral_constant<int, kSum1 | kSum2 | kSumZ | kTop>{});
    else if (a.outputs & kOutEntropy) by_cap(std::integral_constant<int, kSum1>{});
    else by_cap(std::integral_constant<int, 0>{});
  });
}

}  // namespace cuda
}  // namespace fastalign
