// The cores of a panel of samples, built from the last layer down: equations in cores-inl.h.
#pragma once
#include "cores-inl.h"

namespace hvpfast::HVPFAST_ISA {

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

// B_L = d2 loss / dz_L2 of one panel.
template <class T>
void CpuLinearization<T>::last_core(const Cores& c, int64_t p) const {
  const int C = int(D_[L_]);
  T* last = c.U(L_, L_) + p * C * C * NR;
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
}

// X (columns, D[l]) = s1_l W_{l+1}' X_above on all columns of layer l + 1; raw: the same before
// s1_l, or null.
template <class T>
void CpuLinearization<T>::pull_down(const Cores& c, int l, int64_t p, const T* X_above,
                                    int64_t columns, T* raw, T* X) const {
  const int64_t d = D_[l], above = D_[l + 1];
  T* product = raw ? raw : X;
  const LayerTerm<T> term{problem_.params.W[l + 1], d, X_above, above * NR};
  multiply_panels<T, true>(&term, 1, above, {0, d}, columns, product, d * NR);
  scale_rows(product, columns, d, c.s1(l, p), X);
}

// U_lm and M_lm of a layer below the last, for all m that are wanted.
template <class T>
void CpuLinearization<T>::blocks_of_layer(const Cores& c, int l, int64_t p) const {
  const auto at = [&](T* array, int64_t size) { return array ? array + p * size * NR : nullptr; };
  const int64_t d = D_[l], above = D_[l + 1];
  for (int m = l + 1; m <= L_ && c.U(l, m); ++m) {
    const int64_t size = d * D_[m];
    T* U = at(c.U(l, m), size);
    pull_down(c, l, p, at(c.U(l + 1, m), above * D_[m]), D_[m], at(c.U_raw(l, m), size), U);
    if (c.U_rows(l, m)) transpose_vectors<T>(U, D_[m], d, nullptr, at(c.U_rows(l, m), size));
    if (!c.M(l, m)) continue;
    const int64_t columns = D_[m - 1];
    const int64_t entries = d * columns;
    T* M = at(c.M(l, m), entries);
    if (m == l + 2) {
      first_mixed_block(c, l, p, M);
    } else {
      pull_down(c, l, p, at(c.M(l + 1, m), above * columns), columns, at(c.M_raw(l, m), entries),
                M);
    }
    if (c.M_rows(l, m)) transpose_vectors<T>(M, columns, d, nullptr, at(c.M_rows(l, m), entries));
  }
}

// M_{l,l+2} = s1_l W_{l+1}' s1_{l+1}
template <class T>
void CpuLinearization<T>::first_mixed_block(const Cores& c, int l, int64_t p, T* M) const {
  const int64_t d = D_[l];
  const T *weight = problem_.params.W[l + 1], *s1 = c.s1(l, p), *s1_above = c.s1(l + 1, p);
  for (int64_t j = 0; j < D_[l + 1]; ++j)
    for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
      store(M + j * d * NR + v,
            load(s1 + v) * load(s1_above + j * NR + v % NR) * weight[j * d + i]);
    });
}

// Y = a_l * U_{l,l+1}, Z = s1_l * z_bar_{l+1}'
template <class T>
void CpuLinearization<T>::neighbour_blocks(const Cores& c, int l, int64_t p) const {
  const int64_t d = D_[l], above = D_[l + 1];
  const int64_t first = p * d * above * NR;
  const T *s1 = c.s1(l, p), *z_bar = c.z_bar(l + 1, p);
  T* Z = c.Z[l] + first;
  scale_rows(c.U(l, l + 1) + first, above, d, c.a(l, p), c.Y[l] + first);
  for (int64_t k = 0; k < above; ++k)
    for_vectors<T>(1, d, [&](int64_t, int64_t v) {
      store(Z + k * d * NR + v, load(s1 + v) * load(z_bar + k * NR + v % NR));
    });
}

// B_l of the lowest layer, below the last: its diagonal or one triangle is wanted. For the triangle
// scratch holds the rows of U_{l,l+1}.
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

// B_l of a layer between the lowest and the last. B_l is symmetric: its column j is s1_l W_{l+1}'
// (row j of U_{l,l+1}), and the rows stand in scratch.
template <class T>
void CpuLinearization<T>::inner_core(const Cores& c, int l, int64_t p, T* scratch) const {
  const int64_t d = D_[l];
  T* B = c.U(l, l) + p * d * d * NR;
  pull_down(c, l, p, scratch, d, nullptr, B);
  if (!smooth() || !c.options.hessian) return;
  const T* s2 = c.residual(r_.s2, l, p);
  for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
    T* entry = B + i * d * NR + v;
    store(entry, load(entry) + load(s2 + v));
  });
}

// diag B_l, and one triangle of B_l with its off-diagonal entries by sqrt 2, where they are wanted.
template <class T>
void CpuLinearization<T>::pack_core(const Cores& c, int l, int64_t p) const {
  const int64_t d = D_[l];
  const T* B = c.U(l, l) + p * d * d * NR;
  if (c.diagonal[l]) {
    T* diagonal = c.diagonal[l] + p * d * NR;
    for_vectors<T>(1, d,
                   [&](int64_t i, int64_t v) { store(diagonal + v, load(B + i * d * NR + v)); });
  }
  if (!c.packed[l]) return;
  const Vec<T> root2 = broadcast(T(1.41421356237309504880));
  T* packed = c.packed[l] + p * d * (d + 1) / 2 * NR;
  for (int64_t j = 0; j < d; ++j, packed += j * NR)
    for_vectors<T>(1, j + 1, [&](int64_t i, int64_t v) {
      const Vec<T> entry = load(B + j * d * NR + v);
      store(packed + v, i == j ? entry : root2 * entry);
    });
}

// The arrays of panel p of c (the first is 0), from the last layer down.
template <class T>
void CpuLinearization<T>::build_panel(const Cores& c, int64_t p, T* scratch) const {
  const int lowest = c.options.lowest;
  last_core(c, p);
  pack_core(c, L_, p);
  for (int l = L_ - 1; l >= lowest; --l) {
    blocks_of_layer(c, l, p);
    if (c.Y[l]) neighbour_blocks(c, l, p);
    if (l > lowest || c.options.pairs) {
      const T* U = c.U(l, l + 1) + p * D_[l] * D_[l + 1] * NR;
      transpose_vectors<T>(U, D_[l + 1], D_[l], nullptr, scratch);
    }
    if (l == lowest) {
      lowest_core(c, p, scratch);
    } else {
      inner_core(c, l, p, scratch);
      pack_core(c, l, p);
    }
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

}  // namespace hvpfast::HVPFAST_ISA
