// Policy kernels for AVX-512 (F, BW, DQ, VL): compiled with those flags, called only after cpuid has shown them.
#if defined(__x86_64__)
#define FA_HD inline __attribute__((always_inline))
#include "cpu/policy_impl.h"

namespace fastalign {
namespace cpu {

const PolicyKernels<float> avx512_policy = kPolicyKernels<float>;

}  // namespace cpu
}  // namespace fastalign
#endif
