// The kernels of TokenKernels, as vectors of the compiler's: included by one file per instruction set, each compiled with that set's flags, so
// everything here is private to the including file (the reason is in rows_impl.h). -ffp-contract=off keeps the arithmetic of all of them equal. The
// including file defines FA_HD first.
#pragma once
#include "cpu/gae_impl.h"
#include "cpu/lane_sums_impl.h"
#include "cpu/policy_impl.h"

namespace fastalign {
namespace cpu {
namespace {

template <class T>
constexpr TokenKernels<T> kTokenKernels{measure_policy<T>, run_policy<T>,  measure_value<T>, run_value<T>,
                                        scale<T>,          estimate_kl<T>, gae::walk<T>,     lanes::sum_lanes<T>};

}  // namespace
}  // namespace cpu
}  // namespace fastalign
