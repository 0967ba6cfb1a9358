// The primal passes, once per point:
//   z_l = W_l a_{l-1} + b_l,  a_l = act(z_l)                      l = 1..L, a_0 = x
//   z_bar_L = dloss/dz_L
//   a_bar_l = W_{l+1}' z_bar_{l+1},  z_bar_l = s1_l * a_bar_l     l = L-1..1
// and the residuals s1 = act'(z), s2 = act''(z) * a_bar. Samples are independent: each chunk of
// panels walks through all layers.
#pragma once
#include <stdexcept>
#include <string>

#include "common/losses.h"
#include "linearization-inl.h"
#include "pack-inl.h"

namespace hvpfast::HVPFAST_ISA {

// body(row, offset of its vector) for both vectors of every row of `panels` panels with D rows.
template <class T, class Body>
HVP_INLINE void for_vectors(int64_t panels, int64_t D, Body&& body) {
  int64_t offset = 0;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t i = 0; i < D; ++i, offset += kPanel<T>) {
      body(i, offset);
      body(i, offset + kLanes<T>);
    }
}

template <class T>
CpuLinearization<T>::CpuLinearization(const Problem<T>& problem, int threads)
    : problem_(problem),
      spec_(problem.spec),
      s_(*problem.spec),
      layout_(s_),
      L_(s_.L()),
      D_(s_.D.data()),
      N_(problem.N),
      panels_((problem.N + NR - 1) / NR) {
  constexpr size_t kMostKeptInput = size_t(64) << 20;
  const auto residual = [&](int l) {
    return arena_.template take<T>(size_t(panels_ * NR * D_[l]));
  };
  const bool keep_z = problem.third_order && smooth();
  for (auto* array : {&r_.a, &r_.s1, &r_.s2, &r_.z_bar, &r_.z, &r_.a_bar}) array->resize(L_ + 1);
  const bool keep_x = size_t(panels_ * NR * D_[0]) * sizeof(T) <= kMostKeptInput;
  int64_t rows = 1 + keep_x * D_[0] + (1 + (s_.loss == Loss::kCrossEntropy)) * D_[L_];
  for (int l = 1; l < L_; ++l) rows += (3 + smooth() + 2 * keep_z) * D_[l];
  arena_.expect(size_t(panels_ * NR * rows) * sizeof(T));
  if (keep_x) r_.x = residual(0);
  for (int l = 1; l < L_; ++l) {
    r_.a[l] = residual(l);
    r_.s1[l] = residual(l);
    r_.z_bar[l] = residual(l);
    if (smooth()) r_.s2[l] = residual(l);
    if (keep_z) {
      r_.z[l] = residual(l);
      r_.a_bar[l] = residual(l);
    }
  }
  r_.z_bar[L_] = residual(L_);
  if (s_.loss == Loss::kCrossEntropy) r_.p = residual(L_);
  r_.weight = arena_.template take<T>(size_t(panels_ * NR));
  weigh_targets();
  panel_loss_.resize(panels_);

  for (int l = 1; l <= L_; ++l)
    macs_ += (l == 1 ? 2.0 : 6.0) * double(N_) * double(D_[l]) * double(D_[l - 1]);
  const int team_size = threads_for(macs_ / 2, threads);
  const int64_t chunk = chunk_panels(panels_, team_size);
  Arena scratch;
  const std::vector<T*> x_scratch = x_scratch_of(scratch, team_size, chunk);
  parallel(team_size, [&](Team& team) {
    team.for_each(chunks({0, panels_}, chunk), [&](int64_t i) {
      primal_chunk({i * chunk, std::min(panels_, (i + 1) * chunk)}, x_scratch[team.rank]);
    });
  });
  for (double panel : panel_loss_) loss_ += panel;
}

// Below some ten microseconds of work one thread is faster than waking a second.
template <class T>
int CpuLinearization<T>::threads_for(double macs, int threads) const {
  constexpr double kSerialMacs = 6e5;
  return macs < kSerialMacs ? 1 : std::max(1, threads);
}

template <class T>
int64_t CpuLinearization<T>::chunk_panels(int64_t panels, int threads) const {
  return std::clamp<int64_t>(panels / threads, 1, kChunkPanels);
}

// `size` numbers for each thread of a team.
template <class T>
std::vector<T*> CpuLinearization<T>::per_thread(Arena& arena, int team_size, size_t size) {
  std::vector<T*> arrays(static_cast<size_t>(team_size));
  for (T*& array : arrays) array = arena.template take<T>(size);
  return arrays;
}

