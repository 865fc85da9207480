// KL estimators per token: elementwise.
#include "cuda/launch.h"
#include "math/scalar.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads) kl_estimate_fwd_kernel(KlEstimateArgs a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  const ValueSlope<float> r = kl_estimate(a.kind, static_cast<const float*>(a.logprobs)[i], static_cast<const float*>(a.ref_logprobs)[i]);
  static_cast<float*>(a.value)[i] = r.value;
  if (a.slope) static_cast<float*>(a.slope)[i] = r.slope;
}

}  // namespace

void kl_estimate_fwd(const KlEstimateArgs& a, int device, void* stream) {
  require_float32(a.dtype, "kl_estimate");
  if (a.n == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(kl_estimate_fwd_kernel, dim3(grid_size(ceil_div(a.n, kThreads), "kl_estimate")), dim3(kThreads), 0, stream, a);
}

}  // namespace cuda
}  // namespace fastalign
