// Registers the CUDA kernels of DCNv3.

#include "cuda_binding.h"

#include <tuple>

#include "dcnv3_cuda.h"
#include "dcnv3_torch.h"

namespace {

using namespace binding;
using dcnv3::IntPair;

void check_like(const char* argument, const Tensor& tensor, const Tensor& x) {
  FirstTensor{"dcnv3", "x", x}.check(argument, tensor, x.scalar_type());
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
  dcnv3::launch_forward(call.geometry, element_type("dcnv3", x),
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
  Tensor grad_x = torch::stable::new_zeros(x, x.sizes(), real_type(x));
  Tensor grad_offset = torch::stable::new_empty(x, offset.sizes());
  Tensor grad_mask = torch::stable::new_empty(x, mask.sizes());
  dcnv3::launch_backward(call.geometry, element_type("dcnv3", x),
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
