// The contract between Python and the CPU engine, one signature per operation; cuda/ops.h has the
// same operations for the CUDA engine.
//
// Sizes: N samples, D[0..L] widths, P parameters, K tangents.
// Names:  z pre-activation, a activation, z_dot = R{z}, z_bar = dL/dz, z_bar_dot = R{dL/dz}
// (Pearlmutter 1994, R{.} the derivative along a tangent). All arrays are in row-major order; T is
// float or double.
//
// linearize does the primal passes once and keeps their residuals, which all else reads. `out` is
// always overwritten. The caller owns every array passed in, and keeps params and x alive and
// unchanged while a Linearization lives.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "mlp.h"

namespace hvpfast {

// Tangents drawn by the library (probes.h): K of them, numbered from `first`.
enum class Distribution { kRademacher, kNormal };
struct Probes {
  Distribution distribution;
  uint64_t seed;
  uint32_t first;
};

// The curvature matrix: the Hessian, or the generalised Gauss-Newton matrix J' (d2 loss / dz2) J.
enum class Curvature { kHessian, kGgn };

// The tensors whose block of a curvature matrix is taken: flags of W_l and b_l, l = 1..L. Entry 0
// is not used.
struct Chosen {
  std::vector<uint8_t> weight, bias;
};

// Penalties without probes, from every sample's Hessian core (cpu/exact/cores-inl.h): tr H, tr H^2.
enum class Exact { kTrace, kFro2 };

// A curvature penalty at one point, mean_k ||H v_k||^2 or an Exact one, with what its gradient
// needs. Its Linearization must outlive it.
template <class T>
class Penalty {
 public:
  virtual ~Penalty() = default;
  virtual double value() const = 0;
  // out (P) = g_loss dL/dparams + g_penalty d value/dparams
  virtual void gradient(double g_loss, double g_penalty, T* out, int threads) const = 0;
};

template <class T>
class Linearization {
 public:
  virtual ~Linearization() = default;
  virtual double loss() const = 0;
  virtual double normalizer() const = 0;
  virtual size_t num_bytes() const = 0;

  // out (P) = dL/dparams
  virtual void gradient(T* out, int threads) const = 0;
  // out (K, P) = H tangents
  virtual void hvp(const T* tangents, int64_t K, Curvature curvature, T* out,
                   int threads) const = 0;
  // out (K) = tangents' H tangents, without forming H tangents
  virtual void quadratic(const T* tangents, int64_t K, Curvature curvature, T* out,
                         int threads) const = 0;
  // out (P) = d/dparams sum_k <cotangents_k, H tangents_k>
  virtual void hvp_vjp(const T* tangents, const T* cotangents, int64_t K, Curvature curvature,
                       T* out, int threads) const = 0;
  // For tangents (K, P), K >= 1, which must outlive the result or, where those are null, for
  // probes. Normal probes are drawn implicitly in the first layer where that is cheaper
  // (cpu/gram-inl.h).
  virtual std::unique_ptr<Penalty<T>> penalty(const T* tangents, const Probes* probes, int64_t K,
                                              Curvature curvature, int threads) const = 0;

  // out (N): the trace of each sample's part of H
  virtual void sample_traces(Curvature curvature, const Chosen& chosen, T* out,
                             int threads) const = 0;
  // out (P) = diag H
  virtual void diagonal(Curvature curvature, T* out, int threads) const = 0;
  // tr H G for H here and G of the same network at `other`, which may be this one
  virtual double inner_product(const Linearization& other, Curvature curvature,
                               const Chosen& chosen, int threads) const = 0;
  virtual std::unique_ptr<Penalty<T>> exact_penalty(Exact kind, Curvature curvature,
                                                    const Chosen& chosen, int threads) const = 0;
  // Bytes of scratch memory: of sample_traces, diagonal and inner_product or, with `gradient`, of
  // exact_penalty.
  virtual size_t exact_bytes(Exact kind, Curvature curvature, const Chosen& chosen, bool gradient,
                             int threads) const = 0;
};

// The arguments of linearize. y: class labels, int64 (N), for cross-entropy; rows T (N, D[L]) for
// squared error.
template <class T>
struct Problem {
  std::shared_ptr<const MlpSpec> spec;
  LayerPointers<T> params;
  const T* x;  // (N, D[0]), rows x_stride apart
  int64_t x_stride;
  const void* y;
  int64_t y_stride;  // rows of a squared-error target
  int64_t N;
  bool third_order;  // keep what hvp_vjp and penalty need
};

}  // namespace hvpfast
