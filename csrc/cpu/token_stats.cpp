// Vocabulary rows: who walks which part of which row, what goes into and comes out of a row's state. The sweeps themselves are in rows_impl.h.
#include <omp.h>
#include <algorithm>
#include <vector>
#include "cpu/rows.h"
#include "ops.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this, waking threads costs more than the work

template <class T> T* row_of(const RowsView& v, int64_t row) {
  return static_cast<T*>(v.data) + (row / v.inner * v.stride_outer + row % v.inner * v.stride_inner);
}

template <class A, class Args> RowTransform<A> row_transform(const Args& a) {
  const A temperature = a.temperature_ptr ? *static_cast<const A*>(a.temperature_ptr) : A(a.temperature);
  return {A(a.factor) / temperature, A(a.cap_scale)};
}

template <class Args> int64_t label(const Args& a, int64_t row, int64_t k) { return a.labels[row * a.targets + k]; }
template <class Args> bool is_ignored(const Args& a, int64_t row, int64_t k) { return label(a, row, k) == a.ignore_index; }

template <class Args> bool is_scored(const Args& a, int64_t row) {
  if (a.mask && !a.mask[row]) return false;
  if (!a.labels) return true;
  for (int64_t k = 0; k < a.targets; ++k)
    if (!is_ignored(a, row, k)) return true;
  return false;
}

// Whether target k, not ignored, lies in columns [begin, end) of this call's part of the vocabulary.
template <class Args> bool is_within(const Args& a, int64_t row, int64_t k, int64_t begin, int64_t end) {
  const int64_t column = label(a, row, k) - a.vocab_start;
  return !is_ignored(a, row, k) && column >= begin && column < end;
}

