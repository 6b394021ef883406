// Registers the CPU kernels of DCNv3.

#include <cstdint>
#include <tuple>

#include "cpu_binding.h"
#include "dcnv3_cpu.h"
#include "dcnv3_torch.h"

namespace {

using namespace binding;
using dcnv3::Call;
using dcnv3::IntPair;

Tensor forward(const Tensor& x, const Tensor& offset, const Tensor& mask, const IntPair& kernel_size,
               const IntPair& stride, const IntPair& padding, const IntPair& dilation, int64_t groups,
               double offset_scale, bool remove_center, bool softmax) {
  const Call call(x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
                  softmax);
  Tensor out = torch::stable::new_empty(x, {x.size(0), mask.size(1), mask.size(2), x.size(3)});
  if (call.geometry.batch == 0) return out;
  dispatch("dcnv3", x, [&]<class T>(T*) {
    dcnv3::forward<T>(call.geometry,
                      {read<T>(call.x), read<T>(call.offset.tensor), read<T>(call.mask.tensor), write<T>(out)},
                      parallel_for);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& offset,
                                            const Tensor& mask, const IntPair& kernel_size, const IntPair& stride,
                                            const IntPair& padding, const IntPair& dilation, int64_t groups,
                                            double offset_scale, bool remove_center, bool softmax) {
  const Call call(x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
                  softmax);
  const Tensor upstream = torch::stable::contiguous(grad);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_offset = torch::stable::new_empty(x, offset.sizes());
  Tensor grad_mask = torch::stable::new_empty(x, mask.sizes());
  if (call.geometry.batch == 0) return {grad_x, grad_offset, grad_mask};
  dispatch("dcnv3", x, [&]<class T>(T*) {
    dcnv3::backward<T>(call.geometry,
                       {read<T>(upstream), read<T>(call.x), read<T>(call.offset.tensor), read<T>(call.mask.tensor),
                        write<T>(grad_x), write<T>(grad_offset), write<T>(grad_mask)},
                       parallel_for);
  });
  return {grad_x, grad_offset, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internimage_kernels, CPU, library) {
  library.impl("dcnv3_forward", TORCH_BOX(&forward));
  library.impl("dcnv3_backward", TORCH_BOX(&backward));
}
