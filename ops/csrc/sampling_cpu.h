// Bilinear sampling on the CPU: points are located in vectors over points, their samples summed in vectors of channels.
//
// A corner outside of the image has weight 0 and the address of one inside, so that the sums do not branch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "sampling.h"
#include "simd.h"

namespace sampling {

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

// Points in arrays that are padded to whole vectors, `points` of them for each sum.
template <class S>
class PointTable {
 public:
  using V = NativeVec<S>;
  using N = Numbers<V>;
  using Int = typename N::Int;
  using IntScalar = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;

  explicit PointTable(int size) : vectors_((size + N::lanes - 1) / N::lanes) {
    for (auto& array : corner_weights_) array.resize(vectors_);
    for (auto& array : corners_) array.resize(vectors_);
    points_.resize(vectors_);
    dots_.resize(4 * vectors_);
  }

  // Weights of the four corners, and their offsets in elements from the image. All are safe to read, but for those of a
  // void point in the backward, where the first is negative.
  const S* corner_weight(int corner) const { return scalars(corner_weights_[corner]); }
  const IntScalar* corner(int corner) const { return reinterpret_cast<const IntScalar*>(corners_[corner].data()); }
  // Four per point: products of the gradient with the corners, summed over channels.
  S* dots() { return scalars(dots_); }
  void clear_dots() { std::fill(dots_.begin(), dots_.end(), V{}); }

 protected:
  template <class Vector>
  static S* scalars(Vector& array) {
    return reinterpret_cast<S*>(array.data());
  }
  template <class Vector>
  static const S* scalars(const Vector& array) {
    return reinterpret_cast<const S*>(array.data());
  }

  // Set vector v. `pixel`: elements from one pixel to the next; `spare`: what a void point reads, with weight 0, in the
  // forward.
  template <bool for_backward>
  SIMD_INLINE void set_points(int v, const Point<V>& point, V weights, int32_t width, IntScalar pixel,
                              IntScalar spare) {
    if (for_backward) keep(point, points_[v]);
    const Corners<V> weight = corner_weights<true>(point, weights);
    corner_weights_[0][v] = weight.top_left;
    corner_weights_[1][v] = weight.top_right;
    corner_weights_[2][v] = weight.bottom_left;
    corner_weights_[3][v] = weight.bottom_right;
    const Int none = {}, inside = point.top | point.bottom;
    const IntScalar line = width * pixel;
    Int base = (point.row * width + point.column) * pixel;
    base = inside ? base : none + (for_backward ? -1 : spare);
    // A missing corner reads its neighbour's pixel.
    const Int top = base + (inside & ~point.top & line), bottom = base + (point.bottom & line);
    const Int left = ~point.left & pixel, right = point.right & pixel;
    corners_[0][v] = top + left;
    corners_[1][v] = top + right;
    corners_[2][v] = bottom + left;
    corners_[3][v] = bottom + right;
  }

  // Of vector v, from the dot products.
  SIMD_INLINE Slopes<V> slopes_of(int v) const {
    const V zero = {};
    const Point<V>& point = points_[v];
    const auto first = simd::deinterleave<N::lanes>(dots_[4 * v], dots_[4 * v + 1]);
    const auto second = simd::deinterleave<N::lanes>(dots_[4 * v + 2], dots_[4 * v + 3]);
    const auto left = simd::deinterleave<N::lanes>(first.first, second.first);
    const auto right = simd::deinterleave<N::lanes>(first.second, second.second);
    return slopes<V>(point, {point.top & point.left ? left.first : zero, point.top & point.right ? right.first : zero,
                             point.bottom & point.left ? left.second : zero,
                             point.bottom & point.right ? right.second : zero});
  }

  int vectors_;

 private:
  // Field by field: GCC copies a whole struct of vectors through scalar registers.
  static SIMD_INLINE void keep(const Point<V>& from, Point<V>& to) {
    to.dy = from.dy, to.dx = from.dx;
    to.top = from.top, to.bottom = from.bottom, to.left = from.left, to.right = from.right;
  }

