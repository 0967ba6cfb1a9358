// Probes in bulk, compiled once per instruction set and without contraction (common/probes.h).
#include <algorithm>

#include "isa.h"

namespace hvpfast::HVPFAST_ISA {

// Blocks of counters drawn side by side, so that the compiler vectorises the rounds.
constexpr int kBlocks = 16;

// Entry i is bit i % 128 of block i / 128: +1 if clear, -1 if set.
template <class T>
void draw_rademacher(uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out) {
  uint32_t word[4][kBlocks];
  for (int64_t first = begin / 128; first * 128 < end; first += kBlocks) {
    philox(seed, uint64_t(first), probe, Stream::kRademacher, word);
    for (int64_t i = std::max(begin, first * 128); i < std::min(end, (first + kBlocks) * 128);) {
      const uint32_t bits = word[i % 128 / 32][i / 128 - first];
      const int64_t last = std::min(end, (i / 32 + 1) * 32);
      if (last - i == 32) {
        for (uint32_t bit = 0; bit < 32; ++bit)
          out[i - begin + bit] = T(1 - 2 * int32_t((bits >> bit) & 1));
        i = last;
      }
      for (; i < last; ++i) out[i - begin] = T(1 - 2 * int32_t((bits >> (i % 32)) & 1));
    }
  }
}

// Entries 4 b .. 4 b + 3 are the pairs of words 0, 1 and 2, 3 of block b.
template <class T>
void draw_normal(Stream stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out) {
  uint32_t word[4][kBlocks];
  float value[4][kBlocks];
  for (int64_t first = begin / 4; first * 4 < end; first += kBlocks) {
    philox(seed, uint64_t(first), probe, stream, word);
    for (int pair = 0; pair < 4; pair += 2)
      for (int b = 0; b < kBlocks; ++b)
        normal_pair(word[pair][b], word[pair + 1][b], &value[pair][b], &value[pair + 1][b]);
    const int64_t base = first * 4;
    const int64_t from = std::max(begin, base);
    const int64_t to = std::min(end, base + 4 * kBlocks);
    if (to - from == 4 * kBlocks) {
      for (int b = 0; b < kBlocks; ++b)
        for (int w = 0; w < 4; ++w) out[base - begin + 4 * b + w] = T(value[w][b]);
    } else {
      for (int64_t i = from; i < to; ++i) out[i - begin] = T(value[i % 4][(i - base) / 4]);
    }
  }
}

template <class T>
void draw_probe(Stream stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out) {
  if (stream == Stream::kRademacher) {
    draw_rademacher(seed, probe, begin, end, out);
  } else {
    draw_normal(stream, seed, probe, begin, end, out);
  }
}
template void draw_probe(Stream, uint64_t, uint32_t, int64_t, int64_t, float*);
template void draw_probe(Stream, uint64_t, uint32_t, int64_t, int64_t, double*);

}  // namespace hvpfast::HVPFAST_ISA
