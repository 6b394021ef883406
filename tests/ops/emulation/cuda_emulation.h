// Runs CUDA source on a CPU, so that kernels can be tested without a GPU.
//
// Blocks run one after another. The threads of a block are fibers, and only a collective (barrier, shuffle, ballot)
// switches between them: in between, the lanes of a warp are not in lockstep, as on Volta and later. `thread_order`
// chooses which fiber goes first, so code that relies on an order gives different results in different orders.
//
// Misuse that hardware would answer with a hang or with garbage ends the launch with a message: a collective whose mask
// leaves out the caller, names an exited or absent lane, or differs between its lanes; a shuffle from a lane outside
// the mask; a barrier or collective that can never complete; a vector access that is not aligned.
//
// Needs -fno-strict-aliasing: kernels reinterpret pointers, as nvcc allows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block runs at a time, so a static is shared by exactly the threads of one block.
#define __shared__ static

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

template <typename T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  if (!(mask >> source & 1)) {
    device().fail("%s: lane %u reads lane %u, outside mask %08x", name, device().lane(), source, mask);
  }
  const uint64_t* received = device().exchange(name, mask, bits);
  std::memcpy(&value, &received[source], sizeof value);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::device().barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::device().exchange("__syncwarp", mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return emulation::shuffle("__shfl_sync", mask, value, source % emulation::kWarpSize);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::device().lane() ^ lane_mask);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* received = emulation::device().exchange("__ballot_sync", mask, predicate);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulation::kWarpSize; lane++)
    if ((mask >> lane & 1) && received[lane]) ballot |= 1u << lane;
  return ballot;
}

template <typename T>
T __ldg(const T* address) {
  emulation::device().check_alignment(address, sizeof(T));
  return *address;
}

template <typename T>
void __stcs(T* address, T value) {
  emulation::device().check_alignment(address, sizeof(T));
  *address = value;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline float4 atomicAdd(float4* address, float4 value) {
  emulation::device().check_alignment(address, sizeof(float4));
  const float4 old = *address;
  *address = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w};
  return old;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is rebiased by a multiplication, which is exact and takes subnormal numbers along.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even.
inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename Kernel, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, Arguments... arguments) {
  emulation::device().launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return emulation::device().error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::device().error.c_str(); }
