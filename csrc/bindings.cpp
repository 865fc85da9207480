// The only pybind11 file: argument structs are filled from tuples, by one list of members each, and handed to the CPU or CUDA op.
// Compiled for fastalign/_C (FA_WITH_CPU, FA_WITH_CUDA when nvcc was found) and for the test emulator (FA_WITH_CUDA only).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <forward_list>
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

// Every argument struct's members in its order: what an op's tuple holds, and the names that Python's order is held against. LIST: the
// parameters of a loss, of which Python gives a list with so many numbers.
#define FIELD(name) f(#name, a.name);
#define LIST(name, count) f(#name, a.name, count);
// clang-format off: lists, which it would set one name per line
template <class F> void members(F& f, RowsView& a) { FIELD(data) FIELD(rows) FIELD(inner) FIELD(stride_outer) FIELD(stride_inner) FIELD(vocab) }
template <class F> void members(F& f, PairTensor& a) { FIELD(data) FIELD(stride) }
template <class F> void members(F& f, RowArgs& a) {
  FIELD(logits) FIELD(ref) FIELD(dtype) FIELD(labels) FIELD(targets) FIELD(mask) FIELD(ignore_index) FIELD(factor) FIELD(cap_scale)
  FIELD(temperature_ptr) FIELD(temperature) FIELD(vocab_start) FIELD(vocab_total)
}
template <class F> void members(F& f, RowResults& a) {
#define ROW_RESULT(bit, name) FIELD(name)
  FA_ROW_RESULTS(ROW_RESULT)
#undef ROW_RESULT
}
template <class F> void members(F& f, TokenStatsArgs& a) {
  members(f, static_cast<RowArgs&>(a));
  members(f, static_cast<RowResults&>(a));
  FIELD(outputs) FIELD(state_in) FIELD(target_in) FIELD(state) FIELD(target)
}
template <class F> void members(F& f, RowStatesMergeArgs& a) {
  FIELD(states) FIELD(part_targets) FIELD(parts) FIELD(rows) FIELD(entries) FIELD(dtype) FIELD(state) FIELD(target)
}
template <class F> void members(F& f, RowStatesFinishArgs& a) {
  members(f, static_cast<RowResults&>(a));
  FIELD(state) FIELD(target) FIELD(rows) FIELD(dtype) FIELD(labels) FIELD(targets) FIELD(mask) FIELD(ignore_index) FIELD(factor)
  FIELD(temperature_ptr) FIELD(temperature) FIELD(vocab_total)
}
template <class F> void members(F& f, TokenStatsBackwardArgs& a) {
  members(f, static_cast<RowArgs&>(a));
  FIELD(grad) FIELD(state) FIELD(g_logprob) FIELD(g_entropy) FIELD(g_logsumexp) FIELD(g_kl_policy_ref) FIELD(g_kl_ref_policy)
}
template <class F> void members(F& f, TokenStatsFusedArgs& a) { FIELD(forward) FIELD(backward) }
template <class F> void members(F& f, ScaleRowsArgs& a) { FIELD(x) FIELD(dtype) FIELD(scale) }
template <class F> void members(F& f, SequenceSumArgs& a) {
  FIELD(x) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(dtype) FIELD(mask) FIELD(weights) FIELD(sums) FIELD(counts)
}
template <class F> void members(F& f, SequenceSumBackwardArgs& a) {
  FIELD(grad) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(dtype) FIELD(mask) FIELD(weights) FIELD(grad_x)
}
template <class F> void members(F& f, KlEstimateArgs& a) {
  FIELD(logprobs) FIELD(ref_logprobs) FIELD(n) FIELD(dtype) FIELD(kind) FIELD(value) FIELD(slope)
}
template <class F> void members(F& f, PreferenceArgs& a) {
  FIELD(logprobs) FIELD(ref_logprobs) FIELD(kl) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(pairs) FIELD(pair_index) FIELD(mask)
  FIELD(weights) FIELD(dtype) FIELD(beta) FIELD(omega) FIELD(soft_label) FIELD(gamma_ext) FIELD(target) FIELD(anchor) FIELD(valid)
  FIELD(num_items) FIELD(num_sft_tokens) LIST(scalars, kPairScalars) LIST(switches, kPairSwitches) FIELD(stages) FIELD(sums) FIELD(loss)
  FIELD(pair_loss) FIELD(table) FIELD(counter)
}
template <class F> void members(F& f, PreferenceBackwardArgs& a) {
  FIELD(grad) FIELD(grad_stride) FIELD(logprobs) FIELD(ref_logprobs) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(pairs)
  FIELD(pair_index) FIELD(mask) FIELD(weights) FIELD(dtype) LIST(scalars, kPairScalars) LIST(switches, kPairSwitches) FIELD(sums) FIELD(table)
  FIELD(grad_logprobs) FIELD(grad_kl)
}
template <class F> void members(F& f, GaeArgs& a) {
  FIELD(rewards) FIELD(values) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(dtype) FIELD(mask) FIELD(bootstrap) FIELD(gamma_ptr)
  FIELD(lam_ptr) FIELD(gamma) FIELD(lam) FIELD(advantages) FIELD(returns) FIELD(moments) FIELD(workspace) FIELD(counter)
}
template <class F> void members(F& f, ListwiseArgs& a) {
  FIELD(sums) FIELD(sequences) FIELD(list_offsets) FIELD(lists) FIELD(scores) FIELD(dtype) FIELD(beta) FIELD(num_items) FIELD(num_sft_tokens)
  LIST(scalars, kListScalars) LIST(switches, kListSwitches) FIELD(loss) FIELD(list_loss) FIELD(slopes) FIELD(rewards) FIELD(table) FIELD(counter)
}
template <class F> void members(F& f, PolicyArgs& a) {
  FIELD(logprobs) FIELD(old_logprobs) FIELD(advantages) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(mask) FIELD(ref_logprobs)
  FIELD(entropy) FIELD(is_weight) FIELD(dtype) FIELD(kl_coef) FIELD(entropy_coef) FIELD(num_items) LIST(scalars, kPolicyScalars)
  LIST(switches, kPolicySwitches) FIELD(loss) FIELD(slopes) FIELD(entropy_slopes) FIELD(stats) FIELD(rows) FIELD(counter)
}
template <class F> void members(F& f, ValueArgs& a) {
  FIELD(values) FIELD(old_values) FIELD(returns) FIELD(cu_seqlens) FIELD(tokens) FIELD(sequences) FIELD(mask) FIELD(dtype) FIELD(num_items)
  FIELD(clip) FIELD(aggregation) FIELD(norm_length) FIELD(loss) FIELD(slopes) FIELD(stats) FIELD(rows) FIELD(counter)
}
template <class F> void members(F& f, PolicyBackwardArgs& a) {
  FIELD(grad) FIELD(slopes) FIELD(entropy_slopes) FIELD(stats) FIELD(tokens) FIELD(dtype) FIELD(grad_logprobs) FIELD(grad_entropy)
}
// clang-format on
#undef FIELD
#undef LIST

