// Policy and value losses on some tokens at a time, as vectors. Part of tokens_impl.h.
#pragma once
#include "cpu/tokens.h"

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
  typedef uint16_t WiderMask __attribute__((vector_size(32)));
  typedef double Wide __attribute__((vector_size(128)));
};
template <> struct Vector<double> {
  static constexpr int kWidth = 8;
  typedef double Value __attribute__((vector_size(64)));
  typedef int64_t Bits __attribute__((vector_size(64)));
  typedef uint8_t Mask __attribute__((vector_size(8)));
  typedef uint16_t WiderMask __attribute__((vector_size(16)));
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
  // In place, side by side, so that no vector waits for its own results.
  template <int n> static FA_HD void exp_each(F (&x)[n]) {
    typedef uint32_t U __attribute__((vector_size(sizeof(F))));
    const F magic = splat<F>(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    F shifted[n], f[n], q[n], p[n];
    for (int k = 0; k < n; ++k) x[k] = x[k] > 88.0f ? splat<F>(88.0f) : x[k];
    for (int k = 0; k < n; ++k) shifted[k] = x[k] * 1.44269504f + magic;
    for (int k = 0; k < n; ++k) f[k] = shifted[k] - magic;
    for (int k = 0; k < n; ++k)
      f[k] = (x[k] - f[k] * 0.693145752f) - f[k] * 1.42860677e-6f;  // ln 2 in two parts; n times the first is exact
    for (int k = 0; k < n; ++k) q[k] = f[k] * f[k];
    for (int k = 0; k < n; ++k) p[k] = ((f[k] * 1.98756915e-4f + 1.39819994e-3f) * q[k] + (f[k] * 8.33345205e-3f + 4.16657962e-2f)) * q[k];
    for (int k = 0; k < n; ++k) p[k] = ((p[k] + (f[k] * 1.66666657e-1f + 5.00000000e-1f)) * q[k] + f[k]) + 1.0f;
    for (int k = 0; k < n; ++k) x[k] = x[k] < -87.0f ? F{} : p[k] * F((U(shifted[k]) + 127u) << 23);
  }
  template <int n> static FA_HD void exp_each(D (&x)[n]) {
    for (D& v : x) v = exp(v);
  }
  static FA_HD F exp(F x) {
    F one[1] = {x};
    exp_each(one);
    return one[0];
  }
  static FA_HD F expm1(F x) {
    const F s =
        x * (1.0f / 2 + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720 + x * (1.0f / 5040 + x * (1.0f / 40320)))))));
    return (x < 0.5f) & (x > -0.5f) ? x + x * s : exp(x) - 1.0f;
  }
};

// A vector's place: tokens from `from` on. kWidth of them, known to the compiler, which then needs no memory in between; or fewer.
struct Whole { int64_t from; };
struct Part {
  int64_t from;
  int n;
};
template <class T> FA_HD void copy(const T* from, typename Vector<T>::Value* to, Whole) { memcpy(to, from, sizeof *to); }
template <class T> FA_HD void copy(const T* from, typename Vector<T>::Value* to, Part at) { memcpy(to, from, size_t(at.n) * sizeof(T)); }
template <class T> FA_HD void copy(const typename Vector<T>::Value* from, T* to, Whole) { memcpy(to, from, sizeof *from); }
template <class T> FA_HD void copy(const typename Vector<T>::Value* from, T* to, Part at) { memcpy(to, from, size_t(at.n) * sizeof(T)); }

// Calls step(place) for all vectors of tokens [i, end).
template <int kWidth, class Step> FA_HD void each_vector(int64_t i, int64_t end, const Step& step) {
  for (; i + kWidth <= end; i += kWidth) step(Whole{i});
  if (i < end) step(Part{i, int(end - i)});
}

