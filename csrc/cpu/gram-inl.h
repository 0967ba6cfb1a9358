// The samples' inner products Gamma = X X' + 1 1', the ones for the bias. With few samples they
// spare forming the first layer's block of H v (penalty-inl.h).
#pragma once
#include "common/probes.h"
#include "third_order-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
void draw_probe(Stream stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out);

// Whether Gamma is cheaper: one pass over it against two over the first layer's weights. The
// samples must fit in one tile.
template <class T>
bool CpuLinearization<T>::gram_pays() const {
  constexpr int64_t kMostSamples = 256;
  return r_.x && L_ >= 2 && N_ <= kMostSamples && N_ < D_[0] && D_[0] * D_[1] >= 16384;
}

// Gamma in panels (panels, panels * kPanel, kPanel); rows of padding samples are zero.
template <class T>
void CpuLinearization<T>::gram_matrix(Team& team, T* gram) const {
  const int64_t rows = panels_ * NR;
  team.for_each(panels_ * panels_, [&](int64_t task) {
    const int64_t p = task % panels_;
    const Range samples = rows_of_samples(task / panels_);
    const LayerTerm<T> term{problem_.x, problem_.x_stride, r_.x + p * D_[0] * NR, 0};
    T* panel = gram + p * rows * NR;
    multiply_panels<T, false>(&term, 1, D_[0], samples, 1, panel, 0);
    for (int64_t i = samples.begin * NR; s_.bias && i < samples.end * NR; i += W)
      store(panel + i, load(panel + i) + T(1));
    std::fill(panel + samples.end * NR, panel + (task / panels_ + 1) * NR * NR, T(0));
  });
}

// Whether drawing z_dot_1 from N(0, Gamma) is cheaper. Factoring Gamma is serial and in float64:
// one of its multiply-adds costs as much as some eight of those saved.
template <class T>
bool CpuLinearization<T>::implicit_pays(Distribution distribution, int64_t K) const {
  const double N = double(N_), D0 = double(D_[0]), D1 = double(D_[1]);
  return distribution == Distribution::kNormal && gram_pays() &&
         8 * N * N * N / 3 < double(K) * N * D1 * (D0 - N);
}

// F with Gamma = F F', in panels (panels, N, kPanel): factor[p][k][i] = F(p kPanel + i, k) for
// k < rank. Returns the rank. Cholesky with diagonal pivoting stops where the rest is rounding
// error: Gamma is singular when samples repeat or N > rank X + 1.
template <class T>
int64_t CpuLinearization<T>::gram_factor(const T* gram, T* factor) const {
  const int64_t N = N_;
  const int64_t rows = panels_ * NR;
  std::vector<double> rest(size_t(N * N));  // the Schur complement
  std::vector<double> row(size_t(N), 0.0);  // of F'
  double largest = 0;
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t j = 0; j < N; ++j)
      rest[size_t(i * N + j)] = double(gram[(j / NR * rows + i) * NR + j % NR]);
    largest = std::max(largest, rest[size_t(i * N + i)]);
  }
  const double tolerance = double(std::numeric_limits<T>::epsilon()) * double(N) * largest;
  std::vector<bool> done(size_t(N), false);
  for (int64_t k = 0; k < N; ++k) {
    int64_t pivot = -1;
    for (int64_t i = 0; i < N; ++i)
      if (!done[size_t(i)] &&
          (pivot < 0 || rest[size_t(i * N + i)] > rest[size_t(pivot * N + pivot)]))
        pivot = i;
    if (rest[size_t(pivot * N + pivot)] <= tolerance) return k;
    const double scale = 1 / std::sqrt(rest[size_t(pivot * N + pivot)]);
    for (int64_t i = 0; i < N; ++i)
      row[size_t(i)] = done[size_t(i)] ? 0.0 : scale * rest[size_t(pivot * N + i)];
    done[size_t(pivot)] = true;
    for (int64_t i = 0; i < N; ++i) {
      if (done[size_t(i)]) continue;
      const double f = row[size_t(i)];
      for (int64_t j = 0; j < N; ++j) rest[size_t(i * N + j)] -= f * row[size_t(j)];
    }
    for (int64_t i = 0; i < rows; ++i)
      factor[(i / NR * N + k) * NR + i % NR] = i < N ? T(row[size_t(i)]) : T(0);
  }
  return N;
}

}  // namespace hvpfast::HVPFAST_ISA