// Where each thread packs so many panels of x; null where all panels of x are kept.
template <class T>
std::vector<T*> CpuLinearization<T>::x_scratch_of(Arena& arena, int team_size,
                                                  int64_t panels) const {
  if (r_.x) return std::vector<T*>(static_cast<size_t>(team_size));
  return per_thread(arena, team_size, size_t(panels * NR * D_[0]));
}

// The panels of a_0 = x: those kept, or packed into scratch.
template <class T>
const T* CpuLinearization<T>::pack_x(Range panels, T* scratch) const {
  if (r_.x && !scratch) return r_.x + panels.begin * D_[0] * NR;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const Range samples = rows_of_samples(p);
    panel_from_rows(problem_.x + samples.begin * problem_.x_stride, problem_.x_stride,
                    int(samples.size()), D_[0], scratch + (p - panels.begin) * D_[0] * NR);
  }
  return scratch;
}

// Per-sample weights w and the loss normalizer. Cross-entropy: target mass of sample n
// m_n = (1 - smoothing) c_{y_n} + smoothing / C sum_c c_c with class weights c; the mean divides by
// sum_n c_{y_n} as torch does.
template <class T>
void CpuLinearization<T>::weigh_targets() {
  const int64_t C = D_[L_];
  std::fill(r_.weight, r_.weight + panels_ * NR, T(0));
  if (s_.loss == Loss::kMse) {
    normalizer_ = s_.mean ? double(N_) * double(C) : 1.0;
    std::fill(r_.weight, r_.weight + N_, T(2.0 / normalizer_));
    return;
  }
  const int64_t* y = static_cast<const int64_t*>(problem_.y);
  const bool weighted = !s_.class_weights.empty();
  double total = double(C);
  double counted = 0;
  if (weighted) {
    total = 0;
    for (double c : s_.class_weights) total += c;
  }
  const double smooth_mass = s_.label_smoothing * total / double(C);
  for (int64_t n = 0; n < N_; ++n) {
    if (y[n] == s_.ignore_index) continue;
    if (y[n] < 0 || y[n] >= C)
      throw std::invalid_argument("labels must be in [0, " + std::to_string(C) +
                                  ") or equal ignore_index=" + std::to_string(s_.ignore_index) +
                                  "; got y[" + std::to_string(n) + "] = " + std::to_string(y[n]) +
                                  ". Is the last layer as wide as there are classes?");
    const double c = weighted ? s_.class_weights[size_t(y[n])] : 1.0;
    counted += c;
    r_.weight[n] = T((1.0 - s_.label_smoothing) * c + smooth_mass);
  }
  if (!s_.mean) return;
  if (!(counted > 0))
    throw std::invalid_argument(
        "the mean cross-entropy is undefined: every target is ignore_index or has class weight "
        "zero; drop this batch or "
        "use reduction='sum'");
  normalizer_ = counted;
  for (int64_t n = 0; n < N_; ++n) r_.weight[n] = T(double(r_.weight[n]) / counted);
}

template <class T>
void CpuLinearization<T>::primal_chunk(Range panels, T* x_scratch) {
  const int64_t count = panels.size();
  const T* below = pack_x(panels, r_.x ? r_.x + panels.begin * D_[0] * NR : x_scratch);
  const auto& params = problem_.params;
  for (int l = 1; l <= L_; ++l) {
    T* z = (l < L_ ? r_.a[l] : r_.z_bar[L_]) + panels.begin * D_[l] * NR;
    const LayerTerm<T> term{params.W[l], D_[l - 1], below, D_[l - 1] * NR};
    multiply_panels<T, false>(&term, 1, D_[l - 1], {0, D_[l]}, count, z, D_[l] * NR);
    if (l < L_) {
      with_activation(s_.activation, [&](auto act) { activate<act.value>(l, panels); });
    }
    below = z;
  }
  loss_gradient(panels);
  for (int l = L_ - 1; l >= 1; --l) {
    const int64_t first = panels.begin * D_[l] * NR;
    T* z_bar = r_.z_bar[l] + first;
    const LayerTerm<T> term{params.W[l + 1], D_[l], r_.z_bar[l + 1] + panels.begin * D_[l + 1] * NR,
                            D_[l + 1] * NR};
    multiply_panels<T, true>(&term, 1, D_[l + 1], {0, D_[l]}, count, z_bar, D_[l] * NR);
    const T* s1 = r_.s1[l] + first;
    T* s2 = smooth() ? r_.s2[l] + first : nullptr;
    T* a_bar = r_.a_bar[l] ? r_.a_bar[l] + first : nullptr;
    for_vectors<T>(count, D_[l], [&](int64_t, int64_t at) {
      const Vec<T> bar = load(z_bar + at);
      if (a_bar) store(a_bar + at, bar);
      if (s2) store(s2 + at, load(s2 + at) * bar);
      store(z_bar + at, load(s1 + at) * bar);
    });
  }
}

