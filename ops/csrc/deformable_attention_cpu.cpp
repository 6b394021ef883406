// Registers the CPU kernels of multi-scale deformable attention.

#include <tuple>

#include "cpu_binding.h"
#include "deformable_attention_cpu.h"
#include "deformable_attention_torch.h"

namespace {

using namespace binding;
using deformable_attention::Call;
using deformable_attention::Shapes;

Tensor forward(const Tensor& value, const Tensor& locations, const Tensor& weights, const Shapes& shapes) {
  const Call call(value, locations, weights, shapes);
  Tensor out = torch::stable::new_empty(value, {value.size(0), weights.size(1), value.size(2) * value.size(3)});
  dispatch("deformable_attention", value, [&]<class T>(T*) {
    deformable_attention::forward<T>(
        call.geometry, {read<T>(call.value), read<simd::Real<T>>(call.locations), read<T>(call.weights), write<T>(out)},
        parallel_for);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& value, const Tensor& locations,
                                            const Tensor& weights, const Shapes& shapes) {
  const Call call(value, locations, weights, shapes);
  const Tensor upstream = torch::stable::contiguous(grad);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_locations = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  dispatch("deformable_attention", value, [&]<class T>(T*) {
    using R = simd::Real<T>;
    deformable_attention::backward<T>(call.geometry,
                                      {read<T>(upstream), read<T>(call.value), read<R>(call.locations),
                                       read<T>(call.weights), write<T>(grad_value), write<R>(grad_locations),
                                       write<T>(grad_weights)},
                                      parallel_for);
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internimage_kernels, CPU, library) {
  library.impl("deformable_attention_forward", TORCH_BOX(&forward));
  library.impl("deformable_attention_backward", TORCH_BOX(&backward));
}
