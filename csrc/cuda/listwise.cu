// The list kernel (math/list.h): one block per list, one thread per response. The block that arrives last applies the normalisers, which count
// all lists, and reduces the loss, both in a fixed order.
#include "cuda/sequence.cuh"
#include "math/list.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

// More threads than a list has responses: the last block walks over all sequences and lists.
constexpr unsigned kThreads = kSequenceThreads;
static_assert(kMaxList <= kThreads, "a thread per response");
// Shared memory, in floats: rewards, scores and aux of the list, then reductions, then the flag of the last block.
constexpr unsigned kReduce = 3 * kMaxList, kFlag = kReduce + 5 * kThreads / kWarp, kSharedSize = kFlag + 1;

__device__ inline float at(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }

// The number of responses of a list that can be evaluated, or -1: it does not lie inside, is too long, or is the first (the last) and leaves
// out sequences. The values of list_offsets cannot be checked without a synchronisation.
__device__ int list_size(const ListwiseArgs& a, int64_t l, Segment& s) {
  s = segment(a.list_offsets, a.lists, a.sequences, l);
  const bool ends = (l > 0 || s.begin == 0) && (l < a.lists - 1 || s.end == a.sequences);
  return s.ok && ends && s.end - s.begin <= kMaxList ? int(s.end - s.begin) : -1;
}

// What a list that cannot be evaluated leaves behind. Such lists and the others together write every sequence. It counts, or its NaN would be
// dropped.
__device__ void write_nan(const ListwiseArgs& a, int64_t l) {
  const Share mine = share(a.list_offsets, a.lists, a.sequences, l);
  for (int64_t n = mine.begin + threadIdx.x; n < mine.end; n += blockDim.x)
    static_cast<float*>(a.slopes)[n] = static_cast<float*>(a.rewards)[n] = NAN;
  const int column = int(threadIdx.x);
  if (column >= kListTableWidth) return;
  static_cast<float*>(a.table)[l * kListTableWidth + column] = column == kListValid ? 1.0f : (column == kListTerm ? NAN : 0.0f);
}

// A list without its normalisers: slopes, rewards and its row of the table.
__device__ void evaluate(const ListwiseArgs& a, const ListParams<float>& p, int64_t l, float* shared) {
  float *s = shared, *r = shared + kMaxList, *aux = shared + 2 * kMaxList;
  float *slopes = static_cast<float*>(a.slopes), *rewards = static_cast<float*>(a.rewards);
  float* row = static_cast<float*>(a.table) + l * kListTableWidth;
  Segment own;
  const int count = list_size(a, l, own), i = int(threadIdx.x);
  if (count < 0) return write_nan(a, l);
  const float* sums = static_cast<const float*>(a.sums) + (own.begin + i) * kSumWidth;
  ValueSlope<float> score{0, 0};
  if (i < count) {
    score = list_score(p, a.beta.data ? at(a.beta.data, l * a.beta.stride) : p.beta, sums);
    s[i] = score.value;
    r[i] = at(a.scores, own.begin + i);
    rewards[own.begin + i] = score.value;
  }
  __syncthreads();
  const List<float> x{s, r, aux, count};
  const ListHead<float> head = list_head(p, x);
  if (i < count) aux[i] = list_aux(p, x, head, i);
  __syncthreads();
  ListItem<float> item{};
  if (i < count) item = list_item(p, x, head, i);
  // The last: responses that hold a token.
  float total[5] = {item.value, item.pairs, item.correct, item.margin, i < count && sums[kSumLength] > 0 ? 1.0f : 0.0f};
  sum_block(total, shared + kReduce);
  const float scale = list_scale(p, total[1]), bad = head.finite_scores ? 0.0f : NAN;
  const float term = (scale == 0 ? 0.0f : scale * total[0]) + bad;
  const float best_sum = count ? at(a.sums, (own.begin + head.best) * kSumWidth + kSumPolicy) : 0.0f;
  const float nll = p.sft_weight == 0 ? 0.0f : -list_sft_weight(p, count) * best_sum;
  const bool dropped = p.drop_nonfinite && !(head.finite && is_finite(term) && is_finite(nll)), valid = total[4] > 0 && !dropped;
  if (i < count) slopes[own.begin + i] = valid ? (scale == 0 ? 0.0f : scale * item.slope * score.slope) + bad : 0.0f;
  if (i == head.best) row[kListTop] = item.pairs > 0 && item.correct == item.pairs ? 1.0f : 0.0f;
  if (i) return;
  row[kListTerm] = term;
  row[kListNll] = nll;
  row[kListValid] = valid ? 1.0f : 0.0f;
  row[kListPairs] = total[1];
  row[kListCorrect] = total[2];
  row[kListMargin] = total[3];
  row[kListBest] = float(head.best);
  row[kListWorst] = float(head.worst);
}

