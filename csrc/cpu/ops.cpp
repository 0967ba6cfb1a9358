// The contract of common/contract.h on the CPU, compiled once per instruction set.
#include "exact/core_penalty-inl.h"
#include "isa.h"
#include "peak-inl.h"
#include "penalty-inl.h"

namespace hvpfast::HVPFAST_ISA {

// The number of panels, at least kProductPanels, whose streams fit in a share of the last-level
// cache; per layer there are `arrays` arrays of K tangents.
template <class T>
int64_t CpuLinearization<T>::super_tile(int64_t K, int arrays) const {
  constexpr double kStreamBytes = 8e6;
  double per_panel = 0;
  for (int l = 1; l <= L_; ++l)
    per_panel += double(D_[l]) * NR * sizeof(T) * arrays * double(std::max<int64_t>(K, 1));
  const int64_t panels = int64_t(kStreamBytes / per_panel) / kProductPanels * kProductPanels;
  return std::min(panels_, std::max(panels, kProductPanels));
}

template <class T>
void CpuLinearization<T>::gradient(T* out, int threads) const {
  const int team_size = threads_for(macs_, threads);
  Arena arena;
  const std::vector<T*> scratch = per_thread(arena, team_size, product_scratch(panels_));
  std::vector<Product> products;
  for (int l = 1; l <= L_; ++l)
    products.push_back(
        {l, 1, out, {0, panels_}, false, {{r_.z_bar[l], 0, l > 1 ? r_.a[l - 1] : nullptr, 0}}});
  parallel(team_size, [&](Team& team) { run_products(team, products, scratch.data()); });
}

// (H v_k)_l = z_bar_dot_l a_{l-1}' + z_bar_l a_dot_{l-1}' for l >= first_layer
// The second term belongs to the Hessian only.
template <class T>
std::vector<typename CpuLinearization<T>::Product> CpuLinearization<T>::hvp_products(
    const Streams<T>& s, Range panels, T* out, Curvature curvature, int first_layer) const {
  std::vector<Product> products;
  for (int l = first_layer; l <= L_; ++l) {
    const auto residual = [&](const std::vector<T*>& array, int layer) {
      return array[layer] + panels.begin * D_[layer] * NR;
    };
    Product product{l, s.K, out, panels, panels.begin > 0, {}};
    product.factors.push_back({s.at(s.z_bar_dot, l, 0, panels.begin), s.panels * s.panel_size(l),
                               l > 1 ? residual(r_.a, l - 1) : nullptr, 0});
    if (l > 1 && curvature == Curvature::kHessian)
      product.factors.push_back({residual(r_.z_bar, l), 0, s.at(s.a_dot, l - 1, 0, panels.begin),
                                 s.panels * s.panel_size(l - 1)});
    products.push_back(std::move(product));
  }
  return products;
}

template <class T>
void CpuLinearization<T>::hvp(const T* tangents, int64_t K, Curvature curvature, T* out,
                              int threads) const {
  if (K == 0) return;
  Arena arena;
  const int64_t tile = super_tile(K, smooth() ? 3 : 2);
  const int team_size = threads_for(double(K) * macs_, threads);
  const std::vector<T*> scratch = per_thread(arena, team_size, product_scratch(tile));
  const std::vector<T*> x_scratch = x_scratch_of(arena, team_size, kChunkPanels);
  Streams<T> s = make_streams(arena, K, {0, tile}, false);
  for (int64_t first = 0; first < panels_; first += tile) {
    const Range panels{first, std::min(panels_, first + tile)};
    s.first = first;
    s.panels = panels.size();
    const std::vector<Product> products = hvp_products(s, panels, out, curvature, 1);
    parallel(team_size, [&](Team& team) {
      tangent_streams(team, tangents, s, panels, curvature, x_scratch.data(), false);
      run_products(team, products, scratch.data());
    });
  }
}

template <class T>
void CpuLinearization<T>::quadratic(const T* tangents, int64_t K, Curvature curvature, T* out,
                                    int threads) const {
  const int team_size = threads_for(double(K) * macs_ / 2, threads);
  // Partial sums belong to chunks, whose size must not depend on the number of threads.
  const int64_t chunk = panels_ <= 2 * kChunkPanels ? 1 : kChunkPanels;
  const int64_t num_chunks = chunks({0, panels_}, chunk);
  Arena arena;
  const int64_t widest = *std::max_element(D_ + 1, D_ + L_ + 1);
  std::vector<Streams<T>> streams;
  for (int rank = 0; rank < team_size; ++rank)
    streams.push_back(make_streams(arena, 1, {0, chunk}, false));
  const std::vector<T*> scratch = per_thread(arena, team_size, size_t(chunk * NR * widest));
  const std::vector<T*> x_scratch = x_scratch_of(arena, team_size, chunk);
  std::vector<double> partial(size_t(K * num_chunks));
  parallel(team_size, [&](Team& team) {
    Streams<T>& s = streams[size_t(team.rank)];
    for_each_chunk(team, num_chunks, K, [&](int64_t i, Range ks) {
      const Range panels{i * chunk, std::min(panels_, (i + 1) * chunk)};
      s.first = panels.begin;
      s.panels = panels.size();
      const T* x = pack_x(panels, x_scratch[team.rank]);
      for (int64_t k = ks.begin; k < ks.end; ++k) {
        const LayerPointers<T> v(tangents + k * layout_.P, layout_);
        tangent_forward(v, s, 0, panels, x);
        partial[size_t(k * num_chunks + i)] =
            quadratic_chunk(v, s, 0, panels, curvature, scratch[team.rank]);
      }
    });
  });
  for (int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < num_chunks; ++i) sum += partial[size_t(k * num_chunks + i)];
    out[k] = T(sum);
  }
}

namespace {
template <class T>
std::unique_ptr<Linearization<T>> linearize(const Problem<T>& problem, int threads) {
  return std::make_unique<CpuLinearization<T>>(problem, threads);
}
}  // namespace

#define HVPFAST_STRING(name) #name
#define HVPFAST_NAME(name) HVPFAST_STRING(name)
extern const Isa kIsa;
const Isa kIsa = {HVPFAST_NAME(HVPFAST_ISA), kVectorBytes,      linearize<float>,
                  linearize<double>,         draw_probe<float>, draw_probe<double>,
                  fma_peak<float>,           fma_peak<double>};

}  // namespace hvpfast::HVPFAST_ISA
