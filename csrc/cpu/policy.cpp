// Policy and value losses. A sequence (or a tile of tokens, where sequences do not matter) is one thread's, in blocks that stay in the L1 cache:
// every block goes through short loops over plain arrays, which the compiler turns into vectors. Masked and missing tokens are zeros there, with
// `keep` 0. Sums run in fixed lanes of a block and then in double, in order: the same for every thread count and instruction set.
#define FA_HD inline __attribute__((always_inline))
#include <vector>
#include "math/policy.h"
#include "ops.h"

// One body, compiled for several instruction sets and chosen by the loader. -ffp-contract=off keeps the arithmetic of all of them equal.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FA_CLONES
#endif

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialTokens = 1 << 12;  // below this, waking threads costs more than the work
constexpr int kBlock = 256, kLanes = 16;

// exp and expm1 without branches and calls, 1.2e-7 and 2e-7 relative; exp(0) is 1 exactly. fp64 takes the library's.
struct LaneMath {
  static FA_HD double exp(double x) { return std::exp(x); }
  static FA_HD double expm1(double x) { return std::expm1(x); }
  static FA_HD float exp(float x) {
    const float t = x > 88.0f ? 88.0f : x, magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    const float shifted = t * 1.44269504f + magic, n = shifted - magic;
    const float f = (t - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; n * the first is exact
    float p = 1.98756915e-4f;
    p = p * f + 1.39819994e-3f;
    p = p * f + 8.33345205e-3f;
    p = p * f + 4.16657962e-2f;
    p = p * f + 1.66666657e-1f;
    p = p * f + 5.00000000e-1f;
    p = p * (f * f) + f + 1.0f;
    const float scale = bits_float((float_bits(shifted) + 127u) << 23);
    return t < -87.0f ? 0.0f : p * scale;
  }
  static FA_HD float expm1(float x) {
    const float r = 1.0f + x * (1.0f / 2 + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120 + x * (1.0f / 720 + x * (1.0f / 5040 + x * (1.0f / 40320)))))));
    return fabs(x) < 0.5f ? x * r : exp(x) - 1.0f;
  }
};

template <class T> struct Lane { T x[kBlock]; };

// n values, zeros where `keep` is 0 and behind them; null: zeros.
template <class T> FA_HD void load(const T* from, const Lane<T>& keep, int n, Lane<T>& to) {
  if (!from) {
    for (int i = 0; i < kBlock; ++i) to.x[i] = T(0);
    return;
  }
  T rest[kBlock];
  if (n < kBlock) {
    memset(rest, 0, sizeof rest);
    memcpy(rest, from, size_t(n) * sizeof(T));
    from = rest;
  }
  for (int i = 0; i < kBlock; ++i) to.x[i] = keep.x[i] != T(0) ? from[i] : T(0);
}

template <class T> FA_HD void load_mask(const uint8_t* mask, int n, Lane<T>& keep) {
  uint8_t rest[kBlock];
  memset(rest, 0, sizeof rest);
  if (mask) memcpy(rest, mask, size_t(n));
  else memset(rest, 1, size_t(n));
  for (int i = 0; i < kBlock; ++i) keep.x[i] = rest[i] ? T(1) : T(0);
}

template <class T> FA_HD void store(const Lane<T>& from, int n, T* to) {
  if (n == kBlock) memcpy(to, from.x, sizeof from.x);
  else memcpy(to, from.x, size_t(n) * sizeof(T));
}

