// Policy kernels for any CPU, and those in fp64.
#define FA_HD inline __attribute__((always_inline))
#include "cpu/policy_impl.h"

namespace fastalign {
namespace cpu {

const PolicyKernels<float> generic_policy = kPolicyKernels<float>;
const PolicyKernels<double> generic_policy64 = kPolicyKernels<double>;

}  // namespace cpu
}  // namespace fastalign
