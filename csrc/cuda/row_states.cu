// Row states without their logits: merged, a thread for each; finished, a warp for each.
#include "cuda/row.cuh"
#include "row_results.h"

namespace fastalign {
namespace cuda {
namespace {

constexpr unsigned kThreads = 256;

__global__ void __launch_bounds__(kThreads) row_states_merge_kernel(RowStatesMergeArgs a) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.rows) merge_row_states(static_cast<const float*>(a.states), a.parts, a.rows, i, static_cast<float*>(a.state) + i * kStateWidth);
  if (a.part_targets && i < a.entries) put(a.target, i, merge_targets(static_cast<const float*>(a.part_targets), a.parts, a.entries, i));
}

__global__ void __launch_bounds__(kThreads) row_states_finish_kernel(RowStatesFinishArgs a, RowScale scale) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  const unsigned lane = threadIdx.x;
  const RowLabels labels = row_labels(a, row);
  if (!labels.scored) {
    for (int64_t k = lane; k < a.targets; k += kWarp) write_no_logprob<float>(a, row, k);
    if (lane == 0) write_no_statistics<float>(a, row);
    return;
  }
  const RowTransform<float> f = scale.transform();
  const float *state = static_cast<const float*>(a.state) + row * kStateWidth, *target = static_cast<const float*>(a.target);
  PairState<float> s{load_state(state), load_ref(state)};
  if (labels.bad) spoil(s);
  for (int64_t k = lane; k < a.targets; k += kWarp) {
    write_logprob(a, 0, row, k, s.p, target[row * a.targets + k], f, RowExp2{});
    if (a.ref_logprob) write_logprob(a, 1, row, k, s.r, target[(a.rows + row) * a.targets + k], f, RowExp2{});
  }
  if (lane == 0) write_statistics(a, row, s, f, RowExp2{});
}

}  // namespace

void row_states_merge(const RowStatesMergeArgs& a, int device, void* stream) {
  require_float32(a.dtype, "row_states_merge");
  const int64_t items = a.part_targets && a.entries > a.rows ? a.entries : a.rows;
  if (items == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(row_states_merge_kernel, dim3(grid_size(ceil_div(items, kThreads), "row_states_merge")), dim3(kThreads), 0, stream, a);
}

void row_states_finish(const RowStatesFinishArgs& a, int device, void* stream) {
  require_float32(a.dtype, "row_states_finish");
  if (a.rows == 0) return;
  const DeviceGuard guard(device);
  const RowScale scale{float(a.factor), 0.0f, float(a.temperature), static_cast<const float*>(a.temperature_ptr)};
  const dim3 block(kWarp, kThreads / kWarp);
  FA_LAUNCH(row_states_finish_kernel, dim3(grid_size(ceil_div(a.rows, block.y), "row_states_finish")), block, 0, stream, a, scale);
}

}  // namespace cuda
}  // namespace fastalign
