// The loss per sample: a team of threads per sample n, of model m and tangent k (losses.h).
#pragma once
#include "real.h"
#include "stack.h"

namespace hvpfast::cuda {

__device__ inline double class_weight(const Targets& t, int64_t c) {
  return t.class_weights ? t.class_weights[c] : 1.0;
}

// Whether the sample counts: labels out of range are reported through Scalars and do not.
__device__ inline bool counts(const Targets& t, int64_t label) {
  return label != t.ignore_index && label >= 0 && label < t.classes;
}

__device__ inline const int64_t* labels(const Targets& t, int64_t m) {
  return static_cast<const int64_t*>(t.y) + m * t.y_model;
}

// z_bar = dloss/dz_L in place of z_L, p = softmax(z_L), the weight w and the loss of the sample.
//   target mass of sample n   q + smoothing / C sum_c c_c,   q = (1 - smoothing) c_{y_n}
template <class T>
struct LossGradient {
  Targets targets;
  Stack<T> z_bar, p, weight;
  Stack<double> losses;  // (N, 1)
  const Scalars* scalars;
  template <Comers comers>
  __device__ void sample(int64_t m, int64_t k, int n) const {
    using Real = TeamReal<T, comers>;
    const int C = targets.classes;
    const double inverse = scalars[m].inverse;
    T* z = &z_bar(m, k, n, 0);
    double loss = 0;
    T w = T(0);
    if (targets.loss == Loss::kMse) {
      w = T(2.0 * inverse);
      const T* y = static_cast<const T*>(targets.y) + m * targets.y_model + int64_t(n) * C;
      for (int c = Real::first(); c < C; c += Real::kStep) {
        const T error = z[c] - y[c];
        loss += double(error) * double(error);
        z[c] = error * w;
      }
    } else {
      const int64_t label = labels(targets, m)[n];
      const bool counted = counts(targets, label);
      const double share = targets.smoothing / C;
      double q = 0, mass = 0;
      if (counted) {
        q = (1.0 - targets.smoothing) * class_weight(targets, label);
        for (int c = 0; share > 0 && targets.class_weights && c < C; ++c)
          mass += class_weight(targets, c);
        mass = q + share * (targets.class_weights ? mass : double(C));
      }
      w = T(mass * inverse);
      T* probability = &p(m, k, n, 0);
      const T log_sum = softmax<Real>(z, C, 1, probability);
      for (int c = Real::first(); c < C; c += Real::kStep) {
        const double log_p = double(z[c]) - double(log_sum);
        T bar = w * probability[c];
        if (counted && share > 0) {
          loss -= share * class_weight(targets, c) * log_p;
          bar -= T(share * class_weight(targets, c) * inverse);
        }
        if (counted && c == label) {
          loss -= q * log_p;
          bar -= T(q * inverse);
        }
        z[c] = bar;
      }
    }
    loss = TeamReal<double, comers>::team_sum(loss);
    if (Real::first() == 0) {
      weight(m, k, n, 0) = w;
      losses(m, k, n, 0) = loss;
    }
  }
};

// z_bar_dot_L = (d2 loss / dz2) z_dot_L; the two may be one.
template <class T>
struct LossHvp {
  Loss loss;
  int C;
  Stack<T> p, weight, z_dot, z_bar_dot;
  template <Comers comers>
  __device__ void sample(int64_t m, int64_t k, int n) const {
    using Real = TeamReal<T, comers>;
    const T w = weight(m, k, n, 0);
    const T* u = &z_dot(m, k, n, 0);
    T* out = &z_bar_dot(m, k, n, 0);
    if (loss == Loss::kCrossEntropy) {
      cross_entropy_d2<Real>(&p(m, k, n, 0), w, u, C, 1, out);
    } else {
      for (int c = Real::first(); c < C; c += Real::kStep) out[c] = w * u[c];
    }
  }
};

// z_bar_uv_L = D2[z_uv] + sum_q D3[z_v, z_u] + g_loss z_bar_L;  first term: Hessian only
template <class T>
struct MixedLoss {
  Loss loss;
  int C, K;
  T g_loss;
  Stack<T> p, weight, z_bar, z_v, z_u, z, out;  // z: null for the Gauss-Newton matrix
  template <Comers comers>
  __device__ void sample(int64_t m, int64_t k, int n) const {
    using Real = TeamReal<T, comers>;
    const bool cross_entropy = loss == Loss::kCrossEntropy;
    const T w = weight(m, k, n, 0);
    T* sum = &out(m, k, n, 0);
    const T* probability = cross_entropy ? &p(m, k, n, 0) : nullptr;
    if (z && cross_entropy) {
      cross_entropy_d2<Real>(probability, w, &z(m, k, n, 0), C, 1, sum);
    } else {
      for (int c = Real::first(); c < C; c += Real::kStep) sum[c] = z ? w * z(m, k, n, c) : T(0);
    }
    for (int q = 0; cross_entropy && q < K; ++q)
      add_cross_entropy_d3<Real>(probability, w, &z_v(m, k + q, n, 0), &z_u(m, k + q, n, 0), C, 1,
                                 sum);
    for (int c = Real::first(); c < C; c += Real::kStep) sum[c] += g_loss * z_bar(m, k, n, c);
  }
};

// The sum over the threads of a block, in a fixed order; every thread gets it.
__device__ inline double block_sum(double x) {
  __shared__ double part[kThreads];
  part[threadIdx.x] = x;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = part[0];
  __syncthreads();
  return sum;
}

// Per model, by one block: what the loss is divided by, and the first label out of range.
struct WeighTargets {
  Targets targets;
  int N;
  Scalars* scalars;
  __device__ void operator()(int64_t m) const {
    double counted = 0;
    double first = double(N);
    if (targets.loss == Loss::kMse) {
      counted = double(N) * double(targets.classes);
    } else {
      const int64_t* y = labels(targets, m);
      for (int n = int(threadIdx.x); n < N; n += int(blockDim.x)) {
        if (counts(targets, y[n])) {
          counted += class_weight(targets, y[n]);
        } else if (y[n] != targets.ignore_index && double(n) < first) {
          first = double(n);
        }
      }
      counted = block_sum(counted);
      first = block_min(first);
    }
    if (threadIdx.x == 0) {
      scalars[m].normalizer = targets.mean ? counted : 1.0;
      scalars[m].inverse = targets.mean ? 1.0 / counted : 1.0;
      scalars[m].wrong_label = first < double(N) ? first : -1.0;
    }
  }

 private:
  __device__ static double block_min(double x) {
    __shared__ double part[kThreads];
    part[threadIdx.x] = x;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
      if (threadIdx.x < half && part[threadIdx.x + half] < part[threadIdx.x])
        part[threadIdx.x] = part[threadIdx.x + half];
      __syncthreads();
    }
    return part[0];
  }
};

// Per model, by one block: loss = sum_n losses_n / normalizer.
struct SumLosses {
  Stack<double> losses;
  int N;
  Scalars* scalars;
  __device__ void operator()(int64_t m) const {
    double sum = 0;
    for (int n = int(threadIdx.x); n < N; n += int(blockDim.x)) sum += losses(m, 0, n, 0);
    sum = block_sum(sum);
    if (threadIdx.x == 0) scalars[m].loss = sum * scalars[m].inverse;
  }
};

// Per model, by one block: value (M) = mean_k of totals (M, K).
struct MeanOverTangents {
  const double* totals;
  int K;
  double* value;
  __device__ void operator()(int64_t m) const {
    double sum = 0;
    for (int k = int(threadIdx.x); k < K; k += int(blockDim.x)) sum += totals[m * K + k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) value[m] = sum / K;
  }
};

}  // namespace hvpfast::cuda
