// The sampling points of one output pixel on the CPU, in vectors over (group, point).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "dcnv3_geometry.h"
#include "sampling_cpu.h"

namespace dcnv3 {

template <class S>
class PixelPoints : public PointTable<S> {
 public:
  using typename PointTable<S>::V;
  using typename PointTable<S>::N;
  using typename PointTable<S>::Int;
  using typename PointTable<S>::IntScalar;

  explicit PixelPoints(const Geometry& geometry)
      : PointTable<S>(geometry.groups * geometry.points),
        geometry_(geometry),
        size_(geometry.groups * geometry.points),
        steps_y_(vectors_),
        steps_x_(vectors_),
        offsets_(2 * vectors_),
        weights_(vectors_),
        grad_weights_(vectors_),
        grad_offsets_(2 * vectors_),
        lowest_(V{} + static_cast<S>(geometry.y.input)),
        highest_(V{} - 1) {
    S *y = scalars(steps_y_), *x = scalars(steps_x_);
    for (int32_t g = 0; g < geometry.groups; g++) {
      for (int32_t i = 0; i < geometry.x.kernel; i++) {
        for (int32_t j = 0; j < geometry.y.kernel; j++) {
          if (geometry.remove_center && i == geometry.x.kernel / 2 && j == geometry.y.kernel / 2) continue;
          *y++ = static_cast<S>(j * geometry.y.dilation);
          *x++ = static_cast<S>(i * geometry.x.dilation);
        }
      }
    }
  }

  template <bool for_backward, class T>
  void locate_points(const T* offset, const T* mask, int32_t row, int32_t column) {
    load_weights(mask);
    simd::widen(offset, scalars(offsets_), 2 * size_);
    const Axis &axis_y = geometry_.y, &axis_x = geometry_.x;
    const S scale = static_cast<S>(geometry_.scale);
    const S origin_y = origin(axis_y, row, scale), origin_x = origin(axis_x, column, scale);
    // A void point reads the centre of its window and its right neighbour, as other points do anyway.
    const IntScalar channels = geometry_.channels();
    const IntScalar near_row = std::min(row * axis_y.stride, axis_y.input - 1);
    const IntScalar near_column = std::max(0, std::min(column * axis_x.stride, axis_x.input - 2));
    const IntScalar spare = (near_row * axis_x.input + near_column) * channels;
    for (int v = 0; v < vectors_; v++) {
      const auto [dx, dy] = simd::deinterleave<N::lanes>(offsets_[2 * v], offsets_[2 * v + 1]);
      const Point<V> point = locate(coordinate(origin_y, steps_y_[v], dy, scale),
                                    coordinate(origin_x, steps_x_[v], dx, scale), axis_y.input, axis_x.input);
      this->template set_points<for_backward>(v, point, weights_[v], axis_x.input, channels, spare);
    }
  }

  // Extend the range of y coordinates by those of one pixel's points that lie within the image's rows.
  template <class T>
  void extend_range(const T* offset, int32_t row) {
    simd::widen(offset, scalars(offsets_), 2 * size_);
    const S scale = static_cast<S>(geometry_.scale), height = static_cast<S>(geometry_.y.input);
    const S origin_y = origin(geometry_.y, row, scale);
    for (int v = 0; v < vectors_; v++) {
      const V dy = simd::deinterleave<N::lanes>(offsets_[2 * v], offsets_[2 * v + 1]).second;
      const V y = coordinate(origin_y, steps_y_[v], dy, scale);
      const Int inside = (y > S(-1)) & (y < height);
      lowest_ = inside & (y < lowest_) ? y : lowest_;
      highest_ = inside & (y > highest_) ? y : highest_;
    }
  }

  // (lowest, highest); the first is larger where no point is inside.
  std::pair<S, S> range() const {
    S lowest = lowest_[0], highest = highest_[0];
    for (int lane = 1; lane < N::lanes; lane++) {
      lowest = std::min(lowest, lowest_[lane]);
      highest = std::max(highest, highest_[lane]);
    }
    return {lowest, highest};
  }

  // From the dot products to the gradients of offset and mask.
  template <class T>
  void store_gradients(T* grad_offset, T* grad_mask) {
    const S scale = static_cast<S>(geometry_.scale);
    for (int v = 0; v < vectors_; v++) {
      const Slopes<V> slope = this->slopes_of(v);
      grad_weights_[v] = slope.weight;
      const V factor = weights_[v] * scale;
      const auto [low, high] = simd::interleave<N::lanes>(factor * slope.x, factor * slope.y);
      grad_offsets_[2 * v] = low;
      grad_offsets_[2 * v + 1] = high;
    }
    S* grad_weights = scalars(grad_weights_);
    if (geometry_.softmax) {
      for (int g = 0; g < geometry_.groups; g++) {
        const int first = g * geometry_.points;
        softmax_backward(scalars(weights_) + first, grad_weights + first, geometry_.points);
      }
    }
    simd::narrow(scalars(grad_offsets_), grad_offset, 2 * size_);
    simd::narrow(grad_weights, grad_mask, size_);
  }

 private:
  using PointTable<S>::scalars;
  using PointTable<S>::vectors_;

  template <class T>
  void load_weights(const T* mask) {
    S* weights = scalars(weights_);
    simd::widen(mask, weights, size_);
    if (!geometry_.softmax) return;
    const int32_t count = geometry_.points;
    for (int32_t g = 0; g < geometry_.groups; g++) subtract_maximum(weights + g * count, count);
    for (V& values : weights_) values = simd::exponential<N::lanes>(values);
    for (int32_t g = 0; g < geometry_.groups; g++) normalise(weights + g * count, count);
  }

  const Geometry& geometry_;
  int size_;
  std::vector<V> steps_y_, steps_x_, offsets_, weights_, grad_weights_, grad_offsets_;
  V lowest_, highest_;
};

}  // namespace dcnv3
