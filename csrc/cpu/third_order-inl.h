// d/dparams sum_k <u_k, H v_k>, with tangents v_k and cotangents u_k held fixed: third order,
// collapsed over k. z_v and z_u are the streams of the two tangents and z_uv the mixed one. The
// mixed stream is linear, so it is summed over k as it is formed and meets every W once:
//   forward   z_uv_l     = W_l a_uv_{l-1} + sum_k (U_l a_v_{l-1} + V_l a_u_{l-1})       z_uv_1 = 0
//             a_uv_l     = s1 * z_uv_l + sum_k act'' * z_v_l * z_u_l
//   loss      z_bar_uv_L = D2[z_uv_L] + sum_k D3[z_v_L, z_u_L]
//   backward  a_bar_uv_l = W_{l+1}' z_bar_uv_{l+1}
//                          + sum_k (V_{l+1}' z_bar_u_{l+1} + U_{l+1}' z_bar_v_{l+1})
//             z_bar_uv_l = s1 * a_bar_uv_l + sum_k act'' * (a_bar_u * z_v + a_bar_v * z_u)
//                          + s2 * z_uv + sum_k act''' * a_bar * z_v * z_u
//   product   out_W_l    = z_bar_uv_l a_{l-1}' + z_bar_l a_uv_{l-1}'
//                          + sum_k (z_bar_u_l a_v_{l-1}' + z_bar_v_l a_u_{l-1}')
//             out_b_l    = sum over samples of z_bar_uv_l
// Hessian only: the forward pass, D2[z_uv_L], the second line of z_bar_uv_l, z_bar_l a_uv_{l-1}'.
// Adding g z_bar_L to z_bar_uv_L adds g dL/dparams to the result: the recursion is linear.
#pragma once
#include "products-inl.h"

namespace hvpfast::HVPFAST_ISA {

// The mixed stream and act'', act''' of the panels [first, first + panels).
template <class T>
struct CpuLinearization<T>::Mixed {
  int64_t first, panels;
  std::vector<T*> z, a, z_bar;  // z_uv, a_uv, z_bar_uv
  std::vector<T*> d2, d3;       // act''(z), act'''(z) a_bar; smooth activations only
};

// act''(z) and act'''(z) a_bar of one layer.
template <Activation act, class T>
void second_and_third(const T* z, const T* a_bar, int64_t panels, int64_t D, T* d2, T* d3) {
  for_vectors<T>(panels, D, [&](int64_t, int64_t at) {
    const Jet<Vec<T>> jet = ActivationRow<act, VectorReal<T>>::at(load(z + at));
    store(d2 + at, jet.d2);
    store(d3 + at, jet.d3 * load(a_bar + at));
  });
}

template <class T>
void CpuLinearization<T>::mixed_chunk(const T* tangents, const T* cotangents, const Streams<T>& v,
                                      const Streams<T>& u, Mixed& mixed, Range panels, T g_loss,
                                      Curvature curvature) const {
  const bool hessian = curvature == Curvature::kHessian;
  const int64_t count = panels.size();
  const int64_t first = panels.begin;
  const int64_t K = v.K;
  const auto own = [&](const std::vector<T*>& array, int l) {
    return array[l] + (first - mixed.first) * D_[l] * NR;
  };
  const auto residual = [&](const std::vector<T*>& array, int l) {
    return array[l] + first * D_[l] * NR;
  };
  const auto weight = [&](const T* flat, int64_t k, int l) {
    return flat + k * layout_.P + layout_.weight[l];
  };
  std::vector<LayerTerm<T>> terms;

  if (smooth())
    for (int l = 1; l < L_; ++l)
      with_activation(s_.activation, [&](auto act) {
        second_and_third<act.value>(residual(r_.z, l), residual(r_.a_bar, l), count, D_[l],
                                    own(mixed.d2, l), own(mixed.d3, l));
      });
  for (int l = 1; hessian && l <= L_; ++l) {
    T* z = own(mixed.z, l);
    if (l > 1) {
      const int64_t below = D_[l - 1] * NR;
      terms.clear();
      if (l > 2 || smooth())
        terms.push_back({problem_.params.W[l], D_[l - 1], own(mixed.a, l - 1), below});
      for (int64_t k = 0; k < K; ++k) {
        terms.push_back(
            {weight(cotangents, k, l), D_[l - 1], v.at(v.a_dot, l - 1, k, first), below});
        terms.push_back({weight(tangents, k, l), D_[l - 1], u.at(u.a_dot, l - 1, k, first), below});
      }
      multiply_panels<T, false>(terms.data(), int(terms.size()), D_[l - 1], {0, D_[l]}, count, z,
                                D_[l] * NR);
    } else {
      std::fill(z, z + count * D_[l] * NR, T(0));
    }
    if (l == L_ || (l == 1 && !smooth())) continue;
    T* a = own(mixed.a, l);
    const T* s1 = residual(r_.s1, l);
    if (!smooth()) {
      for_vectors<T>(count, D_[l],
                     [&](int64_t, int64_t at) { store(a + at, load(s1 + at) * load(z + at)); });
      continue;
    }
    const T* d2 = own(mixed.d2, l);
    for_vectors<T>(count, D_[l], [&](int64_t, int64_t at) {
      Vec<T> product{};
      for (int64_t k = 0; k < K; ++k)
        product += load(v.at(v.z_dot, l, k, first) + at) * load(u.at(u.z_dot, l, k, first) + at);
      store(a + at, load(s1 + at) * load(z + at) + load(d2 + at) * product);
    });
  }

  const int C = int(D_[L_]);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    T* z_bar = mixed.z_bar[L_] + (p - mixed.first) * C * NR;
    const T* primal = r_.z_bar[L_] + p * C * NR;
    const T* z = hessian ? mixed.z[L_] + (p - mixed.first) * C * NR : nullptr;
    const bool cross_entropy = s_.loss == Loss::kCrossEntropy;
    for (int at = 0; at < NR; at += W) {
      const Vec<T> w = load(r_.weight + p * NR + at);
      const T* probability = cross_entropy ? r_.p + p * C * NR + at : nullptr;
      if (!hessian) {
        for (int c = 0; c < C; ++c) store(z_bar + c * NR + at, Vec<T>{});
      } else if (cross_entropy) {
        cross_entropy_d2<Real>(probability, w, z + at, C, NR, z_bar + at);
      } else {
        for (int c = 0; c < C; ++c) store(z_bar + c * NR + at, w * load(z + c * NR + at));
      }
      for (int64_t k = 0; cross_entropy && k < K; ++k)
        add_cross_entropy_d3<Real>(probability, w, v.at(v.z_dot, L_, k, p) + at,
                                   u.at(u.z_dot, L_, k, p) + at, C, NR, z_bar + at);
      for (int c = 0; c < C; ++c)
        store(z_bar + c * NR + at, load(z_bar + c * NR + at) + g_loss * load(primal + c * NR + at));
    }
  }

