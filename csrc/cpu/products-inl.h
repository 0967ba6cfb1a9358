// Sums over samples, the last step of every gradient and product:
//   out_W (D[l], D[l-1]) = sum over factors, samples n of A(:, n) B(n, :),    out_b = sum_n A_0(:,
//   n)
// A in panels; B, the other quantity's samples as rows, is packed into strips of kPanel features as
// it is used. Tasks own strips of the output and walk the samples in order, so that no sum is ever
// split between threads.
#pragma once
#include "tangents-inl.h"

namespace hvpfast::HVPFAST_ISA {

constexpr int64_t kProductPanels = 16;  // panels of one pass: their strips stay in the caches
constexpr int64_t kTaskStrips = 8;      // strips sharing one pass over A
constexpr int64_t kPassFactors =
    2;  // a sum in registers has at most kPassFactors * kProductPanels * kPanel terms

// One term A B; output k reads a + k a_k and b + k b_k. Both point to the first panel of the
// product.
template <class T>
struct CpuLinearization<T>::Factor {
  const T* a;
  ptrdiff_t a_k;
  const T* b;  // panels (panels, D[l-1], kPanel), or null: the rows of x
  ptrdiff_t b_k;
};

template <class T>
struct CpuLinearization<T>::Product {
  int l;
  int64_t K;
  T* out;  // (K, P): layer l of it is written
  Range panels;
  bool accumulate;  // add to out: earlier panels are already there
  std::vector<Factor> factors;
  bool bias = true;  // write out_b too
};

template <class T>
size_t CpuLinearization<T>::product_scratch(int64_t panels) const {
  return size_t(kPassFactors * kTaskStrips * std::min(panels, kProductPanels) * NR * NR);
}

template <class T>
void CpuLinearization<T>::run_product(const Product& product, Range strips, Range outputs,
                                      T* scratch) const {
  const int l = product.l;
  const int64_t d_out = D_[l], d_in = D_[l - 1], P = layout_.P;
  const auto width_of = [&](int64_t strip) {
    return int(std::min<int64_t>(NR, d_in - strip * NR));
  };
  const int64_t num_factors = int64_t(product.factors.size());
  for (int64_t panel = product.panels.begin; panel < product.panels.end; panel += kProductPanels) {
    const int64_t count = std::min(kProductPanels, product.panels.end - panel),
                  offset = panel - product.panels.begin;
    const auto strip_at = [&](int64_t f, int64_t strip) {
      return scratch + ((f % kPassFactors) * kTaskStrips + strip - strips.begin) * count * NR * NR;
    };
    const auto pack = [&](int64_t f, int64_t k) {
      const Factor& factor = product.factors[size_t(f)];
      for (int64_t strip = strips.begin; strip < strips.end; ++strip)
        for (int64_t p = 0; p < count; ++p) {
          T* to = strip_at(f, strip) + p * NR * NR;
          if (factor.b) {
            strip_from_panel(factor.b + k * factor.b_k + ((offset + p) * d_in + strip * NR) * NR,
                             width_of(strip), to);
          } else {
            const Range samples = rows_of_samples(panel + p);
            strip_from_rows(problem_.x + samples.begin * problem_.x_stride + strip * NR,
                            problem_.x_stride, int(samples.size()), width_of(strip), to);
          }
        }
    };
    for (int64_t pass = 0; pass < num_factors; pass += kPassFactors) {
      const int64_t pass_end = std::min(num_factors, pass + kPassFactors);
      const bool accumulate = product.accumulate || panel > product.panels.begin || pass > 0;
      for (int64_t k = outputs.begin; k < outputs.end; ++k) {
        for (int64_t f = pass; f < pass_end; ++f)
          if (k == outputs.begin || product.factors[size_t(f)].b_k) pack(f, k);
        T* out = product.out + k * P + layout_.weight[l];
        for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
          const int width = width_of(strip);
          for_row_blocks<T, false>(
              {0, d_out}, [&](int64_t i, int64_t rows, MicroKernel<T, false> kernel) {
                Term<T> terms[kPassFactors];
                ptrdiff_t strides[kPassFactors];
                for (int64_t f = pass; f < pass_end; ++f) {
                  const Factor& factor = product.factors[size_t(f)];
                  terms[f - pass] = {factor.a + k * factor.a_k + (offset * d_out + i) * NR,
                                     strip_at(f, strip),
                                     NR,
                                     int(count),
                                     d_out * NR,
                                     NR * NR};
                  strides[f - pass] = NR;
                }
                T* c = out + i * d_in + strip * NR;
                if (width == NR) {
                  kernel(terms, int(pass_end - pass), strides, c, d_in, accumulate);
                } else {  // the last, narrow strip goes through a full one
                  alignas(64) T tile[kRowBlock * NR];
                  if (accumulate)
                    for (int64_t row = 0; row < rows; ++row)
                      std::copy(c + row * d_in, c + row * d_in + width, tile + row * NR);
                  kernel(terms, int(pass_end - pass), strides, tile, NR, accumulate);
                  for (int64_t row = 0; row < rows; ++row)
                    std::copy(tile + row * NR, tile + row * NR + width, c + row * d_in);
                }
              });
        }
      }
    }
  }
  if (product.bias && strips.begin == 0 && layout_.bias[l] >= 0) {
    const Factor& factor = product.factors[0];
    for (int64_t k = outputs.begin; k < outputs.end; ++k) {
      T* out = product.out + k * P + layout_.bias[l];
      for (int64_t i = 0; i < d_out; i += W) {
        const int64_t rows = std::min<int64_t>(W, d_out - i);
        Vec<T> sum[W] = {};
        for (int64_t p = 0; p < product.panels.size(); ++p) {
          const T* a = factor.a + k * factor.a_k + (p * d_out + i) * NR;
          for (int64_t row = 0; row < rows; ++row)
            sum[row] += load(a + row * NR) + load(a + row * NR + W);
        }
        const Vec<T> total = sums_of_lanes<T>(sum);
        for (int64_t row = 0; row < rows; ++row)
          out[i + row] = product.accumulate ? out[i + row] + total[row] : total[row];
      }
    }
  }
}

template <class T>
void CpuLinearization<T>::run_products(Team& team, const std::vector<Product>& products,
                                       T* const* scratch) const {
  // A task is a block of strips for a block of outputs: enough of them for every member to be busy,
  // and no more, because the strips of a block share passes over A and the outputs share packed
  // strips.
  const auto strips_of = [&](const Product& product) { return (D_[product.l - 1] + NR - 1) / NR; };
  const int64_t wanted = team.size == 1 ? 1 : 8 * team.size;
  int64_t total = 0;
  for (const Product& product : products) total += strips_of(product);
  const int64_t width = std::clamp<int64_t>(total / wanted, 1, kTaskStrips);
  const auto blocks_of = [&](const Product& product) {
    return std::clamp<int64_t>(wanted / total, 1, product.K);
  };
  const auto tasks_of = [&](const Product& product) {
    return (strips_of(product) + width - 1) / width * blocks_of(product);
  };
  int64_t tasks = 0;
  for (const Product& product : products) tasks += tasks_of(product);
  team.for_each(tasks, [&](int64_t task) {
    size_t i = 0;
    for (; task >= tasks_of(products[i]); ++i) task -= tasks_of(products[i]);
    const Product& product = products[i];
    const int64_t blocks = blocks_of(product), first = task / blocks * width, block = task % blocks;
    run_product(product, {first, std::min(strips_of(product), first + width)},
                {product.K * block / blocks, product.K * (block + 1) / blocks}, scratch[team.rank]);
  });
}

}  // namespace hvpfast::HVPFAST_ISA
