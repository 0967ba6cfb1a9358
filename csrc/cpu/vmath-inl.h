// Elementary functions on vectors: Cody-Waite range reduction with the rational and polynomial
// approximations of the Cephes library (S. L. Moshier, netlib.org/cephes). The relative error is
// below 2 ulp on the ranges stated.
#pragma once
#include <cmath>
#include <limits>

#include "simd-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T>
HVP_INLINE Vec<T> select(IntVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
template <class T>
HVP_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
HVP_INLINE Vec<T> vabs(Vec<T> x) {
  return x < 0 ? -x : x;
}

// Horner's rule: c[0] x^n + ... + c[n].
template <class T, int n>
HVP_INLINE Vec<T> polynomial(Vec<T> x, const double (&c)[n]) {
  Vec<T> r = broadcast(T(c[0]));
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) r = r * x + T(c[i]);
  return r;
}

// exp(x) for x <= 0; 0 where exp(x) is below the smallest normal number; NaN stays NaN.
template <class T>
HVP_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr T kSmallest = kFloat ? T(-87.3) : T(-708.3);
  // 1.5 * 2^mantissa: adding it rounds to an integer.
  constexpr T kShift = kFloat ? T(12582912.0) : T(6755399441055744.0);
  const Vec<T> clamped = select<T>(x < kSmallest, broadcast(kSmallest), x);
  const Vec<T> shifted = clamped * T(1.4426950408889634) + kShift;
  const Vec<T> n = shifted - kShift;
  Vec<T> r;
  Vec<T> e;
  if constexpr (kFloat) {
    r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    constexpr double c[] = {1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
                            4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1};
    e = polynomial<T>(r, c) * (r * r) + r + T(1);
  } else {
    r = clamped - n * 6.93145751953125E-1;
    r = r - n * 1.42860682030941723212E-6;
    constexpr double p[] = {1.26177193074810590878E-4, 3.02994407707441961300E-2,
                            9.99999999999999999910E-1};
    constexpr double q[] = {3.00198505138664455042E-6, 2.52448340349684104192E-3,
                            2.27265548208155028766E-1, 2.00000000000000000009E0};
    const Vec<T> r2 = r * r;
    const Vec<T> rp = r * polynomial<T>(r2, p);
    e = T(1) + T(2) * rp / (polynomial<T>(r2, q) - rp);
  }
  // 2^n from the low bits of the shifted number, put in the exponent field.
  constexpr int kMantissaBits = kFloat ? 23 : 52;
  constexpr int kBias = kFloat ? 127 : 1023;
  const IntVec<T> bits = ((IntVec<T>)shifted + kBias) << kMantissaBits;
  return select<T>(x < kSmallest, Vec<T>{}, e * (Vec<T>)bits);
}

// log(x) for normal x > 0; NaN stays NaN.
template <class T>
HVP_INLINE Vec<T> log_positive(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kMantissaBits = kFloat ? 23 : 52;
  constexpr int kBias = kFloat ? 127 : 1023;
  using I = IntVec<T>;
  const I bits = (I)x;
  I exponent = (bits >> kMantissaBits) - (kBias - 1);
  // m in [0.5, 1)
  Vec<T> m =
      (Vec<T>)((bits &
                ((typename std::conditional_t<kFloat, int32_t, int64_t>(1) << kMantissaBits) - 1)) |
               (typename std::conditional_t<kFloat, int32_t, int64_t>(kBias - 1) << kMantissaBits));
  const I low = m < T(0.70710678118654752440);
  exponent += low;  // a true lane is -1
  m = select<T>(low, m + m, m) - T(1);
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> m2 = m * m;
  Vec<T> y;
  if constexpr (kFloat) {
    constexpr double c[] = {7.0376836292E-2,  -1.1514610310E-1, 1.1676998740E-1,
                            -1.2420140846E-1, 1.4249322787E-1,  -1.6668057665E-1,
                            2.0000714765E-1,  -2.4999993993E-1, 3.3333331174E-1};
    y = m * m2 * polynomial<T>(m, c);
  } else {
    constexpr double p[] = {1.01875663804580931796E-4, 4.97494994976747001425E-1,
                            4.70579119878881725854E0,  1.44989225341610930846E1,
                            1.79368678507819816313E1,  7.70838733755885391666E0};
    constexpr double q[] = {1.0,
                            1.12873587189167450590E1,
                            4.52279145837532221105E1,
                            8.29875266912776603211E1,
                            7.11544750618563894466E1,
                            2.31251620126765340583E1};
    y = m * m2 * polynomial<T>(m, p) / polynomial<T>(m, q);
  }
  y = y - e * T(2.121944400546905827679e-4);
  y = y - T(0.5) * m2;
  return m + y + e * T(0.693359375) + (x - x);  // the bits of a NaN look like a number above
}

