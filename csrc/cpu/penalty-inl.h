// mean_k ||H v_k||^2 and its gradient 2/K sum_k T[v_k, H v_k] (T: the third derivative), merged
// with the loss gradient.
//
// With few samples (gram_pays) the first layer's block of u = H v is never formed: with
// G = z_bar_dot_1 it is u_1 = G [X 1], and exactly
//   ||u_1||^2 = <G, G Gamma>,   u_1 [x; 1] = G Gamma,   Gamma = X X' + 1 1'
// For normal probes drawn here, z_dot_1 = V_1 [x; 1] itself is drawn: its rows are N(0, Gamma).
#pragma once
#include "gram-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
class CpuLinearization<T>::CpuPenalty final : public Penalty<T> {
 public:
  CpuPenalty(const CpuLinearization& lin, const T* tangents, const Probes* probes, int64_t K,
             Curvature curvature, int threads);
  double value() const override { return value_; }
  void gradient(double g_loss, double g_penalty, T* out, int threads) const override;

 private:
  // Sums of squares are added block by block in order: no sum depends on the threads.
  static constexpr int64_t kBlock = 16384;

  void draw(Team& team, const Probes& probes, T* tangents, int64_t begin) const;
  void draw_first_layer(Team& team, const Probes& probes, const T* factor, int64_t rank, T* xi);
  void first_layer_norms(Team& team, const T* gram, double* norms) const;
  void other_norms(Team& team, double* norms) const;

  const CpuLinearization& lin_;
  const int64_t K_;
  const Curvature curvature_;
  Arena arena_;
  int64_t first_u_ = 0;    // entries of u from here on are formed
  const T* tangents_;      // (K, P), the caller's or drawn
  Streams<T> v_;           // over all panels
  T* u_ = nullptr;         // (K, P) H v_k
  T* z_dot_u1_ = nullptr;  // (K, panels, D[1]) u_1 [x; 1] where u_1 is not formed
  double value_ = 0;
};

template <class T>
CpuLinearization<T>::CpuPenalty::CpuPenalty(const CpuLinearization& lin, const T* tangents,
                                            const Probes* probes, int64_t K, Curvature curvature,
                                            int threads)
    : lin_(lin), K_(K), curvature_(curvature), tangents_(tangents) {
  const int64_t P = lin.layout_.P;
  const int64_t panels = lin.panels_;
  const int64_t tile = lin.super_tile(K, 2);
  const int team_size = lin.threads_for(double(K) * lin.macs_, threads);
  Arena scratch_arena;
  v_ = lin.make_streams(arena_, K, {0, panels}, true);
  u_ = arena_.template take<T>(size_t(K * P));
  T* drawn = nullptr;
  if (!tangents) tangents_ = drawn = arena_.template take<T>(size_t(K * P));
  T* gram = nullptr;
  if (lin.gram_pays()) {
    first_u_ = lin.layout_.weight[2];
    z_dot_u1_ = arena_.template take<T>(size_t(K * panels * lin.D_[1] * NR));
    gram = scratch_arena.template take<T>(size_t(panels * panels * NR * NR));
  }
  const std::vector<T*> scratch = per_thread(scratch_arena, team_size, lin.product_scratch(tile));
  const std::vector<T*> x_scratch = lin.x_scratch_of(scratch_arena, team_size, kChunkPanels);
  std::vector<double> norms(size_t(K * (panels + (P - first_u_ + kBlock - 1) / kBlock)), 0.0);

  const bool implicit = drawn && lin.implicit_pays(probes->distribution, K);
  parallel(team_size, [&](Team& team) {
    if (drawn) draw(team, *probes, drawn, implicit ? lin.layout_.weight[2] : 0);
    if (gram) lin.gram_matrix(team, gram);
  });
  if (implicit) {
    T* factor = scratch_arena.template take<T>(size_t(panels * lin.N_ * NR));
    T* xi = scratch_arena.template take<T>(size_t(K * lin.D_[1] * lin.N_));
    const int64_t rank = lin.gram_factor(gram, factor);
    parallel(team_size, [&](Team& team) { draw_first_layer(team, *probes, factor, rank, xi); });
  }
  for (int64_t first = 0; first < panels; first += tile) {
    const Range range{first, std::min(panels, first + tile)};
    const std::vector<Product> products = lin.hvp_products(v_, range, u_, curvature, gram ? 2 : 1);
    parallel(team_size, [&](Team& team) {
      lin.tangent_streams(team, tangents_, v_, range, curvature, x_scratch.data(), implicit);
      lin.run_products(team, products, scratch.data());
      if (gram) first_layer_norms(team, gram, norms.data());
      if (range.end == panels) other_norms(team, norms.data() + K * panels);
    });
  }
  for (double norm : norms) value_ += norm;
  value_ /= double(K);
}

