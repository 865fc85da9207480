// One pass over every vocabulary row, or over a policy row and its reference row at once: the row state (math/row_state.h) and what the
// caller wants finished from it.
//
// A row is served by one warp (short rows), one block, or one cluster of blocks (sm_90 and later), by its length alone: results do not
// depend on what else is in the batch. Warps take turns at stretches of 32 * kUnroll vectors; a lane's vectors of one stretch are a
// bundle: the maximum of the bundle first, one rescale of the running sums, then one exp2 per element. The states of the threads are
// merged by a fixed tree.
#include "cuda/row_sums.cuh"

namespace fastalign {
namespace cuda {
namespace {

template <int kSums> __device__ State<kSums> load_row_state(const float* in) {
  if constexpr ((kSums & kRefRow) != 0) return {load_state(in), load_ref(in)};
  else return load_state(in);
}

// Four blocks per SM leave a thread 64 registers. Two rows, or every sum of one, need more; every sum of two rows, or two capped ones, more
// again.
template <int kSums, bool kCap>
constexpr int kBlocksPerSm = (kSums & kRefRow) && ((kSums & kTop) || kCap) ? 2
                             : kSums & (kTop | kRefRow)                    ? 3
                                                                           : 4;

template <class T, int kSums, bool kCap>
__global__ void __launch_bounds__(kRowThreads, blocks_per_sm(kBlocksPerSm<kSums, kCap>))
    token_stats_fwd_kernel(TokenStatsArgs a, RowScale scale, unsigned cluster) {
  FA_DYNAMIC_SHARED(State<kSums>, partial);
  constexpr int R = kRows<kSums>, N = kUnroll / R;
  const int64_t row = int64_t(blockIdx.x / cluster) * blockDim.y + threadIdx.y;
  if (row >= a.logits.rows) return;  // whole warps: several rows share a block only where a row is a warp
  const unsigned rank = cluster > 1 ? cluster_rank() : 0, thread = threadIdx.x;
  const bool finisher = rank == 0 && thread < kWarp;
  const RowLabels labels = row_labels(a, row);
  if (!labels.scored) {  // never read: the row may hold anything
    if (finisher) write_unscored<kSums>(a, row, thread);
    return;
  }

  const RowTransform<float> f = scale.transform();
  const int vocab = int(a.logits.vocab), count = (vocab + kLanes<T> - 1) / kLanes<T>;
  const T* x[R];
  float first[R];
  RowVectors<T> rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    x[r] = row_pointer<const T>(r ? a.ref : a.logits, row);
    first[r] = finisher && thread < a.targets ? target_u(a, r, row, thread, x[r], f) : 0.0f;
    rows[r] = RowVectors<T>(x[r], vocab, 0);
  }
  const int begin = int(int64_t(count) * rank / cluster), end = int(int64_t(count) * (rank + 1) / cluster);
  State<kSums> s = State<kSums>::empty();
  for (int i = begin + bundle_start<N>(thread); i < end; i += N * int(blockDim.x)) {
    uint4 v[R][N];
    load_bundle(rows, i, end, v);
    push<T, kSums, kCap>(s, v, vocab, i, end, f);
  }
  RowState<float>& p = policy(s);
  if (p.top >= 0) p.top += int(a.vocab_start);
  s = merge_row<kSums>(s, partial, cluster);

  if (!finisher) return;
  const float largest = p.umax;
  if (kCap) p.umax = f.u(largest);  // from here on what row_state.h says
  if (__shfl_sync(kFullMask, int(may_be_far(s, f)), 0)) s = far_state<T, kSums>(s, x, vocab, f);
  p.largest = largest;
  if (thread == 0 && a.state_in)
    s = keep<kSums>(merge_stored(load_row_state<kSums>(static_cast<const float*>(a.state_in) + row * kStateWidth), s));
  if (labels.bad) spoil(s);
  write_row(a, row, thread, s, first, x, f);
}

template <class T, int kSums, bool kCap> void launch_row_kernel(const TokenStatsArgs& a, int device, void* stream) {
  const int64_t bytes = kRows<kSums> * a.logits.vocab * int64_t(sizeof(T));  // to read per row
  const RowShape shape = row_shape(bytes, kRows<kSums>, clusters_supported(token_stats_fwd_kernel<T, kSums, kCap>, device));
  const bool by_warp = shape.threads == kWarp;
  const dim3 block = by_warp ? dim3(kWarp, kRowThreads / kWarp) : dim3(shape.threads);
  const unsigned blocks = grid_size(ceil_div(a.logits.rows, block.y) * shape.cluster, "token_stats");
  const size_t shared = by_warp ? 0 : (block.x / kWarp + 1) * sizeof(State<kSums>);
  FA_LAUNCH_CLUSTER((token_stats_fwd_kernel<T, kSums, kCap>), dim3(blocks), block, shared, shape.cluster, stream, a, row_scale(a),
                    shape.cluster);
}

}  // namespace

void set_cluster_size(int size) {
  if (size != 0 && size != 1 && size != 2 && size != 4 && size != 8)
    throw std::invalid_argument("fastalign: set_cluster_size takes 0 (automatic), 1, 2, 4 or 8");
  forced_cluster = unsigned(size);
}

void token_stats_fwd(const TokenStatsArgs& a, int device, void* stream) {
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
    using T = decltype(tag);
    const auto by_cap = [&](auto sums) {
      constexpr int kSums = decltype(sums)::value;
      a.cap_scale != 0 ? launch_row_kernel<T, kSums, true>(a, device, stream) : launch_row_kernel<T, kSums, false>(a, device, stream);
    };
    // Few sets of sums. One row: the usual losses, those with an entropy term, everything. Two rows: what losses use, everything; there the
    // reads leave room for sums that are not asked for.
    constexpr int kRare = kSum2 | kSumZ | kTop, kPair = kRefRow | kSum1 | kSumT | kSumTr;
    const bool rare = (a.outputs & (kOutLogSumSq | kOutMeanLogit | kOutIsTop1)) != 0;
    if (a.ref.data && rare) by_cap(std::integral_constant<int, kPair | kRare>{});
    else if (a.ref.data) by_cap(std::integral_constant<int, kPair>{});
    else if (rare) by_cap(std::integral_constant<int, kSum1 | kRare>{});
    else if (a.outputs & kOutEntropy) by_cap(std::integral_constant<int, kSum1>{});
    else by_cap(std::integral_constant<int, 0>{});
  });
}

}  // namespace cuda
}  // namespace fastalign
