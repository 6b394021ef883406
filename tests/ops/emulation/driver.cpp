// Runs the launchers and kernels of ops/csrc on the CPU: a C interface for ctypes, and with -DSTANDALONE a program for
// builds that Python cannot load, such as those with a sanitizer.
//
// The program reads records from standard input and writes their results to standard output. A record is a Call, the
// sizes in bytes of its eight buffers (x, offset, mask, grad, out, grad_x, grad_offset, grad_mask), and the contents of
// the first four. The answer is the contents of the last four.

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

// First, as nvcc knows CUDA before the first line.
#include "cuda_emulation.h"

#include "dcnv3_cuda.cu"

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
// Memory of exactly the asked size, so that AddressSanitizer sees the first byte beyond.
struct Release {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{16}); }
};
using Buffer = std::unique_ptr<char[], Release>;

int main() {
  Call call;
  while (std::fread(&call, sizeof call, 1, stdin) == 1) {
    int64_t sizes[8];
    if (std::fread(sizes, sizeof sizes, 1, stdin) != 1) return 1;
    Buffer buffers[8];
    void* pointers[8];
    for (int i = 0; i < 8; i++) {
      buffers[i].reset(new (std::align_val_t{16}) char[sizes[i]]);
      pointers[i] = buffers[i].get();
      if (i < 4 && std::fread(pointers[i], 1, sizes[i], stdin) != static_cast<size_t>(sizes[i])) return 1;
      // NaN in every type; only the gradient of x is accumulated.
      if (i >= 4) std::memset(pointers[i], i == 5 ? 0 : 0xff, sizes[i]);
    }
    if (const char* error = run_dcnv3(&call, pointers)) {
      std::fprintf(stderr, "%s\n", error);
      return 1;
    }
    for (int i = 4; i < 8; i++) std::fwrite(pointers[i], 1, sizes[i], stdout);
  }
  return 0;
}
#endif
