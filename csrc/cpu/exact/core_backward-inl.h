// The reverse of cores-inl.h for one panel, and the sums over samples: equations in
// core_gradient-inl.h.
#pragma once
#include "core_pull-inl.h"

namespace hvpfast::HVPFAST_ISA {

// Starts the flow with g times the derivatives that the pairs (bars) or the traces (null) give.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::start(const Cores& c, const CoreBars* bars,
                                                 const CoreFlow& flow, int64_t p, T g) const {
  const Vec<T> scale = broadcast(g);
  const auto fill = [&](const T* bar, T* to, int64_t size) {
    if (!to) return;
    to += p * size * NR;
    if (!bar) {
      std::fill(to, to + size * NR, T(0));
      return;
    }
    bar += p * size * NR;
    for_vectors<T>(1, size, [&](int64_t, int64_t v) { store(to + v, scale * load(bar + v)); });
  };
  for (int l = 1; l <= L_; ++l) {
    const int64_t d = D_[l];
    fill(nullptr, flow.z[l], d);
    fill(nullptr, flow.a_bar[l], d);
    fill(bars ? bars->z_bar[l] : nullptr, flow.z_bar[l], d);
    if (l == L_) break;
    fill(bars ? bars->a[l] : nullptr, flow.a[l], d);
    fill(bars ? bars->s1[l] : nullptr, flow.s1[l], d);
    for (int m = l + 1; m <= L_; ++m) {
      fill(bars ? bars->U(l, m) : nullptr, flow.U(l, m), d * D_[m]);
      fill(bars ? bars->M(l, m) : nullptr, flow.M(l, m), d * D_[m - 1]);
    }
    if (smooth_)
      with_activation(lin_.s_.activation, [&](auto act) {
        second_and_third<act.value>(c.residual(lin_.r_.z, l, p), c.residual(lin_.r_.a_bar, l, p), 1,
                                    d, flow.d2[l] + p * d * NR, flow.d3[l] + p * d * NR);
      });
  }
  if (bars) {
    add_neighbours(c, *bars, flow, p, g);
    return;
  }
  for (int l = std::max(2, options_.lowest); l <= L_; ++l)
    for (int v = 0; options_.chosen.weight[l] && v < NR; v += W) {
      const Vec<T> twice = broadcast(T(2) * g) * lin_.own_trace(c, l, p, v);
      const T* a = c.a(l - 1, p) + v;
      T* a_bar = flow.a[l - 1] + p * D_[l - 1] * NR + v;
      for (int64_t j = 0; j < D_[l - 1]; ++j)
        store(a_bar + j * NR, load(a_bar + j * NR) + twice * load(a + j * NR));
    }
}

// g times the derivatives with respect to Y, Z, U_rows and M_rows, as those with respect to U, M
// and the residuals.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::add_neighbours(const Cores& c, const CoreBars& bars,
                                                          const CoreFlow& flow, int64_t p,
                                                          T g) const {
  const Vec<T> scale = broadcast(g);
  const auto add_transposed = [&](const T* from, int64_t rows, int64_t columns, T* to) {
    from += p * rows * columns * NR;
    to += p * rows * columns * NR;
    for (int64_t j = 0; j < columns; ++j)
      for_vectors<T>(1, rows, [&](int64_t i, int64_t v) {
        T* entry = to + j * rows * NR + v;
        store(entry, load(entry) + scale * load(from + (i * columns + j) * NR + v % NR));
      });
  };
  for (int l = options_.lowest; l < L_; ++l) {
    for (int m = l + 2; m <= L_; ++m) {
      if (!bars.U_rows(l, m)) continue;
      add_transposed(bars.U_rows(l, m), D_[l], D_[m], flow.U(l, m));
      add_transposed(bars.M_rows(l, m), D_[l], D_[m - 1], flow.M(l, m));
    }
    if (bars.Y[l]) add_neighbour_blocks(c, bars, flow, l, p, g);
  }
}

