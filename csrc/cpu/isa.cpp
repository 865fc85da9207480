#include "cpu/isa.h"
#include <atomic>
#include <stdexcept>
#include "cpu/rows.h"
#include "cpu/tokens.h"

namespace fastalign {
namespace cpu {
namespace {

bool available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These ask the operating system too: registers it does not save do not count.
  if (isa == kAvx512Bf16) return available(kAvx512) && __builtin_cpu_supports("avx512bf16");
  if (isa == kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (isa == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == kGeneric;
}

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};
constexpr Isa kBestFirst[] = {kAvx512Bf16, kAvx512, kAvx2, kGeneric};

Isa best() {
  for (Isa isa : kBestFirst)
    if (available(isa)) return isa;
  return kGeneric;
}

std::atomic<Isa> current{best()};

}  // namespace

Isa isa() { return current; }

std::string isa_name() { return kNames[isa()]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kBestFirst)
    if (available(isa)) names.push_back(kNames[isa]);
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") {
    current = best();
    return;
  }
  std::string legal = "auto";
  for (Isa isa : kBestFirst) {
    if (!available(isa)) continue;
    if (name == kNames[isa]) {
      current = isa;
      return;
    }
    legal += std::string(", ") + kNames[isa];
  }
  throw std::invalid_argument("fastalign: cannot run the CPU kernels with '" + name + "'; this machine has: " + legal);
}

template <> const RowKernels<float>& row_kernels<float>() {
#if defined(__x86_64__)
  if (isa() == kAvx512Bf16) return avx512bf16_rows;
  if (isa() == kAvx512) return avx512_rows;
  if (isa() == kAvx2) return avx2_rows;
#endif
  return generic_rows;
}

template <> const RowKernels<double>& row_kernels<double>() { return generic_rows64; }

template <> const TokenKernels<float>& token_kernels<float>() {
#if defined(__x86_64__)
  if (isa() == kAvx512Bf16 || isa() == kAvx512) return avx512_tokens;
  if (isa() == kAvx2) return avx2_tokens;
#endif
  return generic_tokens;
}
template <> const TokenKernels<double>& token_kernels<double>() { return generic_tokens64; }

}  // namespace cpu
}  // namespace fastalign
