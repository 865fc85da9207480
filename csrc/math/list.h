// The list kernel of every loss over ranked responses: one list in, the term and one slope per response out, in one evaluation of three steps:
// what the whole list shares (list_head), one number per response (list_aux), the response's share of the term and its slope (list_item).
// The steps of a list are run by one thread on the CPU and by a thread per response on the GPU.  Twins: fastalign/ops/math/list.py,
// ops/listwise/reference.py.
#pragma once
#include "math/pair.h"

namespace fastalign {

// Order of the scalars and switches that travel from ListParams (fastalign/ops/listwise/params.py); checked against these names by the tests.
#define FA_LIST_SCALARS(X) \
  X(length_norm) X(beta) X(target) X(reward_temperature) X(list_weight) X(sft_weight) X(sft_power)
#define FA_LIST_SWITCHES(X) X(kind) X(link) X(pair_gain) X(pair_mean) X(sft_norm) X(drop_nonfinite) X(reduction)

template <class T> struct ListParams {
#define FA_FIELD(name) T name;
  FA_LIST_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) int name;
  FA_LIST_SWITCHES(FA_FIELD)
#undef FA_FIELD
};
#define FA_COUNT(name) +1
constexpr int kListScalars = 0 FA_LIST_SCALARS(FA_COUNT), kListSwitches = 0 FA_LIST_SWITCHES(FA_COUNT);
#undef FA_COUNT

template <class T> inline ListParams<T> list_params(const double* scalars, const int* switches) {
  ListParams<T> p{};
  int i = 0, j = 0;
#define FA_FIELD(name) p.name = T(scalars[i++]);
  FA_LIST_SCALARS(FA_FIELD)
#undef FA_FIELD
#define FA_FIELD(name) p.name = switches[j++];
  FA_LIST_SWITCHES(FA_FIELD)
#undef FA_FIELD
  return p;
}

enum ListKind : int { kPairwise = 0, kPlackettLuce = 1, kPro = 2, kInfonca = 3, kNca = 4, kExoList = 5 };
enum PairGain : int { kGainOne = 0, kGainLambda = 1 };
constexpr int kMaxList = 64;  // responses per list

// Columns of the table [L, kListTableWidth]. Pairs: those whose scores differ, the higher first; right: the reward is higher too.
enum ListColumn : int {
  kListTerm = 0,
  kListNll = 1,  // the two parts of the reduced loss
  kListValid = 2,
  kListPairs = 3,
  kListCorrect = 4,  // right pairs
  kListMargin = 5,  // sum of their differences of rewards
  kListTop = 6,  // 1: every pair of the best response is right, and there is one
  kListBest = 7,
  kListWorst = 8,  // places in the list
  kListTableWidth = 9
};

// s: beta * a. r: scores. aux: what list_aux wrote.
template <class T> struct List {
  const T *s, *r, *aux;
  int count;
};

// Whether i is ranked before j, or is j: by score, equal scores by place.
template <class T> FA_HD bool in_order(const List<T>& x, int i, int j) { return x.r[i] > x.r[j] || (x.r[i] == x.r[j] && i <= j); }

// log sum e^x(j) over the j below count. Leave one out by x(j) = -inf.
template <class T, class F> FA_HD T logsumexp(int count, F&& x) {
  T m = -std::numeric_limits<T>::infinity(), sum = T(0);
  for (int j = 0; j < count; ++j) {
    T v = x(j);
    m = v > m || v != v ? v : m;
  }
  for (int j = 0; j < count; ++j) sum += exp(x(j) - m);
  return m + log(sum);
}

template <class T> struct ListHead {
  int best, worst;  // first and last in the order of the scores
  T lowest;  // score
  T log_norm_q, log_norm_p;  // logsumexp of s and of r / reward_temperature
  T gap;  // exo: sum q (log q - log p)
  bool finite_scores, finite;
};

template <class T> FA_HD T list_log_p(const ListParams<T>& p, const ListHead<T>& h, T r) { return r / p.reward_temperature - h.log_norm_p; }

// q (log q - log p): nothing where q is 0, however far log q is.
template <class T> FA_HD T exo_gap(const ListParams<T>& p, const List<T>& x, const ListHead<T>& h, int i) {
  T log_q = x.s[i] - h.log_norm_q;
  return exp(log_q) == T(0) ? T(0) : log_q - list_log_p(p, h, x.r[i]);
}

template <class T> FA_HD ListHead<T> list_head(const ListParams<T>& p, const List<T>& x) {
  ListHead<T> h{};
  h.finite_scores = h.finite = true;
  for (int j = 0; j < x.count; ++j) {
    h.finite_scores = h.finite_scores && is_finite(x.r[j]);
    h.finite = h.finite && is_finite(x.s[j]);
    if (x.r[j] > x.r[h.best]) h.best = j;
    if (x.r[j] <= x.r[h.worst]) h.worst = j;
  }
  if (x.count == 0) return h;
  h.lowest = x.r[h.worst];
  if (p.kind < kInfonca) return h;
  h.log_norm_p = logsumexp<T>(x.count, [&](int j) { return x.r[j] / p.reward_temperature; });
  if (p.kind == kNca) return h;
  h.log_norm_q = logsumexp<T>(x.count, [&](int j) { return x.s[j]; });
  if (p.kind == kExoList)
    for (int j = 0; j < x.count; ++j) h.gap += exp(x.s[j] - h.log_norm_q) * exo_gap(p, x, h, j);
  return h;
}

