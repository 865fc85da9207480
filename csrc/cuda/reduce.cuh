// Merges of the row state over the lanes of a warp, the warps of a block and the blocks of a cluster, each by a fixed tree.
#pragma once
#include <type_traits>
#include "cuda/launch.h"
#include "math/row_state.h"

namespace fastalign {
namespace cuda {

// What a kernel keeps of a row state beside m, s0 and umax, which are always there: optional sums; a reference row's m and s0 (kRefRow),
// and with it the sums over both rows (kSumT, kSumTr).
enum RowSum : int { kSum1 = 1, kSum2 = 2, kSumZ = 4, kTop = 8, kRefRow = 16, kSumT = 32, kSumTr = 64 };
template <int kSums> constexpr int kRows = kSums & kRefRow ? 2 : 1;
template <int kSums> using State = std::conditional_t<(kSums & kRefRow) != 0, PairState<float>, RowState<float>>;

__device__ inline RowState<float>& policy(RowState<float>& s) { return s; }
__device__ inline RowState<float>& policy(PairState<float>& s) { return s.p; }

// Drops what is not kept, so that the compiler drops the arithmetic behind it.
template <int kSums> __device__ RowState<float> keep(RowState<float> s) {
  if (!(kSums & kSum1)) s.s1 = 0;
  if (!(kSums & kSum2)) s.s2 = 0;
  if (!(kSums & kSumZ)) s.sz = 0;
  if (!(kSums & kTop)) s.top = -1;
  return s;
}
template <int kSums> __device__ PairState<float> keep(PairState<float> s) {
  s.p = keep<kSums>(s.p);
  if (!(kSums & kSumT)) s.r.t = 0;
  if (!(kSums & kSumTr)) s.r.tr = 0;
  return s;
}

template <int kSums> __device__ RowState<float> shuffle_down(const RowState<float>& s, unsigned distance) {
  RowState<float> r = s;
  r.m = __shfl_down_sync(kFullMask, s.m, distance);
  r.s0 = __shfl_down_sync(kFullMask, s.s0, distance);
  r.umax = __shfl_down_sync(kFullMask, s.umax, distance);
  if (kSums & kSum1) r.s1 = __shfl_down_sync(kFullMask, s.s1, distance);
  if (kSums & kSum2) r.s2 = __shfl_down_sync(kFullMask, s.s2, distance);
  if (kSums & kSumZ) r.sz = __shfl_down_sync(kFullMask, s.sz, distance);
  if (kSums & kTop) r.top = __shfl_down_sync(kFullMask, s.top, distance);
  return r;
}
template <int kSums> __device__ PairState<float> shuffle_down(const PairState<float>& s, unsigned distance) {
  PairState<float> other{shuffle_down<kSums>(s.p, distance), s.r};
  other.r.m = __shfl_down_sync(kFullMask, s.r.m, distance);
  other.r.s0 = __shfl_down_sync(kFullMask, s.r.s0, distance);
  if (kSums & kSumT) other.r.t = __shfl_down_sync(kFullMask, s.r.t, distance);
  if (kSums & kSumTr) other.r.tr = __shfl_down_sync(kFullMask, s.r.tr, distance);
  return other;
}

// Lane 0 gets the merge of all lanes.
template <int kSums> __device__ State<kSums> merge_warp(State<kSums> s) {
#pragma unroll
  for (unsigned distance = kWarp / 2; distance; distance /= 2) s = keep<kSums>(merge(s, shuffle_down<kSums>(s, distance)));
  return s;
}

// Merges the states of the row's threads: a warp (blockDim.x == 32), a block, or the blocks of a cluster. Thread 0 of the first `finishers`
// blocks of the cluster gets the result. `partial` has room for one state per warp and one for the block.
template <int kSums> __device__ State<kSums> merge_row(State<kSums> s, State<kSums>* partial, unsigned cluster, unsigned finishers = 1) {
  s = merge_warp<kSums>(s);
  if (blockDim.x == kWarp) return s;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) partial[warp] = s;
  __syncthreads();
  if (warp == 0) {
    s = merge_warp<kSums>(lane < warps ? partial[lane] : State<kSums>::empty());
    if (lane == 0) partial[warps] = s;
  }
  if (cluster > 1) {
    cluster_sync();
    if (warp == 0 && cluster_rank() < finishers)
      s = merge_warp<kSums>(lane < cluster ? *cluster_map(partial + warps, lane) : State<kSums>::empty());
    cluster_sync();   // no block may exit while another one reads its shared memory
  }
  return s;
}

}  // namespace cuda
}  // namespace fastalign
