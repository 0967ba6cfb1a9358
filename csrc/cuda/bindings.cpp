// The CUDA engine's Python module: addresses, devices and streams as integers, errors as Python's.
// Shapes, dtypes, devices and strides were checked by hvpfast/functional/linearize.py; memory is
// the caller's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "blas.h"
#include "common/names.h"
#include "device.h"
#include "ops.h"

namespace py = pybind11;
using namespace hvpfast;
using namespace hvpfast::cuda;

namespace {

#if defined(HVPFAST_EMULATE)
constexpr bool kEmulated = true;
using Release = py::call_guard<>;  // one emulated device for all threads
#else
constexpr bool kEmulated = false;
using Release = py::call_guard<py::gil_scoped_release>;
#endif

template <class T>
T* aligned(const char* name, uintptr_t address) {
  if (address % alignof(T) != 0)
    throw std::invalid_argument(
        std::string(name) + " starts at an address that is no multiple of " +
        std::to_string(alignof(T)) + " bytes, the size of its numbers; pass a copy: .clone()");
  return pointer<T>(address);
}

// Where a call runs: device, stream and workspace (address, bytes).
struct Where {
  int device;
  uintptr_t stream, workspace;
  size_t bytes;
};

template <class Body>
void run(const Where& where, Workspace* kept, Body&& body) {
  const DeviceGuard guard(where.device);
  const cudaStream_t stream = pointer<std::remove_pointer_t<cudaStream_t>>(where.stream);
  check_stream(stream, where.device);
  Workspace workspace(pointer<void>(where.workspace), where.bytes);
  Call call{device_of(where.device), stream, workspace, kept, Blas::of(where.device)};
  body(call);
}

// A network at M points, on one device.
template <class T>
class Point {
 public:
  Point(std::shared_ptr<const MlpSpec> spec, int64_t M, int64_t N,
        const std::vector<uintptr_t>& params, bool flat, int64_t params_model, uintptr_t x,
        int64_t x_model, uintptr_t y, int64_t y_model, uintptr_t class_weights, bool third_order,
        int device)
      : device_(device) {
    for (uintptr_t address : params) aligned<const T>("params", address);
    Points<T> points;
    points.spec = spec;
    points.M = M;
    points.N = N;
    points.params = flat ? LayerPointers<T>(pointer<const T>(params.at(0)), ParameterLayout(*spec))
                         : layer_pointers<T>(*spec, params);
    points.params_model = params_model;
    points.x = aligned<const T>("x", x);
    points.x_model = x_model;
    points.y = spec->loss == Loss::kMse ? static_cast<const void*>(aligned<const T>("y", y))
                                        : aligned<const int64_t>("y", y);
    points.y_model = y_model;
    points.class_weights = aligned<const double>("class_weights", class_weights);
    points.third_order = third_order;
    lin_ = std::make_unique<cuda::Linearization<T>>(points);
  }

  // (workspace, kept) bytes of an operation with K tangents, or K probes that a penalty draws; of
  // "linearize" kept are the residuals.
  std::pair<size_t, size_t> num_bytes(const std::string& operation, int64_t K, bool ggn,
                                      const Probes* probes) {
    Workspace workspace, kept;
    Call call{device_of(device_), nullptr, workspace, &kept, Blas::of(device_)};
    const Curvature curvature = curvature_of(ggn);
    if (operation == "linearize") lin_->linearize(call, kept, nullptr);
    if (operation == "gradient") lin_->gradient(call, nullptr);
    if (operation == "hvp") lin_->hvp(call, nullptr, K, curvature, nullptr);
    if (operation == "quadratic") lin_->quadratic(call, nullptr, K, curvature, nullptr);
    if (operation == "hvp_vjp") lin_->hvp_vjp(call, nullptr, nullptr, K, curvature, nullptr);
    if (operation == "penalty") lin_->penalty(call, {nullptr, probes}, K, curvature, nullptr);
    if (operation == "penalty_gradient")
      lin_->penalty_gradient(call, {nullptr, probes}, K, curvature, 1, 1, nullptr);
    return {workspace.peak(), kept.peak()};
  }

