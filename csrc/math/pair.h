// The pair kernel of every DPO-family loss (aggregate x transform x margin x link x labels x points x sft), value and slopes in one
// evaluation. One pair in, one row of the table out; no reduction here.  Twins: fastalign/ops/math/pair.py, ops/preference/reference.py.
#pragma once
#include "math/scalar.h"

namespace fastalign {

// Order of the scalars and switches that travel from PairParams (fastalign/ops/preference/params.py); a test holds the names together.
#define FA_PAIR_SCALARS(X)                                                                                              \
  X(reference) X(length_norm) X(ld_alpha) X(token_clamp_low) X(token_clamp_high) X(transform_alpha) X(beta)             \
  X(beta_rejected) X(gamma) X(gamma_beta_ratio) X(len_coef) X(pos_penalty) X(kl_chosen) X(kl_rejected) X(target) X(tau) \
  X(label_smoothing) X(pair_weight) X(point_beta) X(point_beta_power) X(point_target) X(anchor) X(chosen_pos)           \
  X(chosen_neg) X(rejected_pos) X(rejected_neg) X(sft_weight)
#define FA_PAIR_SWITCHES(X)                                                                                             \
  X(transform) X(link) X(labels) X(label_entropy) X(detach_kl_chosen) X(point_link) X(point_soft_target) X(sft_norm)    \
  X(sft_include_prompt) X(drop_nonfinite) X(reduction)

template <class T> struct PairParams {
#define FA_FIELD(name) T name;
  FA_PAIR_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) int name;
  FA_PAIR_SWITCHES(FA_FIELD)
#undef FA_FIELD
};
#define FA_COUNT(name) +1
constexpr int kPairScalars = 0 FA_PAIR_SCALARS(FA_COUNT), kPairSwitches = 0 FA_PAIR_SWITCHES(FA_COUNT);
#undef FA_COUNT

template <class T> inline PairParams<T> pair_params(const double* scalars, const int* switches) {
  PairParams<T> p{};
  int i = 0, j = 0;
#define FA_FIELD(name) p.name = T(scalars[i++]);
  FA_PAIR_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) p.name = switches[j++];
  FA_PAIR_SWITCHES(FA_FIELD)
#undef FA_FIELD
  return p;
}

// A name's place is its code, in fastalign/ops/columns.py too.
#define FA_TRANSFORMS(X) X(kIdentity) X(kLogsig) X(kNegexp) X(kAlpha) X(kLogodds)
#define FA_LINKS(X) \
  X(kLogistic) X(kHinge) X(kSquared) X(kExp) X(kTruncquad) X(kSavage) X(kSigmoid) X(kLinear) X(kExo) X(kDiscopop)
#define FA_FIELD(name) name,
enum Transform : int { FA_TRANSFORMS(FA_FIELD) };
enum Link : int { kNoLink = -1, FA_LINKS(FA_FIELD) };
#undef FA_FIELD
enum Labels : int { kHard = 0, kSmooth = 1, kRobust = 2, kSoft = 3 };
enum SftNorm : int { kTokenMeanGlobal = 0, kSeqMean = 1, kSeqSum = 2 };
enum Reduction : int { kMean = 0, kSum = 1, kNone = 2 };

// Columns of sums [P, 2, kSumWidth] (side 0 chosen, 1 rejected) and of table [P, kTableWidth].
enum SumColumn : int { kSumPolicy = 0, kSumRatio = 1, kSumLength = 2, kSumKl = 3, kSumSft = 4, kSumSftLength = 5, kSumWidth = 6 };
enum TableColumn : int {
  kTabChosen = 0,
  kTabRejected = 1,
  kTabKlChosen = 2,
  kTabKlRejected = 3,
  kTabSft = 4,  // slopes of the reduced loss in the sums
  kTabRewardChosen = 5,
  kTabRewardRejected = 6,
  kTabLogit = 7,
  kTabValid = 8,
  kTabPair = 9,
  kTabNll = 10,
  kTableWidth = 11
};

