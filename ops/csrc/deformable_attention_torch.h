// From the arguments of the deformable attention operators to the kernels' geometry.
#pragma once

#include <cstdint>
#include <vector>

#include "binding.h"
#include "deformable_attention_geometry.h"

namespace deformable_attention {

using torch::stable::Tensor;
using Shapes = std::vector<int64_t>;  // height and width of each level

// The inputs of one call, laid out for the kernels. `ops/deformable_attention.py` has checked the shapes.
struct Call {
  Tensor value, locations, weights;
  Geometry geometry;

  Call(const Tensor& value_, const Tensor& locations_, const Tensor& weights_, const Shapes& shapes)
      : value(torch::stable::contiguous(value_)),
        locations(torch::stable::contiguous(locations_)),
        weights(torch::stable::contiguous(weights_)) {
    binding::check_image_size("deformable_attention", "value", value.size(1) * value.size(2) * value.size(3));
    STD_TORCH_CHECK(shapes.size() <= 2 * max_levels, "deformable_attention: found ", shapes.size() / 2,
                    " levels, and the kernels take at most ", max_levels, ". Set INTERNIMAGE_OPS=reference.");
    geometry = {.batch = value.size(0),
                .pixels = value.size(1),
                .queries = weights.size(1),
                .heads = static_cast<int32_t>(value.size(2)),
                .depth = static_cast<int32_t>(value.size(3)),
                .points = static_cast<int32_t>(weights.size(4)),
                .num_levels = static_cast<int32_t>(shapes.size() / 2),
                .levels = {}};
    int32_t first = 0;
    for (int32_t i = 0; i < geometry.num_levels; i++) {
      Level& level = geometry.levels[i];
      level = {static_cast<int32_t>(shapes[2 * i]), static_cast<int32_t>(shapes[2 * i + 1]), first};
      first += level.height * level.width;
    }
  }
};

}  // namespace deformable_attention
