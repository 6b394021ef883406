// From the arguments of the DCNv3 operators to the kernels' geometry.
#pragma once

#include <cstdint>
#include <vector>

#include "binding.h"
#include "dcnv3_geometry.h"

namespace dcnv3 {

using torch::stable::Tensor;
using IntPair = std::vector<int64_t>;  // (height, width)

// A (B, h, w, n) tensor whose pixels are evenly spaced, n neighbouring elements each: itself or a copy.
struct Pixels {
  Tensor tensor;
  int64_t stride;

  explicit Pixels(const Tensor& from) : tensor(from), stride(from.stride(2)) {
    const bool even = from.stride(3) == 1 && from.stride(1) == from.size(2) * stride &&
                      from.stride(0) == from.size(1) * from.stride(1);
    if (!even) {
      tensor = torch::stable::contiguous(from);
      stride = from.size(3);
    }
  }
};

// The inputs of one call, laid out for the kernels. `ops/dcnv3.py` has checked the shapes.
struct Call {
  Tensor x;
  Pixels offset, mask;
  Geometry geometry;

  Call(const Tensor& x_, const Tensor& offset_, const Tensor& mask_, const IntPair& kernel_size, const IntPair& stride,
       const IntPair& padding, const IntPair& dilation, int64_t groups, double offset_scale, bool remove_center,
       bool softmax)
      : x(torch::stable::contiguous(x_)), offset(offset_), mask(mask_) {
    binding::check_image_size("dcnv3", "x", x.size(1) * x.size(2) * x.size(3));
    const auto axis = [&](int which) {
      return Axis{static_cast<int32_t>(x.size(1 + which)),       static_cast<int32_t>(mask_.size(1 + which)),
                  static_cast<int32_t>(kernel_size.at(which)), static_cast<int32_t>(stride.at(which)),
                  static_cast<int32_t>(padding.at(which)),     static_cast<int32_t>(dilation.at(which))};
    };
    geometry = {.batch = x.size(0),
                .y = axis(0),
                .x = axis(1),
                .groups = static_cast<int32_t>(groups),
                .depth = static_cast<int32_t>(x.size(3) / groups),
                .points = static_cast<int32_t>(mask_.size(3) / groups),
                .offset_stride = offset.stride,
                .mask_stride = mask.stride,
                .scale = offset_scale,
                .remove_center = remove_center,
                .softmax = softmax};
  }
};

}  // namespace dcnv3