// Zeros where `keep` has none, whatever stands there, and zeros altogether for null.
template <class T, class Place> FA_HD typename Vector<T>::Value load(const void* tensor, Place at, typename Vector<T>::Bits keep) {
  typename Vector<T>::Value v{};
  if (!tensor) return v;
  copy<T>(static_cast<const T*>(tensor) + at.from, &v, at);
  return typename Vector<T>::Value(typename Vector<T>::Bits(v) & keep);
}
template <class T> FA_HD typename Vector<T>::Bits load_mask(const uint8_t* mask, Whole at) {
  using V = Vector<T>;
  if (!mask) return ~typename V::Bits{};
  typename V::Mask m;
  memcpy(&m, mask + at.from, sizeof m);
  // By way of 16 bits: in one step GCC 12 takes the bytes apart one by one.
  return typename V::Bits(__builtin_convertvector(__builtin_convertvector(m, typename V::WiderMask), typename V::Bits) != 0);
}
template <class T> FA_HD typename Vector<T>::Bits load_mask(const uint8_t* mask, Part at) {
  typename Vector<T>::Bits keep{};
  for (int i = 0; i < at.n; ++i) keep[i] = !mask || mask[at.from + i] ? -1 : 0;
  return keep;
}
template <class T, class Place> FA_HD void store(typename Vector<T>::Value v, void* tensor, Place at) {
  copy<T>(&v, static_cast<T*>(tensor) + at.from, at);
}
template <class V> FA_HD V select(flag_t<V> where, V v) { return V(where & flag_t<V>(v)); }
// The lanes' total in double: upper half onto lower half while that is whole vectors, then the last eight.
template <class T> FA_HD double sum(typename Vector<T>::Value v) {
  typedef double Eight __attribute__((vector_size(64)));
  const typename Vector<T>::Wide wide = __builtin_convertvector(v, typename Vector<T>::Wide);
  Eight w[Vector<T>::kWidth / 8];
  memcpy(w, &wide, sizeof w);
  for (int i = 1; i < Vector<T>::kWidth / 8; ++i) w[0] += w[i];
  return ((w[0][0] + w[0][4]) + (w[0][2] + w[0][6])) + ((w[0][1] + w[0][5]) + (w[0][3] + w[0][7]));
}

// Counts are small: they are exact as T, too.
template <class T> FA_HD double count(typename Vector<T>::Bits n) { return sum<T>(__builtin_convertvector(n, typename Vector<T>::Value)); }

// What a span's values are summed as differences from: the mean of those before it, or the first one, first(its token).
template <class T, class First> FA_HD T near_value(const MomentSums<double>& seen, const uint8_t* mask, const Span& s, const First& first) {
  if (seen.count > 0) return T(seen.shift + seen.sum / seen.count);
  for (int64_t t = s.begin; t < s.begin + s.n; ++t)
    if (!mask || mask[t]) return first(t);
  return T(0);
}
// Adds n values by their sums of differences from `near` and of squares of these.
FA_HD void add_near(MomentSums<double>& seen, double n, double near, double differences, double squares) {
  if (seen.count == 0) seen.shift = near;
  seen.add(n, near, differences, squares);
}

