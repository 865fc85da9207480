// Row kernels for any CPU.
#include "cpu/simd_generic.h"

namespace fastalign {
namespace cpu {

const RowKernels<float> generic_rows{forward_rows<Simd<float>>,       backward_rows<Simd<float>>, forward_pair_rows<Simd<float>>,
                                     backward_pair_rows<Simd<float>>, one_u<Simd<float>>,         one_exp2<Simd<float>>};

}  // namespace cpu
}  // namespace fastalign
