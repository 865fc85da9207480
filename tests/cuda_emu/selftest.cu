// Small kernels, most of them wrong, for the emulator's own tests (test_emulator.py). Compiled with cuda_emu.h force-included.
#include <cstdio>
#include <cstring>

using namespace fastalign::cuda;

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void reverse(float* out, bool with_barrier) {   // out[i] = threads - 1 - i, through shared memory
  FA_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = float(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

__global__ void early_exit(float* out) {   // legal: threads that have exited no longer count
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = float(__popc(__ballot_sync(threadIdx.x < 32 ? kAll : 0xffu, 1)));
}

__global__ void warp_sum(float* out) {
  float v = float(threadIdx.x);
  for (unsigned d = 16; d; d /= 2) v += __shfl_down_sync(kAll, v, d);
  out[threadIdx.x] = __shfl_sync(kAll, v, 0);
}

__global__ void divergent_barrier(float*) {
  if (threadIdx.x % 2) __syncthreads();
  else __syncthreads();
}

__global__ void divergent_shuffle(float* out) {
  if (threadIdx.x < 16) out[0] = __shfl_down_sync(kAll, out[0], 1);
  else out[1] = float(__ballot_sync(kAll, 1));
}

__global__ void wrong_mask(float* out) { out[0] = float(__ballot_sync(threadIdx.x < 8 ? 0xffu : kAll, 1)); }

__global__ void missing_lane(float* out) {
  if (threadIdx.x >= 8) return;
  out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 8);   // lanes 8 and up have left
}

__global__ void deadlock(float* out) {   // lane 0 waits for its warp, which waits for lane 0
  if (threadIdx.x == 0) out[0] = float(__ballot_sync(kAll, 1));
  __syncthreads();
}

__global__ void cluster_deadlock(float*) {   // rank 1 never comes
  FA_DYNAMIC_SHARED(float, s);
  if (cluster_rank() != 1) {
    cluster_sync();
  } else {
    s[0] = float(threadIdx.x);
    if (threadIdx.x == 0) __ballot_sync(kAll, 1);
    __syncthreads();
  }
}

__global__ void cluster_read(float* out, bool wait_before, bool wait_after) {   // out[rank] = the next rank's number
  FA_DYNAMIC_SHARED(float, s);
  const unsigned rank = cluster_rank(), size = gridDim.x;
  if (threadIdx.x == 0) s[0] = float(rank);
  if (wait_before) cluster_sync();
  if (threadIdx.x == 0) {
    const float* other = cluster_map(s, (rank + 1) % size);
    __threadfence();
    out[rank] = *other;
  }
  if (wait_after) cluster_sync();
}

__global__ void copy(float* out, const float* from, bool wait, unsigned announced) {   // out = from, through shared memory
  FA_DYNAMIC_SHARED(float, s);
  CopyFlag* flag = reinterpret_cast<CopyFlag*>(s + 32);
  if (threadIdx.x == 0) {
    init_flags(flag, 1);
    announce_bytes(flag, announced);
    start_copy(s, from, 128, flag);
  }
  __syncthreads();
  if (wait) wait_for_copies(flag);
  out[threadIdx.x] = s[threadIdx.x];
}

__global__ void overrun(float*) {
  FA_DYNAMIC_SHARED(float, s);
  s[blockDim.x] = 1.0f;
}

__global__ void last_block_counts(float* out, unsigned* counter) {   // the order in which blocks arrive
  if (threadIdx.x == 0) out[blockIdx.x] = float(atomicAdd(counter, 1u));
}

}  // namespace

// Runs one of the kernels above; returns 0, or 1 with the emulator's message.
extern "C" __attribute__((visibility("default"))) int run(const char* name, unsigned seed, float* out, char* message, size_t room) {
  emu::machine.seed = seed;
  void* stream = nullptr;
  unsigned counter = 0;
  alignas(16) float source[36];
  for (int i = 0; i < 36; ++i) source[i] = float(i);
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  try {
    if (is("reverse")) FA_LAUNCH(reverse, dim3(1), dim3(64), 64 * sizeof(float), stream, out, true);
    else if (is("no_barrier")) FA_LAUNCH(reverse, dim3(1), dim3(64), 64 * sizeof(float), stream, out, false);
    else if (is("early_exit")) FA_LAUNCH(early_exit, dim3(1), dim3(64), 0, stream, out);
    else if (is("warp_sum")) FA_LAUNCH(warp_sum, dim3(1), dim3(32), 0, stream, out);
    else if (is("divergent_barrier")) FA_LAUNCH(divergent_barrier, dim3(1), dim3(64), 0, stream, out);
    else if (is("divergent_shuffle")) FA_LAUNCH(divergent_shuffle, dim3(1), dim3(32), 0, stream, out);
    else if (is("wrong_mask")) FA_LAUNCH(wrong_mask, dim3(1), dim3(32), 0, stream, out);
    else if (is("missing_lane")) FA_LAUNCH(missing_lane, dim3(1), dim3(32), 0, stream, out);
    else if (is("deadlock")) FA_LAUNCH(deadlock, dim3(1), dim3(64), 0, stream, out);
    else if (is("cluster_deadlock")) FA_LAUNCH_CLUSTER(cluster_deadlock, dim3(4), dim3(32), 64, 4, stream, out);
    else if (is("cluster_read")) FA_LAUNCH_CLUSTER(cluster_read, dim3(4), dim3(32), 64, 4, stream, out, true, true);
    else if (is("cluster_read_early")) FA_LAUNCH_CLUSTER(cluster_read, dim3(4), dim3(32), 64, 4, stream, out, false, true);
    else if (is("cluster_exit_early")) FA_LAUNCH_CLUSTER(cluster_read, dim3(4), dim3(32), 64, 4, stream, out, true, false);
    else if (is("copy")) FA_LAUNCH(copy, dim3(1), dim3(32), 136, stream, out, source, true, 128);
    else if (is("copy_without_wait")) FA_LAUNCH(copy, dim3(1), dim3(32), 136, stream, out, source, false, 128);
    else if (is("copy_miscounted")) FA_LAUNCH(copy, dim3(1), dim3(32), 136, stream, out, source, true, 256);
    else if (is("copy_misaligned")) FA_LAUNCH(copy, dim3(1), dim3(32), 136, stream, out, source + 1, true, 128);
    else if (is("overrun")) FA_LAUNCH(overrun, dim3(1), dim3(32), 32 * sizeof(float), stream, out);
    else if (is("too_many_threads")) FA_LAUNCH(overrun, dim3(1), dim3(1025), 0, stream, out);
    else if (is("too_much_shared")) FA_LAUNCH(overrun, dim3(1), dim3(32), 228 << 10, stream, out);
    else if (is("odd_cluster")) FA_LAUNCH_CLUSTER(overrun, dim3(3), dim3(32), 0, 2, stream, out);
    else if (is("arrivals")) FA_LAUNCH(last_block_counts, dim3(16), dim3(32), 0, stream, out, &counter);
    else throw std::runtime_error("no such case");
  } catch (const std::exception& e) {
    std::snprintf(message, room, "%s", e.what());
    return 1;
  }
  return 0;
}