// The parameters of a loss while its op runs; a list's elements stay where they are.
struct Lists {
  std::forward_list<std::vector<double>> scalars;
  std::forward_list<std::vector<int>> switches;
};

template <class Args> void fill(Args& a, PyObject* tuple, Lists& lists, const char* op, const char* part = "");

// Takes the items of a tuple, one per member. A conversion that fails leaves Python's error standing: `bind` looks for it once, at the end.
struct Reader {
  PyObject* tuple;
  Lists& lists;
  const char* op;
  Py_ssize_t next = 0;

  PyObject* item() { return PyTuple_GET_ITEM(tuple, next++); }

  template <class T> void operator()(const char*, T*& x) { x = static_cast<T*>(PyLong_AsVoidPtr(item())); }
  void operator()(const char*, int64_t& x) { x = PyLong_AsLongLong(item()); }
  void operator()(const char*, int& x) { x = as_int(item()); }
  void operator()(const char*, double& x) { x = PyFloat_AsDouble(item()); }
  template <class Part> void operator()(const char* name, Part& x) { fill(x, item(), lists, op, name); }
  void operator()(const char*, const double*& x, int count) { x = list(lists.scalars, PyFloat_AsDouble, count); }
  void operator()(const char*, const int*& x, int count) { x = list(lists.switches, as_int, count); }