  // How its products of matrices run.
  std::string matrix_products() const {
    Workspace workspace;
    if (lin_->one_launch({device_of(device_), nullptr, workspace}))
      return "inside one launch per operation: the network is small";
    return Blas::text();
  }

  void linearize(uintptr_t residuals, size_t residual_bytes, uintptr_t scalars,
                 const Where& where) {
    Workspace kept(pointer<void>(residuals), residual_bytes);
    run(where, nullptr,
        [&](Call& call) { lin_->linearize(call, kept, pointer<Scalars>(scalars)); });
  }
  void gradient(uintptr_t out, const Where& where) const {
    run(where, nullptr, [&](Call& call) { lin_->gradient(call, pointer<T>(out)); });
  }
  void hvp(uintptr_t tangents, int64_t K, bool ggn, uintptr_t out, const Where& where) const {
    const T* v = aligned<const T>("tangents", tangents);
    run(where, nullptr,
        [&](Call& call) { lin_->hvp(call, v, K, curvature_of(ggn), pointer<T>(out)); });
  }
  void quadratic(uintptr_t tangents, int64_t K, bool ggn, uintptr_t out, const Where& where) const {
    const T* v = aligned<const T>("tangents", tangents);
    run(where, nullptr,
        [&](Call& call) { lin_->quadratic(call, v, K, curvature_of(ggn), pointer<T>(out)); });
  }
  void hvp_vjp(uintptr_t tangents, uintptr_t cotangents, int64_t K, bool ggn, uintptr_t out,
               const Where& where) const {
    const T* v = aligned<const T>("tangents", tangents);
    const T* u = aligned<const T>("cotangents", cotangents);
    run(where, nullptr,
        [&](Call& call) { lin_->hvp_vjp(call, v, u, K, curvature_of(ggn), pointer<T>(out)); });
  }
  void penalty(uintptr_t tangents, const Probes* probes, int64_t K, bool ggn, uintptr_t value,
               uintptr_t kept, size_t kept_bytes, const Where& where) const {
    const Tangents<T> v{aligned<const T>("tangents", tangents), probes};
    Workspace memory(pointer<void>(kept), kept_bytes);
    run(where, &memory,
        [&](Call& call) { lin_->penalty(call, v, K, curvature_of(ggn), pointer<double>(value)); });
  }
  void penalty_gradient(uintptr_t tangents, const Probes* probes, int64_t K, bool ggn,
                        double g_loss, double g_penalty, uintptr_t out, uintptr_t kept,
                        size_t kept_bytes, const Where& where) const {
    const Tangents<T> v{pointer<const T>(tangents), probes};
    Workspace memory(pointer<void>(kept), kept_bytes);
    run(where, &memory, [&](Call& call) {
      lin_->penalty_gradient(call, v, K, curvature_of(ggn), g_loss, g_penalty, pointer<T>(out));
    });
  }

 private:
  int device_;
  std::unique_ptr<cuda::Linearization<T>> lin_;
};

template <class T>
void bind_point(py::module_& m, const char* name) {
  py::class_<Point<T>>(m, name)
      .def("num_bytes", &Point<T>::num_bytes, py::arg("operation"), py::arg("K"), py::arg("ggn"),
           py::arg("probes") = py::none())
      .def("matrix_products", &Point<T>::matrix_products)
      .def("linearize", &Point<T>::linearize, Release())
      .def("gradient", &Point<T>::gradient, Release())
      .def("hvp", &Point<T>::hvp, Release())
      .def("quadratic", &Point<T>::quadratic, Release())
      .def("hvp_vjp", &Point<T>::hvp_vjp, Release())
      .def("penalty", &Point<T>::penalty, Release())
      .def("penalty_gradient", &Point<T>::penalty_gradient, Release());
}

// One network description, reused by every call with it.
struct Plan {
  std::shared_ptr<const MlpSpec> spec;

