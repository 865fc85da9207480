// x *= a number that only the device knows, which is 1 as a rule: then nothing is touched. A gradient of 0 stays 0 (times_slope).
#include "cuda/row.cuh"
#include "cuda/vector.cuh"

namespace fastalign {
namespace cuda {
namespace {

template <class T> __global__ void __launch_bounds__(kRowThreads) scale_rows_kernel(ScaleRowsArgs a, unsigned chunks, int chunk) {
  const float by = *static_cast<const float*>(a.scale);
  if (by == 1) return;
  const int64_t row = int64_t(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  if (row >= a.x.rows) return;
  constexpr int L = kLanes<T>;
  T* x = row_pointer<T>(a.x, row);
  const int part = int(blockIdx.x % chunks), vocab = int(a.x.vocab);
  const RowVectors<T> vectors(x, vocab, int((reinterpret_cast<uintptr_t>(x) & 15) / sizeof(T)));
  const int begin = vectors.first + part * chunk, end = min(begin + chunk, vectors.last);
  for (int i = begin + bundle_start<kUnroll>(threadIdx.x); i < end; i += kUnroll * int(blockDim.x)) {
    uint4 v[kUnroll];
    const unsigned loaded = vectors.fetch(i, end, v);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (!(loaded >> k & 1)) continue;
      float lanes[L];
      unpack(v[k], lanes, T{});
#pragma unroll
      for (int l = 0; l < L; ++l) lanes[l] = times_slope(by, lanes[l]);
      store16(x + vectors.element(i + k * int(kWarp)), pack(lanes, T{}));
    }
  }
  if (part > 0) return;
  const int inner = vectors.element(vectors.first), inner_end = inner + (vectors.last - vectors.first) * L;
  for_each_end(vocab, inner, inner_end, [&](int e) { from_acc(times_slope(by, to_acc(x[e])), x + e); });
}

template <class T> void launch_row_kernel(const ScaleRowsArgs& a, void* stream) {
  const Chunks c = chunks_of(a.x.vocab, kLanes<T>, a.x.vocab * int64_t(sizeof(T)), 2 * kUnroll);
  FA_LAUNCH((scale_rows_kernel<T>), dim3(grid_size(ceil_div(a.x.rows, c.block.y) * c.count, "scale_rows")), c.block, 0, stream, a,
            unsigned(c.count), c.vectors);
}

}  // namespace

void scale_rows(const ScaleRowsArgs& a, int device, void* stream) {
  if (a.x.rows == 0) return;
  const DeviceGuard guard(device);
  with_row_dtype(a.dtype, "scale_rows", [&](auto tag) { launch_row_kernel<decltype(tag)>(a, stream); });
}

}  // namespace cuda
}  // namespace fastalign
