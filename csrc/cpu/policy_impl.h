// Policy and value losses on some tokens at a time, as vectors: included by one file per instruction set, each compiled with that set's flags, so
// everything here is private to the including file (the reason is in rows_impl.h). The including file defines FA_HD first.
#pragma once
#include "cpu/policy.h"

namespace fastalign {
namespace cpu {
namespace {

// kWidth tokens: their values, and the integers of the same size that comparisons give. The compiler splits them where registers are narrower.
template <class T> struct Vector;
template <> struct Vector<float> {
  static constexpr int kWidth = 16;
  typedef float Value __attribute__((vector_size(64)));
  typedef int32_t Bits __attribute__((vector_size(64)));
  typedef uint8_t Mask __attribute__((vector_size(16)));
  typedef double Wide __attribute__((vector_size(128)));
};
template <> struct Vector<double> {
  static constexpr int kWidth = 8;
  typedef double Value __attribute__((vector_size(64)));
  typedef int64_t Bits __attribute__((vector_size(64)));
  typedef uint8_t Mask __attribute__((vector_size(8)));
  typedef double Wide __attribute__((vector_size(64)));
};

}  // namespace
}  // namespace cpu
template <> struct ScalarOf<cpu::Vector<float>::Value> { using type = float; };
template <> struct ScalarOf<cpu::Vector<double>::Value> { using type = double; };
namespace cpu {
namespace {

// exp and expm1 of vectors. fp32: 1.2e-7 and 2e-7 relative, 0 below e^-87, and exp(0) is 1 exactly. fp64: the library's, lane by lane.
struct LaneMath {
  using F = Vector<float>::Value;
  using D = Vector<double>::Value;
  static FA_HD D exp(D x) {
    for (int i = 0; i < Vector<double>::kWidth; ++i) x[i] = std::exp(x[i]);
    return x;
  }
  static FA_HD D expm1(D x) {
    for (int i = 0; i < Vector<double>::kWidth; ++i) x[i] = std::expm1(x[i]);
    return x;
  }
  static FA_HD F exp(F x) {
    typedef uint32_t U __attribute__((vector_size(64)));
    const F t = x > 88.0f ? splat<F>(88.0f) : x,
            magic = splat<F>(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    const F shifted = t * 1.44269504f + magic, n = shifted - magic;
    const F f = (t - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; n times the first is exact
    F p = f * 1.98756915e-4f + 1.39819994e-3f;
    p = p * f + 8.33345205e-3f;
    p = p * f + 4.16657962e-2f;
    p = p * f + 1.66666657e-1f;
    p = p * f + 5.00000000e-1f;
    p = p * (f * f) + f + 1.0f;
    const F scale = F((U(shifted) + 127u) << 23);
    return t < -87.0f ? F{} : p * scale;
  }
  static FA_HD F expm1(F x) {
    const F s =
        x * (1.0f / 2 + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720 + x * (1.0f / 5040 + x * (1.0f / 40320)))))));
    return (x < 0.5f) & (x > -0.5f) ? x + x * s : exp(x) - 1.0f;
  }
};

// Up to kWidth tokens from `from` on; zeros where `keep` has none, whatever stands there, and zeros altogether for null.
template <class T> FA_HD typename Vector<T>::Value load(const void* tensor, int64_t from, int n, typename Vector<T>::Bits keep) {
  typename Vector<T>::Value v{};
  if (!tensor) return v;
  const T* p = static_cast<const T*>(tensor) + from;
  if (n == Vector<T>::kWidth) memcpy(&v, p, sizeof v);
  else memcpy(&v, p, size_t(n) * sizeof(T));
  return typename Vector<T>::Value(typename Vector<T>::Bits(v) & keep);
}
template <class T> FA_HD typename Vector<T>::Bits load_mask(const uint8_t* mask, int64_t from, int n) {
  using V = Vector<T>;
  typename V::Mask m{};
  if (n == V::kWidth) {
    if (!mask) return ~typename V::Bits{};
    memcpy(&m, mask + from, sizeof m);
  } else {
    for (int i = 0; i < n; ++i) m[i] = mask ? mask[from + i] : 1;
  }
  return typename V::Bits(__builtin_convertvector(m, typename V::Bits) != 0);
}
template <class T> FA_HD void store(typename Vector<T>::Value v, void* tensor, int64_t from, int n) {
  T* p = static_cast<T*>(tensor) + from;
  if (n == Vector<T>::kWidth) memcpy(p, &v, sizeof v);
  else memcpy(p, &v, size_t(n) * sizeof(T));
}
template <class V> FA_HD V select(flag_t<V> where, V v) { return V(where & flag_t<V>(v)); }
template <class T> FA_HD double sum(typename Vector<T>::Value v) {
  double total = 0;
  for (int j = 0; j < Vector<T>::kWidth; ++j) total += double(v[j]);
  return total;
}

template <class T> FA_HD double count(typename Vector<T>::Bits n) {
  int64_t total = 0;
  for (int j = 0; j < Vector<T>::kWidth; ++j) total += int64_t(n[j]);
  return double(total);
}

template <class T> struct Policy {
  using V = typename Vector<T>::Value;
  using Bits = typename Vector<T>::Bits;
  static constexpr int kWidth = Vector<T>::kWidth;
  const PolicyArgs& a;
  const PolicyParams<T>& p;

  // A tensor of values per token or per sequence.
  FA_HD V load_per(const void* tensor, bool per_sequence, const Span& s, int64_t i, int n, Bits keep) const {
    return per_sequence ? select(keep, splat<V>(static_cast<const T*>(tensor)[s.sequence])) : load<T>(tensor, i, n, keep);
  }

  // Adds a span's scored tokens and the sum of its terms, in double.
  FA_HD void measure(const Span& s, double* length, double* total) const {
    using Wide = typename Vector<T>::Wide;
    Wide terms{};
    V count{};
    for (int64_t i = s.begin, end = s.begin + s.n; i < end; i += kWidth) {
      const int n = int(end - i < kWidth ? end - i : kWidth);
      const Bits keep = load_mask<T>(a.mask, i, n);
      const V lp = load<T>(a.logprobs, i, n, keep), old = a.old_logprobs ? load<T>(a.old_logprobs, i, n, keep) : lp;
      const V advantage = load_per(a.advantages, p.advantages_per_sequence, s, i, n, keep);
      terms += __builtin_convertvector(select(keep, sequence_term(p, log_ratio(lp, old), advantage)), Wide);
      count += select(keep, splat<V>(1));
    }
    for (int j = 0; j < kWidth; ++j) *total += terms[j];
    *length += sum<T>(count);
  }

  // Slopes of a span, and its sums into stats.
  FA_HD void run(const Span& s, double* stats) const {
    const T divisor = token_divisor(p.aggregation, T(s.length), p.norm_length);
    const T factor = p.ratio == kRatioSeqSum && (p.surrogate == kClip || p.surrogate == kSapo) ? T(s.length) : T(1);
    V sums[kPolicyStats] = {};
    Bits counts[kPolicyStats] = {};  // of the columns that count tokens; masks are -1
    for (int64_t i = s.begin, end = s.begin + s.n; i < end; i += kWidth) {
      const int n = int(end - i < kWidth ? end - i : kWidth);
      const Bits keep = load_mask<T>(a.mask, i, n);
      const V lp = load<T>(a.logprobs, i, n, keep), old = a.old_logprobs ? load<T>(a.old_logprobs, i, n, keep) : lp;
      const V advantage = load_per(a.advantages, p.advantages_per_sequence, s, i, n, keep), lr = log_ratio(lp, old);
      const V log_rho = p.ratio == kRatioToken ? clamp_log_ratio(p.surrogate, lr) : splat<V>(T(s.log_rho)), rho = LaneMath::exp(log_rho);
      const Surrogate<V> r = surrogate<LaneMath>(p, lp, lr, log_rho, rho, advantage);
      V value = r.value, slope = r.slope * factor;
      if (a.is_weight) {
        const V given = load_per(a.is_weight, p.is_per_sequence, s, i, n, keep);
        const ImportanceWeight<V> w = importance_weight(p, given);
        const Bits used = p.is_mode == kIsMask ? ~w.clipped : ~Bits{};
        value = select(used, w.used * value);
        slope = select(used, w.used * slope);
        sums[kPolicy_is_weight] += given;
        counts[kPolicy_is_clipped] -= keep & w.clipped;
      }
      V total = value;
      if (a.ref_logprobs) {
        const ValueSlope<V> k = kl_term<LaneMath>(p.kl_kind, lp, load<T>(a.ref_logprobs, i, n, keep));
        if (p.kl_coef != T(0)) {
          total += p.kl_coef * (p.kl_bias_correction ? rho * k.value : k.value);
          slope += p.kl_coef * (p.kl_bias_correction ? rho * (k.value + k.slope) : k.slope);
        }
        sums[kPolicy_kl] += select(keep, k.value);
      }
      if (a.entropy) {
        const V h = load<T>(a.entropy, i, n, keep);
        if (p.entropy_coef != T(0)) total -= p.entropy_coef * h;
        sums[kPolicy_entropy] += h;
      }
      store<T>(select(keep, slope / divisor), a.slopes, i, n);
      if (a.entropy_slopes) store<T>(select(keep, splat<V>(-p.entropy_coef / divisor)), a.entropy_slopes, i, n);
      const V beyond = select(keep, rho - T(1));
      sums[kPolicy_loss] += select(keep, total);
      sums[kPolicy_policy] += select(keep, value);
      counts[kPolicy_tokens] -= keep;
      sums[kPolicy_ratio] += beyond;
      sums[kPolicy_ratio_sq] += beyond * beyond;
      sums[kPolicy_approx_kl] += lr * lr;
      counts[kPolicy_clip_low] -= keep & r.low;
      counts[kPolicy_clip_high] -= keep & r.high;
      counts[kPolicy_clip_dual] -= keep & r.dual;
      counts[kPolicy_nonfinite] -= keep & (total - total != V{});
    }
    for (int c = 0; c < kPolicyStats; ++c) {
      const double by = c == kPolicy_loss || c == kPolicy_policy ? double(divisor) : (c == kPolicy_approx_kl ? 2.0 : 1.0);
      stats[c] += (sum<T>(sums[c]) + count<T>(counts[c])) / by;
    }
  }
};

template <class T> struct Value {
  using V = typename Vector<T>::Value;
  using Bits = typename Vector<T>::Bits;
  static constexpr int kWidth = Vector<T>::kWidth;
  const ValueArgs& a;

  FA_HD void measure(const Span& s, double* length) const {
    for (int64_t i = s.begin, end = s.begin + s.n; i < end; i += kWidth)
      *length += sum<T>(select(load_mask<T>(a.mask, i, int(end - i < kWidth ? end - i : kWidth)), splat<V>(1)));
  }

  FA_HD void run(const Span& s, double* stats) const {
    const T divisor = token_divisor(a.aggregation, T(s.length), T(a.norm_length));
    V sums[kValueStats] = {};
    Bits counts[kValueStats] = {};
    for (int64_t i = s.begin, end = s.begin + s.n; i < end; i += kWidth) {
      const int n = int(end - i < kWidth ? end - i : kWidth);
      const Bits keep = load_mask<T>(a.mask, i, n);
      const V value = load<T>(a.values, i, n, keep), target = load<T>(a.returns, i, n, keep);
      const ValueError<V> r = value_error(value, load<T>(a.old_values, i, n, keep), target, T(a.clip), a.old_values != nullptr);
      store<T>(select(keep, r.slope / divisor), a.slopes, i, n);
      sums[kValue_loss] += select(keep, r.value);
      counts[kValue_tokens] -= keep;
      counts[kValue_clipped] -= keep & r.clipped;
      sums[kValue_value] += value;
      sums[kValue_returns] += target;
      sums[kValue_returns_sq] += target * target;
      sums[kValue_error] += r.error;
      sums[kValue_error_sq] += r.error * r.error;
      counts[kValue_nonfinite] -= keep & (r.value - r.value != V{});
    }
    for (int c = 0; c < kValueStats; ++c) stats[c] += (sum<T>(sums[c]) + count<T>(counts[c])) / (c == kValue_loss ? double(divisor) : 1.0);
  }
};

template <class T> void measure_policy(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* length, double* total) {
  Policy<T>{a, p}.measure(s, length, total);
}
template <class T> void run_policy(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* stats) {
  Policy<T>{a, p}.run(s, stats);
}
template <class T> void measure_value(const ValueArgs& a, const Span& s, double* length) { Value<T>{a}.measure(s, length); }
template <class T> void run_value(const ValueArgs& a, const Span& s, double* stats) { Value<T>{a}.run(s, stats); }
template <class T> void scale(const T* slopes, T grad, T items, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = grad * slopes[i] / items;
}

template <class T> void estimate_kl(int kind, const T* logprobs, const T* ref_logprobs, int64_t n, T* value, T* slope) {
  using V = typename Vector<T>::Value;
  constexpr int kWidth = Vector<T>::kWidth;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = int(n - i < kWidth ? n - i : kWidth);
    const typename Vector<T>::Bits all = ~typename Vector<T>::Bits{};
    const ValueSlope<V> r = kl_estimate<V, LaneMath>(kind, load<T>(logprobs, i, count, all), load<T>(ref_logprobs, i, count, all));
    store<T>(r.value, value, i, count);
    store<T>(r.slope, slope, i, count);
  }
}

template <class T>
constexpr PolicyKernels<T> kPolicyKernels{measure_policy<T>, run_policy<T>, measure_value<T>, run_value<T>, scale<T>, estimate_kl<T>};

}  // namespace
}  // namespace cpu
}  // namespace fastalign
