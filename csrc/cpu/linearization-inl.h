// The CPU engine's linearization: declarations, by the file that has the equations.
#pragma once
#include <algorithm>
#include <vector>

#include "arena.h"
#include "common/contract.h"
#include "gemm-inl.h"
#include "parallel.h"
#include "real-inl.h"
#include "residuals.h"

namespace hvpfast::HVPFAST_ISA {

// Panels that one task walks through all layers: their activations stay in the caches.
constexpr int64_t kChunkPanels = 4;

// K tangents' streams over a range of panels; every array is (K, panels, D[l], kPanel).
template <class T>
struct Streams {
  int64_t K = 0, first = 0, panels = 0;  // the range [first, first + panels)
  const int64_t* D = nullptr;
  std::vector<T*> z_dot;      // R{z_l}; the same array as a_dot for piecewise linear activations
  std::vector<T*> a_dot;      // R{a_l}, l < L
  std::vector<T*> a_bar_dot;  // R{dL/da_l}, l < L; the same array as z_bar_dot unless kept
  std::vector<T*> z_bar_dot;  // R{dL/dz_l}

  int64_t panel_size(int l) const { return D[l] * kPanel<T>; }
  T* at(const std::vector<T*>& array, int l, int64_t k, int64_t panel) const {
    return array[l] + (k * panels + panel - first) * panel_size(l);
  }
};

template <class T>
class CpuLinearization final : public Linearization<T> {
 public:
  CpuLinearization(const Problem<T>& problem, int threads);

  double loss() const override { return loss_; }
  double normalizer() const override { return normalizer_; }
  size_t num_bytes() const override { return arena_.num_bytes(); }
  void gradient(T* out, int threads) const override;
  void hvp(const T* tangents, int64_t K, Curvature curvature, T* out, int threads) const override;
  void quadratic(const T* tangents, int64_t K, Curvature curvature, T* out,
                 int threads) const override;
  void hvp_vjp(const T* tangents, const T* cotangents, int64_t K, Curvature curvature, T* out,
               int threads) const override;
  std::unique_ptr<Penalty<T>> penalty(const T* tangents, const Probes* probes, int64_t K,
                                      Curvature curvature, int threads) const override;
  void sample_traces(Curvature curvature, const Chosen& chosen, T* out, int threads) const override;
  void diagonal(Curvature curvature, T* out, int threads) const override;
  double inner_product(const Linearization<T>& other, Curvature curvature, const Chosen& chosen,
                       int threads) const override;
  std::unique_ptr<Penalty<T>> exact_penalty(Exact kind, Curvature curvature, const Chosen& chosen,
                                            int threads) const override;
  size_t exact_bytes(Exact kind, Curvature curvature, const Chosen& chosen, bool gradient,
                     int threads) const override;

 private:
  static constexpr int NR = kPanel<T>;
  static constexpr int W = kLanes<T>;
  using Real = VectorReal<T>;

  // linearize-inl.h
  void weigh_targets();
  void primal_chunk(Range panels, T* x_scratch);
  template <Activation act>
  void activate(int l, Range panels);
  void loss_gradient(Range panels);

  // tangents-inl.h
  Streams<T> make_streams(Arena& arena, int64_t K, Range panels, bool keep_a_bar_dot) const;
  void first_layer_dot(const LayerPointers<T>& v, Range rows, const T* x, int64_t panels,
                       T* z_dot) const;
  void tangent_forward(const LayerPointers<T>& v, Streams<T>& s, int64_t k, Range panels,
                       const T* x) const;
  void loss_hvp(const Streams<T>& s, int64_t k, Range panels) const;
  void tangent_backward(const LayerPointers<T>& v, Streams<T>& s, int64_t k, Range panels,
                        Curvature curvature) const;
  void tangent_streams(Team& team, const T* tangents, Streams<T>& s, Range panels,
                       Curvature curvature, T* const* x_scratch, bool first_layer_done) const;
  template <class Body>
  void for_each_chunk(Team& team, int64_t num_chunks, int64_t K, Body&& body) const;
  double quadratic_chunk(const LayerPointers<T>& v, const Streams<T>& s, int64_t k, Range panels,
                         Curvature curvature, T* scratch) const;

