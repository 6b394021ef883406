// DCNv3 kernels for CUDA, forward and backward; the launchers in dcnv3_cuda.cu choose among them.
//
// A thread owns V neighbouring channels of one (output pixel, group): the geometry is computed once for all of them,
// and with V > 1 every load of channels is 128 bits wide. The lanes that share a (pixel, group) are neighbours in a
// warp; the backward sums the gradients of offset and mask over them with shuffles. Arithmetic is float32, or float64
// for float64 tensors.
//
// With -DCUDA_EMULATION a C++ compiler builds this file for the CPU (tests/ops/emulation).
#pragma once

#include <cstdint>

#include "dcnv3_geometry.h"
#include "sampling_cuda.cuh"

namespace dcnv3 {

// One launch: the geometry in the types that the kernels compute with. R is the type of coordinates.
template <typename R>
struct Launch {
  uint32_t num_threads;
  int lane_bits;  // log2 of the threads that share a (pixel, group)
  Axis y, x;
  int channels, depth;  // depth: channels per group
  Divider groups, out_width, out_height;
  R scale;
  bool remove_center, softmax;
  int64_t offset_stride, mask_stride;  // elements from one output pixel to the next
};

// A window whose size is known at compile time: loops unroll and the modulation stays in registers.
template <bool kRemoveCenter, bool kSoftmax>
struct Window3x3 {
  static constexpr bool fixed = true;
  static constexpr int unroll = 3;
  static constexpr int num_points = 9 - kRemoveCenter;

  template <typename R>
  __device__ static constexpr int height(const Launch<R>&) { return 3; }
  template <typename R>
  __device__ static constexpr int width(const Launch<R>&) { return 3; }
  template <typename R>
  __device__ static constexpr int points(const Launch<R>&) { return num_points; }
  template <typename R>
  __device__ static constexpr bool remove_center(const Launch<R>&) { return kRemoveCenter; }
  template <typename R>
  __device__ static constexpr bool softmax(const Launch<R>&) { return kSoftmax; }
};

// A window of any size.
struct AnyWindow {
  static constexpr bool fixed = false;
  static constexpr int unroll = 1;
  static constexpr int num_points = 1;

  template <typename R>
  __device__ static int height(const Launch<R>& launch) { return launch.y.kernel; }
  template <typename R>
  __device__ static int width(const Launch<R>& launch) { return launch.x.kernel; }
  template <typename R>
  __device__ static int points(const Launch<R>& launch) {
    return launch.y.kernel * launch.x.kernel - launch.remove_center;
  }
  template <typename R>
  __device__ static bool remove_center(const Launch<R>& launch) { return launch.remove_center; }
  template <typename R>
  __device__ static bool softmax(const Launch<R>& launch) { return launch.softmax; }
};

// Call visit(point, column, row) for every point of the window, in the order of the offset and mask channels.
template <typename Window, typename R, typename Visit>
__device__ __forceinline__ void for_each_point(const Launch<R>& launch, Visit visit) {
  const int height = Window::height(launch), width = Window::width(launch);
  int point = 0;
#pragma unroll(Window::unroll)
  for (int column = 0; column < width; ++column) {
#pragma unroll(Window::unroll)
    for (int row = 0; row < height; ++row) {
      if (Window::remove_center(launch) && row == height / 2 && column == width / 2) continue;
      visit(point++, column, row);
    }
  }
}

// The (output pixel, group) of a thread and its lane among those that share it.
template <typename R>
struct Place {
  uint32_t lane, pixel, group, image;
  R y, x;  // where the window's first point is, before its offset

