// The only pybind11 file: argument structs are filled field by field from Python and handed to the CPU or CUDA op.
// Compiled for fastalign/_C (FA_WITH_CPU, FA_WITH_CUDA when nvcc was found) and for the test emulator (FA_WITH_CUDA only).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#include "cpu/isa.h"
#include "math/list.h"
#include "math/pair.h"
#include "math/policy.h"
#include "math/row_state.h"
#include "names.h"
#include "ops.h"

namespace py = pybind11;
using namespace fastalign;

namespace {

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (data, rows, inner, stride_outer, stride_inner, vocab)
using RowsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
RowsView rows_view(const RowsTuple& t) {
  return {ptr<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t)};
}
using PairTuple = std::pair<uintptr_t, int64_t>;
PairTensor pair_tensor(const PairTuple& t) { return {ptr<void>(t.first), t.second}; }

void check_params(const std::vector<double>& scalars, const std::vector<int>& switches, int scalar_count = kPairScalars,
                  int switch_count = kPairSwitches) {
  if (scalars.size() != size_t(scalar_count) || switches.size() != size_t(switch_count))
    throw std::invalid_argument("fastalign: the parameters of a loss in Python and those in csrc/math differ; rebuild the extension");
}

// Arguments that come as one tuple, since one op takes two sets of them: Arguments<decltype(f)> is the tuple that std::apply(f, ...) takes.
template <class F> struct ArgumentsOf;
template <class R, class... A> struct ArgumentsOf<R(A...)> { using type = std::tuple<std::decay_t<A>...>; };
template <class F> using Arguments = typename ArgumentsOf<F>::type;

// clang-format off: argument lists, which it would set one name per line
RowArgs row_args(RowsTuple logits, RowsTuple ref, int dtype, uintptr_t labels, int64_t targets, uintptr_t mask, int64_t ignore_index,
                 double factor, double cap_scale, uintptr_t temperature_ptr, double temperature, int64_t vocab_start, int64_t vocab_total) {
  return {rows_view(logits), rows_view(ref), dtype, ptr<int64_t>(labels), targets, ptr<uint8_t>(mask), ignore_index, factor, cap_scale,
          ptr<void>(temperature_ptr), temperature, vocab_start, vocab_total};
}
using RowTuple = Arguments<decltype(row_args)>;
TokenStatsArgs token_stats_args(const RowTuple& row, int outputs, uintptr_t state_in, uintptr_t target_in, uintptr_t logprob,
                                uintptr_t entropy, uintptr_t logsumexp, uintptr_t log_sum_sq, uintptr_t mean_logit, uintptr_t is_top1,
                                uintptr_t ref_logprob, uintptr_t kl_policy_ref, uintptr_t kl_ref_policy, uintptr_t state, uintptr_t target) {
  return {std::apply(row_args, row), outputs, ptr<void>(state_in), ptr<void>(target_in), ptr<void>(logprob), ptr<void>(entropy),
          ptr<void>(logsumexp), ptr<void>(log_sum_sq), ptr<void>(mean_logit), ptr<void>(is_top1), ptr<void>(ref_logprob),
          ptr<void>(kl_policy_ref), ptr<void>(kl_ref_policy), ptr<void>(state), ptr<void>(target)};
}
TokenStatsBackwardArgs token_stats_backward_args(const RowTuple& row, RowsTuple grad, uintptr_t state, uintptr_t g_logprob, uintptr_t g_entropy,
                                                 uintptr_t g_logsumexp, uintptr_t g_kl_policy_ref, uintptr_t g_kl_ref_policy) {
  return {std::apply(row_args, row), rows_view(grad), ptr<void>(state), ptr<void>(g_logprob), ptr<void>(g_entropy), ptr<void>(g_logsumexp),
          ptr<void>(g_kl_policy_ref), ptr<void>(g_kl_ref_policy)};
}
// clang-format on

// device < 0: CPU. Otherwise the CUDA op on that device and stream. The GIL is released while the op runs.
template <class Args, class Cpu, class Cuda> void dispatch(const Args& a, int device, uintptr_t stream, Cpu cpu_op, Cuda cuda_op) {
  py::gil_scoped_release release;
  if (device < 0) cpu_op(a);
  else cuda_op(a, device, ptr<void>(stream));
}
#ifdef FA_WITH_CPU
#define FA_CPU(name) [](const auto& a) { cpu::name(a); }
#else
#define FA_CPU(name) [](const auto&) { throw std::runtime_error("this build holds no CPU kernels"); }
#endif
#ifdef FA_WITH_CUDA
#define FA_CUDA(name) [](const auto& a, int device, void* stream) { cuda::name(a, device, stream); }
#else
#define FA_CUDA(name) [](const auto&, int, void*) { throw std::runtime_error("this build holds no CUDA kernels"); }
#endif
#define FA_DISPATCH(name) dispatch(a, device, stream, FA_CPU(name), FA_CUDA(name))

