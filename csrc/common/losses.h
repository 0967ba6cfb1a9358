// Softmax, second and third directional derivative of a loss on the logits z (C classes) of one
// sample, or of one vector of samples side by side: class c lies at z[c * stride]. `Real` is a
// vector on the CPU; on a GPU it is a scalar of each thread of a team that shares the classes of a
// sample.
//
// Softmax cross-entropy with target mass q (C) and total mass m = sum q (label smoothing, class
// weights, ignored targets are all choices of q), p = softmax(z), w = m / normalizer:
//   loss      m logsumexp(z) - <q, z>
//   gradient  w p - q / normalizer
//   D2[u]     w p * (u - <p, u>)
//   D3[u, v]  w p * ((u - <p, u>) (v - <p, v>) - <p, (u - <p, u>) (v - <p, v>)>)
// Squared error: D2[u] = w u, D3 = 0.
#pragma once
#include "activations.h"

namespace hvpfast {

// p = softmax(z); returns logsumexp(z). The largest logit is subtracted first, for exp overflows
// above 88 in float32.
template <class Real, class T>
HVPFAST_FN typename Real::type softmax(const T* z, int C, int stride, T* p) {
  using R = typename Real::type;
  R top = Real::load(z);
  for (int c = Real::first(); c < C; c += Real::kStep)
    top = Real::max(top, Real::load(z + c * stride));
  top = Real::team_max(top);
  R sum = Real::constant(0);
  for (int c = Real::first(); c < C; c += Real::kStep) {
    const R e = Real::exp_nonpositive(Real::load(z + c * stride) - top);
    Real::store(p + c * stride, e);
    sum += e;
  }
  sum = Real::team_sum(sum);
  const R inverse = Real::constant(1) / sum;
  for (int c = Real::first(); c < C; c += Real::kStep)
    Real::store(p + c * stride, Real::load(p + c * stride) * inverse);
  return Real::log_positive(sum) + top;
}

// <p, u>
template <class Real, class T>
HVPFAST_FN typename Real::type class_mean(const T* p, const T* u, int C, int stride) {
  typename Real::type mean = Real::constant(0);
  for (int c = Real::first(); c < C; c += Real::kStep)
    mean += Real::load(p + c * stride) * Real::load(u + c * stride);
  return Real::team_sum(mean);
}

// out = w p * (u - <p, u>); out may be u.
template <class Real, class T>
HVPFAST_FN void cross_entropy_d2(const T* p, typename Real::type w, const T* u, int C, int stride,
                                 T* out) {
  const auto mean = class_mean<Real>(p, u, C, stride);
  for (int c = Real::first(); c < C; c += Real::kStep)
    Real::store(out + c * stride,
                w * Real::load(p + c * stride) * (Real::load(u + c * stride) - mean));
}

// out += D3[u, v]
template <class Real, class T>
HVPFAST_FN void add_cross_entropy_d3(const T* p, typename Real::type w, const T* u, const T* v,
                                     int C, int stride, T* out) {
  const auto mean_u = class_mean<Real>(p, u, C, stride);
  const auto mean_v = class_mean<Real>(p, v, C, stride);
  auto covariance = Real::constant(0);
  for (int c = Real::first(); c < C; c += Real::kStep)
    covariance += Real::load(p + c * stride) * (Real::load(u + c * stride) - mean_u) *
                  (Real::load(v + c * stride) - mean_v);
  covariance = Real::team_sum(covariance);
  for (int c = Real::first(); c < C; c += Real::kStep) {
    const auto product =
        (Real::load(u + c * stride) - mean_u) * (Real::load(v + c * stride) - mean_v);
    Real::store(out + c * stride, Real::load(out + c * stride) +
                                      w * Real::load(p + c * stride) * (product - covariance));
  }
}

}  // namespace hvpfast
