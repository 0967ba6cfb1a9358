// The residuals that linearize keeps, in panels (panels, d, kPanel): kPanel samples side by side, N
// padded with samples of weight zero.
#pragma once
#include <vector>

namespace hvpfast {

template <class T>
struct Residuals {
  T* x = nullptr;      // (panels, D[0])  a_0; null where it is packed again by each product
  std::vector<T*> a;   // (panels, D[l])  act(z_l), l = 1..L-1
  std::vector<T*> s1;  // (panels, D[l])  act'(z_l)
  std::vector<T*> s2;  // (panels, D[l])  act''(z_l) a_bar_l; null for piecewise linear activations
  std::vector<T*> z_bar;  // (panels, D[l])  dL/dz_l, l = 1..L
  std::vector<T*> z;      // (panels, D[l])  third order, smooth activations only
  std::vector<T*> a_bar;  // (panels, D[l])  dL/da_l, third order, smooth activations only
  T* p = nullptr;         // (panels, D[L])  softmax(z_L), cross-entropy only
  T* weight = nullptr;    // (panels, 1)     w of losses.h; zero for padding
};

}  // namespace hvpfast
