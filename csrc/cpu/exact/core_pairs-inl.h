// tr H G as a sum over pairs of samples, n of H and m of G:
//   tr H G = sum_nm sum_l (alpha^l)^2 <B_l,n, B_l,m>
//            + 2 sum_{l<k} alpha^l (alpha^k <U_n, U_m> + beta^k <M_n, M_m> + C_nm + C_mn)
//   beta^k_nm = <z_bar_k,n, z_bar_k,m>,    C_nm = <U_n z_bar_k,m, M_m a_{k-1},n>
// with U, M of the layers (l, k); Hessian only: M and C. For k = l + 1 the matrix M is diagonal and
//   <M_n, M_m> = <s1_l,n, s1_l,m>,    C_nm = <Y_n, Z_m>
//
// Every product is between all numbers of two samples, and so one matrix product: of a panel of
// samples n side by side (lanes) with the samples m of some panels below each other (rows). A strip
// (rows, kPanel) holds one number per pair.
#pragma once
#include "core_traces-inl.h"

namespace hvpfast::HVPFAST_ISA {

constexpr int64_t kStripPanels = 16;  // panels of rows of one strip

// <rows_m, lanes_n>: rows of `panels` panels, (panels, features, kPanel) and (features, kPanel).
template <class T>
struct PairTerm {
  const T* rows;
  const T* lanes;
  int64_t features;
};

// out (panels * kPanel, kPanel) = [out +] sum of terms, by blocks of features that stay in L1.
template <class T>
void pair_products(std::initializer_list<PairTerm<T>> terms, int64_t panels, T* out,
                   bool accumulate = false) {
  constexpr int NR = kPanel<T>;
  constexpr int64_t kFeatures = 128;
  const ptrdiff_t stride = NR;
  for (const PairTerm<T>& term : terms)
    for (int64_t f = 0; f < term.features; f += kFeatures, accumulate = true) {
      const int depth = int(std::min(kFeatures, term.features - f));
      for (int64_t q = 0; q < panels; ++q) {
        const T* rows = term.rows + (q * term.features + f) * NR;
        for_row_blocks<T, true>({0, NR}, [&](int64_t i, int64_t, MicroKernel<T, true> kernel) {
          const Term<T> part{rows + i, term.lanes + f * NR, depth, 1, 0, 0};
          kernel(&part, 1, &stride, out + (q * NR + i) * NR, NR, accumulate);
        });
      }
    }
}

// Strips of one thread.
template <class T>
struct CpuLinearization<T>::CoreStrips {
  static constexpr int64_t kProductRows = 16;  // rows of U and M that meet all pairs at once

  std::vector<T*> alpha, beta, alpha_bar, beta_bar;  // by layer
  T *gram, *weight;
  T *left, *right;  // (kProductRows, kPanel, kPanel)

  template <class Take>
  CoreStrips(const CoreOptions& o, int L, int64_t most_panels, Take&& take) {
    const auto strip = [&] { return take(size_t(std::min(kStripPanels, most_panels) * NR * NR)); };
    for (auto* list : {&alpha, &beta, &alpha_bar, &beta_bar}) list->assign(size_t(L) + 1, nullptr);
    for (int l = 1; l <= L; ++l) {
      if (o.has(l)) alpha[l] = strip();
      if (o.has_w(l)) beta[l] = strip();
      if (o.gradient && o.chosen.weight[l]) alpha_bar[l] = strip();
      if (o.gradient && o.has_w(l)) beta_bar[l] = strip();
    }
    gram = strip();
    weight = strip();
    left = take(size_t(kProductRows * NR * NR));
    right = take(size_t(kProductRows * NR * NR));
  }

  void alphas_and_betas(const Cores& lanes, int64_t p, const Cores& rows, Range q) const {
    const CoreOptions& o = lanes.options;
    const int64_t* D = lanes.lin->D_;
    for (int l = o.lowest; l <= lanes.lin->L_; ++l) {
      if (beta[l])
        pair_products<T>({{rows.z_bar(l, q.begin), lanes.z_bar(l, p), D[l]}}, q.size(), beta[l]);
      if (!alpha[l]) continue;
      const int64_t size = q.size() * NR * NR;
      if (!o.chosen.weight[l]) {
        std::fill(alpha[l], alpha[l] + size, T(1));
        continue;
      }
      pair_products<T>({{rows.a(l - 1, q.begin), lanes.a(l - 1, p), D[l - 1]}}, q.size(), alpha[l]);
      for (int64_t v = 0; o.chosen.bias[l] && v < size; v += W)
        store(alpha[l] + v, load(alpha[l] + v) + T(1));
    }
  }