template <class T> FA_HD T list_aux(const ListParams<T>& p, const List<T>& x, const ListHead<T>& h, int i) {
  const T nothing = -std::numeric_limits<T>::infinity();
  if (p.kind == kPlackettLuce) return logsumexp<T>(x.count, [&](int j) { return in_order(x, i, j) ? x.s[j] : nothing; });
  if (p.kind == kPro) {
    if (!(x.r[i] > h.lowest)) return T(0);  // nobody to be better than
    return logsumexp<T>(
        x.count, [&](int j) { return j == i ? x.s[i] * (x.r[i] - h.lowest) : (x.r[i] > x.r[j] ? x.s[j] * (x.r[i] - x.r[j]) : nothing); });
  }
  if (p.kind == kPairwise && p.pair_gain == kGainLambda) {  // LiPO's discount by the rank among s
    int rank = 1;
    for (int j = 0; j < x.count; ++j) rank += x.s[j] > x.s[i] || (x.s[j] == x.s[i] && j < i);
    return T(1) / log1p(T(rank));
  }
  return T(0);
}

template <class T> FA_HD T pair_gain(const ListParams<T>& p, const List<T>& x, int i, int j) {
  return p.pair_gain == kGainOne ? T(1) : fabs(exp2(x.r[i]) - exp2(x.r[j])) * fabs(x.aux[i] - x.aux[j]);
}

// `value`: this response's share of the term, before list_weight and the division of pair_mean; `slope`: d term / d s_i.
template <class T> struct ListItem { T value, slope, pairs, correct, margin; };

template <class T> FA_HD ListItem<T> list_item(const ListParams<T>& p, const List<T>& x, const ListHead<T>& h, int i) {
  const T s = x.s[i], r = x.r[i];
  ListItem<T> out{};
  for (int j = 0; j < x.count; ++j) {
    if (!(r > x.r[j])) continue;
    out.pairs += T(1);
    out.correct += s > x.s[j] ? T(1) : T(0);
    out.margin += s - x.s[j];
  }
  switch (p.kind) {
    case kPlackettLuce:
      out.value = x.aux[i] - s;
      out.slope = T(-1);
      for (int k = 0; k < x.count; ++k)
        if (in_order(x, k, i)) out.slope += exp(s - x.aux[k]);
      break;
    case kPro:
      if (r > h.lowest) {
        T own = r - h.lowest;
        out.value = x.aux[i] - s * own;
        out.slope = (exp(s * own - x.aux[i]) - T(1)) * own;
      }
      for (int k = 0; k < x.count; ++k)
        if (x.r[k] > r) out.slope += exp(s * (x.r[k] - r) - x.aux[k]) * (x.r[k] - r);
      break;
    case kPairwise:
      for (int j = 0; j < x.count; ++j) {
        if (x.r[j] == r) continue;
        const bool above = r > x.r[j];
        ValueSlope<T> f = link(p.link, above ? s - x.s[j] : x.s[j] - s, p.target, T(1), T(0.5));
        T gain = pair_gain(p, x, i, j);
        if (above) out.value += gain * f.value;
        out.slope += above ? gain * f.slope : -gain * f.slope;
      }
      break;
    case kNca: {
      T prob = exp(list_log_p(p, h, r));
      out.value = (prob > T(0) ? prob * softplus(-s) : T(0)) + softplus(s) / T(x.count);
      out.slope = sigmoid(s) / T(x.count) - prob * sigmoid(-s);
      break;
    }
    case kInfonca: {
      T log_q = s - h.log_norm_q, prob = exp(list_log_p(p, h, r));
      out.value = prob == T(0) ? T(0) : -prob * log_q;
      out.slope = exp(log_q) - prob;
      break;
    }
    default: {
      T gap = exo_gap(p, x, h, i), q = exp(s - h.log_norm_q);
      out.value = q * gap;
      out.slope = q * (gap - h.gap);
    }
  }
  return out;
}

// beta a of one response and d s / d (the sum of its log-ratios).
template <class T> FA_HD ValueSlope<T> list_score(const ListParams<T>& p, T beta, const T* sums) {
  T norm = power_of_length(sums[kSumLength], p.length_norm);
  return {beta * (sums[kSumRatio] / norm), beta / norm};
}

// What a list's term, and with it every slope of it in s, is multiplied by before the normaliser.
template <class T> FA_HD T list_scale(const ListParams<T>& p, T pairs) {
  return p.kind == kPairwise && p.pair_mean ? p.list_weight / (pairs > T(1) ? pairs : T(1)) : p.list_weight;
}

// Weight of the best response's NLL before its normaliser.
template <class T> FA_HD T list_sft_weight(const ListParams<T>& p, int count) {
  return p.sft_weight == T(0) ? T(0) : p.sft_weight * (p.sft_power == T(0) ? T(1) : pow(T(count - 1), p.sft_power));
}

}  // namespace fastalign
