// The pair kernel: sums per pair side, then the table of values and slopes, then the slopes carried back to the tokens.
// Sums and pair formulas are evaluated in double and rounded once; the order is that of tokens and of pair numbers, whatever the thread count.
#include <algorithm>
#include <limits>
#include <vector>
#include "cpu/tokens.h"
#include "math/pair.h"
#include "segment.h"

namespace fastalign {
namespace cpu {
namespace {

// The sequence on one side (0 chosen, 1 rejected) of a pair.
template <class Args> int64_t sequence_of(const Args& a, int64_t pair, int side) {
  return a.pair_index ? a.pair_index[2 * pair + side] : 2 * pair + side;
}

template <class Args> bool is_scored(const Args& a, int64_t n) { return !a.mask || a.mask[n]; }

template <class Args> double count_scored(const Args& a, int64_t s) {
  int64_t count = 0;
  for (int64_t n = a.cu_seqlens[s]; n < a.cu_seqlens[s + 1]; ++n) count += is_scored(a, n);
  return double(count);
}

// Whether row n of the sequence that ends before `end` counts for the SFT term: the scored rows, or with the prompt all that predict something.
template <class Args> bool in_sft(const PairParams<double>& p, const Args& a, int64_t n, int64_t end) {
  return p.sft_include_prompt ? n + 1 < end : is_scored(a, n);
}

// Whether all scored tokens of a sequence count alike: no token needs a look of its own.
template <class Args> bool uniform_tokens(const PairParams<double>& p, const Args& a) {
  return p.ld_alpha == 1.0 && !a.weights && !p.sft_include_prompt && !is_finite(p.token_clamp_low) && !is_finite(p.token_clamp_high);
}

template <class T> struct Forward {
  const PreferenceArgs& a;
  const PairParams<double> p = pair_params<double>(a.scalars, a.switches);
  const bool uniform = uniform_tokens(p, a);
  T* const sums = static_cast<T*>(a.sums);
  const decltype(TokenKernels<T>::sum_lanes) sum_lanes = token_kernels<T>().sum_lanes;

  static double at(const void* v, int64_t i) { return double(static_cast<const T*>(v)[i]); }

  // The sums of a sequence whose tokens count alike.
  void sum_uniform(int64_t s, double* sum) const {
    const int64_t start = a.cu_seqlens[s], n = a.cu_seqlens[s + 1] - start;
    const uint8_t* mask = a.mask ? a.mask + start : nullptr;
    auto tokens = [&](const void* v) { return v ? static_cast<const T*>(v) + start : nullptr; };
    const bool with_reference = a.ref_logprobs && p.reference != 0.0;
    const LaneSums r = sum_lanes(tokens(a.logprobs), with_reference ? tokens(a.ref_logprobs) : nullptr, p.reference, mask, n);
    sum[kSumPolicy] = sum[kSumSft] = r.x;
    sum[kSumRatio] = r.difference;
    sum[kSumLength] = sum[kSumSftLength] = double(r.count);
    if (a.kl) sum[kSumKl] = sum_lanes(tokens(a.kl), nullptr, 0.0, mask, n).x;
  }

  void sum_side(int64_t pair, int side) const {
    double sum[kSumWidth] = {};
    if (uniform) sum_uniform(sequence_of(a, pair, side), sum);
    else sum_tokens(pair, side, sum);
    for (int i = 0; i < kSumWidth; ++i) sums[(2 * pair + side) * kSumWidth + i] = T(sum[i]);
  }

  void sum_tokens(int64_t pair, int side, double* sum) const {
    const int64_t s = sequence_of(a, pair, side), end = a.cu_seqlens[s + 1];
    const double partner_length = p.ld_alpha == 1.0 ? 0.0 : count_scored(a, sequence_of(a, pair, 1 - side));
    for (int64_t n = a.cu_seqlens[s]; n < end; ++n) {
      const double logprob = at(a.logprobs, n);
      if (in_sft(p, a, n, end)) {
        sum[kSumSft] += logprob;
        sum[kSumSftLength] += 1.0;
      }
      if (!is_scored(a, n)) continue;
      const double tail = p.ld_alpha == 1.0 ? 1.0 : tail_weight(p, sum[kSumLength], partner_length);
      const double weight = a.weights ? tail * at(a.weights, n) : tail;
      sum[kSumPolicy] += weight * logprob;
      sum[kSumRatio] += weight * token_ratio(p, logprob, a.ref_logprobs ? at(a.ref_logprobs, n) : 0.0).value;
      sum[kSumLength] += 1.0;
      if (a.kl) sum[kSumKl] += at(a.kl, n);
    }
  }

  SideSums<double> side(int64_t pair, int side) const {
    double s[kSumWidth];
    for (int i = 0; i < kSumWidth; ++i) s[i] = double(sums[(2 * pair + side) * kSumWidth + i]);
    return load_side(s);
  }

  static double value(const PairTensor& t, int64_t pair, double preset) { return t.data ? at(t.data, pair * t.stride) : preset; }

  PairTensors<double> tensors(int64_t pair) const {
    return {value(a.beta, pair, p.beta),     value(a.omega, pair, 1.0),       value(a.soft_label, pair, 1.0), value(a.gamma_ext, pair, 0.0),
            value(a.target, pair, p.target), value(a.anchor, pair, p.anchor), !a.valid || a.valid[pair]};
  }

  void table() const {
    std::vector<PairResult<double>> results(static_cast<size_t>(a.pairs));
    double local_pairs = 0, sft_tokens = 0, total = 0;
    for (int64_t i = 0; i < a.pairs; ++i) {
      const SideSums<double> chosen = side(i, 0);
      const PairResult<double>& r = results[size_t(i)] = evaluate_pair(p, chosen, side(i, 1), tensors(i));
      if (!r.valid) continue;
      local_pairs += 1.0;
      sft_tokens += chosen.sft_length;
    }
    const double pairs = a.num_items ? at(a.num_items, 0) : local_pairs;
    if (a.num_sft_tokens) sft_tokens = at(a.num_sft_tokens, 0);
    T *pair_loss = static_cast<T*>(a.pair_loss), *rows = static_cast<T*>(a.table);
    for (int64_t i = 0; i < a.pairs; ++i) {
      double row[kTableWidth];
      store_row(p, results[size_t(i)], pair_divisor(p, pairs), sft_divisor(p, pairs, local_pairs, sft_tokens, side(i, 0).sft_length), row);
      for (int k = 0; k < kTableWidth; ++k) rows[i * kTableWidth + k] = T(row[k]);
      pair_loss[i] = T(row[kTabPair] + row[kTabNll]);
      total += row[kTabPair] + row[kTabNll];
    }
    *static_cast<T*>(a.loss) = T(total);
  }

  void run() const {
    if (a.stages & 1) {
#pragma omp parallel for schedule(guided) if (a.tokens > (uniform ? kSerialUniform : kSerialTokens))
      for (int64_t i = 0; i < 2 * a.pairs; ++i) sum_side(i / 2, int(i % 2));
    }
    if (a.stages & 2) table();
  }
};

template <class T> struct Backward {
  const PreferenceBackwardArgs& a;
  const PairParams<double> p = pair_params<double>(a.scalars, a.switches);
  // The places of every sequence in `pairs`: entries places[first[s]] .. places[first[s + 1]) are 2 * pair + side, in that order.
  std::vector<int64_t> first = std::vector<int64_t>(size_t(a.sequences) + 1), places = std::vector<int64_t>(size_t(a.pairs) * 2);

  explicit Backward(const PreferenceBackwardArgs& args) : a(args) {
    for_each_place([&](int64_t s, int64_t) { ++first[size_t(s) + 1]; });
    for (size_t s = 0; s < size_t(a.sequences); ++s) first[s + 1] += first[s];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for_each_place([&](int64_t s, int64_t i) { places[size_t(next[size_t(s)]++)] = i; });
  }

  // f(sequence, 2 * pair + side), in that order. Numbers that name no sequence are passed over: `pairs` may have changed since it was checked.
  template <class F> void for_each_place(F&& f) const {
    for (int64_t i = 0; i < 2 * a.pairs; ++i) {
      const int64_t s = sequence_of(a, i / 2, int(i % 2));
      if (0 <= s && s < a.sequences) f(s, i);
    }
  }

  // The tokens of sequence s. What else it has to write, since its boundaries have changed, becomes NaN.
  Segment own_tokens(int64_t s) const {
    const Segment own = segment(a.cu_seqlens, a.sequences, a.tokens, s);
    const Share mine = share(a.cu_seqlens, a.sequences, a.tokens, s);
    if (own.begin != mine.begin || own.end != mine.end)
      for (void* grad : {a.grad_logprobs, a.grad_kl})
        if (grad)
          std::fill(static_cast<T*>(grad) + mine.begin, static_cast<T*>(grad) + std::max(mine.begin, mine.end),
                    std::numeric_limits<T>::quiet_NaN());
    return own;
  }

  static double at(const void* v, int64_t i) { return double(static_cast<const T*>(v)[i]); }

  // The gradients of a sequence whose tokens count alike are one number each.
  void run_uniform(int64_t s) const {
    double d_logprob = 0, d_kl = 0;
    for (int64_t e = first[size_t(s)]; e < first[size_t(s) + 1]; ++e) {
      const int64_t pair = places[size_t(e)] / 2, side = places[size_t(e)] % 2;
      const T* row = static_cast<const T*>(a.table) + pair * kTableWidth;
      if (row[kTabValid] == T(0)) continue;
      const double g = at(a.grad, pair * a.grad_stride);
      d_logprob += times_slope(g, double(row[kTabChosen + side]));
      if (p.sft_weight != 0.0 && side == 0) d_logprob += times_slope(g, double(row[kTabSft]));
      d_kl += times_slope(g, double(row[kTabKlChosen + side]));
    }
    const Segment own = own_tokens(s);
    fill(static_cast<T*>(a.grad_logprobs), own, T(d_logprob));
    if (a.grad_kl) fill(static_cast<T*>(a.grad_kl), own, T(d_kl));
  }

  void fill(T* grad, const Segment& own, T value) const {
    if (!a.mask) {
      std::fill(grad + own.begin, grad + own.end, value);
      return;
    }
    for (int64_t n = own.begin; n < own.end; ++n) grad[n] = a.mask[n] ? value : T(0);
  }

  void run_tokens(int64_t s) const {
    T *grad_logprobs = static_cast<T*>(a.grad_logprobs), *grad_kl = static_cast<T*>(a.grad_kl);
    const bool clamped = is_finite(p.token_clamp_low) || is_finite(p.token_clamp_high);
    double rank = 0;
    const Segment own = own_tokens(s);
    for (int64_t n = own.begin; n < own.end; ++n) {
      const bool scored = is_scored(a, n), sft = p.sft_weight != 0.0 && in_sft(p, a, n, own.end);
      const bool open = scored && (!clamped || token_ratio(p, at(a.logprobs, n), a.ref_logprobs ? at(a.ref_logprobs, n) : 0.0).open);
      const double weight = scored && a.weights ? at(a.weights, n) : 1.0;
      double d_logprob = 0, d_kl = 0;
      for (int64_t e = first[size_t(s)]; e < first[size_t(s) + 1]; ++e) {
        const int64_t pair = places[size_t(e)] / 2, side = places[size_t(e)] % 2;
        const T* row = static_cast<const T*>(a.table) + pair * kTableWidth;
        if (row[kTabValid] == T(0)) continue;
        const double g = at(a.grad, pair * a.grad_stride);
        if (open) {
          const double partner_length = at(a.sums, (2 * pair + 1 - side) * kSumWidth + kSumLength);
          const double tail = p.ld_alpha == 1.0 ? 1.0 : tail_weight(p, rank, partner_length);
          d_logprob += times_slope(times_slope(times_slope(g, double(row[kTabChosen + side])), tail), weight);
        }
        if (sft && side == 0) d_logprob += times_slope(g, double(row[kTabSft]));
        if (scored) d_kl += times_slope(g, double(row[kTabKlChosen + side]));
      }
      grad_logprobs[n] = T(d_logprob);
      if (grad_kl) grad_kl[n] = T(d_kl);
      if (scored) rank += 1.0;
    }
  }

  void run() const {
    const bool uniform = uniform_tokens(p, a);
#pragma omp parallel for schedule(guided) if (a.tokens > (uniform ? kSerialUniform : kSerialTokens))
    for (int64_t s = 0; s < a.sequences; ++s) uniform ? run_uniform(s) : run_tokens(s);
  }
};

}  // namespace

void preference_fwd(const PreferenceArgs& a) { a.dtype == kFloat64 ? Forward<double>{a}.run() : Forward<float>{a}.run(); }
void preference_bwd(const PreferenceBackwardArgs& a) { a.dtype == kFloat64 ? Backward<double>(a).run() : Backward<float>(a).run(); }

}  // namespace cpu
}  // namespace fastalign
