// The contract of common/contract.h on a GPU. Operations of small networks run in one launch
// (small.h), all others pass by pass over the whole device (grid.h).
#include "grid.h"
#include "ops.h"

namespace hvpfast::cuda {

template <class T>
Linearization<T>::Linearization(const Points<T>& points)
    : points_(points), layout_(*points.spec), L_(points.spec->L()) {
  const MlpSpec& s = *points.spec;
  net_.L = L_;
  net_.N = int(points.N);
  net_.activation = s.activation;
  net_.D.assign(s.D.begin(), s.D.end());
  const size_t layers = size_t(L_) + 1;
  for (auto* array : {&net_.params.W, &net_.params.b, &net_.a, &net_.s1, &net_.s2, &net_.d2,
                      &net_.d3, &net_.z_bar})
    array->resize(layers);
  for (size_t l = 1; l < layers; ++l) {
    const auto input = [&](const T* data, int64_t ld) {
      return Stack<T>{const_cast<T*>(data), ld, points.params_model, 0};
    };
    net_.params.W[l] = input(points.params.W[l], s.D[l - 1]);
    if (s.bias) net_.params.b[l] = input(points.params.b[l], s.D[l]);
  }
  net_.a[0] = {const_cast<T*>(points.x), s.D[0], points.x_model, 0};
  net_.targets = {s.loss,
                  s.mean,
                  int(s.D[L_]),
                  s.ignore_index,
                  s.label_smoothing,
                  points.class_weights,
                  points.y,
                  points.y_model};
}

// (N, D[l]) for each model and each of K tangents.
template <class T>
Stack<T> Linearization<T>::rows(Workspace& workspace, int64_t K, int l) const {
  const int64_t D = net_.D[size_t(l)];
  const int64_t size = points_.N * D;
  return {workspace.take<T>(points_.M * K * size), D, K * size, K > 1 ? size : 0};
}

// The layers of arrays (M, K, P).
template <class T>
typename Linearization<T>::HostBlocks Linearization<T>::blocks(const T* flat, int64_t K) const {
  HostBlocks b;
  b.W.resize(size_t(L_) + 1);
  b.b.resize(size_t(L_) + 1);
  const int64_t P = layout_.P;
  for (size_t l = 1; l <= size_t(L_); ++l) {
    const auto at = [&](int64_t offset, int64_t ld) {
      return Stack<T>{const_cast<T*>(flat) + offset, ld, K * P, P};
    };
    b.W[l] = at(layout_.weight[l], net_.D[l - 1]);
    if (layout_.bias[l] >= 0) b.b[l] = at(layout_.bias[l], net_.D[l]);
  }
  return b;
}

template <class T>
typename Linearization<T>::HostStreams Linearization<T>::streams(Workspace& workspace, int64_t K,
                                                                 bool keep_a_bar_dot) const {
  HostStreams s;
  s.K = int(K);
  for (auto* array : {&s.z_dot, &s.a_dot, &s.a_bar_dot, &s.z_bar_dot})
    array->resize(size_t(L_) + 1);
  for (int l = 1; l <= L_; ++l) {
    const size_t at = size_t(l);
    s.z_bar_dot[at] = rows(workspace, K, l);
    if (l == L_ || smooth()) s.z_dot[at] = rows(workspace, K, l);
    if (l == L_) continue;
    s.a_dot[at] = rows(workspace, K, l);
    if (smooth() && keep_a_bar_dot) s.a_bar_dot[at] = rows(workspace, K, l);
  }
  return s;
}

template <template <class> class To, template <class> class From, class T>
void copy_layers(const Blocks<T, From>& from, Blocks<T, To>& to) {
  for (size_t l = 1; l < from.W.size(); ++l) {
    to.W[int(l)] = from.W[l];
    to.b[int(l)] = from.b[l];
  }
}

// The task of a small network, L <= kSmallLayers, without its result.
template <class T>
SmallTask<T> Linearization<T>::task(const T* tangents, int64_t K, bool hessian) const {
  SmallTask<T> t{};
  t.net.L = net_.L;
  t.net.N = net_.N;
  t.net.activation = net_.activation;
  t.net.p = net_.p;
  t.net.weight = net_.weight;
  t.net.targets = net_.targets;
  for (int l = 0; l <= L_; ++l) {
    const size_t at = size_t(l);
    t.net.D[l] = net_.D[at];
    t.net.a[l] = net_.a[at];
    t.net.s1[l] = net_.s1[at];
    t.net.s2[l] = net_.s2[at];
    t.net.d2[l] = net_.d2[at];
    t.net.d3[l] = net_.d3[at];
    t.net.z_bar[l] = net_.z_bar[at];
  }
  copy_layers(net_.params, t.net.params);
  copy_layers(blocks(tangents, K), t.tangents);
  t.K = int(K);
  t.groups = 1;
  t.hessian = hessian;
  t.scale = T(1);
  return t;
}

// Whether a block has the shared memory for the operations, and no more work than other launches
// would cost, or every multiprocessor has a block.
template <class T>
bool Linearization<T>::small(const Call& call, int64_t K,
                             std::initializer_list<SmallOp> operations) const {
  constexpr int64_t kMostMacs = 1 << 18;  // of one product with all weights
  if (L_ > kSmallLayers) return false;
  if (points_.N * layout_.P > kMostMacs && points_.M * K < call.device.multiprocessors)
    return false;
  const SmallTask<T> t = task(nullptr, 1, true);
  for (SmallOp op : operations)
    if (small_bytes(op, t) + kStaticSharedBytes > call.device.shared_bytes) return false;
  return true;
}

// Blocks that share a model's tangents.
template <class T>
int Linearization<T>::groups(const Call& call, int64_t K) const {
  const int64_t wanted = 4 * int64_t(call.device.multiprocessors);
  return int(std::clamp<int64_t>((wanted + points_.M - 1) / points_.M, 1, K));
}

template <class T>
void Linearization<T>::linearize(Call& call, Workspace& residuals, Scalars* scalars) {
  for (int l = 1; l <= L_; ++l) {
    const size_t at = size_t(l);
    net_.z_bar[at] = rows(residuals, 1, l);
    if (l == L_) break;
    net_.a[at] = rows(residuals, 1, l);
    net_.s1[at] = rows(residuals, 1, l);
    if (!smooth()) continue;
    net_.s2[at] = rows(residuals, 1, l);
    if (points_.third_order) {
      net_.d2[at] = rows(residuals, 1, l);
      net_.d3[at] = rows(residuals, 1, l);
    }
  }
  if (points_.spec->loss == Loss::kCrossEntropy) net_.p = rows(residuals, 1, L_);
  const int64_t N = points_.N;
  net_.weight = {residuals.take<T>(points_.M * N), 1, N, 0};
  const Stack<double> losses{call.workspace.take<double>(points_.M * N), 1, N, 0};
  if (small(call, 1, {SmallOp::kHvp})) {
    SmallTask<T> t = task(nullptr, 1, true);
    t.scalars = scalars;
    t.losses = losses;
    return run_small(call, SmallOp::kPrimal, t, points_.M);
  }
  Grid<T> run(call, points_.M);
  primal_passes(run, net_, scalars, losses);
}

template <class T>
void Linearization<T>::gradient(Call& call, T* out) const {
  if (small(call, 1, {SmallOp::kHvp})) {
    SmallTask<T> t = task(nullptr, 1, true);
    copy_layers(blocks(out, 1), t.out);
    return run_small(call, SmallOp::kGradient, t, points_.M);
  }
  Grid<T> run(call, points_.M);
  gradient_products(run, net_, blocks(out, 1));
}

template <class T>
void Linearization<T>::hvp(Call& call, const T* tangents, int64_t K, Curvature curvature,
                           T* out) const {
  if (K == 0) return;
  const bool hessian = curvature == Curvature::kHessian;
  if (small(call, K, {SmallOp::kHvp})) {
    SmallTask<T> t = task(tangents, K, hessian);
    t.groups = groups(call, K);
    copy_layers(blocks(out, K), t.out);
    return run_small(call, SmallOp::kHvp, t, points_.M);
  }
  const HostStreams s = streams(call.workspace, K, false);
  Grid<T> run(call, points_.M);
  tangent_passes(run, net_, blocks(tangents, K), s, hessian, Stack<T>{}, T(1));
  hvp_products(run, net_, s, blocks(out, K), hessian, 1);
}

template <class T>
void Linearization<T>::quadratic(Call& call, const T* tangents, int64_t K, Curvature curvature,
                                 T* out) const {
  if (K == 0) return;
  const bool hessian = curvature == Curvature::kHessian;
  if (small(call, K, {SmallOp::kQuadratic})) {
    SmallTask<T> t = task(tangents, K, hessian);
    t.groups = groups(call, K);
    t.quadratic = out;
    return run_small(call, SmallOp::kQuadratic, t, points_.M);
  }
  HostStreams s;
  s.K = int(K);
  for (auto* array : {&s.z_dot, &s.a_dot, &s.z_bar_dot}) array->resize(size_t(L_) + 1);
  Layers<Stack<T>> product(size_t(L_) + 1);
  for (int l = 1; l <= L_; ++l) {
    const size_t at = size_t(l);
    if (l == L_ || smooth()) s.z_dot[at] = rows(call.workspace, K, l);
    if (l < L_) s.a_dot[at] = rows(call.workspace, K, l);
    if (l > 1 && hessian) product[at] = rows(call.workspace, K, l);
  }
  s.z_bar_dot[size_t(L_)] = rows(call.workspace, K, L_);
  const HostBlocks v = blocks(tangents, K);
  Grid<T> run(call, points_.M);
  run.begin_sums(!hessian ? 1 : smooth() ? 2 * L_ - 1 : L_, int(K));
  tangent_forward(run, net_, v, s, Stack<T>{}, T(1));
  loss_hvp(run, net_, s);
  quadratic_sums(run, net_, v, s, product, hessian);
  run.total(nullptr, out);
}

// A third-order operation of a small network: each group of tangents has its part of the sum.
template <class T>
void Linearization<T>::small_third_order(Call& call, SmallOp op, SmallTask<T>& t, int64_t K,
                                         T* out) const {
  t.groups = groups(call, K);
  const int64_t P = layout_.P;
  T* parts = t.groups > 1 ? call.workspace.take<T>(points_.M * t.groups * P) : out;
  copy_layers(blocks(parts, t.groups), t.out);
  run_small(call, op, t, points_.M);
  if (t.groups > 1) add_groups(call, parts, t.groups, points_.M, P, out);
}

// z_dot_u1: (M, K, N, D[1]) in place of the first layer's product with u, scaled by `scale`; null:
// cotangents hold all layers of u.
template <class T>
void Linearization<T>::third_order(Call& call, const T* tangents, const HostStreams& v,
                                   const T* cotangents, const Stack<T>& z_dot_u1, T scale, T g_loss,
                                   bool hessian, T* out) const {
  const int64_t K = v.K;
  const HostStreams u = streams(call.workspace, K, true);
  Mixed<T, HostLayers> mixed;
  for (auto* array : {&mixed.z, &mixed.a, &mixed.z_bar}) array->resize(size_t(L_) + 1);
  for (int l = 1; l <= L_; ++l) {
    const size_t at = size_t(l);
    mixed.z_bar[at] = rows(call.workspace, 1, l);
    if (!hessian) continue;
    if (l > 1) mixed.z[at] = rows(call.workspace, 1, l);
    if (l < L_ && (l > 1 || smooth())) mixed.a[at] = rows(call.workspace, 1, l);
  }
  const HostBlocks V = blocks(tangents, K), U = blocks(cotangents, K);
  Grid<T> run(call, points_.M);
  tangent_passes(run, net_, U, u, hessian, z_dot_u1, scale);
  mixed_passes(run, net_, V, U, v, u, mixed, g_loss, hessian, blocks(out, 1), false);
}

template <class T>
void Linearization<T>::hvp_vjp(Call& call, const T* tangents, const T* cotangents, int64_t K,
                               Curvature curvature, T* out) const {
  const bool hessian = curvature == Curvature::kHessian;
  if (small(call, K, {SmallOp::kVjp})) {
    SmallTask<T> t = task(tangents, K, hessian);
    copy_layers(blocks(cotangents, K), t.cotangents);
    return small_third_order(call, SmallOp::kVjp, t, K, out);
  }
  const HostStreams v = streams(call.workspace, K, true);
  Grid<T> run(call, points_.M);
  tangent_passes(run, net_, blocks(tangents, K), v, hessian, Stack<T>{}, T(1));
  third_order(call, tangents, v, cotangents, Stack<T>{}, T(1), T(0), hessian, out);
}

// With few samples the first layer's block of u = H v is never formed (csrc/cpu/penalty-inl.h):
//   ||u_1||^2 = <G, Gamma G>,   u_1 [x; 1] = Gamma G,   G = z_bar_dot_1, Gamma = X X' + 1 1'
// Normal probes are drawn for the first layer too: factoring Gamma takes N dependent steps, which
// last longer here than the product with V_1.
template <class T>
bool Linearization<T>::gram_pays() const {
  return L_ >= 2 && points_.N <= 256 && points_.N < net_.D[0] &&
         int64_t(net_.D[0]) * net_.D[1] >= 16384;
}

// What a penalty keeps for its gradient.
template <class T>
struct Linearization<T>::Kept {
  HostStreams v;
  T* u;               // (M, K, P) H v_k
  Stack<T> z_dot_u1;  // (M, K, N, D[1]) u_1 [x; 1] where u_1 is not formed
};

template <class T>
typename Linearization<T>::Kept Linearization<T>::kept(Workspace& workspace, int64_t K) const {
  Kept k{streams(workspace, K, true), workspace.take<T>(points_.M * K * layout_.P), {}};
  if (gram_pays()) k.z_dot_u1 = rows(workspace, K, 1);
  return k;
}

// Tangents as rows: those given, or memory that the penalty keeps; `draw` writes the probes there.
template <class T>
const T* Linearization<T>::kept_rows(Call& call, const Tangents<T>& tangents, int64_t K,
                                     bool draw) const {
  if (!tangents.probes) return tangents.rows;
  T* rows = call.kept->template take<T>(points_.M * K * layout_.P);
  if (draw && !call.counting()) draw_probes(call, *tangents.probes, points_.M * K, layout_.P, rows);
  return rows;
}

// The task of a small network's penalty; its blocks draw signs themselves.
template <class T>
SmallTask<T> Linearization<T>::penalty_task(Call& call, const Tangents<T>& tangents, int64_t K,
                                            bool hessian, bool draw) const {
  const Probes* probes = tangents.probes;
  const bool signs = probes && probes->distribution == Distribution::kRademacher;
  SmallTask<T> t = task(signs ? nullptr : kept_rows(call, tangents, K, draw), K, hessian);
  if (signs) t.signs = {true, probes->seed, probes->first};
  return t;
}

template <class T>
void Linearization<T>::penalty(Call& call, const Tangents<T>& tangents, int64_t K,
                               Curvature curvature, double* value) const {
  const bool hessian = curvature == Curvature::kHessian;
  const bool gram = gram_pays();
  if (small_penalty(call, K)) {  // no product is kept: the gradient repeats them
    SmallTask<T> t = penalty_task(call, tangents, K, hessian, true);
    t.groups = groups(call, K);
    t.numbers = call.workspace.take<double>(points_.M * K);
    run_small(call, SmallOp::kSquares, t, points_.M);
    return Grid<T>(call, points_.M).models(MeanOverTangents{t.numbers, int(K), value});
  }
  const T* v = kept_rows(call, tangents, K, true);
  const Kept k = kept(*call.kept, K);
  const int64_t N = points_.N, P = layout_.P;
  const int64_t first = gram ? layout_.weight[2] : 0;
  Grid<T> run(call, points_.M);
  run.begin_sums(gram ? 2 : 1, int(K));
  tangent_passes(run, net_, blocks(v, K), k.v, hessian, Stack<T>{}, T(1));
  hvp_products(run, net_, k.v, blocks(k.u, K), hessian, gram ? 2 : 1);
  const Stack<T> u{k.u + first, P - first, K * P, P};
  run.sum(1, int(P - first), int(K), Dot<T>{u, u, 1.0});
  if (gram) {
    const Stack<T> x = net_.a[0], G = k.v.z_bar_dot[1];
    const Stack<T> gamma{call.workspace.take<T>(points_.M * N * N), N, N * N, 0};
    const Term<T> inner{x, x, 1}, product{gamma, G, 1};
    run.template multiply<Form::kForward>(&inner, 1, int(N), int(N), net_.D[0], 1,
                                          StoreShifted<T>{gamma, T(points_.spec->bias ? 1 : 0)});
    run.template multiply<Form::kBackward>(&product, 1, int(N), net_.D[1], int(N), int(K),
                                           StoreShifted<T>{k.z_dot_u1, T(0)});
    run.sum(int(N), net_.D[1], int(K), Dot<T>{G, k.z_dot_u1, 1.0});
  }
  double* totals = call.workspace.take<double>(points_.M * K);
  run.total(totals, nullptr);
  run.models(MeanOverTangents{totals, int(K), value});
}

// out = scale in for the entries `first`..P of rows (rows, P)
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const T* in, T scale, int64_t rows, int64_t P, int64_t first, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t width = P - first;
  if (i >= rows * width) return;
  const int64_t at = i / width * P + first + i % width;
  out[at] = scale * in[at];
}