py::dict build_info() {
  py::dict d;
#ifdef FA_WITH_CPU
  d["cpu"] = true;
  d["cpu_isa"] = cpu::isa_name();
#else
  d["cpu"] = false;
#endif
#ifdef FA_WITH_CUDA
  d["cuda"] = true;
  d["cuda_archs"] = FA_CUDA_ARCHS;
  d["cuda_compiler"] = FA_CUDA_COMPILER;
#else
  d["cuda"] = false;
#endif
  d["compiler"] = __VERSION__;
  d["version"] = FA_VERSION;
  return d;
}

bool offsets_are_valid(uintptr_t address, int64_t count, int64_t total) {
  const int32_t* offsets = ptr<const int32_t>(address);
  if (!offsets || count < 1 || offsets[0] != 0 || offsets[count - 1] != total) return false;
  for (int64_t i = 1; i < count; ++i)
    if (offsets[i] < offsets[i - 1]) return false;
  return true;
}

std::vector<std::string> pair_scalar_names() {
#define FA_NAME(name) #name,
  return {FA_PAIR_SCALARS(FA_NAME)};
}
std::vector<std::string> pair_switch_names() { return {FA_PAIR_SWITCHES(FA_NAME)}; }
std::vector<std::string> list_scalar_names() { return {FA_LIST_SCALARS(FA_NAME)}; }
std::vector<std::string> list_switch_names() { return {FA_LIST_SWITCHES(FA_NAME)}; }
// Parameters, policy statistics, value statistics.
std::vector<std::vector<std::string>> policy_names() {
  return {{FA_POLICY_SCALARS(FA_NAME) FA_POLICY_SWITCHES(FA_NAME)}, {FA_POLICY_STATS(FA_NAME)}, {FA_VALUE_STATS(FA_NAME)}};
}
#undef FA_NAME

}  // namespace

