// Probes in bulk, compiled without contraction (common/probes.h): one block of counters per thread.
#include "common/probes.h"
#include "ops.h"

namespace hvpfast::cuda {

// Entry i of a Rademacher probe is bit i % 128 of block i / 128; entries 4 b .. 4 b + 3 of a normal
// probe are the pairs of words 0, 1 and 2, 3 of block b.
template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(bool rademacher, uint64_t seed, uint32_t first, int64_t K, int64_t P, T* out) {
  const int64_t each = rademacher ? 128 : 4;
  const int64_t blocks = (P + each - 1) / each;
  const int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= K * blocks) return;
  const int64_t k = task / blocks;
  const int64_t block = task % blocks;
  const int64_t begin = block * each;
  uint32_t word[4][1];
  philox(seed, uint64_t(block), first + uint32_t(k),
         rademacher ? Stream::kRademacher : Stream::kNormal, word);
  out += k * P + begin;
  const int64_t count = P - begin < each ? P - begin : each;
  if (rademacher) {
    for (int i = 0; i < count; ++i) out[i] = T(1 - 2 * int32_t((word[i / 32][0] >> (i % 32)) & 1));
  } else {
    float value[4];
    normal_pair(word[0][0], word[1][0], &value[0], &value[1]);
    normal_pair(word[2][0], word[3][0], &value[2], &value[3]);
    for (int i = 0; i < count; ++i) out[i] = T(value[i]);
  }
}

template <class T>
void draw_probes(Call& call, const Probes& probes, int64_t K, int64_t P, T* out) {
  const bool rademacher = probes.distribution == Distribution::kRademacher;
  const int64_t each = rademacher ? 128 : 4;
  const int64_t tasks = K * ((P + each - 1) / each);
  if (tasks > 0)
    launch("a draw", draw_kernel<T>, (tasks + kThreads - 1) / kThreads, kThreads, 0, call.stream,
           rademacher, probes.seed, probes.first, K, P, out);
}
template void draw_probes(Call&, const Probes&, int64_t, int64_t, float*);
template void draw_probes(Call&, const Probes&, int64_t, int64_t, double*);

}  // namespace hvpfast::cuda