// Of Y and Z of layer l: a_bar, s1_bar and z_bar_bar, and U_bar.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::add_neighbour_blocks(const Cores& c,
                                                                const CoreBars& bars,
                                                                const CoreFlow& flow, int l,
                                                                int64_t p, T g) const {
  const int64_t d = D_[l], above = D_[l + 1];
  const int64_t first = p * d * above * NR;
  const Vec<T> scale = broadcast(g);
  const T *a = c.a(l, p), *s1 = c.s1(l, p), *z_bar = c.z_bar(l + 1, p);
  T *a_bar = flow.a[l] + p * d * NR, *z_bar_bar = flow.z_bar[l + 1] + p * above * NR;
  T* s1_bar = smooth_ ? flow.s1[l] + p * d * NR : nullptr;
  for (int64_t k = 0; k < above; ++k) {
    const int64_t column = first + k * d * NR;
    const T *U = c.U(l, l + 1) + column, *Y = bars.Y[l] + column, *Z = bars.Z[l] + column;
    T* U_bar = flow.U(l, l + 1) + column;
    for (int half = 0; half < NR; half += W) {
      Vec<T> total{};
      const Vec<T> own = load(z_bar + k * NR + half);
      for (int64_t i = 0; i < d; ++i) {
        const int64_t v = i * NR + half;
        const Vec<T> y = scale * load(Y + v), z = scale * load(Z + v);
        store(U_bar + v, load(U_bar + v) + load(a + v) * y);
        store(a_bar + v, load(a_bar + v) + load(U + v) * y);
        if (s1_bar) store(s1_bar + v, load(s1_bar + v) + own * z);
        total += load(s1 + v) * z;
      }
      T* to = z_bar_bar + k * NR + half;
      store(to, load(to) + total);
    }
  }
}

// B_bar (symmetric, full) of every layer in turn, up to the last, which is left in scratch.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::back_through_cores(const Cores& c, const CoreBars* bars,
                                                              const CoreFlow& flow, int64_t p, T g,
                                                              T* scratch) const {
  int64_t widest = 0;
  for (int l = options_.lowest; l <= L_; ++l) widest = std::max(widest, D_[l]);
  T *own = scratch, *next = scratch + widest * widest * NR, *rest = next + widest * widest * NR;
  const Vec<T> scale = broadcast(g), scale_root = broadcast(g * T(0.70710678118654752440));
  for (int l = options_.lowest; l <= L_; ++l) {
    const int64_t d = D_[l];
    const bool fresh = l == options_.lowest;
    const T* packed =
        bars && bars->packed[l] ? bars->packed[l] + p * d * (d + 1) / 2 * NR : nullptr;
    if (fresh && !packed) std::fill(own, own + d * d * NR, T(0));
    for (int64_t j = 0; packed && j < d; ++j, packed += j * NR)
      for_vectors<T>(1, j + 1, [&](int64_t i, int64_t v) {
        T *entry = own + j * d * NR + v, *mirror = own + (i * d + j) * NR + v % NR;
        Vec<T> value = (i == j ? scale : scale_root) * load(packed + v);
        if (!fresh) value += load(entry);
        store(entry, value);
        store(mirror, value);
      });
    if (kind_ == Exact::kTrace && options_.has(l))
      for (int v = 0; v < NR; v += W) {
        const Vec<T> alpha = scale * lin_.own_alpha(c, l, p, v);
        for (int64_t i = 0; i < d; ++i) {
          T* entry = own + i * (d + 1) * NR + v;
          store(entry, load(entry) + alpha);
        }
      }
    if (l == L_) break;
    back_through_layer(c, flow, l, p, own, next, rest);
    std::swap(own, next);
  }
  if (own != scratch) std::copy(own, own + D_[L_] * D_[L_] * NR, scratch);
}

