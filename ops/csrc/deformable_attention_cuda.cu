// Chooses and launches the kernels of multi-scale deformable attention.

#include "deformable_attention_cuda.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_launch.cuh"
#include "deformable_attention_cuda.cuh"

namespace deformable_attention {
namespace {

template <int V, int Points>
struct Variant {
  static constexpr int vector = V, points = Points;
};

// Call run(Variant) for the fastest kernel that can do the job.
template <typename T, typename Run>
void choose_variant(const Geometry& geometry, bool aligned, Run run) {
  if constexpr (sizeof(T) <= 4) {
    constexpr int vector = kVectorChannels<T>;
    if (aligned && geometry.depth % vector == 0) {
      const bool fixed = geometry.points == 4 && geometry.depth == vector << lane_bits(geometry.depth, vector);
      if (fixed) return run(Variant<vector, 4>{});
      return run(Variant<vector, 0>{});
    }
  }
  run(Variant<1, 0>{});
}

int64_t image_size(const Geometry& geometry) { return geometry.pixels * geometry.channels(); }

// Call run(launch, first image) for batches whose threads can be counted in 31 bits.
template <typename Run>
void for_each_launch(const Geometry& geometry, int vector, Run run) {
  const int bits = lane_bits(geometry.depth, vector);
  const int64_t threads = geometry.queries * geometry.heads << bits;
  if (threads == 0) return;
  if (image_size(geometry) >= int64_t{1} << 31 || threads > kMaxThreads) {
    throw std::runtime_error("deformable_attention: the CUDA kernel counts within an image in 31 bits; " +
                             std::to_string(geometry.pixels) + " pixels of " + std::to_string(geometry.channels()) +
                             " channels or " + std::to_string(geometry.queries) +
                             " queries are too many. Split the queries or lower the resolution.");
  }
  Launch launch = {};
  launch.lane_bits = bits;
  launch.channels = geometry.channels();
  launch.depth = geometry.depth;
  launch.points = geometry.points;
  launch.num_levels = geometry.num_levels;
  launch.pixels = geometry.pixels;
  launch.heads = make_divider(geometry.heads);
  launch.queries = make_divider(static_cast<uint32_t>(geometry.queries));
  for (int i = 0; i < geometry.num_levels; ++i) launch.levels[i] = geometry.levels[i];
  for_each_part(geometry.batch, threads, [&](int64_t first, int64_t images) {
    launch.num_threads = static_cast<uint32_t>(threads * images);
    run(launch, first);
  });
}

// Where an image's part of each tensor starts, in elements.
struct Starts {
  int64_t value, query, point;

  Starts(const Geometry& geometry, int64_t image)
      : value(image * image_size(geometry)),
        query(image * geometry.queries * geometry.channels()),
        point(image * geometry.queries * geometry.heads * geometry.num_levels * geometry.points) {}
};

template <typename T>
void forward(const Geometry& geometry, const ForwardBuffers& buffers, void* stream) {
  const auto value = static_cast<const T*>(buffers.value), weights = static_cast<const T*>(buffers.weights);
  const auto locations = static_cast<const Real<T>*>(buffers.locations);
  const auto out = static_cast<T*>(buffers.out);
  choose_variant<T>(geometry, is_aligned(value) && is_aligned(out), [&](auto variant) {
    using V = decltype(variant);
    for_each_launch(geometry, V::vector, [&](const Launch& launch, int64_t image) {
      const Starts start(geometry, image);
      enqueue("deformable_attention", stream, forward_kernel<T, V::vector, V::points>, launch, value + start.value,
              locations + 2 * start.point, weights + start.point, out + start.query);
    });
  });
}

template <typename T>
void backward(const Geometry& geometry, const BackwardBuffers& buffers, void* stream) {
  using R = Real<T>;
  const auto grad = static_cast<const T*>(buffers.grad), value = static_cast<const T*>(buffers.value),
             weights = static_cast<const T*>(buffers.weights);
  const auto locations = static_cast<const R*>(buffers.locations);
  const auto grad_value = static_cast<R*>(buffers.grad_value), grad_locations = static_cast<R*>(buffers.grad_locations);
  const auto grad_weights = static_cast<T*>(buffers.grad_weights);
  const bool aligned = is_aligned(value) && is_aligned(grad) && is_aligned(grad_value);
  choose_variant<T>(geometry, aligned, [&](auto variant) {
    using V = decltype(variant);
    for_each_launch(geometry, V::vector, [&](const Launch& launch, int64_t image) {
      const Starts start(geometry, image);
      enqueue("deformable_attention", stream, backward_kernel<T, V::vector, V::points>, launch, grad + start.query,
              value + start.value, locations + 2 * start.point, weights + start.point, grad_value + start.value,
              grad_locations + 2 * start.point, grad_weights + start.point);
    });
  });
}

}  // namespace

void launch_forward(const Geometry& geometry, ElementType type, const ForwardBuffers& buffers, void* stream) {
  dispatch(type, [&]<typename T>(T*) { forward<T>(geometry, buffers, stream); });
}

void launch_backward(const Geometry& geometry, ElementType type, const BackwardBuffers& buffers, void* stream) {
  dispatch(type, [&]<typename T>(T*) { backward<T>(geometry, buffers, stream); });
}

}  // namespace deformable_attention