  for (int l = L_ - 1; l >= 1; --l) {
    const int64_t above = D_[l + 1] * NR;
    terms.clear();
    terms.push_back({problem_.params.W[l + 1], D_[l], own(mixed.z_bar, l + 1), above});
    for (int64_t k = 0; k < K; ++k) {
      terms.push_back(
          {weight(tangents, k, l + 1), D_[l], u.at(u.z_bar_dot, l + 1, k, first), above});
      terms.push_back(
          {weight(cotangents, k, l + 1), D_[l], v.at(v.z_bar_dot, l + 1, k, first), above});
    }
    T* z_bar = own(mixed.z_bar, l);
    multiply_panels<T, true>(terms.data(), int(terms.size()), D_[l + 1], {0, D_[l]}, count, z_bar,
                             D_[l] * NR);
    const T* s1 = residual(r_.s1, l);
    if (!smooth()) {
      for_vectors<T>(count, D_[l], [&](int64_t, int64_t at) {
        store(z_bar + at, load(s1 + at) * load(z_bar + at));
      });
      continue;
    }
    const T *s2 = residual(r_.s2, l), *d2 = own(mixed.d2, l), *d3 = own(mixed.d3, l);
    const T* z = hessian ? own(mixed.z, l) : nullptr;
    for_vectors<T>(count, D_[l], [&](int64_t, int64_t at) {
      Vec<T> cross{}, product{};
      for (int64_t k = 0; k < K; ++k) {
        const Vec<T> z_v = load(v.at(v.z_dot, l, k, first) + at);
        const Vec<T> z_u = load(u.at(u.z_dot, l, k, first) + at);
        cross += load(u.at(u.a_bar_dot, l, k, first) + at) * z_v +
                 load(v.at(v.a_bar_dot, l, k, first) + at) * z_u;
        product += z_v * z_u;
      }
      Vec<T> sum = load(s1 + at) * load(z_bar + at) + load(d2 + at) * cross;
      if (hessian) sum += load(s2 + at) * load(z + at) + load(d3 + at) * product;
      store(z_bar + at, sum);
    });
  }
}

