// The CPU engine's Python module: names to enumerations, addresses to pointers, GIL, errors.
// Shapes, dtypes, devices and strides were checked by hvpfast/functional/linearize.py; addresses
// are those of live, contiguous arrays.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "common/names.h"
#include "isa.h"
#include "models.h"
#include "parallel.h"

namespace py = pybind11;
using namespace hvpfast;

namespace {

Stream stream_named(const std::string& distribution) {
  return distribution_named(distribution) == Distribution::kRademacher ? Stream::kRademacher
                                                                       : Stream::kNormal;
}

const Isa& isa_named(const std::string& name) {
  if (name.empty()) return *available_isas().front();
  std::vector<std::pair<const char*, const Isa*>> table;
  for (const Isa* isa : available_isas()) table.emplace_back(isa->name, isa);
  return *named<const Isa*>("isa", name, table);
}

// One flag per layer: of W_l and of b_l, l = 1..L.
Chosen chosen_of(const std::vector<bool>& weights, const std::vector<bool>& biases) {
  Chosen chosen{{0}, {0}};
  chosen.weight.insert(chosen.weight.end(), weights.begin(), weights.end());
  chosen.bias.insert(chosen.bias.end(), biases.begin(), biases.end());
  return chosen;
}

// One network description, reused by every call with it.
struct Plan {
  std::shared_ptr<const MlpSpec> spec;
  ParameterLayout layout;
  const Isa* isa;

  Plan(std::vector<int64_t> sizes, const std::string& activation, const std::string& loss,
       bool mean, bool bias, std::vector<double> class_weights, int64_t ignore_index,
       double label_smoothing, const std::string& isa_name)
      : spec(make_spec(std::move(sizes), activation, loss, mean, bias, std::move(class_weights),
                       ignore_index, label_smoothing)),
        isa(&isa_named(isa_name)) {
    layout = ParameterLayout(*spec);
  }

  template <class T>
  std::unique_ptr<Linearization<T>> linearize(const LayerPointers<T>& params, uintptr_t x,
                                              int64_t x_stride, uintptr_t y, int64_t y_stride,
                                              int64_t N, bool third_order, int threads) const {
    if (N < 1) throw std::invalid_argument("x must have at least one sample");
    py::gil_scoped_release release;
    const Problem<T> problem{
        spec,     params, pointer<const T>(x), x_stride, pointer<const void>(y),
        y_stride, N,      third_order};
    if constexpr (std::is_same_v<T, float>) {
      return isa->linearize_float(problem, threads);
    } else {
      return isa->linearize_double(problem, threads);
    }
  }

  // params: the address of W_1, b_1, W_2, ... one after the other.
  template <class T>
  std::unique_ptr<Linearization<T>> linearize_flat(uintptr_t params, uintptr_t x, int64_t x_stride,
                                                   uintptr_t y, int64_t y_stride, int64_t N,
                                                   bool third_order, int threads) const {
    return linearize(LayerPointers<T>(pointer<const T>(params), layout), x, x_stride, y, y_stride,
                     N, third_order, threads);
  }

  // params: one address per tensor.
  template <class T>
  std::unique_ptr<Linearization<T>> linearize_layers(const std::vector<uintptr_t>& params,
                                                     uintptr_t x, int64_t x_stride, uintptr_t y,
                                                     int64_t y_stride, int64_t N, bool third_order,
                                                     int threads) const {
    return linearize(layer_pointers<T>(*spec, params), x, x_stride, y, y_stride, N, third_order,
                     threads);
  }

