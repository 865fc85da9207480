// The walk over one sequence of gae.cpp. Part of tokens_impl.h.
#pragma once
#include <cstring>
#include "cpu/tokens.h"

namespace fastalign {
namespace cpu {
namespace {
namespace gae {

constexpr int kLanes = 8, kGroups = 32;     // tokens of a group; groups between two sums in double

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneIndex = int __attribute__((vector_size(kLanes * sizeof(int))));

FA_HD Lanes fill(float x) { return x - Lanes{}; }
FA_HD Lanes load(const float* p) {
  Lanes x;
  memcpy(&x, p, sizeof(x));
  return x;
}
FA_HD void store(const Lanes& x, float* p) { memcpy(p, &x, sizeof(x)); }
FA_HD double total(const Lanes& x) {
  return ((double(x[0]) + double(x[4])) + (double(x[2]) + double(x[6]))) + ((double(x[1]) + double(x[5])) + (double(x[3]) + double(x[7])));
}

template <class T> class Walk {
 public:
  FA_HD Walk(const GaeArgs& a, const GaeStep<double>& step, int64_t s)
      : a_(a), step_(step), begin_(a.cu_seqlens[s]), t_(a.cu_seqlens[s + 1]), x_(a.bootstrap ? at(a.bootstrap)[s] : T(0)) {}

  FA_HD Moments<double> run() {
    while (t_ > begin_) {
      if (seen_.count > 0 && group_is_scored(t_)) groups();
      else token();
    }
    return seen_.moments();
  }

 private:
  static const T* at(const void* p) { return static_cast<const T*>(p); }

  FA_HD void token() {
    T &advantage = static_cast<T*>(a_.advantages)[--t_], &target = static_cast<T*>(a_.returns)[t_];
    if (a_.mask && !a_.mask[t_]) {
      advantage = target = T(0);
      return;
    }
    const double reward = at(a_.rewards)[t_], value = at(a_.values)[t_];
    const GaeResult<double> r = step_.result(reward, value, x_);
    target = T(r.target);
    advantage = T(r.advantage);
    seen_.push(r.advantage);
    x_ = step_.map(reward, value)(x_);
  }

  // fp32 only: whether the eight tokens before t are there and all scored.
  FA_HD bool group_is_scored(int64_t t) const {
    if (sizeof(T) != sizeof(float) || t - begin_ < kLanes) return false;
    constexpr uint64_t all = 0x0101010101010101;
    uint64_t scored = all;
    if (a_.mask) memcpy(&scored, a_.mask + t - kLanes, kLanes);
    return scored == all;
  }

  // Scored tokens by eights, as long as there are. A lane first holds X as if it were 0 behind the group; the true X comes in last, so that a group
  // waits for the one before it no longer than a multiplication and an addition take.
  FA_HD void groups() {
    const auto *rewards = reinterpret_cast<const float*>(a_.rewards), *values = reinterpret_cast<const float*>(a_.values);
    auto *advantages = reinterpret_cast<float*>(a_.advantages), *returns = reinterpret_cast<float*>(a_.returns);
    const GaeStep<Lanes> step{fill(float(step_.gamma)), fill(float(step_.lam)), fill(float(step_.decay)), fill(float(step_.value_share))};
    const double d = step_.decay, d2 = d * d, d4 = d2 * d2, d8 = d4 * d4;
    const Lanes none{}, by1 = fill(float(d)), by2 = fill(float(d2)), by4 = fill(float(d4));
    const Lanes powers{float(d4 * d2 * d), float(d4 * d2), float(d4 * d), float(d4), float(d2 * d), float(d2), float(d), 1.0f};
    int64_t t = t_;
    double carried = x_;  // local: a store to the results could be to a member, for all the compiler knows
    // Moments are summed in fp32 as differences from the last advantage before, over longer and longer stretches: a sequence's last advantages
    // are often far from the others.
    float near = float(seen_.shift);
    for (int stretch = 1; group_is_scored(t); stretch = stretch < kGroups ? 2 * stretch : kGroups) {
      Lanes sum{}, square{}, advantage{};
      const Lanes shift = fill(near);
      int count = 0;
      for (; count < stretch && group_is_scored(t); ++count) {
        t -= kLanes;
        const Lanes reward = load(rewards + t), value = load(values + t), after = fill(float(carried));
        Lanes x = step.map(reward, value).b;
        x = multiply_add(by1, __builtin_shuffle(x, none, LaneIndex{1, 2, 3, 4, 5, 6, 7, 8}), x);
        x = multiply_add(by2, __builtin_shuffle(x, none, LaneIndex{2, 3, 4, 5, 6, 7, 8, 9}), x);
        x = multiply_add(by4, __builtin_shuffle(x, none, LaneIndex{4, 5, 6, 7, 8, 9, 10, 11}), x);
        carried = d8 * carried + double(x[0]);
        const Lanes x_next = multiply_add(powers, after, __builtin_shuffle(x, none, LaneIndex{1, 2, 3, 4, 5, 6, 7, 8}));
        const GaeResult<Lanes> r = step.result(reward, value, x_next);
        advantage = r.advantage;
        store(r.target, returns + t);
        store(advantage, advantages + t);
        sum += advantage - shift;
        square += (advantage - shift) * (advantage - shift);
      }
      seen_.add(kLanes * count, near, total(sum), total(square));
      near = advantage[0];
    }
    t_ = t;
    x_ = carried;
  }

  const GaeArgs& a_;
  const GaeStep<double>& step_;
  const int64_t begin_;
  int64_t t_;  // one past the next token
  double x_;  // X of that place
  MomentSums<double> seen_;
};

template <class T> Moments<double> walk(const GaeArgs& a, const GaeStep<double>& step, int64_t s) { return Walk<T>(a, step, s).run(); }

}  // namespace gae
}  // namespace
}  // namespace cpu
}  // namespace fastalign
