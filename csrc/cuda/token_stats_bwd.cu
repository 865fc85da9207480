// Gradient of the row ops: one elementwise pass over the rows, over the logits themselves if asked. With upstream gradients of the KLs the
// reference rows go along; a row without such a gradient never looks at its reference row.
#include "cuda/row_gradient.cuh"

namespace fastalign {
namespace cuda {
namespace {

// The labels' shares of a block's elements where rows have several labels: `extra[e]` of the element begin + e, duplicates of a label
// summed in index order by the thread that has the first of them.
__device__ void scatter_labels(const TokenStatsBackwardArgs& a, int64_t row, float scale, int begin, int count, float* extra) {
  for (int e = int(threadIdx.x); e < count; e += int(blockDim.x)) extra[e] = 0;
  __syncthreads();
  const int64_t* labels = a.labels + row * a.targets;
  for (int64_t k = threadIdx.x; k < a.targets; k += blockDim.x) {
    const int column = local_column(a, labels[k]), place = column - begin;
    if (column < 0 || place < 0 || place >= count) continue;
    bool is_first = true;
    for (int64_t j = 0; j < k; ++j) is_first &= labels[j] != labels[k];
    if (!is_first) continue;
    float sum = 0;
    for (int64_t j = k; j < a.targets; ++j)
      if (labels[j] == labels[k]) sum += at(a.g_logprob, row * a.targets + j);
    extra[place] = sum * scale;
  }
  __syncthreads();
}

// kMany: rows have several labels. kRef: there are upstream gradients of KLs.
template <class T, bool kCap, bool kMany, bool kRef>
__global__ void __launch_bounds__(kRowThreads, blocks_per_sm(!kRef   ? 4
                                                             : kMany ? 2
                                                                     : 3))
    token_stats_bwd_kernel(TokenStatsBackwardArgs a, RowScale scale, unsigned chunks, int chunk) {
  FA_DYNAMIC_SHARED(float, extra);
  constexpr int L = kLanes<T>;
  const int64_t row = int64_t(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  if (row >= a.logits.rows) return;  // whole warps, and never with kMany
  const int part = int(blockIdx.x % chunks), vocab = int(a.logits.vocab);
  const T* x = row_pointer<const T>(a.logits, row);
  const T* y = kRef ? row_pointer<const T>(a.ref, row) : x;
  T* out = row_pointer<T>(a.grad, row);
  const int offset = int((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  const RowVectors<T> rows[1] = {RowVectors<T>(x, vocab, offset)};
  int first = rows[0].first, last = rows[0].last;
  RowVectors<T> both[2];
  if (kRef) {
    both[0] = rows[0], both[1] = RowVectors<T>(y, vocab, offset);
    first = max(first, both[1].first), last = max(first, min(last, both[1].last));
  }
  const int begin = first + part * chunk, end = min(begin + chunk, last);
  const int inner_begin = rows[0].element(first), inner_end = inner_begin + (last - first) * L;
  const RowTransform<float> f = scale.transform();
  RowGradient g = RowGradient::without_terms(RowGradient::kZero);
  if (row_labels(a, row).scored) {
    const float* state = static_cast<const float*>(a.state) + row * kStateWidth;
    g = row_gradient<kRef>(a, row, f, load_state(state), kRef ? load_ref(state) : RefState<float>::empty());
  }

  if (g.kind < RowGradient::kRegular) {  // written without reading
    const float value = g.kind == RowGradient::kNan ? NAN : 0.0f;
    fill_vectors(value, rows[0], out, begin, end);
    if (part == 0) for_each_end(vocab, inner_begin, inner_end, [&](int e) { from_acc(value, out + e); });
    return;
  }

  if (g.kind == RowGradient::kFar) {
    write_far<T, kRef>(a, row, g, f, x, y, out, 0, rows[0].element(begin), rows[0].element(end));
    if (part == 0)
      write_far<T, kRef>(a, row, g, f, x, y, out, 0, 0, inner_begin), write_far<T, kRef>(a, row, g, f, x, y, out, 0, inner_end, vocab);
    return;
  }

  const bool labelled = a.g_logprob != nullptr;
  LabelShare<kMany> share{kNoLabel, 0.0f, nullptr};
  if constexpr (kMany) {
    if (labelled) {
      share = {rows[0].element(begin), 0.0f, extra};
      scatter_labels(a, row, g.label_scale, share.label, chunk * L, extra);
    }
  } else {
    if (labelled) share = label_share(a, row, g, 0);
  }
  const bool with_kl = kRef && g.kind == RowGradient::kWithKl;
  if (with_kl) write_vectors<T, kCap, kPolicyRef | kRefPolicy>(g, f, both, out, begin, end, share);
  else write_vectors<T, kCap, 0>(g, f, rows, out, begin, end, share);

  if (part > 0) return;
  for_each_end(vocab, inner_begin, inner_end, [&](int e) {
    float sum = 0;
    for (int64_t k = 0; kMany && labelled && k < a.targets; ++k)
      if (local_column(a, a.labels[row * a.targets + k]) == e) sum += at(a.g_logprob, row * a.targets + k);
    const float own = kMany ? sum * g.label_scale : share(e), value = to_acc(x[e]);
    from_acc(with_kl ? gradient<kCap, true, kPolicyRef | kRefPolicy>(g, f, value, to_acc(y[e]), own)
                     : gradient<kCap, true, 0>(g, f, value, 0.0f, own),
             out + e);
  });
}

template <class T, bool kCap, bool kMany, bool kRef> void launch_row_kernel(const TokenStatsBackwardArgs& a, void* stream) {
  constexpr int kVectors = kUnroll / (kRef ? 2 : 1);
  const int64_t bytes = (kRef ? 2 : 1) * a.logits.vocab * int64_t(sizeof(T));
  // With several labels a chunk is what shared memory holds.
  const Chunks c = chunks_of(a.logits.vocab, kLanes<T>, bytes, (kMany ? 1 : 2) * kVectors, !kMany);
  const size_t shared = kMany ? size_t(c.vectors) * kLanes<T> * sizeof(float) : 0;
  FA_LAUNCH((token_stats_bwd_kernel<T, kCap, kMany, kRef>), dim3(grid_size(ceil_div(a.logits.rows, c.block.y) * c.count, "token_stats")),
            c.block, shared, stream, a, row_scale(a), unsigned(c.count), c.vectors);
}

}  // namespace

void token_stats_bwd(const TokenStatsBackwardArgs& a, int device, void* stream) {
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  const auto with_bool = [](bool value, auto&& f) { value ? f(std::true_type{}) : f(std::false_type{}); };
  with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
    with_bool(a.cap_scale != 0, [&](auto cap) {
      with_bool(a.targets > 1, [&](auto many) {
        with_bool(a.ref.data != nullptr, [&](auto ref) {
          launch_row_kernel<decltype(tag), decltype(cap)::value, decltype(many)::value, decltype(ref)::value>(a, stream);
        });
      });
    });
  });
}

}  // namespace cuda
}  // namespace fastalign
