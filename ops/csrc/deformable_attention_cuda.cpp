// Registers the CUDA kernels of multi-scale deformable attention.

#include "cuda_binding.h"

#include <tuple>

#include "deformable_attention_cuda.h"
#include "deformable_attention_torch.h"

namespace {

using namespace binding;
using deformable_attention::Call;
using deformable_attention::Shapes;

constexpr const char* name = "deformable_attention";

void check_inputs(const Tensor& value, const Tensor& locations, const Tensor& weights) {
  const FirstTensor first = {name, "value", value};
  first.check("sampling_locations", locations, real_type(value));
  first.check("attention_weights", weights, value.scalar_type());
}

Tensor forward(const Tensor& value, const Tensor& locations, const Tensor& weights, const Shapes& shapes) {
  check_inputs(value, locations, weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Call call(value, locations, weights, shapes);
  Tensor out = torch::stable::new_empty(value, {value.size(0), weights.size(1), value.size(2) * value.size(3)});
  deformable_attention::launch_forward(call.geometry, element_type(name, value),
                                       {call.value.const_data_ptr(), call.locations.const_data_ptr(),
                                        call.weights.const_data_ptr(), out.mutable_data_ptr()},
                                       current_stream(value));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value, const Tensor& locations,
                                            const Tensor& weights, const Shapes& shapes) {
  check_inputs(value, locations, weights);
  FirstTensor{name, "value", value}.check("grad", grad, value.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Call call(value, locations, weights, shapes);
  const Tensor upstream = torch::stable::contiguous(grad);
  // Each element is a sum over all queries that sample nearby: too many terms for 16 bits.
  Tensor grad_value = torch::stable::new_zeros(value, value.sizes(), real_type(value));
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  deformable_attention::launch_backward(call.geometry, element_type(name, value),
                                        {upstream.const_data_ptr(), call.value.const_data_ptr(),
                                         call.locations.const_data_ptr(), call.weights.const_data_ptr(),
                                         grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                                         grad_weights.mutable_data_ptr()},
                                        current_stream(value));
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internimage_kernels, CUDA, library) {
  library.impl("deformable_attention_forward", TORCH_BOX(&forward));
  library.impl("deformable_attention_backward", TORCH_BOX(&backward));
}
