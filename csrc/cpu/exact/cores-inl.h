// Exact curvature without probes: every sample's Hessian is a small core. A direction (V_l, v_l)
// acts on sample n through u_l = V_l a_{l-1} + v_l and w_l = V_l' z_bar_l alone, and
//   B_L = d2 loss / dz_L2,   B_l = s1_l W_{l+1}' B_{l+1} W_{l+1} s1_l + s2_l       block (u_l, u_l)
//   U_lm = s1_l W_{l+1}' U_{l+1,m},   U_mm = B_m                                   block (u_l, u_m)
//   M_lm = s1_l W_{l+1}' M_{l+1,m},   M_{m-1,m} = s1_{m-1}                         block (u_l, w_m)
// l <= m, for M l < m, s1 and s2 diagonal; the rest is zero, and M and s2 belong to the Hessian
// only. Block (l, m) of the sample's Hessian is a_{l-1} x (U_lm x a_{m-1} + M_lm x z_bar_m), so
//   tr H = sum_n sum_l alpha^l_nn tr B_l,    diag H = sum_n diag(B_l) a_{l-1}^2 at W_l
//   alpha^l_nm = <a_{l-1,n}, a_{l-1,m}> + 1 (the one for the bias)
// and tr H^2 is a sum over pairs of samples: core_pairs-inl.h.
//
// A matrix of every sample is stored by columns, each column like a panel: (panels, columns, rows,
// kPanel). Then a product with W on all columns is one product on so many panels.
#pragma once
#include "cpu/third_order-inl.h"

namespace hvpfast::HVPFAST_ISA {

// What is built.
template <class T>
struct CpuLinearization<T>::CoreOptions {
  bool hessian;   // M and s2 too
  bool pairs;     // all blocks, for the sum over pairs; else only the diagonals of B_l
  bool gradient;  // U_raw and M_raw too
  Chosen chosen;
  int lowest;  // first chosen layer: the recursion ends there

  bool has(int l) const { return chosen.weight[l] || chosen.bias[l]; }
  bool has_w(int m) const { return hessian && chosen.weight[m]; }
};

// One array per pair of layers.
template <class T>
struct LayerTable {
  size_t layers = 0;
  std::vector<T*> arrays;

  void resize(int L) {
    layers = size_t(L) + 1;
    arrays.assign(layers * layers, nullptr);
  }
  T*& operator()(int l, int m) { return arrays[size_t(l) * layers + size_t(m)]; }
  T* operator()(int l, int m) const { return arrays[size_t(l) * layers + size_t(m)]; }
};

// One sample's part of <X_n y_m, Y_m x_n>: its matrix, by rows, and its vector.
template <class T>
struct CrossFactor {
  const T* matrix;  // (d, size of the other factor's vector)
  const T* vector;  // (size)
  int64_t size;
};

// The cores of the panels [first, first + panels); null where not wanted.
template <class T>
struct CpuLinearization<T>::Cores {
  Cores(const CpuLinearization* lin, const CoreOptions& options) : lin(lin), options(options) {}

  const CpuLinearization* lin;
  CoreOptions options;
  int64_t first = 0, panels = 0;
  T* x = nullptr;                // (D[0])  where the linearization keeps no panels of x
  LayerTable<T> U, M;            // U_lm (D[m], D[l]), M_lm (D[m-1], D[l]) for m >= l + 2
  LayerTable<T> U_raw, M_raw;    // the same before s1_l, for the gradient with respect to s1_l
  LayerTable<T> U_rows, M_rows;  // the same by rows, (D[l], D[m]) and (D[l], D[m-1]), m >= l + 2
  std::vector<T*> packed;        // B_l (D[l] (D[l] + 1) / 2), off-diagonal entries by sqrt 2
  std::vector<T*> diagonal;      // diag B_l (D[l])
  // of layers l and l + 1: Y = a_l * U, Z = s1_l * z_bar_{l+1}', (D[l+1], D[l])
  std::vector<T*> Y, Z;

