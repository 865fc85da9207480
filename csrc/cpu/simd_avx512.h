// The SIMD shim for AVX-512, with the bf16 conversion instruction where the including file is compiled for it.
#pragma once
#define FA_HD inline __attribute__((always_inline))
#include "cpu/pair_rows_impl.h"
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fastalign {
namespace cpu {
namespace {

struct Simd {
  using A = float;
  using F = __m512;
  typedef int16_t Bits __attribute__((vector_size(64)));
  static constexpr int kWidth = 16;

  static FA_INLINE F set(float x) { return _mm512_set1_ps(x); }
  // max returns its second operand when either is NaN.
  static FA_INLINE F max_skip_nan(F x, F high) { return _mm512_max_ps(x, high); }
  static FA_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static FA_INLINE F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // reduce leaves d - floor(d), and 0 for -inf; scalef multiplies by 2^floor(d), so by 0 for -inf.
  static constexpr bool kScales = true;
  template <class P> static FA_INLINE F exp2(F d, const P& polynomial) {
    return _mm512_scalef_ps(polynomial.of(_mm512_reduce_ps(d, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)), d);
  }
  template <class P> static FA_INLINE void exp2_four(F (&d)[4], const P& polynomial) {
    F f[4], p[4];
    for (int k = 0; k < 4; ++k) f[k] = _mm512_reduce_ps(d[k], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    polynomial.apply(f, p);
    for (int k = 0; k < 4; ++k) d[k] = _mm512_scalef_ps(p[k], d[k]);
  }
  // As unsigned integers negative floats are ordered by magnitude, behind all positive ones. 2^-160 is 0 in fp32.
  static FA_INLINE F bounded(F d) {
    return _mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(d), _mm512_castps_si512(set(-160.0f))));
  }
  static FA_INLINE F tanh(F y) { return tanh_float<Simd>(y); }
  static FA_INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }
  static FA_INLINE float largest(F v) { return _mm512_reduce_max_ps(v); }

  static FA_INLINE void load2(const float* p, F& a, F& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  static FA_INLINE void store2(float* p, F a, F b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }
  // bf16: even elements by a shift, odd ones by a mask.
  static FA_INLINE void load2(const bf16* p, F& a, F& b) {
    __m512i v = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))));
  }
#ifdef __AVX512BF16__
  // As from_acc in common.h, but subnormal results (below 1.2e-38) become 0. The packed elements go back to their interleaved places.
  static FA_INLINE void store2(bf16* p, F a, F b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))));
  }
#else
  static FA_INLINE __m512i round_to_bf16(F x) {  // to the high half of each lane; as from_acc in common.h, which also sees to any NaN
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  static FA_INLINE void store2(bf16* p, F a, F b) {
    __m512i high = _mm512_and_si512(round_to_bf16(b), _mm512_set1_epi32(int(0xffff0000)));
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(round_to_bf16(a), 16), high));
  }
#endif
  static FA_INLINE void load2(const fp16* p, F& a, F& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  static FA_INLINE void store2(fp16* p, F a, F b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace
}  // namespace cpu
}  // namespace fastalign
