// The derivatives of tr H^2 with respect to the arrays of Cores and to the residuals, as every pair
// of samples gives them: equations in core_gradient-inl.h.
#pragma once
#include "core_gradient-inl.h"

namespace hvpfast::HVPFAST_ISA {

// out (features, kPanel) = [out +] sum over rows m of rows_m weight_m; see PairTerm.
template <class T>
void weighted_sum(const T* rows, int64_t features, const T* weight, int64_t panels, T* out,
                  bool accumulate) {
  constexpr int NR = kPanel<T>;
  const ptrdiff_t stride = NR;
  for_row_blocks<T, false>({0, features}, [&](int64_t f, int64_t, MicroKernel<T, false> kernel) {
    const Term<T> part{rows + f * NR, weight, NR, int(panels), features * NR, NR * NR};
    kernel(&part, 1, &stride, out + f * NR, NR, accumulate);
  });
}

// The pairs of lane panel p with row panels q: their part of the derivatives at the samples of p.
template <class T>
struct CpuLinearization<T>::CpuExactPenalty::PairsOfPanels {
  const CoreOptions& options;
  const Cores& lanes;
  const CoreBars& bars;
  const int64_t p;
  const Cores& rows;
  const Range q;
  const bool accumulate;  // add to packed, U, M, Y and Z; the others are always added to
  const CoreStrips& s;

  const int64_t* const D = lanes.lin->D_;
  const int64_t panels = q.size();
  const int64_t size = panels * NR * NR;
  const Vec<T> two = broadcast(T(2));
  const Vec<T> four = broadcast(T(4));
  double neighbours = 0;  // sum over l and pairs of 2 alpha^l beta^{l+1} <s1_l,n, s1_l,m>

  void run() {
    const int L = lanes.lin->L_;
    s.alphas_and_betas(lanes, p, rows, q);
    for (int l = 1; l <= L; ++l)
      for (T* strip : {s.alpha_bar[l], s.beta_bar[l]})
        if (strip) std::fill(strip, strip + size, T(0));
    for (int l = options.lowest; l <= L; ++l) {
      if (!options.has(l)) continue;
      core(l);
      for (int k = l + 1; k <= L; ++k) {
        if (!options.has(k)) continue;
        block_uu(l, k);
        if (!options.has_w(k)) continue;
        if (k == l + 1) {
          neighbour_blocks(l);
        } else {
          block_uw(l, k);
        }
      }
    }
    for (int l = options.lowest; l <= L; ++l) alphas_and_betas(l);
  }

  void core(int l) const {
    const T* alpha = s.alpha[l];
    const int64_t triangle = D[l] * (D[l] + 1) / 2;
    if (alpha_bar(l)) {
      pair_products<T>({term(rows.packed[l], lanes.packed[l], triangle)}, panels, s.gram);
      add_gram(alpha_bar(l), alpha);
    }
    weigh([&](int64_t v) { return two * load(alpha + v) * load(alpha + v); });
    sum(rows.packed[l], triangle, bars.packed[l]);
  }

  void block_uu(int l, int k) const {
    const T *alpha = s.alpha[l], *alpha_k = s.alpha[k];
    const int64_t entries = D[l] * D[k];
    if (alpha_bar(l) || alpha_bar(k)) {
      pair_products<T>({term(rows.U(l, k), lanes.U(l, k), entries)}, panels, s.gram);
      if (alpha_bar(l)) add_gram(alpha_bar(l), alpha_k);
      if (alpha_bar(k)) add_gram(alpha_bar(k), alpha);
    }
    weigh([&](int64_t v) { return four * load(alpha + v) * load(alpha_k + v); });
    sum(rows.U(l, k), entries, bars.U(l, k));
  }

  // With gram = <M_n, M_m>: alpha_bar and beta_bar, and the weights of M_bar.
  void alpha_and_beta_of_M(int l, int k) const {
    const T *alpha = s.alpha[l], *beta = s.beta[k];
    if (alpha_bar(l)) add_gram(alpha_bar(l), beta);
    add_gram(s.beta_bar[k], alpha);
    weigh([&](int64_t v) { return four * load(alpha + v) * load(beta + v); });
  }

  // M and C of the layers l and l + 1.
  void neighbour_blocks(int l) {
    const int64_t entries = D[l] * D[l + 1];
    const T* alpha = s.alpha[l];
    pair_products<T>({{rows.s1(l, q.begin), lanes.s1(l, p), D[l]}}, panels, s.gram);
    alpha_and_beta_of_M(l, l + 1);
    for (int64_t v = 0; v < size; v += W)
      neighbours += 0.5 * sum_lanes<T>(load(s.weight + v) * load(s.gram + v));
    if (lanes.lin->smooth()) add_sum(rows.s1(l, q.begin), D[l], bars.s1[l]);
    weigh([&](int64_t v) { return four * load(alpha + v); });
    if (alpha_bar(l)) {
      pair_products<T>({term(rows.Y[l], lanes.Z[l], entries), term(rows.Z[l], lanes.Y[l], entries)},
                       panels, s.gram);
      add_gram(alpha_bar(l), nullptr);
    }
    sum(rows.Z[l], entries, bars.Y[l]);
    sum(rows.Y[l], entries, bars.Z[l]);
  }

