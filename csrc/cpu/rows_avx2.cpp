// Row kernels for AVX2 with FMA and F16C: compiled with those flags, called only after cpuid has shown them.
#if defined(__x86_64__)
#define FA_HD inline __attribute__((always_inline))
#include "cpu/pair_rows_impl.h"
#include <immintrin.h>

namespace fastalign {
namespace cpu {
namespace {

struct Simd {
  using A = float;
  using F = __m256;
  typedef int16_t Bits __attribute__((vector_size(32)));
  static constexpr int kWidth = 8;

  static FA_INLINE F set(float x) { return _mm256_set1_ps(x); }
  // max returns its second operand when either is NaN.
  static FA_INLINE F max_skip_nan(F x, F high) { return _mm256_max_ps(x, high); }
  static FA_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static FA_INLINE F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // floor(d) goes into the exponent field; at -127, the lowest let through, it empties the field and leaves exactly 0. NaN converts to 2^31,
  // which the shift clears.
  static constexpr bool kScales = false;
  template <class P> static FA_INLINE F exp2(F d, const P& polynomial) {
    d = bounded(d);
    F n = _mm256_floor_ps(d);
    __m256i bits = _mm256_castps_si256(polynomial.of(d - n));
    return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  template <class P> static FA_INLINE void exp2_four(F (&d)[4], const P& polynomial) {
    for (F& v : d) v = exp2(v, polynomial);
  }
  static FA_INLINE F bounded(F d) { return _mm256_max_ps(set(-127.0f), d); }
  static FA_INLINE F tanh(F y) { return tanh_float<Simd>(y); }
  static FA_INLINE float sum(F v) {
    __m128 h = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    h = h + _mm_movehl_ps(h, h);
    return _mm_cvtss_f32(h + _mm_movehdup_ps(h));
  }
  static FA_INLINE float largest(F v) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ps(h, _mm_movehdup_ps(h)));
  }

  static FA_INLINE void load2(const float* p, F& a, F& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  static FA_INLINE void store2(float* p, F a, F b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  // bf16: even elements by a shift, odd ones by a mask.
  static FA_INLINE void load2(const bf16* p, F& a, F& b) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))));
  }
  static FA_INLINE __m256i round_to_bf16(F x) {  // to the high half of each lane; as from_acc in common.h, which also sees to any NaN
    __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static FA_INLINE void store2(bf16* p, F a, F b) {
    __m256i high = _mm256_and_si256(round_to_bf16(b), _mm256_set1_epi32(int(0xffff0000)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(_mm256_srli_epi32(round_to_bf16(a), 16), high));
  }
  static FA_INLINE void load2(const fp16* p, F& a, F& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  static FA_INLINE void store2(fp16* p, F a, F b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace

const RowKernels<float> avx2_rows{forward_rows<Simd>,       backward_rows<Simd>, forward_pair_rows<Simd>,
                                  backward_pair_rows<Simd>, one_u<Simd>,         one_exp2<Simd>};

}  // namespace cpu
}  // namespace fastalign
#endif
