// tr H and tr H^2 as penalties: chunks of samples, and the memory they take.
#pragma once
#include "core_backward-inl.h"

namespace hvpfast::HVPFAST_ISA {

// The gradient of one chunk.
template <class T>
void CpuLinearization<T>::CpuExactPenalty::finish(const Cores& c, const CoreBars* bars,
                                                  const CoreFlow& flow, const Scratch& scratch,
                                                  T g_loss, T g, T* out, int team_size) const {
  parallel(team_size, [&](Team& team) {
    team.for_each(c.panels, [&](int64_t p) {
      T* own = scratch.back[size_t(team.rank)];
      start(c, bars, flow, p, g);
      back_through_cores(c, bars, flow, p, g, own);
      back_through_network(c, flow, p, own, g_loss, own + D_[L_] * D_[L_] * NR);
    });
    products(team, c, flow, 0, out, scratch.product.data());
    products(team, c, flow, 1, out, scratch.product.data());
  });
  for (int distance = 2; options_.pairs && distance <= L_ - options_.lowest; ++distance)
    parallel(team_size,
             [&](Team& team) { products(team, c, flow, distance, out, scratch.product.data()); });
}

template <class T>
void CpuLinearization<T>::CpuExactPenalty::gradient(double g_loss, double g_penalty, T* out,
                                                    int threads) const {
  const CpuLinearization& lin = lin_;
  const int64_t panels = lin.panels_, chunk = lin.core_chunk(options_);
  const int members = team_size(threads);
  Arena arena;
  const Scratch scratch = make_scratch(arena, members);
  const auto make_flow = [&](const Cores& c) {
    return CoreFlow(
        c, [&](int64_t size) { return arena.template take<T>(size_t(size * chunk * NR)); });
  };
  if (bars_) {
    finish(*cores_, bars_.get(), make_flow(*cores_), scratch, T(g_loss), T(g_penalty), out,
           members);
    return;
  }
  Cores lanes = lin.make_cores(arena, options_, chunk);
  Cores rows = options_.pairs ? lin.make_cores(arena, options_, chunk) : lanes;
  std::unique_ptr<CoreBars> bars;
  if (options_.pairs) bars = std::make_unique<CoreBars>(make_bars(arena, lanes));
  const CoreFlow flow = make_flow(lanes);
  for (int64_t first = 0; first < panels; first += chunk) {
    lanes.first = first, lanes.panels = std::min(chunk, panels - first);
    parallel(members, [&](Team& team) { lin.build_cores(team, lanes, scratch.build.data()); });
    for (int64_t begin = 0; bars && begin < panels; begin += chunk) {
      const Cores& other = begin == first ? lanes : rows;
      rows.first = begin, rows.panels = std::min(chunk, panels - begin);
      parallel(members, [&](Team& team) {
        if (begin != first) lin.build_cores(team, rows, scratch.build.data());
        team.for_each(lanes.panels, [&](int64_t p) {
          pull(lanes, *bars, p, other, begin > 0, scratch.strips[size_t(team.rank)]);
        });
      });
    }
    finish(lanes, bars.get(), flow, scratch, T(g_loss), T(g_penalty), out, members);
  }
}

template <class T>
std::unique_ptr<Penalty<T>> CpuLinearization<T>::exact_penalty(Exact kind, Curvature curvature,
                                                               const Chosen& chosen,
                                                               int threads) const {
  return std::make_unique<CpuExactPenalty>(*this, kind, curvature, chosen, threads);
}

template <class T>
size_t CpuLinearization<T>::exact_bytes(Exact kind, Curvature curvature, const Chosen& chosen,
                                        bool gradient, int threads) const {
  const bool pairs = kind == Exact::kFro2;
  const CoreOptions options = core_options(pairs, gradient, curvature, chosen);
  const int64_t chunk = core_chunk(options);
  double numbers = 0, own = double(core_scratch<T>(D_, L_));
  T* const wanted = reinterpret_cast<T*>(sizeof(T));  // any address but null
  const auto count = [&](int64_t size) { return numbers += double(size * chunk * NR), wanted; };
  Cores c(this, options);
  c.lay_out([&](T*& array, int64_t size) { array = count(size); });
  if (pairs && chunk < panels_) numbers *= 2;
  if (gradient) {
    CoreFlow(c, count);
    if (pairs) CoreBars(c, count);
    own += double(CpuExactPenalty::back_scratch(D_, L_) + product_scratch(kProductPanels));
  }
  if (pairs)
    CoreStrips(options, L_, chunk, [&](size_t size) { return own += double(size), wanted; });
  return size_t((numbers + own * std::max(1, threads)) * sizeof(T));
}

}  // namespace hvpfast::HVPFAST_ISA
