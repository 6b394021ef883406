// Bilinear sampling on CUDA: what the kernels of all operators share.
#pragma once

#include <cstdint>

#include "cuda_elements.cuh"
#include "sampling.h"

namespace sampling {

constexpr int kBlockSize = 256;

// Quotients by a number known at launch, exact for dividends below 2^31: a multiplication instead of a division.
struct Divider {
  uint32_t divisor, multiplier, shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t dividend) const {
    return (__umulhi(dividend, multiplier) + dividend) >> shift;
  }
};

// Whether a point contributes nothing, whatever its weight.
template <typename R>
__device__ __forceinline__ bool is_void(const Point<R>& point) {
  return !point.top && !point.bottom;
}

// Which of a point's four corners exist, and where they are from the first pixel of the image, in elements.
template <typename R>
struct Reads {
  bool top_left, top_right, bottom_left, bottom_right;
  int start, right, down;

  __device__ __forceinline__ Reads(const Point<R>& point, int width, int channels)
      : top_left(point.top && point.left),
        top_right(point.top && point.right),
        bottom_left(point.bottom && point.left),
        bottom_right(point.bottom && point.right),
        start((point.row * width + point.column) * channels),
        right(channels),
        down(width * channels) {}
};

// Add a point's sample times its weight to the sums; `corner` is the top left one. nvcc takes eight instructions more
// per point where reads.start is added to the pointer in here.
template <typename T, int V>
__device__ __forceinline__ void add_sample(const T* corner, const Reads<Real<T>>& reads,
                                           const Corners<Real<T>>& weights, Real<T> (&sum)[V]) {
  Real<T> a[V], b[V], c[V], d[V];
  load_channels(a, corner, reads.top_left);
  load_channels(b, corner + reads.right, reads.top_right);
  load_channels(c, corner + reads.down, reads.bottom_left);
  load_channels(d, corner + reads.down + reads.right, reads.bottom_right);
  // One sum would need an addition more than these four fused multiply-adds.
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sum[i] += weights.top_left * a[i];
    sum[i] += weights.top_right * b[i];
    sum[i] += weights.bottom_left * c[i];
    sum[i] += weights.bottom_right * d[i];
  }
}

// One corner: add its share to the gradient of x, and the product of its channels with those of `grad` to `product`.
template <typename T, int V>
__device__ __forceinline__ void visit_corner(const T* x, Real<T>* grad_x, bool exists, Real<T> weight,
                                             const Real<T> (&grad)[V], Real<T>& product) {
  Real<T> channels[V];
  load_channels(channels, x, exists);
  // Offsets start as zeros, and then three weights of four are 0.
  if (exists && weight != 0) add_channels(grad_x, weight, grad);
#pragma unroll
  for (int i = 0; i < V; ++i) product += channels[i] * grad[i];
}

// A thread's channels in the backward: V if fixed, else V at a time. Pointers are at the first of them; those into
// images at the image's first pixel.
template <typename T, int V, bool kFixed>
struct Channels {
  using R = Real<T>;
  const T *x, *grad;
  R* grad_x;
  int count;      // from the first on, of the thread and of the lanes after it
  int lane_bits;  // log2 of the threads that share the channels
  R loaded[V];    // of grad

  // Return the products of grad with the four corners, and add to the gradient of x where a corner has a weight.
  __device__ __forceinline__ Corners<R> visit(const Reads<R>& reads, const Corners<R>& weights) {
    const int right = reads.right, down = reads.down;
    Corners<R> dots = {0, 0, 0, 0};
    for (int channel = 0; kFixed || channel < count; channel += V << lane_bits) {
      if (!kFixed) load_channels(loaded, grad + channel, true);
      const T* corner = x + channel + reads.start;
      R* target = grad_x + channel + reads.start;
      visit_corner(corner, target, reads.top_left, weights.top_left, loaded, dots.top_left);
      visit_corner(corner + right, target + right, reads.top_right, weights.top_right, loaded, dots.top_right);
      visit_corner(corner + down, target + down, reads.bottom_left, weights.bottom_left, loaded, dots.bottom_left);
      visit_corner(corner + down + right, target + down + right, reads.bottom_right, weights.bottom_right, loaded,
                   dots.bottom_right);
      if (kFixed) break;
    }
    return dots;
  }
};

template <typename R>
__device__ __forceinline__ Slopes<R> sum_over_lanes(unsigned active, Slopes<R> slope, int lane_bits) {
  for (int distance = 1 << lane_bits >> 1; distance > 0; distance >>= 1) {
    slope.weight += __shfl_xor_sync(active, slope.weight, distance);
    slope.y += __shfl_xor_sync(active, slope.y, distance);
    slope.x += __shfl_xor_sync(active, slope.x, distance);
  }
  return slope;
}

}  // namespace sampling
