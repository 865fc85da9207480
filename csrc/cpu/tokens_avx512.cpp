// Kernels over per-token scalars for AVX-512 (F, BW, DQ, VL): compiled with those flags, called only after cpuid has shown them.
#if defined(__x86_64__)
#define FA_HD inline __attribute__((always_inline))
#include "cpu/tokens_impl.h"

namespace fastalign {
namespace cpu {

const TokenKernels<float> avx512_tokens = kTokenKernels<float>;

}  // namespace cpu
}  // namespace fastalign
#endif
