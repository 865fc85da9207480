// The seam between the kernels and what runs them. Everything that is not plain CUDA C++ (launches, clusters, shared memory, the few
// hardware instructions without a C++ spelling) goes through a name in this file; tests/cuda_emu/cuda_emu.h has a twin for each, so the
// same .cu files run on the CPU under test. Inline PTX stands here and nowhere else.
#pragma once
#include <atomic>
#include "common.h"

// The emulation header is force-included before this file and brings its own half.
#ifndef FA_EMU
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastalign {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();   // reported here; the next check, ours or torch's, must not find it again
  throw std::runtime_error(std::string("fastalign: ") + what + ": " + cudaGetErrorString(error));
}

// Makes `device` current and restores the caller's device at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// One way to launch everything. The arguments are converted to the kernel's own parameter types first.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, unsigned cluster, void* stream, A&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  if (shared > (48 << 10)) {  // what a kernel gets without asking; the cache gives way to it
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), name);
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), name);
}

// Whether kernels can be launched with clusters on this device: the device must have them, and the code that was loaded for it must have
// been compiled for an architecture that has them (a fat binary without sm_90 code runs there through the PTX of an older architecture).
// Asked once per device, of any kernel of the build.
template <class K> bool clusters_supported(K* kernel, int device) {
  static std::atomic<signed char> known[64] = {};   // 1: yes, -1: no
  std::atomic<signed char>* memo = device >= 0 && device < 64 ? &known[device] : nullptr;
  if (memo && *memo) return *memo > 0;
  int available = 0;
  cudaFuncAttributes attributes = {};
  check(cudaDeviceGetAttribute(&available, cudaDevAttrClusterLaunch, device), "cudaDeviceGetAttribute");
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const bool yes = available && attributes.ptxVersion >= 90;
  if (memo) *memo = yes ? 1 : -1;
  return yes;
}

// Bytes of shared memory that a block of this device may ask for.
inline size_t shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return size_t(bytes);
}

// Clusters: all threads of all blocks of the cluster meet; this block's rank; the same shared variable in another block.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();
#endif
}
__device__ __forceinline__ unsigned cluster_rank() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
template <class T> __device__ __forceinline__ T* cluster_map(T* mine, unsigned rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// Copies from global to shared memory that run by themselves (sm_90 and later), and the flags, in shared memory, that say when the bytes
// are there. A flag serves once. One thread initialises all flags, announces the bytes of each and starts its copies; all threads meet;
// then any may wait. Addresses and sizes are multiples of 16.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FA_COPY_ASM(...) asm volatile(__VA_ARGS__)
#else
#define FA_COPY_ASM(...) __trap()
#endif
struct CopyFlag { uint64_t word; };
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void init_flags(CopyFlag* flags, int count) {
  for (int i = 0; i < count; ++i) FA_COPY_ASM("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(flags + i)) : "memory");
  FA_COPY_ASM("fence.proxy.async.shared::cta;" :: : "memory");   // the copies see the flags
}
__device__ __forceinline__ void announce_bytes(CopyFlag* flag, unsigned bytes) {
  FA_COPY_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(flag)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void start_copy(void* to, const void* from, unsigned bytes, CopyFlag* flag) {
  FA_COPY_ASM("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
              "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(flag)) : "memory");
}
__device__ __forceinline__ void wait_for_copies(CopyFlag* flag) {
  unsigned done = 0;
  while (!done)
    FA_COPY_ASM("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(
        done) : "r"(shared_address(flag)) : "memory");
}

// 2^x by the special function unit: 2 ulp, results below 2^-126 become 0. exp2f would add a range fix-up to every element.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One 16-byte store to global memory; an assignment of a uint4 is compiled into four stores at times.
__device__ __forceinline__ void store16(void* p, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Exact widening and round-to-nearest-even narrowing of 16-bit floats, in the hardware's instructions; `low` and `high` name the halves
// of the word.
__device__ __forceinline__ float2 widen_half2(uint32_t word) {
  __half2 h;
  memcpy(&h, &word, 4);
  return __half22float2(h);
}
__device__ __forceinline__ uint32_t narrow_half2(float low, float high) {
  __half2 h = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &h, 4);
  return word;
}
__device__ __forceinline__ uint32_t narrow_bf162(float low, float high) {
  __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &h, 4);
  return word;
}

// The larger of each half of two words; a NaN half loses.
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b, fp16) {
  __half2 x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  x = __hmax2(x, y);
  memcpy(&a, &x, 4);
  return a;
}
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b, bf16) {
  __nv_bfloat162 x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  x = __hmax2(x, y);
  memcpy(&a, &x, 4);
  return a;
}

}  // namespace cuda
}  // namespace fastalign

// Shared memory is dynamic only: the emulator poisons it, sizes it per launch and keeps blocks apart.
#define FA_DYNAMIC_SHARED(T, name)                                \
  extern __shared__ __align__(16) unsigned char fa_shared_[];     \
  T* name = reinterpret_cast<T*>(fa_shared_)

// Parenthesise the name of a template kernel: FA_LAUNCH((kernel<T, 1>), grid, block, shared_bytes, stream, args...).
#define FA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::fastalign::cuda::launch(#kernel, kernel, grid, block, shared, 1, stream, __VA_ARGS__)
#define FA_LAUNCH_CLUSTER(kernel, grid, block, shared, cluster, stream, ...) \
  ::fastalign::cuda::launch(#kernel, kernel, grid, block, shared, cluster, stream, __VA_ARGS__)
#endif  // FA_EMU

namespace fastalign {
namespace cuda {

constexpr unsigned kWarp = 32, kFullMask = 0xffffffffu;

// Blocks for `count` items, on grid.x: the only grid dimension without a 65535 limit.
inline unsigned grid_size(int64_t count, const char* what) {
  if (count > 0x7fffffff) throw std::invalid_argument(std::string("fastalign: ") + what + " needs more blocks than a grid can hold");
  return unsigned(count);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void require_float32(int dtype, const char* op) {
  if (dtype != kFloat32) throw std::invalid_argument(std::string("fastalign: the CUDA kernels of ") + op + " take fp32 tensors");
}

}  // namespace cuda
}  // namespace fastalign
