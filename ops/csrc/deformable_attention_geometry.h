// Multi-scale deformable attention as the CPU and the CUDA kernels see it: the levels, and where their points lie.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace deformable_attention {

using namespace sampling;

constexpr int32_t max_levels = 16;

struct Level {
  int32_t height, width;
  int32_t first;  // index of its first pixel among those of all levels
};

// One call; all tensors are contiguous.
struct Geometry {
  int64_t batch, pixels, queries;  // pixels: of all levels
  int32_t heads, depth, points, num_levels;  // depth: channels per head; points: per level
  Level levels[max_levels];

  HOST_DEVICE int32_t channels() const { return heads * depth; }
};

// From [0, 1] to pixels of a level, `size` of them along the axis; 0 is the centre of the first.
template <class R, class S>
HOST_DEVICE R coordinate(R location, S size) {
  return location * size - S(0.5);
}

}  // namespace deformable_attention
