// Kernels with a seeded error each, to show that the emulation catches it.

#include "cuda_emulation.h"

namespace {

enum class Kernel : int32_t {
  correct,
  missing_barrier,
  mask_names_exited_lane,
  mask_excludes_caller,
  masks_differ,
  reads_outside_mask,
  lane_never_comes,
  barrier_after_exit,
  misaligned_load,
  misaligned_store,
};

// Every thread publishes its number and reads its neighbour's; the lower half of each warp sums those of its own lanes.
void kernel(Kernel fault, const int* input, int* output) {
  __shared__ int shared[64];
  const unsigned thread = threadIdx.x, lane = thread % 32;
  shared[thread] = input[thread];
  if (fault != Kernel::missing_barrier) __syncthreads();
  const int neighbour = shared[(thread + 1) % blockDim.x];
  __syncthreads();
  shared[thread] = -1;

  const bool lower = lane < 16;
  unsigned mask = __ballot_sync(0xffffffffu, lower);
  if (fault == Kernel::mask_names_exited_lane) mask = 0x1ffffu;
  if (!lower) return;
  if (fault == Kernel::barrier_after_exit) __syncthreads();
  if (fault == Kernel::mask_excludes_caller) mask = 0xfff0u;
  if (fault == Kernel::masks_differ) mask = lane == 3 ? 0x7fffu : 0xffffu;
  int sum = neighbour;
  if (fault == Kernel::lane_never_comes && lane == 5) {
    __syncwarp(1u << lane);
    __syncthreads();
  }
  for (unsigned distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
  if (fault == Kernel::reads_outside_mask) sum += __shfl_xor_sync(mask, sum, 16);
  if (fault == Kernel::misaligned_load) sum += __ldg(reinterpret_cast<const uint4*>(input + 1)).x;
  if (fault == Kernel::misaligned_store) __stcs(reinterpret_cast<uint2*>(output + 1), uint2{0, 0});
  output[thread] = sum;
}

}  // namespace

// One block of 64 threads, 64 numbers in and out, 16-byte aligned. Returns null, or what went wrong.
extern "C" const char* run_misuse(int32_t fault, int32_t order, const int* input, int* output) {
  emulation::device().error.clear();
  emulation::device().thread_order = static_cast<emulation::ThreadOrder>(order);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Kernel>(fault), input, output);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
