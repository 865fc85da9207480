// Moments (math/moments.h) over a block, in double: the parts' means may lie far from 0 against their deviations.
#pragma once
#include "cuda/sequence.cuh"
#include "math/moments.h"

namespace fastalign {
namespace cuda {

// Merges `count` moments, part(i) of them, over the block; all threads call it and get the result. `shared`: two doubles per warp.
template <class F> __device__ Moments<double> merge_block(int64_t count, F&& part, double* shared) {
  double sums[2] = {0, 0}, m2[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const Moments<double> p = part(i);
    sums[0] += p.count;
    sums[1] += p.count * p.mean;
  }
  sum_block(sums, shared);
  const double mean = merged_mean(sums[0], sums[1]);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) m2[0] += moved_m2(part(i), mean);
  sum_block(m2, shared);
  return {sums[0], mean, m2[0]};
}

// Of what every thread has seen.
__device__ inline Moments<double> merge_threads(const MomentSums<float>& seen, double* shared) {
  const Moments<double> own = seen.moments<double>();
  return merge_block(blockDim.x, [&](int64_t) { return own; }, shared);
}

}  // namespace cuda
}  // namespace fastalign