template <class T> FA_HD void add(const Lane<T>& v, double* sum) {
  T lanes[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += v.x[i + j];
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += double(lanes[j]);
  *sum += total;
}

// Tokens [begin, begin + n) of one sequence.
struct Span {
  int64_t begin;
  int n;
  double log_rho, length;  // the sequence's log-ratio, where it has one; its scored tokens
  int64_t sequence;
};

template <class T> struct Policy {
  const PolicyArgs& a;
  const PolicyParams<T> p;
  const T kl_coef, entropy_coef;
  static const T* at(const void* v, int64_t i) { return v ? static_cast<const T*>(v) + i : nullptr; }

  // The tensors of a span; values per sequence are repeated.
  struct Block {
    Lane<T> keep, logprob, lr, advantage, weight;
  };
  FA_HD void load_per(const void* v, bool per_sequence, const Span& s, const Lane<T>& keep, Lane<T>& to) const {
    if (!per_sequence) return load(at(v, s.begin), keep, s.n, to);
    const T value = *at(v, s.sequence);
    for (int i = 0; i < kBlock; ++i) to.x[i] = keep.x[i] != T(0) ? value : T(0);
  }
  FA_HD void load_block(const Span& s, Block& b) const {
    load_mask(a.mask ? a.mask + s.begin : nullptr, s.n, b.keep);
    load(at(a.logprobs, s.begin), b.keep, s.n, b.logprob);
    load(at(a.old_logprobs ? a.old_logprobs : a.logprobs, s.begin), b.keep, s.n, b.lr);
    load_per(a.advantages, p.advantages_per_sequence, s, b.keep, b.advantage);
    for (int i = 0; i < kBlock; ++i) b.lr.x[i] = log_ratio(b.logprob.x[i], b.lr.x[i]);
  }

  // Adds a span's scored tokens and the sum of its terms.
  FA_HD void measure(const Span& s, double* length, double* sum) const {
    Block b;
    load_block(s, b);
    Lane<double> term;
    for (int i = 0; i < kBlock; ++i) term.x[i] = double(sequence_term(p, b.lr.x[i], b.advantage.x[i]));
    add(b.keep, length);
    add(term, sum);
  }

  template <int kKind> FA_HD void evaluate(const Span& s, Block& b, double* stats, Lane<T>& value, Lane<T>& slope, Lane<T>& rho) const {
    Lane<T> low, high, dual, log_rho;
    if (p.ratio == kRatioToken) {
      for (int i = 0; i < kBlock; ++i) log_rho.x[i] = clamp_log_ratio(kKind, b.lr.x[i]);
    } else {
      for (int i = 0; i < kBlock; ++i) log_rho.x[i] = T(s.log_rho);
    }
    for (int i = 0; i < kBlock; ++i) rho.x[i] = LaneMath::exp(log_rho.x[i]);
    const T factor = p.ratio == kRatioSeqSum && (kKind == kClip || kKind == kSapo) ? T(s.length) : T(1);
    for (int i = 0; i < kBlock; ++i) {
      const Surrogate<T> r = surrogate<LaneMath>(kKind, p, b.logprob.x[i], b.lr.x[i], log_rho.x[i], rho.x[i], b.advantage.x[i]);
      value.x[i] = r.value;
      slope.x[i] = r.slope * factor;
      low.x[i] = r.low ? b.keep.x[i] : T(0);
      high.x[i] = r.high ? b.keep.x[i] : T(0);
      dual.x[i] = r.dual ? b.keep.x[i] : T(0);
    }
    if (kKind == kReinforce || kKind == kSapo || kKind == kVespo) return;
    add(low, stats + kPolicy_clip_low);
    add(high, stats + kPolicy_clip_high);
    add(dual, stats + kPolicy_clip_dual);
  }

  FA_HD void weigh(const Span& s, Block& b, double* stats, Lane<T>& value, Lane<T>& slope) const {
    Lane<T> clipped;
    load_per(a.is_weight, p.is_per_sequence, s, b.keep, b.weight);
    add(b.weight, stats + kPolicy_is_weight);
    for (int i = 0; i < kBlock; ++i) {
      const ImportanceWeight<T> w = importance_weight(p, b.weight.x[i]);
      const bool dropped = (p.is_mode == kIsMask) & w.clipped;
      value.x[i] = dropped ? T(0) : w.used * value.x[i];
      slope.x[i] = dropped ? T(0) : w.used * slope.x[i];
      clipped.x[i] = w.clipped ? b.keep.x[i] : T(0);
    }
    add(clipped, stats + kPolicy_is_clipped);
  }

  template <int kKind> FA_HD void add_kl(const Span& s, Block& b, const Lane<T>& rho, double* stats, Lane<T>& total, Lane<T>& slope) const {
    Lane<T> ref, kl, kl_slope;
    load(at(a.ref_logprobs, s.begin), b.keep, s.n, ref);
    for (int i = 0; i < kBlock; ++i) {
      const ValueSlope<T> k = kl_term<LaneMath>(kKind, b.logprob.x[i], ref.x[i]);
      kl.x[i] = k.value;
      kl_slope.x[i] = k.slope;
    }
    add(kl, stats + kPolicy_kl);
    if (kl_coef == T(0)) return;
    for (int i = 0; i < kBlock; ++i) {
      const T r = p.kl_bias_correction ? rho.x[i] : T(1), d = p.kl_bias_correction ? kl.x[i] + kl_slope.x[i] : kl_slope.x[i];
      total.x[i] += kl_coef * (r * kl.x[i]);
      slope.x[i] += kl_coef * (r * d);
    }
  }

  // Slopes of a span, and its sums into stats.
  FA_HD void run(const Span& s, double* stats) const {
    Block b;
    Lane<T> value, slope, rho, total, h;
    load_block(s, b);
    switch (p.surrogate) {
      case kReinforce: evaluate<kReinforce>(s, b, stats, value, slope, rho); break;
      case kCispo: evaluate<kCispo>(s, b, stats, value, slope, rho); break;
      case kSapo: evaluate<kSapo>(s, b, stats, value, slope, rho); break;
      case kGmpo: evaluate<kGmpo>(s, b, stats, value, slope, rho); break;
      case kVespo: evaluate<kVespo>(s, b, stats, value, slope, rho); break;
      default: evaluate<kClip>(s, b, stats, value, slope, rho);
    }
    if (a.is_weight) weigh(s, b, stats, value, slope);
    total = value;
    if (a.ref_logprobs) {
      switch (p.kl_kind) {
        case kK1: add_kl<kK1>(s, b, rho, stats, total, slope); break;
        case kK2: add_kl<kK2>(s, b, rho, stats, total, slope); break;
        case kAbs: add_kl<kAbs>(s, b, rho, stats, total, slope); break;
        case kK3Plus: add_kl<kK3Plus>(s, b, rho, stats, total, slope); break;
        default: add_kl<kK3>(s, b, rho, stats, total, slope);
      }
    }
    if (a.entropy) {
      load(at(a.entropy, s.begin), b.keep, s.n, h);
      add(h, stats + kPolicy_entropy);
      if (entropy_coef != T(0))
        for (int i = 0; i < kBlock; ++i) total.x[i] -= entropy_coef * h.x[i];
    }
    finish(s, b, stats, value, slope, rho, total);
  }

  FA_HD void finish(const Span& s, Block& b, double* stats, Lane<T>& value, Lane<T>& slope, Lane<T>& rho, Lane<T>& total) const {
    const T divisor = token_divisor(p.aggregation, T(s.length), p.norm_length);
    Lane<T> out, square;
    for (int i = 0; i < kBlock; ++i) out.x[i] = b.keep.x[i] != T(0) ? slope.x[i] / divisor : T(0);
    store(out, s.n, static_cast<T*>(a.slopes) + s.begin);
    if (a.entropy_slopes) {
      for (int i = 0; i < kBlock; ++i) out.x[i] = b.keep.x[i] != T(0) ? -entropy_coef / divisor : T(0);
      store(out, s.n, static_cast<T*>(a.entropy_slopes) + s.begin);
    }
    for (int i = 0; i < kBlock; ++i) out.x[i] = (fabs(total.x[i]) <= finite_limit<T>()) ? T(0) : b.keep.x[i];
    add(out, stats + kPolicy_nonfinite);
    for (int i = 0; i < kBlock; ++i) {
      const bool kept = b.keep.x[i] != T(0);
      total.x[i] = kept ? total.x[i] / divisor : T(0);
      value.x[i] = kept ? value.x[i] / divisor : T(0);
      rho.x[i] = kept ? rho.x[i] - T(1) : T(0);
      square.x[i] = rho.x[i] * rho.x[i];
      out.x[i] = b.lr.x[i] * b.lr.x[i] / T(2);
    }
    add(total, stats + kPolicy_loss);
    add(value, stats + kPolicy_policy);
    add(b.keep, stats + kPolicy_tokens);
    add(rho, stats + kPolicy_ratio);
    add(square, stats + kPolicy_ratio_sq);
    add(out, stats + kPolicy_approx_kl);
  }
};

FA_CLONES void measure(const Policy<float>& f, const Span& s, double* length, double* sum) { f.measure(s, length, sum); }
FA_CLONES void run(const Policy<float>& f, const Span& s, double* stats) { f.run(s, stats); }
void measure(const Policy<double>& f, const Span& s, double* length, double* sum) { f.measure(s, length, sum); }
void run(const Policy<double>& f, const Span& s, double* stats) { f.run(s, stats); }

template <class T> struct Value {
  const ValueArgs& a;
  static const T* at(const void* v, int64_t i) { return v ? static_cast<const T*>(v) + i : nullptr; }

  FA_HD void measure(const Span& s, double* length) const {
    Lane<T> keep;
    load_mask(a.mask ? a.mask + s.begin : nullptr, s.n, keep);
    add(keep, length);
  }

  FA_HD void run(const Span& s, double* stats) const {
    Lane<T> keep, value, old, target, each, slope, error, clipped, bad;
    load_mask(a.mask ? a.mask + s.begin : nullptr, s.n, keep);
    load(at(a.values, s.begin), keep, s.n, value);
    load(at(a.old_values, s.begin), keep, s.n, old);
    load(at(a.returns, s.begin), keep, s.n, target);
    const bool with_clip = a.old_values != nullptr;
    const T clip = T(a.clip), divisor = token_divisor(a.aggregation, T(s.length), T(a.norm_length));
    for (int i = 0; i < kBlock; ++i) {
      const ValueError<T> r = value_error(value.x[i], old.x[i], target.x[i], clip, with_clip);
      const bool kept = keep.x[i] != T(0);
      each.x[i] = kept ? r.value / divisor : T(0);
      slope.x[i] = kept ? r.slope / divisor : T(0);
      error.x[i] = r.error;
      clipped.x[i] = r.clipped ? keep.x[i] : T(0);
      bad.x[i] = fabs(r.value) <= finite_limit<T>() ? T(0) : keep.x[i];
    }
    store(slope, s.n, static_cast<T*>(a.slopes) + s.begin);
    add(each, stats + kValue_loss);
    add(keep, stats + kValue_tokens);
    add(clipped, stats + kValue_clipped);
    add(value, stats + kValue_value);
    add(target, stats + kValue_returns);
    add(error, stats + kValue_error);
    add(bad, stats + kValue_nonfinite);
    for (int i = 0; i < kBlock; ++i) {
      target.x[i] *= target.x[i];
      error.x[i] *= error.x[i];
    }
    add(target, stats + kValue_returns_sq);
    add(error, stats + kValue_error_sq);
  }
};

FA_CLONES void measure(const Value<float>& f, const Span& s, double* length, double*) { f.measure(s, length); }
FA_CLONES void run(const Value<float>& f, const Span& s, double* stats) { f.run(s, stats); }
void measure(const Value<double>& f, const Span& s, double* length, double*) { f.measure(s, length); }
void run(const Value<double>& f, const Span& s, double* stats) { f.run(s, stats); }

FA_CLONES void scale(const float* slopes, float grad, float items, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = grad * slopes[i] / items;
}
void scale(const double* slopes, double grad, double items, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = grad * slopes[i] / items;
}

// All sequences or tiles, then the totals in their order. per_length: something needs the number of scored tokens first;
// log_rho(sum, length): the sequence's log-ratio.
template <int kStats, class T, class Loss, class Args, class LogRho>
void reduce(const Loss& loss, const Args& a, int aggregation, bool per_length, int sequences_column, int tokens_column, LogRho&& log_rho) {
  const int64_t pieces = a.cu_seqlens ? a.sequences : (a.tokens + kPolicyTile - 1) / kPolicyTile;
  std::vector<double> rows(size_t(pieces) * kStats, 0.0);
#pragma omp parallel for schedule(dynamic) if (a.tokens > kSerialTokens)
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[k] : k * kPolicyTile;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[k + 1] : (begin + kPolicyTile < a.tokens ? begin + kPolicyTile : a.tokens);
    auto each_span = [&](Span& s, auto&& f) {
      for (s.begin = begin; s.begin < end; s.begin += kBlock) {
        s.n = int(end - s.begin < kBlock ? end - s.begin : kBlock);
        f(s);
      }
    };
    double* row = rows.data() + k * kStats;
    Span s{begin, 0, 0.0, 0.0, k};
    if (per_length) {
      double length = 0, sum = 0;
      each_span(s, [&](const Span& span) { measure(loss, span, &length, &sum); });
      s.length = length;
      s.log_rho = log_rho(sum, length);
    }
    each_span(s, [&](const Span& span) { run(loss, span, row); });
    row[sequences_column] = a.cu_seqlens && row[tokens_column] > 0 ? 1.0 : 0.0;
  }
  double total[kStats] = {};
  for (int64_t k = 0; k < pieces; ++k)
    for (int c = 0; c < kStats; ++c) total[c] += rows[size_t(k * kStats + c)];
  const double given = a.num_items ? double(*static_cast<const T*>(a.num_items)) : 0.0;
  total[0] = loss_items(aggregation, a.num_items ? &given : nullptr, total[tokens_column], total[sequences_column]);
  for (int c = 0; c < kStats; ++c) static_cast<T*>(a.stats)[c] = T(total[c]);
  *static_cast<T*>(a.loss) = T(total[1] / total[0]);
}

