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

// What is built: all blocks and what the sum over pairs reads, or the diagonals of the B_l; what
// the gradient reads; over which tensors.
template <class T>
struct CpuLinearization<T>::CoreOptions {
  bool hessian, pairs, gradient;
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

  void resize(int L) { layers = size_t(L) + 1, arrays.assign(layers * layers, nullptr); }
  T*& operator()(int l, int m) { return arrays[size_t(l) * layers + size_t(m)]; }
  T* operator()(int l, int m) const { return arrays[size_t(l) * layers + size_t(m)]; }
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
          if (blocks) take(Y[l], D[l] * D[m]), take(Z[l], D[l] * D[m]);
          continue;
        }
        take(M(l, m), D[l] * D[m - 1]);
        if (raw && m > l + 2) take(M_raw(l, m), D[l] * D[m - 1]);
        if (blocks) take(U_rows(l, m), D[l] * D[m]), take(M_rows(l, m), D[l] * D[m - 1]);
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

// Panels whose cores fit in a share of the memory; few enough for one panel's pairs with them to
// stay in the caches.
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

// to (columns, rows) = scale * from (rows, columns)', by vectors; scale (columns) or null.
template <class T>
void transpose_vectors(const T* from, int64_t rows, int64_t columns, const T* scale, T* to) {
  constexpr int W = kLanes<T>, NR = kPanel<T>;
  for (int64_t j = 0; j < columns; ++j)
    for (int v = 0; v < NR; v += W) {
      const Vec<T> factor = scale ? load(scale + j * NR + v) : broadcast(T(1));
      for (int64_t i = 0; i < rows; ++i)
        store(to + (j * rows + i) * NR + v, factor * load(from + (i * columns + j) * NR + v));
    }
}

// to[c] = scale * from[c] for columns c of `rows` vectors; to may be from.
template <class T>
void scale_rows(const T* from, int64_t columns, int64_t rows, const T* scale, T* to) {
  for (int64_t c = 0; c < columns; ++c, from += rows * kPanel<T>, to += rows * kPanel<T>)
    for_vectors<T>(
        1, rows, [&](int64_t, int64_t at) { store(to + at, load(scale + at) * load(from + at)); });
}

// Numbers of scratch that build_panel needs.
template <class T>
size_t core_scratch(const int64_t* D, int L) {
  int64_t most = 0;
  for (int l = 1; l < L; ++l) most = std::max(most, D[l] * (D[l + 1] + kPanel<T>));
  return size_t(most * kPanel<T>);
}

// B_l of the lowest layer, of which only the diagonal or one triangle is wanted.
template <class T>
void CpuLinearization<T>::lowest_core(const Cores& c, int64_t p, T* scratch) const {
  constexpr int64_t kColumns = kPanel<T>;
  const int l = c.options.lowest;
  const int64_t d = D_[l], above = D_[l + 1];
  const T *weight = problem_.params.W[l + 1], *s1 = c.s1(l, p);
  const T* s2 = smooth() && c.options.hessian ? c.residual(r_.s2, l, p) : nullptr;
  if (!c.options.pairs) {
    const T* columns = c.U(l, l + 1) + p * d * above * NR;
    T* diagonal = c.diagonal[l] + p * d * NR;
    for_vectors<T>(1, d, [&](int64_t i, int64_t at) {
      Vec<T> sum{};
      for (int64_t k = 0; k < above; ++k)
        sum += weight[k * d + i] * load(columns + k * d * NR + at);
      sum *= load(s1 + at);
      store(diagonal + at, s2 ? sum + load(s2 + at) : sum);
    });
    return;
  }
  const Vec<T> root2 = broadcast(T(1.41421356237309504880));
  T* packed = c.packed[l] + p * d * (d + 1) / 2 * NR;
  T* block = scratch + d * above * NR;
  for (int64_t j = 0; j < d; j += kColumns) {
    const int64_t end = std::min(d, j + kColumns);
    const LayerTerm<T> term{weight, d, scratch + j * above * NR, above * NR};
    multiply_panels<T, true>(&term, 1, above, {0, end}, end - j, block, d * NR);
    for (int64_t column = j; column < end; ++column, packed += column * NR) {
      const T* from = block + (column - j) * d * NR;
      for_vectors<T>(1, column, [&](int64_t, int64_t at) {
        store(packed + at, root2 * load(s1 + at) * load(from + at));
      });
      for (int v = 0; v < NR; v += W) {
        const int64_t at = column * NR + v;
        const Vec<T> own = load(s1 + at) * load(from + at);
        store(packed + at, s2 ? own + load(s2 + at) : own);
      }
    }
  }
}