// From B_l_bar (own), U_lm_bar and M_lm_bar to those of layer l + 1 (next) and to the residuals.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::back_through_layer(const Cores& c, const CoreFlow& flow,
                                                              int l, int64_t p, T* own, T* next,
                                                              T* scratch) const {
  const int64_t d = D_[l], above = D_[l + 1];
  const T *W_above = weight(l + 1), *s1 = c.s1(l, p);
  const auto at = [&](T* array, int64_t size) { return array + p * size * NR; };
  T* s1_bar = smooth_ ? at(flow.s1[l], d) : nullptr;
  if (smooth_ && options_.hessian) {
    const T *d2 = at(flow.d2[l], d), *d3 = at(flow.d3[l], d);
    T *a_bar = at(flow.a_bar[l], d), *z = at(flow.z[l], d);
    for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
      const Vec<T> diagonal = load(own + i * d * NR + v);
      store(a_bar + v, load(d2 + v) * diagonal);
      store(z + v, load(d3 + v) * diagonal);
    });
  }
  // E by rows (d, above)
  T *E = scratch, *to_B = scratch + d * above * NR;
  if (kind_ == Exact::kTrace && l == options_.lowest) {  // B_l_bar is diagonal
    for (int64_t i = 0; i < d; ++i)
      for_vectors<T>(1, above, [&](int64_t k, int64_t v) {
        const int64_t half = v % NR;
        store(E + i * above * NR + v,
              load(own + i * (d + 1) * NR + half) * load(s1 + i * NR + half) * W_above[k * d + i]);
      });
  } else {
    scale_rows(own, d, d, s1, own);
    const LayerTerm<T> term{W_above, d, own, d * NR};
    multiply_panels<T, false>(&term, 1, d, {0, above}, d, E, above * NR);
  }
  T* U_bar = at(flow.U(l, l + 1), d * above);
  const T* U_raw = smooth_ ? at(c.U_raw(l, l + 1), d * above) : nullptr;
  for (int64_t k = 0; k < above; ++k)
    for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
      const int64_t entry = k * d * NR + v;
      const Vec<T> e = load(E + (i * above + k) * NR + v % NR), u = load(U_bar + entry);
      const Vec<T> s = load(s1 + v);
      const Vec<T> twice = u + e + e;
      if (s1_bar) store(s1_bar + v, load(s1_bar + v) + twice * load(U_raw + entry));
      store(U_bar + entry, s * twice);
      store(to_B + entry, s * (u + e));
    });
  const LayerTerm<T> term{W_above, d, to_B, d * NR};
  multiply_panels<T, false>(&term, 1, d, {0, above}, above, next, above * NR);
  const Vec<T> half = broadcast(T(0.5));
  for (int64_t k = 0; k < above; ++k)
    for_vectors<T>(1, k, [&](int64_t i, int64_t v) {
      T *entry = next + k * above * NR + v, *mirror = next + (i * above + k) * NR + v % NR;
      const Vec<T> mean = half * (load(entry) + load(mirror));
      store(entry, mean);
      store(mirror, mean);
    });
  if (options_.pairs) back_through_blocks(c, flow, l, p);
}

// From U_lm_bar and M_lm_bar, m >= l + 2, to those of layer l + 1 and to s1_bar.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::back_through_blocks(const Cores& c, const CoreFlow& flow,
                                                               int l, int64_t p) const {
  const auto at = [&](T* array, int64_t size) { return array ? array + p * size * NR : nullptr; };
  const int64_t d = D_[l], above = D_[l + 1];
  for (int m = l + 2; m <= L_; ++m) {
    push_up(c, flow, l, p, at(flow.U(l, m), d * D_[m]), at(c.U_raw(l, m), d * D_[m]), D_[m],
            at(flow.U(l + 1, m), above * D_[m]));
    if (!flow.M(l, m)) continue;
    const int64_t columns = D_[m - 1];
    if (m == l + 2) {
      back_through_first_mixed_block(c, flow, l, p);
    } else {
      push_up(c, flow, l, p, at(flow.M(l, m), d * columns), at(c.M_raw(l, m), d * columns), columns,
              at(flow.M(l + 1, m), above * columns));
    }
  }
}

