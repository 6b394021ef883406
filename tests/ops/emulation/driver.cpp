// Runs the DCNv3 launchers and kernels of ops/csrc on the CPU: a C interface for ctypes, and with -DSTANDALONE a
// program.
//
// Buffers: x, offset, mask, grad, out, grad_x, grad_offset, grad_mask.

#include <exception>
#include <string>

// First, as nvcc knows CUDA before the first line.
#include "cuda_emulation.h"

#include "dcnv3_cuda.cu"
#include "standalone.h"

struct Call {
  dcnv3::Geometry geometry;
  dcnv3::ElementType type;
  emulation::ThreadOrder order;
};

// Forward and backward. Returns null, or what went wrong.
extern "C" const char* run_dcnv3(const Call* call, void* const* buffers) {
  static std::string error;
  emulation::device().thread_order = call->order;
  emulation::device().error.clear();
  try {
    dcnv3::launch_forward(call->geometry, call->type, {buffers[0], buffers[1], buffers[2], buffers[4]}, nullptr);
    dcnv3::launch_backward(
        call->geometry, call->type,
        {buffers[3], buffers[0], buffers[1], buffers[2], buffers[5], buffers[6], buffers[7]}, nullptr);
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
  return nullptr;
}

extern "C" uint32_t divide(uint32_t dividend, uint32_t divisor) {
  return dcnv3::make_divider(divisor).quotient(dividend);
}
extern "C" float widen_half(uint16_t bits) { return __half2float({bits}); }
extern "C" uint16_t narrow_half(float value) { return __float2half_rn(value).bits; }
extern "C" uint16_t narrow_bfloat16(float value) { return __float2bfloat16_rn(value).bits; }

#ifdef STANDALONE
int main() { return answer_records(run_dcnv3); }
#endif
