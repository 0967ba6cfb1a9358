// The contract of csrc/common/contract.h on a GPU, for M models of one network at once: the same
// operations in the same order. The caller allocates everything (results, residuals, workspace) and
// says on which stream; nothing here allocates or waits, so every call can be captured in a CUDA
// graph.
//
// Arrays have the model in front: params (M, P), x (M, N, D[0]), tangents (M, K, P). All addresses
// are on one device. Each operation runs with a Workspace; a counting one measures it instead.
#pragma once
#include <initializer_list>
#include <memory>

#include "call.h"
#include "common/contract.h"
#include "small.h"
#include "stack.h"

namespace hvpfast::cuda {

// What linearize is given.
template <class T>
struct Points {
  std::shared_ptr<const MlpSpec> spec;
  int64_t M, N;
  LayerPointers<T> params;  // of the first model
  int64_t params_model;     // between models
  const T* x;
  int64_t x_model;  // 0: all models share x
  const void* y;
  int64_t y_model;
  const double* class_weights;  // (D[L]) on the device, or null
  bool third_order;
};

// Tangents (M, K, P) of a penalty: rows in memory or, where those are null, probes to be drawn.
template <class T>
struct Tangents {
  const T* rows = nullptr;
  const Probes* probes = nullptr;
};

template <class T>
class Linearization {
 public:
  explicit Linearization(const Points<T>& points);

  // Whether the product with one tangent is one launch: no product of matrices by itself.
  bool one_launch(const Call& call) const { return small(call, 1, {SmallOp::kHvp}); }

  // Residuals in `residuals`, which lives as long as the Linearization; scalars (M).
  void linearize(Call& call, Workspace& residuals, Scalars* scalars);
  // out (M, P) = dL/dparams
  void gradient(Call& call, T* out) const;
  // out (M, K, P) = H tangents
  void hvp(Call& call, const T* tangents, int64_t K, Curvature curvature, T* out) const;
  // out (M, K) = tangents' H tangents
  void quadratic(Call& call, const T* tangents, int64_t K, Curvature curvature, T* out) const;
  // out (M, P) = d/dparams sum_k <cotangents_k, H tangents_k>
  void hvp_vjp(Call& call, const T* tangents, const T* cotangents, int64_t K, Curvature curvature,
               T* out) const;
  // value (M) = mean_k ||H v_k||^2; call.kept is what penalty_gradient needs
  void penalty(Call& call, const Tangents<T>& tangents, int64_t K, Curvature curvature,
               double* value) const;
  // out (M, P) = g_loss dL/dparams + g_penalty d value/dparams, with the same kept memory
  void penalty_gradient(Call& call, const Tangents<T>& tangents, int64_t K, Curvature curvature,
                        double g_loss, double g_penalty, T* out) const;

 private:
  template <class X>
  using Layers = HostLayers<X>;
  using HostNet = Net<T, HostLayers>;
  using HostStreams = Streams<T, HostLayers>;
  using HostBlocks = Blocks<T, HostLayers>;
  struct Kept;

  HostBlocks blocks(const T* flat, int64_t K) const;
  Stack<T> rows(Workspace& workspace, int64_t K, int l) const;
  HostStreams streams(Workspace& workspace, int64_t K, bool keep_a_bar_dot) const;
  Kept kept(Workspace& workspace, int64_t K) const;
  bool gram_pays() const;
  SmallTask<T> task(const T* tangents, int64_t K, bool hessian) const;
  bool small(const Call& call, int64_t K, std::initializer_list<SmallOp> operations) const;
  bool small_penalty(const Call& call, int64_t K) const {
    return small(call, K, {SmallOp::kSquares, SmallOp::kPenaltyGradient});
  }
  const T* kept_rows(Call& call, const Tangents<T>& tangents, int64_t K, bool draw) const;
  SmallTask<T> penalty_task(Call& call, const Tangents<T>& tangents, int64_t K, bool hessian,
                            bool draw) const;
  int groups(const Call& call, int64_t K) const;
  void small_third_order(Call& call, SmallOp op, SmallTask<T>& t, int64_t K, T* out) const;
  void third_order(Call& call, const T* tangents, const HostStreams& v, const T* cotangents,
                   const Stack<T>& z_dot_u1, T scale, T g_loss, bool hessian, T* out) const;
  bool smooth() const { return !piecewise_linear(points_.spec->activation); }

  Points<T> points_;
  ParameterLayout layout_;
  int L_;
  HostNet net_;
};

// out (K, P): K probes (csrc/common/probes.h), by a kernel of their own
template <class T>
void draw_probes(Call& call, const Probes& probes, int64_t K, int64_t P, T* out);

}  // namespace hvpfast::cuda
