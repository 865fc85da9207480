// Policy-gradient and value losses per token: the ratio's surrogates with value, slope and clip flags from one evaluation, the value function's
// clipped error, aggregation. Twins: fastalign/ops/math/policy.py, ops/policy/reference.py.
#pragma once
#include "math/scalar.h"

namespace fastalign {

// Order of the scalars and switches that travel from fastalign/ops/policy/params.py (PolicyParams); a test checks it.
#define FA_POLICY_SCALARS(X)                                                                                        \
  X(ratio_min) X(ratio_max) X(dual_clip) X(tau_pos) X(tau_neg) X(k_pos) X(lam_pos) X(k_neg) X(lam_neg) X(kl_coef)   \
  X(entropy_coef) X(is_min) X(is_max) X(norm_length) X(kl_clamp)
#define FA_POLICY_SWITCHES(X)                                                                                       \
  X(surrogate) X(ratio) X(aggregation) X(kl_kind) X(kl_bias_correction) X(is_mode) X(advantages_per_sequence)       \
  X(is_per_sequence)

template <class T> struct PolicyParams {
#define FA_FIELD(name) T name;
  FA_POLICY_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) int name;
  FA_POLICY_SWITCHES(FA_FIELD)
#undef FA_FIELD
};
#define FA_COUNT(name) +1
constexpr int kPolicyScalars = 0 FA_POLICY_SCALARS(FA_COUNT), kPolicySwitches = 0 FA_POLICY_SWITCHES(FA_COUNT);
#undef FA_COUNT

template <class T> inline PolicyParams<T> policy_params(const double* scalars, const int* switches) {
  PolicyParams<T> p{};
  int i = 0, j = 0;
#define FA_FIELD(name) p.name = T(scalars[i++]);
  FA_POLICY_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) p.name = switches[j++];
  FA_POLICY_SWITCHES(FA_FIELD)
#undef FA_FIELD
  return p;
}

enum SurrogateKind : int { kClip = 0, kReinforce = 1, kCispo = 2, kSapo = 3, kGmpo = 4, kVespo = 5 };
enum RatioLevel : int { kRatioToken = 0, kRatioSeqMean = 1, kRatioSeqMeanToken = 2, kRatioSeqSum = 3 };
enum Aggregation : int { kTokenMean = 0, kSeqMeanTokenMean = 1, kSeqMeanTokenSum = 2, kSeqMeanTokenSumNorm = 3, kTokenSum = 4 };
enum IsMode : int { kIsAsGiven = 0, kIsTruncate = 1, kIsMask = 2 };
constexpr int kK3Plus = 4;  // value of k3, slope of k2

// Tokens that one thread block, or one turn of a thread, takes where nothing depends on sequences.
constexpr int64_t kPolicyTile = 2048;

// Columns of the statistics: sums over scored tokens; m2: of squared deviations from the mean (math/moments.h), for ratios and returns may lie many
// standard deviations from 0. The number of items, first, is what the loss and its slopes are divided by.
#define FA_POLICY_STATS(X)                                                                                          \
  X(items) X(loss) X(policy) X(tokens) X(sequences) X(ratio) X(ratio_m2) X(approx_kl) X(clip_low) X(clip_high)      \
  X(clip_dual) X(kl) X(entropy) X(is_weight) X(is_clipped) X(nonfinite)
#define FA_VALUE_STATS(X)                                                                                           \
  X(items) X(loss) X(tokens) X(sequences) X(clipped) X(value) X(returns) X(returns_m2) X(error) X(error_sq)          \
  X(error_m2) X(nonfinite)
#define FA_FIELD(name) kPolicy_##name,
enum PolicyStat : int { FA_POLICY_STATS(FA_FIELD) kPolicyStats };
#undef FA_FIELD
#define FA_FIELD(name) kValue_##name,
enum ValueStat : int { FA_VALUE_STATS(FA_FIELD) kValueStats };
#undef FA_FIELD
// Whose moments a kernel forms, and where their m2 goes.
constexpr int kPolicyMoments = 1, kValueMoments = 2, kPolicyM2[] = {kPolicy_ratio_m2}, kValueM2[] = {kValue_returns_m2, kValue_error_m2};