template <class T>
void CpuLinearization<T>::CpuPenalty::draw(Team& team, const Probes& probes, T* tangents,
                                           int64_t begin) const {
  const Stream stream =
      probes.distribution == Distribution::kRademacher ? Stream::kRademacher : Stream::kNormal;
  const int64_t P = lin_.layout_.P;
  const int64_t blocks = (P - begin + kBlock - 1) / kBlock;
  team.for_each(K_ * blocks, [&](int64_t task) {
    const int64_t k = task / blocks;
    const int64_t first = begin + task % blocks * kBlock;
    draw_probe(stream, probes.seed, probes.first + uint32_t(k), first, std::min(P, first + kBlock),
               tangents + k * P + first);
  });
}

// z_dot_1 = xi F' for standard normal xi (D[1], N) and Gamma = F F'.
template <class T>
void CpuLinearization<T>::CpuPenalty::draw_first_layer(Team& team, const Probes& probes,
                                                       const T* factor, int64_t rank, T* xi) {
  const int64_t D1 = lin_.D_[1], N = lin_.N_;
  team.for_each(K_ * D1, [&](int64_t task) {
    const int64_t k = task / D1, i = task % D1;
    draw_probe(Stream::kImplicitNormal, probes.seed, probes.first + uint32_t(k), i * N,
               i * N + rank, xi + task * N);
  });
  team.for_each(K_ * lin_.panels_, [&](int64_t task) {
    const int64_t k = task / lin_.panels_, p = task % lin_.panels_;
    const LayerTerm<T> term{xi + k * D1 * N, N, factor + p * N * NR, 0};
    multiply_panels<T, false>(&term, 1, rank, {0, D1}, 1, v_.at(v_.z_dot, 1, k, p), 0);
  });
}

// u_1 [x; 1] = G Gamma, and <G, G Gamma> of each panel.
template <class T>
void CpuLinearization<T>::CpuPenalty::first_layer_norms(Team& team, const T* gram,
                                                        double* norms) const {
  const int64_t panels = lin_.panels_, D1 = lin_.D_[1];
  team.for_each(K_ * panels, [&](int64_t task) {
    const int64_t k = task / panels, p = task % panels;
    const T* z_bar_dot = v_.at(v_.z_bar_dot, 1, k, 0);
    T* z_dot = z_dot_u1_ + task * D1 * NR;
    const ptrdiff_t stride = NR;
    for_row_blocks<T, false>({0, D1}, [&](int64_t i, int64_t, MicroKernel<T, false> kernel) {
      const Term<T> term{
          z_bar_dot + i * NR, gram + p * panels * NR * NR, NR, int(panels), D1 * NR, NR * NR};
      kernel(&term, 1, &stride, z_dot + i * NR, NR, false);
    });
    const T* own = z_bar_dot + p * D1 * NR;
    double sum = 0;
    for (int64_t i = 0; i < D1 * NR; i += NR)
      sum +=
          sum_lanes<T>(load(own + i) * load(z_dot + i) + load(own + i + W) * load(z_dot + i + W));
    norms[task] = sum;
  });
}

template <class T>
void CpuLinearization<T>::CpuPenalty::other_norms(Team& team, double* norms) const {
  const int64_t P = lin_.layout_.P;
  const int64_t blocks = (P - first_u_ + kBlock - 1) / kBlock;
  team.for_each(K_ * blocks, [&](int64_t task) {
    const T* u = u_ + task / blocks * P;
    int64_t i = first_u_ + task % blocks * kBlock;
    const int64_t end = std::min(P, i + kBlock);
    double sum = 0;
    for (; i + 64 * W <= end; i += 64 * W) {
      Vec<T> squares{};
      for (int64_t j = i; j < i + 64 * W; j += W) squares += load(u + j) * load(u + j);
      sum += sum_lanes<T>(squares);
    }
    for (; i < end; ++i) sum += double(u[i]) * double(u[i]);
    norms[task] = sum;
  });
}

template <class T>
void CpuLinearization<T>::CpuPenalty::gradient(double g_loss, double g_penalty, T* out,
                                               int threads) const {
  // The cotangents are scaled, not the result: the loss gradient joins the same sums.
  const int64_t P = lin_.layout_.P;
  const T scale = T(2.0 * g_penalty / double(K_));
  Arena arena;
  T* u = arena.template take<T>(size_t(K_ * P));
  for (int64_t k = 0; k < K_; ++k)
    for (int64_t i = first_u_; i < P; ++i) u[k * P + i] = scale * u_[k * P + i];
  lin_.third_order(tangents_, v_, u, z_dot_u1_, scale, T(g_loss), curvature_, out, threads);
}

template <class T>
std::unique_ptr<Penalty<T>> CpuLinearization<T>::penalty(const T* tangents, const Probes* probes,
                                                         int64_t K, Curvature curvature,
                                                         int threads) const {
  return std::make_unique<CpuPenalty>(*this, tangents, probes, K, curvature, threads);
}

}  // namespace hvpfast::HVPFAST_ISA