template <class T>
void Linearization<T>::penalty_gradient(Call& call, const Tangents<T>& tangents, int64_t K,
                                        Curvature curvature, double g_loss, double g_penalty,
                                        T* out) const {
  // The cotangents are scaled, not the result: the loss gradient joins the same sums.
  const T scale = T(2.0 * g_penalty / double(K));
  if (small_penalty(call, K)) {
    SmallTask<T> t = penalty_task(call, tangents, K, curvature == Curvature::kHessian, false);
    t.g_loss = T(g_loss);
    t.scale = scale;
    return small_third_order(call, SmallOp::kPenaltyGradient, t, K, out);
  }
  const T* v = kept_rows(call, tangents, K, false);
  const Kept k = kept(*call.kept, K);
  const int64_t rows = points_.M * K;
  const int64_t P = layout_.P;
  const int64_t first = gram_pays() ? layout_.weight[2] : 0;
  T* u = call.workspace.take<T>(rows * P);
  if (!call.counting())
    launch("a scaling", scale_kernel<T>, (rows * (P - first) + kThreads - 1) / kThreads, kThreads,
           0, call.stream, k.u, scale, rows, P, first, u);
  third_order(call, v, k.v, u, k.z_dot_u1, scale, T(g_loss), curvature == Curvature::kHessian, out);
}

template class Linearization<float>;
template class Linearization<double>;

}  // namespace hvpfast::cuda
