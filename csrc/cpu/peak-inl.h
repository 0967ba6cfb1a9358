// The roof: fused multiply-adds in registers, as many independent ones as the micro-kernel has.
#pragma once
#include <chrono>

#include "gemm-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = 2 * kRowBlock;
  constexpr int kInner = 20000;
  double best = 0;
  const auto start = Clock::now();
  do {
    Vec<T> chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = broadcast(T(i));
    Vec<T> factor = broadcast(T(0.999)), term = broadcast(T(1e-3));
    asm volatile("" : "+m"(factor), "+m"(term));  // values the compiler cannot know
    const Vec<T> f = factor, t = term;
    const auto begin = Clock::now();
    for (int n = 0; n < kInner; ++n)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * f + t;
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(chain[i]));
    best = std::max(best, 2.0 * kInner * kChains * kLanes<T> / elapsed);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace hvpfast::HVPFAST_ISA
