// Multi-scale deformable attention for the CPU.
//
// The points of one level and head are located for a run of queries at once, so that neighbouring queries find the
// pixels they share in the cache. A task of the backward owns the gradient of one level and head of an image: no
// atomics, and sums in the order of the queries for any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "deformable_attention_geometry.h"
#include "sampling_cpu.h"

namespace deformable_attention {

// The tensors of one call; T is the stored type.
template <class T>
struct Forward {
  const T* value;
  const simd::Real<T>* locations;
  const T* weights;
  T* out;
};

template <class T>
struct Backward {
  const T *grad, *value;
  const simd::Real<T>* locations;
  const T* weights;
  T* grad_value;
  simd::Real<T>* grad_locations;
  T* grad_weights;
};

// One head of one level, for `count` queries of an image from `first` on.
struct Run {
  int64_t image, first;
  int count, head, level;
};

// Queries whose points are located at once: their arrays stay in the first-level cache.
inline int run_length(const Geometry& geometry) { return std::max(1, 128 / geometry.points); }

// Index of the point 0 of a run's first query; the next query's is points_per_query further.
inline int64_t first_point(const Geometry& geometry, const Run& run) {
  const int64_t query = run.image * geometry.queries + run.first;
  return ((query * geometry.heads + run.head) * geometry.num_levels + run.level) * geometry.points;
}

inline int64_t points_per_query(const Geometry& geometry) {
  return int64_t(geometry.heads) * geometry.num_levels * geometry.points;
}

// The first channel of a run's head at the level's first pixel, in elements.
inline int64_t first_channel(const Geometry& geometry, const Run& run) {
  const int64_t pixel = run.image * geometry.pixels + geometry.levels[run.level].first;
  return pixel * geometry.channels() + int64_t(run.head) * geometry.depth;
}

// The sampling points of a run.
template <class S>
class RunPoints : public PointTable<S> {
 public:
  using typename PointTable<S>::V;
  using typename PointTable<S>::N;

  explicit RunPoints(const Geometry& geometry)
      : PointTable<S>(run_length(geometry) * geometry.points),
        geometry_(geometry),
        locations_(2 * vectors_),
        weights_(vectors_),
        grad_locations_(2 * vectors_),
        grad_weights_(vectors_) {}

  template <bool for_backward, class T>
  void locate_points(const Run& run, const S* locations, const T* weights) {
    const int points = geometry_.points;
    S *location = scalars(locations_), *weight = scalars(weights_);
    int64_t from = first_point(geometry_, run);
    for (int q = 0; q < run.count; q++, from += points_per_query(geometry_)) {
      for (int i = 0; i < 2 * points; i++) *location++ = locations[2 * from + i];
      for (int i = 0; i < points; i++) *weight++ = simd::load<1>(weights + from + i);
    }
    const Level& level = geometry_.levels[run.level];
    const S height = static_cast<S>(level.height), width = static_cast<S>(level.width);
    for (int v = 0; v < vectors_of(run); v++) {
      const auto [x, y] = simd::deinterleave<N::lanes>(locations_[2 * v], locations_[2 * v + 1]);
      const Point<V> point = locate(coordinate(y, height), coordinate(x, width), level.height, level.width);
      this->template set_points<for_backward>(v, point, weights_[v], level.width, geometry_.channels(), 0);
    }
  }

  // From the dot products to the gradients of locations and weights.
  template <class T>
  void store_gradients(const Run& run, S* grad_locations, T* grad_weights) {
    const Level& level = geometry_.levels[run.level];
    const S height = static_cast<S>(level.height), width = static_cast<S>(level.width);
    for (int v = 0; v < vectors_of(run); v++) {
      const Slopes<V> slope = this->slopes_of(v);
      grad_weights_[v] = slope.weight;
      const auto [low, high] =
          simd::interleave<N::lanes>(weights_[v] * slope.x * width, weights_[v] * slope.y * height);
      grad_locations_[2 * v] = low;
      grad_locations_[2 * v + 1] = high;
    }
    const int points = geometry_.points;
    const S *location = scalars(grad_locations_), *weight = scalars(grad_weights_);
    int64_t to = first_point(geometry_, run);
    for (int q = 0; q < run.count; q++, to += points_per_query(geometry_)) {
      for (int i = 0; i < 2 * points; i++) grad_locations[2 * to + i] = *location++;
      for (int i = 0; i < points; i++) simd::store<1>(grad_weights + to + i, *weight++);
    }
  }