  // products-inl.h
  struct Factor;
  struct Product;
  struct StripPass;
  void run_product(const Product& product, Range strips, Range outputs, T* scratch) const;
  void bias_sums(const Product& product, Range outputs) const;
  void run_products(Team& team, const std::vector<Product>& products, T* const* scratch) const;
  size_t product_scratch(int64_t panels) const;
  std::vector<Product> hvp_products(const Streams<T>& s, Range panels, T* out, Curvature curvature,
                                    int first_layer) const;

  // third_order-inl.h
  struct Mixed;
  std::vector<Product> mixed_products(const Streams<T>& v, const Streams<T>& u, const Mixed& mixed,
                                      Range panels, T* out, bool hessian) const;
  void scale_first_layer(Team& team, const T* z_dot_u1, T scale, Range panels,
                         const Streams<T>& u) const;
  void third_order(const T* tangents, const Streams<T>& v, const T* cotangents, const T* z_dot_u1,
                   T scale, T g_loss, Curvature curvature, T* out, int threads) const;
  void mixed_chunk(const T* tangents, const T* cotangents, const Streams<T>& v, const Streams<T>& u,
                   Mixed& mixed, Range panels, T g_loss, Curvature curvature) const;

  // exact/cores-inl.h and the files beside it
  struct CoreOptions;
  struct Cores;
  struct CoreBars;
  struct CoreFlow;
  struct CoreStrips;
  class CpuExactPenalty;
  CoreOptions core_options(bool pairs, bool gradient, Curvature curvature,
                           const Chosen& chosen) const;
  int64_t core_chunk(const CoreOptions& options) const;
  Cores make_cores(Arena& arena, const CoreOptions& options, int64_t panels) const;
  void last_core(const Cores& c, int64_t p) const;
  void pull_down(const Cores& c, int l, int64_t p, const T* X_above, int64_t columns, T* raw,
                 T* X) const;
  void blocks_of_layer(const Cores& c, int l, int64_t p) const;
  void first_mixed_block(const Cores& c, int l, int64_t p, T* M) const;
  void neighbour_blocks(const Cores& c, int l, int64_t p) const;
  void lowest_core(const Cores& c, int64_t p, T* scratch) const;
  void inner_core(const Cores& c, int l, int64_t p, T* scratch) const;
  void pack_core(const Cores& c, int l, int64_t p) const;
  void build_panel(const Cores& c, int64_t p, T* scratch) const;
  void build_cores(Team& team, const Cores& c, T* const* scratch) const;
  Vec<T> own_alpha(const Cores& c, int l, int64_t p, int v) const;
  Vec<T> own_trace(const Cores& c, int l, int64_t p, int v) const;
  double core_pairs(const Cores& lanes, int64_t p, const Cores& rows, Range q, bool symmetric,
                    const CoreStrips& s) const;
  template <class Body>
  void for_core_diagonals(Curvature curvature, const Chosen& chosen, int threads,
                          Body&& body) const;

  // gram-inl.h and penalty-inl.h
  class CpuPenalty;
  bool gram_pays() const;
  void gram_matrix(Team& team, T* gram) const;
  bool implicit_pays(Distribution distribution, int64_t K) const;
  int64_t gram_factor(const T* gram, T* factor) const;

  static std::vector<T*> per_thread(Arena& arena, int team_size, size_t size);
  std::vector<T*> x_scratch_of(Arena& arena, int team_size, int64_t panels) const;
  const T* pack_x(Range panels, T* scratch) const;
  Range rows_of_samples(int64_t panel) const {
    return {panel * NR, std::min(N_, (panel + 1) * NR)};
  }
  int threads_for(double macs, int threads) const;
  int64_t chunks(Range panels, int64_t chunk) const { return (panels.size() + chunk - 1) / chunk; }
  int64_t chunk_panels(int64_t panels, int threads) const;
  int64_t super_tile(int64_t K, int arrays) const;
  bool smooth() const { return !piecewise_linear(spec_->activation); }

  Problem<T> problem_;
  std::shared_ptr<const MlpSpec> spec_;
  const MlpSpec& s_;
  ParameterLayout layout_;
  int L_;
  const int64_t* D_;
  int64_t N_, panels_;
  Arena arena_;
  Residuals<T> r_;
  std::vector<double> panel_loss_;
  double loss_ = 0, normalizer_ = 1;
  double macs_ = 0;  // multiply-adds of one Hessian-vector product
};

}  // namespace hvpfast::HVPFAST_ISA