  // M and C of layers further apart.
  void block_uw(int l, int k) const {
    const int64_t below = D[k - 1];
    const int64_t numbers = D[l] * below;
    const T* alpha = s.alpha[l];
    pair_products<T>({term(rows.M(l, k), lanes.M(l, k), numbers)}, panels, s.gram);
    alpha_and_beta_of_M(l, k);
    sum(rows.M(l, k), numbers, bars.M(l, k));
    weigh([&](int64_t v) { return four * load(alpha + v); });
    std::fill(s.gram, s.gram + size, T(0));
    s.add_cross(D[l], lanes.U_factor(l, k, p), rows.M_factor(l, k, q.begin), panels, s.gram,
                s.weight, at(bars.U_rows(l, k), D[l] * D[k]), at(bars.a[k - 1], below));
    s.add_cross(D[l], lanes.M_factor(l, k, p), rows.U_factor(l, k, q.begin), panels, s.gram,
                s.weight, at(bars.M_rows(l, k), numbers), at(bars.z_bar[k], D[k]));
    if (alpha_bar(l)) add_gram(alpha_bar(l), nullptr);
  }

  // From alpha_bar and beta_bar to the residuals.
  void alphas_and_betas(int l) const {
    if (const T* bar = alpha_bar(l)) {
      weigh([&](int64_t v) { return two * load(bar + v); });
      add_sum(rows.a(l - 1, q.begin), D[l - 1], bars.a[l - 1]);
    }
    if (const T* bar = s.beta_bar[l]) {
      weigh([&](int64_t v) { return two * load(bar + v); });
      add_sum(rows.z_bar(l, q.begin), D[l], bars.z_bar[l]);
    }
  }

  T* alpha_bar(int l) const { return l > 1 ? s.alpha_bar[l] : nullptr; }  // a_0 is no variable
  T* at(T* bar, int64_t features) const { return bar + p * features * NR; }
  const T* at_rows(const T* array, int64_t features) const {
    return array + q.begin * features * NR;
  }
  PairTerm<T> term(const T* row_array, const T* lane_array, int64_t features) const {
    return {at_rows(row_array, features), lane_array + p * features * NR, features};
  }
  template <class Value>
  HVP_INLINE void weigh(Value&& value) const {
    for (int64_t v = 0; v < size; v += W) store(s.weight + v, value(v));
  }
  // to += 2 by gram, or 2 gram
  void add_gram(T* to, const T* by) const {
    for (int64_t v = 0; v < size; v += W) {
      const Vec<T> factor = by ? two * load(by + v) : two;
      store(to + v, load(to + v) + factor * load(s.gram + v));
    }
  }
  // bar = [bar +] sum over rows m of rows_m weight_m
  void sum(const T* row_array, int64_t features, T* bar) const {
    weighted_sum(at_rows(row_array, features), features, s.weight, panels, at(bar, features),
                 accumulate);
  }
  void add_sum(const T* row_panels, int64_t features, T* bar) const {
    weighted_sum(row_panels, features, s.weight, panels, at(bar, features), true);
  }
};

// The pairs of lane panel p with the samples of all panels of rows. Returns the value of M of
// neighbouring layers, which value_of leaves out.
template <class T>
double CpuLinearization<T>::CpuExactPenalty::pull(const Cores& lanes, const CoreBars& bars,
                                                  int64_t p, const Cores& rows, bool accumulate,
                                                  const CoreStrips& s) const {
  if (!accumulate) {
    const auto zero = [&](T* array, int64_t size) {
      if (array) std::fill(array + p * size * NR, array + (p + 1) * size * NR, T(0));
    };
    for (int l = 1; l <= L_; ++l) {
      for (const auto* list : {&bars.a, &bars.s1, &bars.z_bar}) zero((*list)[l], D_[l]);
      for (int m = l + 2; m <= L_; ++m) {
        zero(bars.U_rows(l, m), D_[l] * D_[m]);
        zero(bars.M_rows(l, m), D_[l] * D_[m - 1]);
      }
    }
  }
  double neighbours = 0;
  for (int64_t q = 0; q < rows.panels; q += kStripPanels) {
    const Range panels{q, std::min(rows.panels, q + kStripPanels)};
    PairsOfPanels pairs{options_, lanes, bars, p, rows, panels, accumulate || q > 0, s};
    pairs.run();
    neighbours += pairs.neighbours;
  }
  return neighbours;
}

// tr H^2 from its derivatives, but <M_n, M_m> of neighbouring layers: it is of degree two in B, U
// and M, and sum_nm C_nm is linear in Y and in U_rows.
template <class T>
double CpuLinearization<T>::CpuExactPenalty::value_of(const Cores& c, const CoreBars& bars,
                                                      int64_t p) const {
  double total = 0;
  const auto add = [&](double factor, const T* array, const T* bar, int64_t size) {
    if (!bar) return;
    array += p * size * NR;
    bar += p * size * NR;
    Vec<T> sum{};
    double part = 0;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t v = i * NR; v < (i + 1) * NR; v += W) sum += load(array + v) * load(bar + v);
      if (i % 64 == 63) {
        part += sum_lanes<T>(sum);
        sum = Vec<T>{};
      }
    }
    total += factor * (part + sum_lanes<T>(sum));
  };
  for (int l = options_.lowest; l <= L_; ++l) {
    add(0.5, c.packed[l], bars.packed[l], D_[l] * (D_[l] + 1) / 2);
    for (int k = l + 1; k <= L_; ++k) {
      add(0.5, c.U(l, k), bars.U(l, k), D_[l] * D_[k]);
      add(0.5, c.M(l, k), bars.M(l, k), D_[l] * D_[k - 1]);
      add(1.0, c.U_rows(l, k), bars.U_rows(l, k), D_[l] * D_[k]);
    }
    if (l < L_) add(1.0, c.Y[l], bars.Y[l], D_[l] * D_[l + 1]);
  }
  return total;
}

}  // namespace hvpfast::HVPFAST_ISA
