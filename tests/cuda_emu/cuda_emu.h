// Runs CUDA kernels on the CPU for tests. Force-included (-include) before a .cu file that is compiled by g++ with -DFA_EMU.
//
// Every CUDA thread is a fiber; all fibers of a launch run on the calling OS thread under one scheduler (a cluster's blocks too: one
// scheduler makes every interleaving reproducible from its seed and every deadlock certain). A fiber runs until it reaches a barrier, a
// warp operation or an atomic; which one runs next is drawn at random: under an odd seed evenly, under an even one warps have ranks, and a
// warp runs while those above it wait. Several clusters of the grid are under way at a time, in random order.
//
// What it finds: shared memory used before it was written (it starts as NaN) or outside its size; barriers and warp operations that not
// all threads reach, or reach at different places; deadlocks, across the blocks of a cluster too; a block that exits while others may
// read its shared memory or copies to it are under way; launches that a GPU would refuse. Not found: races between threads that no
// interleaving of these points exposes, and memory ordering.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>
#include "common.h"
#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };

namespace emu {

// Where in the source a thread waits. As a default argument, Site() is the place of the call.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

struct Block;
struct Thread {
  Context context;
  char* stack = nullptr;
  Block* block = nullptr;
  dim3 index;
  unsigned linear = 0;
  uint64_t rank = 0, ticket = 0;  // even seeds: of its warp; drawn again each time it becomes ready
  bool done = false;
  uint64_t given = 0, taken = 0;  // what this lane puts into a warp operation and gets out of it
  unsigned source = 0;  // the lane it reads
  bool reads = false;
};

// A meeting of threads at one place. `expected` counts the threads that have not exited.
struct Barrier {
  const char* kind = "";
  Site site;
  std::vector<Thread*> waiting;
};
struct WarpMeeting {
  unsigned mask = 0, arrived = 0;
  Barrier barrier;
};
struct Cluster;
constexpr size_t kSharedLimit = 227 << 10;  // of sm_90 and sm_100

// A flag for asynchronous copies: what was announced, and the copies that are not made yet.
struct Copies {
  struct Copy {
    char* to;
    const char* from;
    unsigned bytes;
  };
  bool announced = false;
  unsigned bytes = 0, started = 0;
  std::vector<Copy> pending;
};
struct Block {
  Cluster* cluster = nullptr;
  dim3 index;
  unsigned rank = 0, alive = 0;
  std::vector<Thread> threads;
  std::vector<unsigned> lanes_alive;  // per warp, a bit mask
  std::vector<std::vector<WarpMeeting>> meetings;  // per warp
  Barrier barrier;
  std::vector<char> memory;
  char* shared = nullptr;
  unsigned mapped = 0;  // by another block, in this epoch of the cluster
  std::map<const void*, Copies> flags;  // by their address in shared memory
};
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned alive = 0;
  unsigned epoch = 1;  // 1 + completed cluster barriers
  Barrier barrier;
};

class Machine {
 public:
  Thread* current = nullptr;
  dim3 block_dim, grid_dim;
  struct { unsigned cluster = 0, threads = 0, shared = 0; } last;  // what the last launch took per row or block
  unsigned seed = 1;

