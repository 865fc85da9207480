// Vocabulary rows: who walks which part of which row, what goes into and comes out of a row's state. The sweeps themselves are in rows_impl.h.
#include <omp.h>
#include <algorithm>
#include <type_traits>
#include <vector>
#include "cpu/row_labels.h"
#include "cpu/rows.h"
#include "ops.h"
#include "row_results.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this, waking threads costs more than the work

// How many of `items` rows, or parts of rows, of `length` elements a thread takes at a time: neighbours, which memory hands out faster, but so few
// that each thread comes back about 16 times, for rows may be masked and cores slower than others.
int64_t at_a_time(int64_t items, int64_t length) {
  return std::max({int64_t(1), kSerialElements / length, items / (16 * omp_get_max_threads())});
}

template <class T> T* row_of(const RowsView& v, int64_t row) {
  return static_cast<T*>(v.data) + (row / v.inner * v.stride_outer + row % v.inner * v.stride_inner);
}

template <class A> RowTransform<A> row_transform(const RowArgs& a) { return {bits_per_unit<A>(a), A(a.cap_scale)}; }

// Whether target k, not ignored, lies in columns [begin, end) of this call's part of the vocabulary.
bool is_within(const RowArgs& a, int64_t row, int64_t k, int64_t begin, int64_t end) {
  const int64_t column = label(a, row, k) - a.vocab_start;
  return !is_ignored(a, row, k) && column >= begin && column < end;
}

