// The list kernel: every list by one thread, in double, rounded once; then the normalisers, in list order.
#include <vector>
#include "math/list.h"
#include "ops.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialLists = 64;  // below this, waking threads costs more than the work

// What a list contributes before the normalisers.
struct Result {
  double term = 0, nll = 0, tokens = 0;   // tokens: of the best response
  bool valid = false;
};

template <class T> struct Forward {
  const ListwiseArgs& a;
  const ListParams<double> p = list_params<double>(a.scalars, a.switches);
  std::vector<Result> results = std::vector<Result>(size_t(a.lists));
  std::vector<double> slopes = std::vector<double>(size_t(a.sequences));

  static double at(const void* v, int64_t i) { return double(static_cast<const T*>(v)[i]); }
  T* row(int64_t list) const { return static_cast<T*>(a.table) + list * kListTableWidth; }

  // The columns that the normalisers do not touch, and `results`.
  void evaluate(int64_t list) {
    const int64_t begin = a.list_offsets[list];
    const int count = int(a.list_offsets[list + 1] - begin);
    const double beta = a.beta.data ? at(a.beta.data, list * a.beta.stride) : p.beta;
    double s[kMaxList], r[kMaxList], aux[kMaxList], d_score[kMaxList], policy[kMaxList], length[kMaxList];
    Result& out = results[size_t(list)];
    for (int i = 0; i < count; ++i) {
      double sums[kSumWidth];
      for (int k = 0; k < kSumWidth; ++k) sums[k] = at(a.sums, (begin + i) * kSumWidth + k);
      const ValueSlope<double> score = list_score(p, beta, sums);
      s[i] = score.value;
      d_score[i] = score.slope;
      r[i] = at(a.scores, begin + i);
      policy[i] = sums[kSumPolicy];
      length[i] = sums[kSumLength];
      out.valid = out.valid || length[i] > 0;
      static_cast<T*>(a.rewards)[begin + i] = T(s[i]);
    }
    const List<double> x{s, r, aux, count};
    const ListHead<double> head = list_head(p, x);
    for (int i = 0; i < count; ++i) aux[i] = list_aux(p, x, head, i);
    ListItem<double> total{};
    for (int i = 0; i < count; ++i) {
      const ListItem<double> item = list_item(p, x, head, i);
      slopes[size_t(begin + i)] = item.slope * d_score[i];
      total.value += item.value;
      total.pairs += item.pairs;
      total.correct += item.correct;
      total.margin += item.margin;
      if (i == head.best) row(list)[kListTop] = T(item.pairs > 0 && item.correct == item.pairs);
    }
    const double scale = list_scale(p, total.pairs);
    out.term = scale == 0 ? 0 : scale * total.value;
    for (int i = 0; i < count; ++i) slopes[size_t(begin + i)] = scale == 0 ? 0 : scale * slopes[size_t(begin + i)];
    if (count) {
      out.nll = p.sft_weight == 0 ? 0 : -list_sft_weight(p, count) * policy[head.best];
      out.tokens = length[head.best];
    } else {
      row(list)[kListTop] = 0;
    }
    if (p.drop_nonfinite && !(head.finite && is_finite(out.term) && is_finite(out.nll))) out.valid = false;
    row(list)[kListValid] = T(out.valid);
    row(list)[kListPairs] = T(total.pairs);
    row(list)[kListCorrect] = T(total.correct);
    row(list)[kListMargin] = T(total.margin);
    row(list)[kListBest] = T(head.best);
    row(list)[kListWorst] = T(head.worst);
  }

  void normalise() {
    double local = 0, sft_tokens = 0, total = 0;
    for (const Result& r : results) {
      local += r.valid;
      sft_tokens += r.valid ? r.tokens : 0;
    }
    const double lists = a.num_items ? at(a.num_items, 0) : local, norm = pair_divisor(p, lists);
    if (a.num_sft_tokens) sft_tokens = at(a.num_sft_tokens, 0);
    for (int64_t list = 0; list < a.lists; ++list) {
      const Result& r = results[size_t(list)];
      const int64_t begin = a.list_offsets[list], end = a.list_offsets[list + 1];
      const double sft_norm = sft_divisor(p, lists, local, sft_tokens, r.tokens);
      const double term = r.valid ? r.term / norm : 0, nll = r.valid ? r.nll / sft_norm : 0;
      for (int64_t i = begin; i < end; ++i) {
        double slope = slopes[size_t(i)] / norm;
        if (i - begin == int64_t(row(list)[kListBest]) && p.sft_weight != 0) slope -= list_sft_weight(p, int(end - begin)) / sft_norm;
        static_cast<T*>(a.slopes)[i] = T(r.valid ? slope : 0);
      }
      row(list)[kListTerm] = T(term);
      row(list)[kListNll] = T(nll);
      static_cast<T*>(a.list_loss)[list] = T(term + nll);
      total += term + nll;
    }
    *static_cast<T*>(a.loss) = T(total);
  }

  void run() {
#pragma omp parallel for schedule(dynamic) if (a.lists > kSerialLists)
    for (int64_t list = 0; list < a.lists; ++list) evaluate(list);
    normalise();
  }
};

}  // namespace

void listwise_fwd(const ListwiseArgs& a) { a.dtype == kFloat64 ? Forward<double>{a}.run() : Forward<float>{a}.run(); }

}  // namespace cpu
}  // namespace fastalign
