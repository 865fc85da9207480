// Generalised advantage estimation over packed sequences (math/affine.h), against time.
//
// A sequence is scanned in tiles of kGaeTile tokens, counted from its end. Inside a tile the maps are composed by a fixed tree (lanes, a
// warp's stripes, warps); from tile to tile X is carried by the tile's composed map. Two schemes do the same arithmetic, bit for bit:
//   1  one block per sequence walks its tiles: one launch.
//   2  one block per tile, for few long sequences: a first launch composes every tile's map, the second one carries X over the maps of the
//      tiles before its own and finishes. The inputs' second read comes from the cache.
// The last block of the grid merges the moments of all blocks in index order.
#include "cuda/moments.cuh"
#include "math/affine.h"
#include "ops.h"

namespace fastalign {
namespace cuda {
namespace {

constexpr unsigned kWarps = kSequenceThreads / kWarp;
constexpr int kStripes = kGaeTile / kSequenceThreads;
// Shared memory, in floats: two tiles' maps per warp (also the room of merge_block), then the flag of the last block.
constexpr unsigned kMapSize = 2 * kWarps, kSharedSize = 2 * kMapSize + 1;

using Map = Affine<float>;

__device__ inline float at(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }

__device__ GaeStep<float> step_of(const GaeArgs& a) {
  return gae_step(a.gamma_ptr ? at(a.gamma_ptr, 0) : float(a.gamma), a.lam_ptr ? at(a.lam_ptr, 0) : float(a.lam));
}
__device__ float bootstrap_of(const GaeArgs& a, int64_t sequence) { return a.bootstrap ? at(a.bootstrap, sequence) : 0.0f; }

// A thread's share of a tile: one token in each stripe of 32 that its warp owns. Lanes run from the sequence's end to its start. `map` is
// the composition of the stripe's tokens up to this lane.
struct Tile {
  float reward[kStripes], value[kStripes];
  int64_t token[kStripes];  // -1: beyond the sequence's start
  bool scored[kStripes];
  Map map[kStripes];
};

__device__ Map scan_lanes(Map m) {
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const Map later{__shfl_up_sync(kFullMask, m.a, distance), __shfl_up_sync(kFullMask, m.b, distance)};
    if (lane >= distance) m = compose(m, later);
  }
  return m;
}

// The tile whose last token lies `first` tokens before the sequence's end.
__device__ Tile load_tile(const GaeArgs& a, const GaeStep<float>& step, const Segment& s, int64_t first) {
  Tile tile;
#pragma unroll
  for (int j = 0; j < kStripes; ++j) {
    const int64_t t = s.end - 1 - first - (threadIdx.x / kWarp * kStripes + j) * kWarp - threadIdx.x % kWarp;
    const bool inside = t >= s.begin;
    tile.token[j] = inside ? t : -1;
    tile.scored[j] = inside && (!a.mask || a.mask[t]);
    tile.reward[j] = inside ? at(a.rewards, t) : 0.0f;
    tile.value[j] = inside ? at(a.values, t) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kStripes; ++j) tile.map[j] = scan_lanes(tile.scored[j] ? step.map(tile.reward[j], tile.value[j]) : Map::identity());
  return tile;
}

// The composed maps of the warps before this one (`before`) and of the whole tile, by all threads. `maps` has room for a map per warp, which
// no thread may still be reading.
struct TileMaps { Map before, whole; };
__device__ TileMaps compose_warps(const Tile& tile, Map* maps) {
  const unsigned warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == kWarp - 1) {  // holds every stripe's whole map
    Map own = tile.map[0];
#pragma unroll
    for (int j = 1; j < kStripes; ++j) own = compose(tile.map[j], own);
    maps[warp] = own;
  }
  __syncthreads();
  TileMaps r{Map::identity(), Map::identity()};
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w == warp) r.before = r.whole;
    r.whole = compose(maps[w], r.whole);
  }
  return r;
}