// log(1 + x) = log(u) + (x - (u - 1)) / u with u = 1 + x rounded, for 0 <= x <= 1. The relative
// error is a few ulp.
template <class T>
HVP_INLINE Vec<T> log1p_unit(Vec<T> x) {
  const Vec<T> u = x + T(1);
  return log_positive<T>(u) + (x - (u - T(1))) / u;
}

// erfc(x) and erf(x). erf(x) = x T(x^2)/U(x^2) for |x| <= 1, erfc(x) = exp(-x^2) P(x)/Q(x) beyond.
template <class T>
HVP_INLINE Vec<T> erfc(Vec<T> x) {
  constexpr double t[] = {9.60497373987051638749E0, 9.00260197203842689217E1,
                          2.23200534594684319226E3, 7.00332514112805075473E3,
                          5.55923013010394962768E4};
  constexpr double u[] = {1.0,
                          3.35617141647503099647E1,
                          5.21357949780152679795E2,
                          4.59432382970980127987E3,
                          2.26290000613890934246E4,
                          4.92673942608635921086E4};
  constexpr double p[] = {
      2.46196981473530512524E-10, 5.64189564831068821977E-1, 7.46321056442269912687E0,
      4.86371970985681366614E1,   1.96520832956077098242E2,  5.26445194995477358631E2,
      9.34528527171957607540E2,   1.02755188689515710272E3,  5.57535335369399327526E2};
  constexpr double q[] = {1.0,
                          1.32281951154744992508E1,
                          8.67072140885989742329E1,
                          3.54937778887819891062E2,
                          9.75708501743205489753E2,
                          1.82390916687909736289E3,
                          2.24633760818710981792E3,
                          1.65666309194161350182E3,
                          5.57535340817727675546E2};
  constexpr double r[] = {5.64189583547755073984E-1, 1.27536670759978104416E0,
                          5.01905042251180477414E0,  6.16021097993053585195E0,
                          7.40974269950448939160E0,  2.97886665372100240670E0};
  constexpr double s[] = {1.0,
                          2.26052863220117276590E0,
                          9.39603524938001434673E0,
                          1.20489539808096656605E1,
                          1.70814450747565897222E1,
                          9.60896809063285878198E0,
                          3.36907645100081516050E0};
  const Vec<T> magnitude = vabs<T>(x);
  // beyond 26.6 exp(-x^2) is below the smallest double; the cap keeps the polynomials finite
  const Vec<T> m = select<T>(magnitude > T(27), broadcast(T(27)), magnitude);
  const Vec<T> x2 = x * x;
  const Vec<T> near = T(1) - x * polynomial<T>(select<T>(magnitude > T(1), Vec<T>{}, x2), t) /
                                 polynomial<T>(select<T>(magnitude > T(1), Vec<T>{}, x2), u);
  const Vec<T> middle = polynomial<T>(m, p) / polynomial<T>(m, q);
  const Vec<T> far = polynomial<T>(m, r) / polynomial<T>(m, s);
  Vec<T> tail = exp_nonpositive<T>(-(m * m)) * select<T>(m < T(8), middle, far);
  tail = select<T>(x < T(0), T(2) - tail, tail);
  return select<T>(magnitude > T(1), tail, near);
}

}  // namespace hvpfast::HVPFAST_ISA