 private:
  static int as_int(PyObject* object) {
    const long x = PyLong_AsLong(object);
    if (x != int(x)) PyErr_SetString(PyExc_OverflowError, "fastalign: an integer does not fit into 32 bits");
    return int(x);
  }
  template <class T> const T* list(std::forward_list<std::vector<T>>& kept, T (*convert)(PyObject*), int count) {
    PyObject* object = item();
    if (!PyList_Check(object) || PyList_GET_SIZE(object) != count)
      throw std::invalid_argument("fastalign: the parameters of a loss in Python and those in csrc/math differ; rebuild the extension");
    std::vector<T>& values = kept.emplace_front(count);
    for (int i = 0; i < count; ++i) values[i] = convert(PyList_GET_ITEM(object, i));
    return values.data();
  }
};

struct Counter {
  Py_ssize_t count = 0;
  template <class... Member> void operator()(const Member&...) { ++count; }
};

struct Names {
  py::list names;
  template <class... Member> void operator()(const char* name, const Member&...) { names.append(name); }
};

template <class Args> void fill(Args& a, PyObject* tuple, Lists& lists, const char* op, const char* part) {
  Counter counter;
  members(counter, a);
  const Py_ssize_t given = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : -1;
  if (given != counter.count)
    throw std::invalid_argument("fastalign: " + std::string(op) + (*part ? "." : "") + part + " takes a tuple of " +
                                std::to_string(counter.count) + (given < 0 ? " and got none" : " and got " + std::to_string(given)) +
                                "; Python and csrc/ops.h differ, rebuild the extension");
  Reader reader{tuple, lists, op};
  members(reader, a);
}

template <class Args> py::list names_of() {
  Args a{};
  Names names;
  members(names, a);
  return names.names;
}

// A function (device, stream, tuple of arguments). device < 0: CPU. Otherwise the CUDA op on that device and stream. The GIL is released
// while the op runs. A null pointer is an op that this build does not hold.
template <class Args> using CpuOp = void (*)(const Args&);
template <class Args> using CudaOp = void (*)(const Args&, int, void*);
template <class Args> void bind(py::module_& m, py::dict& names, const char* op, CpuOp<Args> cpu_op, CudaOp<Args> cuda_op) {
  names[op] = names_of<Args>();
  m.def(op, [op, cpu_op, cuda_op](int device, uintptr_t stream, const py::tuple& arguments) {
    Args a{};
    Lists lists;
    fill(a, arguments.ptr(), lists, op);
    if (PyErr_Occurred()) throw py::error_already_set();
    if (device < 0 ? !cpu_op : !cuda_op)
      throw std::runtime_error(device < 0 ? "this build holds no CPU kernels" : "this build holds no CUDA kernels");
    py::gil_scoped_release release;
    if (device < 0) cpu_op(a);
    else cuda_op(a, device, ptr<void>(stream));
  });
}
#ifdef FA_WITH_CPU
#define FA_CPU(name) cpu::name
#else
#define FA_CPU(name) nullptr
#endif
#ifdef FA_WITH_CUDA
#define FA_CUDA(name) cuda::name
#else
#define FA_CUDA(name) nullptr
#endif

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
  // By op, and by the structs that stand in several ops' arguments.
  py::dict names;
  names["RowsView"] = names_of<RowsView>();
  names["PairTensor"] = names_of<PairTensor>();
#define FA_BIND(name, Args) bind<Args>(m, names, #name, FA_CPU(name), FA_CUDA(name));
  FA_OPS(FA_BIND)
#undef FA_BIND
  m.attr("argument_names") = names;
  py::dict numbers;  // columns, widths and codes, by the names of csrc/math
  for (const auto& [name, value] : kNumbers) numbers[name] = value;
  m.attr("numbers") = numbers;
}