// Writes the tile's results. x: X after the tile's last token.
__device__ void finish_tile(const GaeArgs& a, const GaeStep<float>& step, const Tile& tile, const Map& before, float x,
                            MomentSums<float>& seen) {
  auto *advantages = static_cast<float*>(a.advantages), *returns = static_cast<float*>(a.returns);
  x = before(x);
#pragma unroll
  for (int j = 0; j < kStripes; ++j) {
    const float own = tile.map[j](x), neighbour = __shfl_up_sync(kFullMask, own, 1);
    const GaeResult<float> r = step.result(tile.reward[j], tile.value[j], threadIdx.x % kWarp ? neighbour : x);
    if (tile.token[j] >= 0) {
      returns[tile.token[j]] = tile.scored[j] ? r.target : 0.0f;
      advantages[tile.token[j]] = tile.scored[j] ? r.advantage : 0.0f;
    }
    if (tile.scored[j]) seen.push(r.advantage);
    x = __shfl_sync(kFullMask, own, kWarp - 1);
  }
}

// Which tile a block of scheme 2 serves. Sequence s owns the blocks from begin_s / kGaeTile + s on, which are enough and nobody else's.
struct TileIndex { int64_t sequence, number; };
__device__ int64_t first_tile(const GaeArgs& a, int64_t s) { return a.cu_seqlens[s] / kGaeTile + s; }
__device__ TileIndex tile_of_block(const GaeArgs& a) {
  int64_t low = 0, high = a.sequences;  // the last sequence that starts at this block or before
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_tile(a, middle) <= blockIdx.x) low = middle;
    else high = middle;
  }
  return {low, blockIdx.x - first_tile(a, low)};
}
__device__ bool holds_tokens(const Segment& s, int64_t number) { return number >= 0 && number * kGaeTile < s.end - s.begin; }

// The workspace: every block's moments, then every block's map (scheme 2).
__device__ Moments<double>* parts_of(const GaeArgs& a) { return static_cast<Moments<double>*>(a.workspace); }
__device__ Map* maps_of(const GaeArgs& a) { return reinterpret_cast<Map*>(parts_of(a) + gridDim.x); }

__global__ void __launch_bounds__(kSequenceThreads) gae_maps_kernel(GaeArgs a) {
  FA_DYNAMIC_SHARED(float, shared);
  const TileIndex index = tile_of_block(a);
  const Segment s = segment(a.cu_seqlens, a.sequences, a.tokens, index.sequence);
  if (!holds_tokens(s, index.number)) return;
  const TileMaps maps = compose_warps(load_tile(a, step_of(a), s, index.number * kGaeTile), reinterpret_cast<Map*>(shared));
  if (threadIdx.x == 0) maps_of(a)[blockIdx.x] = maps.whole;
}

__device__ void write_nan(const GaeArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin + threadIdx.x; t < end; t += blockDim.x)
    static_cast<float*>(a.advantages)[t] = static_cast<float*>(a.returns)[t] = NAN;
}

// Scheme 1. Returns whether the sequence lies where it should; if not, the tokens that it may have been meant for are NaN.
__device__ bool walk_sequence(const GaeArgs& a, const GaeStep<float>& step, float* shared, MomentSums<float>& seen) {
  const int64_t i = blockIdx.x;
  const Segment s = segment(a.cu_seqlens, a.sequences, a.tokens, i);
  float x = bootstrap_of(a, i);
  unsigned turn = 0;  // neighbouring tiles use different memory, so one barrier per tile is enough
  for (int64_t first = 0; first < s.end - s.begin; first += kGaeTile, turn ^= 1) {
    const Tile tile = load_tile(a, step, s, first);
    const TileMaps maps = compose_warps(tile, reinterpret_cast<Map*>(shared) + turn * kWarps);
    finish_tile(a, step, tile, maps.before, x, seen);
    x = maps.whole(x);
  }
  const Share mine = share(a.cu_seqlens, a.sequences, a.tokens, i);
  if (s.ok && mine.begin == s.begin && mine.end == s.end) return true;
  write_nan(a, mine.begin, s.ok ? s.begin : mine.end);
  if (s.ok) write_nan(a, s.end, mine.end);
  return false;
}