template <class T> struct Forward {
  using A = acc_t<T>;
  const TokenStatsArgs& a;
  const RowTransform<A> f = row_transform<A>(a);
  const RowKernels<A>& kernels = row_kernels<A>();
  const int sums = (a.outputs & kOutEntropy ? kSumS1 : 0) | (a.outputs & (kOutLogSumSq | kOutMeanLogit) ? kSumS2Sz : 0);
  const int64_t rows = a.logits.rows, vocab = a.logits.vocab, chunks = (vocab + kChunk - 1) / kChunk;

  RowState<A> chunk_state(int64_t row, int64_t chunk) const {
    const int64_t start = chunk * kChunk;
    RowState<A> s = kernels.forward(a.dtype, row_of<const T>(a.logits, row) + start, std::min(kChunk, vocab - start), f, sums);
    s.top += int32_t(start);
    return s;
  }

  // Merges part(0), part(1), ...: the states of the row's chunks. Afterwards `umax` and `top` mean what row_state.h says.
  template <class Part> RowState<A> row_state(int64_t row, Part part) const {
    RowState<A> s = RowState<A>::empty();
    for (int64_t i = 0; i < chunks; ++i) s = merge(s, part(i));
    if (a.outputs & kOutIsTop1) s.top = exact_top(row, s);
    s.top += int32_t(a.vocab_start);
    s.umax = f.u(s.umax);
    return a.state_in ? merge(load_state(static_cast<const A*>(a.state_in) + row * kStateWidth), s) : s;
  }

  int32_t exact_top(int64_t row, const RowState<A>& s) const {
    const T* x = row_of<const T>(a.logits, row);
    const int32_t end = int32_t(std::min<int64_t>(s.top + kBlock, vocab));
    for (int32_t i = s.top; i < end; ++i)
      if (to_acc(x[i]) == s.umax) return i;
    return s.top;  // a row of NaN, reported as such
  }

  A target(int64_t row, int64_t k) const {
    if (is_within(a, row, k, 0, vocab)) return f.u(to_acc(row_of<const T>(a.logits, row)[label(a, row, k) - a.vocab_start]));
    return a.target_in ? static_cast<const A*>(a.target_in)[row * a.targets + k] : A(-INFINITY);
  }

  void write(int64_t row, RowState<A> s) const {
    for (int64_t k = 0; k < a.targets; ++k)
      if (!is_ignored(a, row, k) && (label(a, row, k) < 0 || label(a, row, k) >= a.vocab_total)) s.s0 = A(NAN);
    for (int64_t k = 0; k < a.targets; ++k) {
      const A u = target(row, k);
      put(a.target, row * a.targets + k, u);
      if (a.logprob) put(a.logprob, row * a.targets + k, is_ignored(a, row, k) ? A(0) : row_logprob(s, u, f));
    }
    if (a.entropy) put(a.entropy, row, row_entropy(s));
    if (a.logsumexp) put(a.logsumexp, row, row_logsumexp(s));
    if (a.log_sum_sq) put(a.log_sum_sq, row, row_log_sum_sq(s));
    if (a.mean_logit) put(a.mean_logit, row, row_mean_logit(s, A(a.vocab_total), f));
    if (a.is_top1) put(a.is_top1, row, row_is_top1(s, label(a, row, 0)));
    if (a.state) store_state(s, true, static_cast<A*>(a.state) + row * kStateWidth);
  }

  void write_masked(int64_t row) const {
    for (int64_t k = 0; k < a.targets; ++k) {
      put(a.target, row * a.targets + k, A(0));
      put(a.logprob, row * a.targets + k, A(0));
    }
    for (void* out : {a.entropy, a.logsumexp, a.log_sum_sq, a.mean_logit, a.is_top1}) put(out, row, A(0));
    if (a.state) std::fill_n(static_cast<A*>(a.state) + row * kStateWidth, int(kStateWidth), A(0));
  }

  static void put(void* out, int64_t i, A value) {
    if (out) static_cast<A*>(out)[i] = value;
  }

  void run() const {
    if (chunks > 1 && rows < omp_get_max_threads()) return run_chunks();
    const int64_t batch = std::max<int64_t>(1, kSerialElements / vocab);
#pragma omp parallel for schedule(dynamic, batch) if (rows * vocab > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) {
      if (is_scored(a, row)) write(row, row_state(row, [&](int64_t i) { return chunk_state(row, i); }));
      else write_masked(row);
    }
  }

  // Fewer rows than threads: the chunks are shared out, and merged in the same order as above.
  void run_chunks() const {
    std::vector<RowState<A>> parts(size_t(rows * chunks));
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows * chunks; ++i)
      if (is_scored(a, i / chunks)) parts[size_t(i)] = chunk_state(i / chunks, i % chunks);
    for (int64_t row = 0; row < rows; ++row) {
      if (is_scored(a, row)) write(row, row_state(row, [&](int64_t i) { return parts[size_t(row * chunks + i)]; }));
      else write_masked(row);
    }
  }
};

