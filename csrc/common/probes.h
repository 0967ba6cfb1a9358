// Counter-based random numbers: entry i of probe k for a seed is the same on every device, in every
// order, for any chunking. Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11): key = seed, counter =
// (block, probe, stream). Values are float32 numbers in every precision. Normal draws use separate
// multiplications and additions only, so that they are bit-equal everywhere: what includes this
// header for them is compiled without contraction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace hvpfast {

enum class Stream : uint32_t { kRademacher = 0, kNormal = 1, kImplicitNormal = 2 };

// One round on the counter c, with the round's key.
HVPFAST_FN void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                             uint32_t k1) {
  // High and low words apart: compilers do not vectorise one 64-bit product.
  const uint32_t high0 = uint32_t((uint64_t(0xD2511F53u) * c0) >> 32);
  const uint32_t low0 = 0xD2511F53u * c0;
  const uint32_t high1 = uint32_t((uint64_t(0xCD9E8D57u) * c2) >> 32);
  const uint32_t low1 = 0xCD9E8D57u * c2;
  c0 = high1 ^ c1 ^ k0;
  c1 = low1;
  c2 = high0 ^ c3 ^ k1;
  c3 = low0;
}

// The words of `count` blocks side by side: word[w][i] is word w of block first + i.
template <int count>
HVPFAST_FN void philox(uint64_t seed, uint64_t first, uint32_t probe, Stream stream,
                       uint32_t (&word)[4][count]) {
  const uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < count; ++i) {
    uint32_t c0 = uint32_t(first + uint64_t(i)), c1 = uint32_t((first + uint64_t(i)) >> 32);
    uint32_t c2 = probe, c3 = uint32_t(stream);
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
    for (uint32_t round = 0; round < 10; ++round)
      philox_round(c0, c1, c2, c3, k0 + round * 0x9E3779B9u, k1 + round * 0xBB67AE85u);
    word[0][i] = c0;
    word[1][i] = c1;
    word[2][i] = c2;
    word[3][i] = c3;
  }
}

// Two independent standard normal numbers from two words (Box and Muller 1958), 24 bits each.
HVPFAST_FN void normal_pair(uint32_t w0, uint32_t w1, float* first, float* second) {
  const float x = float((w0 >> 8) + 1);  // u = x / 2^24 in (0, 1]
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  int e = int(bits >> 23) - 127;
  bits = (bits & 0x007FFFFFu) | 0x3F800000u;
  float m;
  std::memcpy(&m, &bits, 4);
  const bool high = m > 1.41421356f;
  m = high ? m * 0.5f : m;
  e = high ? e + 1 : e;
  const float f = m - 1.0f;  // log(1 + f), Cephes logf
  const float t = f * f;
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float log_m = f + (t * (f * p) + -0.5f * t);
  const float minus_log_u = float(24 - e) * 0.693147180559945f - log_m;
  const float r = std::sqrt(2.0f * (minus_log_u > 0.0f ? minus_log_u : 0.0f));

  // The angle 2 pi v / 2^24, as a quadrant and a rest in [-pi/4, pi/4).
  const int32_t v = int32_t(w1 >> 8);
  const int32_t quadrant = (v + (1 << 21)) >> 22;
  const float angle = float(v - (quadrant << 22)) * 3.7450704e-07f;
  const float a2 = angle * angle;
  float s = -1.9515295891e-4f;  // Cephes sinf, cosf
  s = s * a2 + 8.3321608736e-3f;
  s = s * a2 + -1.6666654611e-1f;
  s = s * a2;
  s = s * angle;
  s = s + angle;
  float c = 2.443315711809948e-5f;
  c = c * a2 + -1.388731625493765e-3f;
  c = c * a2 + 4.166664568298827e-2f;
  c = c * a2;
  c = c * a2;
  c = c - 0.5f * a2;
  c = c + 1.0f;
  const bool swap = quadrant & 1;
  const float cosine = swap ? s : c, sine = swap ? c : s;
  *first = r * (((quadrant + 1) & 2) ? -cosine : cosine);
  *second = r * ((quadrant & 2) ? -sine : sine);
}

}  // namespace hvpfast
