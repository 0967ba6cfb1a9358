// Runs every operation of csrc/common/contract.h over small odd shapes, for the sanitizers to
// watch: all activations, losses, both precisions, every instruction set of this processor, one to
// three threads. Arrays have their exact sizes, so that a step beyond one is found. Results are
// also checked to be finite, symmetric (u'Hv = v'Hu) and the same bits for any number of threads.
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

#include "checks.h"
#include "models.h"

using namespace hvpfast;

namespace {

template <class T>
struct Inputs {
  std::vector<T> params, x, targets;
  std::vector<int64_t> labels;
  Problem<T> problem;

  Inputs(const MlpSpec& spec, int64_t N, bool third_order) {
    const ParameterLayout layout(spec);
    const int64_t D0 = spec.D.front(), C = spec.D.back();
    const int64_t x_stride = D0 + N % 3, y_stride = C + N % 2;  // rows with gaps, and without
    params = values<T>(layout.P, 1);
    x = values<T>((N - 1) * x_stride + D0, 1000003);
    targets = values<T>((N - 1) * y_stride + C, 2000003);
    for (int64_t n = 0; n < N; ++n)
      labels.push_back(n % 5 == 4 ? spec.ignore_index : (n * 7 + n / 3) % C);
    const bool classes = spec.loss == Loss::kCrossEntropy;
    problem = {std::make_shared<MlpSpec>(spec),
               LayerPointers<T>(params.data(), layout),
               x.data(),
               x_stride,
               classes ? static_cast<const void*>(labels.data()) : targets.data(),
               classes ? 1 : y_stride,
               N,
               third_order};
  }
};

// <u, H v> = <v, H u> and v'Hv, the rows of tangents and products being (K, P).
template <class T>
void check_products(const std::vector<T>& tangents, const std::vector<T>& products,
                    const std::vector<T>& quadratic, int64_t K, int64_t P) {
  const double tolerance = 200 * double(std::numeric_limits<T>::epsilon()) * std::sqrt(double(P));
  for (int64_t k = 0; k < K; ++k) {
    const T *v = tangents.data() + k * P, *Hv = products.data() + k * P;
    const T *u = tangents.data() + (k + 1) % K * P, *Hu = products.data() + (k + 1) % K * P;
    const double scale = 1e-30 + norm(u, P) * norm(Hv, P) + norm(v, P) * norm(Hu, P);
    check(std::abs(dot(u, Hv, P) - dot(v, Hu, P)) <= tolerance * scale, "H is not symmetric");
    check(std::abs(dot(v, Hv, P) - double(quadratic[size_t(k)])) <= tolerance * scale,
          "quadratic is not v'Hv");
  }
}

template <class T>
void run_tangents(const Linearization<T>& lin, int64_t P, int64_t K, Curvature curvature,
                  bool third_order) {
  const std::vector<T> tangents = values<T>(K * P, 3000017), cotangents = values<T>(K * P, 4000037);
  const auto products = on_any_threads<T>(
      K * P, [&](T* out, int threads) { lin.hvp(tangents.data(), K, curvature, out, threads); });
  const auto quadratic = on_any_threads<T>(
      K, [&](T* out, int threads) { lin.quadratic(tangents.data(), K, curvature, out, threads); });
  check_products(tangents, products, quadratic, K, P);
  if (!third_order) return;
  on_any_threads<T>(P, [&](T* out, int threads) {
    lin.hvp_vjp(tangents.data(), cotangents.data(), K, curvature, out, threads);
  });
  if (K == 0) return;
  const Probes normal{Distribution::kNormal, uint64_t(P), 3};
  const Probes rademacher{Distribution::kRademacher, uint64_t(P), 0};
  for (const Probes* probes : {static_cast<const Probes*>(nullptr), &normal, &rademacher})
    on_any_threads<T>(P + 1, [&](T* out, int threads) {
      const auto penalty =
          lin.penalty(probes ? nullptr : tangents.data(), probes, K, curvature, threads);
      out[P] = T(penalty->value());
      penalty->gradient(0.5, 2.0, out, threads);
      penalty->gradient(0.5, 2.0, out, threads);  // it can be asked again
    });
}

// Exact values and their gradients, over all tensors and over some: tr H is the sum of its
// diagonal, tr H^2 is tr H H, and is not below (tr H)^2 / P.
template <class T>
void run_exact(const Linearization<T>& lin, const MlpSpec& spec, int64_t N, bool third_order) {
  const ParameterLayout layout(spec);
  const size_t L = size_t(spec.L());
  const std::vector<uint8_t> all(L + 1, 1), none(L + 1, 0);
  std::vector<Chosen> choices = {{all, all}, {none, none}};  // one part by turns
  if (num_cases % 3 == 0) choices[1].weight = all;
  if (num_cases % 3 == 1) choices[1].weight[L] = 1;
  if (num_cases % 3 == 2) {
    choices[1].weight[1] = 1;
    choices[1].bias[L] = 1;
  }
  const double P = double(layout.P);
  const double eps = double(std::numeric_limits<T>::epsilon());
  for (Curvature curvature : {Curvature::kHessian, Curvature::kGgn})
    for (const Chosen& chosen : choices) {
      const bool whole = &chosen == &choices[0];
      const auto found = on_any_threads<T>(N + layout.P + 1, [&](T* out, int threads) {
        lin.sample_traces(curvature, chosen, out, threads);
        lin.diagonal(curvature, out + N, threads);
        out[N + layout.P] = T(lin.inner_product(lin, curvature, chosen, threads));
        check(lin.exact_bytes(Exact::kFro2, curvature, chosen, true, threads) > 0,
              "exact values take memory");
      });
      double trace = 0, diagonal = 0, size = 0;
      for (int64_t n = 0; n < N; ++n) trace += double(found[size_t(n)]);
      for (int64_t i = 0; i < layout.P; ++i) {
        diagonal += double(found[size_t(N + i)]);
        size += std::abs(double(found[size_t(N + i)]));
      }
      const double square = double(found.back());
      check(square >= 0, "tr H^2 is not negative");
      check(!whole || std::abs(trace - diagonal) <= 1e4 * eps * (size + 1e-30),
            "tr H is not the sum of diag H");
      check(!whole || square * P >= trace * trace * (1 - 1e4 * eps), "tr H^2 is too small");
      if (!third_order) continue;
      for (Exact kind : {Exact::kTrace, Exact::kFro2})
        on_any_threads<T>(layout.P + 1, [&](T* out, int threads) {
          const auto penalty = lin.exact_penalty(kind, curvature, chosen, threads);
          out[layout.P] = T(penalty->value());
          const double value = kind == Exact::kTrace ? trace : square;
          check(std::abs(penalty->value() - value) <= 1e4 * eps * (std::abs(value) + size),
                "the penalty is not the value");
          penalty->gradient(0.5, 2.0, out, threads);
          penalty->gradient(0.5, 2.0, out, threads);  // it can be asked again
        });
    }
}

template <class T>
void run_problem(const Isa& isa, const MlpSpec& spec, int64_t N, std::initializer_list<int64_t> Ks,
                 bool third_order = true, bool exact = true) {
  context = std::string(isa.name) + (sizeof(T) == 4 ? " float32" : " float64") + " widths";
  for (int64_t d : spec.D) context += " " + std::to_string(d);
  context += ", N=" + std::to_string(N) + ", activation " + std::to_string(int(spec.activation)) +
             ", loss " + std::to_string(int(spec.loss));
  const Inputs<T> inputs(spec, N, third_order);
  const int64_t P = ParameterLayout(spec).P;
  std::unique_ptr<Linearization<T>> lin;
  on_any_threads<T>(P + 1, [&](T* out, int threads) {
    lin = linearize(isa, inputs.problem, threads);
    lin->gradient(out, threads);
    out[P] = T(lin->loss());
  });
  check(lin->num_bytes() > 0, "a linearization keeps something");
  check(lin->normalizer() > 0, "the normalizer must be positive");
  for (int64_t K : Ks)
    for (Curvature curvature : {Curvature::kHessian, Curvature::kGgn})
      run_tangents(*lin, P, K, curvature, third_order);
  if (exact) run_exact(*lin, spec, N, third_order);
  ++num_cases;
}

// The options of case number i: each loss with every other option on and off over the cases.
MlpSpec options(std::vector<int64_t> D, Activation activation, int i) {
  MlpSpec spec;
  spec.D = std::move(D);
  spec.activation = activation;
  spec.loss = i % 2 ? Loss::kMse : Loss::kCrossEntropy;
  spec.mean = i / 2 % 2;
  spec.bias = i / 4 % 2;
  if (spec.loss == Loss::kCrossEntropy) {
    if (i / 8 % 2)
      for (int64_t c = 0; c < spec.D.back(); ++c)
        spec.class_weights.push_back(0.5 + 0.25 * double(c));
    if (i / 16 % 2) spec.label_smoothing = 0.1;
  }
  return spec;
}

// Labels that must be refused, with what was allocated until then given back.
template <class T>
void run_refusals(const Isa& isa) {
  const MlpSpec spec = options({5, 6, 3}, Activation::kTanh, 2);
  for (int64_t label : {int64_t(-1), int64_t(3), spec.ignore_index}) {
    context = std::string(isa.name) + ": labels " + std::to_string(label);
    Inputs<T> inputs(spec, 9, true);
    for (int64_t& y : inputs.labels) y = label;
    bool refused = false;
    try {
      linearize(isa, inputs.problem, 2);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "labels must be refused");
  }
}

template <class T>
void run_type(const Isa& isa) {
  const int64_t panel = 2 * isa.vector_bytes / int64_t(sizeof(T));
  int i = 0;
  for (const std::vector<int64_t>& D : std::vector<std::vector<int64_t>>{
           {1, 1}, {5, 3}, {1, 2, 1}, {7, 9, 3}, {3, 17, 5, 2}, {13, 1, 33, 4}, {3, 2, 2, 2, 2, 3}})
    for (int64_t N : {int64_t(1), panel - 1, panel, panel + 1, 3 * panel + 2})
      for (int activation = 0; activation <= int(Activation::kSoftplus); ++activation, i += 7)
        for (int loss = 0; loss < 2; ++loss)
          run_problem<T>(isa, options(D, Activation(activation), i + loss), N, {1, 2}, i % 3 != 2,
                         (i / 7 + i / 56 + loss) % 4 == 0);
  // Enough work for a team of threads, many tangents, tiles of panels.
  for (Activation activation : {Activation::kRelu, Activation::kGelu}) {
    run_problem<T>(isa, options({33, 31, 29, 11}, activation, 30), 10 * panel + 3, {0, 7});
    run_problem<T>(isa, options({9, 65, 7}, activation, 7), 9 * panel + 1, {0, 7});
  }
  // More samples than one chunk of cores takes; layers of every distance.
  run_problem<T>(isa, options({2, 3, 2}, Activation::kTanh, 4), 66 * panel + 1, {1});
  run_problem<T>(isa, options({2, 3, 1, 2, 2, 3}, Activation::kSilu, 22), 65 * panel, {1});
  // More inputs than samples: the first layer by inner products of the samples.
  for (int64_t N : {int64_t(5), panel, panel + 1, 2 * panel + 3})
    for (int k = 0; k < 6; ++k)
      run_problem<T>(isa, options({160, 110, 5}, k % 3 ? Activation::kRelu : Activation::kSilu, k),
                     N, {1, 3}, true, k == 0 && N == 5);
  run_refusals<T>(isa);
  for (int k = 0; k < 4; ++k)
    run_models<T>(isa, options({5, 4, 3}, k % 2 ? Activation::kTanh : Activation::kRelu, k + 4),
                  panel + 1, k / 2 == 0, k % 2 == 0);
  run_models_refusal<T>(isa, options({5, 4, 3}, Activation::kRelu, 4));
}

// Probes drawn into exact ranges: any beginning and end, equal to the same entries of one long
// draw.
void run_draws(const Isa& isa) {
  context = std::string(isa.name) + ": draws";
  for (Stream stream : {Stream::kRademacher, Stream::kNormal, Stream::kImplicitNormal}) {
    std::vector<float> all(700);
    isa.draw_float(stream, 7, 3, 0, 700, all.data());
    for (int64_t begin : {0, 1, 31, 63, 127, 128, 130, 300})
      for (int64_t count : {0, 1, 3, 33, 127, 129, 259}) {
        std::vector<float> part(static_cast<size_t>(count));
        std::vector<double> wide(static_cast<size_t>(count));
        isa.draw_float(stream, 7, 3, begin, begin + count, part.data());
        isa.draw_double(stream, 7, 3, begin, begin + count, wide.data());
        for (size_t j = 0; j < part.size(); ++j) {
          check(part[j] == all[size_t(begin) + j], "a part differs from the whole");
          check(wide[j] == double(part[j]), "precisions differ");
        }
      }
  }
}

}  // namespace

int main() {
  for (const Isa* isa : available_isas()) {
    run_draws(*isa);
    run_type<float>(*isa);
    run_type<double>(*isa);
    context = std::string(isa->name) + ": peak";
    check(isa->fma_peak_float(1e-3) > 0 && isa->fma_peak_double(1e-3) > 0, "a peak is positive");
  }
  // An input too large to be kept in panels, which every pass packs again; only on the best
  // instruction set.
  run_problem<float>(*available_isas().front(), options({70000, 2, 2}, Activation::kTanh, 4), 241,
                     {1});
  std::printf("sanitize: %d cases clean\n", num_cases);
}
