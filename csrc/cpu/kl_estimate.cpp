// KL estimators per token; the formulas are kl_estimate in math/scalar.h, the loop over tokens is in policy_impl.h.
#include "cpu/tokens.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kTile = 1 << 14;           // tokens that a thread takes at a time
constexpr int64_t kSerialTokens = 1 << 15;   // below this, waking threads costs more than the work

template <class T> void forward(const KlEstimateArgs& a) {
  const T *logprobs = static_cast<const T*>(a.logprobs), *ref_logprobs = static_cast<const T*>(a.ref_logprobs);
  T *value = static_cast<T*>(a.value), *slope = static_cast<T*>(a.slope);
  const TokenKernels<T>& kernels = token_kernels<T>();
#pragma omp parallel for if (a.n > kSerialTokens)
  for (int64_t i = 0; i < a.n; i += kTile) {
    const int64_t n = a.n - i < kTile ? a.n - i : kTile;
    kernels.estimate_kl(a.kind, logprobs + i, ref_logprobs + i, n, value + i, slope ? slope + i : nullptr);
  }
}

}  // namespace

void kl_estimate_fwd(const KlEstimateArgs& a) { a.dtype == kFloat64 ? forward<double>(a) : forward<float>(a); }

}  // namespace cpu
}  // namespace fastalign