// The arrays of panel p of c (first panel of c: 0), from the last layer down.
template <class T>
void CpuLinearization<T>::build_panel(const Cores& c, int64_t p, T* scratch) const {
  const CoreOptions& o = c.options;
  const auto at = [&](T* array, int64_t size) { return array + p * size * NR; };
  const Vec<T> root2 = broadcast(T(1.41421356237309504880));
  const int C = int(D_[L_]);
  T* last = at(c.U(L_, L_), int64_t(C) * C);
  for (int v = 0; v < NR; v += W) {
    const T* probability =
        s_.loss == Loss::kCrossEntropy ? r_.p + (c.first + p) * C * NR + v : nullptr;
    const Vec<T> w = load(r_.weight + (c.first + p) * NR + v);
    for (int j = 0; j < C; ++j) {
      T* column = last + j * C * NR + v;
      for (int i = 0; i < C; ++i) {
        const Vec<T> unit = broadcast(T(i == j));
        store(column + i * NR,
              probability ? w * load(probability + i * NR) * (unit - load(probability + j * NR))
                          : w * unit);
      }
    }
  }
  for (int l = L_; l >= o.lowest; --l) {
    const int64_t d = D_[l];
    if (l < L_) {
      const int64_t above = D_[l + 1];
      const T *weight = problem_.params.W[l + 1], *s1 = c.s1(l, p);
      // s1_l W_{l+1}' on all columns of layer l + 1
      const auto down = [&](const T* from, int64_t columns, T* raw, T* to) {
        T* product = raw ? raw : to;
        const LayerTerm<T> term{weight, d, from, above * NR};
        multiply_panels<T, true>(&term, 1, above, {0, d}, columns, product, d * NR);
        scale_rows(product, columns, d, s1, to);
      };
      for (int m = l + 1; m <= L_ && c.U(l, m); ++m) {
        const int64_t size = d * D_[m];
        down(at(c.U(l + 1, m), above * D_[m]), D_[m],
             c.U_raw(l, m) ? at(c.U_raw(l, m), size) : nullptr, at(c.U(l, m), size));
        if (c.U_rows(l, m))
          transpose_vectors<T>(at(c.U(l, m), size), D_[m], d, nullptr, at(c.U_rows(l, m), size));
        if (!c.M(l, m)) continue;
        const int64_t columns = D_[m - 1], entries = d * columns;
        T* M = at(c.M(l, m), entries);
        if (m == l + 2) {
          const T* s1_above = c.s1(l + 1, p);
          for (int64_t j = 0; j < columns; ++j)
            for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
              store(M + j * d * NR + v,
                    load(s1 + v) * load(s1_above + j * NR + v % NR) * weight[j * d + i]);
            });
        } else {
          down(at(c.M(l + 1, m), above * columns), columns,
               c.M_raw(l, m) ? at(c.M_raw(l, m), entries) : nullptr, M);
        }
        if (c.M_rows(l, m))
          transpose_vectors<T>(M, columns, d, nullptr, at(c.M_rows(l, m), entries));
      }
      const T* U = at(c.U(l, l + 1), d * above);
      if (c.Y[l]) {
        T *Y = at(c.Y[l], d * above), *Z = at(c.Z[l], d * above);
        scale_rows(U, above, d, c.a(l, p), Y);
        const T* z_bar = c.z_bar(l + 1, p);
        for (int64_t k = 0; k < above; ++k)
          for_vectors<T>(1, d, [&](int64_t, int64_t v) {
            store(Z + k * d * NR + v, load(s1 + v) * load(z_bar + k * NR + v % NR));
          });
      }
      // B_l is symmetric: its column j is s1_l W_{l+1}' (row j of U)
      if (l > o.lowest || o.pairs) transpose_vectors<T>(U, above, d, nullptr, scratch);
      if (l == o.lowest) {
        lowest_core(c, p, scratch);
        break;
      }
      T* B = at(c.U(l, l), d * d);
      const LayerTerm<T> term{weight, d, scratch, above * NR};
      multiply_panels<T, true>(&term, 1, above, {0, d}, d, B, d * NR);
      scale_rows(B, d, d, s1, B);
      if (smooth() && o.hessian) {
        const T* s2 = c.residual(r_.s2, l, p);
        for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
          T* entry = B + i * d * NR + v;
          store(entry, load(entry) + load(s2 + v));
        });
      }
    }
    const T* B = at(c.U(l, l), d * d);
    if (c.diagonal[l])
      for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
        store(at(c.diagonal[l], d) + v, load(B + i * d * NR + v));
      });
    if (!c.packed[l]) continue;
    T* packed = at(c.packed[l], d * (d + 1) / 2);
    for (int64_t j = 0; j < d; ++j, packed += j * NR)
      for_vectors<T>(1, j + 1, [&](int64_t i, int64_t v) {
        const Vec<T> entry = load(B + j * d * NR + v);
        store(packed + v, i == j ? entry : root2 * entry);
      });
  }
}

