// The `Real` of activations.h and losses.h on the CPU: one vector.
#pragma once
#include "vmath-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
struct VectorReal {
  using type = Vec<T>;
  using R = Vec<T>;
  // A vector of samples has the classes to itself.
  static constexpr int kStep = 1;
  static constexpr int first() { return 0; }
  static HVP_INLINE R team_sum(R x) { return x; }
  static HVP_INLINE R team_max(R x) { return x; }
  static HVP_INLINE R load(const T* p) { return hvpfast::HVPFAST_ISA::load(p); }
  static HVP_INLINE void store(T* p, R v) { hvpfast::HVPFAST_ISA::store(p, v); }
  static HVP_INLINE R constant(double c) { return broadcast(T(c)); }
  static HVP_INLINE R select(IntVec<T> mask, R yes, R no) { return mask ? yes : no; }
  static HVP_INLINE R abs(R x) { return vabs<T>(x); }
  static HVP_INLINE R max(R a, R b) { return vmax<T>(a, b); }
  static HVP_INLINE R clamp(R x, double bound) {
    const R top = constant(bound), bottom = constant(-bound);
    return x > top ? top : (x < bottom ? bottom : x);
  }
  static HVP_INLINE R exp_nonpositive(R x) { return hvpfast::HVPFAST_ISA::exp_nonpositive<T>(x); }
  static HVP_INLINE R log_positive(R x) { return hvpfast::HVPFAST_ISA::log_positive<T>(x); }
  static HVP_INLINE R log1p_unit(R x) { return hvpfast::HVPFAST_ISA::log1p_unit<T>(x); }
  static HVP_INLINE R erfc(R x) { return hvpfast::HVPFAST_ISA::erfc<T>(x); }
  // tanh(x) for |x| < 0.625 (Cephes)
  static HVP_INLINE R tanh_near_zero(R x) {
    constexpr double p[] = {-9.64399179425052238628E-1, -9.92877231001918586564E1,
                            -1.61468768441708447952E3};
    constexpr double q[] = {1.0, 1.12811678491632931402E2, 2.23548839060100448583E3,
                            4.84406305325125486048E3};
    const R x2 = x * x;
    return x + x * x2 * (polynomial<T>(x2, p) / polynomial<T>(x2, q));
  }
};

}  // namespace hvpfast::HVPFAST_ISA
