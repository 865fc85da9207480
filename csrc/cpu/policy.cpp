// Policy and value losses. A sequence (or a tile of tokens, where sequences do not matter) is one thread's; sums run in fixed lanes over short spans
// and then in double, in order: the same for every thread count and instruction set. The loops over tokens are in policy_impl.h.
#include "cpu/tokens.h"
#include <vector>

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialTokens = 1 << 12;  // below this, waking threads costs more than the work
constexpr int kSpan = 512;  // tokens whose sums stay in fp32

// All sequences or tiles, then the totals in their order. measure(span, length, total) is called first where `per_length`: something needs the
// number of scored tokens, and log_rho(total, length) the sequence's log-ratio. finish(row) has the last word on a row of sums.
template <int kStats, class T, class Args, int kMoments, class Measure, class LogRho, class Run, class Finish>
void reduce(const Args& a, int aggregation, int tokens_column, int sequences_column, const int (&m2_columns)[kMoments], bool per_length,
            Measure measure, LogRho log_rho, Run run, Finish finish) {
  const int64_t pieces = a.cu_seqlens ? a.sequences : (a.tokens + kPolicyTile - 1) / kPolicyTile;
  std::vector<double> rows(size_t(pieces) * kStats, 0.0);
  std::vector<MomentSums<double>> moments(size_t(pieces) * kMoments);
#pragma omp parallel for schedule(guided) if (a.tokens > kSerialTokens)
  for (int64_t k = 0; k < pieces; ++k) {
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[k] : k * kPolicyTile;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[k + 1] : (begin + kPolicyTile < a.tokens ? begin + kPolicyTile : a.tokens);
    auto each_span = [&](Span& s, auto&& f) {
      for (s.begin = begin; s.begin < end; s.begin += kSpan) {
        s.n = int(end - s.begin < kSpan ? end - s.begin : kSpan);
        f(s);
      }
    };
    double* row = rows.data() + k * kStats;
    Span s{begin, 0, 0.0, 0.0, k};
    if (per_length) {
      double length = 0, total = 0;
      each_span(s, [&](const Span& span) { measure(span, &length, &total); });
      s.length = length;
      s.log_rho = log_rho(total, length);
    }
    each_span(s, [&](const Span& span) { run(span, row, &moments[size_t(k * kMoments)]); });
    row[sequences_column] = a.cu_seqlens && row[tokens_column] > 0 ? 1.0 : 0.0;
    finish(row);
  }
  double total[kStats] = {};
  for (int64_t k = 0; k < pieces; ++k)
    for (int c = 0; c < kStats; ++c) total[c] += rows[size_t(k * kStats + c)];
  for (int m = 0; m < kMoments; ++m) {
    const auto part = [&](int64_t k) { return moments[size_t(k * kMoments + m)].moments(); };
    double count = 0, weighted = 0;
    for (int64_t k = 0; k < pieces; ++k) count += part(k).count, weighted += part(k).count * part(k).mean;
    for (int64_t k = 0; k < pieces; ++k) total[m2_columns[m]] += moved_m2(part(k), merged_mean(count, weighted));
  }
  const double given = a.num_items ? double(*static_cast<const T*>(a.num_items)) : 0.0;
  total[0] = loss_items(aggregation, a.num_items ? &given : nullptr, total[tokens_column], total[sequences_column]);
  for (int c = 0; c < kStats; ++c) static_cast<T*>(a.stats)[c] = T(total[c]);
  *static_cast<T*>(a.loss) = T(total[1] / total[0]);
}

template <class T> void policy(const PolicyArgs& a) {
  PolicyParams<T> p = policy_params<T>(a.scalars, a.switches);
  const PolicyParams<double> wide = policy_params<double>(a.scalars, a.switches);
  if (a.kl_coef) p.kl_coef = *static_cast<const T*>(a.kl_coef);
  if (a.entropy_coef) p.entropy_coef = *static_cast<const T*>(a.entropy_coef);
  const TokenKernels<T>& kernels = token_kernels<T>();
  reduce<kPolicyStats, T>(
      a, p.aggregation, kPolicy_tokens, kPolicy_sequences, kPolicyM2, p.ratio != kRatioToken || p.aggregation == kSeqMeanTokenMean,
      [&](const Span& s, double* length, double* total) { kernels.measure_policy(a, p, s, length, total); },
      [&](double total, double length) { return sequence_log_ratio(wide, total, length); },
      [&](const Span& s, double* stats, MomentSums<double>* seen) { kernels.run_policy(a, p, s, stats, seen); },
      [&](double* row) {
        if (clips_sequences(p))
          for (int c = kPolicy_clip_low; c <= kPolicy_clip_dual; ++c) row[c] = row[c] > 0 ? 1.0 : 0.0;
      });
}

template <class T> void value(const ValueArgs& a) {
  const TokenKernels<T>& kernels = token_kernels<T>();
  reduce<kValueStats, T>(
      a, a.aggregation, kValue_tokens, kValue_sequences, kValueM2, a.aggregation == kSeqMeanTokenMean,
      [&](const Span& s, double* length, double*) { kernels.measure_value(a, s, length); }, [](double, double) { return 0.0; },
      [&](const Span& s, double* stats, MomentSums<double>* seen) { kernels.run_value(a, s, stats, seen); }, [](double*) {});
}

template <class T> void backward(const PolicyBackwardArgs& a) {
  const T grad = *static_cast<const T*>(a.grad), items = *static_cast<const T*>(a.stats);
  const auto scale = token_kernels<T>().scale;
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
