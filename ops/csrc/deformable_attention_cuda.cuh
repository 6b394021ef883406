// CUDA kernels of multi-scale deformable attention; the launchers in deformable_attention_cuda.cu choose among them.
//
// A thread owns V neighbouring channels of one (query, head): with V > 1 every load of channels is 128 bits wide. The
// lanes that share a (query, head) are neighbours in a warp; the backward sums the gradients of locations and weights
// over them with shuffles. Arithmetic is float32, or float64 for float64 tensors.
//
// With -DCUDA_EMULATION a C++ compiler builds this file for the CPU (tests/ops/emulation).
#pragma once

#include <cstdint>

#include "deformable_attention_geometry.h"
#include "sampling_cuda.cuh"

namespace deformable_attention {

// One launch.
struct Launch {
  uint32_t num_threads;
  int lane_bits;  // log2 of the threads that share a (query, head)
  int channels, depth, points, num_levels;
  int64_t pixels;  // of an image
  Divider heads, queries;
  Level levels[max_levels];

  __device__ __forceinline__ int64_t image_size() const { return pixels * channels; }
};

// The (query, head) of a thread and its lane among those that share it; queries count through the batch.
struct Place {
  uint32_t lane, query_head, query, head, image;

  __device__ __forceinline__ Place(const Launch& launch, uint32_t thread) {
    query_head = thread >> launch.lane_bits;
    lane = thread & ((1u << launch.lane_bits) - 1);
    query = launch.heads.quotient(query_head);
    head = query_head - query * launch.heads.divisor;
    image = launch.queries.quotient(query);
  }

  // Index of the first point of the (query, head).
  __device__ __forceinline__ int64_t point(const Launch& launch, int points) const {
    return int64_t(query_head) * (launch.num_levels * points);
  }
  // The lane's first channel: in a tensor of queries, and at an image's first pixel.
  __device__ __forceinline__ int channel(const Launch& launch, int vector) const {
    return head * launch.depth + lane * vector;
  }
};

// Where a point reads.
template <typename R>
__device__ __forceinline__ Point<R> point_at(const Level& level, const R* location) {
  return locate(coordinate(__ldg(location + 1), R(level.height)), coordinate(__ldg(location), R(level.width)),
                level.height, level.width);
}

// Points: per level, if that is known at compile time and the lanes cover the channels exactly; else 0.
template <typename T, int V, int Points>
__global__ void __launch_bounds__(kBlockSize, Points ? 4 : 1)
    forward_kernel(const Launch launch, const T* __restrict__ value, const Real<T>* __restrict__ locations,
                   const T* __restrict__ weights, T* __restrict__ out) {
  using R = Real<T>;
  constexpr int unroll = Points ? Points : 1;
  const uint32_t thread = blockIdx.x * kBlockSize + threadIdx.x;
  if (thread >= launch.num_threads) return;
  const Place place(launch, thread);
  const int points = Points ? Points : launch.points;
  locations += 2 * place.point(launch, points);
  weights += place.point(launch, points);
  value = hide_origin(value + place.image * launch.image_size() + place.channel(launch, V));
  out += int64_t(place.query) * launch.channels + place.channel(launch, V);
  const int count = launch.depth - int(place.lane) * V;
  for (int channel = 0; Points || channel < count; channel += V << launch.lane_bits) {
    R sum[V] = {};
    int index = 0;
    for (int l = 0; l < launch.num_levels; ++l) {
      const Level level = launch.levels[l];
      const T* pixels = value + channel + level.first * launch.channels;
#pragma unroll(unroll)
      for (int p = 0; p < points; ++p, ++index) {
        const Point<R> point = point_at(level, locations + 2 * index);
        const R weight = is_void(point) ? R(0) : Element<T>::widen(__ldg(weights + index));
        const Reads<R> reads(point, level.width, launch.channels);
        add_sample(pixels + reads.start, reads, corner_weights(point, weight), sum);
      }
    }
    store_channels(out + channel, sum);
    if (Points) break;
  }
}

// grad_value accumulates in the type of the arithmetic and must start as zeros.
template <typename T, int V, int Points>
__global__ void __launch_bounds__(kBlockSize, Points ? 3 : 1)
    backward_kernel(const Launch launch, const T* __restrict__ grad, const T* __restrict__ value,
                    const Real<T>* __restrict__ locations, const T* __restrict__ weights,
                    Real<T>* __restrict__ grad_value, Real<T>* __restrict__ grad_locations,
                    T* __restrict__ grad_weights) {
  using R = Real<T>;
  constexpr int unroll = Points ? Points : 1;
  const uint32_t thread = blockIdx.x * kBlockSize + threadIdx.x;
  // All lanes of a (query, head) are active or none is.
  const unsigned active = __ballot_sync(0xffffffffu, thread < launch.num_threads);
  if (thread >= launch.num_threads) return;
  const Place place(launch, thread);
  const int points = Points ? Points : launch.points;
  const uint32_t last_lane = (1u << launch.lane_bits) - 1;
  const int64_t first_point = place.point(launch, points);
  const int64_t origin = place.image * launch.image_size() + place.channel(launch, V);
  Channels<T, V, Points != 0> channels;
  value = hide_origin(value + origin);
  grad_value = hide_origin(grad_value + origin);
  channels.grad = grad + int64_t(place.query) * launch.channels + place.channel(launch, V);
  channels.count = launch.depth - int(place.lane) * V;
  channels.lane_bits = launch.lane_bits;
  if (Points) load_channels(channels.loaded, channels.grad, true);
  locations += 2 * first_point;
  weights += first_point;
  grad_locations += 2 * first_point;
  grad_weights += first_point;

  int index = 0;
  for (int l = 0; l < launch.num_levels; ++l) {
    const Level level = launch.levels[l];
    channels.x = value + level.first * launch.channels;
    channels.grad_x = grad_value + level.first * launch.channels;
#pragma unroll(unroll)
    for (int p = 0; p < points; ++p, ++index) {
      const Point<R> point = point_at(level, locations + 2 * index);
      const R weight = is_void(point) ? R(0) : Element<T>::widen(__ldg(weights + index));
      const Reads<R> reads(point, level.width, launch.channels);
      Slopes<R> slope = slopes(point, channels.visit(reads, corner_weights(point, weight)));
      slope = sum_over_lanes(active, slope, launch.lane_bits);
      // The lanes take turns at writing.
      if ((index & last_lane) != place.lane) continue;
      reinterpret_cast<Pair<R>*>(grad_locations)[index] = {weight * slope.x * R(level.width),
                                                           weight * slope.y * R(level.height)};
      grad_weights[index] = Element<T>::narrow(slope.weight);
    }
  }
}

}  // namespace deformable_attention