  __device__ __forceinline__ Place(const Launch<R>& launch, uint32_t thread) {
    const uint32_t pixel_group = thread >> launch.lane_bits;
    lane = thread & ((1u << launch.lane_bits) - 1);
    pixel = launch.groups.quotient(pixel_group);
    group = pixel_group - pixel * launch.groups.divisor;
    const uint32_t line = launch.out_width.quotient(pixel), column = pixel - line * launch.out_width.divisor;
    image = launch.out_height.quotient(line);
    const uint32_t row = line - image * launch.out_height.divisor;
    y = origin(launch.y, row, launch.scale);
    x = origin(launch.x, column, launch.scale);
  }
};

// Unlike __expf, without the instructions that keep results below 1e-38 apart from 0.
__device__ __forceinline__ float exponential(float x) {
#ifdef CUDA_EMULATION
  return std::exp(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
#endif
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The weights of a (pixel, group)'s points: the mask, or its softmax.
template <typename T, typename Window>
struct Modulation {
  static_assert(Window::fixed);
  Real<T> values[Window::num_points];

  __device__ __forceinline__ Modulation(const Launch<Real<T>>& launch, const T* mask) {
#pragma unroll
    for (int i = 0; i < Window::num_points; ++i) values[i] = Element<T>::widen(__ldg(mask + i));
    if (!Window::softmax(launch)) return;
    subtract_maximum(values, Window::num_points);
#pragma unroll
    for (int i = 0; i < Window::num_points; ++i) values[i] = exponential(values[i]);
    normalise(values, Window::num_points);
  }
  __device__ __forceinline__ Real<T> operator()(int point) const { return values[point]; }
};

template <typename T>
struct Modulation<T, AnyWindow> {
  const T* mask;
  bool softmax;
  Real<T> maximum, normalizer;

  __device__ __forceinline__ Modulation(const Launch<Real<T>>& launch, const T* mask_)
      : mask(mask_), softmax(launch.softmax), maximum(0), normalizer(1) {
    if (!softmax) return;
    const int points = AnyWindow::points(launch);
    maximum = logit(0);
    for (int i = 1; i < points; ++i) maximum = logit(i) > maximum ? logit(i) : maximum;
    Real<T> sum = 0;
    for (int i = 0; i < points; ++i) sum += exponential(logit(i) - maximum);
    normalizer = 1 / sum;
  }
  __device__ __forceinline__ Real<T> logit(int point) const { return Element<T>::widen(__ldg(mask + point)); }
  __device__ __forceinline__ Real<T> operator()(int point) const {
    return softmax ? exponential(logit(point) - maximum) * normalizer : logit(point);
  }
};

// Where a point reads.
template <typename T>
__device__ __forceinline__ Point<Real<T>> point_at(const Launch<Real<T>>& launch, const Place<Real<T>>& place,
                                                   const T* offset, int column, int row) {
  using R = Real<T>;
  const R dx = Element<T>::widen(__ldg(offset)), dy = Element<T>::widen(__ldg(offset + 1));
  return locate(coordinate(place.y, R(row * launch.y.dilation), dy, launch.scale),
                coordinate(place.x, R(column * launch.x.dilation), dx, launch.scale), launch.y.input, launch.x.input);
}

template <typename R>
__device__ __forceinline__ int64_t image_size(const Launch<R>& launch) {
  return int64_t(launch.y.input) * launch.x.input * launch.channels;
}

template <typename T, int V, typename Window>
__global__ void __launch_bounds__(kBlockSize, Window::fixed ? 4 : 1)
    forward_kernel(const Launch<Real<T>> launch, const T* __restrict__ x, const T* __restrict__ offset,
                   const T* __restrict__ mask, T* __restrict__ out) {
  using R = Real<T>;
  const uint32_t thread = blockIdx.x * kBlockSize + threadIdx.x;
  if (thread >= launch.num_threads) return;
  const Place<R> place(launch, thread);
  const int points = Window::points(launch);
  offset += place.pixel * launch.offset_stride + place.group * (2 * points);
  const Modulation<T, Window> modulation(launch, mask + place.pixel * launch.mask_stride + place.group * points);
  x = hide_origin(x + place.image * image_size(launch) + place.group * launch.depth);
  out += int64_t(place.pixel) * launch.channels + place.group * launch.depth;
  // In a fixed window the lanes cover the group exactly.
  for (int channel = place.lane * V; Window::fixed || channel < launch.depth; channel += V << launch.lane_bits) {
    R sum[V] = {};
    for_each_point<Window>(launch, [&](int index, int column, int row) {
      const Point<R> point = point_at(launch, place, offset + 2 * index, column, row);
      const Corners<R> weights = corner_weights(point, is_void(point) ? R(0) : modulation(index));
      const Reads<R> reads(point, launch.x.input, launch.channels);
      add_sample(x + channel + reads.start, reads, weights, sum);
    });
    store_channels(out + channel, sum);
    if (Window::fixed) break;
  }
}

// grad_x accumulates in the type of the arithmetic and must start as zeros. grad_offset and grad_mask are contiguous.
template <typename T, int V, typename Window>
__global__ void __launch_bounds__(kBlockSize, Window::fixed ? 3 : 1)
    backward_kernel(const Launch<Real<T>> launch, const T* __restrict__ grad, const T* __restrict__ x,
                    const T* __restrict__ offset, const T* __restrict__ mask, Real<T>* __restrict__ grad_x,
                    T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  using R = Real<T>;
  const uint32_t thread = blockIdx.x * kBlockSize + threadIdx.x;
  // All lanes of a (pixel, group) are active or none is.
  const unsigned active = __ballot_sync(0xffffffffu, thread < launch.num_threads);
  if (thread >= launch.num_threads) return;
  const Place<R> place(launch, thread);
  const int points = Window::points(launch);
  const uint32_t last_lane = (1u << launch.lane_bits) - 1;
  offset += place.pixel * launch.offset_stride + place.group * (2 * points);
  const Modulation<T, Window> modulation(launch, mask + place.pixel * launch.mask_stride + place.group * points);
  const int64_t first_channel = place.image * image_size(launch) + place.group * launch.depth + place.lane * V;
  Channels<T, V, Window::fixed> channels;
  channels.x = hide_origin(x + first_channel);
  channels.grad_x = hide_origin(grad_x + first_channel);
  channels.grad = grad + int64_t(place.pixel) * launch.channels + place.group * launch.depth + place.lane * V;
  channels.count = launch.depth - int(place.lane) * V;
  channels.lane_bits = launch.lane_bits;
  if (Window::fixed) load_channels(channels.loaded, channels.grad, true);
  grad_offset += int64_t(thread >> launch.lane_bits) * (2 * points);
  grad_mask += int64_t(thread >> launch.lane_bits) * points;

  const auto reads_at = [&](const Point<R>& point) { return Reads<R>(point, launch.x.input, launch.channels); };

  // The mean of the weights' gradients, which softmax takes off each. A fixed window holds them all until it is known.
  R mean = 0;
  if (!Window::fixed && Window::softmax(launch)) {
    for_each_point<Window>(launch, [&](int index, int column, int row) {
      const Point<R> point = point_at(launch, place, offset + 2 * index, column, row);
      mean += modulation(index) * slopes(point, channels.visit(reads_at(point), {0, 0, 0, 0})).weight;
    });
    mean = sum_over_lanes<R>(active, {mean, 0, 0}, launch.lane_bits).weight;
  }
  R grad_weights[Window::num_points];
  for_each_point<Window>(launch, [&](int index, int column, int row) {
    const Point<R> point = point_at(launch, place, offset + 2 * index, column, row);
    const R modulated = modulation(index), weight = is_void(point) ? R(0) : modulated;
    Slopes<R> slope = slopes(point, channels.visit(reads_at(point), corner_weights(point, weight)));
    slope = sum_over_lanes<R>(active, slope, launch.lane_bits);
    if (Window::fixed) grad_weights[index] = slope.weight;
    // The lanes take turns at writing.
    if ((index & last_lane) != place.lane) return;
    const R factor = weight * launch.scale;
    reinterpret_cast<Pair<T>*>(grad_offset)[index] = {Element<T>::narrow(factor * slope.x),
                                                      Element<T>::narrow(factor * slope.y)};
    if (!Window::fixed) {
      const R gradient = Window::softmax(launch) ? modulated * (slope.weight - mean) : slope.weight;
      grad_mask[index] = Element<T>::narrow(gradient);
    }
  });
  if constexpr (Window::fixed) {
    if (Window::softmax(launch)) softmax_backward(modulation.values, grad_weights, Window::num_points);
#pragma unroll
    for (int i = 0; i < Window::num_points; ++i)
      if ((i & last_lane) == place.lane) grad_mask[i] = Element<T>::narrow(grad_weights[i]);
  }
}

}  // namespace dcnv3