template <class T> void policy(const PolicyArgs& a) {
  const PolicyParams<T> p = policy_params<T>(a.scalars, a.switches);
  const PolicyParams<double> wide = policy_params<double>(a.scalars, a.switches);
  const Policy<T> loss{a, p, a.kl_coef ? *static_cast<const T*>(a.kl_coef) : p.kl_coef,
                       a.entropy_coef ? *static_cast<const T*>(a.entropy_coef) : p.entropy_coef};
  const bool per_length = p.ratio != kRatioToken || p.aggregation == kSeqMeanTokenMean;
  reduce<kPolicyStats, T>(loss, a, p.aggregation, per_length, kPolicy_sequences, kPolicy_tokens,
                          [&](double sum, double length) { return sequence_log_ratio(wide, sum, length); });
}

template <class T> void value(const ValueArgs& a) {
  reduce<kValueStats, T>(Value<T>{a}, a, a.aggregation, a.aggregation == kSeqMeanTokenMean, kValue_sequences, kValue_tokens,
                         [](double, double) { return 0.0; });
}

template <class T> void backward(const PolicyBackwardArgs& a) {
  const T grad = *static_cast<const T*>(a.grad), items = *static_cast<const T*>(a.stats);
#pragma omp parallel for if (a.tokens > 4 * kSerialTokens)
  for (int64_t begin = 0; begin < a.tokens; begin += kPolicyTile) {
    const int64_t n = a.tokens - begin < kPolicyTile ? a.tokens - begin : kPolicyTile;
    scale(static_cast<const T*>(a.slopes) + begin, grad, items, n, static_cast<T*>(a.grad_logprobs) + begin);
    if (a.entropy_slopes) scale(static_cast<const T*>(a.entropy_slopes) + begin, grad, items, n, static_cast<T*>(a.grad_entropy) + begin);
  }
}

}  // namespace

void policy_fwd(const PolicyArgs& a) { a.dtype == kFloat64 ? policy<double>(a) : policy<float>(a); }
void value_fwd(const ValueArgs& a) { a.dtype == kFloat64 ? value<double>(a) : value<float>(a); }
void policy_bwd(const PolicyBackwardArgs& a) { a.dtype == kFloat64 ? backward<double>(a) : backward<float>(a); }

}  // namespace cpu
}  // namespace fastalign
