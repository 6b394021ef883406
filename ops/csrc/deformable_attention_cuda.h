// Launchers of the CUDA kernels of multi-scale deformable attention, with no header of torch or CUDA.
#pragma once

#include "cuda_types.h"
#include "deformable_attention_geometry.h"

namespace deformable_attention {

// Pointers into device memory, laid out as `Geometry` says. Locations and their gradient hold float64 if the other
// tensors do, else float32.
struct ForwardBuffers {
  const void *value, *locations, *weights;
  void* out;
};

// grad_value holds float64 for float64 tensors, else float32, and must start as zeros. grad_locations and grad_weights
// are 16-byte aligned.
struct BackwardBuffers {
  const void *grad, *value, *locations, *weights;
  void *grad_value, *grad_locations, *grad_weights;
};

// Enqueue the kernels on `stream`, a cudaStream_t of the current device. Throws std::runtime_error where an image is
// too large for 32-bit indices or the launch fails.
void launch_forward(const Geometry& geometry, ElementType type, const ForwardBuffers& buffers, void* stream);
void launch_backward(const Geometry& geometry, ElementType type, const BackwardBuffers& buffers, void* stream);

}  // namespace deformable_attention