  void launch(const char* name, dim3 grid, dim3 block, size_t shared, unsigned cluster, const std::function<void()>& body) {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || shared > kSharedLimit ||
        cluster == 0 || cluster > 8 || grid.x % cluster)
      throw std::runtime_error(std::string("emulated launch of ") + name + ": invalid configuration");
    name_ = name, body_ = &body, block_dim = block, grid_dim = grid, shared_ = shared, error_ = nullptr,
    random_ = seed * 0x9e3779b97f4a7c15ull + 1;
    last = {cluster, unsigned(threads), unsigned(shared)};
    run(cluster, blocks / cluster, std::max<uint64_t>(1, std::min<uint64_t>(4, 2048 / (threads * cluster))));
  }

  // ---- called from fibers ----
  void yield() {
    wake(current);
    leave();
  }
  void meet_block(Site site) {
    Block& b = *current->block;
    arrive(b.barrier, "__syncthreads", site);
    release_if(b.barrier, b.alive);
    leave();
  }
  void meet_cluster(Site site) {
    Cluster& c = *current->block->cluster;
    arrive(c.barrier, "cluster_sync", site);
    release_if_cluster(c);
    leave();
  }
  // Returns what lane `source` of the warp gave (0 where nothing is read).
  uint64_t meet_warp(const char* kind, unsigned mask, uint64_t given, unsigned source, bool reads, Site site) {
    Block& b = *current->block;
    const unsigned warp = current->linear / 32, lane = current->linear % 32;
    current->given = given, current->source = source, current->reads = reads;
    if (!(mask >> lane & 1)) fail(kind, site, "the mask leaves out the calling lane");
    auto& meetings = b.meetings[warp];
    auto m = std::find_if(meetings.begin(), meetings.end(), [&](const WarpMeeting& w) { return w.mask & mask; });
    if (m == meetings.end()) meetings.push_back({mask, 0, {}}), m = meetings.end() - 1;
    if (m->mask != mask) fail(kind, site, "lanes of a warp meet with different masks");
    arrive(m->barrier, kind, site);
    m->arrived |= 1u << lane;
    release_warps(b, warp);
    leave();
    return current->taken;
  }
  char* shared_of(char* mine, unsigned rank) {
    Block& b = *current->block;
    Cluster& c = *b.cluster;
    if (rank >= c.blocks.size()) throw std::runtime_error(text("cluster_map: no such rank"));
    if (mine < b.shared || mine >= b.shared + shared_) throw std::runtime_error(text("cluster_map: not an address in shared memory"));
    if (c.epoch == 1) throw std::runtime_error(text("cluster_map before the first cluster_sync: the other block may not run yet"));
    if (!c.blocks[rank]->alive) throw std::runtime_error(text("cluster_map: that block has exited"));
    if (rank != b.rank) c.blocks[rank]->mapped = c.epoch;
    return c.blocks[rank]->shared + (mine - b.shared);
  }
  // Copies are made when the first thread waits for them, as late as a GPU may: who forgets to wait finds poison.
  void init_flag(void* flag) {
    Block& b = *current->block;
    if (static_cast<char*>(flag) < b.shared || static_cast<char*>(flag) + 8 > b.shared + shared_ || reinterpret_cast<uintptr_t>(flag) % 8)
      throw std::runtime_error(text("a copy flag that is not 8 aligned bytes of shared memory"));
    if (!b.flags.emplace(flag, Copies{}).second) throw std::runtime_error(text("a copy flag is initialised twice"));
    yield();
  }
  void announce(void* flag, unsigned bytes) {
    Copies& c = copies(flag);
    if (c.announced) throw std::runtime_error(text("a copy flag is used twice"));
    c.announced = true, c.bytes = bytes;
  }
  void start_copy(void* to, const void* from, unsigned bytes, void* flag) {
    Block& b = *current->block;
    char* t = static_cast<char*>(to);
    if (t < b.shared || t + bytes > b.shared + shared_) throw std::runtime_error(text("a copy to outside shared memory"));
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
      throw std::runtime_error(text("a copy whose addresses or size are not multiples of 16"));
    copies(flag).pending.push_back({t, static_cast<const char*>(from), bytes});
    copies(flag).started += bytes;
    yield();
  }
  void wait_for_copies(void* flag) {
    Copies& c = copies(flag);
    if (!c.announced || c.started != c.bytes) throw std::runtime_error(text("waits for copies that never add up to what was announced"));
    for (const Copies::Copy& copy : c.pending) std::memcpy(copy.to, copy.from, copy.bytes);
    c.pending.clear();
    yield();
  }

 private:
  Copies& copies(void* flag) {
    auto& flags = current->block->flags;
    const auto found = flags.find(flag);
    if (found == flags.end()) throw std::runtime_error(text("a copy flag is used before it is initialised"));
    return found->second;
  }

  static constexpr size_t kGuard = 256;  // bytes on either side of a block's shared memory

  std::string text(const std::string& what) const { return "emulated kernel " + name_ + ": " + what; }
  [[noreturn]] void fail(const char* kind, Site site, const std::string& what) {
    throw std::runtime_error(text(std::string(kind) + " at " + site.text() + ": " + what));
  }

  void leave() { switch_context(current->context, scheduler_); }

  void arrive(Barrier& barrier, const char* kind, Site site) {
    if (barrier.waiting.empty()) barrier.kind = kind, barrier.site = site;
    else if (!(barrier.site == site) || std::strcmp(barrier.kind, kind))
      fail(kind, site, std::string("divergent: other threads wait in ") + barrier.kind + " at " + barrier.site.text());
    barrier.waiting.push_back(current);
  }
  void release(Barrier& barrier) {
    for (Thread* t : barrier.waiting) wake(t);
    barrier.waiting.clear();
  }
  void release_if(Barrier& barrier, unsigned expected) {
    if (!barrier.waiting.empty() && barrier.waiting.size() == expected) release(barrier);
  }
  void release_if_cluster(Cluster& c) {
    if (!c.barrier.waiting.empty() && c.barrier.waiting.size() == c.alive) ++c.epoch, release(c.barrier);
  }
  void release_warps(Block& b, unsigned warp) {
    auto& meetings = b.meetings[warp];
    for (size_t i = meetings.size(); i-- > 0;) {
      WarpMeeting& m = meetings[i];
      if (m.arrived != (m.mask & b.lanes_alive[warp])) continue;
      // All values are exchanged now, before any lane goes on to its next operation.
      for (Thread* t : m.barrier.waiting) {
        t->taken = 0;
        if (std::strcmp(m.barrier.kind, "__ballot_sync") == 0)
          for (Thread* other : m.barrier.waiting) t->taken |= other->given << (other->linear % 32);
        if (!t->reads) continue;
        if (!(m.arrived >> t->source & 1))
          throw std::runtime_error(text(std::string(m.barrier.kind) + " at " + m.barrier.site.text() + ": reads a lane that is not there"));
        t->taken = b.threads[warp * 32 + t->source].given;
      }
      release(m.barrier);
      meetings.erase(meetings.begin() + long(i));
    }
  }

  static void entry();  // first frame of every fiber

  // A thread that exits no longer counts, so others may now be complete.
  void exit_current() {
    Block& b = *current->block;
    current->done = true;
    const unsigned warp = current->linear / 32;
    b.lanes_alive[warp] &= ~(1u << current->linear % 32);
    --b.alive, --b.cluster->alive;
    release_warps(b, warp);
    release_if(b.barrier, b.alive);
    release_if_cluster(*b.cluster);
    if (b.alive == 0)
      for (const auto& [flag, copies] : b.flags)
        if (!copies.pending.empty()) throw std::runtime_error(text("a block exits while copies to its shared memory are under way"));
    if (b.alive == 0 && b.mapped == b.cluster->epoch)
      throw std::runtime_error(text("a block exits without a cluster_sync after others took the address of its shared memory"));
  }

  std::unique_ptr<Cluster> start(unsigned size, uint64_t number) {
    auto c = std::make_unique<Cluster>();
    const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
    for (unsigned rank = 0; rank < size; ++rank) {
      c->blocks.push_back(std::make_unique<Block>());
      Block& b = *c->blocks.back();
      const uint64_t linear = number * size + rank;
      b.cluster = c.get(), b.rank = rank, b.alive = threads;
      b.index = dim3(unsigned(linear % grid_dim.x), unsigned(linear / grid_dim.x % grid_dim.y), unsigned(linear / grid_dim.x / grid_dim.y));
      b.memory.assign(shared_ + 2 * kGuard + 16, char(0xff));  // NaN in every float type
      b.shared = b.memory.data() + kGuard + (-reinterpret_cast<uintptr_t>(b.memory.data() + kGuard) & 15);
      b.threads = std::vector<Thread>(threads);
      b.meetings.resize((threads + 31) / 32);
      b.lanes_alive.assign((threads + 31) / 32, 0);
      for (unsigned i = 0; i < threads; ++i) {
        Thread& t = b.threads[i];
        t.block = &b, t.linear = i, t.stack = stacks_.take();
        t.rank = i % 32 ? b.threads[i - 1].rank : draw();
        t.index = dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y);
        t.context.prepare(t.stack, StackPool::kSize, &Machine::entry);
        b.lanes_alive[i / 32] |= 1u << i % 32;
        wake(&t);
      }
      c->alive += threads;
    }
    return c;
  }

  void finish(Cluster& c) {
    for (auto& b : c.blocks) {
      for (Thread& t : b->threads) stacks_.give(t.stack);
      for (const char* p = b->memory.data(); p < b->memory.data() + b->memory.size(); ++p)
        if ((p < b->shared || p >= b->shared + shared_) && *p != char(0xff) && !error_)
          error_ = std::make_exception_ptr(std::runtime_error(text("wrote outside its shared memory")));
    }
  }

  void run(unsigned size, uint64_t clusters, uint64_t window) {
    std::vector<std::unique_ptr<Cluster>> running;
    std::vector<uint64_t> order(clusters);
    for (uint64_t i = 0; i < clusters; ++i) order[i] = i;
    ready_.clear();
    while (!error_ && (!order.empty() || !running.empty())) {
      while (running.size() < window && !order.empty()) {
        std::swap(order[draw() % order.size()], order.back());
        running.push_back(start(size, order.back()));
        order.pop_back();
      }
      if (ready_.empty()) {
        error_ = std::make_exception_ptr(std::runtime_error(text("deadlock: " + waiters(running))));
        break;
      }
      current = next();
      switch_context(scheduler_, current->context);
      Cluster& c = *current->block->cluster;
      if (c.alive) continue;
      finish(c);
      running.erase(std::find_if(running.begin(), running.end(), [&](const auto& r) { return r.get() == &c; }));
    }
    for (auto& c : running) finish(*c);  // after an error: the fibers are dropped where they stand
    if (error_) std::rethrow_exception(error_);
  }

  std::string waiters(const std::vector<std::unique_ptr<Cluster>>& running) const {
    std::map<std::string, int> places;
    const auto add = [&](const Barrier& b) {
      if (!b.waiting.empty()) places[std::string(b.kind) + " at " + b.site.text()] += int(b.waiting.size());
    };
    for (auto& c : running) {
      add(c->barrier);
      for (auto& b : c->blocks) {
        add(b->barrier);
        for (auto& warp : b->meetings)
          for (auto& m : warp) add(m.barrier);
      }
    }
    std::string out;
    for (auto& [place, count] : places) out += (out.empty() ? "" : ", ") + std::to_string(count) + " threads wait in " + place;
    return out;
  }

  // Evenly drawn threads come to a barrier at about the same time, so that its absence may not show; warps in the order of their ranks do not.
  bool ranked() const { return seed % 2 == 0; }
  static bool later(const Thread* a, const Thread* b) { return a->rank != b->rank ? a->rank > b->rank : a->ticket > b->ticket; }
  void wake(Thread* t) {
    t->ticket = draw();
    ready_.push_back(t);
    if (ranked()) std::push_heap(ready_.begin(), ready_.end(), later);
  }
  Thread* next() {
    if (ranked()) std::pop_heap(ready_.begin(), ready_.end(), later);
    else std::swap(ready_[draw() % ready_.size()], ready_.back());
    Thread* t = ready_.back();
    ready_.pop_back();
    return t;
  }
  uint64_t draw() {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return (random_ * 0x2545f4914f6cdd1dull) >> 33;
  }

  std::mutex mutex_;
  std::string name_;
  const std::function<void()>* body_ = nullptr;
  size_t shared_ = 0;
  std::exception_ptr error_;
  Context scheduler_;
  StackPool stacks_;
  std::vector<Thread*> ready_;
  uint64_t random_ = 1;
};

inline Machine machine;

inline void Machine::entry() {
  try {
    (*machine.body_)();
    machine.exit_current();
  } catch (...) {
    if (!machine.error_) machine.error_ = std::current_exception();
  }
  machine.leave();
}

template <class T> uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "warp operations carry at most 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T> T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace emu

#include "cuda_names.h"