 private:
  using PointTable<S>::scalars;
  using PointTable<S>::vectors_;

  int vectors_of(const Run& run) const { return (run.count * geometry_.points + N::lanes - 1) / N::lanes; }

  const Geometry& geometry_;
  std::vector<V> locations_, weights_, grad_locations_, grad_weights_;
};

// parallel_for(count, body): body(first, last) on ranges that cover [0, count).
template <class T, class ParallelFor>
void forward(const Geometry& geometry, const Forward<T>& tensors, const ParallelFor& parallel_for) {
  using S = simd::Real<T>;
  const int length = run_length(geometry), depth = geometry.depth;
  const int64_t runs = (geometry.queries + length - 1) / length;
  parallel_for(geometry.batch * runs, [&](int64_t begin, int64_t end) {
    RunPoints<S> table(geometry);
    std::vector<S> out(int64_t(length) * depth);
    for (int64_t i = begin; i < end; i++) {
      Run run = {i / runs, i % runs * length, 0, 0, 0};
      run.count = static_cast<int>(std::min<int64_t>(length, geometry.queries - run.first));
      const Sums sums = {run.count, geometry.points, 0, depth};
      for (run.head = 0; run.head < geometry.heads; run.head++) {
        std::fill(out.begin(), out.end(), S(0));
        for (run.level = 0; run.level < geometry.num_levels; run.level++) {
          table.template locate_points<false>(run, tensors.locations, tensors.weights);
          const T* value = tensors.value + first_channel(geometry, run);
          for_each_block(depth, [&](int channel, auto width) {
            gather_block<width, true>(sums, table, value + channel, out.data() + channel);
          });
        }
        T* to = tensors.out + (run.image * geometry.queries + run.first) * geometry.channels() + run.head * depth;
        for (int q = 0; q < run.count; q++) simd::narrow(out.data() + q * depth, to + q * geometry.channels(), depth);
      }
    }
  });
}

template <class T, class ParallelFor>
void backward(const Geometry& geometry, const Backward<T>& tensors, const ParallelFor& parallel_for) {
  using S = simd::Real<T>;
  const int length = run_length(geometry), depth = geometry.depth;
  const int64_t channels = geometry.channels();
  std::unique_ptr<S[]> wide;  // grad_value in the type of the sums, where that is another
  S* grad_value;
  if constexpr (std::is_same_v<S, T>) {
    grad_value = tensors.grad_value;
  } else {
    wide = std::make_unique_for_overwrite<S[]>(geometry.batch * geometry.pixels * channels);
    grad_value = wide.get();
  }

  parallel_for(geometry.batch * geometry.heads * geometry.num_levels, [&](int64_t begin, int64_t end) {
    RunPoints<S> table(geometry);
    for (int64_t i = begin; i < end; i++) {
      const int64_t image_head = i / geometry.num_levels;
      Run run = {image_head / geometry.heads, 0, 0, static_cast<int>(image_head % geometry.heads),
                 static_cast<int>(i % geometry.num_levels)};
      const int64_t origin = first_channel(geometry, run);
      const Level& level = geometry.levels[run.level];
      const int64_t pixels = int64_t(level.height) * level.width;
      for (int64_t p = 0; p < pixels; p++) std::fill_n(grad_value + origin + p * channels, depth, S(0));
      for (; run.first < geometry.queries; run.first += length) {
        run.count = static_cast<int>(std::min<int64_t>(length, geometry.queries - run.first));
        table.template locate_points<true>(run, tensors.locations, tensors.weights);
        table.clear_dots();
        const T* grad = tensors.grad + (run.image * geometry.queries + run.first) * channels + run.head * depth;
        const Sums sums = {run.count, geometry.points, 0, channels};
        for_each_block(depth, [&](int channel, auto width) {
          scatter_block<width>(sums, table, grad + channel, tensors.value + origin + channel,
                               grad_value + origin + channel);
        });
        table.store_gradients(run, tensors.grad_locations, tensors.grad_weights);
      }
      if constexpr (!std::is_same_v<S, T>) {
        for (int64_t p = 0; p < pixels; p++) {
          const int64_t at = origin + p * channels;
          simd::narrow(grad_value + at, tensors.grad_value + at, depth);
        }
      }
    }
  });
}

}  // namespace deformable_attention
