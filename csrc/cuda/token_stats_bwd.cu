// Gradient of the row ops: one elementwise pass over the rows, over the logits themselves if asked.
//
// From the saved state and a few upstream numbers per row, every element is  dx = e (A + B d) slope(u) + [is a label] g slope(u)  with
// d = log2 of e, e = 2^(u c - m): one fma, one exp2, one fma. Vectors are counted from where the *gradient* row is aligned, so stores are always
// 16 bytes; loads are whatever the logits' alignment allows. Each element is read and written by one thread, which makes the in-place form safe.
#include "cuda/row.cuh"
#include "cuda/vector.cuh"

namespace fastalign {
namespace cuda {
namespace {

// Of every element of a row:  dx = e * (a + b d) * slope;  a label's element gets g * slope on top.
struct RowGradient {
  float m, a, b;
  enum Kind : int { kZero, kNan, kRegular } kind;
};

__device__ inline float at(const void* p, int64_t i) { return p ? static_cast<const float*>(p)[i] : 0.0f; }

__device__ RowGradient row_gradient(const TokenStatsBackwardArgs& a, int64_t row) {
  if (!row_labels(a, row).scored) return {0, 0, 0, RowGradient::kZero};
  const RowState<float> s = load_state(static_cast<const float*>(a.state) + row * kStateWidth);
  if (!(s.s0 > 0)) return {0, 0, 0, RowGradient::kNan};   // NaN somewhere, or -inf throughout
  float g_labels = 0;
  bool any = false;
  for (int64_t k = 0; a.g_logprob && k < a.targets; ++k) {
    if (a.labels[row * a.targets + k] == a.ignore_index) continue;
    const float g = at(a.g_logprob, row * a.targets + k);
    g_labels += g;
    any |= g != 0;
  }
  const float g_entropy = at(a.g_entropy, row), g_logsumexp = at(a.g_logsumexp, row);
  if (!any && g_entropy == 0 && g_logsumexp == 0) return {0, 0, 0, RowGradient::kZero};
  // p (A + B log p) with p = e / s0 and log p = ln2 d - log s0.
  const RowCoefficients<float> k = row_coefficients(s, g_labels, g_entropy, g_logsumexp);
  const float inverse = 1 / s.s0, log_s0 = k.b != 0 ? log(s.s0) : 0.0f;
  return {s.m, (k.a - k.b * log_s0) * inverse, k.b * float(kLn2) * inverse, RowGradient::kRegular};
}

// Upstream gradients of a block's elements where rows have several labels: `extra[e]` of the element begin + e, duplicates of a label summed in
// index order by the thread that has the first of them.
__device__ void scatter_labels(const TokenStatsBackwardArgs& a, int64_t row, int begin, int count, float* extra) {
  for (int e = int(threadIdx.x); e < count; e += int(blockDim.x)) extra[e] = 0;
  __syncthreads();
  const int64_t* labels = a.labels + row * a.targets;
  for (int64_t k = threadIdx.x; k < a.targets; k += blockDim.x) {
    const int column = local_column(a, labels[k]) - begin;
    if (column < 0 || column >= count || local_column(a, labels[k]) < 0) continue;
    bool is_first = true;
    for (int64_t j = 0; j < k; ++j) is_first &= labels[j] != labels[k];
    if (!is_first) continue;
    float sum = 0;
    for (int64_t j = k; j < a.targets; ++j)
      if (labels[j] == labels[k]) sum += at(a.g_logprob, row * a.targets + j);
    extra[column] = sum;
  }
  __syncthreads();
}

// One element: x is the raw logit, `extra` the upstream gradient of the labels that sit on it.
template <bool kCap, bool kEntropy> __device__ float gradient(const RowGradient& g, const RowTransform<float>& f, float x, float extra) {
  const float u = kCap ? tanhf(x * f.cap_scale) : x, d = f.bits(u, g.m), e = fast_exp2(d);
  const float dz = e * (kEntropy ? fmaf(g.b, fmaxf(d, -200.0f), g.a) : g.a);   // e is 0 below -200, and 0 * -inf would be NaN
  return (u == -INFINITY ? dz : dz + extra) * (kCap ? f.slope(u) : f.c * float(kLn2));
}

// kMany: rows have several labels. kEntropy: b may be other than 0.
template <class T, bool kCap, bool kEntropy, bool kMany>
__global__ void __launch_bounds__(kRowThreads, 4) token_stats_bwd_kernel(TokenStatsBackwardArgs a, RowScale scale, unsigned chunks, int chunk) {
  FA_DYNAMIC_SHARED(float, extra);
  constexpr int L = kLanes<T>;
  const int64_t row = int64_t(blockIdx.x / chunks) * blockDim.y + threadIdx.y;
  if (row >= a.logits.rows) return;   // whole warps, and never with kMany
  const int part = int(blockIdx.x % chunks), thread = int(threadIdx.x), step = int(blockDim.x), vocab = int(a.logits.vocab);
  const T* x = row_pointer<const T>(a.logits, row);
  T* out = row_pointer<T>(a.grad, row);
  const int offset = int((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  const RowVectors<T> vectors(x, vocab, offset);
  const int begin = vectors.first + part * chunk, end = min(begin + chunk, vectors.last);
  const int inner_begin = vectors.element(vectors.first), inner = (vectors.last - vectors.first) * L;
  const RowGradient g = row_gradient(a, row);

  if (g.kind != RowGradient::kRegular) {   // written without reading
    const float value = g.kind == RowGradient::kNan ? NAN : 0.0f;
    float lanes[L];
#pragma unroll
    for (int l = 0; l < L; ++l) lanes[l] = value;
    const uint4 filled = pack(lanes, T{});
    for (int i = begin + thread; i < end; i += step) *reinterpret_cast<uint4*>(out + vectors.element(i)) = filled;
    for (int e = thread; part == 0 && e < vocab - inner; e += step) from_acc(value, out + (e < inner_begin ? e : e + inner));
    return;
  }

  const RowTransform<float> f = scale.transform();
  const bool labelled = a.g_logprob != nullptr;
  const int label = labelled && !kMany ? local_column(a, a.labels[row]) : -1;
  const float g_label = labelled && !kMany ? at(a.g_logprob, row) : 0.0f;
  if (kMany && labelled) scatter_labels(a, row, vectors.element(begin), chunk * L, extra);

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
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, kEntropy>(g, f, lanes[l], extra[(i + k * int(kWarp) - begin) * L + l]);
      } else if (unsigned(label - element) < unsigned(L) && label >= 0) {   // one vector of the row
#pragma unroll
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, kEntropy>(g, f, lanes[l], label == element + l ? g_label : 0.0f);
      } else {
#pragma unroll
        for (int l = 0; l < L; ++l) lanes[l] = gradient<kCap, kEntropy>(g, f, lanes[l], 0.0f);
      }
      *reinterpret_cast<uint4*>(out + element) = pack(lanes, T{});
    }
  }
  for (int j = thread; part == 0 && j < vocab - inner; j += step) {   // what no wide vector covers, at both ends of the row
    const int e = j < inner_begin ? j : j + inner;
    float own = label == e ? g_label : 0.0f;
    for (int64_t k = 0; kMany && labelled && k < a.targets; ++k)
      if (local_column(a, a.labels[row * a.targets + k]) == e) own += at(a.g_logprob, row * a.targets + k);
    from_acc(gradient<kCap, kEntropy>(g, f, to_acc(x[e]), own), out + e);
  }
}

template <class T, bool kCap, bool kEntropy, bool kMany> void launch_row_kernel(const TokenStatsBackwardArgs& a, void* stream) {
  const int64_t vectors = ceil_div(a.logits.vocab, kLanes<T>);   // an upper bound of the wide ones
  const bool by_warp = !kMany && a.logits.vocab * int64_t(sizeof(T)) <= kShortRow;
  // A block's share of a row: enough to hide the row's own few loads; with several labels, what shared memory holds.
  const int chunk = by_warp ? int(vectors) : (kMany ? 1 : 2) * kUnroll * int(kRowThreads);
  const dim3 block = by_warp ? dim3(kWarp, kRowThreads / kWarp) : dim3(kRowThreads, 1);
  const int64_t chunks = ceil_div(vectors, chunk);
  const size_t shared = kMany ? size_t(chunk) * kLanes<T> * sizeof(float) : 0;
  FA_LAUNCH((token_stats_bwd_kernel<T, kCap, kEntropy, kMany>), dim3(grid_size(ceil_div(a.logits.rows, block.y) * chunks, "token_stats")), block,
            shared, stream, a, row_scale(a), unsigned(chunks), chunk);
}

template <class F> void with_bool(bool value, F&& f) { value ? f(std::true_type{}) : f(std::false_type{}); }

}  // namespace

void token_stats_bwd(const TokenStatsBackwardArgs& a, int device, void* stream) {
  if (a.logits.rows == 0) return;
  const DeviceGuard guard(device);
  with_row_dtype(a.dtype, "token_stats", [&](auto tag) {
    with_bool(a.cap_scale != 0, [&](auto cap) {
      with_bool(a.g_entropy != nullptr, [&](auto entropy) {
        with_bool(a.targets > 1, [&](auto many) {
          launch_row_kernel<decltype(tag), decltype(cap)::value, decltype(entropy)::value, decltype(many)::value>(a, stream);
        });
      });
    });
  });
}

}  // namespace cuda
}  // namespace fastalign
