// Probes in bulk, compiled once per instruction set and without contraction (probes.h).
#include "isa.h"

namespace hvpfast::HVPFAST_ISA {

// Blocks of counters drawn side by side, so that the compiler vectorises the rounds.
constexpr int kBlocks = 16;

template <class T>
void draw_rademacher(uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end;) {
    const Philox random = philox(seed, uint64_t(i / 128), probe, Stream::kRademacher);
    for (int64_t word = i % 128 / 32; word < 4 && i < end; ++word) {
      const uint32_t bits = random.word[word];
      int bit = int(i % 32);
      const int last = int(end - i < 32 - bit ? bit + (end - i) : 32);
      T* to = out + (i - begin);
      i += last - bit;
      for (; bit < last; ++bit) *to++ = (bits >> bit) & 1 ? T(-1) : T(1);
    }
  }
}

template <class T>
void draw_normal(Stream stream, uint64_t seed, uint32_t probe, int64_t begin, int64_t end, T* out) {
  for (int64_t first = begin / 4; first * 4 < end; first += kBlocks) {
    uint32_t word[4][kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      const Philox random = philox(seed, uint64_t(first + b), probe, stream);
      for (int w = 0; w < 4; ++w) word[w][b] = random.word[w];
    }
    float value[4][kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      normal_pair(word[0][b], word[1][b], &value[0][b], &value[1][b]);
      normal_pair(word[2][b], word[3][b], &value[2][b], &value[3][b]);
    }
    for (int b = 0; b < kBlocks; ++b)
      for (int w = 0; w < 4; ++w) {
        const int64_t i = (first + b) * 4 + w;
        if (i >= begin && i < end) out[i - begin] = T(value[w][b]);
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
