// 16-byte access to rows that start at any element. A row is cut into vectors of kLanes elements counted from an origin that the kernel
// chooses, never from where the address happens to be aligned: element and thread belong together by index alone, so moving a row in memory
// moves no bit of the result. A vector that is not aligned in memory is put together from the two aligned ones it straddles.
#pragma once
#include "cuda/launch.h"

namespace fastalign {
namespace cuda {

template <class T> constexpr int kLanes = int(16 / sizeof(T));

// The lanes of a 16-byte vector as fp32, and back (rounded to nearest even).
__device__ inline void unpack(const uint4& v, float (&x)[4], float) {
  x[0] = bits_float(v.x), x[1] = bits_float(v.y), x[2] = bits_float(v.z), x[3] = bits_float(v.w);
}
__device__ inline void unpack(const uint4& v, float (&x)[8], bf16) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = bits_float(words[i] << 16), x[2 * i + 1] = bits_float(words[i] & 0xffff0000u);
}
__device__ inline void unpack(const uint4& v, float (&x)[8], fp16) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair = widen_half2(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ inline uint4 pack(const float (&x)[4], float) {
  return {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
}
__device__ inline uint4 pack(const float (&x)[8], bf16) {
  return {narrow_bf162(x[0], x[1]), narrow_bf162(x[2], x[3]), narrow_bf162(x[4], x[5]), narrow_bf162(x[6], x[7])};
}
__device__ inline uint4 pack(const float (&x)[8], fp16) {
  return {narrow_half2(x[0], x[1]), narrow_half2(x[2], x[3]), narrow_half2(x[4], x[5]), narrow_half2(x[6], x[7])};
}

// The largest lane of N vectors. NaN lanes are skipped; 16-bit lanes are compared two at a time.
template <int N> __device__ float largest(const uint4 (&v)[N], float) {
  float m = -INFINITY;
#pragma unroll
  for (int k = 0; k < N; ++k)
    m = fmaxf(fmaxf(fmaxf(m, bits_float(v[k].x)), fmaxf(bits_float(v[k].y), bits_float(v[k].z))), bits_float(v[k].w));
  return m;
}
template <int N, class T> __device__ float largest(const uint4 (&v)[N], T) {
  uint32_t m = v[0].x;
#pragma unroll
  for (int k = 0; k < N; ++k) m = max_halves(max_halves(m, v[k].x, T{}), max_halves(max_halves(v[k].y, v[k].z, T{}), v[k].w, T{}), T{});
  float x[kLanes<T>];
  unpack({m, m, m, m}, x, T{});
  return fmaxf(x[0], x[1]);
}

// The 16 bytes that start `shift` bytes (0..15, even) into the 32 bytes a, b.
__device__ inline uint4 funnel(const uint4& a, const uint4& b, unsigned shift) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = 8 * (shift & 2);
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// The vectors of one row, or of a stretch of it in shared memory: vector i holds the elements i * kLanes - offset + (0 .. kLanes - 1).
// Vectors [first, last) are `wide`: they can be put together from aligned 16-byte words that lie wholly inside the row.
template <class T> class RowVectors {
 public:
  __device__ RowVectors() {}
  __device__ RowVectors(const T* row, int vocab, int offset) : row_(row), vocab_(vocab), offset_(offset) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row), end = begin + uintptr_t(vocab) * sizeof(T);
    const uintptr_t origin = begin - uintptr_t(offset) * sizeof(T);
    shift_ = unsigned(origin & 15);
    const uintptr_t base = origin - shift_, span = shift_ ? 32 : 16;
    // Computed from the pointer, not from the integer: the compiler must still see that it is global (or shared) memory.
    base_ = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row) - (begin - base));
    first = int((begin - base + 15) / 16);
    last = end >= base + span ? int((end - base - span) / 16) + 1 : 0;
    last = last > first ? last : first;
  }

  // Starts the loads of vectors i, i + 32, ... where they are wide and below `limit`. Returns one bit per vector that is loaded. (The
  // constant stride makes the addresses one register and a few immediates.)
  template <int N> __device__ unsigned fetch(int i, int limit, uint4 (&v)[N]) const {
    unsigned loaded = 0;
    const uint4* p = base_ + i;
    limit = last < limit ? last : limit;
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (i + k * int(kWarp) >= first && i + k * int(kWarp) < limit) v[k] = p[k * kWarp], loaded |= 1u << k;
    return loaded;
  }

  // Makes vectors of what `fetch` has loaded: the first use of it.
  template <int N> __device__ void align(int i, unsigned loaded, uint4 (&v)[N]) const {
    const uint4* p = base_ + i;
    if (shift_) {  // the second word comes from the cache: a neighbouring lane loads it too
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (loaded >> k & 1) v[k] = funnel(v[k], p[k * kWarp + 1], shift_);
    }
  }

  // The vectors that `fetch` has not loaded, element by element. What they hold beyond the row or the limit reads as -inf: no probability,
  // never the maximum.
  template <int N> __device__ void gather(int i, int limit, unsigned loaded, uint4 (&v)[N]) const {
    if (loaded == (1u << N) - 1) return;
#pragma unroll 1
    for (int k = 0; k < N; ++k) {  // the ends of a row
      if (loaded >> k & 1) continue;
      const int vector = i + k * int(kWarp), begin = element(vector);
      float lanes[kLanes<T>];
#pragma unroll
      for (int l = 0; l < kLanes<T>; ++l) lanes[l] = vector < limit && begin + l < vocab_ ? to_acc(row_[begin + l]) : -INFINITY;
      const uint4 gathered = pack(lanes, T{});
#pragma unroll
      for (int j = 0; j < N; ++j)  // a selection: indexing v by k would move it to local memory
        if (j == k) v[j] = gathered;
    }
  }

  // The first element of vector i.
  __device__ int element(int i) const { return i * kLanes<T> - offset_; }

  int first, last;

 private:
  const T* row_;
  int vocab_;
  const uint4* base_;
  int offset_;
  unsigned shift_;
};

// The same vectors of a row, or of a policy row and a reference row. All loads are under way before the first is used.
template <class T, int kRows, int N>
__device__ __forceinline__ void load_bundle(const RowVectors<T> (&rows)[kRows], int i, int limit, uint4 (&v)[kRows][N]) {
  unsigned loaded[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) loaded[r] = rows[r].fetch(i, limit, v[r]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r].align(i, loaded[r], v[r]), rows[r].gather(i, limit, loaded[r], v[r]);
}

// Calls f with the elements of a row of `count` that lie outside [begin, end): what no wide vector covers, at both ends.
template <class F> __device__ void for_each_end(int count, int begin, int end, F&& f) {
  for (int j = int(threadIdx.x); j < count - (end - begin); j += int(blockDim.x)) f(j < begin ? j : j + (end - begin));
}

}  // namespace cuda
}  // namespace fastalign