// The reverse of X = s1_l raw, raw = W_{l+1}' X_above; X_bar is overwritten with s1_l X_bar.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::push_up(const Cores& c, const CoreFlow& flow, int l,
                                                   int64_t p, T* X_bar, const T* raw,
                                                   int64_t columns, T* X_above_bar) const {
  const int64_t d = D_[l], above = D_[l + 1];
  T* s1_bar = smooth_ ? flow.s1[l] + p * d * NR : nullptr;
  for (int64_t j = 0; s1_bar && j < columns; ++j)
    add_product(X_bar + j * d * NR, raw + j * d * NR, d, s1_bar);
  scale_rows(X_bar, columns, d, c.s1(l, p), X_bar);
  const LayerTerm<T> product{weight(l + 1), d, X_bar, d * NR};
  multiply_panels<T, false>(&product, 1, d, {0, above}, columns, X_above_bar, above * NR, true);
}

// The reverse of M_{l,l+2} = s1_l W_{l+1}' s1_{l+1}; M_bar is overwritten with s1_l M_bar s1_{l+1}.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::back_through_first_mixed_block(const Cores& c,
                                                                          const CoreFlow& flow,
                                                                          int l, int64_t p) const {
  const int64_t d = D_[l], above = D_[l + 1];
  const T *W_above = weight(l + 1), *s1 = c.s1(l, p), *s1_above = c.s1(l + 1, p);
  T* M_bar = flow.M(l, l + 2) + p * d * above * NR;
  T* s1_bar = smooth_ ? flow.s1[l] + p * d * NR : nullptr;
  T* s1_above_bar = smooth_ ? flow.s1[l + 1] + p * above * NR : nullptr;
  for (int64_t j = 0; j < above; ++j)
    for_vectors<T>(1, d, [&](int64_t i, int64_t v) {
      T* entry = M_bar + j * d * NR + v;
      const int64_t j_at = j * NR + v % NR;
      const Vec<T> bar = load(entry), s = load(s1 + v), s_above = load(s1_above + j_at);
      store(entry, bar * s * s_above);
      if (!s1_bar) return;
      const Vec<T> product = bar * W_above[j * d + i];
      store(s1_bar + v, load(s1_bar + v) + product * s_above);
      store(s1_above_bar + j_at, load(s1_above_bar + j_at) + product * s);
    });
}

template <class T>
void CpuLinearization<T>::CpuExactPenalty::back_through_network(const Cores& c,
                                                                const CoreFlow& flow, int64_t p,
                                                                const T* B_bar, T g_loss,
                                                                T* scratch) const {
  const auto at = [&](const std::vector<T*>& array, int l) { return array[l] + p * D_[l] * NR; };
  for (int l = options_.lowest; options_.hessian && l < L_; ++l) {
    const int64_t d = D_[l];
    T *a_bar = at(flow.a_bar, l), *z_bar = at(flow.z_bar, l);
    add_product(c.s1(l, p), z_bar, d, a_bar);
    if (smooth_) add_product(c.residual(lin_.r_.a_bar, l, p), z_bar, d, at(flow.s1, l));
    const LayerTerm<T> term{weight(l + 1), d, a_bar, 0};
    multiply_panels<T, false>(&term, 1, d, {0, D_[l + 1]}, 1, at(flow.z_bar, l + 1), 0, true);
  }
  const int C = int(D_[L_]);
  for (int v = 0; v < NR; v += W) {
    const Vec<T> w = load(lin_.r_.weight + (c.first + p) * NR + v);
    const T *z_bar = at(flow.z_bar, L_) + v, *primal = c.z_bar(L_, p) + v;
    T* z = at(flow.z, L_) + v;
    if (lin_.s_.loss == Loss::kCrossEntropy) {
      // B_L = w (diag p - p p'): <B_bar, dB_L> = w <slope, dp>, slope = diag B_bar - 2 B_bar p
      const T* probability = lin_.r_.p + (c.first + p) * C * NR + v;
      for (int i = 0; i < C; ++i) {
        Vec<T> slope = load(B_bar + i * (C + 1) * NR + v);
        for (int j = 0; j < C; ++j)
          slope -=
              broadcast(T(2)) * load(B_bar + (j * C + i) * NR + v) * load(probability + j * NR);
        store(scratch + i * NR + v, slope + load(z_bar + i * NR));
      }
      cross_entropy_d2<Real>(probability, w, scratch + v, C, NR, z);
    } else {
      for (int i = 0; i < C; ++i) store(z + i * NR, w * load(z_bar + i * NR));
    }
    for (int i = 0; i < C; ++i)
      store(z + i * NR, load(z + i * NR) + g_loss * load(primal + i * NR));
  }
  for (int l = L_ - 1; l >= 1; --l) {
    T *a = at(flow.a, l), *z = at(flow.z, l);
    const LayerTerm<T> term{weight(l + 1), D_[l], at(flow.z, l + 1), 0};
    multiply_panels<T, true>(&term, 1, D_[l + 1], {0, D_[l]}, 1, a, 0, true);
    add_product(c.s1(l, p), a, D_[l], z);
    if (smooth_) add_product(at(flow.d2, l), at(flow.s1, l), D_[l], z);
  }
}

