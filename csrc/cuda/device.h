// The devices of this machine.
#pragma once
#include <string>

#include "call.h"

namespace hvpfast::cuda {

// Oldest architecture that the kernels are compiled for.
constexpr int kLeastMajor = 8;

// Why no device can be used, or nothing.
std::string device_problem();

// What launches need to know of a device; asked once.
const Device& device_of(int index);
#if defined(HVPFAST_EMULATE)
void ask_devices_again();  // another machine is emulated
#endif

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Throws where a stream belongs to another device.
void check_stream(cudaStream_t stream, int device);

}  // namespace hvpfast::cuda
