// Launchers of the DCNv3 kernels for CUDA, with no header of torch or CUDA: any host compiler can include this.
#pragma once

#include <cstdint>

#include "cuda_types.h"
#include "dcnv3_geometry.h"

namespace dcnv3 {

// Pointers into device memory, laid out as `Geometry` says.
struct ForwardBuffers {
  const void *x, *offset, *mask;
  void* out;
};

// grad_x holds float64 for float64 tensors, else float32, and must start as zeros. grad_offset and grad_mask are
// contiguous and 16-byte aligned.
struct BackwardBuffers {
  const void *grad, *x, *offset, *mask;
  void *grad_x, *grad_offset, *grad_mask;
};

// Enqueue the kernels on `stream`, a cudaStream_t of the current device. Throws std::runtime_error where an image is
// too large for 32-bit indices or the launch fails.
void launch_forward(const Geometry& geometry, ElementType type, const ForwardBuffers& buffers, void* stream);
void launch_backward(const Geometry& geometry, ElementType type, const BackwardBuffers& buffers, void* stream);

}  // namespace dcnv3