// The sums over samples: out_W and out_b of every layer (distance 0), or what U_{l,l+distance} and
// M_{l,l+distance} add to out_W_{l+1}: their columns take the place of samples.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::products(Team& team, const Cores& c,
                                                    const CoreFlow& flow, int distance, T* out,
                                                    T* const* scratch) const {
  std::vector<Product> products;
  if (distance == 0) {
    for (int l = 1; l <= L_; ++l) {
      Product product{l, 1, out, {c.first, c.first + c.panels}, c.first > 0, {}};
      product.factors.push_back({flow.z[l], 0, l > 1 ? c.a(l - 1, 0) : nullptr, 0});
      if (options_.hessian && l > options_.lowest)
        product.factors.push_back({c.z_bar(l, 0), 0, flow.a_bar[l - 1], 0});
      products.push_back(std::move(product));
    }
    lin_.run_products(team, products, scratch);
    return;
  }
  const auto run = [&](const LayerTable<T>& X, const LayerTable<T>& X_bar, int below) {
    products.clear();
    for (int l = options_.lowest; l + distance <= L_; ++l) {
      const int m = l + distance;
      const Range columns{0, c.panels * D_[m - below]};
      if (X_bar(l, m))
        products.push_back(
            {l + 1, 1, out, columns, true, {{X(l + 1, m), 0, X_bar(l, m), 0}}, false});
    }
    if (!products.empty()) lin_.run_products(team, products, scratch);
  };
  run(c.U, flow.U, 0);
  if (distance > 2) run(c.M, flow.M, 1);
  for (int l = options_.lowest; distance == 2 && l + 2 <= L_; ++l)
    if (flow.M(l, l + 2)) add_row_sums(team, c, flow, l, out);
}

// What M_{l,l+2} adds to out_W_{l+1}: M_{l+1,l+2} is diagonal, and the product a sum over samples.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::add_row_sums(Team& team, const Cores& c,
                                                        const CoreFlow& flow, int l, T* out) const {
  const int64_t d = D_[l], above = D_[l + 1];
  team.for_each(above, [&](int64_t j) {
    T* row = out + lin_.layout_.weight[l + 1] + j * d;
    for (int64_t i = 0; i < d; i += W) {
      const int64_t count = std::min<int64_t>(W, d - i);
      const Vec<T> total =
          sums_over_samples(flow.M(l, l + 2) + (j * d + i) * NR, count, c.panels, above * d * NR);
      for (int64_t n = 0; n < count; ++n) row[i + n] += total[n];
    }
  });
}

}  // namespace hvpfast::HVPFAST_ISA
