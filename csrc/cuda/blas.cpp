#include "blas.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <optional>

namespace hvpfast::cuda {

namespace {

// cuBLAS's own declarations: its status is an int, 0 for success.
template <class T>
using GemmFunction = int(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                         const T* alpha, const T* A, int lda, long long next_a, const T* B, int ldb,
                         long long next_b, const T* beta, T* C, int ldc, long long next_c,
                         int batch);
constexpr int kDefaultMath = 0;  // CUBLAS_DEFAULT_MATH: float32 without TF32
constexpr int kAllocFailed = 3;

struct Library {
  std::string name, problem;  // the problem is empty where everything was found
  bool was_loaded = false;
  int (*create)(void** handle);
  int (*destroy)(void* handle);
  int (*set_math_mode)(void* handle, int mode);
  int (*set_stream)(void* handle, cudaStream_t stream);
  int (*set_workspace)(void* handle, void* workspace, size_t bytes);
  GemmFunction<float>* gemm_float;
  GemmFunction<double>* gemm_double;
};

Library load(const std::vector<std::string>& names) {
  Library library;
  void* found = nullptr;
  for (const int flag : {RTLD_NOLOAD, 0})
    for (const std::string& name : names) {
      if (found) break;
      found = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | flag);
      library.name = name;
      library.was_loaded = flag != 0;
      if (found || flag != 0) continue;
      if (!library.problem.empty()) library.problem += "; ";
      if (const char* reason = dlerror()) library.problem += reason;
    }
  if (!found) {
    library.problem = std::string("not found (").append(library.problem).append(")");
    return library;
  }
  library.problem.clear();
  const auto resolve = [&](const char* symbol, auto*& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(found, symbol));
    if (!function && library.problem.empty())
      library.problem = "of no use (" + library.name + " lacks " + symbol + ")";
  };
  resolve("cublasCreate_v2", library.create);
  resolve("cublasDestroy_v2", library.destroy);
  resolve("cublasSetMathMode", library.set_math_mode);
  resolve("cublasSetStream_v2", library.set_stream);
  resolve("cublasSetWorkspace_v2", library.set_workspace);
  resolve("cublasSgemmStridedBatched", library.gemm_float);
  resolve("cublasDgemmStridedBatched", library.gemm_double);
  return library;
}

struct State {
  std::mutex mutex;
#if defined(HVPFAST_EMULATE)
  std::vector<std::string> names;  // none: the real library computes on a device
#else
  std::vector<std::string> names{"libcublas.so.13", "libcublas.so.12"};
#endif
  BlasRule rule;
  std::optional<Library> library;
  std::map<int, std::unique_ptr<Blas>> of_device;
};

// Never destroyed: at the end of the process the driver may be gone before the handles.
State& state() {
  static State& state = *new State;
  return state;
}

const Library& library() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.library) s.library = load(s.names);
  return *s.library;
}

const char* status_name(int status) {
  switch (status) {
    case 1:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kAllocFailed:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case 8:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case 11:
      return "CUBLAS_STATUS_MAPPING_ERROR";
    case 13:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case 14:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case 15:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    case 16:
      return "CUBLAS_STATUS_LICENSE_ERROR";
    default:
      return "an unknown status";
  }
}

void check_blas(int status, const char* function) {
  if (status != 0) throw BlasError(function, status);
}

}  // namespace

BlasError::BlasError(const char* function, int status)
    : std::runtime_error(std::string("cuBLAS failed in ") + function + ": " + status_name(status) +
                         " (" + std::to_string(status) + ")"),
      memory(status == kAllocFailed) {}

Blas* Blas::of(int device) {
  if (!library().problem.empty()) return nullptr;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  std::unique_ptr<Blas>& blas = s.of_device[device];
  if (!blas) blas = std::make_unique<Blas>();
  return blas.get();
}

const BlasRule& Blas::rule() { return state().rule; }

void Blas::use(std::vector<std::string> names, const BlasRule& rule) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.of_device.clear();
  s.library.reset();
  s.names = std::move(names);
  s.rule = rule;
}

std::string Blas::text() {
  const Library& found = library();
  if (!found.problem.empty()) return "own tiles; cuBLAS is " + found.problem;
  const BlasRule& r = rule();
  return "cuBLAS (" + found.name + (found.was_loaded ? ", already loaded" : "") + ") from " +
         std::to_string(r.least_macs) + " multiply-adds on with every side at least " +
         std::to_string(r.least_side) + ", else own tiles";
}

void Blas::make_handle() {
  if (handle_) return;
  const Library& lib = library();
  // What a handle allocates is its own, and no part of a CUDA graph that is being captured.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* handle = nullptr;
  const int created = lib.create(&handle);
  const int set = created ? 0 : lib.set_math_mode(handle, kDefaultMath);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  if (!created && (set || restored)) lib.destroy(handle);  // the first error is reported
  check_blas(created, "cublasCreate_v2");
  check_blas(set, "cublasSetMathMode");
  check(restored, "cudaThreadExchangeStreamCaptureMode");
  handle_ = handle;
}

Blas::~Blas() {
  if (handle_) state().library->destroy(handle_);
}

template <class T>
void Blas::multiply(cudaStream_t stream, void* workspace, const Gemm<T>& g) {
  const std::lock_guard<std::mutex> lock(mutex_);
  make_handle();
  const Library& lib = library();
  check_blas(lib.set_stream(handle_, stream), "cublasSetStream_v2");
  // cuBLAS's own workspace would not live as long as a graph; set_stream resets it each time.
  check_blas(lib.set_workspace(handle_, workspace, rule().workspace_bytes),
             "cublasSetWorkspace_v2");
  const T alpha = T(1), beta = g.add ? T(1) : T(0);
  const auto call = [&](GemmFunction<T>* gemm, const char* name) {
    check_blas(gemm(handle_, g.transpose_a, g.transpose_b, g.m, g.n, g.k, &alpha, g.A, int(g.lda),
                    g.next_a, g.B, int(g.ldb), g.next_b, &beta, g.C, int(g.ldc), g.next_c, g.batch),
               name);
  };
  if constexpr (sizeof(T) == 4) {
    call(lib.gemm_float, "cublasSgemmStridedBatched");
  } else {
    call(lib.gemm_double, "cublasDgemmStridedBatched");
  }
}
template void Blas::multiply(cudaStream_t, void*, const Gemm<float>&);
template void Blas::multiply(cudaStream_t, void*, const Gemm<double>&);

}  // namespace hvpfast::cuda
