// DCNv3 arithmetic that the CPU and the CUDA kernels share: where a window's points lie, and the softmax over them.
#pragma once

#include <cstdint>

#include "sampling.h"

namespace dcnv3 {

using namespace sampling;

// Rows or columns: input and output pixels, and the kernel along them.
struct Axis {
  int32_t input, output, kernel, stride, padding, dilation;

  HOST_DEVICE int32_t half() const { return dilation * (kernel - 1) / 2; }
};

// One call. Strides are elements between neighbouring output pixels; x, out and their gradients are contiguous.
struct Geometry {
  int64_t batch;
  Axis y, x;
  int32_t groups, depth, points;  // depth: channels per group; points: per group
  int64_t offset_stride, mask_stride;
  double scale;
  bool remove_center, softmax;

  HOST_DEVICE int32_t channels() const { return groups * depth; }
};

// Coordinates are input pixels, in the authors' order of operations, so that all kernels pick the same cell.
template <class S>
HOST_DEVICE S origin(const Axis& axis, int32_t output, S scale) {
  return static_cast<S>(axis.half() - axis.padding + output * axis.stride) - static_cast<S>(axis.half()) * scale;
}

// step: index of the point along the axis times the dilation.
template <class R, class S>
HOST_DEVICE R coordinate(S origin, R step, R offset, S scale) {
  return origin + (step + offset) * scale;
}

// Softmax over the points of a group, in place: subtract_maximum, an exponential of each value, normalise. In three
// parts because the CPU takes the exponential of all groups of a pixel at once.
template <class S>
HOST_DEVICE void subtract_maximum(S* values, int32_t count) {
  S maximum = values[0];
  UNROLL for (int32_t k = 1; k < count; k++) maximum = values[k] > maximum ? values[k] : maximum;
  UNROLL for (int32_t k = 0; k < count; k++) values[k] -= maximum;
}

template <class S>
HOST_DEVICE void normalise(S* values, int32_t count) {
  S sum = 0;
  UNROLL for (int32_t k = 0; k < count; k++) sum += values[k];
  const S factor = S(1) / sum;
  UNROLL for (int32_t k = 0; k < count; k++) values[k] *= factor;
}

// From the gradients of the weights to those of the logits, in place.
template <class S>
HOST_DEVICE void softmax_backward(const S* weights, S* gradients, int32_t count) {
  S mean = 0;
  UNROLL for (int32_t k = 0; k < count; k++) mean += weights[k] * gradients[k];
  UNROLL for (int32_t k = 0; k < count; k++) gradients[k] = weights[k] * (gradients[k] - mean);
}

}  // namespace dcnv3