  // <X_n y_m, Y_m x_n> of samples n in lanes and m in rows, X (d, columns of y) and Y (d, columns
  // of x) by rows: added to `sum`. With a weight g for every pair, the derivatives of sum_nm g <..>
  // with respect to X and x are added to X_bar and x_bar.
  void add_cross(int64_t d, const CrossFactor<T>& lanes, const CrossFactor<T>& rows, int64_t panels,
                 T* sum, const T* g, T* X_bar, T* x_bar) const {
    const int64_t nx = lanes.size, ny = rows.size;
    const ptrdiff_t stride = NR;
    for (int64_t q = 0; q < panels; ++q) {
      const T *y = rows.vector + q * ny * NR, *Y = rows.matrix + q * d * nx * NR;
      T* pairs = sum + q * NR * NR;
      for (int64_t i = 0; i < d; i += kProductRows) {
        const int64_t count = std::min(kProductRows, d - i);
        const LayerTerm<T> Xy{y, NR, lanes.matrix + i * ny * NR, ny * NR};
        multiply_panels<T, true>(&Xy, 1, ny, {0, NR}, count, left, NR * NR);
        for (int64_t k = 0; k < count; ++k) {
          const LayerTerm<T> Yx{Y + (i + k) * nx * NR, NR, lanes.vector, 0};
          multiply_panels<T, true>(&Yx, 1, nx, {0, NR}, 1, right + k * NR * NR, 0);
        }
        for (int64_t v = 0; v < NR * NR; v += W) {
          Vec<T> total = load(pairs + v);
          for (int64_t k = 0; k < count; ++k) {
            const int64_t at = k * NR * NR + v;
            const Vec<T> l = load(left + at), r = load(right + at);
            total += l * r;
            if (!g) continue;
            const Vec<T> weight = load(g + q * NR * NR + v);
            store(left + at, weight * r);
            store(right + at, weight * l);
          }
          store(pairs + v, total);
        }
        if (!g) continue;
        const LayerTerm<T> to_X{y, NR, left, NR * NR};
        multiply_panels<T, false>(&to_X, 1, NR, {0, ny}, count, X_bar + i * ny * NR, ny * NR, true);
        for_row_blocks<T, false>({0, nx}, [&](int64_t j, int64_t, MicroKernel<T, false> kernel) {
          const Term<T> to_x{Y + (i * nx + j) * NR, right, NR, int(count), nx * NR, NR * NR};
          kernel(&to_x, 1, &stride, x_bar + j * NR, NR, true);
        });
      }
    }
  }
};

// The sum over the pairs of lane panel p with row panels q. symmetric: H = G, and the pairs with
// q <= p, the only ones visited, stand for the others too.
template <class T>
double CpuLinearization<T>::core_pairs(const Cores& lanes, int64_t p, const Cores& rows, Range q,
                                       bool symmetric, const CoreStrips& s) const {
  const CoreOptions& o = lanes.options;
  const int64_t panels = q.size();
  double total = 0;
  const auto add = [&](const T* products, auto&& weight) {
    for (int64_t i = 0; i < panels; ++i) {
      Vec<T> sum{};
      for (int64_t v = i * NR * NR; v < (i + 1) * NR * NR; v += W)
        sum += weight(v) * load(products + v);
      total += (symmetric && q.begin + i < p ? 2.0 : 1.0) * sum_lanes<T>(sum);
    }
  };
  const auto term = [&](const T* row_array, const T* lane_array, int64_t features) {
    return PairTerm<T>{row_array + q.begin * features * NR, lane_array + p * features * NR,
                       features};
  };
  s.alphas_and_betas(lanes, p, rows, q);
  const Vec<T> two = broadcast(T(2));
  for (int l = o.lowest; l <= L_; ++l) {
    if (!o.has(l)) continue;
    const T* alpha = s.alpha[l];
    pair_products<T>({term(rows.packed[l], lanes.packed[l], D_[l] * (D_[l] + 1) / 2)}, panels,
                     s.gram);
    add(s.gram, [&](int64_t v) { return load(alpha + v) * load(alpha + v); });
    for (int k = l + 1; k <= L_; ++k) {
      if (!o.has(k)) continue;
      pair_products<T>({term(rows.U(l, k), lanes.U(l, k), D_[l] * D_[k])}, panels, s.gram);
      add(s.gram, [&](int64_t v) { return two * load(alpha + v) * load(s.alpha[k] + v); });
      if (!o.has_w(k)) continue;
      const T* beta = s.beta[k];
      if (k == l + 1) {
        const int64_t size = D_[l] * D_[k];
        pair_products<T>({{rows.s1(l, q.begin), lanes.s1(l, p), D_[l]}}, panels, s.gram);
        add(s.gram, [&](int64_t v) { return two * load(alpha + v) * load(beta + v); });
        // Among a panel's own pairs, C_mn occurs as C_nm of the mirrored pair.
        const int64_t mirrored = symmetric && q.end > p ? panels - 1 : panels;
        pair_products<T>({term(rows.Y[l], lanes.Z[l], size)}, panels, s.gram);
        pair_products<T>({term(rows.Z[l], lanes.Y[l], size)}, mirrored, s.gram, true);
        for (int64_t v = mirrored * NR * NR; v < panels * NR * NR; v += W)
          store(s.gram + v, two * load(s.gram + v));
      } else {
        const int64_t below = D_[k - 1];
        const int64_t size = D_[l] * below;
        pair_products<T>({term(rows.M(l, k), lanes.M(l, k), size)}, panels, s.gram);
        add(s.gram, [&](int64_t v) { return two * load(alpha + v) * load(beta + v); });
        std::fill(s.gram, s.gram + panels * NR * NR, T(0));
        const auto add_cross = [&](const CrossFactor<T>& of_lanes, const CrossFactor<T>& of_rows) {
          s.add_cross(D_[l], of_lanes, of_rows, panels, s.gram, nullptr, nullptr, nullptr);
        };
        add_cross(lanes.U_factor(l, k, p), rows.M_factor(l, k, q.begin));
        add_cross(lanes.M_factor(l, k, p), rows.U_factor(l, k, q.begin));
      }
      add(s.gram, [&](int64_t v) { return two * load(alpha + v); });
    }
  }
  return total;
}

template <class T>
double CpuLinearization<T>::inner_product(const Linearization<T>& other, Curvature curvature,
                                          const Chosen& chosen, int threads) const {
  const auto* that = dynamic_cast<const CpuLinearization*>(&other);
  if (!that || that->s_.D != s_.D)
    throw std::invalid_argument("inner products are between linearizations of one network");
  const bool same = that == this;
  const CoreOptions options = core_options(true, false, curvature, chosen);
  const int64_t chunk = core_chunk(options);
  const int64_t other_chunk = that->core_chunk(options);
  const int team_size = threads_for(macs_ * double(panels_ * NR), threads);
  Arena arena;
  Cores lanes = make_cores(arena, options, chunk);
  Cores far = same && panels_ <= chunk ? lanes : that->make_cores(arena, options, other_chunk);
  const std::vector<T*> scratch = per_thread(arena, team_size, core_scratch<T>(D_, L_));
  std::vector<CoreStrips> strips;
  const auto take = [&](size_t size) { return arena.template take<T>(size); };
  for (int rank = 0; rank < team_size; ++rank)
    strips.emplace_back(options, L_, std::max(chunk, other_chunk), take);
  double total = 0;
  std::vector<double> partial;
  for (int64_t first = 0; first < panels_; first += chunk) {
    lanes.first = first;
    lanes.panels = std::min(chunk, panels_ - first);
    const int64_t start = same ? first : 0;
    for (int64_t begin = start; begin < that->panels_; begin += other_chunk) {
      const bool diagonal = same && begin == first;  // then the chunks are equal
      Cores& rows = diagonal ? lanes : far;
      if (!diagonal) {
        rows.first = begin;
        rows.panels = std::min(other_chunk, that->panels_ - begin);
      }
      const int64_t blocks = (rows.panels + kStripPanels - 1) / kStripPanels;
      partial.assign(size_t(lanes.panels * blocks), 0.0);
      parallel(team_size, [&](Team& team) {
        if (begin == start) build_cores(team, lanes, scratch.data());
        if (!diagonal) that->build_cores(team, rows, scratch.data());
        team.for_each(lanes.panels * blocks, [&](int64_t task) {
          // The panels with the most pairs come first.
          const int64_t p = lanes.panels - 1 - task / blocks;
          const int64_t block = task % blocks;
          const Range q{block * kStripPanels,
                        std::min(diagonal ? p + 1 : rows.panels, (block + 1) * kStripPanels)};
          if (q.size() > 0)
            partial[size_t(task)] =
                core_pairs(lanes, p, rows, q, diagonal, strips[size_t(team.rank)]);
        });
      });
      double sum = 0;
      for (double part : partial) sum += part;
      total += same && !diagonal ? 2 * sum : sum;
    }
  }
  return total;
}

}  // namespace hvpfast::HVPFAST_ISA