// exp with its exponent clamped at 80: the largest round number below fp32 overflow. The derivative keeps the clamped value.
template <class T> FA_HD T exp80(T x) { return exp(x > T(80) ? T(80) : x); }

// clang-format off: one formula per line
// phi(a) and phi'(a).
template <class T> FA_HD ValueSlope<T> transform(int kind, T a, T alpha) {
  switch (kind) {
    case kLogsig: return {-softplus(-a), sigmoid(-a)};
    case kNegexp: { T e = exp80(-a); return {-e, e}; }
    case kAlpha: { T x = -alpha * a; x = x > T(80) ? T(80) : x; return {-expm1(x) / alpha, exp(x)}; }
    case kLogodds: {   // a < 0; at and beyond -1e-6 the odds are held and pass no gradient
      bool held = a >= T(-1e-6);
      T x = held ? T(-1e-6) : a;
      return {x - log1mexp(x), held ? T(0) : T(-1) / expm1(x)};
    }
    default: return {a, T(1)};
  }
}

// f(h) and f'(h). t: target of hinge, squared, truncquad. tau: of TAU_LINKS (columns.py). prob: exo's target probability.
template <class T> FA_HD ValueSlope<T> link(int kind, T h, T t, T tau, T prob) {
  switch (kind) {
    case kHinge: return {relu(t - h), h < t ? T(-1) : (h == h ? T(0) : h)};
    case kSquared: return {(h - t) * (h - t), T(2) * (h - t)};
    case kExp: { T e = exp80(-h); return {e, -e}; }
    case kTruncquad: { T r = relu(t - h); return {r * r, T(-2) * r}; }
    case kSavage: { T s = sigmoid(-h); return {s * s, T(-2) * sigmoid(h) * s * s}; }
    case kSigmoid: { T s = sigmoid(-h); return {s, -sigmoid(h) * s}; }
    case kLinear: return {-h, T(-1)};
    case kExo: {
      T s = sigmoid(h), n = sigmoid(-h), log_p = log(prob), log_n = log1p(-prob);
      return {s * (-softplus(-h) - log_p) + n * (-softplus(h) - log_n), s * n * (h - (log_p - log_n))};
    }
    case kDiscopop: {   // (1 - s) softplus(-h) + s e^-h with s = sigmoid(h / tau), products formed in the exponent
      T x = h / tau, s = sigmoid(x), n = sigmoid(-x), soft = softplus(-h);
      T se = exp80(-h - softplus(-x)), sne = exp80(-h - softplus(-x) - softplus(x));
      return {n * soft + se, -n * sigmoid(-h) - se + (sne - s * n * soft) / tau};
    }
    default: return {softplus(-h), -sigmoid(-h)};
  }
}
// clang-format on

// Sums of one side of one pair.
template <class T> struct SideSums { T policy, ratio, length, kl, sft, sft_length; };
template <class T> FA_HD SideSums<T> load_side(const T* s) {
  return {s[kSumPolicy], s[kSumRatio], s[kSumLength], s[kSumKl], s[kSumSft], s[kSumSftLength]};
}

// Per-pair values that may come as tensors; filled from PairParams where the caller gave none.
template <class T> struct PairTensors {
  T beta, omega, soft_label, gamma_ext, target, anchor;
  bool valid;
};

// Slopes are with respect to the sums `ratio`, `kl` of each side and `sft` of the chosen side, before the normalisers.
template <class T> struct PairResult {
  T loss, chosen, rejected, kl_chosen, kl_rejected, nll, reward_chosen, reward_rejected, logit;
  bool valid;
};

template <class T> FA_HD T power_of_length(T length, T kappa) {
  T l = length > T(1) ? length : T(1);
  return kappa == T(0) ? T(1) : (kappa == T(1) ? l : pow(l, kappa));
}