  // params (M, P); x (M, N, D[0]) and y with their M models one after the other, or shared.
  template <class T>
  std::unique_ptr<ModelsLinearization<T>> linearize_models(int64_t M, uintptr_t params, uintptr_t x,
                                                           bool x_shared, uintptr_t y,
                                                           bool y_shared, int64_t N,
                                                           bool third_order, int threads) const {
    if (M < 1 || N < 1) throw std::invalid_argument("at least one model and one sample expected");
    py::gil_scoped_release release;
    return std::make_unique<ModelsLinearization<T>>(
        *isa,
        ModelsProblem<T>{spec, M, pointer<const T>(params), pointer<const T>(x), x_shared,
                         pointer<const void>(y), y_shared, N, third_order},
        threads);
  }
};

// What one model and many have alike: only the sizes of the arrays differ.
template <class T, class Lin>
void bind_products(py::class_<Lin>& bound) {
  using Release = py::call_guard<py::gil_scoped_release>;
  bound.def_property_readonly("num_bytes", &Lin::num_bytes)
      .def(
          "gradient",
          [](const Lin& lin, uintptr_t out, int threads) {
            lin.gradient(pointer<T>(out), threads);
          },
          Release())
      .def(
          "hvp",
          [](const Lin& lin, uintptr_t tangents, int64_t K, bool ggn, uintptr_t out, int threads) {
            lin.hvp(pointer<const T>(tangents), K, curvature_of(ggn), pointer<T>(out), threads);
          },
          Release())
      .def(
          "quadratic",
          [](const Lin& lin, uintptr_t tangents, int64_t K, bool ggn, uintptr_t out, int threads) {
            lin.quadratic(pointer<const T>(tangents), K, curvature_of(ggn), pointer<T>(out),
                          threads);
          },
          Release())
      .def(
          "hvp_vjp",
          [](const Lin& lin, uintptr_t tangents, uintptr_t cotangents, int64_t K, bool ggn,
             uintptr_t out, int threads) {
            lin.hvp_vjp(pointer<const T>(tangents), pointer<const T>(cotangents), K,
                        curvature_of(ggn), pointer<T>(out), threads);
          },
          Release())
      .def(
          "penalty",
          [](const Lin& lin, uintptr_t tangents, int64_t K, bool ggn, int threads) {
            return lin.penalty(pointer<const T>(tangents), nullptr, K, curvature_of(ggn), threads);
          },
          Release(), py::keep_alive<0, 1>())
      .def(
          "penalty_of_probes",
          [](const Lin& lin, const std::string& distribution, uint64_t seed, uint32_t first,
             int64_t K, bool ggn, int threads) {
            const Probes probes{distribution_named(distribution), seed, first};
            py::gil_scoped_release release;
            return lin.penalty(nullptr, &probes, K, curvature_of(ggn), threads);
          },
          py::keep_alive<0, 1>());
}

template <class T, class AnyPenalty>
void bind_penalty_gradient(py::class_<AnyPenalty>& bound) {
  bound.def(
      "gradient",
      [](const AnyPenalty& penalty, double g_loss, double g_penalty, uintptr_t out, int threads) {
        penalty.gradient(g_loss, g_penalty, pointer<T>(out), threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class T>
void bind_linearization(py::module_& m, const char* name, const char* penalty_name) {
  using Lin = Linearization<T>;
  using Flags = std::vector<bool>;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Lin> linearization(m, name);
  bind_products<T>(linearization);
  linearization.def_property_readonly("loss", &Lin::loss)
      .def_property_readonly("normalizer", &Lin::normalizer)
      .def("sample_traces",
           [](const Lin& lin, bool ggn, const Flags& weights, const Flags& biases, uintptr_t out,
              int threads) {
             const Chosen chosen = chosen_of(weights, biases);
             py::gil_scoped_release release;
             lin.sample_traces(curvature_of(ggn), chosen, pointer<T>(out), threads);
           })
      .def(
          "diagonal",
          [](const Lin& lin, bool ggn, uintptr_t out, int threads) {
            lin.diagonal(curvature_of(ggn), pointer<T>(out), threads);
          },
          Release())
      .def("inner_product",
           [](const Lin& lin, const Lin& other, bool ggn, const Flags& weights, const Flags& biases,
              int threads) {
             const Chosen chosen = chosen_of(weights, biases);
             py::gil_scoped_release release;
             return lin.inner_product(other, curvature_of(ggn), chosen, threads);
           })
      .def(
          "exact_penalty",
          [](const Lin& lin, const std::string& kind, bool ggn, const Flags& weights,
             const Flags& biases, int threads) {
            const Exact exact = exact_named(kind);
            const Chosen chosen = chosen_of(weights, biases);
            py::gil_scoped_release release;
            return lin.exact_penalty(exact, curvature_of(ggn), chosen, threads);
          },
          py::keep_alive<0, 1>())
      .def("exact_bytes",
           [](const Lin& lin, const std::string& kind, bool ggn, const Flags& weights,
              const Flags& biases, bool gradient, int threads) {
             return lin.exact_bytes(exact_named(kind), curvature_of(ggn),
                                    chosen_of(weights, biases), gradient, threads);
           });
  py::class_<Penalty<T>> penalty(m, penalty_name);
  bind_penalty_gradient<T>(penalty);
  penalty.def_property_readonly("value", &Penalty<T>::value);
}

template <class T>
void bind_models(py::module_& m, const char* name, const char* penalty_name) {
  using Models = ModelsLinearization<T>;
  py::class_<Models> models(m, name);
  bind_products<T>(models);
  models.def("losses", [](const Models& all, uintptr_t out) { all.losses(pointer<T>(out)); })
      .def("normalizers",
           [](const Models& all, uintptr_t out) { all.normalizers(pointer<double>(out)); });
  py::class_<ModelsPenalty<T>> penalty(m, penalty_name);
  bind_penalty_gradient<T>(penalty);
  penalty.def("values",
              [](const ModelsPenalty<T>& all, uintptr_t out) { all.values(pointer<T>(out)); });
}

// Entries [begin, end) of probes, as rows (groups, count, end - begin): `count` of them from probe
// + g stride on for group g.
void draw(const std::string& distribution, uint64_t seed, uint32_t probe, uint32_t stride,
          int64_t groups, int64_t count, int64_t begin, int64_t end, uintptr_t out,
          bool double_precision, int threads) {
  constexpr int64_t kBlock = 1 << 14;  // entries drawn by one task: some 10 microseconds
  const Stream stream = stream_named(distribution);
  const Isa& isa = *available_isas().front();
  const int64_t rows = groups * count;
  const int64_t width = end - begin;
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  const int team_size = int(std::min<int64_t>(threads, rows * width / kBlock));
  py::gil_scoped_release release;
  parallel(std::max(1, team_size), [&](Team& team) {
    team.for_each(rows * blocks, [&](int64_t task) {
      const int64_t row = task / blocks;
      const int64_t first = begin + task % blocks * kBlock;
      const int64_t last = std::min(end, first + kBlock);
      const int64_t offset = row * width + first - begin;
      const uint32_t k = probe + uint32_t(row / count) * stride + uint32_t(row % count);
      if (double_precision) {
        isa.draw_double(stream, seed, k, first, last, pointer<double>(out) + offset);
      } else {
        isa.draw_float(stream, seed, k, first, last, pointer<float>(out) + offset);
      }
    });
  });
}

double fma_peak(double seconds, int threads, const std::string& dtype) {
  const bool single = named<bool>("dtype", dtype, {{"float32", true}, {"float64", false}});
  const Isa& isa = *available_isas().front();
  std::vector<double> rate(size_t(std::max(1, threads)), 0.0);
  py::gil_scoped_release release;
  parallel(threads, [&](Team& team) {
    rate[size_t(team.rank)] = single ? isa.fma_peak_float(seconds) : isa.fma_peak_double(seconds);
  });
  double total = 0;
  for (double r : rate) total += r;
  return total / 1e9;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["matrix_kernels"] = "own micro-kernels (no BLAS)";
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU engine of hvpfast: addresses in, addresses out. Use the hvpfast package instead.";
  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<int64_t>, const std::string&, const std::string&, bool, bool,
                    std::vector<double>, int64_t, double, const std::string&>(),
           py::arg("sizes"), py::arg("activation"), py::arg("loss"), py::arg("mean"),
           py::arg("bias"), py::arg("class_weights"), py::arg("ignore_index"),
           py::arg("label_smoothing"), py::arg("isa"))
      .def_property_readonly("isa", [](const Plan& plan) { return plan.isa->name; })
      .def("linearize_flat_float32", &Plan::linearize_flat<float>)
      .def("linearize_flat_float64", &Plan::linearize_flat<double>)
      .def("linearize_layers_float32", &Plan::linearize_layers<float>)
      .def("linearize_layers_float64", &Plan::linearize_layers<double>)
      .def("linearize_models_float32", &Plan::linearize_models<float>)
      .def("linearize_models_float64", &Plan::linearize_models<double>);
  bind_linearization<float>(m, "LinearizationFloat32", "PenaltyFloat32");
  bind_linearization<double>(m, "LinearizationFloat64", "PenaltyFloat64");
  bind_models<float>(m, "ModelsFloat32", "ModelsPenaltyFloat32");
  bind_models<double>(m, "ModelsFloat64", "ModelsPenaltyFloat64");
  m.def("draw", &draw, py::arg("distribution"), py::arg("seed"), py::arg("probe"),
        py::arg("stride"), py::arg("groups"), py::arg("count"), py::arg("begin"), py::arg("end"),
        py::arg("out"), py::arg("double_precision"), py::arg("threads"),
        "Writes entries [begin, end) of groups of probes, row by row.");
  m.def("fma_peak", &fma_peak, py::arg("seconds"), py::arg("threads"), py::arg("dtype"),
        "GFLOP/s of fused multiply-adds.");
  m.def("isa", [] { return available_isas().front()->name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa* isa : available_isas()) names.emplace_back(isa->name);
    return names;
  });
  m.def("build_info", &build_info);
}
