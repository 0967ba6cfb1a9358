// The `Real` of activations.h and losses.h on a GPU: one number per thread; on the classes of a
// sample, a team of kTeam neighbouring threads.
#pragma once
#include <cmath>

#include "common/losses.h"
#include "dialect.h"

namespace hvpfast::cuda {

constexpr int kTeam = 8;  // divides 32: a team lies in one warp

// Which threads of a warp come to an exchange: all that have not ended, or some of its teams. All
// have a constant mask, and an exchange is one instruction. With a mask computed at run time the
// compiler calls a subroutine per exchange and saves what it overwrites in local memory.
enum class Comers { kWarp, kTeams };

template <class T, Comers comers = Comers::kTeams>
struct TeamReal {
  using type = T;
  using R = T;
  static constexpr int kStep = kTeam;
  __device__ static int first() { return int(threadIdx.x) % kTeam; }
  __device__ static R team_sum(R x) {
    for (int offset = 1; offset < kTeam; offset *= 2)
      x += __shfl_xor_sync(mask(), x, offset, kTeam);
    return x;
  }
  __device__ static R team_max(R x) {
    for (int offset = 1; offset < kTeam; offset *= 2) {
      const R other = __shfl_xor_sync(mask(), x, offset, kTeam);
      x = max(x, other);
    }
    return x;
  }

  __device__ static R load(const T* p) { return *p; }
  __device__ static void store(T* p, R v) { *p = v; }
  __device__ static R constant(double c) { return T(c); }
  __device__ static R select(bool mask, R yes, R no) { return mask ? yes : no; }
  __device__ static R abs(R x) { return x < T(0) ? -x : x; }
  __device__ static R max(R a, R b) { return a < b || b != b ? b : a; }  // NaN stays
  __device__ static R clamp(R x, double bound) {
    const R top = T(bound);
    return x > top ? top : (x < -top ? -top : x);
  }
  __device__ static R exp_nonpositive(R x) { return ::exp(x); }
  __device__ static R log_positive(R x) { return ::log(x); }
  __device__ static R log1p_unit(R x) { return ::log1p(x); }
  __device__ static R erfc(R x) { return ::erfc(x); }
  __device__ static R tanh_near_zero(R x) { return ::tanh(x); }

 private:
  __device__ static unsigned mask() {
    if constexpr (comers == Comers::kWarp) return 0xFFFFFFFFu;
    return ((1u << kTeam) - 1) << (threadIdx.x % 32 / kTeam * kTeam);
  }
};

// act and its derivatives at z, for an activation known when it runs.
template <class T>
__device__ inline Jet<T> jet_of(Activation act, T z) {
  switch (act) {
#define HVPFAST_CASE(name, text) \
  case Activation::name:         \
    return ActivationRow<Activation::name, TeamReal<T>>::at(z);
    HVPFAST_ACTIVATIONS(HVPFAST_CASE)
#undef HVPFAST_CASE
  }
  return {};
}

}  // namespace hvpfast::cuda
