// One row per activation: act(z) and its first three derivatives, from the pre-activation z and
// never from a = act(z), for a (1 - a) loses the small digits of a saturated unit. Every row is
// written once, for vectors on the CPU and scalars on a GPU: `Real` has select, exp_nonpositive,
// log1p_unit and erfc.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "host_device.h"

namespace hvpfast {

// The table: enumerator and public name. Each has an ActivationRow below.
#define HVPFAST_ACTIVATIONS(entry)                                                                 \
  entry(kIdentity, "identity") entry(kRelu, "relu") entry(kSigmoid, "sigmoid")                     \
      entry(kTanh, "tanh") entry(kGelu, "gelu") entry(kGeluTanh, "gelu_tanh") entry(kSilu, "silu") \
          entry(kSoftplus, "softplus")

#define HVPFAST_ENUMERATOR(name, text) name,
enum class Activation { HVPFAST_ACTIVATIONS(HVPFAST_ENUMERATOR) };
#undef HVPFAST_ENUMERATOR

// body(std::integral_constant<Activation, act>): the one place where an activation is switched on.
template <class Body>
void with_activation(Activation act, Body&& body) {
  switch (act) {
#define HVPFAST_CASE(name, text) \
  case Activation::name:         \
    return body(std::integral_constant<Activation, Activation::name>{});
    HVPFAST_ACTIVATIONS(HVPFAST_CASE)
#undef HVPFAST_CASE
  }
  throw std::logic_error("unknown activation");
}

// act'' = act''' = 0 almost everywhere.
constexpr bool piecewise_linear(Activation act) {
  return act == Activation::kIdentity || act == Activation::kRelu;
}

// act, act', act'', act''' at one point.
template <class R>
struct Jet {
  R value, d1, d2, d3;
};

// `Real` supplies the number type and the elementary functions.
template <Activation act, class Real>
struct ActivationRow;

template <class Real>
struct ActivationRow<Activation::kIdentity, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    return {z, Real::constant(1), Real::constant(0), Real::constant(0)};
  }
};

template <class Real>
struct ActivationRow<Activation::kRelu, Real> {
  using R = typename Real::type;
  // z < 0 ? 0 : z keeps NaN; act'(0) = 0 as in PyTorch.
  static HVPFAST_FN Jet<R> at(R z) {
    const R zero = Real::constant(0), one = Real::constant(1);
    return {Real::select(z < zero, zero, z), Real::select(z > zero, one, zero), zero, zero};
  }
};

// s = 1 / (1 + exp(-z)) with e = exp(-|z|):
//   s' = e / (1 + e)^2,   1 - 2 s = -sign(z) (1 - e) / (1 + e)
template <class Real>
struct ActivationRow<Activation::kSigmoid, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    const R zero = Real::constant(0), one = Real::constant(1);
    const R e = Real::exp_nonpositive(-Real::abs(z));
    const R inverse = one / (one + e);
    const R s = Real::select(z < zero, e * inverse, inverse);
    const R d1 = e * inverse * inverse;
    const R t = (one - e) * inverse;  // |1 - 2 s|
    return {s, d1, Real::select(z < zero, t, -t) * d1, d1 * (one - Real::constant(6) * d1)};
  }
};

// t = tanh(z) with e = exp(-2 |z|); near 0 a rational form keeps the relative error small.
template <class Real>
struct ActivationRow<Activation::kTanh, Real> {
  using R = typename Real::type;
  static HVPFAST_FN R tanh(R z) {
    const R zero = Real::constant(0), one = Real::constant(1);
    const R magnitude = Real::abs(z);
    const R e = Real::exp_nonpositive(Real::constant(-2) * magnitude);
    const R far = (one - e) / (one + e);
    const R near = Real::tanh_near_zero(z);
    return Real::select(magnitude < Real::constant(0.625), near, Real::select(z < zero, -far, far));
  }
  static HVPFAST_FN Jet<R> at(R z) {
    const R one = Real::constant(1);
    const R t = tanh(z);
    const R e = Real::exp_nonpositive(Real::constant(-2) * Real::abs(z));
    const R d1 = Real::constant(4) * e / ((one + e) * (one + e));  // 1 - t^2
    return {t, d1, Real::constant(-2) * t * d1, d1 * (Real::constant(4) - Real::constant(6) * d1)};
  }
};

// z Phi(z), Phi(z) = erfc(-z / sqrt 2) / 2, phi = Phi'.
template <class Real>
struct ActivationRow<Activation::kGelu, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    const R cdf = Real::constant(0.5) * Real::erfc(z * Real::constant(-0.70710678118654752440));
    // phi(40) underflows, and powers of a larger z would meet it as inf * 0.
    const R c = Real::clamp(z, 40);
    const R z2 = c * c;
    const R pdf =
        Real::constant(0.39894228040143267794) * Real::exp_nonpositive(Real::constant(-0.5) * z2);
    return {z * cdf, cdf + c * pdf, pdf * (Real::constant(2) - z2),
            pdf * c * (z2 - Real::constant(4))};
  }
};

// z (1 + tanh g) / 2,  g = c (z + 0.044715 z^3),  c = sqrt(2 / pi).
template <class Real>
struct ActivationRow<Activation::kGeluTanh, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    constexpr double c = 0.79788456080286535588, k = 0.044715;
    const R half = Real::constant(0.5);
    const R x = Real::clamp(z, 40);
    const R z2 = x * x;  // 1 - tanh(g)^2 underflows beyond
    const R g = Real::constant(c) * x * (Real::constant(1) + Real::constant(k) * z2);
    const R g1 = Real::constant(c) * (Real::constant(1) + Real::constant(3 * k) * z2);
    const R g2 = Real::constant(6 * c * k) * x;
    const R g3 = Real::constant(6 * c * k);
    const Jet<R> t = ActivationRow<Activation::kTanh, Real>::at(g);
    const R t1 = t.d1 * g1;
    const R t2 = t.d2 * g1 * g1 + t.d1 * g2;
    const R t3 = t.d3 * g1 * g1 * g1 + Real::constant(3) * t.d2 * g1 * g2 + t.d1 * g3;
    const R gate = half + half * t.value;
    return {z * gate, gate + half * x * t1, t1 + half * x * t2,
            Real::constant(1.5) * t2 + half * x * t3};
  }
};

// z s(z), s the logistic function.
template <class Real>
struct ActivationRow<Activation::kSilu, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    const Jet<R> s = ActivationRow<Activation::kSigmoid, Real>::at(z);
    return {z * s.value, s.value + z * s.d1, Real::constant(2) * s.d1 + z * s.d2,
            Real::constant(3) * s.d2 + z * s.d3};
  }
};

// log(1 + exp z); z itself beyond 20, the threshold of torch.nn.Softplus.
template <class Real>
struct ActivationRow<Activation::kSoftplus, Real> {
  using R = typename Real::type;
  static HVPFAST_FN Jet<R> at(R z) {
    const R zero = Real::constant(0), one = Real::constant(1);
    const auto linear = z > Real::constant(20);
    const Jet<R> s = ActivationRow<Activation::kSigmoid, Real>::at(z);
    const R value =
        Real::select(z > zero, z, zero) + Real::log1p_unit(Real::exp_nonpositive(-Real::abs(z)));
    return {Real::select(linear, z, value), Real::select(linear, one, s.value),
            Real::select(linear, zero, s.d1), Real::select(linear, zero, s.d2)};
  }
};

}  // namespace hvpfast
