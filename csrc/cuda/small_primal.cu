// The primal passes and the gradient of small networks (small.h), in the device's memory: what they
// read and write once. Apart from small.cu, whose kernels leave each function fewer registers.
#include "block.h"
#include "small.h"

namespace hvpfast::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    primal_small_kernel(const __grid_constant__ SmallTask<T> task, bool gradient) {
  Block<T> run;
  run.m = blockIdx.x;
  if (gradient) {
    gradient_products(run, task.net, task.out);
  } else {
    primal_passes(run, task.net, task.scalars, task.losses);
  }
}

}  // namespace

template <class T>
void run_small_primal(Call& call, SmallOp op, const SmallTask<T>& task, int64_t M) {
  launch("the primal passes of a small network", primal_small_kernel<T>, M, kThreads, 0,
         call.stream, task, op == SmallOp::kGradient);
}
template void run_small_primal(Call&, SmallOp, const SmallTask<float>&, int64_t);
template void run_small_primal(Call&, SmallOp, const SmallTask<double>&, int64_t);

}  // namespace hvpfast::cuda
