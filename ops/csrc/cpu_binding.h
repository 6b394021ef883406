// What the bindings of the CPU kernels share.
#pragma once

#include "binding.h"
#include "simd.h"

namespace binding {

// Run body with a null pointer of the stored type.
template <class Body>
void dispatch(const char* name, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::Double: return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<simd::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, name, ": the CPU kernel serves float32, float64 and bfloat16.");
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

// The loops of all kernels: body(first, last) on ranges that cover [0, count).
inline constexpr auto parallel_for = [](int64_t count, const auto& body) {
  torch::stable::parallel_for(0, count, 1, body);
};

}  // namespace binding
