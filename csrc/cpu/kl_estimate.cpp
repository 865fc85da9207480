// KL estimators per token; the formulas are kl_estimate in math/scalar.h.
#include "math/scalar.h"
#include "ops.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialTokens = 1 << 12;  // below this, waking threads costs more than the work

template <class T> void forward(const KlEstimateArgs& a) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref_logprobs = static_cast<const T*>(a.ref_logprobs);
  T *value = static_cast<T*>(a.value), *slope = static_cast<T*>(a.slope);
#pragma omp parallel for if (a.n > kSerialTokens)
  for (int64_t i = 0; i < a.n; ++i) {
    const ValueSlope<T> r = kl_estimate(a.kind, logprobs[i], ref_logprobs[i]);
    value[i] = r.value;
    slope[i] = r.slope;
  }
}

}  // namespace

void kl_estimate_fwd(const KlEstimateArgs& a) { a.dtype == kFloat64 ? forward<double>(a) : forward<float>(a); }

}  // namespace cpu
}  // namespace fastalign
