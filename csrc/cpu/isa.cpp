#include "isa.h"

namespace hvpfast {

#define HVPFAST_DECLARE(set) \
  namespace set {            \
  extern const Isa kIsa;     \
  }
#if defined(__x86_64__)
HVPFAST_DECLARE(x86_64)
HVPFAST_DECLARE(x86_64_v3)
HVPFAST_DECLARE(x86_64_v4)
#else
HVPFAST_DECLARE(native)
#endif

const std::vector<const Isa*>& available_isas() {
  static const std::vector<const Isa*> isas = [] {
    std::vector<const Isa*> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4) list.push_back(&x86_64_v4::kIsa);
    if (v3) list.push_back(&x86_64_v3::kIsa);
    list.push_back(&x86_64::kIsa);
#else
    list.push_back(&native::kIsa);
#endif
    return list;
  }();
  return isas;
}

}  // namespace hvpfast
