// Registers the CPU kernels of DCNv3.

#include "dcnv3_torch.h"

#include <cstdint>
#include <tuple>

#include "dcnv3_cpu.h"

namespace {

using dcnv3::Call;
using dcnv3::IntPair;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Run body with a null pointer of the stored type.
template <class Body>
void dispatch(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::Double: return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<simd::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "dcnv3: the CPU kernel serves float32, float64 and bfloat16.");
  }
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

const auto parallel_for = [](int64_t count, const auto& body) { torch::stable::parallel_for(0, count, 1, body); };

Tensor forward(const Tensor& x, const Tensor& offset, const Tensor& mask, const IntPair& kernel_size,
               const IntPair& stride, const IntPair& padding, const IntPair& dilation, int64_t groups,
               double offset_scale, bool remove_center, bool softmax) {
  const Call call(x, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
                  softmax);
  Tensor out = torch::stable::new_empty(x, {x.size(0), mask.size(1), mask.size(2), x.size(3)});
  if (call.geometry.batch == 0) return out;
  dispatch(x, [&]<class T>(T*) {
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
  dispatch(x, [&]<class T>(T*) {
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
