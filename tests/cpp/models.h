// Many models at once give the bits that each gives alone, whatever the number of threads.
#pragma once
#include "checks.h"
#include "cpu/models.h"

namespace hvpfast {

template <class T>
void losses(const Linearization<T>& lin, T* out) {
  *out = T(lin.loss());
}
template <class T>
void losses(const ModelsLinearization<T>& lin, T* out) {
  lin.losses(out);
}
template <class T>
void penalty_values(const Penalty<T>& penalty, T* out) {
  *out = T(penalty.value());
}
template <class T>
void penalty_values(const ModelsPenalty<T>& penalty, T* out) {
  penalty.values(out);
}

// The results of every operation, one vector each, of one model or of M.
template <class T, class Lin>
std::vector<std::vector<T>> everything(const Lin& lin, int64_t M, int64_t P, const T* tangents,
                                       int64_t K, const Probes& probes, int threads) {
  std::vector<std::vector<T>> results;
  const auto out = [&](int64_t count) {
    results.emplace_back(size_t(M * count), std::numeric_limits<T>::quiet_NaN());
    return results.back().data();
  };
  losses(lin, out(1));
  lin.gradient(out(P), threads);
  for (Curvature curvature : {Curvature::kHessian, Curvature::kGgn}) {
    lin.hvp(tangents, K, curvature, out(K * P), threads);
    lin.quadratic(tangents, K, curvature, out(K), threads);
    lin.hvp_vjp(tangents, tangents, K, curvature, out(P), threads);
    for (const Probes* drawn : {static_cast<const Probes*>(nullptr), &probes}) {
      const auto penalty = lin.penalty(drawn ? nullptr : tangents, drawn, K, curvature, threads);
      penalty_values(*penalty, out(1));
      penalty->gradient(0.5, 2.0, out(P), threads);
    }
  }
  return results;
}

template <class T>
void run_models(const Isa& isa, const MlpSpec& spec, int64_t N, bool x_shared, bool y_shared) {
  constexpr int64_t M = 3, K = 2;
  context = std::string(isa.name) + ": many models";
  const ParameterLayout layout(spec);
  const int64_t P = layout.P, d_in = spec.D.front(), d_out = spec.D.back();
  const int64_t num_x = x_shared ? N : M * N, num_y = y_shared ? N : M * N;
  const std::vector<T> params = values<T>(M * P, 1), tangents = values<T>(M * K * P, 5000011),
                       x = values<T>(num_x * d_in, 6000011),
                       targets = values<T>(num_y * d_out, 7000003);
  std::vector<int64_t> labels;
  for (int64_t n = 0; n < num_y; ++n) labels.push_back((n * 7 + n / 3) % d_out);
  const bool classes = spec.loss == Loss::kCrossEntropy;
  const auto y_from = [&](int64_t n) -> const void* {
    if (classes) return labels.data() + n;
    return targets.data() + n * d_out;
  };
  const auto shared = std::make_shared<MlpSpec>(spec);
  const Probes probes{Distribution::kRademacher, 9, 5};

  std::vector<std::vector<std::vector<T>>> alone;
  for (int64_t m = 0; m < M; ++m) {
    const auto lin = linearize<T>(isa,
                                  {shared, LayerPointers<T>(params.data() + m * P, layout),
                                   x.data() + (x_shared ? 0 : m * N * d_in), d_in,
                                   y_from(y_shared ? 0 : m * N), classes ? 1 : d_out, N, true},
                                  1);
    const Probes own{probes.distribution, probes.seed, uint32_t(probes.first + m * K)};
    alone.push_back(everything<T>(*lin, 1, P, tangents.data() + m * K * P, K, own, 1));
  }
  for (int threads = 1; threads <= 5; threads += 2) {  // enough models for all threads, and not
    const ModelsLinearization<T> lin(
        isa, {shared, M, params.data(), x.data(), x_shared, y_from(0), y_shared, N, true}, threads);
    check(lin.num_bytes() > 0, "a linearization keeps something");
    const auto together = everything<T>(lin, M, P, tangents.data(), K, probes, threads);
    for (int64_t m = 0; m < M; ++m)
      for (size_t i = 0; i < together.size(); ++i) {
        const std::vector<T>& own = alone[size_t(m)][i];
        check(std::isfinite(own[0]), "a result is not finite");
        check(std::memcmp(together[i].data() + size_t(m) * own.size(), own.data(),
                          own.size() * sizeof(T)) == 0,
              "a model among others is not the model alone");
      }
  }
  ++num_cases;
}

// A label out of range in one model's targets: an exception that names it, on any threads.
template <class T>
void run_models_refusal(const Isa& isa, const MlpSpec& spec) {
  constexpr int64_t M = 4, N = 3;
  context = std::string(isa.name) + ": many models, refusal";
  const std::vector<T> params = values<T>(M * ParameterLayout(spec).P, 1),
                       x = values<T>(N * spec.D.front(), 2);
  std::vector<int64_t> labels(size_t(M * N), 0);
  labels[size_t(2 * N + 1)] = labels[size_t(3 * N)] = spec.D.back();
  for (int threads = 1; threads <= 3; ++threads) {
    std::string message;
    try {
      const ModelsLinearization<T> lin(isa,
                                       {std::make_shared<MlpSpec>(spec), M, params.data(), x.data(),
                                        true, labels.data(), false, N, true},
                                       threads);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    check(message.rfind("model 2: ", 0) == 0, "the first model with a wrong label is not named");
  }
  ++num_cases;
}

}  // namespace hvpfast
