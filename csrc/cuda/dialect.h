// CUDA as the kernels use it: one include, launches as an ordinary function call, errors as
// exceptions. With HVPFAST_EMULATE the same sources are plain C++ and run on the host (tests only).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(HVPFAST_EMULATE)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

// Functions instantiated for the host and for the device, each calling its own side.
#if defined(__CUDACC__)
#define HVPFAST_EITHER_SIDE _Pragma("nv_exec_check_disable")
#else
#define HVPFAST_EITHER_SIDE
#endif

// A function of its own: its registers are not added to those of its callers.
#if defined(HVPFAST_EMULATE)
#define HVPFAST_CALL
#else
#define HVPFAST_CALL __noinline__
#endif

namespace hvpfast::cuda {

// A failed call of the CUDA runtime.
struct Error : std::runtime_error {
  cudaError_t code;
  Error(const std::string& what, cudaError_t code)
      : std::runtime_error("CUDA failed in " + what + ": " + cudaGetErrorString(code) + " (" +
                           cudaGetErrorName(code) + ")"),
        code(code) {}
};

inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call would report it again
  throw Error(what, code);
}

constexpr int kThreads = 256;  // threads of a block of every kernel but those of small networks

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...)
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, const Args&... args) {
  if (blocks > 0x7FFFFFFF)
    throw std::invalid_argument(std::string(name) + " needs " + std::to_string(blocks) +
                                " blocks, more than a launch can have; take fewer tangents");
  const dim3 grid{unsigned(blocks), 1, 1}, block{unsigned(threads), 1, 1};
#if defined(HVPFAST_EMULATE)
  check(emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                          [&] { kernel(Parameters(args)...); }),
        name);
  static_cast<void>(stream);
#else
  std::tuple<Parameters...> values(args...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                               shared_bytes, stream),
              name);
      },
      values);
#endif
}

// Shared memory, static and dynamic together, that a block may have without asking.
constexpr size_t kDefaultSharedBytes = 48 << 10;

// Lets blocks of a kernel have so much dynamic shared memory.
template <class... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
#if defined(HVPFAST_EMULATE)
  check(emulation::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes),
        "cudaFuncSetAttribute");
#else
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "cudaFuncSetAttribute");
#endif
}

__device__ inline unsigned char* dynamic_shared() {
#if defined(HVPFAST_EMULATE)
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

}  // namespace hvpfast::cuda