template <class T> FA_HD PairResult<T> evaluate_pair(const PairParams<T>& p, const SideSums<T>& w, const SideSums<T>& l,
                                                     const PairTensors<T>& x) {
  T beta = x.beta, beta_l = p.beta_rejected == p.beta_rejected ? p.beta_rejected : beta;  // NaN: the same as beta
  T norm_w = power_of_length(w.length, p.length_norm), norm_l = power_of_length(l.length, p.length_norm);
  T a_w = w.ratio / norm_w, a_l = l.ratio / norm_l;
  ValueSlope<T> g_w = transform(p.transform, a_w, p.transform_alpha), g_l = transform(p.transform, a_l, p.transform_alpha);

  T margin = p.gamma + beta * p.gamma_beta_ratio + x.gamma_ext - p.len_coef * (w.length - l.length);
  if (p.pos_penalty != T(0)) margin += beta * p.pos_penalty * relu(-a_w);
  bool with_kl = p.kl_chosen != T(0) || p.kl_rejected != T(0);
  if (with_kl) margin += beta * (p.kl_rejected * l.kl - p.kl_chosen * w.kl);
  T h = beta * g_w.value - beta_l * g_l.value - margin;

  PairResult<T> r{};
  T dh = T(0);
  if (p.pair_weight != T(0)) {
    T soft = p.labels == kSoft ? x.soft_label : T(1) - p.label_smoothing;
    T c_pos = T(1), c_neg = T(0);
    if (p.link != kExo) {  // exo takes the label as its target distribution instead
      if (p.labels == kSmooth || p.labels == kSoft) {
        c_pos = soft;
        c_neg = T(1) - soft;
      }
      if (p.labels == kRobust) {
        T d = T(1) - T(2) * p.label_smoothing;
        c_pos = soft / d;
        c_neg = -p.label_smoothing / d;
      }
    }
    ValueSlope<T> f = link(p.link, h, x.target, p.tau, soft);
    r.loss = c_pos * f.value;
    dh = c_pos * f.slope;
    if (c_neg != T(0)) {
      ValueSlope<T> b = link(p.link, -h, x.target, p.tau, soft);
      r.loss += c_neg * b.value;
      dh -= c_neg * b.slope;
    }
    if (p.label_entropy) {  // cross-entropy minus the label's own entropy: a KL divergence
      T n = T(1) - soft;
      r.loss += (soft > T(0) ? soft * log(soft) : T(0)) + (n > T(0) ? n * log(n) : T(0));
    }
    r.loss *= p.pair_weight;
    dh *= p.pair_weight;
  }
  T slope_w = dh * beta * g_w.slope, slope_l = -dh * beta_l * g_l.slope;
  if (p.pos_penalty != T(0) && a_w < T(0)) slope_w += dh * beta * p.pos_penalty;

  if (p.point_link != kNoLink) {
    T beta_pt = p.point_beta == p.point_beta ? p.point_beta : beta;
    T scale = p.point_beta_power == T(0) ? T(1) : pow(beta_pt, p.point_beta_power);
    T t_w = p.point_soft_target ? x.soft_label - T(0.5) : p.point_target,
      t_l = p.point_soft_target ? T(0.5) - x.soft_label : p.point_target;
    T u_w = beta_pt * g_w.value - x.anchor, u_l = beta_pt * g_l.value - x.anchor;
    T k[4] = {p.chosen_pos, p.chosen_neg, p.rejected_pos, p.rejected_neg};
    for (int i = 0; i < 4; ++i) {
      if (k[i] == T(0)) continue;
      T sign = (i & 1) ? T(-1) : T(1), weight = k[i] * scale;
      ValueSlope<T> f = link(p.point_link, sign * (i < 2 ? u_w : u_l), i < 2 ? t_w : t_l, p.tau, T(1) - p.label_smoothing);
      r.loss += weight * f.value;
      T s = weight * sign * f.slope * beta_pt;
      if (i < 2) slope_w += s * g_w.slope;
      else slope_l += s * g_l.slope;
    }
  }

  r.loss *= x.omega;
  r.chosen = x.omega * slope_w / norm_w;
  r.rejected = x.omega * slope_l / norm_l;
  if (with_kl) {
    r.kl_chosen = p.detach_kl_chosen ? T(0) : x.omega * dh * beta * p.kl_chosen;
    r.kl_rejected = -x.omega * dh * beta * p.kl_rejected;
  }
  r.nll = -w.sft;
  r.reward_chosen = beta * (a_w + (with_kl ? w.kl : T(0)));
  r.reward_rejected = beta_l * (a_l + (with_kl ? l.kl : T(0)));
  r.logit = h;
  r.valid = x.valid && (w.length > T(0) || l.length > T(0));
  if (p.drop_nonfinite && !(is_finite(r.loss) && is_finite(h) && (p.sft_weight == T(0) || is_finite(w.sft)))) r.valid = false;
  return r;
}

