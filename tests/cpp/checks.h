// What the sanitizers' tests share: the case at hand, checks, numbers, thread counts.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace hvpfast {

inline std::string context;  // the case that runs, for messages
inline int num_cases = 0;

inline void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "sanitize: %s: %s\n", context.c_str(), what);
  std::exit(1);
}

// Uniform in [-1, 1), a function of the index alone.
inline double value(uint64_t i) {
  i = (i + 1) * 0x9E3779B97F4A7C15u;
  i = (i ^ (i >> 29)) * 0xBF58476D1CE4E5B9u;
  return double(int64_t(i ^ (i >> 32))) / 9223372036854775808.0;
}

template <class T>
std::vector<T> values(int64_t count, uint64_t first) {
  std::vector<T> out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i) out[i] = T(value(first + i));
  return out;
}

template <class T>
double dot(const T* a, const T* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

template <class T>
double norm(const T* a, int64_t count) {
  return std::sqrt(dot(a, a, count));
}

// The result of run(threads), the same bits for one, two and three threads.
template <class T, class Run>
std::vector<T> on_any_threads(int64_t count, Run&& run) {
  std::vector<T> results[3];
  for (int threads = 1; threads <= 3; ++threads) {
    std::vector<T>& out = results[threads - 1];
    out.assign(static_cast<size_t>(count), std::numeric_limits<T>::quiet_NaN());
    run(out.data(), threads);
    for (T element : out) check(std::isfinite(element), "a result is not finite");
    check(count == 0 || std::memcmp(out.data(), results[0].data(), out.size() * sizeof(T)) == 0,
          "results depend on the number of threads");
  }
  return results[0];
}

template <class T>
std::unique_ptr<Linearization<T>> linearize(const Isa& isa, const Problem<T>& problem,
                                            int threads) {
  if constexpr (sizeof(T) == 4) {
    return isa.linearize_float(problem, threads);
  } else {
    return isa.linearize_double(problem, threads);
  }
}

}  // namespace hvpfast
