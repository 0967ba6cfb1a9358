// The formulas that both engines share (activations.h, losses.h) with the numbers of the kernels,
// callable one by one: tests/backends/cuda_formulas.py compares them with their definitions.
#include "cuda/real.h"

namespace hvpfast::cuda {

// out (n, 4): act, act', act'', act''' at each z.
template <class T>
void jets(int activation, int n, const T* z, T* out) {
  for (int i = 0; i < n; ++i) {
    const Jet<T> jet = jet_of(Activation(activation), z[i]);
    out[4 * i] = jet.value;
    out[4 * i + 1] = jet.d1;
    out[4 * i + 2] = jet.d2;
    out[4 * i + 3] = jet.d3;
  }
}

// p = softmax(z), u = D2[u], d3 += D3[of_u, v] by one team of threads; returns logsumexp(z).
template <class T>
double cross_entropy(int C, const T* z, T w, T* u, const T* of_u, const T* v, T* p, T* d3) {
  double result = 0;
  check(emulation::launch(nullptr, {}, {unsigned(kTeam), 1, 1}, 0,
                          [&] {
                            using Real = TeamReal<T, Comers::kWarp>;
                            const T log_sum = softmax<Real>(z, C, 1, p);
                            cross_entropy_d2<Real>(p, w, u, C, 1, u);
                            add_cross_entropy_d3<Real>(p, w, of_u, v, C, 1, d3);
                            if (Real::first() == 0) result = double(log_sum);
                          }),
        "the formulas of the loss");
  return result;
}

}  // namespace hvpfast::cuda

#define HVPFAST_FORMULAS(T)                                                                    \
  extern "C" void jets_##T(int activation, int n, const T* z, T* out) {                        \
    hvpfast::cuda::jets(activation, n, z, out);                                                \
  }                                                                                            \
  extern "C" double cross_entropy_##T(int C, const T* z, T w, T* u, const T* of_u, const T* v, \
                                      T* p, T* d3) {                                           \
    return hvpfast::cuda::cross_entropy(C, z, w, u, of_u, v, p, d3);                           \
  }
HVPFAST_FORMULAS(float)
HVPFAST_FORMULAS(double)