  std::vector<V> corner_weights_[4];
  std::vector<Int> corners_[4];
  std::vector<Point<V>> points_;
  std::vector<V> dots_;
};

// Channels are taken in blocks of 32, 16, 8 and 1.
inline int block_width(int channels) { return channels >= 32 ? 32 : channels >= 16 ? 16 : channels >= 8 ? 8 : 1; }

template <class Body>
SIMD_INLINE void for_each_block(int depth, const Body& body) {
  for (int channel = 0, width; channel < depth; channel += width) {
    width = block_width(depth - channel);
    switch (width) {
      case 32: body(channel, std::integral_constant<int, 32>()); break;
      case 16: body(channel, std::integral_constant<int, 16>()); break;
      case 8: body(channel, std::integral_constant<int, 8>()); break;
      default: body(channel, std::integral_constant<int, 1>());
    }
  }
}

// A block of `width` channels as vectors.
template <class S, int width>
struct Block {
  static constexpr int lanes = std::min(width, simd::native_lanes<S>);
  static constexpr int count = width / lanes;
  using V = simd::Vec<S, lanes>;
};

// The sums that a table's points make up: elements from one sum's channels to the next's, in and out of the image.
struct Sums {
  int count, points;
  int64_t image_stride, stride;
};

// One block of channels of every sum; x and out point at the first sum's block. Adds to out if asked.
template <int width, bool add, class T, class Out>
__attribute__((noinline)) void gather_block(const Sums& sums, const PointTable<simd::Real<T>>& table, const T* x,
                                            Out* out) {
  using B = Block<simd::Real<T>, width>;
  using V = typename B::V;
  const auto *top_left = table.corner(0), *top_right = table.corner(1);
  const auto *bottom_left = table.corner(2), *bottom_right = table.corner(3);
  const auto *w0 = table.corner_weight(0), *w1 = table.corner_weight(1);
  const auto *w2 = table.corner_weight(2), *w3 = table.corner_weight(3);
  int p = 0;
  for (int s = 0; s < sums.count; s++, x += sums.image_stride, out += sums.stride) {
    V upper[B::count] = {}, lower[B::count] = {};
    if constexpr (add) {
#pragma GCC unroll 8
      for (int i = 0; i < B::count; i++) upper[i] = simd::load<B::lanes>(out + i * B::lanes);
    }
    for (const int end = p + sums.points; p < end; p++) {
#pragma GCC unroll 8
      for (int i = 0; i < B::count; i++) {
        const T* at = x + i * B::lanes;
        upper[i] += w0[p] * simd::load<B::lanes>(at + top_left[p]);
        lower[i] += w2[p] * simd::load<B::lanes>(at + bottom_left[p]);
        upper[i] += w1[p] * simd::load<B::lanes>(at + top_right[p]);
        lower[i] += w3[p] * simd::load<B::lanes>(at + bottom_right[p]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < B::count; i++) simd::store<B::lanes>(out + i * B::lanes, V(upper[i] + lower[i]));
  }
}

// The same for the backward: add to grad_x, laid out as x, and to the table's dot products.
template <int width, class T>
__attribute__((noinline)) void scatter_block(const Sums& sums, PointTable<simd::Real<T>>& table, const T* grad,
                                             const T* x, simd::Real<T>* grad_x) {
  using S = simd::Real<T>;
  using B = Block<S, width>;
  using V = typename B::V;
  // Copied here since the compiler has to assume that the stores below change the table's own pointers.
  const auto *at0 = table.corner(0), *at1 = table.corner(1), *at2 = table.corner(2), *at3 = table.corner(3);
  const S *w0 = table.corner_weight(0), *w1 = table.corner_weight(1);
  const S *w2 = table.corner_weight(2), *w3 = table.corner_weight(3);
  S* dots = table.dots();
  const Sums size = sums;
  int p = 0;
  for (int s = 0; s < size.count; s++, grad += size.stride, x += size.image_stride, grad_x += size.image_stride) {
    V upstream[B::count];
#pragma GCC unroll 8
    for (int i = 0; i < B::count; i++) upstream[i] = simd::load<B::lanes>(grad + i * B::lanes);
    for (const int end = p + size.points; p < end; p++) {
      if (at0[p] < 0) continue;
      const auto visit = [&](auto at, S weight) {
        V sum = {};
#pragma GCC unroll 8
        for (int i = 0; i < B::count; i++) {
          sum += upstream[i] * simd::load<B::lanes>(x + at + i * B::lanes);
          S* to = grad_x + at + i * B::lanes;
          simd::store<B::lanes>(to, V(simd::load<B::lanes>(to) + weight * upstream[i]));
        }
        return sum;
      };
      const V sum0 = visit(at0[p], w0[p]), sum1 = visit(at1[p], w1[p]);
      const V sum2 = visit(at2[p], w2[p]), sum3 = visit(at3[p], w3[p]);
      simd::add_sums<B::lanes>(dots + 4 * p, sum0, sum1, sum2, sum3);
    }
  }
}

}  // namespace sampling
