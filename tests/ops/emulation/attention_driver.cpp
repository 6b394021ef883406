// Runs the deformable attention launchers and kernels of ops/csrc on the CPU: a C interface for ctypes, and with
// -DSTANDALONE a program.
//
// Buffers: value, locations, weights, grad, out, grad_value, grad_locations, grad_weights.

#include <exception>
#include <string>

// First, as nvcc knows CUDA before the first line.
#include "cuda_emulation.h"

#include "deformable_attention_cuda.cu"
#include "standalone.h"

struct Call {
  deformable_attention::Geometry geometry;
  deformable_attention::ElementType type;
  emulation::ThreadOrder order;
};

// Forward and backward. Returns null, or what went wrong.
extern "C" const char* run_deformable_attention(const Call* call, void* const* buffers) {
  static std::string error;
  emulation::device().thread_order = call->order;
  emulation::device().error.clear();
  try {
    deformable_attention::launch_forward(call->geometry, call->type,
                                         {buffers[0], buffers[1], buffers[2], buffers[4]}, nullptr);
    deformable_attention::launch_backward(
        call->geometry, call->type,
        {buffers[3], buffers[0], buffers[1], buffers[2], buffers[5], buffers[6], buffers[7]}, nullptr);
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}

#ifdef STANDALONE
int main() { return answer_records(run_deformable_attention); }
#endif