template <class T> struct Backward {
  using A = acc_t<T>;
  const TokenStatsBackwardArgs& a;
  const RowTransform<A> f = row_transform<A>(a);
  const RowKernels<A>& kernels = row_kernels<A>();

  static A at(const void* g, int64_t i) { return g ? static_cast<const A*>(g)[i] : A(0); }

  // The gradient of columns [begin, end) of one row. `kept`: room for the raw logits of the row's targets, which an in-place sweep overwrites.
  void run(int64_t row, int64_t begin, int64_t end, std::vector<A>& kept) const {
    const T* x = row_of<const T>(a.logits, row);
    T* dx = row_of<T>(a.grad, row);
    const A g_entropy = at(a.g_entropy, row), g_logsumexp = at(a.g_logsumexp, row);
    const int64_t targets = a.g_logprob ? a.targets : 0;
    A g_logprob = 0;
    bool wanted = g_entropy != A(0) || g_logsumexp != A(0);
    for (int64_t k = 0; k < targets; ++k) {
      if (is_ignored(a, row, k)) continue;
      const A g = at(a.g_logprob, row * a.targets + k);
      g_logprob += g;
      wanted |= g != A(0);
      if (is_within(a, row, k, begin, end)) kept[size_t(k)] = to_acc(x[label(a, row, k) - a.vocab_start]);
    }
    const RowState<A> s = load_state(static_cast<const A*>(a.state) + row * kStateWidth);
    // A row without mass (all -inf), or with NaN, is NaN throughout, whatever the coefficients: the sweep below makes it so.
    if (!is_scored(a, row) || (!wanted && s.s0 > A(0))) {
      memset(dx + begin, 0, size_t(end - begin) * sizeof(T));
      return;
    }
    const RowCoefficients<A> c = row_coefficients(s, g_logprob, g_entropy, g_logsumexp);
    // p (A + B log p) with p = e / s0 and log p = ln2 d - log s0 is e (a + b d). Folded in double, so that only a and b themselves are rounded.
    const double per_mass = double(f.slope(A(0))) / double(s.s0), b = double(c.b) * per_mass;
    const double a_folded = double(c.a) * per_mass - b * std::log(double(s.s0));
    const GradientRow<A> g{s.m, a_folded == a_folded ? A(a_folded) : A(NAN), A(b * kLn2)};
    kernels.backward(a.dtype, x + begin, dx + begin, end - begin, f, g);
    for (int64_t k = 0; k < targets; ++k)
      if (is_within(a, row, k, begin, end))
        from_acc(target_gradient(row, k, kept[size_t(k)], s, c), dx + (label(a, row, k) - a.vocab_start));
  }

  // The element of target k, one-hot term included. A label that occurs several times in the row gets the same total each time.
  A target_gradient(int64_t row, int64_t k, A x, const RowState<A>& s, const RowCoefficients<A>& c) const {
    A g = 0;
    for (int64_t j = 0; j < a.targets; ++j)
      if (label(a, row, j) == label(a, row, k)) g += at(a.g_logprob, row * a.targets + j);
    const A u = f.u(x), d = f.bits(u, s.m), p = exp2(d) / s.s0;
    if (u == A(-INFINITY) && s.s0 > A(0)) return A(0);
    const A log_term = c.b != A(0) && p > A(0) ? c.b * (A(kLn2) * d - log(s.s0)) : A(0);
    return (p * (c.a + log_term) + g) * f.slope(u);
  }

  void run_all() const {
    const int64_t rows = a.logits.rows, vocab = a.logits.vocab;
    const int64_t length = rows < omp_get_max_threads() ? std::min(kChunk, vocab) : vocab, parts = (vocab + length - 1) / length;
    const int64_t batch = std::max<int64_t>(1, kSerialElements / length);
#pragma omp parallel if (rows * vocab > kSerialElements)
    {
      std::vector<A> kept(static_cast<size_t>(a.targets));
#pragma omp for schedule(dynamic, batch)
      for (int64_t i = 0; i < rows * parts; ++i) run(i / parts, i % parts * length, std::min(i % parts * length + length, vocab), kept);
    }
  }
};

}  // namespace

void token_stats_fwd(const TokenStatsArgs& a) {
  if (a.ref.data) throw std::invalid_argument("fastalign: the CPU kernels do not take reference logits yet");
  with_dtype(a.dtype, [&](auto tag) { Forward<decltype(tag)>{a}.run(); });
}
void token_stats_bwd(const TokenStatsBackwardArgs& a) {
  if (a.ref.data) throw std::invalid_argument("fastalign: the CPU kernels do not take reference logits yet");
  with_dtype(a.dtype, [&](auto tag) { Backward<decltype(tag)>{a}.run_all(); });
}
void token_stats_fused(const TokenStatsFusedArgs&) {
  throw std::invalid_argument("fastalign: the CPU kernels do not take reference logits yet");
}
void scale_rows(const ScaleRowsArgs&) { throw std::invalid_argument("fastalign: the CPU kernels do not scale rows yet"); }

}  // namespace cpu
}  // namespace fastalign