PYBIND11_MODULE(FA_MODULE, m) {
  m.doc() = "fastalign's compiled kernels; called through fastalign/runtime/ffi.py only";
  m.def("build_info", &build_info);
  m.def("pair_scalar_names", &pair_scalar_names);
  m.def("pair_switch_names", &pair_switch_names);
  m.def("list_scalar_names", &list_scalar_names);
  m.def("list_switch_names", &list_switch_names);
  m.def("policy_names", &policy_names);
  m.def("offsets_are_valid", &offsets_are_valid,
        "whether `count` int32 at an address on the host run from 0 to `total` and never decrease");
#ifdef FA_WITH_CPU
  m.def("set_cpu_isa", &cpu::set_isa, "avx512bf16 | avx512 | avx2 | generic | auto: override the choice made at load");
  m.def("cpu_isas", &cpu::available_isas);
#endif
#ifdef FA_WITH_CUDA
  m.def("set_cluster_size", &cuda::set_cluster_size,
        "blocks per row of token_stats_fwd and token_stats_fused: 1, 2, 4 or 8; 0 restores the choice by row length");
  m.def("set_gae_scheme", &cuda::set_gae_scheme,
        "1: a block per sequence; 2: a block per tile; 0 restores the choice by tokens and sequences");
#endif
#ifdef FA_EMU
  m.def(
      "_emu_last_launch", [] { return std::make_tuple(emu::machine.last.cluster, emu::machine.last.threads, emu::machine.last.shared); },
      "(blocks per cluster, threads and bytes of shared memory per block)");
  m.def("_emu_set_seed", [](unsigned seed) { emu::machine.seed = seed; }, "another seed, another interleaving of the emulated threads");
#endif
  // clang-format off: argument lists, which it would set one name per line
  m.def("token_stats_fwd", [](int device, uintptr_t stream, const Arguments<decltype(token_stats_args)>& t) {
    const TokenStatsArgs a = std::apply(token_stats_args, t);
    FA_DISPATCH(token_stats_fwd);
  });
  m.def("token_stats_bwd", [](int device, uintptr_t stream, const Arguments<decltype(token_stats_backward_args)>& t) {
    const TokenStatsBackwardArgs a = std::apply(token_stats_backward_args, t);
    FA_DISPATCH(token_stats_bwd);
  });
  m.def("token_stats_fused", [](int device, uintptr_t stream, const Arguments<decltype(token_stats_args)>& forward,
                                const Arguments<decltype(token_stats_backward_args)>& backward) {
    const TokenStatsFusedArgs a{std::apply(token_stats_args, forward), std::apply(token_stats_backward_args, backward)};
    FA_DISPATCH(token_stats_fused);
  });
  m.def("scale_rows", [](int device, uintptr_t stream, RowsTuple x, int dtype, uintptr_t scale) {
    ScaleRowsArgs a{rows_view(x), dtype, ptr<void>(scale)};
    FA_DISPATCH(scale_rows);
  });
  m.def("sequence_sum_fwd", [](int device, uintptr_t stream, uintptr_t x, uintptr_t cu_seqlens, int64_t tokens, int64_t sequences, int dtype,
                               uintptr_t mask, uintptr_t weights, uintptr_t sums, uintptr_t counts) {
    SequenceSumArgs a{ptr<void>(x), ptr<int32_t>(cu_seqlens), tokens, sequences, dtype, ptr<uint8_t>(mask), ptr<void>(weights), ptr<void>(sums),
                      ptr<void>(counts)};
    FA_DISPATCH(sequence_sum_fwd);
  });
  m.def("sequence_sum_bwd", [](int device, uintptr_t stream, uintptr_t grad, uintptr_t cu_seqlens, int64_t tokens, int64_t sequences, int dtype,
                               uintptr_t mask, uintptr_t weights, uintptr_t grad_x) {
    SequenceSumBackwardArgs a{ptr<void>(grad), ptr<int32_t>(cu_seqlens), tokens, sequences, dtype, ptr<uint8_t>(mask), ptr<void>(weights),
                              ptr<void>(grad_x)};
    FA_DISPATCH(sequence_sum_bwd);
  });
  m.def("kl_estimate_fwd", [](int device, uintptr_t stream, uintptr_t logprobs, uintptr_t ref_logprobs, int64_t n, int dtype, int kind,
                              uintptr_t value, uintptr_t slope) {
    KlEstimateArgs a{ptr<void>(logprobs), ptr<void>(ref_logprobs), n, dtype, kind, ptr<void>(value), ptr<void>(slope)};
    FA_DISPATCH(kl_estimate_fwd);
  });
  m.def("preference_fwd", [](int device, uintptr_t stream, uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t kl, uintptr_t cu_seqlens,
                             int64_t tokens, int64_t sequences, int64_t pairs, uintptr_t pair_index, uintptr_t mask, uintptr_t weights, int dtype,
                             PairTuple beta, PairTuple omega, PairTuple soft_label, PairTuple gamma_ext, PairTuple target, PairTuple anchor,
                             uintptr_t valid, uintptr_t num_items, uintptr_t num_sft_tokens, const std::vector<double>& scalars,
                             const std::vector<int>& switches, int stages, uintptr_t sums, uintptr_t loss, uintptr_t pair_loss, uintptr_t table,
                             uintptr_t counter) {
    check_params(scalars, switches);
    PreferenceArgs a{ptr<void>(logprobs), ptr<void>(ref_logprobs), ptr<void>(kl), ptr<int32_t>(cu_seqlens), tokens, sequences, pairs,
                     ptr<int32_t>(pair_index), ptr<uint8_t>(mask), ptr<void>(weights), dtype, pair_tensor(beta), pair_tensor(omega),
                     pair_tensor(soft_label), pair_tensor(gamma_ext), pair_tensor(target), pair_tensor(anchor), ptr<uint8_t>(valid),
                     ptr<void>(num_items), ptr<void>(num_sft_tokens), scalars.data(), switches.data(), stages, ptr<void>(sums), ptr<void>(loss),
                     ptr<void>(pair_loss), ptr<void>(table), ptr<uint32_t>(counter)};
    FA_DISPATCH(preference_fwd);
  });
  m.def("preference_bwd", [](int device, uintptr_t stream, uintptr_t grad, int64_t grad_stride, uintptr_t logprobs, uintptr_t ref_logprobs,
                             uintptr_t cu_seqlens, int64_t tokens, int64_t sequences, int64_t pairs, uintptr_t pair_index, uintptr_t mask,
                             uintptr_t weights, int dtype, const std::vector<double>& scalars, const std::vector<int>& switches, uintptr_t sums,
                             uintptr_t table, uintptr_t grad_logprobs, uintptr_t grad_kl) {
    check_params(scalars, switches);
    PreferenceBackwardArgs a{ptr<void>(grad), grad_stride, ptr<void>(logprobs), ptr<void>(ref_logprobs), ptr<int32_t>(cu_seqlens), tokens,
                             sequences, pairs, ptr<int32_t>(pair_index), ptr<uint8_t>(mask), ptr<void>(weights), dtype, scalars.data(),
                             switches.data(), ptr<void>(sums), ptr<void>(table), ptr<void>(grad_logprobs), ptr<void>(grad_kl)};
    FA_DISPATCH(preference_bwd);
  });
  m.def("gae_fwd", [](int device, uintptr_t stream, uintptr_t rewards, uintptr_t values, uintptr_t cu_seqlens, int64_t tokens, int64_t sequences,
                      int dtype, uintptr_t mask, uintptr_t bootstrap, uintptr_t gamma_ptr, uintptr_t lam_ptr, double gamma, double lam,
                      uintptr_t advantages, uintptr_t returns, uintptr_t moments, uintptr_t workspace, uintptr_t counter) {
    GaeArgs a{ptr<void>(rewards), ptr<void>(values), ptr<int32_t>(cu_seqlens), tokens, sequences, dtype, ptr<uint8_t>(mask),
              ptr<void>(bootstrap), ptr<void>(gamma_ptr), ptr<void>(lam_ptr), gamma, lam, ptr<void>(advantages), ptr<void>(returns),
              ptr<void>(moments), ptr<void>(workspace), ptr<uint32_t>(counter)};
    FA_DISPATCH(gae_fwd);
  });
  m.def("listwise_fwd", [](int device, uintptr_t stream, uintptr_t sums, int64_t sequences, uintptr_t list_offsets, int64_t lists,
                           uintptr_t scores, int dtype, PairTuple beta, uintptr_t num_items, uintptr_t num_sft_tokens,
                           const std::vector<double>& scalars, const std::vector<int>& switches, uintptr_t loss, uintptr_t list_loss,
                           uintptr_t slopes, uintptr_t rewards, uintptr_t table, uintptr_t counter) {
    check_params(scalars, switches, kListScalars, kListSwitches);
    ListwiseArgs a{ptr<void>(sums), sequences, ptr<int32_t>(list_offsets), lists, ptr<void>(scores), dtype, pair_tensor(beta),
                   ptr<void>(num_items), ptr<void>(num_sft_tokens), scalars.data(), switches.data(), ptr<void>(loss), ptr<void>(list_loss),
                   ptr<void>(slopes), ptr<void>(rewards), ptr<void>(table), ptr<uint32_t>(counter)};
    FA_DISPATCH(listwise_fwd);
  });
  m.def("policy_fwd", [](int device, uintptr_t stream, uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t cu_seqlens,
                         int64_t tokens, int64_t sequences, uintptr_t mask, uintptr_t ref_logprobs, uintptr_t entropy, uintptr_t is_weight,
                         int dtype, uintptr_t kl_coef, uintptr_t entropy_coef, uintptr_t num_items, const std::vector<double>& scalars,
                         const std::vector<int>& switches, uintptr_t loss, uintptr_t slopes, uintptr_t entropy_slopes, uintptr_t stats,
                         uintptr_t rows, uintptr_t counter) {
    check_params(scalars, switches, kPolicyScalars, kPolicySwitches);
    PolicyArgs a{ptr<void>(logprobs), ptr<void>(old_logprobs), ptr<void>(advantages), ptr<int32_t>(cu_seqlens), tokens, sequences,
                 ptr<uint8_t>(mask), ptr<void>(ref_logprobs), ptr<void>(entropy), ptr<void>(is_weight), dtype, ptr<void>(kl_coef),
                 ptr<void>(entropy_coef), ptr<void>(num_items), scalars.data(), switches.data(), ptr<void>(loss), ptr<void>(slopes),
                 ptr<void>(entropy_slopes), ptr<void>(stats), ptr<void>(rows), ptr<uint32_t>(counter)};
    FA_DISPATCH(policy_fwd);
  });
  m.def("value_fwd", [](int device, uintptr_t stream, uintptr_t values, uintptr_t old_values, uintptr_t returns, uintptr_t cu_seqlens,
                        int64_t tokens, int64_t sequences, uintptr_t mask, int dtype, uintptr_t num_items, double clip, int aggregation,
                        double norm_length, uintptr_t loss, uintptr_t slopes, uintptr_t stats, uintptr_t rows, uintptr_t counter) {
    ValueArgs a{ptr<void>(values), ptr<void>(old_values), ptr<void>(returns), ptr<int32_t>(cu_seqlens), tokens, sequences, ptr<uint8_t>(mask),
                dtype, ptr<void>(num_items), clip, aggregation, norm_length, ptr<void>(loss), ptr<void>(slopes), ptr<void>(stats),
                ptr<void>(rows), ptr<uint32_t>(counter)};
    FA_DISPATCH(value_fwd);
  });
  m.def("policy_bwd", [](int device, uintptr_t stream, uintptr_t grad, uintptr_t slopes, uintptr_t entropy_slopes, uintptr_t stats,
                         int64_t tokens, int dtype, uintptr_t grad_logprobs, uintptr_t grad_entropy) {
    PolicyBackwardArgs a{ptr<void>(grad), ptr<void>(slopes), ptr<void>(entropy_slopes), ptr<void>(stats), tokens, dtype,
                         ptr<void>(grad_logprobs), ptr<void>(grad_entropy)};
    FA_DISPATCH(policy_bwd);
  });
  // clang-format on
  py::dict numbers;  // columns, widths and codes, by the names of csrc/math
  for (const auto& [name, value] : kNumbers) numbers[name] = value;
  m.attr("numbers") = numbers;
}
