// Generalised advantage estimation over packed sequences (math/affine.h). A sequence is walked once, from its end, by one thread, in double;
// the sequences' moments are merged in order: no result depends on the thread count.
#include "math/affine.h"
#include "math/moments.h"
#include "ops.h"

namespace fastalign {
namespace cpu {
namespace {

constexpr int64_t kSerialTokens = 1 << 13;  // below this, waking threads costs more than the work

template <class T> double scalar(const void* tensor, double otherwise) {
  return tensor ? double(*static_cast<const T*>(tensor)) : otherwise;
}

template <class T> Moments<double> walk(const GaeArgs& a, const GaeStep<double>& step, int64_t s) {
  const T *rewards = static_cast<const T*>(a.rewards), *values = static_cast<const T*>(a.values);
  T *advantages = static_cast<T*>(a.advantages), *returns = static_cast<T*>(a.returns);
  MomentSums<double> seen;
  double x = a.bootstrap ? double(static_cast<const T*>(a.bootstrap)[s]) : 0.0;
  for (int64_t t = a.cu_seqlens[s + 1]; t-- > a.cu_seqlens[s];) {
    if (a.mask && !a.mask[t]) {
      advantages[t] = returns[t] = T(0);
      continue;
    }
    const double reward = double(rewards[t]), value = double(values[t]);
    const double target = step.returns(reward, x), advantage = target - value;
    returns[t] = T(target);
    advantages[t] = T(advantage);
    seen.push(advantage);
    x = step.map(reward, value)(x);
  }
  return seen.moments();
}

template <class T> void forward(const GaeArgs& a) {
  const GaeStep<double> step{scalar<T>(a.gamma_ptr, a.gamma), scalar<T>(a.lam_ptr, a.lam)};
  auto* parts = static_cast<Moments<double>*>(a.workspace);
#pragma omp parallel for schedule(dynamic) if (a.tokens > kSerialTokens)
  for (int64_t s = 0; s < a.sequences; ++s) parts[s] = walk<T>(a, step, s);

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
