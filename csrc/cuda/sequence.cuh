// Packed sequences: the rank of a token among the scored ones, sums over a block, the last block of a grid.
#pragma once
#include "cuda/launch.h"
#include "segment.h"

namespace fastalign {
namespace cuda {

constexpr unsigned kSequenceThreads = 256;

// Number of threads of the block before this one whose flag is set, plus `running`, which grows by the block's total. Called by all
// threads. `counts` has room for one number per warp.
__device__ inline unsigned block_rank(bool flag, unsigned* counts, unsigned& running) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const unsigned set = __ballot_sync(kFullMask, flag);
  if (lane == 0) counts[warp] = __popc(set);
  __syncthreads();
  unsigned rank = running + __popc(set & ((1u << lane) - 1));
  for (unsigned w = 0; w < warps; ++w) {
    if (w < warp) rank += counts[w];
    running += counts[w];
  }
  __syncthreads();   // the next call writes `counts` again
  return rank;
}

// Sums over a block in a fixed tree; every thread gets the result. `partial` has room for one value per warp.
template <class T, int N> __device__ void sum_block(T (&x)[N], T* partial) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (unsigned distance = kWarp / 2; distance; distance /= 2) x[i] += __shfl_down_sync(kFullMask, x[i], distance);
  if (lane == 0)
    for (int i = 0; i < N; ++i) partial[warp * N + i] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T sum = 0;
    for (unsigned w = 0; w < warps; ++w) sum += partial[w * N + i];
    x[i] = sum;
  }
  __syncthreads();   // the caller may use `partial` again
}

// True in all threads of the block that arrives last; what the others wrote before is then visible to it. `counter` is a word of
// this launch's own that was 0 before it, `flag` a word of shared memory.
__device__ inline bool last_block(uint32_t* counter, unsigned* flag) {
  if (threadIdx.x == 0) {
    __threadfence();
    *flag = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*flag) return false;
  __threadfence();
  return true;
}

}  // namespace cuda
}  // namespace fastalign
