// Which instruction set the CPU row kernels run with: chosen once at load by cpuid, overridable for tests.
#pragma once
#include <string>
#include <vector>

namespace fastalign {
namespace cpu {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

Isa isa();
std::string isa_name();
std::vector<std::string> available_isas();   // those this machine can run, best first
void set_isa(const std::string& name);       // "auto" restores the choice by cpuid; an unavailable one throws

}  // namespace cpu
}  // namespace fastalign
