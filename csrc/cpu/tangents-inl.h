// One tangent (V_l, v_l) through the network and back:
//   forward   z_dot_l     = V_l a_{l-1} + W_l a_dot_{l-1} + v_l           a_dot_0 = 0
//             a_dot_l     = s1_l * z_dot_l
//   loss      z_bar_dot_L = (d2 loss / dz2) z_dot_L
//   backward  a_bar_dot_l = W_{l+1}' z_bar_dot_{l+1} + V_{l+1}' z_bar_{l+1}
//             z_bar_dot_l = s1_l * a_bar_dot_l + s2_l * z_dot_l
// The second terms of the backward pass belong to the Hessian only.
#pragma once
#include "linearize-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
Streams<T> CpuLinearization<T>::make_streams(Arena& arena, int64_t K, Range panels,
                                             bool keep_a_bar_dot) const {
  Streams<T> s;
  s.K = K;
  s.first = panels.begin;
  s.panels = panels.size();
  s.D = D_;
  for (auto* array : {&s.z_dot, &s.a_dot, &s.a_bar_dot, &s.z_bar_dot}) array->resize(L_ + 1);
  for (int l = 1; l <= L_; ++l) {
    const auto stream = [&] {
      return arena.template take<T>(size_t(K * s.panels * s.panel_size(l)));
    };
    s.z_bar_dot[l] = stream();
    if (l == L_) {
      s.z_dot[l] = keep_a_bar_dot ? stream() : s.z_bar_dot[l];
      break;
    }
    s.a_dot[l] = stream();
    s.z_dot[l] = smooth() ? stream() : s.a_dot[l];
    s.a_bar_dot[l] = smooth() && keep_a_bar_dot ? stream() : s.z_bar_dot[l];
  }
  return s;
}

// z_dot_1 = V_1 x for some rows of all panels in x, without the bias.
template <class T>
void CpuLinearization<T>::first_layer_dot(const LayerPointers<T>& v, Range rows, const T* x,
                                          int64_t panels, T* z_dot) const {
  const LayerTerm<T> term{v.W[1], D_[0], x, D_[0] * NR};
  multiply_panels<T, false>(&term, 1, D_[0], rows, panels, z_dot, D_[1] * NR);
}

// x: the panels of the input, or null where z_dot_1 already holds V_1 x.
template <class T>
void CpuLinearization<T>::tangent_forward(const LayerPointers<T>& v, Streams<T>& s, int64_t k,
                                          Range panels, const T* x) const {
  const int64_t count = panels.size();
  for (int l = 1; l <= L_; ++l) {
    T* z_dot = s.at(s.z_dot, l, k, panels.begin);
    if (l == 1) {
      if (x) first_layer_dot(v, {0, D_[1]}, x, count, z_dot);
    } else {
      const int64_t below = D_[l - 1] * NR;
      const LayerTerm<T> terms[] = {
          {v.W[l], D_[l - 1], r_.a[l - 1] + panels.begin * below, below},
          {problem_.params.W[l], D_[l - 1], s.at(s.a_dot, l - 1, k, panels.begin), below}};
      multiply_panels<T, false>(terms, 2, D_[l - 1], {0, D_[l]}, count, z_dot, D_[l] * NR);
    }
    const T* b = v.b[l];
    const bool keep_z_dot = l == L_ || s.z_dot[l] != s.a_dot[l];
    if (l == L_) {
      if (b)
        for_vectors<T>(count, D_[l],
                       [&](int64_t i, int64_t at) { store(z_dot + at, load(z_dot + at) + b[i]); });
      break;
    }
    T* a_dot = s.at(s.a_dot, l, k, panels.begin);
    const T* s1 = r_.s1[l] + panels.begin * D_[l] * NR;
    for_vectors<T>(count, D_[l], [&](int64_t i, int64_t at) {
      const Vec<T> dot = b ? load(z_dot + at) + b[i] : load(z_dot + at);
      if (keep_z_dot) store(z_dot + at, dot);
      store(a_dot + at, load(s1 + at) * dot);
    });
  }
}

