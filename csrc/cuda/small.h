// Small networks: a whole operation in one launch. A block of threads takes one model and a group
// of its tangents, and holds weights, residuals and streams in its shared memory.
#pragma once
#include "call.h"
#include "stack.h"

namespace hvpfast::cuda {

enum class SmallOp { kPrimal, kGradient, kHvp, kQuadratic, kSquares, kVjp, kPenaltyGradient };

// Rademacher tangents that the blocks draw themselves: number first + m K + k
// (csrc/common/probes.h).
struct Signs {
  bool drawn = false;
  uint64_t seed = 0;
  uint32_t first = 0;
};

// One operation on M models. Arrays are on the device, tangents and cotangents (M, K, P).
template <class T>
struct SmallTask {
  Net<T, SmallLayers> net;
  Blocks<T, SmallLayers> tangents, cotangents;
  Signs signs;                 // in place of tangents; kSquares and kPenaltyGradient
  Blocks<T, SmallLayers> out;  // (M, P), (M, K, P), or the groups' parts of a sum (M, groups, P)
  int K, groups;
  bool hessian;
  T g_loss, scale;       // kPenaltyGradient: cotangents are scale H v_k
  double* numbers;       // kSquares: ||H v_k||^2 (M, K)
  T* quadratic;          // kQuadratic (M, K)
  Scalars* scalars;      // kPrimal
  Stack<double> losses;  // kPrimal
};
static_assert(sizeof(SmallTask<double>) <= 4000, "the arguments of a kernel have 4 KiB");

// Static shared memory of a block, that of its sums, at most.
constexpr size_t kStaticSharedBytes = 4096;

// Dynamic shared memory of a block that runs the operation.
template <class T>
size_t small_bytes(SmallOp op, const SmallTask<T>& task);

template <class T>
void run_small(Call& call, SmallOp op, const SmallTask<T>& task, int64_t M);
template <class T>
void run_small_primal(Call& call, SmallOp op, const SmallTask<T>& task, int64_t M);

// out (M, P) = sum over groups of parts (M, groups, P), in order
template <class T>
void add_groups(Call& call, const T* parts, int groups, int64_t M, int64_t P, T* out);

}  // namespace hvpfast::cuda
