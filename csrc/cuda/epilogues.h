// Epilogues: what becomes of each entry (i, j) of a product, for model m and tangent k.
#pragma once
#include "real.h"
#include "stack.h"

namespace hvpfast::cuda {

// z = value + b;  a = act(z), s1 = act'(z), act''(z) and act'''(z)
template <class T>
struct Activate {
  Activation act;
  Stack<T> b, a, s1, d2, d3;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    const Jet<T> jet = jet_of(act, b ? value + b(m, k, 0, j) : value);
    a(m, k, i, j) = jet.value;
    s1(m, k, i, j) = jet.d1;
    if (d2) d2(m, k, i, j) = jet.d2;
    if (d3) d3(m, k, i, j) = jet.d3;
  }
};

// a_bar = value;  z_bar = s1 a_bar, s2 = d2 a_bar, d3 = act''' a_bar; d2 may be s2
template <class T>
struct PrimalBackward {
  Stack<T> s1, d2, s2, d3, z_bar;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    if (s2) s2(m, k, i, j) = d2(m, k, i, j) * value;
    if (d3) d3(m, k, i, j) *= value;
    z_bar(m, k, i, j) = s1(m, k, i, j) * value;
  }
};

// z_dot = value + b, or scale * given;  a_dot = s1 z_dot
template <class T>
struct TangentForward {
  Stack<T> b, s1, z_dot, a_dot, given;
  T scale = T(1);
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    const T dot = given ? scale * given(m, k, i, j) : b ? value + b(m, k, 0, j) : value;
    if (z_dot) z_dot(m, k, i, j) = dot;
    if (a_dot) a_dot(m, k, i, j) = s1(m, k, i, j) * dot;
  }
};

// a_bar_dot = value;  z_bar_dot = s1 a_bar_dot + s2 z_dot
template <class T>
struct TangentBackward {
  Stack<T> s1, s2, z_dot, a_bar_dot, z_bar_dot;  // s2: Hessian of a smooth activation only
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    if (a_bar_dot) a_bar_dot(m, k, i, j) = value;
    T bar = s1(m, k, i, j) * value;
    if (s2) bar += s2(m, k, i, j) * z_dot(m, k, i, j);
    z_bar_dot(m, k, i, j) = bar;
  }
};

// W = value, b = sum of A's row
template <class T>
struct Store {
  Stack<T> W, b;
  bool add = false;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    T& out = W(m, k, i, j);
    out = add ? out + value : value;
  }
  __device__ void bias(int64_t m, int64_t k, int i, T sum) const {
    T& out = b(m, k, 0, i);
    out = add ? out + sum : sum;
  }
};

// z = value + shift
template <class T>
struct StoreShifted {
  Stack<T> z;
  T shift;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    z(m, k, i, j) = value + shift;
  }
};

// z_uv = value;  a_uv = s1 z_uv + sum_q act'' z_v z_u
template <class T>
struct MixedForward {
  Stack<T> s1, d2, z_v, z_u, z, a;  // d2, z_v, z_u: smooth activations only
  int K;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    if (z) z(m, k, i, j) = value;
    if (!a) return;
    T product = T(0);
    for (int q = 0; d2 && q < K; ++q) product += z_v(m, k + q, i, j) * z_u(m, k + q, i, j);
    a(m, k, i, j) = s1(m, k, i, j) * value + (d2 ? d2(m, k, i, j) * product : T(0));
  }
};

// a_bar_uv = value
// z_bar_uv = s1 a_bar_uv + sum_q act'' (a_bar_u z_v + a_bar_v z_u)
//            + s2 z_uv + sum_q act''' a_bar z_v z_u                  this line: Hessian only
template <class T>
struct MixedBackward {
  Stack<T> s1, s2, d2, d3, z_v, z_u, a_bar_v, a_bar_u, z, z_bar;  // z: null where z_uv = 0
  int K;
  bool hessian;
  __device__ void operator()(int64_t m, int64_t k, int i, int j, T value) const {
    T sum = s1(m, k, i, j) * value;
    if (d2) {
      T cross = T(0), product = T(0);
      for (int q = k; q < k + K; ++q) {
        const T v = z_v(m, q, i, j), u = z_u(m, q, i, j);
        cross += a_bar_u(m, q, i, j) * v + a_bar_v(m, q, i, j) * u;
        product += v * u;
      }
      sum += d2(m, k, i, j) * cross;
      if (hessian) sum += d3(m, k, i, j) * product;
      if (hessian && z) sum += s2(m, k, i, j) * z(m, k, i, j);
    }
    z_bar(m, k, i, j) = sum;
  }
};

// Summands of scalars: factor x y, and s2 z^2.
template <class T>
struct Dot {
  Stack<T> x, y;
  double factor;
  __device__ double operator()(int64_t m, int64_t k, int i, int j) const {
    return factor * double(x(m, k, i, j)) * double(y(m, k, i, j));
  }
};
template <class T>
struct WeightedSquare {
  Stack<T> weight, z;
  __device__ double operator()(int64_t m, int64_t k, int i, int j) const {
    const double dot = double(z(m, k, i, j));
    return double(weight(m, k, i, j)) * dot * dot;
  }
};

}  // namespace hvpfast::cuda
