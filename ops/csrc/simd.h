// Vectors of the processor's own width through the GCC and Clang vector extensions. One source for AVX-512, AVX2, SSE2
// and NEON; what the compiler targets decides. Wider vectors than the processor's are not safe: GCC lowers them badly.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#define SIMD_BYTES 64
#elif defined(__AVX2__)
#define SIMD_BYTES 32
#else
#define SIMD_BYTES 16
#endif

#define SIMD_INLINE inline __attribute__((always_inline))

namespace simd {

template <class S, int lanes>
struct VecOf {
  typedef S type __attribute__((vector_size(sizeof(S) * lanes)));
};

// One lane is the scalar itself.
template <class S>
struct VecOf<S, 1> {
  using type = S;
};

template <class S, int lanes>
using Vec = typename VecOf<S, lanes>::type;

template <class S>
constexpr int native_lanes = SIMD_BYTES / sizeof(S);

struct BFloat16 {
  uint16_t bits;
};

// The type that stored values of T are computed in.
template <class T>
struct RealOf {
  using type = T;
};

template <>
struct RealOf<BFloat16> {
  using type = float;
};

template <class T>
using Real = typename RealOf<T>::type;

template <class To, class From>
SIMD_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Lane-by-lane conversion of numbers, of vectors and of scalars.
template <class To, class From>
SIMD_INLINE To convert(From from) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, To);
  }
}

// Read `lanes` stored values from any address.
template <int lanes, class T>
SIMD_INLINE Vec<Real<T>, lanes> load(const T* address) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Vec<uint16_t, lanes> bits;
    std::memcpy(&bits, address, sizeof bits);
    using Word = Vec<uint32_t, lanes>;
    return bit_cast<Vec<float, lanes>>(static_cast<Word>(convert<Word>(bits) << 16));
  } else {
    Vec<T, lanes> values;
    std::memcpy(&values, address, sizeof values);
    return values;
  }
}

// Write `lanes` values to any address; bfloat16 rounds to nearest even and keeps NaN.
template <int lanes, class T>
SIMD_INLINE void store(T* address, Vec<Real<T>, lanes> values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Word = Vec<uint32_t, lanes>;
    const Word bits = bit_cast<Word>(values);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word nan = (bits >> 16) | 0x40u;
    const auto narrow = convert<Vec<uint16_t, lanes>>(static_cast<Word>(values == values ? rounded : nan));
    std::memcpy(address, &narrow, sizeof narrow);
  } else {
    std::memcpy(address, &values, sizeof values);
  }
}

// Copy with conversion between stored and real values.
template <class T>
SIMD_INLINE void widen(const T* __restrict from, Real<T>* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = load<1>(from + i);
}

template <class T>
SIMD_INLINE void narrow(const Real<T>* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; i++) store<1>(to + i, from[i]);
}

// Lanes of the concatenation of a and b.
template <int... index, class V>
SIMD_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, index...);
#else
  using Lane = std::conditional_t<sizeof(V) / sizeof...(index) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Lane, sizeof...(index)>{index...});
#endif
}

template <class V>
struct Pair {
  V first, second;
};

// (a0 a1 .. b0 b1 ..) -> (a0 a2 .. b0 b2 ..), (a1 a3 .. b1 b3 ..)
template <int lanes, class V>
SIMD_INLINE Pair<V> deinterleave(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return Pair<V>{shuffle<2 * i...>(a, b), shuffle<2 * i + 1 ...>(a, b)};
  }(std::make_integer_sequence<int, lanes>());
}

// (a0 a1 ..), (b0 b1 ..) -> (a0 b0 a1 b1 ..), the first half and the second.
template <int lanes, class V>
SIMD_INLINE Pair<V> interleave(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return Pair<V>{shuffle<i / 2 + i % 2 * lanes...>(a, b), shuffle<(lanes + i) / 2 + i % 2 * lanes...>(a, b)};
  }(std::make_integer_sequence<int, lanes>());
}

// Add neighbouring segments of `size` lanes in the concatenation of a and b: (a0 + a1, a2 + a3, .. b0 + b1, ..)
template <int lanes, int size, class V>
SIMD_INLINE V fold(V a, V b) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return shuffle<i / size * size + i...>(a, b) + shuffle<i / size * size + size + i...>(a, b);
  }(std::make_integer_sequence<int, lanes>());
}

// Add the sums over the lanes of a, b, c and d to four neighbouring numbers.
template <int lanes, class V, class S>
SIMD_INLINE void add_sums(S* sums, V a, V b, V c, V d) {
  if constexpr (lanes == 1) {
    sums[0] += a, sums[1] += b, sums[2] += c, sums[3] += d;
  } else if constexpr (lanes == 2) {
    store<2>(sums, load<2>(sums) + fold<2, 1>(a, b));
    store<2>(sums + 2, load<2>(sums + 2) + fold<2, 1>(c, d));
  } else {
    V folded = fold<lanes, lanes / 4>(fold<lanes, lanes / 2>(a, b), fold<lanes, lanes / 2>(c, d));
    if constexpr (lanes == 16) folded = fold<lanes, 2>(folded, folded);
    if constexpr (lanes >= 8) folded = fold<lanes, 1>(folded, folded);
    Vec<S, 4> four;
    std::memcpy(&four, &folded, sizeof four);
    store<4>(sums, load<4>(sums) + four);
  }
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87, 1 above 0, NaN for NaN. Polynomial of Cephes' expf.
template <int lanes>
SIMD_INLINE Vec<float, lanes> exponential(Vec<float, lanes> x) {
  using V = Vec<float, lanes>;
  using Int = Vec<int32_t, lanes>;
  const V zero = {};
  const Int tiny = x < -87.0f;
  x = tiny | (x > 0.0f) ? zero : x;
  const Int exponent = convert<Int>(static_cast<V>(x * 1.44269504f - 0.5f));  // truncation rounds to nearest: x <= 0
  const V whole = convert<V>(exponent);
  const V r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const V power = bit_cast<V>(static_cast<Int>((exponent + 127) << 23));
  return tiny ? zero : p * power;
}

template <int lanes>
SIMD_INLINE Vec<double, lanes> exponential(Vec<double, lanes> x) {
  for (int i = 0; i < lanes; i++) x[i] = x[i] > 0 ? 1 : std::exp(x[i]);
  return x;
}

}  // namespace simd