// out_W_l and out_b_l, summed over some panels.
template <class T>
std::vector<typename CpuLinearization<T>::Product> CpuLinearization<T>::mixed_products(
    const Streams<T>& v, const Streams<T>& u, const Mixed& mixed, Range panels, T* out,
    bool hessian) const {
  const int64_t first = panels.begin;
  const auto residual = [&](const std::vector<T*>& array, int l) {
    return array[l] + first * D_[l] * NR;
  };
  std::vector<Product> products;
  for (int l = 1; l <= L_; ++l) {
    Product product{l, 1, out, panels, first > 0, {}};
    product.factors.push_back({mixed.z_bar[l], 0, l > 1 ? residual(r_.a, l - 1) : nullptr, 0});
    if (hessian && l > 1 && (l > 2 || smooth()))
      product.factors.push_back({residual(r_.z_bar, l), 0, mixed.a[l - 1], 0});
    for (int64_t k = 0; l > 1 && k < v.K; ++k) {
      product.factors.push_back(
          {u.at(u.z_bar_dot, l, k, first), 0, v.at(v.a_dot, l - 1, k, first), 0});
      product.factors.push_back(
          {v.at(v.z_bar_dot, l, k, first), 0, u.at(u.a_dot, l - 1, k, first), 0});
    }
    products.push_back(std::move(product));
  }
  return products;
}

// z_dot_1 of u = scale z_dot_u1 (K, panels, D[1]), for some panels.
template <class T>
void CpuLinearization<T>::scale_first_layer(Team& team, const T* z_dot_u1, T scale, Range panels,
                                            const Streams<T>& u) const {
  const int64_t size = panels.size() * D_[1] * NR;
  team.for_each(u.K, [&](int64_t k) {
    const T* from = z_dot_u1 + (k * panels_ + panels.begin) * D_[1] * NR;
    T* to = u.at(u.z_dot, 1, k, panels.begin);
    for (int64_t at = 0; at < size; at += W) store(to + at, scale * load(from + at));
  });
}

// z_dot_u1: (K, panels, D[1]) in place of the first layer's product with u, scaled by `scale`;
// null: cotangents hold all layers of u.
template <class T>
void CpuLinearization<T>::third_order(const T* tangents, const Streams<T>& v, const T* cotangents,
                                      const T* z_dot_u1, T scale, T g_loss, Curvature curvature,
                                      T* out, int threads) const {
  const bool hessian = curvature == Curvature::kHessian;
  const int64_t K = v.K;
  const int64_t tile = super_tile(K, 4);
  const int team_size = threads_for(double(K) * macs_ * 2, threads);
  Arena arena;
  const std::vector<T*> scratch = per_thread(arena, team_size, product_scratch(tile));
  const std::vector<T*> x_scratch = x_scratch_of(arena, team_size, kChunkPanels);
  Streams<T> u = make_streams(arena, K, {0, tile}, true);
  Mixed mixed;
  for (auto* array : {&mixed.z, &mixed.a, &mixed.z_bar, &mixed.d2, &mixed.d3})
    array->resize(L_ + 1);
  for (int l = 1; l <= L_; ++l) {
    for (auto* array : {&mixed.z, &mixed.a, &mixed.z_bar})
      (*array)[l] = arena.template take<T>(size_t(tile * D_[l] * NR));
    if (smooth())
      for (auto* array : {&mixed.d2, &mixed.d3})
        (*array)[l] = arena.template take<T>(size_t(tile * D_[l] * NR));
  }
  for (int64_t begin = 0; begin < panels_; begin += tile) {
    const Range panels{begin, std::min(panels_, begin + tile)};
    u.first = mixed.first = begin;
    u.panels = mixed.panels = panels.size();
    const std::vector<Product> products = mixed_products(v, u, mixed, panels, out, hessian);
    parallel(team_size, [&](Team& team) {
      if (z_dot_u1) scale_first_layer(team, z_dot_u1, scale, panels, u);
      tangent_streams(team, cotangents, u, panels, curvature, x_scratch.data(),
                      z_dot_u1 != nullptr);
      const int64_t chunk = chunk_panels(panels.size(), team.size);
      team.for_each(chunks(panels, chunk), [&](int64_t i) {
        mixed_chunk(tangents, cotangents, v, u, mixed,
                    {begin + i * chunk, std::min(panels.end, begin + (i + 1) * chunk)}, g_loss,
                    curvature);
      });
      run_products(team, products, scratch.data());
    });
  }
}

template <class T>
void CpuLinearization<T>::hvp_vjp(const T* tangents, const T* cotangents, int64_t K,
                                  Curvature curvature, T* out, int threads) const {
  if (K == 0) {
    std::fill(out, out + layout_.P, T(0));
    return;
  }
  Arena arena;
  const int team_size = threads_for(double(K) * macs_, threads);
  Streams<T> v = make_streams(arena, K, {0, panels_}, true);
  const std::vector<T*> x_scratch = x_scratch_of(arena, team_size, kChunkPanels);
  parallel(team_size, [&](Team& team) {
    tangent_streams(team, tangents, v, {0, panels_}, curvature, x_scratch.data(), false);
  });
  third_order(tangents, v, cotangents, nullptr, T(1), T(0), curvature, out, threads);
}

}  // namespace hvpfast::HVPFAST_ISA