  const T* a(int l, int64_t p) const {
    const T* base = l > 0 ? lin->r_.a[l] : lin->r_.x;
    if (!base) return x + p * lin->D_[0] * NR;
    return base + (first + p) * lin->D_[l] * NR;
  }
  const T* residual(const std::vector<T*>& array, int l, int64_t p) const {
    return array[l] + (first + p) * lin->D_[l] * NR;
  }
  const T* z_bar(int l, int64_t p) const { return residual(lin->r_.z_bar, l, p); }
  const T* s1(int l, int64_t p) const { return residual(lin->r_.s1, l, p); }

  // The two kinds of factors of C_nm (core_pairs-inl.h), for m >= l + 2.
  CrossFactor<T> U_factor(int l, int m, int64_t p) const {
    const int64_t* D = lin->D_;
    return {U_rows(l, m) + p * D[l] * D[m] * NR, a(m - 1, p), D[m - 1]};
  }
  CrossFactor<T> M_factor(int l, int m, int64_t p) const {
    const int64_t* D = lin->D_;
    return {M_rows(l, m) + p * D[l] * D[m - 1] * NR, z_bar(m, p), D[m]};
  }

  // take(array, numbers per sample) for every array that is wanted.
  template <class Take>
  void lay_out(Take&& take) {
    const CoreOptions& o = options;
    const int64_t* D = lin->D_;
    const int L = lin->L_;
    for (LayerTable<T>* table : {&U, &M, &U_raw, &M_raw, &U_rows, &M_rows}) table->resize(L);
    for (std::vector<T*>* list : {&packed, &diagonal, &Y, &Z}) list->assign(size_t(L) + 1, nullptr);
    if (!lin->r_.x) take(x, D[0]);
    const bool raw = o.gradient && lin->smooth();
    for (int l = o.lowest; l <= L; ++l) {
      if (l > o.lowest || l == L) take(U(l, l), D[l] * D[l]);
      if (!o.pairs) take(diagonal[l], D[l]);
      if (o.pairs && o.has(l)) take(packed[l], D[l] * (D[l] + 1) / 2);
      for (int m = l + 1; m <= (o.pairs ? L : std::min(L, l + 1)); ++m) {
        take(U(l, m), D[l] * D[m]);
        if (raw) take(U_raw(l, m), D[l] * D[m]);
        if (!o.pairs || !o.has_w(m)) continue;
        const bool blocks = o.has(l);
        if (m == l + 1) {
          if (blocks) {
            take(Y[l], D[l] * D[m]);
            take(Z[l], D[l] * D[m]);
          }
          continue;
        }
        take(M(l, m), D[l] * D[m - 1]);
        if (raw && m > l + 2) take(M_raw(l, m), D[l] * D[m - 1]);
        if (blocks) {
          take(U_rows(l, m), D[l] * D[m]);
          take(M_rows(l, m), D[l] * D[m - 1]);
        }
      }
    }
  }
};

template <class T>
typename CpuLinearization<T>::CoreOptions CpuLinearization<T>::core_options(
    bool pairs, bool gradient, Curvature curvature, const Chosen& chosen) const {
  CoreOptions options{curvature == Curvature::kHessian, pairs, gradient, chosen, 1};
  for (int l = 1; l <= L_; ++l) options.chosen.bias[l] = chosen.bias[l] && s_.bias;
  while (options.lowest < L_ && !options.has(options.lowest)) ++options.lowest;
  return options;
}

// The number of panels whose cores fit in a share of the memory, and few enough for one panel's
// pairs with them to stay in the caches.
template <class T>
int64_t CpuLinearization<T>::core_chunk(const CoreOptions& options) const {
  constexpr double kCoreBytes = 6.4e7;
  constexpr int64_t kMostPanels = 64;
  Cores c(this, options);
  double per_panel = 1;
  c.lay_out([&](T*&, int64_t size) { per_panel += double(size) * NR * sizeof(T); });
  return std::clamp<int64_t>(int64_t(kCoreBytes / per_panel), 1, std::min(panels_, kMostPanels));
}

template <class T>
typename CpuLinearization<T>::Cores CpuLinearization<T>::make_cores(Arena& arena,
                                                                    const CoreOptions& options,
                                                                    int64_t panels) const {
  Cores c(this, options);
  c.lay_out(
      [&](T*& array, int64_t size) { array = arena.template take<T>(size_t(size * panels * NR)); });
  return c;
}

}  // namespace hvpfast::HVPFAST_ISA
