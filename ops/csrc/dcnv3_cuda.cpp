// Registers the CUDA kernels of DCNv3.

#define USE_CUDA  // for torch to declare its functions on streams
#include "dcnv3_torch.h"

#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "dcnv3_cuda.h"

namespace {

using dcnv3::ElementType;
using dcnv3::IntPair;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::Half: return ElementType::float16;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    default: STD_TORCH_CHECK(false, "dcnv3: the CUDA kernel serves float16, bfloat16, float32 and float64.");
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.is_cuda() &&
                      tensor.get_device_index() == x.get_device_index(),
                  "dcnv3: `", name, "` has another dtype or device than `x`. Convert it.");
}

// The stream that torch currently uses on the device of `x`.
void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor forward(const Tensor& x, const Tensor& offset, const Tensor& mask, const IntPair& kernel_size,
               const IntPair& stride, const IntPair& padding, const IntPair& dilation, int64_t groups,
               double offset_scale, bool remove_center, bool softmax) {
  check_like("offset", offset, x);
  check_like("mask", mask, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const dcnv3::Call call(x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
                         softmax);
  Tensor out = torch::stable::new_empty(x, {x.size(0), mask.size(1), mask.size(2), x.size(3)});
  dcnv3::launch_forward(call.geometry, element_type(x),
                        {call.x.const_data_ptr(), call.offset.tensor.const_data_ptr(),
                         call.mask.tensor.const_data_ptr(), out.mutable_data_ptr()},
                        current_stream(x));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& offset,
                                            const Tensor& mask, const IntPair& kernel_size, const IntPair& stride,
                                            const IntPair& padding, const IntPair& dilation, int64_t groups,
                                            double offset_scale, bool remove_center, bool softmax) {
  check_like("grad", grad, x);
  check_like("offset", offset, x);
  check_like("mask", mask, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const dcnv3::Call call(x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
                         softmax);
  const Tensor upstream = torch::stable::contiguous(grad);
  // Each element is a sum of about 36 terms per output pixel nearby: too many for 16 bits.
  const ScalarType real = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_x = torch::stable::new_zeros(x, x.sizes(), real);
  Tensor grad_offset = torch::stable::new_empty(x, offset.sizes());
  Tensor grad_mask = torch::stable::new_empty(x, mask.sizes());
  dcnv3::launch_backward(call.geometry, element_type(x),
                         {upstream.const_data_ptr(), call.x.const_data_ptr(), call.offset.tensor.const_data_ptr(),
                          call.mask.tensor.const_data_ptr(), grad_x.mutable_data_ptr(), grad_offset.mutable_data_ptr(),
                          grad_mask.mutable_data_ptr()},
                         current_stream(x));
  return {torch::stable::to(grad_x, x.scalar_type()), grad_offset, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internimage_kernels, CUDA, library) {
  library.impl("dcnv3_forward", TORCH_BOX(&forward));
  library.impl("dcnv3_backward", TORCH_BOX(&backward));
}
