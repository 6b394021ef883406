// Bilinear sampling, for all operators, on CPU and CUDA: where a point reads, with what weights, and its gradients.
//
// A real type R is float or double, or a vector of them whose lanes are points (sampling_cpu.h adds the `Numbers` of
// those). Operators and `?:` work on both, so each formula stands once. No torch, no std containers.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(CUDA_EMULATION)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

// Loops over points must unroll on a GPU: their arrays live in registers.
#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace sampling {

// What goes with a real type: one number, whole numbers, truth values, and the conversions between them.
template <class R>
struct Numbers;

template <class R>
struct ScalarNumbers {
  using Scalar = R;
  using Int = int32_t;
  using Bool = bool;

  static HOST_DEVICE R to_real(Int value) { return static_cast<R>(value); }
};

template <>
struct Numbers<float> : ScalarNumbers<float> {
  static HOST_DEVICE int32_t floor(float value) { return static_cast<int32_t>(floorf(value)); }
};

template <>
struct Numbers<double> : ScalarNumbers<double> {
  static HOST_DEVICE int32_t floor(double value) { return static_cast<int32_t>(::floor(value)); }
};

// A point between the four pixels (row, column) .. (row + 1, column + 1), some of which may lie outside the image.
template <class R>
struct Point {
  typename Numbers<R>::Int row, column;
  R dy, dx;                                            // distance from (row, column), [0, 1)
  typename Numbers<R>::Bool top, bottom, left, right;  // the row or column exists; no row does for a void point
};

// A point at or beyond -1 or the size on either axis, or not a number, is void: it has no corner.
template <class R>
HOST_DEVICE Point<R> locate(R y, R x, int32_t height, int32_t width) {
  using N = Numbers<R>;
  using S = typename N::Scalar;
  const typename N::Bool inside =
      (y > S(-1)) & (y < static_cast<S>(height)) & (x > S(-1)) & (x < static_cast<S>(width));
  y = inside ? y : R{};
  x = inside ? x : R{};
  Point<R> point;
  point.row = N::floor(y);
  point.column = N::floor(x);
  point.dy = y - N::to_real(point.row);
  point.dx = x - N::to_real(point.column);
  point.top = inside & (point.row >= 0);
  point.bottom = inside & (point.row < height - 1);
  point.left = point.column >= 0;
  point.right = point.column < width - 1;
  return point;
}

// One value for each of the four pixels around a point.
template <class R>
struct Corners {
  R top_left, top_right, bottom_left, bottom_right;
};

// Bilinear weights times the point's own weight. A corner that does not exist weighs 0 if zero_missing, else anything.
template <bool zero_missing = false, class R>
HOST_DEVICE Corners<R> corner_weights(const Point<R>& point, R weight) {
  R bottom = weight * point.dy, top = weight - bottom;
  if (zero_missing) {
    top = point.top ? top : R{};
    bottom = point.bottom ? bottom : R{};
  }
  R top_right = top * point.dx, bottom_right = bottom * point.dx;
  R top_left = top - top_right, bottom_left = bottom - bottom_right;
  if (zero_missing) {
    top_left = point.left ? top_left : R{};
    top_right = point.right ? top_right : R{};
    bottom_left = point.left ? bottom_left : R{};
    bottom_right = point.right ? bottom_right : R{};
  }
  return {top_left, top_right, bottom_left, bottom_right};
}

// Derivatives of one point's sample: by its weight, and per unit of weight by its coordinates.
template <class R>
struct Slopes {
  R weight, y, x;
};

// dots: products of the output's gradient with the corners, summed over channels, 0 for a corner that does not exist.
// Linear in them, so partial sums may be reduced after it. At a whole-number coordinate: the right-hand derivative.
template <class R>
HOST_DEVICE Slopes<R> slopes(const Point<R>& point, const Corners<R>& dots) {
  const R across_top = dots.top_right - dots.top_left, across_bottom = dots.bottom_right - dots.bottom_left;
  const R top = dots.top_left + point.dx * across_top, bottom = dots.bottom_left + point.dx * across_bottom;
  const R down = bottom - top;
  return {top + point.dy * down, down, across_top + point.dy * (across_bottom - across_top)};
}

}  // namespace sampling
