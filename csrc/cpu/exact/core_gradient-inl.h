// The gradients of tr H and tr H^2: core_pairs-inl.h and cores-inl.h in reverse. X_bar is the
// derivative of the penalty with respect to X. Every pair of samples has a part in the derivatives
// at both, so with a weight g
//   B_l_bar = 2 g sum_m (alpha^l)^2 B_l,m,        U_bar = 4 g sum_m alpha^l alpha^k U_m,
//   M_bar = 4 g sum_m alpha^l beta^k M_m,         Y_bar = 4 g sum_m alpha^l Z_m,   Z_bar likewise,
//   alpha_bar, beta_bar: products of all pairs again; from them a_bar, z_bar_bar
// (tr H: B_l_bar = g alpha^l_nn I). Then, with symmetric B_l_bar, layer by layer from the first up
//   E = B_l_bar s1_l W_{l+1}',   B_{l+1}_bar += W_{l+1} s1_l (U_bar + E), its symmetric part
//   W_{l+1}_bar += sum_n B_{l+1} (U_bar + 2 E)' s1_l,   U_{l+1,m}_bar += W_{l+1} s1_l U_lm_bar, ...
//   a_bar_l_bar  = act'' * diag B_l_bar + s1_l * z_bar_l_bar
//   z_bar_{l+1}_bar += W_{l+1} a_bar_l_bar
// and from the loss down, as in any backward pass,
//   z_L_grad = D3[B_L_bar] + D2[z_bar_L_bar] + g_loss z_bar_L
//   z_l_grad = s1 * (W_{l+1}' z_{l+1}_grad + a_bar) + act'' * s1_bar
//              + act''' * a_bar_l * diag B_l_bar
//   out_W_l  = sum_n z_l_grad a_{l-1}' + z_bar_l a_bar_{l-1}_bar', and W_l_bar of above
//   out_b_l  = sum_n z_l_grad
#pragma once
#include "core_pairs-inl.h"

namespace hvpfast::HVPFAST_ISA {

// to += from * by, each (n, kPanel)
template <class T>
HVP_INLINE void add_product(const T* from, const T* by, int64_t n, T* to) {
  for_vectors<T>(1, n, [&](int64_t, int64_t v) {
    store(to + v, load(to + v) + load(from + v) * load(by + v));
  });
}

// Derivatives of tr H^2, as sums over pairs of samples, with respect to the arrays of Cores, of
// which they have the shapes, and to the residuals.
template <class T>
struct CpuLinearization<T>::CoreBars {
  LayerTable<T> U, M, U_rows, M_rows;
  std::vector<T*> packed, Y, Z;
  std::vector<T*> a, s1, z_bar;  // (D[l])

  template <class Take>
  CoreBars(const Cores& c, Take&& take) {
    const int L = c.lin->L_;
    const int64_t* D = c.lin->D_;
    const auto like = [&](T* array, int64_t size) { return array ? take(size) : nullptr; };
    for (LayerTable<T>* table : {&U, &M, &U_rows, &M_rows}) table->resize(L);
    for (auto* list : {&packed, &Y, &Z, &a, &s1, &z_bar}) list->assign(size_t(L) + 1, nullptr);
    for (int l = 1; l <= L; ++l) {
      packed[l] = like(c.packed[l], D[l] * (D[l] + 1) / 2);
      z_bar[l] = take(D[l]);
      if (l == L) break;
      a[l] = take(D[l]);
      if (c.lin->smooth()) s1[l] = take(D[l]);
      Y[l] = like(c.Y[l], D[l] * D[l + 1]);
      Z[l] = like(c.Z[l], D[l] * D[l + 1]);
      for (int m = l + 1; m <= L; ++m) {
        if (!c.options.has(l) || !c.options.has(m)) continue;
        U(l, m) = like(c.U(l, m), D[l] * D[m]);
        M(l, m) = like(c.M(l, m), D[l] * D[m - 1]);
        U_rows(l, m) = like(c.U_rows(l, m), D[l] * D[m]);
        M_rows(l, m) = like(c.M_rows(l, m), D[l] * D[m - 1]);
      }
    }
  }
};

// The backward pass through cores and network: derivatives with respect to U and M, overwritten
// with the factors of W_bar, and to the residuals.
template <class T>
struct CpuLinearization<T>::CoreFlow {
  LayerTable<T> U, M;
  std::vector<T*> a, s1, a_bar, z_bar, z;  // (D[l])
  std::vector<T*> d2, d3;                  // act''(z), act'''(z) a_bar: smooth activations only

