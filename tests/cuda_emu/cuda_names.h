// The CUDA names that the kernels use, and the emulated half of csrc/cuda/launch.h, on top of cuda_emu.h.
#pragma once

#define threadIdx (::emu::machine.current->index)
#define blockIdx (::emu::machine.current->block->index)
#define blockDim (::emu::machine.block_dim)
#define gridDim (::emu::machine.grid_dim)

inline void __syncthreads(::emu::Site site = ::emu::Site()) { ::emu::machine.meet_block(site); }
template <class T> T __shfl_sync(unsigned mask, T value, int lane, ::emu::Site site = ::emu::Site()) {
  return ::emu::from_word<T>(::emu::machine.meet_warp("__shfl_sync", mask, ::emu::to_word(value), unsigned(lane) & 31, true, site));
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned distance, ::emu::Site site = ::emu::Site()) {
  const unsigned lane = ::emu::machine.current->linear % 32, from = lane + distance < 32 ? lane + distance : lane;
  return ::emu::from_word<T>(::emu::machine.meet_warp("__shfl_down_sync", mask, ::emu::to_word(value), from, true, site));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned distance, ::emu::Site site = ::emu::Site()) {
  const unsigned lane = ::emu::machine.current->linear % 32, from = lane >= distance ? lane - distance : lane;
  return ::emu::from_word<T>(::emu::machine.meet_warp("__shfl_up_sync", mask, ::emu::to_word(value), from, true, site));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ::emu::Site site = ::emu::Site()) {
  return unsigned(::emu::machine.meet_warp("__ballot_sync", mask, predicate != 0, 0, false, site));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32) | low) >> (shift & 31));
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Other threads may run before and after: both are what a GPU does too.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  ::emu::machine.yield();
  const unsigned old = *p;
  *p += v;
  ::emu::machine.yield();
  return old;
}
inline void __threadfence() { ::emu::machine.yield(); }

#define FA_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::emu::machine.current->block->shared)
#define FA_LAUNCH(kernel, grid, block, shared, stream, ...) FA_LAUNCH_CLUSTER(kernel, grid, block, shared, 1, stream, __VA_ARGS__)
#define FA_LAUNCH_CLUSTER(kernel, grid, block, shared, cluster, stream, ...) \
  ((void)(stream), ::fastalign::cuda::launch(#kernel, kernel, grid, block, shared, cluster, __VA_ARGS__))

namespace fastalign {
namespace cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device != 0) throw std::invalid_argument("the emulator has one device, 0");
  }
};

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, unsigned cluster, const A&... args) {
  ::emu::machine.launch(name, grid, block, shared, cluster, [&] { kernel(static_cast<P>(args)...); });
}
template <class K> bool clusters_supported(K*, int) { return true; }

inline void cluster_sync(::emu::Site site = ::emu::Site()) { ::emu::machine.meet_cluster(site); }
inline unsigned cluster_rank() { return ::emu::machine.current->block->rank; }
template <class T> T* cluster_map(T* mine, unsigned rank) {
  return reinterpret_cast<T*>(::emu::machine.shared_of(reinterpret_cast<char*>(mine), rank));
}

inline size_t shared_limit(int) { return ::emu::kSharedLimit; }
struct CopyFlag { uint64_t word; };
inline void init_flags(CopyFlag* flags, int count) {
  for (int i = 0; i < count; ++i) ::emu::machine.init_flag(flags + i);
}
inline void announce_bytes(CopyFlag* flag, unsigned bytes) { ::emu::machine.announce(flag, bytes); }
inline void start_copy(void* to, const void* from, unsigned bytes, CopyFlag* flag) { ::emu::machine.start_copy(to, from, bytes, flag); }
inline void wait_for_copies(CopyFlag* flag) { ::emu::machine.wait_for_copies(flag); }

inline void store16(void* p, const uint4& v) { *static_cast<uint4*>(p) = v; }
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;   // flushed like the hardware's; NaN passes
}
inline float2 widen_half2(uint32_t word) { return {to_acc(fp16{uint16_t(word)}), to_acc(fp16{uint16_t(word >> 16)})}; }
template <class T> uint32_t narrow_pair(float low, float high) {
  T a, b;
  from_acc(low, &a), from_acc(high, &b);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}
inline uint32_t narrow_half2(float low, float high) { return narrow_pair<fp16>(low, high); }
inline uint32_t narrow_bf162(float low, float high) { return narrow_pair<bf16>(low, high); }
template <class T> uint32_t max_halves(uint32_t a, uint32_t b, T) {
  const auto larger = [](uint16_t x, uint16_t y) {
    const float fx = to_acc(T{x}), fy = to_acc(T{y});
    return fx != fx || fy > fx ? y : x;
  };
  return larger(uint16_t(a), uint16_t(b)) | uint32_t(larger(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

}  // namespace cuda
}  // namespace fastalign