  template <class T>
  std::unique_ptr<Point<T>> point(int64_t M, int64_t N, const std::vector<uintptr_t>& params,
                                  bool flat, int64_t params_model, uintptr_t x, int64_t x_model,
                                  uintptr_t y, int64_t y_model, uintptr_t class_weights,
                                  bool third_order, int device) const {
    if (M < 1 || N < 1 || N > 0x7FFFFFFF)
      throw std::invalid_argument("one model and one sample or more expected, and N < 2**31");
    return std::make_unique<Point<T>>(spec, M, N, params, flat, params_model, x, x_model, y,
                                      y_model, class_weights, third_order, device);
  }
};

#if defined(HVPFAST_EMULATE)
// Makes call number `index` of the runtime fail, -1: none. Returns the number of calls since the
// last fail_call.
int64_t fail_call(int64_t index, int error) {
  emulation::runtime.failing = index;
  emulation::runtime.error = cudaError_t(error);
  return std::exchange(emulation::runtime.calls, 0);
}
#define HVPFAST_CUDA_MODULE _cuda_emulated
#else
#define HVPFAST_CUDA_MODULE _cuda
#endif

}  // namespace

PYBIND11_MODULE(HVPFAST_CUDA_MODULE, m) {
  m.doc() = "CUDA engine of hvpfast: addresses in, addresses out. Use the hvpfast package instead.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      PyErr_SetString(
          error.code == cudaErrorMemoryAllocation ? PyExc_MemoryError : PyExc_RuntimeError,
          error.what());
    } catch (const BlasError& error) {
      PyErr_SetString(error.memory ? PyExc_MemoryError : PyExc_RuntimeError, error.what());
    }
  });
  m.attr("emulated") = kEmulated;
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("matrix_products", &Blas::text, "What computes products of matrices, and why.");
  py::class_<Where>(m, "Where")
      .def(py::init<int, uintptr_t, uintptr_t, size_t>(), py::arg("device"), py::arg("stream"),
           py::arg("workspace"), py::arg("bytes"));
  py::class_<Probes>(m, "Probes")
      .def(py::init([](const std::string& distribution, uint64_t seed, uint32_t first) {
             return Probes{distribution_named(distribution), seed, first};
           }),
           py::arg("distribution"), py::arg("seed"), py::arg("first"));
  py::class_<Plan>(m, "Plan")
      .def(py::init([](std::vector<int64_t> sizes, const std::string& activation,
                       const std::string& loss, bool mean, bool bias,
                       std::vector<double> class_weights, int64_t ignore_index,
                       double label_smoothing) {
             return Plan{make_spec(std::move(sizes), activation, loss, mean, bias,
                                   std::move(class_weights), ignore_index, label_smoothing)};
           }),
           py::arg("sizes"), py::arg("activation"), py::arg("loss"), py::arg("mean"),
           py::arg("bias"), py::arg("class_weights"), py::arg("ignore_index"),
           py::arg("label_smoothing"))
      .def("point_float32", &Plan::point<float>)
      .def("point_float64", &Plan::point<double>);
  bind_point<float>(m, "PointFloat32");
  bind_point<double>(m, "PointFloat64");
  m.def("device_problem", &device_problem, "Why no device can be used, or an empty string.");
#if defined(HVPFAST_EMULATE)
  m.def("fail_call", &fail_call);
  m.def("use_blas", [](std::vector<std::string> names, int64_t least_macs, int least_side,
                       size_t workspace_bytes) {
    Blas::use(std::move(names), {least_macs, least_side, workspace_bytes});
  });
  m.def("set_machine", [](int driver, int devices, int shared_bytes) {
    emulation::runtime.driver = driver;
    emulation::runtime.devices = devices;
    emulation::runtime.shared_bytes = shared_bytes;
    emulation::runtime.allowed.clear();
    emulation::runtime.knows_streams = driver >= 12080;
    ask_devices_again();
  });
#endif
}
