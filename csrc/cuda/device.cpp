#include "device.h"

#include <map>
#include <mutex>

namespace hvpfast::cuda {

namespace {
std::string version(int number) {  // 13020 is 13.2
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}
int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

Device ask(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  if (major < kLeastMajor)
    throw std::invalid_argument("CUDA device " + std::to_string(index) +
                                " has compute capability " + std::to_string(major) +
                                ".x; the kernels are compiled for 8.0 and newer");
  return {index, attribute(cudaDevAttrMultiProcessorCount, index),
          size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index))};
}

std::map<int, Device> known_devices;
}  // namespace

std::string device_problem() {
  int driver = 0, runtime = 0, count = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  if (driver == 0) return "no NVIDIA driver is installed";
  const cudaError_t code = cudaGetDeviceCount(&count);
  // A driver of the same major version runs a newer minor version's programs.
  if (code == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000)
    return "the NVIDIA driver is too old: it has CUDA " + version(driver) +
           " and this build needs " + version(runtime) +
           "; update the driver, or build with the CUDA toolkit of the driver";
  if (code == cudaErrorNoDevice || (code == cudaSuccess && count == 0))
    return "the driver sees no CUDA device";
  check(code, "cudaGetDeviceCount");
  return {};
}

const Device& device_of(int index) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known_devices.find(index);
  if (found == known_devices.end()) found = known_devices.emplace(index, ask(index)).first;
  return found->second;
}

#if defined(HVPFAST_EMULATE)
void ask_devices_again() {
  for (auto& [index, device] : known_devices) device = ask(index);
}
#endif

DeviceGuard::DeviceGuard(int index) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == index) return;
  check(cudaSetDevice(index), "cudaSetDevice");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);  // it was current before: nothing to report
}

void check_stream(cudaStream_t stream, int device) {
#if CUDART_VERSION >= 12080
  if (!stream) return;  // the default stream is the current device's
  int owner = device;
  const cudaError_t code = cudaStreamGetDevice(stream, &owner);
  if (code == cudaErrorCallRequiresNewerDriver) {  // one of CUDA 12.7 or older cannot tell
    cudaGetLastError();
    return;
  }
  check(code, "cudaStreamGetDevice");
  if (owner != device)
    throw std::invalid_argument("the stream belongs to CUDA device " + std::to_string(owner) +
                                ", the tensors are on device " + std::to_string(device));
#else
  static_cast<void>(stream);
  static_cast<void>(device);
#endif
}

}  // namespace hvpfast::cuda