// Scheme 2. A malformed cu_seqlens makes everything NaN; there are few sequences, so every block looks at all of them.
__device__ bool finish_own_tile(const GaeArgs& a, const GaeStep<float>& step, float* shared, MomentSums<float>& seen) {
  float wrong[1] = {threadIdx.x == 0 && (a.cu_seqlens[0] != 0 || a.cu_seqlens[a.sequences] != a.tokens) ? 1.0f : 0.0f};
  for (int64_t i = threadIdx.x; i < a.sequences; i += blockDim.x) wrong[0] += !segment(a.cu_seqlens, a.sequences, a.tokens, i).ok;
  sum_block(wrong, shared);
  if (wrong[0] > 0) {
    const int64_t begin = blockIdx.x * kGaeTile;
    write_nan(a, begin, begin + kGaeTile < a.tokens ? begin + kGaeTile : a.tokens);
    return false;
  }
  const TileIndex index = tile_of_block(a);
  const Segment s = segment(a.cu_seqlens, a.sequences, a.tokens, index.sequence);
  if (!holds_tokens(s, index.number)) return true;
  const Tile tile = load_tile(a, step, s, index.number * kGaeTile);
  const TileMaps maps = compose_warps(tile, reinterpret_cast<Map*>(shared));
  float x = bootstrap_of(a, index.sequence);
  const Map* later = maps_of(a) + (blockIdx.x - index.number);
#pragma unroll 8
  for (int64_t k = 0; k < index.number; ++k) x = later[k](x);
  finish_tile(a, step, tile, maps.before, x, seen);
  return true;
}

template <bool kTiled> __global__ void __launch_bounds__(kSequenceThreads) gae_fwd_kernel(GaeArgs a) {
  FA_DYNAMIC_SHARED(float, shared);
  const GaeStep<float> step = step_of(a);
  MomentSums<float> seen;
  const bool ok = kTiled ? finish_own_tile(a, step, shared, seen) : walk_sequence(a, step, shared, seen);

  __syncthreads();  // the scan's shared memory is free
  auto* room = reinterpret_cast<double*>(shared);
  const Moments<double> block = merge_threads(seen, room);
  Moments<double>* parts = parts_of(a);
  if (threadIdx.x == 0) parts[blockIdx.x] = {ok ? block.count : NAN, block.mean, block.m2};
  if (!last_block(a.counter, reinterpret_cast<unsigned*>(shared + 2 * kMapSize))) return;
  const Moments<double> all = merge_block(gridDim.x, [&](int64_t i) { return parts[i]; }, room);
  if (threadIdx.x) return;
  auto* moments = static_cast<float*>(a.moments);
  moments[0] = float(all.count);
  moments[1] = float(all.mean);
  moments[2] = float(all.m2);
}

int forced_scheme = 0;

// A block walks a tile in about a microsecond. Scheme 2 is for sequences of many tiles that are too few to fill the device.
bool by_tiles(const GaeArgs& a) {
  if (forced_scheme) return forced_scheme == 2;
  return a.sequences <= 256 && a.tokens / kGaeTile >= 16 * a.sequences;
}

}  // namespace

void set_gae_scheme(int scheme) {
  if (scheme < 0 || scheme > 2)
    throw std::invalid_argument("fastalign: set_gae_scheme takes 0 (automatic), 1 (a block per sequence) or 2 (a block per tile)");
  forced_scheme = scheme;
}

void gae_fwd(const GaeArgs& a, int device, void* stream) {
  require_float32(a.dtype, "gae");
  if (a.sequences == 0) return;
  const DeviceGuard guard(device);
  const bool tiled = by_tiles(a);
  const dim3 grid(grid_size(tiled ? a.tokens / kGaeTile + a.sequences : a.sequences, "gae")), block(kSequenceThreads);
  const size_t shared = kSharedSize * sizeof(float);
  if (!tiled) {
    FA_LAUNCH(gae_fwd_kernel<false>, grid, block, shared, stream, a);
    return;
  }
  FA_LAUNCH(gae_maps_kernel, grid, block, shared, stream, a);
  FA_LAUNCH(gae_fwd_kernel<true>, grid, block, shared, stream, a);
}

}  // namespace cuda
}  // namespace fastalign
