// What the launchers of the CUDA kernels share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_types.h"
#include "sampling_cuda.cuh"

namespace sampling {

// Thread and pixel indices of one launch stay below 2^31, rounded up to whole blocks.
constexpr int64_t kMaxThreads = (int64_t{1} << 31) - kBlockSize;

inline Divider make_divider(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - divisor;
  return {divisor, static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
}

// Threads for the channels of one sum when each owns V channels at a time: a power of two, at most a warp.
inline int lane_bits(int depth, int vector) {
  int bits = 0;
  while (bits < 5 && vector << bits < depth) ++bits;
  return bits;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Call run(first image, number of images) for parts of a batch whose threads can be counted in 31 bits.
template <typename Run>
void for_each_part(int64_t batch, int64_t threads_per_image, Run run) {
  const int64_t images = kMaxThreads / threads_per_image;
  for (int64_t first = 0; first < batch; first += images) run(first, std::min(images, batch - first));
}

// `launch` is the kernel's first parameter.
template <typename Launch, typename... Parameters, typename... Arguments>
void enqueue(const char* name, void* stream, void (*kernel)(Launch, Parameters...), const Launch& launch,
             Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((launch.num_threads + kBlockSize - 1) / kBlockSize);
  config.blockDim = dim3(kBlockSize);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, launch, arguments...);
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave no error behind for the next call to CUDA to report
  throw std::runtime_error(std::string(name) + ": launching the CUDA kernel failed: " + cudaGetErrorString(status));
}

// Call run with a null pointer to the stored type.
template <typename Run>
void dispatch(ElementType type, Run run) {
  switch (type) {
    case ElementType::float32:
      return run(static_cast<float*>(nullptr));
    case ElementType::float64:
      return run(static_cast<double*>(nullptr));
    case ElementType::float16:
      return run(static_cast<__half*>(nullptr));
    case ElementType::bfloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace sampling