template <class T> struct Policy {
  using V = typename Vector<T>::Value;
  using Bits = typename Vector<T>::Bits;
  static constexpr int kWidth = Vector<T>::kWidth;
  const PolicyArgs& a;
  const PolicyParams<T>& p;

  // A tensor of values per token or per sequence.
  template <class Place> FA_HD V load_per(const void* tensor, bool per_sequence, const Span& s, Place at, Bits keep) const {
    return per_sequence ? select(keep, splat<V>(static_cast<const T*>(tensor)[s.sequence])) : load<T>(tensor, at, keep);
  }

  // Adds a span's scored tokens and the sum of its terms, in double.
  FA_HD void measure(const Span& s, double* length, double* total) const {
    using Wide = typename Vector<T>::Wide;
    Wide terms{};
    V count{};
    each_vector<kWidth>(s.begin, s.begin + s.n, [&](auto at) {
      const Bits keep = load_mask<T>(a.mask, at);
      const V lp = load<T>(a.logprobs, at, keep), old = a.old_logprobs ? load<T>(a.old_logprobs, at, keep) : lp;
      const V advantage = load_per(a.advantages, p.advantages_per_sequence, s, at, keep);
      terms += __builtin_convertvector(select(keep, sequence_term(p, log_ratio(lp, old), advantage)), Wide);
      count += select(keep, splat<V>(1));
    });
    for (int j = 0; j < kWidth; ++j) *total += terms[j];
    *length += sum<T>(count);
  }

  // The clipped loss per token and nothing beside it.
  FA_HD bool is_plain(const Span& s) const {
    const bool per_token =
        p.ratio == kRatioToken && !p.advantages_per_sequence && token_divisor(p.aggregation, T(s.length), p.norm_length) == T(1);
    return per_token && p.surrogate == kClip && a.mask && a.old_logprobs && !a.is_weight && !a.ref_logprobs && !a.entropy &&
           !a.entropy_slopes;
  }

  // A vector of tokens before and after its ratio is known; see run.
  struct Tokens {
    Bits keep;
    V lp, lr, advantage, log_rho;
  };

  // Slopes of a span, and its sums into stats, two vectors at a time: one would wait for its own exponential. The plain loss is compiled on its own,
  // without branches.
  FA_HD void run(const Span& s, double* stats, MomentSums<double>* seen) const {
    is_plain(s) ? run<true>(s, stats, seen) : run<false>(s, stats, seen);
  }

  template <bool kPlain> FA_HD void run(const Span& s, double* stats, MomentSums<double>* seen) const {
    // Copies: a store to the slopes could be to the arguments, for all the compiler knows.
    const PolicyArgs a = this->a;
    PolicyParams<T> p = this->p;
    if (kPlain) {
      p.surrogate = kClip, p.ratio = kRatioToken, p.advantages_per_sequence = 0;
      if (!a.mask || !a.logprobs || !a.old_logprobs || !a.advantages || !a.slopes) __builtin_unreachable();
    }
    const T divisor = kPlain ? T(1) : token_divisor(p.aggregation, T(s.length), p.norm_length);
    const T factor = p.ratio == kRatioSeqSum && (p.surrogate == kClip || p.surrogate == kSapo) ? T(s.length) : T(1);
    const T near = near_value<T>(*seen, a.mask, s, [&](int64_t t) {
      const T* lp = static_cast<const T*>(a.logprobs) + t;
      const T lr = log_ratio(*lp, a.old_logprobs ? static_cast<const T*>(a.old_logprobs)[t] : *lp);
      return std::exp(p.ratio == kRatioToken ? clamp_log_ratio(p.surrogate, lr) : T(s.log_rho));
    });
    V sums[kPolicyStats] = {}, differences{};
    Bits counts[kPolicyStats] = {};  // of the columns that count tokens; masks are -1
    const auto begin = [&](auto at) __attribute__((always_inline)) {
      const Bits keep = load_mask<T>(a.mask, at);
      const V lp = load<T>(a.logprobs, at, keep), lr = log_ratio(lp, a.old_logprobs ? load<T>(a.old_logprobs, at, keep) : lp);
      const V log_rho = p.ratio == kRatioToken ? clamp_log_ratio(p.surrogate, lr) : splat<V>(T(s.log_rho));
      return Tokens{keep, lp, lr, load_per(a.advantages, p.advantages_per_sequence, s, at, keep), log_rho};
    };
    const auto finish = [&](auto at, const Tokens& x, V rho) __attribute__((always_inline)) {
      const Bits keep = x.keep;
      const Surrogate<V> r = surrogate<LaneMath>(p, x.lp, x.lr, x.log_rho, rho, x.advantage);
      V value = r.value, slope = r.slope * factor;
      if (!kPlain && a.is_weight) {
        const V given = load_per(a.is_weight, p.is_per_sequence, s, at, keep);
        const ImportanceWeight<V> w = importance_weight(p, given);
        const Bits used = p.is_mode == kIsMask ? ~w.clipped : ~Bits{};
        value = select(used, w.used * value);
        slope = select(used, w.used * slope);
        sums[kPolicy_is_weight] += given;
        counts[kPolicy_is_clipped] -= keep & w.clipped;
      }
      V total = value;
      if (!kPlain && a.ref_logprobs) {
        const ValueSlope<V> plain = kl_term<LaneMath>(p.kl_kind, x.lp, load<T>(a.ref_logprobs, at, keep)), k = clamp_kl(p, plain);
        if (p.kl_coef != T(0)) {
          total += p.kl_coef * (p.kl_bias_correction ? rho * k.value : k.value);
          slope += p.kl_coef * (p.kl_bias_correction ? rho * (k.value + k.slope) : k.slope);
        }
        sums[kPolicy_kl] += select(keep, plain.value);
      }
      if (!kPlain && a.entropy) {
        const V h = load<T>(a.entropy, at, keep);
        if (p.entropy_coef != T(0)) total -= p.entropy_coef * h;
        sums[kPolicy_entropy] += h;
      }
      store<T>(select(keep, slope / divisor), a.slopes, at);
      if (!kPlain && a.entropy_slopes) store<T>(select(keep, splat<V>(-p.entropy_coef / divisor)), a.entropy_slopes, at);
      const V beyond = select(keep, rho - T(1)), difference = select(keep, rho - near);
      sums[kPolicy_loss] += select(keep, total);
      sums[kPolicy_policy] += select(keep, value);
      counts[kPolicy_tokens] -= keep;
      sums[kPolicy_ratio] += beyond;
      differences += difference;
      sums[kPolicy_ratio_m2] += difference * difference;
      sums[kPolicy_approx_kl] += x.lr * x.lr;
      counts[kPolicy_clip_low] -= keep & r.low;
      counts[kPolicy_clip_high] -= keep & r.high;
      counts[kPolicy_clip_dual] -= keep & r.dual;
      counts[kPolicy_nonfinite] -= keep & (total - total != V{});
    };
    const int64_t end = s.begin + s.n;
    int64_t i = s.begin;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      const Tokens x[2] = {begin(Whole{i}), begin(Whole{i + kWidth})};
      V rho[2] = {x[0].log_rho, x[1].log_rho};
      LaneMath::exp_each(rho);
      finish(Whole{i}, x[0], rho[0]);
      finish(Whole{i + kWidth}, x[1], rho[1]);
    }
    each_vector<kWidth>(i, end, [&](auto at) __attribute__((always_inline)) {
      const Tokens x = begin(at);
      finish(at, x, LaneMath::exp(x.log_rho));
    });
    add_near(seen[0], count<T>(counts[kPolicy_tokens]), near, sum<T>(differences), sum<T>(sums[kPolicy_ratio_m2]));
    sums[kPolicy_ratio_m2] = V{};
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
    each_vector<kWidth>(s.begin, s.begin + s.n, [&](auto at) { *length += sum<T>(select(load_mask<T>(a.mask, at), splat<V>(1))); });
  }

  FA_HD void run(const Span& s, double* stats, MomentSums<double>* seen) const {
    const T *values = static_cast<const T*>(a.values), *returns = static_cast<const T*>(a.returns);
    const T near_return = near_value<T>(seen[0], a.mask, s, [&](int64_t t) { return returns[t]; });
    const T near_error = near_value<T>(seen[1], a.mask, s, [&](int64_t t) { return values[t] - returns[t]; });
    const T divisor = token_divisor(a.aggregation, T(s.length), T(a.norm_length));
    V sums[kValueStats] = {}, differences[kValueMoments] = {};
    Bits counts[kValueStats] = {};
    each_vector<kWidth>(s.begin, s.begin + s.n, [&](auto at) {
      const Bits keep = load_mask<T>(a.mask, at);
      const V value = load<T>(a.values, at, keep), target = load<T>(a.returns, at, keep);
      const ValueError<V> r = value_error(value, load<T>(a.old_values, at, keep), target, T(a.clip), a.old_values != nullptr);
      store<T>(select(keep, r.slope / divisor), a.slopes, at);
      sums[kValue_loss] += select(keep, r.value);
      counts[kValue_tokens] -= keep;
      counts[kValue_clipped] -= keep & r.clipped;
      sums[kValue_value] += value;
      sums[kValue_returns] += target;
      sums[kValue_error] += r.error;
      sums[kValue_error_sq] += r.error * r.error;
      const V from[kValueMoments] = {select(keep, target - near_return), select(keep, r.error - near_error)};
      for (int m = 0; m < kValueMoments; ++m) {
        differences[m] += from[m];
        sums[kValueM2[m]] += from[m] * from[m];
      }
      counts[kValue_nonfinite] -= keep & (r.value - r.value != V{});
    });
    const double tokens = count<T>(counts[kValue_tokens]);
    add_near(seen[0], tokens, near_return, sum<T>(differences[0]), sum<T>(sums[kValue_returns_m2]));
    add_near(seen[1], tokens, near_error, sum<T>(differences[1]), sum<T>(sums[kValue_error_m2]));
    sums[kValue_returns_m2] = sums[kValue_error_m2] = V{};
    for (int c = 0; c < kValueStats; ++c) stats[c] += (sum<T>(sums[c]) + count<T>(counts[c])) / (c == kValue_loss ? double(divisor) : 1.0);
  }
};

