// Sums over the tokens of one sequence, in double, by independent lanes: fast because no addition waits for the one before it, and the same
// on every instruction set and for every thread count because the lanes and their folding order are fixed.
#pragma once
#include <cstdint>

namespace fastalign {
namespace cpu {

// Below these numbers of tokens, waking the other threads costs more than the work: about 0.3 ns per token where the tokens of a sequence count
// alike (0.4 ns from memory), ten times as much where each needs a look of its own.
constexpr int64_t kSerialUniform = 1 << 16, kSerialTokens = 1 << 15;

struct LaneSums {
  double x, difference;  // sum of x; sum of x - y_scale * y, where equal infinities differ by 0
  int64_t count;  // tokens that the mask keeps
};

// `sum_lanes` of TokenKernels (tokens.h). y and mask may be null. Masked tokens are selected away, whatever they hold.

}  // namespace cpu
}  // namespace fastalign
