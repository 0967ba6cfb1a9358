// The gradients of tr H and tr H^2: core_pairs-inl.h and cores-inl.h in reverse. X_bar is the
// derivative of the penalty with respect to X. Every pair gives to both of its samples, so with a
// weight g
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

// out (features, kPanel) = [out +] sum over rows m of rows_m weight_m; see pair_products.
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

// to += from * by, each (n, kPanel)
template <class T>
HVP_INLINE void add_product(const T* from, const T* by, int64_t n, T* to) {
  for_vectors<T>(1, n, [&](int64_t, int64_t v) {
    store(to + v, load(to + v) + load(from + v) * load(by + v));
  });
}

// Derivatives of tr H^2 with respect to the arrays of Cores, shaped as they are, and to the
// residuals: what the pairs of samples give.
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
      Y[l] = like(c.Y[l], D[l] * D[l + 1]), Z[l] = like(c.Z[l], D[l] * D[l + 1]);
      for (int m = l + 1; m <= L; ++m) {
        if (!c.options.has(l) || !c.options.has(m)) continue;
        U(l, m) = like(c.U(l, m), D[l] * D[m]), M(l, m) = like(c.M(l, m), D[l] * D[m - 1]);
        U_rows(l, m) = like(c.U_rows(l, m), D[l] * D[m]);
        M_rows(l, m) = like(c.M_rows(l, m), D[l] * D[m - 1]);
      }
    }
  }
};

// The backward pass through cores and network: derivatives with respect to U and M, whose place
// what W_bar needs takes, and to the residuals.
template <class T>
struct CpuLinearization<T>::CoreFlow {
  LayerTable<T> U, M;
  std::vector<T*> a, s1, a_bar, z_bar, z;  // (D[l])
  std::vector<T*> d2, d3;                  // act''(z), act'''(z) a_bar: smooth activations only

