// Kernels over per-token scalars for any CPU, and those in fp64.
#define FA_HD inline __attribute__((always_inline))
#include "cpu/tokens_impl.h"

namespace fastalign {
namespace cpu {

const TokenKernels<float> generic_tokens = kTokenKernels<float>;
const TokenKernels<double> generic_tokens64 = kTokenKernels<double>;

}  // namespace cpu
}  // namespace fastalign
