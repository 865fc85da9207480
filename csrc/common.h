// What every kernel file shares: host/device marker, dtype codes, storage types and their exact conversions.
// No torch, no pybind11 here: kernels see raw pointers, sizes and strides only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

// A file that is compiled for one instruction set defines FA_HD first, as always_inline: a shared function must not be emitted there, since
// the linker keeps one copy for the whole program and could keep the one that other CPUs cannot run.
#if defined(FA_HD)
#elif defined(__CUDACC__) && !defined(FA_EMU)
#define FA_HD __host__ __device__ __forceinline__
#else
#define FA_HD inline
#endif

namespace fastalign {

// The overload set that picks the argument's own precision, on host and device.
using std::exp, std::exp2, std::expm1, std::fabs, std::fma, std::log, std::log1p, std::pow, std::tanh;

// Codes shared with fastalign/runtime/ffi.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Arithmetic type of a storage type: fp64 stays fp64, everything else is computed in fp32.
template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };
template <class T> using acc_t = typename Acc<T>::type;

FA_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FA_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FA_HD float to_acc(float x) { return x; }
FA_HD double to_acc(double x) { return x; }
FA_HD float to_acc(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
FA_HD float to_acc(fp16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; inf and NaN are patched.
  float scaled = bits_float(rest << 13) * bits_float(0x77800000u);
  return bits_float((rest >= 0x7c00 ? (0x7f800000u | (rest << 13)) : float_bits(scaled)) | sign);
}

// Round to nearest even, once. NaN stays NaN.
FA_HD void from_acc(float x, float* out) { *out = x; }
FA_HD void from_acc(double x, double* out) { *out = x; }
FA_HD void from_acc(float x, bf16* out) {
  uint32_t u = float_bits(x);
  out->bits = x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
FA_HD void from_acc(float x, fp16* out) {
  uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  uint32_t r;
  if (mag > 0x7f800000u) r = 0x7e00u;
  else if (mag >= 0x477ff000u) r = 0x7c00u;                                   // rounds to 65536 or more: inf
  else if (mag < 0x38800000u) {                                               // subnormal half: let fp32 addition round
    r = float_bits(bits_float(mag) + 0.5f) - float_bits(0.5f);
  } else {
    r = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | r);
}

// Calls f with a value of the storage type of `dtype`:  with_dtype(code, [&](auto tag) { using T = decltype(tag); ... })
template <class F> inline void with_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32: f(float{}); return;
    case kBFloat16: f(bf16{}); return;
    case kFloat16: f(fp16{}); return;
    case kFloat64: f(double{}); return;
  }
  throw std::invalid_argument("fastalign: unknown dtype code " + std::to_string(dtype));
}

}  // namespace fastalign
