// tr H and tr H^2 as penalties: chunks of samples, and the memory they take.
#pragma once
#include "core_backward-inl.h"

namespace hvpfast::HVPFAST_ISA {

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
  const int64_t panels = lin.panels_;
  const int64_t chunk = lin.core_chunk(options_);
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
    lanes.first = first;
    lanes.panels = std::min(chunk, panels - first);
    parallel(members, [&](Team& team) { lin.build_cores(team, lanes, scratch.build.data()); });
    for (int64_t begin = 0; bars && begin < panels; begin += chunk) {
      const Cores& other = begin == first ? lanes : rows;
      rows.first = begin;
      rows.panels = std::min(chunk, panels - begin);
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
  double numbers = 0;
  double own = double(core_scratch<T>(D_, L_));
  T* const wanted = reinterpret_cast<T*>(sizeof(T));  // any address but null
  const auto count = [&](int64_t size) {
    numbers += double(size * chunk * NR);
    return wanted;
  };
  Cores c(this, options);
  c.lay_out([&](T*& array, int64_t size) { array = count(size); });
  if (pairs && chunk < panels_) numbers *= 2;
  if (gradient) {
    CoreFlow(c, count);
    if (pairs) CoreBars(c, count);
    own += double(CpuExactPenalty::back_scratch(D_, L_) + product_scratch(kProductPanels));
  }
  if (pairs)
    CoreStrips(options, L_, chunk, [&](size_t size) {
      own += double(size);
      return wanted;
    });
  return size_t((numbers + own * std::max(1, threads)) * sizeof(T));
}

}  // namespace hvpfast::HVPFAST_ISA