  template <class Take>
  CoreFlow(const Cores& c, Take&& take) {
    const int L = c.lin->L_;
    const int64_t* D = c.lin->D_;
    U.resize(L);
    M.resize(L);
    for (auto* list : {&a, &s1, &a_bar, &z_bar, &z, &d2, &d3}) list->assign(size_t(L) + 1, nullptr);
    for (int l = 1; l <= L; ++l) {
      z[l] = take(D[l]);
      z_bar[l] = take(D[l]);
      if (l == L) break;
      a[l] = take(D[l]);
      a_bar[l] = take(D[l]);
      if (c.lin->smooth()) {
        s1[l] = take(D[l]);
        d2[l] = take(D[l]);
        d3[l] = take(D[l]);
      }
      for (int m = l + 1; m <= L; ++m) {
        if (c.U(l, m)) U(l, m) = take(D[l] * D[m]);
        if (c.M(l, m)) M(l, m) = take(D[l] * D[m - 1]);
      }
    }
  }
};

template <class T>
class CpuLinearization<T>::CpuExactPenalty final : public Penalty<T> {
 public:
  CpuExactPenalty(const CpuLinearization& lin, Exact kind, Curvature curvature,
                  const Chosen& chosen, int threads);
  double value() const override { return value_; }
  void gradient(double g_loss, double g_penalty, T* out, int threads) const override;

  // Numbers of scratch that the backward pass of one panel needs.
  static size_t back_scratch(const int64_t* D, int L) {
    const int64_t widest = *std::max_element(D + 1, D + L + 1);
    int64_t largest = 0;
    for (int l = 1; l < L; ++l) largest = std::max(largest, D[l] * D[l + 1]);
    return size_t((2 * widest * widest + 2 * largest + widest) * NR);
  }

 private:
  // The scratch of every thread.
  struct Scratch {
    std::vector<T*> build, back, product;
    std::vector<CoreStrips> strips;
  };

  const T* weight(int l) const { return lin_.problem_.params.W[l]; }
  // core_pull-inl.h
  struct PairsOfPanels;
  double pull(const Cores& lanes, const CoreBars& bars, int64_t p, const Cores& rows,
              bool accumulate, const CoreStrips& s) const;
  double value_of(const Cores& c, const CoreBars& bars, int64_t p) const;
  // core_backward-inl.h
  void start(const Cores& c, const CoreBars* bars, const CoreFlow& flow, int64_t p, T g) const;
  void add_neighbours(const Cores& c, const CoreBars& bars, const CoreFlow& flow, int64_t p,
                      T g) const;
  void add_neighbour_blocks(const Cores& c, const CoreBars& bars, const CoreFlow& flow, int l,
                            int64_t p, T g) const;
  void back_through_cores(const Cores& c, const CoreBars* bars, const CoreFlow& flow, int64_t p,
                          T g, T* scratch) const;
  void back_through_layer(const Cores& c, const CoreFlow& flow, int l, int64_t p, T* own, T* next,
                          T* scratch) const;
  void back_through_blocks(const Cores& c, const CoreFlow& flow, int l, int64_t p) const;
  void push_up(const Cores& c, const CoreFlow& flow, int l, int64_t p, T* X_bar, const T* raw,
               int64_t columns, T* X_above_bar) const;
  void back_through_first_mixed_block(const Cores& c, const CoreFlow& flow, int l, int64_t p) const;
  void back_through_network(const Cores& c, const CoreFlow& flow, int64_t p, const T* B_bar,
                            T g_loss, T* scratch) const;
  void products(Team& team, const Cores& c, const CoreFlow& flow, int distance, T* out,
                T* const* scratch) const;
  void add_row_sums(Team& team, const Cores& c, const CoreFlow& flow, int l, T* out) const;
  // core_penalty-inl.h
  int team_size(int threads) const;
  Scratch make_scratch(Arena& arena, int team_size) const;
  CoreBars make_bars(Arena& arena, const Cores& c) const;
  void finish(const Cores& c, const CoreBars* bars, const CoreFlow& flow, const Scratch& scratch,
              T g_loss, T g, T* out, int team_size) const;

  const CpuLinearization& lin_;
  const int64_t* D_;
  const int L_;
  const Exact kind_;
  const bool smooth_;
  const CoreOptions options_;
  double value_ = 0;
  // Kept for the gradient where one chunk holds all samples.
  Arena arena_;
  std::unique_ptr<Cores> cores_;
  std::unique_ptr<CoreBars> bars_;
};

}  // namespace hvpfast::HVPFAST_ISA
