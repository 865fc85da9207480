// The fp64 row kernels, the same on any CPU.
#include "cpu/simd_generic.h"

namespace fastalign {
namespace cpu {
namespace {

RowState<double> forward_double(int, const void* x, int64_t n, const RowTransform<double>& f, int sums) {
  return forward_any<Simd<double>, double>(x, n, f, sums);
}
void backward_double(int, const void* x, void* grad, int64_t n, const RowTransform<double>& f, const GradientRow<double>& g) {
  backward_any<Simd<double>, double>(x, grad, n, f, g);
}
PairState<double> forward_pair_double(int, const void* x, const void* y, int64_t n, const RowTransform<double>& f, int sums) {
  return forward_pair_any<Simd<double>, double>(x, y, n, f, sums);
}
void backward_pair_double(int, const void* x, const void* y, void* grad, int64_t n, const RowTransform<double>& f,
                          const PairGradientRow<double>& g) {
  backward_pair_any<Simd<double>, double>(x, y, grad, n, f, g);
}

}  // namespace

const RowKernels<double> generic_rows64{forward_double,       backward_double,     forward_pair_double,
                                        backward_pair_double, one_u<Simd<double>>, one_exp2<Simd<double>>};

}  // namespace cpu
}  // namespace fastalign
