// Elements of the tensors in a kernel: conversions, vectors of channels in and out of memory, atomic sums.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace sampling {

// Conversions of the stored types. Channels travel as raw 32-bit words: arrays of 16-bit elements with a predicated
// initialisation would be assembled element by element.
template <typename T>
struct Element;

template <>
struct Element<float> {
  using Real = float;
  static constexpr int per_word = 1;
  __device__ static float widen(float value) { return value; }
  __device__ static float narrow(float value) { return value; }
  __device__ static void unpack(float* values, uint32_t word) { values[0] = __uint_as_float(word); }
  __device__ static uint32_t pack(const float* values) { return __float_as_uint(values[0]); }
};

template <>
struct Element<double> {
  using Real = double;
  __device__ static double widen(double value) { return value; }
  __device__ static double narrow(double value) { return value; }
};

template <>
struct Element<__half> {
  using Real = float;
  static constexpr int per_word = 2;
  __device__ static float widen(__half value) { return __half2float(value); }
  __device__ static __half narrow(float value) { return __float2half_rn(value); }
  __device__ static void unpack(float* values, uint32_t word) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof pair);
    const float2 both = __half22float2(pair);
    values[0] = both.x;
    values[1] = both.y;
  }
  __device__ static uint32_t pack(const float* values) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

template <>
struct Element<__nv_bfloat16> {
  using Real = float;
  static constexpr int per_word = 2;
  __device__ static float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  __device__ static __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  __device__ static void unpack(float* values, uint32_t word) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* values) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

template <typename T>
using Real = typename Element<T>::Real;

// Channels a thread owns where the layout allows 128-bit accesses.
template <typename T>
constexpr int kVectorChannels = 16 / sizeof(T);

// Read V channels, or zeros where there are none.
template <typename T, int V>
__device__ __forceinline__ void load_channels(Real<T> (&values)[V], const T* address, bool exists) {
  if constexpr (V == 1) {
    values[0] = exists ? Element<T>::widen(__ldg(address)) : Real<T>(0);
  } else {
    static_assert(V * sizeof(T) == 16, "one 128-bit load");
    uint4 words = {0, 0, 0, 0};
    if (exists) words = __ldg(reinterpret_cast<const uint4*>(address));
    constexpr int step = Element<T>::per_word;
    Element<T>::unpack(values, words.x);
    Element<T>::unpack(values + step, words.y);
    Element<T>::unpack(values + 2 * step, words.z);
    Element<T>::unpack(values + 3 * step, words.w);
  }
}

// The streaming store is what makes nvcc emit one 128-bit store; a plain one is split in four.
template <typename T, int V>
__device__ __forceinline__ void store_channels(T* address, const Real<T> (&values)[V]) {
  if constexpr (V == 1) {
    *address = Element<T>::narrow(values[0]);
  } else {
    static_assert(V * sizeof(T) == 16, "one 128-bit store");
    constexpr int step = Element<T>::per_word;
    const uint4 words = {Element<T>::pack(values), Element<T>::pack(values + step), Element<T>::pack(values + 2 * step),
                         Element<T>::pack(values + 3 * step)};
    __stcs(reinterpret_cast<uint4*>(address), words);
  }
}

// nvcc would carry the distance from the kernel's parameter through every address: four more instructions per corner.
template <typename T>
__device__ __forceinline__ T* hide_origin(T* pointer) {
#ifndef CUDA_EMULATION
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

template <typename R, int V>
__device__ __forceinline__ void add_channels(R* address, R weight, const R (&values)[V]) {
#if __CUDA_ARCH__ >= 900
  constexpr int step = V % 4 == 0 ? 4 : 1;
#else
  constexpr int step = 1;
#endif
#pragma unroll
  for (int i = 0; i < V; i += step) {
    if constexpr (step == 4) {
      atomicAdd(reinterpret_cast<float4*>(address + i), make_float4(weight * values[i], weight * values[i + 1],
                                                                    weight * values[i + 2], weight * values[i + 3]));
    } else {
      atomicAdd(address + i, weight * values[i]);
    }
  }
}

}  // namespace sampling
