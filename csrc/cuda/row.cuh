// What the forward and the backward kernel of token_stats share: how a row is addressed, scaled and labelled.
#pragma once
#include "cuda/launch.h"
#include "math/row_state.h"
#include "ops.h"

namespace fastalign {
namespace cuda {

// Two macros for tuning alone: benchmarks/gpu_prepare.sh builds variants with other values to measure.
#ifndef FA_ROW_THREADS
#define FA_ROW_THREADS 256
#endif
#ifndef FA_UNROLL
#define FA_UNROLL 4
#endif
constexpr unsigned kRowThreads = FA_ROW_THREADS;  // most threads of a block
constexpr int kUnroll = FA_UNROLL;      // vectors a thread has in flight, of a row or of a policy and a reference row together
constexpr int64_t kShortRow = 4096;     // bytes; rows (with a reference: both together) up to here are served by one warp each

inline unsigned forced_cluster = 0;     // by set_cluster_size

// For __launch_bounds__: as many threads per multiprocessor as `blocks` blocks of 256 have, whatever a block's size.
constexpr int blocks_per_sm(int blocks) { return blocks * 256 >= int(kRowThreads) ? blocks * 256 / int(kRowThreads) : 1; }

// How many threads serve a row, by the number of bytes to read for it alone: results do not depend on what else is in the batch. Kernels
// that form row states share this, hence the tree that the states are merged by.
struct RowShape { unsigned cluster, threads; };

// Threads of a block for a stretch of a row: as few as leave each two bundles, so that no warp idles on rows of a few KiB.
inline unsigned threads_for(int64_t bytes) {
  for (unsigned threads : {2 * kWarp, 4 * kWarp})
    if (bytes <= threads * 2 * kUnroll * 16) return threads;
  return kRowThreads;
}

// Blocks per row. A block's share must be long against its start and its share of the merges, which other blocks hide only in part; shorter
// shares would serve small batches better. With a reference row a share is what lets three blocks keep theirs in an SM's shared memory.
inline unsigned cluster_size(int64_t bytes, int rows) {
  const int64_t share = (rows > 1 ? 72 : 96) << 10;
  for (unsigned size : {1u, 2u, 4u})
    if (bytes <= size * share) return size;
  return 8;
}

// `supported`: whether clusters can be launched.
inline RowShape row_shape(int64_t bytes, int rows, bool supported) {
  if (bytes <= kShortRow && !forced_cluster) return {1, kWarp};
  if (forced_cluster > 1 && !supported)
    throw std::invalid_argument("fastalign: set_cluster_size: this device or build has no thread-block clusters");
  const unsigned cluster = forced_cluster ? forced_cluster : supported ? cluster_size(bytes, rows) : 1;
  return {cluster, threads_for(bytes / cluster)};
}

// How an elementwise kernel shares out rows of `vocab` elements: a block takes block.y rows (short ones, a warp each), or one of `count`
// chunks of `vectors` vectors of a row: `per_thread` for each of its threads, enough to hide the row's own few loads.
struct Chunks {
  dim3 block;
  int vectors;
  int64_t count;
};
inline Chunks chunks_of(int64_t vocab, int lanes, int64_t bytes, int per_thread, bool may_share_block = true) {
  const int64_t all = ceil_div(vocab, lanes);  // an upper bound of the wide ones
  if (may_share_block && bytes <= kShortRow) return {dim3(kWarp, kRowThreads / kWarp), int(all), 1};
  const unsigned threads = threads_for(bytes);
  return {dim3(threads), per_thread * int(threads), ceil_div(all, per_thread * int64_t(threads))};
}

// The first vector of a thread's first bundle of N (i, i + 32, ...): a warp's bundles are 32 * N consecutive vectors.
template <int N> __device__ int bundle_start(unsigned thread) { return int(thread / kWarp * kWarp * N + thread % kWarp); }

// The call's scale factors, converted once on the host.
struct RowScale {
  float factor, cap_scale, temperature;
  const float* temperature_ptr;

  __device__ RowTransform<float> transform() const { return {factor / (temperature_ptr ? *temperature_ptr : temperature), cap_scale}; }
};
template <class Args> RowScale row_scale(const Args& a) {
  return {float(a.factor), float(a.cap_scale), float(a.temperature), static_cast<const float*>(a.temperature_ptr)};
}

// fast_exp2 for the functions of math/row_state.h, which ask what the sweeps made of an exponent.
struct RowExp2 {
  FA_HD float operator()(float x) const {
#if defined(__CUDA_ARCH__) || defined(FA_EMU)
    return fast_exp2(x);
#else
    return exp2(x);
#endif
  }
};

template <class T> __device__ T* row_pointer(const RowsView& v, int64_t row) {
  // Rows fit 31 bits (the grid does), so the division is a 32-bit one; a single stride needs none.
  const int64_t outer = row < v.inner ? 0 : uint32_t(row) / uint32_t(v.inner), inner = row - outer * v.inner;
  return static_cast<T*>(v.data) + outer * v.stride_outer + inner * v.stride_inner;
}

// What the mask and the labels say about a row. A row is scored unless the mask or ignored labels exclude it; `bad`: some label is neither
// ignored nor in the vocabulary, and the whole row becomes NaN.
struct RowLabels { bool scored, bad; };
template <class Args> __device__ RowLabels row_labels(const Args& a, int64_t row) {
  const bool kept = !a.mask || a.mask[row];  // not an early return: the labels' load need not wait for the mask's
  if (!a.labels) return {kept, false};
  RowLabels r{false, false};
  for (int64_t k = 0; k < a.targets; ++k) {
    const int64_t label = a.labels[row * a.targets + k];
    if (label == a.ignore_index) continue;
    r.scored = true;
    r.bad |= label < 0 || label >= a.vocab_total;
  }
  return {kept && r.scored, kept && r.bad};
}

// The label's column in this shard of the vocabulary, or -1.
template <class Args> __device__ int local_column(const Args& a, int64_t label) {
  const bool here = label != a.ignore_index && label >= a.vocab_start && label < a.vocab_start + a.logits.vocab;
  return here ? int(label - a.vocab_start) : -1;
}

// Calls f with a value of the storage type; fp64 stays on the CPU.
template <class F> void with_row_dtype(int dtype, const char* op, F&& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(bf16{});
  if (dtype == kFloat16) return f(fp16{});
  throw std::invalid_argument(std::string("fastalign: the CUDA kernels of ") + op + " take fp32, bf16 and fp16 logits");
}

}  // namespace cuda
}  // namespace fastalign
