// Row kernels for AVX-512 (F, BW, DQ, VL): compiled with those flags, called only after cpuid has shown them.
#if defined(__x86_64__)
#include "cpu/simd_avx512.h"

namespace fastalign {
namespace cpu {

const RowKernels<float> avx512_rows{forward_rows<Simd>,       backward_rows<Simd>, forward_pair_rows<Simd>,
                                    backward_pair_rows<Simd>, one_u<Simd>,         one_exp2<Simd>};

}  // namespace cpu
}  // namespace fastalign
#endif
