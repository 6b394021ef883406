// The sampling points of one output pixel on the CPU, in vectors over (group, point).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "dcnv3_geometry.h"
#include "simd.h"

namespace dcnv3 {

template <class S>
using NativeVec = simd::Vec<S, simd::native_lanes<S>>;

template <class S, class I>
struct VectorNumbers {
  static constexpr int lanes = simd::native_lanes<S>;
  using Scalar = S;
  using Int = simd::Vec<I, lanes>;
  using Bool = Int;  // 0 or -1 in each lane
  using V = simd::Vec<S, lanes>;

  static HOST_DEVICE V to_real(Int value) { return simd::convert<V>(value); }
  // Of values above -1, which truncation rounds down too unless they are negative.
  static HOST_DEVICE Int floor(V value) { return simd::convert<Int>(value) + (value < 0); }
};

template <>
struct Numbers<NativeVec<float>> : VectorNumbers<float, int32_t> {};
template <>
struct Numbers<NativeVec<double>> : VectorNumbers<double, int64_t> {};

// The points of one output pixel: arrays over (group, point), padded to whole vectors.
template <class S>
class PointTable {
 public:
  using V = NativeVec<S>;
  using N = Numbers<V>;
  using Int = typename N::Int;
  using IntScalar = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;

  explicit PointTable(const Geometry& geometry)
      : geometry_(geometry),
        size_(geometry.groups * geometry.points),
        vectors_((size_ + N::lanes - 1) / N::lanes),
        steps_y_(vectors_),
        steps_x_(vectors_),
        offsets_(2 * vectors_),
        weights_(vectors_),
        points_(vectors_),
        dots_(4 * vectors_),
        grad_weights_(vectors_),
        grad_offsets_(2 * vectors_),
        lowest_(V{} + static_cast<S>(geometry.y.input)),
        highest_(V{} - 1) {
    for (auto& array : corner_weights_) array.resize(vectors_);
    for (auto& array : corners_) array.resize(vectors_);
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

  // Weights of the four corners, and their offsets in elements from the image. All are safe to read, but for those of a
  // void point in the backward, where the first is negative.
  const S* corner_weight(int corner) const { return scalars(corner_weights_[corner]); }
  const IntScalar* corner(int corner) const { return reinterpret_cast<const IntScalar*>(corners_[corner].data()); }
  // Four per point: products of the gradient with the corners, summed over channels.
  S* dots() { return scalars(dots_); }

  template <bool for_backward, class T>
  void locate_points(const T* offset, const T* mask, int32_t row, int32_t column) {
    load_weights(mask);
    simd::widen(offset, scalars(offsets_), 2 * size_);
    const Axis &axis_y = geometry_.y, &axis_x = geometry_.x;
    const S scale = static_cast<S>(geometry_.scale);
    const S origin_y = origin(axis_y, row, scale), origin_x = origin(axis_x, column, scale);
    const IntScalar channels = geometry_.channels(), line = axis_x.input * channels;
    // A void point reads, with weight 0, the centre of its window and its right neighbour, as other points do anyway.
    const IntScalar near_row = std::min(row * axis_y.stride, axis_y.input - 1);
    const IntScalar near_column = std::max(0, std::min(column * axis_x.stride, axis_x.input - 2));
    const IntScalar spare = for_backward ? -1 : near_row * line + near_column * channels;
    const Int none = {};
    for (int v = 0; v < vectors_; v++) {
      const auto [dx, dy] = simd::deinterleave<N::lanes>(offsets_[2 * v], offsets_[2 * v + 1]);
      const Point<V> point = locate(coordinate(origin_y, steps_y_[v], dy, scale),
                                    coordinate(origin_x, steps_x_[v], dx, scale), axis_y.input, axis_x.input);
      if (for_backward) keep(point, points_[v]);
      const Corners<V> weight = dcnv3::corner_weights<true>(point, weights_[v]);
      corner_weights_[0][v] = weight.top_left;
      corner_weights_[1][v] = weight.top_right;
      corner_weights_[2][v] = weight.bottom_left;
      corner_weights_[3][v] = weight.bottom_right;
      const Int inside = point.top | point.bottom;
      Int base = (point.row * axis_x.input + point.column) * channels;
      base = inside ? base : none + spare;
      // A missing corner reads its neighbour's pixel.
      const Int top = base + (inside & ~point.top & line), bottom = base + (point.bottom & line);
      const Int left = ~point.left & channels, right = point.right & channels;
      corners_[0][v] = top + left;
      corners_[1][v] = top + right;
      corners_[2][v] = bottom + left;
      corners_[3][v] = bottom + right;
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
    const V zero = {};
    const S scale = static_cast<S>(geometry_.scale);
    for (int v = 0; v < vectors_; v++) {
      const Point<V>& point = points_[v];
      const auto first = simd::deinterleave<N::lanes>(dots_[4 * v], dots_[4 * v + 1]);
      const auto second = simd::deinterleave<N::lanes>(dots_[4 * v + 2], dots_[4 * v + 3]);
      const auto left = simd::deinterleave<N::lanes>(first.first, second.first);
      const auto right = simd::deinterleave<N::lanes>(first.second, second.second);
      const Slopes<V> slope = slopes<V>(point, {point.top & point.left ? left.first : zero,
                                                point.top & point.right ? right.first : zero,
                                                point.bottom & point.left ? left.second : zero,
                                                point.bottom & point.right ? right.second : zero});
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

  void clear_dots() { std::fill(dots_.begin(), dots_.end(), V{}); }

 private:
  template <class Vector>
  static S* scalars(Vector& array) {
    return reinterpret_cast<S*>(array.data());
  }
  template <class Vector>
  static const S* scalars(const Vector& array) {
    return reinterpret_cast<const S*>(array.data());
  }

  // Field by field: GCC copies a whole struct of vectors through scalar registers.
  static SIMD_INLINE void keep(const Point<V>& from, Point<V>& to) {
    to.dy = from.dy, to.dx = from.dx;
    to.top = from.top, to.bottom = from.bottom, to.left = from.left, to.right = from.right;
  }

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
  int size_, vectors_;
  std::vector<V> steps_y_, steps_x_, offsets_, weights_, corner_weights_[4];
  std::vector<Int> corners_[4];
  std::vector<Point<V>> points_;
  std::vector<V> dots_, grad_weights_, grad_offsets_;
  V lowest_, highest_;
};

}  // namespace dcnv3