template <class T>
void CpuLinearization<T>::loss_hvp(const Streams<T>& s, int64_t k, Range panels) const {
  const int C = int(D_[L_]);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const T* z_dot = s.at(s.z_dot, L_, k, p);
    T* z_bar_dot = s.at(s.z_bar_dot, L_, k, p);
    const T* weight = r_.weight + p * NR;
    for (int v = 0; v < NR; v += W) {
      const Vec<T> w = load(weight + v);
      if (s_.loss == Loss::kCrossEntropy) {
        cross_entropy_d2<Real>(r_.p + p * C * NR + v, w, z_dot + v, C, NR, z_bar_dot + v);
      } else {
        for (int c = 0; c < C; ++c) store(z_bar_dot + c * NR + v, w * load(z_dot + c * NR + v));
      }
    }
  }
}

template <class T>
void CpuLinearization<T>::tangent_backward(const LayerPointers<T>& v, Streams<T>& s, int64_t k,
                                           Range panels, Curvature curvature) const {
  const int num_terms = curvature == Curvature::kHessian ? 2 : 1;
  for (int l = L_ - 1; l >= 1; --l) {
    const int64_t above = D_[l + 1] * NR;
    const int64_t first = panels.begin * D_[l] * NR;
    T* a_bar_dot = s.at(s.a_bar_dot, l, k, panels.begin);
    const LayerTerm<T> terms[] = {
        {problem_.params.W[l + 1], D_[l], s.at(s.z_bar_dot, l + 1, k, panels.begin), above},
        {v.W[l + 1], D_[l], r_.z_bar[l + 1] + panels.begin * above, above}};
    multiply_panels<T, true>(terms, num_terms, D_[l + 1], {0, D_[l]}, panels.size(), a_bar_dot,
                             D_[l] * NR);
    const T* s1 = r_.s1[l] + first;
    const T* s2 = smooth() && curvature == Curvature::kHessian ? r_.s2[l] + first : nullptr;
    const T* z_dot = s.at(s.z_dot, l, k, panels.begin);
    T* z_bar_dot = s.at(s.z_bar_dot, l, k, panels.begin);
    for_vectors<T>(panels.size(), D_[l], [&](int64_t, int64_t at) {
      const Vec<T> bar = load(s1 + at) * load(a_bar_dot + at);
      store(z_bar_dot + at, s2 ? bar + load(s2 + at) * load(z_dot + at) : bar);
    });
  }
}

// body(chunk, range of tangents) for all chunks and all K tangents: one tangent per task, or all of
// them where each chunk of x must be packed first.
template <class T>
template <class Body>
void CpuLinearization<T>::for_each_chunk(Team& team, int64_t num_chunks, int64_t K,
                                         Body&& body) const {
  if (r_.x) {
    team.for_each(num_chunks * K,
                  [&](int64_t task) { body(task / K, Range{task % K, task % K + 1}); });
  } else {
    team.for_each(num_chunks, [&](int64_t i) { body(i, Range{0, K}); });
  }
}