template <class T> void measure_policy(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* length, double* total) {
  Policy<T>{a, p}.measure(s, length, total);
}
template <class T>
void run_policy(const PolicyArgs& a, const PolicyParams<T>& p, const Span& s, double* stats, MomentSums<double>* seen) {
  Policy<T>{a, p}.run(s, stats, seen);
}
template <class T> void measure_value(const ValueArgs& a, const Span& s, double* length) { Value<T>{a}.measure(s, length); }
template <class T> void run_value(const ValueArgs& a, const Span& s, double* stats, MomentSums<double>* seen) {
  Value<T>{a}.run(s, stats, seen);
}
template <class T> void scale(const T* slopes, T grad, T items, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = times_slope(grad, slopes[i]) / items;
}

template <class T> void estimate_kl(int kind, const T* logprobs, const T* ref_logprobs, int64_t n, T* value, T* slope) {
  using V = typename Vector<T>::Value;
  each_vector<Vector<T>::kWidth>(0, n, [&](auto at) {
    const typename Vector<T>::Bits all = ~typename Vector<T>::Bits{};
    const ValueSlope<V> r = kl_estimate<V, LaneMath>(kind, load<T>(logprobs, at, all), load<T>(ref_logprobs, at, all));
    store<T>(r.value, value, at);
    if (slope) store<T>(r.slope, slope, at);
  });
}

}  // namespace
}  // namespace cpu
}  // namespace fastalign