constexpr double kLogRatioLimit = 20.0, kLogWeightMin = -18.420680743952367;  // log 1e-8, of vespo

template <class T> FA_HD T clamp_log_ratio(int surrogate, T x) {
  using S = scalar_t<T>;
  return clamp(x, surrogate == kVespo ? S(kLogWeightMin) : S(-kLogRatioLimit), S(kLogRatioLimit));
}

// Equal infinities differ by 0.
template <class T> FA_HD T log_ratio(T logprob, T old_logprob) { return logprob == old_logprob ? T{} : logprob - old_logprob; }

// What a sequence sums of a token: its log-ratio; of gmpo clipped on the side that the advantage's sign allows; of vespo clamped.
template <class T> FA_HD T sequence_term(const PolicyParams<scalar_t<T>>& p, T lr, T advantage) {
  using S = scalar_t<T>;
  if (p.surrogate == kVespo) return clamp(lr, S(-kLogRatioLimit), S(kLogRatioLimit));
  if (p.surrogate != kGmpo) return lr;
  const T high = lr > p.ratio_max ? splat<T>(p.ratio_max) : lr, low = lr < p.ratio_min ? splat<T>(p.ratio_min) : lr;
  return advantage > T{} ? high : low;
}

// The sequence's log-ratio from the sum of its terms, for every level but the token's.
template <class T> FA_HD T sequence_log_ratio(const PolicyParams<T>& p, T sum, T length) {
  return clamp_log_ratio(p.surrogate, p.ratio == kRatioSeqSum ? sum : sum / (length > T(1) ? length : T(1)));
}

// bool, or a mask of lanes.
template <class T> using flag_t = decltype(T{} < T{});

template <class T> struct Surrogate {
  T value, slope;
  flag_t<T> low, high, dual;  // which bound holds
};

// clang-format off: one formula per line
// The surrogate of one token with ratio rho = exp(log_rho), and its derivative in the token's log-prob through the token's own ratio. lr: the
// token's own log-ratio. M: see StdMath.
template <class M, class T>
FA_HD Surrogate<T> surrogate(const PolicyParams<scalar_t<T>>& p, T logprob, T lr, T log_rho, T rho, T a) {
  using S = scalar_t<T>;
  const flag_t<T> positive = a > T{}, negative = a < T{}, none{};
  const T minus_a_rho = -a * rho, low_ratio = splat<T>(p.ratio_min), high_ratio = splat<T>(p.ratio_max);
  switch (p.surrogate) {
    case kReinforce: return {-a * logprob, -a, none, none, none};
    case kCispo: {
      const flag_t<T> low = rho < low_ratio, high = rho > high_ratio;
      const T w = low ? low_ratio : (high ? high_ratio : rho);
      return {-w * a * logprob, -w * a, low, high, none};
    }
    case kSapo: {
      const T tau = positive ? splat<T>(p.tau_pos) : splat<T>(p.tau_neg), x = tau * (rho - S(1));
      const T s = sigmoid<T, M>(x), n = sigmoid<T, M>(-x);
      return {-a * (S(4) / tau) * s, S(4) * minus_a_rho * s * n, none, none, none};
    }
    case kGmpo: {
      const flag_t<T> low = (lr < low_ratio) & negative, high = (lr > high_ratio) & positive;
      return {minus_a_rho, low | high ? T{} : minus_a_rho, low, high, none};
    }
    case kVespo: {
      const T k = negative ? splat<T>(p.k_neg) : splat<T>(p.k_pos), lam = negative ? splat<T>(p.lam_neg) : splat<T>(p.lam_pos);
      const T phi = M::exp(lam + k * log_rho - lam * rho);
      return {-phi * a * logprob, -phi * a, none, none, none};
    }
    default: {
      const T cap = splat<T>(p.dual_clip);
      const flag_t<T> low = negative & (rho < low_ratio), high = positive & (rho > high_ratio), dual = negative & (rho > cap);
      const T held = dual ? cap : (high ? high_ratio : (low ? low_ratio : rho));
      return {-a * held, low | high | dual ? T{} : minus_a_rho, low, high, dual};
    }
  }
}
// clang-format on