// kRef: with reference logits, whose row goes along.
template <class T, bool kRef> struct Forward {
  using A = acc_t<T>;
  using State = std::conditional_t<kRef, PairState<A>, RowState<A>>;
  const TokenStatsArgs& a;
  const RowTransform<A> f = row_transform<A>(a);
  const RowKernels<A>& kernels = row_kernels<A>();
  const int sums = (a.outputs & kOutEntropy ? kSumS1 : 0) | (a.outputs & (kOutLogSumSq | kOutMeanLogit) ? kSumS2Sz : 0);
  const int cross = (a.outputs & kOutKlPolicyRef ? kSumT : 0) | (a.outputs & kOutKlRefPolicy ? kSumTr : 0);
  const int64_t rows = a.logits.rows, vocab = a.logits.vocab, chunks = (vocab + kChunk - 1) / kChunk;

  static RowState<A>& policy(RowState<A>& s) { return s; }
  static RowState<A>& policy(PairState<A>& s) { return s.p; }

  State chunk_state(int64_t row, int64_t chunk) const {
    const int64_t start = chunk * kChunk, length = std::min(kChunk, vocab - start);
    const T* x = row_of<const T>(a.logits, row) + start;
    State s;
    if constexpr (kRef) {
      const T* y = row_of<const T>(a.ref, row) + start;
      if (cross) {
        s = kernels.forward_pair(a.dtype, x, y, length, f, sums | cross);
      } else {
        const RowState<A> r = kernels.forward(a.dtype, y, length, f, 0);
        s = {kernels.forward(a.dtype, x, length, f, sums), {r.m, r.s0, A(0), A(0), A(0)}};
      }
    } else {
      s = kernels.forward(a.dtype, x, length, f, sums);
    }
    policy(s).top += int32_t(start);
    return s;
  }

  // Merges part(0), part(1), ...: the states of the row's chunks. Afterwards `umax` and `top` mean what row_state.h says.
  template <class Part> State row_state(int64_t row, Part part) const {
    State s = State::empty();
    for (int64_t i = 0; i < chunks; ++i) s = merge(s, part(i));
    RowState<A>& p = policy(s);
    if (a.outputs & kOutIsTop1) p.top = exact_top(row, p);
    const A largest = p.umax;
    p.umax = kernels.u(largest, f);
    if (is_far(s)) s = far_state(row, p.top);
    p.largest = largest;
    p.top += int32_t(a.vocab_start);
    if (!a.state_in) return s;
    const A* before = static_cast<const A*>(a.state_in) + row * kStateWidth;
    if constexpr (kRef) return merge_stored(State{load_state(before), load_ref(before)}, s);
    else return merge_stored(load_state(before), s);
  }

  // Whether a swept row, or its reference row, is far, or may be: its maximum is not known.
  bool is_far(const RowState<A>& s) const { return f.is_far(s.umax); }
  bool is_far(const PairState<A>& s) const { return f.is_far(s.p.umax) || !(std::fabs(s.r.m) < f.far_limit()); }

  RowOrigin<A> origin(const T* x) const {
    A largest = A(-INFINITY);
    for (int64_t v = 0; v < vocab; ++v) largest = to_acc(x[v]) > largest ? to_acc(x[v]) : largest;
    const A umax = kernels.u(largest, f);
    const bool far = f.is_far(umax);
    return {far ? umax * f.c : reference_point(umax, f), umax, far};
  }
  // Without mass so far there is nothing to count from: 0 serves.
  A bits(const RowOrigin<A>& o, A u) const { return o.far || o.m > A(-INFINITY) ? o.bits(u, f) : f.bits(u, A(0)); }

  // The state of a row of which it or its reference row is far, element by element.
  State far_state(int64_t row, int32_t top) const {
    const T *x = row_of<const T>(a.logits, row), *y = kRef ? row_of<const T>(a.ref, row) : x;
    const RowOrigin<A> p = origin(x), r = origin(y);
    double s0 = 0, s1 = 0, s2 = 0, sz = 0, r0 = 0, t = 0, tr = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      const A u = kernels.u(to_acc(x[v]), f), d = bits(p, u), e = kernels.exp2(d);
      s0 += e, s2 += double(e) * e, sz += double(u) * kSumShare;
      s1 += e == A(0) ? 0.0 : double(e) * d;
      if (!kRef) continue;
      const A dr = bits(r, kernels.u(to_acc(y[v]), f)), er = kernels.exp2(dr);
      r0 += er;
      t += e == A(0) ? 0.0 : e * (double(d) - dr);
      tr += er == A(0) ? 0.0 : er * (double(d) - dr);
    }
    const RowState<A> own{p.m, A(s0), A(s1), A(s2), A(sz), p.umax, top, A(-INFINITY)};
    if constexpr (kRef) return {own, {r.m, A(r0), A(t), A(tr), r.far ? r.umax : A(0)}};
    else return own;
  }

  int32_t exact_top(int64_t row, const RowState<A>& s) const {
    const T* x = row_of<const T>(a.logits, row);
    const int32_t end = int32_t(std::min<int64_t>(s.top + kBlock, vocab));
    for (int32_t i = s.top; i < end; ++i)
      if (to_acc(x[i]) == s.umax) return i;
    return s.top;  // a row of NaN, reported as such
  }

  // u of target k in the policy's (which = 0) or the reference's logits.
  A target(const RowsView& logits, int which, int64_t row, int64_t k) const {
    if (is_within(a, row, k, 0, vocab)) return kernels.u(to_acc(row_of<const T>(logits, row)[label(a, row, k) - a.vocab_start]), f);
    return a.target_in ? static_cast<const A*>(a.target_in)[(which * rows + row) * a.targets + k] : A(-INFINITY);
  }

  template <class Row> void write_targets(const RowsView& logits, int which, int64_t row, const Row& s) const {
    for (int64_t k = 0; k < a.targets; ++k) {
      const A u = target(logits, which, row, k);
      put(a.target, (which * rows + row) * a.targets + k, u);
      write_logprob(a, which, row, k, s, u, f, kernels.exp2);
    }
  }

  void write(int64_t row, State state) const {
    A* const out = a.state ? static_cast<A*>(a.state) + row * kStateWidth : nullptr;
    if (has_bad_label(a, row)) spoil(state);
    write_targets(a.logits, 0, row, policy(state));
    if constexpr (kRef) write_targets(a.ref, 1, row, state.r);
    write_statistics(a, row, state, f, kernels.exp2);
    if (out) store_state(policy(state), true, out);
    if constexpr (kRef)
      if (out) store_ref(state.r, out);
  }

  void write_masked(int64_t row) const {
    for (int64_t k = 0; k < a.targets; ++k) {
      for (int which = 0; which <= int(kRef); ++which) put(a.target, (which * rows + row) * a.targets + k, A(-INFINITY));
      write_no_logprob<A>(a, row, k);
    }
    write_no_statistics<A>(a, row);
    if (a.state) store_empty(kRef, static_cast<A*>(a.state) + row * kStateWidth);
  }

  void run_row(int64_t row) const {
    if (is_scored(a, row)) write(row, row_state(row, [&](int64_t i) { return chunk_state(row, i); }));
    else write_masked(row);
  }

  void run() const {
    if (chunks > 1 && rows < omp_get_max_threads()) return run_chunks();
#pragma omp parallel for schedule(dynamic, at_a_time(rows, vocab)) if (rows * vocab > kSerialElements)
    for (int64_t row = 0; row < rows; ++row) run_row(row);
  }

  // Fewer rows than threads: the chunks are shared out, and merged in the same order as above.
  void run_chunks() const {
    std::vector<State> parts(size_t(rows * chunks));
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

  // store2 takes no other NaN (rows_impl.h), and upstream gradients may hold any.
  static A plain_nan(A x) { return x == x ? x : A(NAN); }
  static A at(const void* g, int64_t i) { return g ? static_cast<const A*>(g)[i] : A(0); }

  // The gradient of columns [begin, end) of one row. `kept`: room for the raw logits of the row's targets, which an in-place sweep overwrites.
  void run(int64_t row, int64_t begin, int64_t end, std::vector<A>& kept) const {
    const T* x = row_of<const T>(a.logits, row);
    T* dx = row_of<T>(a.grad, row);
    const A g_entropy = at(a.g_entropy, row), g_logsumexp = at(a.g_logsumexp, row);
    const A g_kl_policy_ref = at(a.g_kl_policy_ref, row), g_kl_ref_policy = at(a.g_kl_ref_policy, row);
    const bool with_kl = g_kl_policy_ref != A(0) || g_kl_ref_policy != A(0);
    const int64_t targets = a.g_logprob ? a.targets : 0;
    A g_logprob = 0;
    bool wanted = g_entropy != A(0) || g_logsumexp != A(0) || with_kl;
    for (int64_t k = 0; k < targets; ++k) {
      if (is_ignored(a, row, k)) continue;
      const A g = at(a.g_logprob, row * a.targets + k);
      g_logprob += g;
      wanted |= g != A(0);
      if (is_within(a, row, k, begin, end)) kept[size_t(k)] = to_acc(x[label(a, row, k) - a.vocab_start]);
    }
    const A* state = static_cast<const A*>(a.state) + row * kStateWidth;
    const RowState<A> s = load_state(state);
    const RefState<A> r = load_ref(state);
    // A row without mass (all -inf), or with NaN, is NaN throughout, whatever the coefficients.
    if (!is_scored(a, row) || (!wanted && s.s0 > A(0))) {
      memset(dx + begin, 0, size_t(end - begin) * sizeof(T));
      return;
    }
    if (!has_gradient(s, r, g_kl_policy_ref, g_kl_ref_policy)) {
      T nan;
      from_acc(A(NAN), &nan);
      std::fill(dx + begin, dx + end, nan);
      return;
    }
    const RowCoefficients<A> c = row_coefficients(s, g_logprob, g_entropy, g_logsumexp, f, kernels.exp2);
    // p (A + B log p) with p = e / s0 and log p = ln2 d - log s0 is e (a + b d). Folded in double, so that only a and b themselves are rounded.
    const KlCoefficients<A> kl = with_kl ? kl_coefficients(s, r, g_kl_policy_ref, g_kl_ref_policy) : KlCoefficients<A>{};
    const Element element{row_origin(s, f), row_origin(r, f), s.s0, c, kl, with_kl};
    const T* y = with_kl ? row_of<const T>(a.ref, row) : x;
    const double slope = double(f.slope(A(0))), per_mass = slope / double(s.s0), b = double(c.b) * per_mass;
    const GradientRow<A> g{s.m, plain_nan(A(double(c.a) * per_mass - b * std::log(double(s.s0)))), plain_nan(A(b * kLn2))};
    if (element.p.far || (with_kl && element.r.far)) {
      for (int64_t v = begin; v < end; ++v) from_acc(gradient(element, to_acc(x[v]), to_acc(y[v]), A(0)), dx + v);
    } else if (with_kl) {
      const PairGradientRow<A> pair{g.m, g.a, g.b, r.m, {plain_nan(A(kl.c * slope)), kl.mean, plain_nan(A(kl.k * slope)), kl.ratio}};
      kernels.backward_pair(a.dtype, x + begin, y + begin, dx + begin, end - begin, f, pair);
    } else {
      kernels.backward(a.dtype, x + begin, dx + begin, end - begin, f, g);
    }
    for (int64_t k = 0; k < targets; ++k) {
      if (!is_within(a, row, k, begin, end)) continue;
      A g = 0;  // a label that occurs several times in the row gets the same total each time
      for (int64_t j = 0; j < a.targets; ++j)
        if (label(a, row, j) == label(a, row, k)) g += at(a.g_logprob, row * a.targets + j);
      const int64_t column = label(a, row, k) - a.vocab_start;
      from_acc(gradient(element, kept[size_t(k)], with_kl ? to_acc(y[column]) : A(0), g), dx + column);
    }
  }

  // What the gradient of a single element is made of.
  struct Element {
    RowOrigin<A> p, r;
    A s0;
    RowCoefficients<A> c;
    KlCoefficients<A> kl;
    bool with_kl;
  };

  // Of logit x, beside y in the reference row, with the one-hot term g. Exponents and u are those of the sweep: an element that has all the mass
  // has p = 1 and log p = 0.
  A gradient(const Element& row, A x, A y, A g) const {
    const A u = kernels.u(x, f), d = row.p.bits(u, f), e = kernels.exp2(d), p = e / row.s0;
    if (u == A(-INFINITY)) return A(0);
    A inner = row.c.a;
    if (row.c.b != A(0) && p > A(0) && p != A(1)) inner += row.c.b * (A(kLn2) * d - std::log(row.s0));
    A dz = g + p * inner;
    if (row.with_kl) {
      const KlCoefficients<A>& kl = row.kl;
      const A dr = row.r.bits(kernels.u(y, f), f);
      if (kl.k != A(0)) dz += kl.k * std::fma(-kl.ratio, kernels.exp2(dr), e);
      if (e > A(0) && kl.c != A(0)) dz += kl.c * e * (d - dr - kl.mean);
    }
    return dz * f.slope(u);
  }

  void run_row(int64_t row) const {
    std::vector<A> kept(static_cast<size_t>(a.targets));
    run(row, 0, a.logits.vocab, kept);
  }

  void run_all() const {
    const int64_t rows = a.logits.rows, vocab = a.logits.vocab;
    const int64_t length = rows < omp_get_max_threads() ? std::min(kChunk, vocab) : vocab, parts = (vocab + length - 1) / length;
    const int64_t pieces = rows * parts;
#pragma omp parallel if (rows * vocab > kSerialElements)
    {
      std::vector<A> kept(static_cast<size_t>(a.targets));
#pragma omp for schedule(dynamic, at_a_time(pieces, length))
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t begin = i % parts * length;
        run(i / parts, begin, std::min(begin + length, vocab), kept);
      }
    }
  }
};

