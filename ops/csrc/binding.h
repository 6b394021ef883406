// What the bindings to torch share. Stable ABI headers: they compile in a quarter of the time of torch/library.h, and
// one binary serves every torch from the target on.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))  // the oldest torch that pyproject.toml allows
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Kernels index within an image in 32 bits.
inline void check_image_size(const char* name, const char* tensor, int64_t elements) {
  STD_TORCH_CHECK(elements <= std::numeric_limits<int32_t>::max(), name, ": an image of `", tensor, "` has ", elements,
                  " elements, and the kernels address at most 2147483647. Cut it into tiles, or set "
                  "INTERNIMAGE_OPS=reference.");
}

}  // namespace binding