// In place of W a: a = act(z), s1 = act'(z), and act''(z) in s2 until a_bar is known.
template <class T>
template <Activation act>
void CpuLinearization<T>::activate(int l, Range panels) {
  const int64_t first = panels.begin * D_[l] * NR;
  T* a = r_.a[l] + first;
  T* s1 = r_.s1[l] + first;
  T* s2 = smooth() ? r_.s2[l] + first : nullptr;
  T* z = r_.z[l] ? r_.z[l] + first : nullptr;
  const T* b = problem_.params.b[l];
  for_vectors<T>(panels.size(), D_[l], [&](int64_t i, int64_t at) {
    const Vec<T> zi = b ? load(a + at) + b[i] : load(a + at);
    const Jet<Vec<T>> jet = ActivationRow<act, Real>::at(zi);
    store(a + at, jet.value);
    store(s1 + at, jet.d1);
    if constexpr (!piecewise_linear(act)) {
      store(s2 + at, jet.d2);
      if (z) store(z + at, zi);
    }
  });
}

// z_bar_L = dloss/dz_L in place of W a, and the loss of each panel.
template <class T>
void CpuLinearization<T>::loss_gradient(Range panels) {
  const int C = int(D_[L_]);
  const T* b = problem_.params.b[L_];
  const double inverse = 1.0 / normalizer_;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    T* z = r_.z_bar[L_] + p * C * NR;
    const T* weight = r_.weight + p * NR;
    const Range samples = rows_of_samples(p);
    if (b) for_vectors<T>(1, C, [&](int64_t i, int64_t at) { store(z + at, load(z + at) + b[i]); });
    double loss = 0;
    if (s_.loss == Loss::kMse) {
      const T* y = static_cast<const T*>(problem_.y);
      for (int64_t n = samples.begin; n < samples.end; ++n)
        for (int c = 0; c < C; ++c) {
          T& error = z[c * NR + n - samples.begin];
          error -= y[n * problem_.y_stride + c];
          loss += double(error) * double(error);
        }
      loss *= inverse;
      for_vectors<T>(
          1, C, [&](int64_t, int64_t at) { store(z + at, load(z + at) * load(weight + at % NR)); });
    } else {
      T* probability = r_.p + p * C * NR;
      alignas(64) T log_sum[NR];
      for (int v = 0; v < NR; v += W)
        store(log_sum + v, softmax<Real>(z + v, C, NR, probability + v));
      const int64_t* y = static_cast<const int64_t*>(problem_.y);
      const double share = s_.label_smoothing / C;
      const bool weighted = !s_.class_weights.empty();
      const auto minus_log_p = [&](int64_t c, int64_t i) {
        return double(log_sum[i]) - double(z[c * NR + i]);
      };
      for (int64_t n = samples.begin; n < samples.end; ++n) {  // loss_n = -<q, log p>
        if (y[n] == s_.ignore_index) continue;
        const int64_t i = n - samples.begin;
        const double q =
            (1.0 - s_.label_smoothing) * (weighted ? s_.class_weights[size_t(y[n])] : 1.0);
        double sample = q * minus_log_p(y[n], i);
        for (int c = 0; share > 0 && c < C; ++c)
          sample += share * (weighted ? s_.class_weights[size_t(c)] : 1.0) * minus_log_p(c, i);
        loss += sample * inverse;
      }
      for_vectors<T>(1, C, [&](int64_t, int64_t at) {
        store(z + at, load(weight + at % NR) * load(probability + at));
      });
      for (int64_t n = samples.begin; n < samples.end; ++n) {  // z_bar = w p - q / normalizer
        if (y[n] == s_.ignore_index) continue;
        const int64_t i = n - samples.begin;
        if (share > 0)
          for (int c = 0; c < C; ++c)
            z[c * NR + i] -= T(share * (weighted ? s_.class_weights[size_t(c)] : 1.0) * inverse);
        z[y[n] * NR + i] -= T((1.0 - s_.label_smoothing) *
                              (weighted ? s_.class_weights[size_t(y[n])] : 1.0) * inverse);
      }
    }
    panel_loss_[p] = loss;
  }
}

}  // namespace hvpfast::HVPFAST_ISA
