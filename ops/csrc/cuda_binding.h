// What the bindings of the CUDA kernels share.
#pragma once

#define USE_CUDA  // for torch to declare its functions on streams
#include "binding.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda_types.h"

namespace binding {

using sampling::ElementType;

inline ElementType element_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ElementType::float32;
    case ScalarType::Double: return ElementType::float64;
    case ScalarType::Half: return ElementType::float16;
    case ScalarType::BFloat16: return ElementType::bfloat16;
    default: STD_TORCH_CHECK(false, name, ": the CUDA kernel serves float16, bfloat16, float32 and float64.");
  }
}

// The type of the arithmetic.
inline ScalarType real_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels read memory as the type and on the device that the first tensor tells.
struct FirstTensor {
  const char *operator_name, *name;
  const Tensor& tensor;

  void check(const char* argument, const Tensor& other, ScalarType type) const {
    STD_TORCH_CHECK(other.scalar_type() == type && other.is_cuda() &&
                        other.get_device_index() == tensor.get_device_index(),
                    operator_name, ": `", argument, "` has another dtype or device than `", name,
                    "` needs. Convert it.");
  }
};

// The stream that torch currently uses on the device of a tensor.
inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace binding