  template <class Take>
  CoreFlow(const Cores& c, Take&& take) {
    const int L = c.lin->L_;
    const int64_t* D = c.lin->D_;
    U.resize(L), M.resize(L);
    for (auto* list : {&a, &s1, &a_bar, &z_bar, &z, &d2, &d3}) list->assign(size_t(L) + 1, nullptr);
    for (int l = 1; l <= L; ++l) {
      z[l] = take(D[l]), z_bar[l] = take(D[l]);
      if (l == L) break;
      a[l] = take(D[l]), a_bar[l] = take(D[l]);
      if (c.lin->smooth()) s1[l] = take(D[l]), d2[l] = take(D[l]), d3[l] = take(D[l]);
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
  int team_size(int threads) const;
  Scratch make_scratch(Arena& arena, int team_size) const;
  CoreBars make_bars(Arena& arena, const Cores& c) const;
  double pull_pairs(const Cores& lanes, const CoreBars& bars, int64_t p, const Cores& rows, Range q,
                    bool accumulate, const CoreStrips& s) const;
  double pull(const Cores& lanes, const CoreBars& bars, int64_t p, const Cores& rows,
              bool accumulate, const CoreStrips& s) const;
  double value_of(const Cores& c, const CoreBars& bars, int64_t p) const;
  // core_backward-inl.h
  void start(const Cores& c, const CoreBars* bars, const CoreFlow& flow, int64_t p, T g) const;
  void add_neighbours(const Cores& c, const CoreBars& bars, const CoreFlow& flow, int64_t p,
                      T g) const;
  void back_through_cores(const Cores& c, const CoreBars* bars, const CoreFlow& flow, int64_t p,
                          T g, T* scratch) const;
  void back_through_layer(const Cores& c, const CoreFlow& flow, int l, int64_t p, T* own, T* next,
                          T* scratch) const;
  void back_through_network(const Cores& c, const CoreFlow& flow, int64_t p, const T* B_bar,
                            T g_loss, T* scratch) const;
  void products(Team& team, const Cores& c, const CoreFlow& flow, int distance, T* out,
                T* const* scratch) const;
  void finish(const Cores& c, const CoreBars* bars, const CoreFlow& flow, const Scratch& scratch,
              T g_loss, T g, T* out, int team_size) const;

  const CpuLinearization& lin_;
  const int64_t* D_;
  const int L_;
  const Exact kind_;
  const bool smooth_;
  const CoreOptions options_;
  double value_ = 0;
  // Of all samples, where one chunk holds them: the value has needed them, the gradient will.
  Arena arena_;
  std::unique_ptr<Cores> cores_;
  std::unique_ptr<CoreBars> bars_;
};

template <class T>
int CpuLinearization<T>::CpuExactPenalty::team_size(int threads) const {
  return lin_.threads_for(lin_.macs_ * (options_.pairs ? double(lin_.panels_ * NR) : 1.0), threads);
}

template <class T>
typename CpuLinearization<T>::CpuExactPenalty::Scratch
CpuLinearization<T>::CpuExactPenalty::make_scratch(Arena& arena, int team_size) const {
  const auto take = [&](size_t size) { return arena.template take<T>(size); };
  Scratch scratch;
  for (int rank = 0; rank < team_size; ++rank) {
    scratch.build.push_back(take(core_scratch<T>(D_, L_)));
    scratch.back.push_back(take(back_scratch(D_, L_)));
    scratch.product.push_back(take(lin_.product_scratch(kProductPanels)));
    if (options_.pairs) scratch.strips.emplace_back(options_, L_, lin_.panels_, take);
  }
  return scratch;
}

template <class T>
typename CpuLinearization<T>::CoreBars CpuLinearization<T>::CpuExactPenalty::make_bars(
    Arena& arena, const Cores& c) const {
  const int64_t panels = lin_.core_chunk(options_);
  return CoreBars(c,
                  [&](int64_t size) { return arena.template take<T>(size_t(size * panels * NR)); });
}

template <class T>
CpuLinearization<T>::CpuExactPenalty::CpuExactPenalty(const CpuLinearization& lin, Exact kind,
                                                      Curvature curvature, const Chosen& chosen,
                                                      int threads)
    : lin_(lin),
      D_(lin.D_),
      L_(lin.L_),
      kind_(kind),
      smooth_(lin.smooth()),
      options_(lin.core_options(kind == Exact::kFro2, true, curvature, chosen)) {
  if (kind == Exact::kTrace) {
    std::vector<T> traces(size_t(lin.N_));
    lin.sample_traces(curvature, chosen, traces.data(), threads);
    for (T trace : traces) value_ += double(trace);
    return;
  }
  if (lin.core_chunk(options_) < lin.panels_) {
    value_ = lin.inner_product(lin, curvature, chosen, threads);
    return;
  }
  cores_ = std::make_unique<Cores>(lin.make_cores(arena_, options_, lin.panels_));
  cores_->panels = lin.panels_;
  bars_ = std::make_unique<CoreBars>(make_bars(arena_, *cores_));
  Arena arena;
  const int members = team_size(threads);
  const Scratch scratch = make_scratch(arena, members);
  std::vector<double> partial(size_t(lin.panels_));
  parallel(members, [&](Team& team) {
    lin.build_cores(team, *cores_, scratch.build.data());
    team.for_each(lin.panels_, [&](int64_t p) {
      partial[size_t(p)] =
          pull(*cores_, *bars_, p, *cores_, false, scratch.strips[size_t(team.rank)]) +
          value_of(*cores_, *bars_, p);
    });
  });
  for (double part : partial) value_ += part;
}

// tr H^2 from its derivatives, but <M_n, M_m> of neighbouring layers: it is of degree two in B, U
// and M, and sum_nm C_nm is linear in Y and in U_rows.
template <class T>
double CpuLinearization<T>::CpuExactPenalty::value_of(const Cores& c, const CoreBars& bars,
                                                      int64_t p) const {
  double total = 0;
  const auto add = [&](double factor, const T* array, const T* bar, int64_t size) {
    if (!bar) return;
    array += p * size * NR, bar += p * size * NR;
    Vec<T> sum{};
    double part = 0;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t v = i * NR; v < (i + 1) * NR; v += W) sum += load(array + v) * load(bar + v);
      if (i % 64 == 63) part += sum_lanes<T>(sum), sum = Vec<T>{};
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

template <class T>
double CpuLinearization<T>::CpuExactPenalty::pull_pairs(const Cores& lanes, const CoreBars& bars,
                                                        int64_t p, const Cores& rows, Range q,
                                                        bool accumulate,
                                                        const CoreStrips& s) const {
  const CoreOptions& o = options_;
  const int64_t panels = q.size(), size = panels * NR * NR;
  const auto at_rows = [&](const T* array, int64_t features) {
    return array + q.begin * features * NR;
  };
  const auto at = [&](T* array, int64_t features) { return array + p * features * NR; };
  const auto term = [&](const T* row_array, const T* lane_array, int64_t features) {
    return PairTerm<T>{at_rows(row_array, features), lane_array + p * features * NR, features};
  };
  const auto each = [&](T* to, auto&& value) {
    for (int64_t v = 0; v < size; v += W) store(to + v, value(v));
  };
  const auto add = [&](T* to, T factor, const T* by) {  // to += factor by gram
    const Vec<T> f = broadcast(factor);
    if (by) {
      each(to, [&](int64_t v) { return load(to + v) + f * load(by + v) * load(s.gram + v); });
    } else {
      each(to, [&](int64_t v) { return load(to + v) + f * load(s.gram + v); });
    }
  };
  const auto sum = [&](const T* row_array, int64_t features, T* bar) {
    weighted_sum(at_rows(row_array, features), features, s.weight, panels, at(bar, features),
                 accumulate);
  };
  s.alphas_and_betas(lanes, p, rows, q);
  for (int l = 1; l <= L_; ++l)
    for (T* strip : {s.alpha_bar[l], s.beta_bar[l]})
      if (strip) std::fill(strip, strip + size, T(0));
  const Vec<T> two = broadcast(T(2)), four = broadcast(T(4));
  double neighbours = 0;
  for (int l = o.lowest; l <= L_; ++l) {
    if (!o.has(l)) continue;
    const T* alpha = s.alpha[l];
    T* alpha_bar = l > 1 ? s.alpha_bar[l] : nullptr;  // alpha^1 is made of inputs
    const int64_t triangle = D_[l] * (D_[l] + 1) / 2;
    if (alpha_bar) {
      pair_products<T>({term(rows.packed[l], lanes.packed[l], triangle)}, panels, s.gram);
      add(alpha_bar, T(2), alpha);
    }
    each(s.weight, [&](int64_t v) { return two * load(alpha + v) * load(alpha + v); });
    sum(rows.packed[l], triangle, bars.packed[l]);
    for (int k = l + 1; k <= L_; ++k) {
      if (!o.has(k)) continue;
      const int64_t entries = D_[l] * D_[k];
      if (alpha_bar || s.alpha_bar[k]) {
        pair_products<T>({term(rows.U(l, k), lanes.U(l, k), entries)}, panels, s.gram);
        if (alpha_bar) add(alpha_bar, T(2), s.alpha[k]);
        if (s.alpha_bar[k]) add(s.alpha_bar[k], T(2), alpha);
      }
      each(s.weight, [&](int64_t v) { return four * load(alpha + v) * load(s.alpha[k] + v); });
      sum(rows.U(l, k), entries, bars.U(l, k));
      if (!o.has_w(k)) continue;
      const bool next = k == l + 1;
      const int64_t below = D_[k - 1], numbers = D_[l] * below;
      if (next) {
        pair_products<T>({{rows.s1(l, q.begin), lanes.s1(l, p), D_[l]}}, panels, s.gram);
      } else {
        pair_products<T>({term(rows.M(l, k), lanes.M(l, k), numbers)}, panels, s.gram);
      }
      if (alpha_bar) add(alpha_bar, T(2), s.beta[k]);
      add(s.beta_bar[k], T(2), alpha);
      each(s.weight, [&](int64_t v) { return four * load(alpha + v) * load(s.beta[k] + v); });
      for (int64_t v = 0; next && v < size; v += W)
        neighbours += 0.5 * sum_lanes<T>(load(s.weight + v) * load(s.gram + v));
      if (!next) {
        sum(rows.M(l, k), numbers, bars.M(l, k));
      } else if (smooth_) {
        weighted_sum(rows.s1(l, q.begin), D_[l], s.weight, panels, at(bars.s1[l], D_[l]), true);
      }
      each(s.weight, [&](int64_t v) { return four * load(alpha + v); });
      if (next) {
        if (alpha_bar) {
          pair_products<T>(
              {term(rows.Y[l], lanes.Z[l], entries), term(rows.Z[l], lanes.Y[l], entries)}, panels,
              s.gram);
          add(alpha_bar, T(2), nullptr);
        }
        sum(rows.Z[l], entries, bars.Y[l]);
        sum(rows.Y[l], entries, bars.Z[l]);
        continue;
      }
      std::fill(s.gram, s.gram + size, T(0));
      s.add_cross(D_[l], {lanes.U_rows(l, k) + p * entries * NR, lanes.a(k - 1, p), below},
                  {at_rows(rows.M_rows(l, k), numbers), rows.z_bar(k, q.begin), D_[k]}, panels,
                  s.gram, s.weight, at(bars.U_rows(l, k), entries), at(bars.a[k - 1], below));
      s.add_cross(D_[l], {lanes.M_rows(l, k) + p * numbers * NR, lanes.z_bar(k, p), D_[k]},
                  {at_rows(rows.U_rows(l, k), entries), rows.a(k - 1, q.begin), below}, panels,
                  s.gram, s.weight, at(bars.M_rows(l, k), numbers), at(bars.z_bar[k], D_[k]));
      if (alpha_bar) add(alpha_bar, T(2), nullptr);
    }
  }
  for (int l = o.lowest; l <= L_; ++l) {
    if (l > 1 && s.alpha_bar[l]) {
      each(s.weight, [&](int64_t v) { return two * load(s.alpha_bar[l] + v); });
      weighted_sum(rows.a(l - 1, q.begin), D_[l - 1], s.weight, panels,
                   at(bars.a[l - 1], D_[l - 1]), true);
    }
    if (!s.beta_bar[l]) continue;
    each(s.weight, [&](int64_t v) { return two * load(s.beta_bar[l] + v); });
    weighted_sum(rows.z_bar(l, q.begin), D_[l], s.weight, panels, at(bars.z_bar[l], D_[l]), true);
  }
  return neighbours;
}

// With the samples of all panels of rows.
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
      for (int m = l + 2; m <= L_; ++m)
        zero(bars.U_rows(l, m), D_[l] * D_[m]), zero(bars.M_rows(l, m), D_[l] * D_[m - 1]);
    }
  }
  double neighbours = 0;
  for (int64_t q = 0; q < rows.panels; q += kStripPanels)
    neighbours += pull_pairs(lanes, bars, p, rows, {q, std::min(rows.panels, q + kStripPanels)},
                             accumulate || q > 0, s);
  return neighbours;
}

}  // namespace hvpfast::HVPFAST_ISA