// Row by row, so that the second sweep finds the row in the cache. Fewer rows than threads: as two calls, which share out the chunks.
template <class Fwd, class Bwd> void run_fused(const Fwd& forward, const Bwd& backward) {
  if (forward.chunks > 1 && forward.rows < omp_get_max_threads()) {
    forward.run();
    backward.run_all();
    return;
  }
#pragma omp parallel for schedule(dynamic, at_a_time(forward.rows, forward.vocab)) if (forward.rows * forward.vocab > kSerialElements)
  for (int64_t row = 0; row < forward.rows; ++row) {
    forward.run_row(row);
    backward.run_row(row);
  }
}

template <class T> void scale(const ScaleRowsArgs& a) {
  using A = acc_t<T>;
  const A by = *static_cast<const A*>(a.scale);
  if (by == A(1)) return;
#pragma omp parallel for if (a.x.rows * a.x.vocab > kSerialElements)
  for (int64_t row = 0; row < a.x.rows; ++row) {
    T* x = row_of<T>(a.x, row);
    for (int64_t i = 0; i < a.x.vocab; ++i) from_acc(times_slope(by, to_acc(x[i])), x + i);
  }
}

}  // namespace

void token_stats_fwd(const TokenStatsArgs& a) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    a.ref.data ? Forward<T, true>{a}.run() : Forward<T, false>{a}.run();
  });
}
void token_stats_bwd(const TokenStatsBackwardArgs& a) {
  with_dtype(a.dtype, [&](auto tag) { Backward<decltype(tag)>{a}.run_all(); });
}
void token_stats_fused(const TokenStatsFusedArgs& a) {
  with_dtype(a.forward.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Backward<T> backward{a.backward};
    a.forward.ref.data ? run_fused(Forward<T, true>{a.forward}, backward) : run_fused(Forward<T, false>{a.forward}, backward);
  });
}
void scale_rows(const ScaleRowsArgs& a) {
  with_dtype(a.dtype, [&](auto tag) { scale<decltype(tag)>(a); });
}

}  // namespace cpu
}  // namespace fastalign
