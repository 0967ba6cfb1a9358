// tr H and diag H: the traces and the diagonals of the cores.
#pragma once
#include "core_build-inl.h"

namespace hvpfast::HVPFAST_ISA {

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
  const std::vector<T*> scratch = per_thread(arena, team_size, core_scratch<T>(D_, L_));
  for (int64_t first = 0; first < panels_; first += chunk) {
    c.first = first;
    c.panels = std::min(chunk, panels_ - first);
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
  const int64_t chunk = core_chunk(core_options(false, false, curvature, {all, all}));
  std::vector<T*> squares(size_t(L_) + 1);  // a_l^2
  for (int l = 1; l <= L_; ++l) squares[l] = arena.template take<T>(size_t(chunk * NR * D_[l - 1]));
  const std::vector<T*> scratch = per_thread(arena, std::max(1, threads), product_scratch(chunk));
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
