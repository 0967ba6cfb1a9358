// The engine of one instruction set as a table of functions: the same sources are compiled once per
// set, and one is chosen at load time.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "common/contract.h"
#include "common/probes.h"

namespace hvpfast {

struct Isa {
  const char* name;
  int vector_bytes;
  std::unique_ptr<Linearization<float>> (*linearize_float)(const Problem<float>&, int threads);
  std::unique_ptr<Linearization<double>> (*linearize_double)(const Problem<double>&, int threads);
  // out[i - begin] = entry i of the probe, begin <= i < end
  void (*draw_float)(Stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end, float* out);
  void (*draw_double)(Stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end,
                      double* out);
  // Operations per second of one thread in registers, two per multiply-add: the roof of every
  // kernel.
  double (*fma_peak_float)(double seconds);
  double (*fma_peak_double)(double seconds);
};

// The sets compiled in and supported by this processor, best first.
const std::vector<const Isa*>& available_isas();

}  // namespace hvpfast
