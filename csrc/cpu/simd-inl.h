// Vectors of the instruction set that this file is compiled for. They are GCC and Clang's vector
// extensions, so that one source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define HVP_INLINE inline __attribute__((always_inline))

namespace hvpfast::HVPFAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRowBlock = 8;  // 8 x 2 of 32 registers accumulate; FMA latency 4 x 2 ports needs 8
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRowBlock = 6;  // 6 x 2 accumulators + 2 panel vectors + 1 broadcast of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kRowBlock = 6;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using IntVec = typename VectorOf<T>::integer;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
// Samples per panel: the two vectors that one row of the micro-kernel holds.
template <class T>
constexpr int kPanel = 2 * kLanes<T>;

template <class T>
HVP_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
HVP_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
HVP_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // s - 0 == s for every s, so this is a plain broadcast
}
template <class T>
HVP_INLINE double sum_lanes(Vec<T> v) {
  double s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += double(v[i]);
  return s;
}

}  // namespace hvpfast::HVPFAST_ISA