// Writes one row of the table. pair_norm: what the pair terms are divided by; sft_norm: the same for this pair's NLL (see sft_divisor).
// An invalid pair writes selected zeros, whatever garbage it evaluated to.
template <class T> FA_HD void store_row(const PairParams<T>& p, const PairResult<T>& r, T pair_norm, T sft_norm, T* out) {
  bool v = r.valid;
  out[kTabChosen] = v ? r.chosen / pair_norm : T(0);
  out[kTabRejected] = v ? r.rejected / pair_norm : T(0);
  out[kTabKlChosen] = v ? r.kl_chosen / pair_norm : T(0);
  out[kTabKlRejected] = v ? r.kl_rejected / pair_norm : T(0);
  out[kTabSft] = v && p.sft_weight != T(0) ? -p.sft_weight / sft_norm : T(0);
  out[kTabRewardChosen] = r.reward_chosen;
  out[kTabRewardRejected] = r.reward_rejected;
  out[kTabLogit] = r.logit;
  out[kTabValid] = T(v);
  out[kTabPair] = v ? r.loss / pair_norm : T(0);
  out[kTabNll] = v && p.sft_weight != T(0) ? p.sft_weight * r.nll / sft_norm : T(0);
}

// Normalisers. `pairs`: valid pairs (num_items when the caller knows the global count), `local_pairs`: valid pairs in this call,
// `sft_tokens`: NLL tokens of the valid pairs (num_sft_tokens when given). A sum over the table's (pair + nll) columns is then the
// reduced loss; for reductions "sum" and "none" it is `local_pairs` times the mean. Lists (math/list.h) are divided in the same way.
template <class T> FA_HD T one_if_zero(T x) { return x > T(1) ? x : (x > T(0) ? x : T(1)); }
template <class P, class T> FA_HD T pair_divisor(const P& p, T pairs) { return p.reduction == kMean ? one_if_zero(pairs) : T(1); }
template <class P, class T> FA_HD T sft_divisor(const P& p, T pairs, T local_pairs, T sft_tokens, T own_tokens) {
  T n = p.sft_norm == kTokenMeanGlobal ? one_if_zero(sft_tokens)
                                       : one_if_zero(pairs) * (p.sft_norm == kSeqMean ? one_if_zero(own_tokens) : T(1));
  return p.reduction == kMean ? n : n / one_if_zero(local_pairs);
}

// Weight of a response token: 1, or ld_alpha beyond the shorter response of its pair (LD-DPO). rank: 0-based among scored tokens.
template <class T> FA_HD T tail_weight(const PairParams<T>& p, T rank, T partner_length) {
  return rank < partner_length ? T(1) : p.ld_alpha;
}

// One token's term of `ratio` before weighting, and whether its gradient passes the clamp.
template <class T> struct TokenRatio {
  T value;
  bool open;
};
template <class T> FA_HD TokenRatio<T> token_ratio(const PairParams<T>& p, T logprob, T ref_logprob) {
  T d = p.reference == T(0) ? logprob : (logprob == ref_logprob && p.reference == T(1) ? T(0) : logprob - p.reference * ref_logprob);
  if (d < p.token_clamp_low) return {p.token_clamp_low, false};
  if (d > p.token_clamp_high) return {p.token_clamp_high, false};
  return {d, true};
}

}  // namespace fastalign
