// Small networks (small.h): the passes of passes.h by one block of threads.
#include "block.h"
#include "common/probes.h"  // integers only: normal probes need another compilation (draw.cu)
#include "small.h"

namespace hvpfast::cuda {

namespace {

// Shared memory handed out in order; without memory it only counts.
struct Shared {
  unsigned char* base = nullptr;
  size_t used = 0;
  template <class X>
  __host__ __device__ X* take(size_t count) {
    const size_t at = used;
    used += (count * sizeof(X) + 15) / 16 * 16;
    return base ? reinterpret_cast<X*>(base + at) : nullptr;
  }
};

// What a block has in shared memory.
template <class T>
struct Local {
  Net<T, SmallLayers> net;
  Blocks<T, SmallLayers> v, u;  // a tangent; a cotangent, or H v
  Streams<T, SmallLayers> v_dot, u_dot;
  Mixed<T, SmallLayers> mixed;
  SmallLayers<Stack<T>> product;  // V_l a_dot_{l-1}
  uint32_t* bits;                 // of drawn signs, as Philox gives them
};

// A matrix in shared memory. Rows are an odd number of entries apart: neighbouring threads that
// read neighbouring rows meet different banks.
template <class T>
__host__ __device__ Stack<T> matrix(Shared& shared, int rows, int cols) {
  const int ld = cols | 1;
  return {shared.take<T>(size_t(rows) * ld), ld, 0, 0};
}

constexpr int kSignsPerBlock = 128;  // of one counter of Philox

template <class T>
__host__ __device__ int num_params(const Net<T, SmallLayers>& net) {
  int P = 0;
  for (int l = 1; l <= net.L; ++l) P += net.D[l] * (net.D[l - 1] + (net.params.b[l] ? 1 : 0));
  return P;
}

template <class T>
__host__ __device__ void place_blocks(Shared& shared, const Net<T, SmallLayers>& net,
                                      Blocks<T, SmallLayers>& b) {
  for (int l = 1; l <= net.L; ++l) {
    b.W[l] = matrix<T>(shared, net.D[l], net.D[l - 1]);
    b.b[l] = net.params.b[l] ? matrix<T>(shared, 1, net.D[l]) : Stack<T>{};
  }
}

template <class T>
__host__ __device__ void place_streams(Shared& shared, const Net<T, SmallLayers>& net, bool smooth,
                                       bool backward, bool third, Streams<T, SmallLayers>& s) {
  s.K = 1;
  for (int l = 1; l <= net.L; ++l) {
    const int N = net.N;
    const int D = net.D[l];
    const bool last = l == net.L;
    s.z_bar_dot[l] = backward || last ? matrix<T>(shared, N, D) : Stack<T>{};
    s.z_dot[l] = smooth || last ? matrix<T>(shared, N, D) : Stack<T>{};
    s.a_dot[l] = last ? Stack<T>{} : matrix<T>(shared, N, D);
    s.a_bar_dot[l] = smooth && third && !last ? matrix<T>(shared, N, D) : Stack<T>{};
  }
}

// Places the arrays of an operation: the host counts them, the device uses them. Of `task` only
// matters which arrays it has.
template <class T>
__host__ __device__ void place(Shared& shared, SmallOp op, const SmallTask<T>& task,
                               Local<T>& local) {
  const Net<T, SmallLayers>& from = task.net;
  Net<T, SmallLayers>& net = local.net;
  const int L = from.L, N = from.N;
  const bool third = op == SmallOp::kVjp || op == SmallOp::kPenaltyGradient;
  const bool smooth = L > 1 && from.s2[1];
  net = from;
  const auto copy_of = [&](Stack<T>& to, int rows, int cols) {
    if (to) to = matrix<T>(shared, rows, cols);
  };
  place_blocks(shared, from, net.params);
  for (int l = 0; l <= L; ++l) {
    const int D = from.D[l];
    if (l < L) copy_of(net.a[l], N, D);
    if (l > 0) copy_of(net.z_bar[l], N, D);
    if (l == 0 || l == L) continue;
    copy_of(net.s1[l], N, D);
    copy_of(net.s2[l], N, D);
    if (third) {
      copy_of(net.d2[l], N, D);
      copy_of(net.d3[l], N, D);
    } else {
      net.d2[l] = net.d3[l] = {};
    }
  }
  copy_of(net.p, N, from.D[L]);
  copy_of(net.weight, N, 1);

  if (op == SmallOp::kSquares || op == SmallOp::kPenaltyGradient)
    local.bits = shared.take<uint32_t>(
        size_t((num_params(from) + kSignsPerBlock - 1) / kSignsPerBlock) * (kSignsPerBlock / 32));
  place_blocks(shared, from, local.v);
  place_streams(shared, from, smooth, op != SmallOp::kQuadratic, third, local.v_dot);
  if (third || op == SmallOp::kSquares) place_blocks(shared, from, local.u);
  if (op == SmallOp::kQuadratic)
    for (int l = 2; task.hessian && l <= L; ++l) local.product[l] = matrix<T>(shared, N, from.D[l]);
  if (!third) return;
  place_streams(shared, from, smooth, true, true, local.u_dot);
  for (int l = 1; l <= L; ++l) {
    const int D = from.D[l];
    local.mixed.z_bar[l] = matrix<T>(shared, N, D);
    local.mixed.z[l] = task.hessian && l > 1 ? matrix<T>(shared, N, D) : Stack<T>{};
    local.mixed.a[l] =
        task.hessian && l < L && (l > 1 || smooth) ? matrix<T>(shared, N, D) : Stack<T>{};
  }
}

template <class T>
__device__ void copy(const Stack<T>& to, const Stack<T>& from, int64_t m, int64_t k, int rows,
                     int cols) {
  if (!to) return;
  for (int entry = int(threadIdx.x); entry < rows * cols; entry += kThreads)
    to(0, 0, entry / cols, entry % cols) = from(m, k, entry / cols, entry % cols);
}

template <class T>
__device__ void copy_blocks(const Net<T, SmallLayers>& net, const Blocks<T, SmallLayers>& to,
                            const Blocks<T, SmallLayers>& from, int64_t m, int64_t k) {
  for (int l = 1; l <= net.L; ++l) {
    copy(to.W[l], from.W[l], m, k, net.D[l], net.D[l - 1]);
    copy(to.b[l], from.b[l], m, k, 1, net.D[l]);
  }
}

// Probe `number` of the signs: entry i, counted through W_1, b_1, W_2, ..., is +1 where bit i of
// the words is clear.
template <class T>
__device__ void draw_signs(const Net<T, SmallLayers>& net, const Signs& signs, uint32_t number,
                           uint32_t* bits, const Blocks<T, SmallLayers>& to) {
  const int blocks = (num_params(net) + kSignsPerBlock - 1) / kSignsPerBlock;
  for (int block = int(threadIdx.x); block < blocks; block += kThreads) {
    uint32_t word[4][1];
    philox(signs.seed, uint64_t(block), number, Stream::kRademacher, word);
    for (int w = 0; w < 4; ++w) bits[4 * block + w] = word[w][0];
  }
  __syncthreads();
  int first = 0;
  const auto fill = [&](const Stack<T>& x, int rows, int cols) {
    if (!x) return;
    for (int entry = int(threadIdx.x); entry < rows * cols; entry += kThreads) {
      const int i = first + entry;
      x(0, 0, entry / cols, entry % cols) = T(1 - 2 * int((bits[i / 32] >> (i % 32)) & 1));
    }
    first += rows * cols;
  };
  for (int l = 1; l <= net.L; ++l) {
    fill(to.W[l], net.D[l], net.D[l - 1]);
    fill(to.b[l], 1, net.D[l]);
  }
}

template <class T>
__device__ void copy_net(const Net<T, SmallLayers>& to, const Net<T, SmallLayers>& from,
                         int64_t m) {
  copy_blocks(from, to.params, from.params, m, 0);
  for (int l = 0; l <= from.L; ++l) {
    const int N = from.N;
    const int D = from.D[l];
    if (l < from.L) copy(to.a[l], from.a[l], m, 0, N, D);
    if (l > 0) copy(to.z_bar[l], from.z_bar[l], m, 0, N, D);
    if (l == 0 || l == from.L) continue;
    copy(to.s1[l], from.s1[l], m, 0, N, D);
    copy(to.s2[l], from.s2[l], m, 0, N, D);
    copy(to.d2[l], from.d2[l], m, 0, N, D);
    copy(to.d3[l], from.d3[l], m, 0, N, D);
  }
  copy(to.p, from.p, m, 0, from.N, from.D[from.L]);
  copy(to.weight, from.weight, m, 0, from.N, 1);
}

// Multiplies b by `factor` in place or, with `square`, adds the squares of b to run.total.
template <class T>
__device__ void scale_or_square(Block<T>& run, const Net<T, SmallLayers>& net,
                                const Blocks<T, SmallLayers>& b, T factor, bool square) {
  const auto each = [&](const Stack<T>& x, int rows, int cols) {
    if (!x) return;
    for (int entry = int(threadIdx.x); entry < rows * cols; entry += kThreads) {
      T& value = x(0, 0, entry / cols, entry % cols);
      if (square) {
        run.total += double(value) * double(value);
      } else {
        value *= factor;
      }
    }
  };
  for (int l = 1; l <= net.L; ++l) {
    each(b.W[l], net.D[l], net.D[l - 1]);
    each(b.b[l], 1, net.D[l]);
  }
  __syncthreads();
}

// Two blocks per multiprocessor hide each other's barriers, where registers and shared memory are
// enough for two.
template <class T, SmallOp op>
constexpr int kBlocks = sizeof(T) == 4 && (op == SmallOp::kHvp || op == SmallOp::kSquares) ? 2 : 1;

template <class T, SmallOp op>
__global__ void __launch_bounds__(kThreads, kBlocks<T, op>)
    small_kernel(const __grid_constant__ SmallTask<T> task) {
  Shared shared{dynamic_shared()};
  Local<T>& local = *shared.take<Local<T>>(1);
  if (threadIdx.x == 0) place(shared, op, task, local);
  __syncthreads();
  constexpr bool third = op == SmallOp::kVjp || op == SmallOp::kPenaltyGradient;
  const bool hessian = task.hessian;
  const int group = int(blockIdx.x) % task.groups;
  Block<T> run;
  run.m = blockIdx.x / task.groups;
  copy_net(local.net, task.net, run.m);
  for (int k = group; k < task.K; k += task.groups) {
    run.k = k;
    run.total = 0;
    constexpr bool draws = op == SmallOp::kSquares || op == SmallOp::kPenaltyGradient;
    if (draws && task.signs.drawn) {
      const uint32_t number = task.signs.first + uint32_t(run.m * task.K + k);
      draw_signs(local.net, task.signs, number, local.bits, local.v);
    } else {
      copy_blocks(local.net, local.v, task.tangents, run.m, k);
    }
    if constexpr (op == SmallOp::kVjp) copy_blocks(local.net, local.u, task.cotangents, run.m, k);
    __syncthreads();
    const Stack<T> none{};
    if constexpr (op == SmallOp::kQuadratic) {
      tangent_forward(run, local.net, local.v, local.v_dot, none, T(1));
      loss_hvp(run, local.net, local.v_dot);
      quadratic_sums(run, local.net, local.v, local.v_dot, local.product, hessian);
    } else {
      tangent_passes(run, local.net, local.v, local.v_dot, hessian, none, T(1));
      if constexpr (op == SmallOp::kHvp)
        hvp_products(run, local.net, local.v_dot, task.out, hessian, 1);
      if constexpr (op == SmallOp::kSquares || op == SmallOp::kPenaltyGradient) {
        hvp_products(run, local.net, local.v_dot, local.u, hessian, 1);
        scale_or_square(run, local.net, local.u, task.scale, op == SmallOp::kSquares);
      }
    }
    if constexpr (third) {
      tangent_passes(run, local.net, local.u, local.u_dot, hessian, none, T(1));
      const T g_loss = k == 0 ? task.g_loss : T(0);  // once per model
      run.k = group;  // of what follows only out has tangents: the parts of the groups
      mixed_passes(run, local.net, local.v, local.u, local.v_dot, local.u_dot, local.mixed, g_loss,
                   hessian, task.out, k > group);
    }
    if constexpr (op == SmallOp::kQuadratic || op == SmallOp::kSquares) {
      const double sum = block_sum(run.total);
      const int64_t at = run.m * task.K + k;
      if (threadIdx.x == 0) {
        if constexpr (op == SmallOp::kQuadratic) task.quadratic[at] = T(sum);
        if constexpr (op == SmallOp::kSquares) task.numbers[at] = sum;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_groups_kernel(const T* parts, int groups, int64_t M, int64_t P, T* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= M * P) return;
  const int64_t m = at / P, i = at % P;
  T sum = T(0);
  for (int g = 0; g < groups; ++g) sum += parts[(m * groups + g) * P + i];
  out[at] = sum;
}

}  // namespace

template <class T>
size_t small_bytes(SmallOp op, const SmallTask<T>& task) {
  if (op == SmallOp::kPrimal || op == SmallOp::kGradient) return 0;
  Shared shared;
  Local<T> local;
  shared.take<Local<T>>(1);
  place(shared, op, task, local);
  return shared.used;
}

template <class T, SmallOp op>
void launch_small(Call& call, const SmallTask<T>& task, int64_t M) {
  const size_t bytes = small_bytes(op, task);
  // All threads of a program ask for the same, the most: none takes it from another's launch.
  if (bytes + kStaticSharedBytes > kDefaultSharedBytes)
    allow_shared_bytes(small_kernel<T, op>, call.device.shared_bytes - kStaticSharedBytes);
  launch("an operation of a small network", small_kernel<T, op>, M * task.groups, kThreads, bytes,
         call.stream, task);
}

template <class T>
void run_small(Call& call, SmallOp op, const SmallTask<T>& task, int64_t M) {
  if (call.counting()) return;
  switch (op) {
    case SmallOp::kPrimal:
    case SmallOp::kGradient:
      return run_small_primal(call, op, task, M);
    case SmallOp::kHvp:
      return launch_small<T, SmallOp::kHvp>(call, task, M);
    case SmallOp::kQuadratic:
      return launch_small<T, SmallOp::kQuadratic>(call, task, M);
    case SmallOp::kSquares:
      return launch_small<T, SmallOp::kSquares>(call, task, M);
    case SmallOp::kVjp:
      return launch_small<T, SmallOp::kVjp>(call, task, M);
    case SmallOp::kPenaltyGradient:
      return launch_small<T, SmallOp::kPenaltyGradient>(call, task, M);
  }
}

template <class T>
void add_groups(Call& call, const T* parts, int groups, int64_t M, int64_t P, T* out) {
  if (!call.counting())
    launch("a sum over groups", add_groups_kernel<T>, (M * P + kThreads - 1) / kThreads, kThreads,
           0, call.stream, parts, groups, M, P, out);
}

#define HVPFAST_SMALL(T)                                                 \
  template size_t small_bytes(SmallOp, const SmallTask<T>&);             \
  template void run_small(Call&, SmallOp, const SmallTask<T>&, int64_t); \
  template void add_groups(Call&, const T*, int, int64_t, int64_t, T*);
HVPFAST_SMALL(float)
HVPFAST_SMALL(double)
#undef HVPFAST_SMALL

}  // namespace hvpfast::cuda