// The KL estimate; k3+ reports k3 and descends k2.
template <class M, class T> FA_HD ValueSlope<T> kl_term(int kind, T logprob, T ref_logprob) {
  ValueSlope<T> r = kl_estimate<T, M>(kind == kK3Plus ? int(kK3) : kind, logprob, ref_logprob);
  if (kind == kK3Plus) r.slope = log_ratio(logprob, ref_logprob);
  return r;
}

// What the loss adds of an estimate: clamped to +-kl_clamp, without gradient where it is (k3+ keeps the slope of k2).
template <class T> FA_HD ValueSlope<T> clamp_kl(const PolicyParams<scalar_t<T>>& p, ValueSlope<T> k) {
  const T high = splat<T>(p.kl_clamp), low = splat<T>(-p.kl_clamp);
  const flag_t<T> above = k.value > high, below = k.value < low;
  const T value = above ? high : (below ? low : k.value);
  return {value, p.kl_kind == kK3Plus ? k.slope : (above | below ? T{} : k.slope)};
}

// Whether a sequence has one ratio, so that a bound holds for all of it: it then counts once among the clipped. gmpo clips tokens.
template <class T> FA_HD bool clips_sequences(const PolicyParams<T>& p) {
  return (p.ratio == kRatioSeqMean || p.ratio == kRatioSeqSum) && p.surrogate != kGmpo;
}

// One token's importance weight: what the surrogate is multiplied by, and whether the bounds changed it.
template <class T> struct ImportanceWeight {
  T used;
  flag_t<T> clipped;
};
template <class T> FA_HD ImportanceWeight<T> importance_weight(const PolicyParams<scalar_t<T>>& p, T w) {
  const T low = splat<T>(p.is_min), high = splat<T>(p.is_max);
  const flag_t<T> above = w > high, outside = above | (w < low);
  if (p.is_mode == kIsTruncate) return {above ? high : w, above};
  return {w, p.is_mode == kIsMask ? outside : above};
}

// The value function's squared error: the clipped branch holds, without gradient, where it is strictly larger.
template <class T> struct ValueError {
  T value, slope, error;
  flag_t<T> clipped;
};
template <class T> FA_HD ValueError<T> value_error(T value, T old_value, T target, scalar_t<T> clip, bool with_clip) {
  const T error = value - target, error_sq = error * error, half = splat<T>(scalar_t<T>(0.5));
  if (!with_clip) return {half * error_sq, error, error, flag_t<T>{}};
  const T low = old_value - clip, high = old_value + clip, held = (value < low ? low : (value > high ? high : value)) - target;
  const T held_sq = held * held;
  const flag_t<T> clipped = held_sq > error_sq;
  return {half * (clipped ? held_sq : error_sq), clipped ? T{} : error, error, clipped};
}

// What a token's term is divided by, before the number of items; `length`: scored tokens of its sequence.
template <class T> FA_HD T token_divisor(int aggregation, T length, T norm_length) {
  if (aggregation == kSeqMeanTokenMean) return length > T(1) ? length : T(1);
  return aggregation == kSeqMeanTokenSumNorm ? norm_length : T(1);
}

// The number of items: 1 for a sum, the caller's number, or what was counted here.
template <class T> FA_HD T loss_items(int aggregation, const T* num_items, T tokens, T sequences) {
  if (aggregation == kTokenSum) return T(1);
  const T n = num_items ? *num_items : (aggregation == kTokenMean ? tokens : sequences);
  return n > T(0) ? n : T(1);
}

}  // namespace fastalign
