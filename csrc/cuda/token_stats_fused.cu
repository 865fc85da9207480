// Forward and gradient of the row ops in one call, for upstream gradients that are known beforehand.
//
// On sm_90 and later the rows are read once. The blocks of a cluster copy their shares of the row (and of the reference row) into shared
// memory, form the row state from there as token_stats_fwd does, by the same tree, exchange their parts of it, and write the gradient of
// what they still hold. A block's share of a policy and a reference row is at most 72 KiB up to rows of 288 KiB each, so that three blocks
// fit an SM: while one exchanges, computes or stores, the copies of the others run. Two rows of bf16 at a vocabulary of 128256 are 8
// shares of 64 KiB; clusters of 4 would leave room for one block per SM, and nothing to overlap.
// Elsewhere, for rows that do not fit the shared memory of 8 blocks, and for what losses do not ask for, it is the two kernels in a row;
// with a softcap as well, where the tanh of every element, not the reads, takes the time.
#include "cuda/row_gradient.cuh"
#include "cuda/row_sums.cuh"

namespace fastalign {
namespace cuda {
namespace {

// A block's share of one row: `count` elements from `source` on, in shared memory at the same offset from a 16-byte boundary. Whole words
// of 16 bytes inside the share are copied by themselves, the elements before and after them by the threads.
template <class T> class StagedRow {
 public:
  T* elements;

  __device__ StagedRow() {}
  __device__ StagedRow(unsigned char* room, const T* source, int count) : source_(source), count_(count) {
    const unsigned skew = unsigned(reinterpret_cast<uintptr_t>(source) & 15);
    elements = reinterpret_cast<T*>(room + skew);
    first_ = skew ? 1 : 0, words_ = int((skew + unsigned(count) * sizeof(T)) / 16), skew_ = int(skew / sizeof(T));
  }

  // Bytes, in shared memory, for `vectors` vectors at any offset.
  static constexpr __host__ __device__ int room(int vectors) { return (vectors + 1) * 16; }

  // The words of the share that vectors [begin, end) need and vectors before `begin` do not.
  __device__ unsigned bytes(int begin, int end) const { return unsigned(last(end) - first(begin, end)) * 16; }
  __device__ void start(int begin, int end, CopyFlag* flag) const {
    const int word = first(begin, end), element = word * kLanes<T> - skew_;
    if (const unsigned size = bytes(begin, end)) start_copy(elements + element, source_ + element, size, flag);
  }
  __device__ void copy_ends() const {
    const int begin = min(count_, first_ * kLanes<T> - skew_), end = max(begin, words_ * kLanes<T> - skew_);
    for_each_end(count_, max(begin, 0), end, [&](int e) { elements[e] = source_[e]; });
  }

 private:
  __device__ int last(int end) const { return max(first_, min(words_, end + 1)); }
  __device__ int first(int begin, int end) const { return min(last(end), begin > 0 ? begin + 1 : first_); }

  const T* source_;
  int count_, first_, words_, skew_;
};

// Shared memory of a block: the shares, one copy flag per round of bundles, the states of the warps and of the block.
template <class T, int kSums> struct Layout {
  static constexpr int R = kRows<kSums>, N = kUnroll / R;
  int vectors, rounds, threads;  // of a share; vectors a round has: N * threads

  __host__ __device__ Layout(int share, int threads)
      : vectors(share), rounds((share + N * threads - 1) / (N * threads)), threads(threads) {}
  __host__ __device__ int flags() const { return R * StagedRow<T>::room(vectors); }
  __host__ __device__ int states() const { return flags() + rounds * int(sizeof(CopyFlag)); }
  __host__ __device__ int bytes() const { return states() + (threads / int(kWarp) + 1) * int(sizeof(State<kSums>)); }
};

__device__ inline RefState<float> reference(const RowState<float>&) { return RefState<float>::empty(); }
__device__ inline RefState<float> reference(const PairState<float>& s) { return s.r; }

// Three blocks per SM, two where every sum and term is kept.
template <int kSums> constexpr int kBlocksPerSm = (kSums & (kSum1 | kRefRow)) == (kSum1 | kRefRow) ? 2 : 3;

template <class T, int kSums>
__global__ void __launch_bounds__(kRowThreads, blocks_per_sm(kBlocksPerSm<kSums>))
    token_stats_fused_kernel(TokenStatsFusedArgs args, RowScale scale, unsigned cluster, int share) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  FA_DYNAMIC_SHARED(unsigned char, memory);
  constexpr int L = kLanes<T>, R = kRows<kSums>, N = kUnroll / R;
  constexpr bool kRef = R == 2;
  constexpr int kKl = (kSums & kSumT ? kPolicyRef : 0) | (kSums & kSumTr ? kRefPolicy : 0);
  const TokenStatsArgs& a = args.forward;
  const int64_t row = blockIdx.x / cluster;
  const unsigned rank = cluster > 1 ? cluster_rank() : 0, thread = threadIdx.x;
  const int vocab = int(a.logits.vocab), all = (vocab + L - 1) / L;
  const int begin = int(int64_t(all) * rank / cluster), vectors = int(int64_t(all) * (rank + 1) / cluster) - begin;
  const int start = begin * L, count = min(vectors * L, vocab - start);
  T* out = row_pointer<T>(args.backward.grad, row) + start;
  const int offset = int((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  const bool finisher = rank == 0 && thread < kWarp;
  const RowLabels labels = row_labels(a, row);
  const RowTransform<float> f = scale.transform();
  RowGradient g = RowGradient::without_terms(RowGradient::kZero);
  RowVectors<T> rows[R];
  StagedRow<T> staged[R];
  for (int r = 0; r < R; ++r)
    staged[r] = StagedRow<T>(memory + r * StagedRow<T>::room(share), row_pointer<const T>(r ? a.ref : a.logits, row) + start, count);

  if (!labels.scored) {  // never read: the row may hold anything
    if (finisher) write_unscored<kSums>(a, row, thread);
  } else {
    const Layout<T, kSums> layout(share, int(blockDim.x));
    CopyFlag* flags = reinterpret_cast<CopyFlag*>(memory + layout.flags());
    State<kSums>* states = reinterpret_cast<State<kSums>*>(memory + layout.states());
    const int round = N * int(blockDim.x);
    if (thread == 0) {
      init_flags(flags, layout.rounds);
      for (int i = 0; i < vectors; i += round) {
        unsigned bytes = 0;
        for (int r = 0; r < R; ++r) bytes += staged[r].bytes(i, i + round);
        announce_bytes(flags + i / round, bytes);
        for (int r = 0; r < R; ++r) staged[r].start(i, i + round, flags + i / round);
      }
    }
    const T* x[R];
    float first[R];
    for (int r = 0; r < R; ++r) {
      staged[r].copy_ends();
      x[r] = row_pointer<const T>(r ? a.ref : a.logits, row);
      first[r] = finisher && thread < a.targets ? target_u(a, r, row, thread, x[r], f) : 0.0f;  // the gradient may go over the logits
      rows[r] = RowVectors<T>(staged[r].elements, count, 0);
    }
    __syncthreads();

    State<kSums> s = State<kSums>::empty();
    for (int i = 0; i < vectors; i += round) {
      wait_for_copies(flags + i / round);  // by every thread: each reads what any copy has brought, later
      const int mine = i + bundle_start<N>(thread);
      if (mine >= vectors) continue;
      uint4 v[R][N];
      load_bundle(rows, mine, vectors, v);
      push<T, kSums, false>(s, v, count, mine, vectors, f);
    }
    s = merge_row<kSums>(s, states, cluster, cluster);
    if (thread < kWarp && __shfl_sync(kFullMask, int(may_be_far(s, f)), 0)) s = far_state<T, kSums>(s, x, vocab, f);
    if (thread == 0) {
      if (labels.bad) spoil(s);
      *states = s;
    }
    __syncthreads();
    s = *states;
    if (cluster > 1 && may_be_far(s, f)) cluster_sync();  // every block has read the whole row before any writes its gradient over it
    if (finisher) write_row(a, row, thread, s, first, x, f);
    g = row_gradient<kRef>(args.backward, row, f, policy(s), reference(s));
  }

  // From here on the block touches nothing but its share: of the rows in shared memory, of the gradient in global memory.
  for (int r = 0; r < R; ++r) rows[r] = RowVectors<T>(staged[r].elements, count, offset);
  const int wide = kRef ? max(rows[0].first, rows[R - 1].first) : rows[0].first;
  const int wide_end = max(wide, kRef ? min(rows[0].last, rows[R - 1].last) : rows[0].last);
  const int inner = rows[0].element(wide), inner_end = inner + (wide_end - wide) * L;
  if (g.kind < RowGradient::kRegular) {
    const float value = g.kind == RowGradient::kNan ? NAN : 0.0f;
    fill_vectors(value, rows[0], out, wide, wide_end);
    for_each_end(count, inner, inner_end, [&](int e) { from_acc(value, out + e); });
    return;
  }
  if (g.kind == RowGradient::kFar) {
    write_far<T, kRef>(args.backward, row, g, f, staged[0].elements, staged[R - 1].elements, out, start, 0, count);
    return;
  }
  LabelShare<false> share_of_label{kNoLabel, 0.0f, nullptr};
  if (args.backward.g_logprob) share_of_label = label_share(args.backward, row, g, start);
  const bool with_kl = kRef && g.kind == RowGradient::kWithKl;
  const RowVectors<T> alone[1] = {rows[0]};
  if constexpr (kRef) {
    if (with_kl) write_vectors<T, false, kKl>(g, f, rows, out, wide, wide_end, share_of_label);
  }
  if (!with_kl) write_vectors<T, false, 0>(g, f, alone, out, wide, wide_end, share_of_label);
  for_each_end(count, inner, inner_end, [&](int e) {
    const float x = to_acc(staged[0].elements[e]), y = kRef ? to_acc(staged[R - 1].elements[e]) : 0.0f, own = share_of_label(e);
    from_acc(with_kl ? gradient<false, true, kKl>(g, f, x, y, own) : gradient<false, true, 0>(g, f, x, 0.0f, own), out + e);
  });
#endif
}

// Whether the one-read kernel serves the call; then it is launched.
template <class T, int kSums> bool launch_one_read(const TokenStatsFusedArgs& args, int device, void* stream) {
  const TokenStatsArgs& a = args.forward;
  const auto kernel = token_stats_fused_kernel<T, kSums>;
  if (!clusters_supported(kernel, device)) return false;
  const RowShape shape = row_shape(kRows<kSums> * a.logits.vocab * int64_t(sizeof(T)), kRows<kSums>, true);
  const int share = int(ceil_div(ceil_div(a.logits.vocab, kLanes<T>), shape.cluster));
  const int shared = Layout<T, kSums>(share, int(shape.threads)).bytes();
  if (size_t(shared) > shared_limit(device)) return false;
  const unsigned blocks = grid_size(a.logits.rows * shape.cluster, "token_stats");
  FA_LAUNCH_CLUSTER((token_stats_fused_kernel<T, kSums>), dim3(blocks), dim3(shape.threads), size_t(shared), shape.cluster, stream, args,
                    row_scale(a), shape.cluster, share);
  return true;
}

}  // namespace

void token_stats_fused(const TokenStatsFusedArgs& args, int device, void* stream) {
  const TokenStatsArgs& a = args.forward;
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  const TokenStatsBackwardArgs& b = args.backward;
  TokenStatsArgs forward = a;  // with what the gradient reads of the state
  if (b.g_entropy) forward.outputs |= kOutEntropy;
  if (b.g_kl_policy_ref) forward.outputs |= kOutKlPolicyRef;
  if (b.g_kl_ref_policy) forward.outputs |= kOutKlRefPolicy;
  const auto asks = [&](int outputs) { return (forward.outputs & outputs) != 0; };
  bool done = false;
  if (a.targets <= 1 && !asks(kOutLogSumSq | kOutMeanLogit | kOutIsTop1) && a.cap_scale == 0 && !a.state_in)
    with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
      using T = decltype(tag);
      // One KL alone, the usual call, leaves out what the other sums and terms cost: two passes over a row that is read once count
      // instructions.
      if (!a.ref.data) done = launch_one_read<T, kSum1>(args, device, stream);
      else if (!asks(kOutEntropy | kOutKlRefPolicy)) done = launch_one_read<T, kRefRow | kSumT>(args, device, stream);
      else if (!asks(kOutEntropy | kOutKlPolicyRef)) done = launch_one_read<T, kRefRow | kSumTr>(args, device, stream);
      else done = launch_one_read<T, kSum1 | kRefRow | kSumT | kSumTr>(args, device, stream);
    });
  if (done) return;
  token_stats_fwd(forward, device, stream);
  token_stats_bwd(b, device, stream);
}

}  // namespace cuda
}  // namespace fastalign
