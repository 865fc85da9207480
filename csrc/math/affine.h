// Generalised advantage estimation as one scan of affine maps, against time. Twin: fastalign/ops/math/affine.py; ops/gae/reference.py has the
// textbook form, which is
//   delta_t = r_t + gamma V_next - V_t,    A_t = delta_t + gamma lam A_next,    R_t = A_t + V_t.
// With X_t = lam R_t + (1 - lam) V_t, what the token before t bootstraps from, it becomes
//   R_t = r_t + gamma X_next,    A_t = R_t - V_t,    X_t = gamma lam X_next + (lam r_t + (1 - lam) V_t):
// one affine map per token, where the textbook carries two numbers. An unscored token is the identity; beyond a sequence's last token X is
// its bootstrap value. With lam = 1 no value enters X, so nothing has to cancel.
#pragma once
#include "math/scalar.h"

namespace fastalign {

template <class T> struct Affine {
  T a, b;
  static FA_HD Affine identity() { return {T(1), T(0)}; }
  FA_HD T operator()(T x) const { return multiply_add(a, x, b); }
};

// outer(inner(x)): the monoid. Not commutative; `inner` belongs to the later tokens.
template <class T> FA_HD Affine<T> compose(const Affine<T>& outer, const Affine<T>& inner) {
  return {outer.a * inner.a, multiply_add(outer.a, inner.b, outer.b)};
}

template <class T> struct GaeResult { T target, advantage; };

// What a token does. T may also be a vector of lanes.
template <class T> struct GaeStep {
  T gamma, lam, decay /* gamma lam */, value_share /* 1 - lam */;
  FA_HD Affine<T> map(T reward, T value) const { return {decay, multiply_add(lam, reward, value_share * value)}; }
  // Of a token's own return and advantage both are NaN where either is not finite: from a reward, value or bootstrap that is not finite on, whatever
  // the order of operations makes of it (inf, or inf times a decay that has become 0).
  FA_HD GaeResult<T> result(T reward, T value, T x_next) const {
    const T target = multiply_add(gamma, x_next, reward), advantage = target - value, nothing = advantage - advantage;
    return {target + nothing, advantage + nothing};
  }
};
template <class T> FA_HD GaeStep<T> gae_step(T gamma, T lam) { return {gamma, lam, gamma * lam, T(1) - lam}; }

}  // namespace fastalign
