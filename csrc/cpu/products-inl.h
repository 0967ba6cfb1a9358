// Sums over samples, the last step of every gradient and product:
//   out_W (D[l], D[l-1]) = sum over factors, samples n of A(:, n) B(n, :)
//   out_b (D[l])         = sum over samples n of A_0(:, n)
// A lies in panels. B, the other quantity with samples as rows, is packed into strips of kPanel
// features as it is used. Tasks own strips of the output and walk the samples in order: no sum is
// split between threads.
#pragma once
#include "tangents-inl.h"

namespace hvpfast::HVPFAST_ISA {

constexpr int64_t kProductPanels = 16;  // panels of one pass: their strips stay in the caches
constexpr int64_t kTaskStrips = 8;      // strips sharing one pass over A
// Factors of one pass: a sum in registers has at most kPassFactors * kProductPanels * kPanel terms.
constexpr int64_t kPassFactors = 2;

// One term A B; output k reads a + k a_k and b + k b_k, both from the product's first panel on.
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
  T* out;  // (K, P), of which layer l is written
  Range panels;
  bool accumulate;  // add to out: earlier panels are already there
  std::vector<Factor> factors;
  bool bias = true;  // write out_b too
};

template <class T>
size_t CpuLinearization<T>::product_scratch(int64_t panels) const {
  return size_t(kPassFactors * kTaskStrips * std::min(panels, kProductPanels) * NR * NR);
}

// Some strips of a product, over the panels of one pass.
template <class T>
struct CpuLinearization<T>::StripPass {
  const CpuLinearization& lin;
  const Product& product;
  Range strips;
  Range panels;
  T* scratch;  // (kPassFactors, kTaskStrips, panels, kPanel, kPanel)

  const int64_t offset = panels.begin - product.panels.begin;
  const int64_t d_out = lin.D_[product.l];
  const int64_t d_in = lin.D_[product.l - 1];

  int width(int64_t strip) const { return int(std::min<int64_t>(NR, d_in - strip * NR)); }
  T* packed(int64_t f, int64_t strip) const {
    return scratch +
           ((f % kPassFactors) * kTaskStrips + strip - strips.begin) * panels.size() * NR * NR;
  }

  // B of factor f, for output k.
  HVP_INLINE void pack(int64_t f, int64_t k) const {
    const Factor& factor = product.factors[size_t(f)];
    const Problem<T>& problem = lin.problem_;
    for (int64_t strip = strips.begin; strip < strips.end; ++strip)
      for (int64_t p = 0; p < panels.size(); ++p) {
        T* to = packed(f, strip) + p * NR * NR;
        if (factor.b) {
          strip_from_panel(factor.b + k * factor.b_k + ((offset + p) * d_in + strip * NR) * NR,
                           width(strip), to);
        } else {
          const Range samples = lin.rows_of_samples(panels.begin + p);
          strip_from_rows(problem.x + samples.begin * problem.x_stride + strip * NR,
                          problem.x_stride, int(samples.size()), width(strip), to);
        }
      }
  }

  // One strip of out_W, for output k: the sum of the factors, packed before.
  HVP_INLINE void multiply(int64_t k, int64_t strip, Range factors, bool accumulate) const {
    T* out = product.out + k * lin.layout_.P + lin.layout_.weight[product.l] + strip * NR;
    const int columns = width(strip);
    for_row_blocks<T, false>(
        {0, d_out}, [&](int64_t i, int64_t rows, MicroKernel<T, false> kernel) {
          Term<T> terms[kPassFactors];
          ptrdiff_t strides[kPassFactors];
          for (int64_t f = factors.begin; f < factors.end; ++f) {
            const Factor& factor = product.factors[size_t(f)];
            const T* a = factor.a + k * factor.a_k + (offset * d_out + i) * NR;
            terms[f - factors.begin] = {a,          packed(f, strip), NR, int(panels.size()),
                                        d_out * NR, NR * NR};
            strides[f - factors.begin] = NR;
          }
          T* c = out + i * d_in;
          if (columns == NR) {
            kernel(terms, int(factors.size()), strides, c, d_in, accumulate);
            return;
          }
          // The last, narrow strip goes through a full one.
          alignas(64) T tile[kRowBlock * NR];
          if (accumulate)
            for (int64_t row = 0; row < rows; ++row)
              std::copy(c + row * d_in, c + row * d_in + columns, tile + row * NR);
          kernel(terms, int(factors.size()), strides, tile, NR, accumulate);
          for (int64_t row = 0; row < rows; ++row)
            std::copy(tile + row * NR, tile + row * NR + columns, c + row * d_in);
        });
  }
};

template <class T>
void CpuLinearization<T>::run_product(const Product& product, Range strips, Range outputs,
                                      T* scratch) const {
  const int64_t num_factors = int64_t(product.factors.size());
  const Range all = product.panels;
  for (int64_t panel = all.begin; panel < all.end; panel += kProductPanels) {
    const Range panels{panel, std::min(all.end, panel + kProductPanels)};
    const StripPass pass{*this, product, strips, panels, scratch};
    for (int64_t first = 0; first < num_factors; first += kPassFactors) {
      const Range factors{first, std::min(num_factors, first + kPassFactors)};
      const bool accumulate = product.accumulate || panel > all.begin || first > 0;
      for (int64_t k = outputs.begin; k < outputs.end; ++k) {
        for (int64_t f = factors.begin; f < factors.end; ++f)
          if (k == outputs.begin || product.factors[size_t(f)].b_k) pass.pack(f, k);
        for (int64_t strip = strips.begin; strip < strips.end; ++strip)
          pass.multiply(k, strip, factors, accumulate);
      }
    }
  }
  if (product.bias && strips.begin == 0 && layout_.bias[product.l] >= 0)
    bias_sums(product, outputs);
}

// out_b of some outputs.
template <class T>
void CpuLinearization<T>::bias_sums(const Product& product, Range outputs) const {
  const int64_t d_out = D_[product.l];
  const Factor& factor = product.factors[0];
  for (int64_t k = outputs.begin; k < outputs.end; ++k) {
    T* out = product.out + k * layout_.P + layout_.bias[product.l];
    for (int64_t i = 0; i < d_out; i += W) {
      const int64_t rows = std::min<int64_t>(W, d_out - i);
      const Vec<T> total = sums_over_samples(factor.a + k * factor.a_k + i * NR, rows,
                                             product.panels.size(), d_out * NR);
      for (int64_t row = 0; row < rows; ++row)
        out[i + row] = product.accumulate ? out[i + row] + total[row] : total[row];
    }
  }
}

template <class T>
void CpuLinearization<T>::run_products(Team& team, const std::vector<Product>& products,
                                       T* const* scratch) const {
  // A task is a block of strips for a block of outputs. There are enough tasks to keep every member
  // busy and no more: the strips of a block share passes over A, and its outputs share packed
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
    const int64_t blocks = blocks_of(product);
    const int64_t first = task / blocks * width;
    const int64_t block = task % blocks;
    run_product(product, {first, std::min(strips_of(product), first + width)},
                {product.K * block / blocks, product.K * (block + 1) / blocks}, scratch[team.rank]);
  });
}

}  // namespace hvpfast::HVPFAST_ISA