// Divides everything by the normalisers and sums the loss; by one block. The slopes of lists that do not count are 0 already.
__device__ void normalise(const ListwiseArgs& a, const ListParams<float>& p, float* shared) {
  float *slopes = static_cast<float*>(a.slopes), *table = static_cast<float*>(a.table);
  // Where the best response of list l is, or -1.
  auto best_of = [&](int64_t l) {
    Segment own;
    return list_size(a, l, own) > 0 ? own.begin + int64_t(table[l * kListTableWidth + kListBest]) : -1;
  };
  auto tokens_of = [&](int64_t n) { return n < 0 ? 0.0f : at(a.sums, n * kSumWidth + kSumLength); };
  float counts[2] = {0, 0}, loss[1] = {0};  // valid lists, tokens of their best responses
  for (int64_t l = threadIdx.x; l < a.lists; l += blockDim.x) {
    if (table[l * kListTableWidth + kListValid] == 0) continue;
    counts[0] += 1;
    if (p.sft_weight != 0) counts[1] += tokens_of(best_of(l));
  }
  sum_block(counts, shared + kReduce);
  const float lists = a.num_items ? at(a.num_items, 0) : counts[0], sft_tokens = a.num_sft_tokens ? at(a.num_sft_tokens, 0) : counts[1];
  const float norm = pair_divisor(p, lists);
#pragma unroll 4
  for (int64_t n = threadIdx.x; n < a.sequences; n += blockDim.x) slopes[n] /= norm;
  __syncthreads();  // the best responses' slopes are changed below, by other threads
  for (int64_t l = threadIdx.x; l < a.lists; l += blockDim.x) {
    float* row = table + l * kListTableWidth;
    const bool valid = row[kListValid] != 0;
    float nll = 0;
    if (valid && p.sft_weight != 0) {
      const int64_t best = best_of(l);
      const float sft_norm = sft_divisor(p, lists, counts[0], sft_tokens, tokens_of(best));
      nll = row[kListNll] / sft_norm;
      if (best >= 0) slopes[best] -= list_sft_weight(p, a.list_offsets[l + 1] - a.list_offsets[l]) / sft_norm;
    }
    const float term = valid ? row[kListTerm] / norm : 0.0f;
    row[kListTerm] = term;
    row[kListNll] = nll;
    static_cast<float*>(a.list_loss)[l] = term + nll;
    loss[0] += term + nll;
  }
  sum_block(loss, shared + kReduce);
  if (threadIdx.x == 0) *static_cast<float*>(a.loss) = loss[0];
}

__global__ void __launch_bounds__(kThreads, 4) listwise_fwd_kernel(ListwiseArgs a, ListParams<float> p) {
  FA_DYNAMIC_SHARED(float, shared);
  evaluate(a, p, blockIdx.x, shared);
  __syncthreads();  // all threads' results are written before this block is counted
  if (last_block(a.counter, reinterpret_cast<unsigned*>(shared + kFlag))) normalise(a, p, shared);
}

}  // namespace

void listwise_fwd(const ListwiseArgs& a, int device, void* stream) {
  require_float32(a.dtype, "listwise_loss");
  if (a.lists == 0) return;
  const DeviceGuard guard(device);
  FA_LAUNCH(listwise_fwd_kernel, dim3(grid_size(a.lists, "listwise_loss")), dim3(kThreads), kSharedSize * sizeof(float), stream, a,
            list_params<float>(a.scalars, a.switches));
}

}  // namespace cuda
}  // namespace fastalign
