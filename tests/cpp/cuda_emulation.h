// CUDA on the host, for tests: the kernels as plain C++, their threads as fibers. The threads of a
// block run in turn, each until it has to wait for others; blocks run one after another. The
// runtime's functions count their calls, and a chosen call fails.
#pragma once
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CudaStream*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Runtime {
  int64_t calls = 0;     // since fail_call
  int64_t failing = -1;  // the call that fails
  cudaError_t error = cudaSuccess;
  cudaError_t last = cudaSuccess;
  int driver = 13000;
  int devices = 1;
  int shared_bytes = 96 << 10;
  std::map<const void*, size_t> allowed;  // dynamic shared memory of kernels that have asked
  bool knows_streams = true;              // the driver tells a stream's device
};
inline Runtime runtime;

// What every function of the runtime does first.
inline cudaError_t call() {
  if (runtime.calls++ != runtime.failing) return cudaSuccess;
  return runtime.last = runtime.error;
}

// The threads of one block.
class Block {
 public:
  static constexpr int kMost = 256;
  static Block& instance() {
    static Block block;
    return block;
  }

  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    threads_ = live_ = threads;
    blockDim = {unsigned(threads), 1, 1};
    arrived_.assign(size_t(threads) + 1, 0);
    done_.assign(size_t(threads), false);
    slots_.resize(size_t(threads));
    exchanges_.assign(size_t(threads), 0);
    while (live_ > 0) {
      const int64_t before = progress_;
      for (current_ = 0; current_ < threads; ++current_)
        if (!done_[size_t(current_)]) resume();
      if (progress_ == before) {
        std::fprintf(stderr, "emulation: some threads of a block wait for ones that ended\n");
        std::abort();
      }
    }
  }

  // Until `expected` threads, this one among them, have come to the barrier.
  void wait(int barrier, int expected) {
    const int64_t target = (arrived_[size_t(barrier)] / expected + 1) * expected;
    ++arrived_[size_t(barrier)];
    ++progress_;
    while (arrived_[size_t(barrier)] < target) yield();
  }
  void wait_all() { wait(threads_, threads_); }

  // Values exchanged in groups of `width` neighbouring threads. A thread's slots are used by turns:
  // who writes one again has met the whole group since the others read it.
  template <class T>
  T exchange(T value, int offset, int width) {
    const int own = int(threadIdx.x), group = own / width * width;
    const int64_t turn = exchanges_[size_t(own)]++ % 2;
    std::memcpy(&slots_[size_t(own)][turn], &value, sizeof(T));
    wait(group, width);
    T other;
    std::memcpy(&other, &slots_[size_t(group + ((own - group) ^ offset))][turn], sizeof(T));
    return other;
  }

  unsigned char* dynamic_shared() { return dynamic_.data(); }
  void resize_dynamic(size_t bytes) {
    dynamic_.assign(bytes, 0xFF);  // NaN: shared memory starts with nothing
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  using Place = void* [5];  // of GCC's and Clang's setjmp, which calls no function
  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t context;
    Place at;
    bool started = false;
  };

  // Others than the callers' registers are lost in these: nothing is assumed of them (noipa).
  [[gnu::noipa]] static void jump(Place& to) { __builtin_longjmp(to, 1); }

  [[gnu::noipa]] void resume() {
    threadIdx = {unsigned(current_), 0, 0};
    Fiber& fiber = fibers_[current_];
    if (__builtin_setjmp(scheduler_) != 0) return;
    if (fiber.started) jump(fiber.at);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    setcontext(&fiber.context);
  }
  [[gnu::noipa]] void yield() {
    if (__builtin_setjmp(fibers_[current_].at) == 0) jump(scheduler_);
  }
  // A fiber runs one thread of every block.
  static void enter() {
    Block& block = instance();
    for (;;) {
      (*block.body_)();
      block.done_[size_t(block.current_)] = true;
      --block.live_;
      ++block.progress_;
      block.yield();
    }
  }

  const std::function<void()>* body_ = nullptr;
  int threads_ = 0, live_ = 0, current_ = 0;
  int64_t progress_ = 0;
  std::vector<int64_t> arrived_;
  std::vector<bool> done_;
  std::vector<std::array<double, 2>> slots_;
  std::vector<int64_t> exchanges_;
  std::vector<unsigned char> dynamic_;
  Place scheduler_;
  Fiber fibers_[kMost];
};

inline unsigned char* dynamic_shared() { return Block::instance().dynamic_shared(); }

// Static shared memory counts against all limits; no kernel has more than this of it.
constexpr size_t kStaticBytes = 4096;

inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (cudaError_t error = call()) return error;
  if (bytes + kStaticBytes > size_t(runtime.shared_bytes))
    return runtime.last = cudaErrorInvalidValue;
  runtime.allowed[kernel] = bytes;
  return cudaSuccess;
}

inline cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                          const std::function<void()>& body) {
  if (cudaError_t error = call()) return error;
  const auto asked = runtime.allowed.find(kernel);
  const size_t most = asked == runtime.allowed.end() ? (48 << 10) - kStaticBytes : asked->second;
  if (block.x > unsigned(Block::kMost) || shared_bytes > most)
    return runtime.last = cudaErrorInvalidValue;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = {b, 0, 0};
    Block::instance().resize_dynamic(shared_bytes);
    Block::instance().run(int(block.x), body);
  }
  return cudaSuccess;
}

}  // namespace emulation

inline void __syncthreads() { emulation::Block::instance().wait_all(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int offset, int width) {
  return emulation::Block::instance().exchange(value, offset, width);
}

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "cudaErrorInvalidValue";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::runtime.last, cudaSuccess);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emulation::call();
}
inline cudaError_t cudaSetDevice(int) { return emulation::call(); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulation::runtime.devices;
  return emulation::call();
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::runtime.driver;
  return emulation::call();
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return emulation::call();
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return emulation::call();
}
inline cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  *device = int(reinterpret_cast<uintptr_t>(stream) >> 8);  // stream 0x100 is of device 1
  if (!emulation::runtime.knows_streams)
    return emulation::runtime.last = cudaErrorCallRequiresNewerDriver;
  return emulation::call();
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::runtime.shared_bytes;
      break;
  }
  return emulation::call();
}
#define CUDART_VERSION 13000
