// Gradient of the row ops: one elementwise pass over the rows, over the logits themselves if asked.
//
// From the saved state and a few upstream numbers per row, every element is  dx = e (a + b d)  (plus its label's share) with d = u c - m
// in bits and e = 2^d: two fused multiply-adds and one exp2. Vectors are counted from where the *gradient* row is aligned, so stores are
// always 16 bytes; loads are whatever the logits' alignment allows. Each element is read and written by one thread, which makes the
// in-place form safe.
#include "cuda/row.cuh"
#include "cuda/vector.cuh"

namespace fastalign {
namespace cuda {
namespace {

// Of every element of a row:  dx = (e (a + b d) + extra) slope(u) / slope(0), `extra` being g times `label_scale` where a label with
// upstream gradient g sits. slope(0) is in a, b and label_scale, so only a softcap leaves a factor per element.
struct RowGradient {
  float m, a, b, label_scale;
  enum Kind : int { kZero, kNan, kRegular } kind;
};

__device__ inline float at(const void* p, int64_t i) { return p ? static_cast<const float*>(p)[i] : 0.0f; }

__device__ RowGradient row_gradient(const TokenStatsBackwardArgs& a, int64_t row, const RowTransform<float>& f) {
  if (!row_labels(a, row).scored) return {0, 0, 0, 0, RowGradient::kZero};
  const RowState<float> s = load_state(static_cast<const float*>(a.state) + row * kStateWidth);
  if (!(s.s0 > 0)) return {0, 0, 0, 0, RowGradient::kNan};  // NaN somewhere, or -inf throughout
  float g_labels = 0;
  bool any = false;
  for (int64_t k = 0; a.g_logprob && k < a.targets; ++k) {
    if (a.labels[row * a.targets + k] == a.ignore_index) continue;
    const float g = at(a.g_logprob, row * a.targets + k);
    g_labels += g;
    any |= g != 0;
  }
  const float g_entropy = at(a.g_entropy, row), g_logsumexp = at(a.g_logsumexp, row);
  if (!any && g_entropy == 0 && g_logsumexp == 0) return {0, 0, 0, 0, RowGradient::kZero};
  // p (A + B log p) with p = e / s0 and log p = ln2 d - log s0.
  const RowCoefficients<float> k = row_coefficients(s, g_labels, g_entropy, g_logsumexp);
  const float slope = f.slope(0), scale = slope / s.s0, log_s0 = k.b != 0 ? log(s.s0) : 0.0f;
  return {s.m, (k.a - k.b * log_s0) * scale, k.b * float(kLn2) * scale, slope, RowGradient::kRegular};
}

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

// One element: x is the raw logit. Written with explicit fmaf, so that every place this is inlined into rounds alike.
template <bool kCap, bool kLabelled> __device__ float gradient(const RowGradient& g, const RowTransform<float>& f, float x, float extra) {
  const float u = kCap ? tanhf(x * f.cap_scale) : x, d = f.bits(u, g.m), e = fast_exp2(d);
  const float inner = fmaf(g.b, fmaxf(d, -200.0f), g.a);  // e is 0 below -200, and 0 * -inf would be NaN
  const float dz = kLabelled ? fmaf(e, inner, u == -INFINITY ? 0.0f : extra) : e * inner;
  return kCap ? dz * fmaf(-u, u, 1.0f) : dz;
}

// kMany: rows have several labels.
template <class T, bool kCap, bool kMany>
__global__ void __launch_bounds__(kRowThreads, 4)
    token_stats_bwd_kernel(TokenStatsBackwardArgs a, RowScale scale, unsigned chunks, int chunk) {
  FA_DYNAMIC_SHARED(float, extra);
  constexpr int L = kLanes<T>;
  const int64_t row = int64_t(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  if (row >= a.logits.rows) return;  // whole warps, and never with kMany
  const int part = int(blockIdx.x % chunks), thread = int(threadIdx.x), step = int(blockDim.x), vocab = int(a.logits.vocab);
  const T* x = row_pointer<const T>(a.logits, row);
  T* out = row_pointer<T>(a.grad, row);
  const int offset = int((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  const RowVectors<T> vectors(x, vocab, offset);
  const int begin = vectors.first + part * chunk, end = min(begin + chunk, vectors.last);
  const int inner_begin = vectors.element(vectors.first), inner = (vectors.last - vectors.first) * L;
  const RowTransform<float> f = scale.transform();
  const RowGradient g = row_gradient(a, row, f);

  if (g.kind != RowGradient::kRegular) {  // written without reading
    const float value = g.kind == RowGradient::kNan ? NAN : 0.0f;
    float lanes[L];
#pragma unroll
    for (int l = 0; l < L; ++l) lanes[l] = value;
    const uint4 filled = pack(lanes, T{});
    for (int i = begin + thread; i < end; i += step) store16(out + vectors.element(i), filled);
    for (int e = thread; part == 0 && e < vocab - inner; e += step) from_acc(value, out + (e < inner_begin ? e : e + inner));
    return;
  }

  const bool labelled = a.g_logprob != nullptr;
  const int label = labelled && !kMany ? local_column(a, a.labels[row]) : -1;
  const float own = labelled && !kMany ? at(a.g_logprob, row) * g.label_scale : 0.0f;
  if (kMany && labelled) scatter_labels(a, row, g.label_scale, vectors.element(begin), chunk * L, extra);

  for (int i = begin + bundle_start(threadIdx.x); i < end; i += kUnroll * step) {
    uint4 v[kUnroll];
    const unsigned loaded = vectors.load(i, end, v);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (!(loaded >> k & 1)) continue;
      const int element = vectors.element(i + k * int(kWarp));
      float lanes[L];
      unpack(v[k], lanes, T{});
      if (kMany && labelled) {
#pragma unroll
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, true>(g, f, lanes[l], extra[(i + k * int(kWarp) - begin) * L + l]);
      } else if (unsigned(label - element) < unsigned(L) && label >= 0) {  // one vector of the row
#pragma unroll
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, true>(g, f, lanes[l], label == element + l ? own : 0.0f);
      } else {
#pragma unroll
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, false>(g, f, lanes[l], 0.0f);
      }
      store16(out + element, pack(lanes, T{}));
    }
  }
  for (int j = thread; part == 0 && j < vocab - inner; j += step) {  // what no wide vector covers, at both ends of the row
    const int e = j < inner_begin ? j : j + inner;
    float sum = 0;
    for (int64_t k = 0; kMany && labelled && k < a.targets; ++k)
      if (local_column(a, a.labels[row * a.targets + k]) == e) sum += at(a.g_logprob, row * a.targets + k);
    from_acc(gradient<kCap, true>(g, f, to_acc(x[e]), kMany ? sum * g.label_scale : (label == e ? own : 0.0f)), out + e);
  }
}

template <class T, bool kCap, bool kMany> void launch_row_kernel(const TokenStatsBackwardArgs& a, void* stream) {
  const int64_t vectors = ceil_div(a.logits.vocab, kLanes<T>);  // an upper bound of the wide ones
  const int64_t row_bytes = a.logits.vocab * int64_t(sizeof(T));
  const bool by_warp = !kMany && row_bytes <= kShortRow;
  const dim3 block = by_warp ? dim3(kWarp, kRowThreads / kWarp) : dim3(threads_for(row_bytes));
  // A block's share of a row: enough to hide the row's own few loads; with several labels, what shared memory holds.
  const int chunk = by_warp ? int(vectors) : (kMany ? 1 : 2) * kUnroll * int(block.x);
  const int64_t chunks = ceil_div(vectors, chunk);
  const size_t shared = kMany ? size_t(chunk) * kLanes<T> * sizeof(float) : 0;
  FA_LAUNCH((token_stats_bwd_kernel<T, kCap, kMany>), dim3(grid_size(ceil_div(a.logits.rows, block.y) * chunks, "token_stats")), block,
            shared, stream, a, row_scale(a), unsigned(chunks), chunk);
}

}  // namespace

void token_stats_bwd(const TokenStatsBackwardArgs& a, int device, void* stream) {
  if (a.ref.data) throw std::invalid_argument("fastalign: the CUDA kernels do not take reference logits yet");
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
    using T = decltype(tag);
    const auto by_labels = [&](auto cap) {
      constexpr bool kCap = decltype(cap)::value;
      a.targets > 1 ? launch_row_kernel<T, kCap, true>(a, stream) : launch_row_kernel<T, kCap, false>(a, stream);
    };
    a.cap_scale != 0 ? by_labels(std::true_type{}) : by_labels(std::false_type{});
  });
}

}  // namespace cuda
}  // namespace fastalign
