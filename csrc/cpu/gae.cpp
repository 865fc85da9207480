// Generalised advantage estimation over packed sequences (math/affine.h). A sequence is walked once, from its end, by one thread; the
// sequences' moments are merged in order: no result depends on the thread count. X is carried from token to token in double.
#include "cpu/tokens.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialTokens = 1 << 15;  // below this, waking threads costs more than the work

template <class T> double scalar(const void* tensor, double otherwise) {
  return tensor ? double(*static_cast<const T*>(tensor)) : otherwise;
}

template <class T> void forward(const GaeArgs& a) {
  const GaeStep<double> step = gae_step(scalar<T>(a.gamma_ptr, a.gamma), scalar<T>(a.lam_ptr, a.lam));
  auto* parts = static_cast<Moments<double>*>(a.workspace);
  const auto walk = token_kernels<T>().walk;
#pragma omp parallel for schedule(guided) if (a.tokens > kSerialTokens)
  for (int64_t s = a.sequences - 1; s >= 0; --s)  // from the end, so that memory is read in one direction
    parts[s] = walk(a, step, s);

  double count = 0, weighted = 0, m2 = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    count += parts[s].count;
    weighted += parts[s].count * parts[s].mean;
  }
  const double mean = merged_mean(count, weighted);
  for (int64_t s = 0; s < a.sequences; ++s) m2 += moved_m2(parts[s], mean);
  T* moments = static_cast<T*>(a.moments);
  moments[0] = T(count);
  moments[1] = T(mean);
  moments[2] = T(m2);
}

}  // namespace

void gae_fwd(const GaeArgs& a) { a.dtype == kFloat64 ? forward<double>(a) : forward<float>(a); }

}  // namespace cpu
}  // namespace fastalign