// The arrays of all panels of c.
template <class T>
void CpuLinearization<T>::build_cores(Team& team, const Cores& c, T* const* scratch) const {
  team.for_each(c.panels, [&](int64_t p) {
    if (c.x) {
      const Range samples = rows_of_samples(c.first + p);
      panel_from_rows(problem_.x + samples.begin * problem_.x_stride, problem_.x_stride,
                      int(samples.size()), D_[0], c.x + p * D_[0] * NR);
    }
    build_panel(c, p, scratch[team.rank]);
  });
}

// body(team, cores) on a team of threads for every chunk of panels, with the diagonals of their
// B_l.
template <class T>
template <class Body>
void CpuLinearization<T>::for_core_diagonals(Curvature curvature, const Chosen& chosen, int threads,
                                             Body&& body) const {
  const CoreOptions options = core_options(false, false, curvature, chosen);
  const int64_t chunk = core_chunk(options);
  const int team_size = threads_for(macs_, threads);
  Arena arena;
  Cores c = make_cores(arena, options, chunk);
  std::vector<T*> scratch(team_size);
  for (T*& s : scratch) s = arena.template take<T>(core_scratch<T>(D_, L_));
  for (int64_t first = 0; first < panels_; first += chunk) {
    c.first = first, c.panels = std::min(chunk, panels_ - first);
    parallel(team_size, [&](Team& team) {
      build_cores(team, c, scratch.data());
      body(team, c);
    });
  }
}

template <class T>
void CpuLinearization<T>::sample_traces(Curvature curvature, const Chosen& chosen, T* out,
                                        int threads) const {
  for_core_diagonals(curvature, chosen, threads, [&](Team& team, const Cores& c) {
    team.for_each(c.panels, [&](int64_t p) {
      const Range samples = rows_of_samples(c.first + p);
      alignas(64) T traces[NR];
      for (int v = 0; v < NR; v += W) {
        Vec<T> total{};
        for (int l = c.options.lowest; l <= L_; ++l)
          if (c.options.has(l)) total += own_alpha(c, l, p, v) * own_trace(c, l, p, v);
        store(traces + v, total);
      }
      std::copy(traces, traces + samples.size(), out + samples.begin);
    });
  });
}

// alpha^l_nn of one vector of samples
template <class T>
Vec<T> CpuLinearization<T>::own_alpha(const Cores& c, int l, int64_t p, int v) const {
  Vec<T> sum = broadcast(T(c.options.chosen.bias[l] ? 1 : 0));
  if (!c.options.chosen.weight[l]) return sum;
  const T* a = c.a(l - 1, p) + v;
  for (int64_t j = 0; j < D_[l - 1]; ++j) sum += load(a + j * NR) * load(a + j * NR);
  return sum;
}

// tr B_l of one vector of samples
template <class T>
Vec<T> CpuLinearization<T>::own_trace(const Cores& c, int l, int64_t p, int v) const {
  const T* diagonal = c.diagonal[l] + p * D_[l] * NR + v;
  Vec<T> sum{};
  for (int64_t i = 0; i < D_[l]; ++i) sum += load(diagonal + i * NR);
  return sum;
}

template <class T>
void CpuLinearization<T>::diagonal(Curvature curvature, T* out, int threads) const {
  const std::vector<uint8_t> all(size_t(L_) + 1, 1);
  Arena arena;
  std::vector<T*> squares(size_t(L_) + 1), scratch(size_t(std::max(1, threads)));
  const int64_t chunk = core_chunk(core_options(false, false, curvature, {all, all}));
  for (int l = 1; l <= L_; ++l) squares[l] = arena.template take<T>(size_t(chunk * NR * D_[l - 1]));
  for (T*& s : scratch) s = arena.template take<T>(product_scratch(chunk));
  for_core_diagonals(curvature, {all, all}, threads, [&](Team& team, const Cores& c) {
    team.for_each(c.panels, [&](int64_t p) {
      for (int l = 1; l <= L_; ++l) {
        const T* a = c.a(l - 1, p);
        T* to = squares[l] + p * D_[l - 1] * NR;
        for_vectors<T>(1, D_[l - 1],
                       [&](int64_t, int64_t v) { store(to + v, load(a + v) * load(a + v)); });
      }
    });
    std::vector<Product> products;
    for (int l = 1; l <= L_; ++l)
      products.push_back(
          {l, 1, out, {0, c.panels}, c.first > 0, {{c.diagonal[l], 0, squares[l], 0}}});
    run_products(team, products, scratch.data());
  });
}

}  // namespace hvpfast::HVPFAST_ISA
