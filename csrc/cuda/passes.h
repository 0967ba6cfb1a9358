// The passes, written once. `run` does their steps: Grid (grid.h) as one launch each, on any size
// of network; Block (block.h) inside one block of threads, on small networks.
//   run.multiply<form>(terms, count, rows, cols, depth, K, epilogue)   products of stacked matrices
//   run.samples(N, K, body)       body.sample(m, k, n) by a team of threads per sample
//   run.models(body)              body(m) by a block of threads per model
//   run.sum(rows, cols, K, body)  adds body(m, k, i, j) to the scalar of tangent k
// The equations of tangents are those of csrc/cpu/tangents-inl.h, of third order
// csrc/cpu/third_order-inl.h.
#pragma once
#include "epilogues.h"
#include "loss_terms.h"

namespace hvpfast::cuda {

template <class T>
using Terms = const Term<T>*;

// z_l = W_l a_{l-1} + b_l, a_l = act(z_l);  z_bar_L = dloss/dz_L;
// a_bar_l = W_{l+1}' z_bar_{l+1}, z_bar_l = s1_l * a_bar_l
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void primal_passes(Run& run, const Net<T, PerLayer>& net, Scalars* scalars,
                                       const Stack<double>& losses) {
  const int L = net.L, N = net.N;
  run.models(WeighTargets{net.targets, N, scalars});
  for (int l = 1; l <= L; ++l) {
    const Term<T> term{net.a[l - 1], net.params.W[l], 1};
    if (l < L) {
      const Activate<T> activate{
          net.activation, net.params.b[l], net.a[l], net.s1[l], net.d2[l] ? net.d2[l] : net.s2[l],
          net.d3[l]};
      run.template multiply<Form::kForward>(&term, 1, N, net.D[l], net.D[l - 1], 1, activate);
    } else {
      TangentForward<T> logits{};
      logits.b = net.params.b[l];
      logits.z_dot = net.z_bar[l];
      run.template multiply<Form::kForward>(&term, 1, N, net.D[l], net.D[l - 1], 1, logits);
    }
  }
  run.samples(N, 1, LossGradient<T>{net.targets, net.z_bar[L], net.p, net.weight, losses, scalars});
  run.models(SumLosses{losses, N, scalars});
  for (int l = L - 1; l >= 1; --l) {
    const Term<T> term{net.z_bar[l + 1], net.params.W[l + 1], 1};
    const PrimalBackward<T> backward{net.s1[l], net.d2[l] ? net.d2[l] : net.s2[l], net.s2[l],
                                     net.d3[l], net.z_bar[l]};
    run.template multiply<Form::kBackward>(&term, 1, N, net.D[l], net.D[l + 1], 1, backward);
  }
}

// given: scale z_dot_1, bias included, where that is known; else null.
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void tangent_forward(Run& run, const Net<T, PerLayer>& net,
                                         const Blocks<T, PerLayer>& v,
                                         const Streams<T, PerLayer>& s, const Stack<T>& given,
                                         T scale) {
  for (int l = 1; l <= net.L; ++l) {
    const Term<T> terms[] = {{net.a[l - 1], v.W[l], 1}, {s.a_dot[l - 1], net.params.W[l], 1}};
    TangentForward<T> forward{v.b[l], net.s1[l], s.z_dot[l], s.a_dot[l], {}, scale};
    if (l == 1) forward.given = given;
    const int count = l > 1 ? 2 : given ? 0 : 1;
    run.template multiply<Form::kForward>(terms, count, net.N, net.D[l], net.D[l - 1], s.K,
                                          forward);
  }
}

HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void loss_hvp(Run& run, const Net<T, PerLayer>& net,
                                  const Streams<T, PerLayer>& s) {
  const int L = net.L;
  run.samples(
      net.N, s.K,
      LossHvp<T>{net.targets.loss, net.D[L], net.p, net.weight, s.z_dot[L], s.z_bar_dot[L]});
}

HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void tangent_backward(Run& run, const Net<T, PerLayer>& net,
                                          const Blocks<T, PerLayer>& v,
                                          const Streams<T, PerLayer>& s, bool hessian) {
  for (int l = net.L - 1; l >= 1; --l) {
    const Term<T> terms[] = {{s.z_bar_dot[l + 1], net.params.W[l + 1], 1},
                             {net.z_bar[l + 1], v.W[l + 1], 1}};
    TangentBackward<T> backward{net.s1[l], {}, s.z_dot[l], s.a_bar_dot[l], s.z_bar_dot[l]};
    if (hessian) backward.s2 = net.s2[l];
    run.template multiply<Form::kBackward>(terms, hessian ? 2 : 1, net.N, net.D[l], net.D[l + 1],
                                           s.K, backward);
  }
}

// A tangent's streams: forward, loss, backward.
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void tangent_passes(Run& run, const Net<T, PerLayer>& net,
                                        const Blocks<T, PerLayer>& v, const Streams<T, PerLayer>& s,
                                        bool hessian, const Stack<T>& given, T scale) {
  tangent_forward(run, net, v, s, given, scale);
  loss_hvp(run, net, s);
  tangent_backward(run, net, v, s, hessian);
}

// dL/dW_l = z_bar_l' a_{l-1}
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void gradient_products(Run& run, const Net<T, PerLayer>& net,
                                           const Blocks<T, PerLayer>& out) {
  for (int l = 1; l <= net.L; ++l) {
    const Term<T> term{net.z_bar[l], net.a[l - 1], 1};
    run.template multiply<Form::kProduct>(&term, 1, net.D[l], net.D[l - 1], net.N, 1,
                                          Store<T>{out.W[l], out.b[l]});
  }
}

// (H v_k)_l = z_bar_dot_l' a_{l-1} + z_bar_l' a_dot_{l-1} for l >= first_layer
// The second term belongs to the Hessian only.
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void hvp_products(Run& run, const Net<T, PerLayer>& net,
                                      const Streams<T, PerLayer>& s, const Blocks<T, PerLayer>& out,
                                      bool hessian, int first_layer) {
  for (int l = first_layer; l <= net.L; ++l) {
    const Term<T> terms[] = {{s.z_bar_dot[l], net.a[l - 1], 1}, {net.z_bar[l], s.a_dot[l - 1], 1}};
    run.template multiply<Form::kProduct>(terms, hessian && l > 1 ? 2 : 1, net.D[l], net.D[l - 1],
                                          net.N, s.K, Store<T>{out.W[l], out.b[l]});
  }
}

// v'Hv without the backward pass or Hv, from the forward pass and the loss:
//   <z_dot_L, z_bar_dot_L> + sum_{l<L} <s2_l, z_dot_l^2> + 2 sum_{l>=2} <z_bar_l, V_l a_dot_{l-1}>
// last two: Hessian only. product[l]: (N, D[l]) for V_l a_dot_{l-1}.
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer, class Stacks>
__host__ __device__ void quadratic_sums(Run& run, const Net<T, PerLayer>& net,
                                        const Blocks<T, PerLayer>& v, const Streams<T, PerLayer>& s,
                                        const Stacks& product, bool hessian) {
  const int L = net.L, N = net.N;
  run.sum(N, net.D[L], s.K, Dot<T>{s.z_dot[L], s.z_bar_dot[L], 1.0});
  for (int l = 1; hessian && l < L; ++l)
    if (net.s2[l]) run.sum(N, net.D[l], s.K, WeightedSquare<T>{net.s2[l], s.z_dot[l]});
  for (int l = 2; hessian && l <= L; ++l) {
    const Term<T> term{s.a_dot[l - 1], v.W[l], 1};
    run.template multiply<Form::kForward>(&term, 1, N, net.D[l], net.D[l - 1], s.K,
                                          StoreShifted<T>{product[l], T(0)});
    run.sum(N, net.D[l], s.K, Dot<T>{net.z_bar[l], product[l], 2.0});
  }
}

// The mixed stream of the pairs (v_k, u_k), its sums over k, and d/dparams sum_k <u_k, H v_k>
// + g_loss dL/dparams in out. U_1 is not read.
HVPFAST_EITHER_SIDE
template <class Run, class T, template <class> class PerLayer>
__host__ __device__ void mixed_passes(Run& run, const Net<T, PerLayer>& net,
                                      const Blocks<T, PerLayer>& V, const Blocks<T, PerLayer>& U,
                                      const Streams<T, PerLayer>& v, const Streams<T, PerLayer>& u,
                                      const Mixed<T, PerLayer>& mixed, T g_loss, bool hessian,
                                      const Blocks<T, PerLayer>& out, bool add) {
  const int L = net.L, N = net.N, K = v.K;
  for (int l = 1; hessian && l <= L; ++l) {
    const bool smooth = bool(net.d2[l]);
    if (l == 1 && (L == 1 || !smooth)) continue;  // z_uv_1 = 0, and a_uv_1 = 0 too
    // z_uv_l = a_uv_{l-1} W_l' + sum_k (a_v_{l-1} U_l' + a_u_{l-1} V_l')
    const Term<T> terms[] = {{v.a_dot[l - 1], U.W[l], K},
                             {u.a_dot[l - 1], V.W[l], K},
                             {mixed.a[l - 1], net.params.W[l], 1}};
    MixedForward<T> forward{net.s1[l], net.d2[l], v.z_dot[l], u.z_dot[l], {}, {}, K};
    if (l > 1) forward.z = mixed.z[l];
    if (l < L) forward.a = mixed.a[l];
    const int count = l == 1 ? 0 : mixed.a[l - 1] ? 3 : 2;
    run.template multiply<Form::kForward>(terms, count, N, net.D[l], net.D[l - 1], 1, forward);
  }
  MixedLoss<T> loss{net.targets.loss, net.D[L],   K,          g_loss, net.p,         net.weight,
                    net.z_bar[L],     v.z_dot[L], u.z_dot[L], {},     mixed.z_bar[L]};
  if (hessian && L > 1) loss.z = mixed.z[L];
  run.samples(N, 1, loss);
  for (int l = L - 1; l >= 1; --l) {
    // a_bar_uv_l = z_bar_uv_{l+1} W_{l+1} + sum_k (z_bar_u_{l+1} V_{l+1} + z_bar_v_{l+1} U_{l+1})
    const Term<T> terms[] = {{mixed.z_bar[l + 1], net.params.W[l + 1], 1},
                             {u.z_bar_dot[l + 1], V.W[l + 1], K},
                             {v.z_bar_dot[l + 1], U.W[l + 1], K}};
    MixedBackward<T> backward{net.s1[l],  net.s2[l],      net.d2[l],      net.d3[l], v.z_dot[l],
                              u.z_dot[l], v.a_bar_dot[l], u.a_bar_dot[l], {},        mixed.z_bar[l],
                              K,          hessian};
    if (l > 1) backward.z = mixed.z[l];
    run.template multiply<Form::kBackward>(terms, 3, N, net.D[l], net.D[l + 1], 1, backward);
  }
  for (int l = 1; l <= L; ++l) {
    // out_l = z_bar_uv_l' a_{l-1} + z_bar_l' a_uv_{l-1} + sum_k (z_bar_u_l' a_v_{l-1} + ...)
    const Term<T> terms[] = {{mixed.z_bar[l], net.a[l - 1], 1},
                             {u.z_bar_dot[l], v.a_dot[l - 1], K},
                             {v.z_bar_dot[l], u.a_dot[l - 1], K},
                             {net.z_bar[l], mixed.a[l - 1], 1}};
    const bool with_a = hessian && l > 1 && bool(mixed.a[l - 1]);
    const int count = l == 1 ? 1 : with_a ? 4 : 3;
    run.template multiply<Form::kProduct>(terms, count, net.D[l], net.D[l - 1], N, 1,
                                          Store<T>{out.W[l], out.b[l], add});
  }
}

}  // namespace hvpfast::cuda