// All K tangents through some panels of s. The first layer of a wide network with few samples is
// split by rows, not by chunks: each row of V is long and must be read only once. first_layer_done:
// z_dot_1 already holds V_1 x + v_1.
template <class T>
void CpuLinearization<T>::tangent_streams(Team& team, const T* tangents, Streams<T>& s,
                                          Range panels, Curvature curvature, T* const* x_scratch,
                                          bool first_layer_done) const {
  constexpr int64_t kWidePanels = 8, kWideWeights = 65536;
  const bool wide =
      r_.x && panels.size() <= kWidePanels && D_[0] * D_[1] >= kWideWeights && !first_layer_done;
  if (wide) {
    const int64_t rows =
        std::max<int64_t>(kRowBlock, D_[1] / (4 * team.size) / kRowBlock * kRowBlock);
    const int64_t blocks = (D_[1] + rows - 1) / rows;
    team.for_each(s.K * blocks, [&](int64_t task) {
      const int64_t k = task / blocks, block = task % blocks;
      const LayerPointers<T> v(tangents + k * layout_.P, layout_);
      first_layer_dot(v, {block * rows, std::min(D_[1], (block + 1) * rows)},
                      pack_x(panels, nullptr), panels.size(), s.at(s.z_dot, 1, k, panels.begin));
    });
  }
  const int64_t chunk = s.K >= team.size ? std::min(kChunkPanels, panels.size())
                                         : chunk_panels(panels.size() * s.K, team.size);
  const int64_t num_chunks = chunks(panels, chunk);
  for_each_chunk(team, num_chunks, s.K, [&](int64_t i, Range ks) {
    const Range own{panels.begin + i * chunk, std::min(panels.end, panels.begin + (i + 1) * chunk)};
    const T* x =
        wide || first_layer_done ? nullptr : pack_x(own, r_.x ? nullptr : x_scratch[team.rank]);
    for (int64_t k = ks.begin; k < ks.end; ++k) {
      LayerPointers<T> v(tangents + k * layout_.P, layout_);
      if (first_layer_done) v.b[1] = nullptr;
      tangent_forward(v, s, k, own, x);
      loss_hvp(s, k, own);
      tangent_backward(v, s, k, own, curvature);
    }
  });
}

// v'Hv of some panels, without the backward pass or Hv:
//   <z_dot_L, D2[z_dot_L]> + sum_{l<L} <s2_l, z_dot_l^2> + 2 sum_{l>=2} <z_bar_l, V_l a_dot_{l-1}>
//   last two: Hessian only
template <class T>
double CpuLinearization<T>::quadratic_chunk(const LayerPointers<T>& v, const Streams<T>& s,
                                            int64_t k, Range panels, Curvature curvature,
                                            T* scratch) const {
  const int64_t count = panels.size();
  const auto dot = [&](int64_t vectors, auto&& term) {
    Vec<T> sum{};
    double total = 0;
    for (int64_t i = 0; i < vectors; ++i) {
      sum += term(i * W);
      if (i % 256 == 255) {
        total += sum_lanes<T>(sum);
        sum = Vec<T>{};
      }
    }
    return total + sum_lanes<T>(sum);
  };
  double result = 0;
  if (curvature == Curvature::kHessian) {
    for (int l = 1; l < L_ && smooth(); ++l) {
      const T* s2 = r_.s2[l] + panels.begin * D_[l] * NR;
      const T* z_dot = s.at(s.z_dot, l, k, panels.begin);
      result += dot(count * D_[l] * 2, [&](int64_t at) {
        const Vec<T> z = load(z_dot + at);
        return load(s2 + at) * z * z;
      });
    }
    for (int l = 2; l <= L_; ++l) {
      const LayerTerm<T> term{v.W[l], D_[l - 1], s.at(s.a_dot, l - 1, k, panels.begin),
                              D_[l - 1] * NR};
      multiply_panels<T, false>(&term, 1, D_[l - 1], {0, D_[l]}, count, scratch, D_[l] * NR);
      const T* z_bar = r_.z_bar[l] + panels.begin * D_[l] * NR;
      result += 2 * dot(count * D_[l] * 2,
                        [&](int64_t at) { return load(z_bar + at) * load(scratch + at); });
    }
  }
  const T* z_dot = s.at(s.z_dot, L_, k, panels.begin);
  std::copy(z_dot, z_dot + count * D_[L_] * NR, scratch);
  loss_hvp(s, k, panels);  // z_bar_dot_L may be z_dot_L
  const T* z_bar_dot = s.at(s.z_bar_dot, L_, k, panels.begin);
  return result + dot(count * D_[L_] * 2,
                      [&](int64_t at) { return load(scratch + at) * load(z_bar_dot + at); });
}

}  // namespace hvpfast::HVPFAST_ISA
