// Chooses and launches the DCNv3 kernels.

#include "dcnv3_cuda.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_launch.cuh"
#include "dcnv3_cuda.cuh"

namespace dcnv3 {
namespace {

template <int V, typename Window>
struct Variant {
  static constexpr int vector = V;
  using window = Window;
};

// Call run(Variant) for the fastest kernel that can do the job.
template <typename T, typename Run>
void choose_variant(const Geometry& geometry, bool aligned, Run run) {
  if constexpr (sizeof(T) <= 4) {
    constexpr int vector = kVectorChannels<T>;
    if (aligned && geometry.depth % vector == 0) {
      const bool fixed = geometry.y.kernel == 3 && geometry.x.kernel == 3 &&
                         geometry.depth == vector << lane_bits(geometry.depth, vector);
      if (!fixed) return run(Variant<vector, AnyWindow>{});
      if (geometry.remove_center) {
        if (geometry.softmax) return run(Variant<vector, Window3x3<true, true>>{});
        return run(Variant<vector, Window3x3<true, false>>{});
      }
      if (geometry.softmax) return run(Variant<vector, Window3x3<false, true>>{});
      return run(Variant<vector, Window3x3<false, false>>{});
    }
  }
  run(Variant<1, AnyWindow>{});
}

int64_t input_size(const Geometry& geometry) {
  return int64_t{geometry.y.input} * geometry.x.input * geometry.channels();
}

int64_t output_pixels(const Geometry& geometry) { return int64_t{geometry.y.output} * geometry.x.output; }

// A launch over as many images as fit.
template <typename R>
Launch<R> make_launch(const Geometry& geometry, int vector) {
  Launch<R> launch = {};
  launch.lane_bits = lane_bits(geometry.depth, vector);
  launch.y = geometry.y;
  launch.x = geometry.x;
  launch.channels = geometry.channels();
  launch.depth = geometry.depth;
  launch.groups = make_divider(geometry.groups);
  launch.out_width = make_divider(geometry.x.output);
  launch.out_height = make_divider(geometry.y.output);
  launch.scale = static_cast<R>(geometry.scale);
  launch.remove_center = geometry.remove_center;
  launch.softmax = geometry.softmax;
  launch.offset_stride = geometry.offset_stride;
  launch.mask_stride = geometry.mask_stride;
  return launch;
}

// Call run(launch, first image) for batches whose threads can be counted in 31 bits.
template <typename R, typename Run>
void for_each_launch(const Geometry& geometry, int vector, Run run) {
  const int64_t threads = output_pixels(geometry) * geometry.groups << lane_bits(geometry.depth, vector);
  if (threads == 0) return;
  if (input_size(geometry) >= int64_t{1} << 31 || threads > kMaxThreads) {
    throw std::runtime_error("dcnv3: the CUDA kernel counts within an image in 31 bits; an input of " +
                             std::to_string(geometry.y.input) + " x " + std::to_string(geometry.x.input) + " x " +
                             std::to_string(geometry.channels()) + " elements or an output of " +
                             std::to_string(geometry.y.output) + " x " + std::to_string(geometry.x.output) +
                             " pixels is too large. Split the image.");
  }
  Launch<R> launch = make_launch<R>(geometry, vector);
  for_each_part(geometry.batch, threads, [&](int64_t first, int64_t images) {
    launch.num_threads = static_cast<uint32_t>(threads * images);
    run(launch, first);
  });
}

template <typename T>
void forward(const Geometry& geometry, const ForwardBuffers& buffers, void* stream) {
  const auto x = static_cast<const T*>(buffers.x), offset = static_cast<const T*>(buffers.offset),
             mask = static_cast<const T*>(buffers.mask);
  const auto out = static_cast<T*>(buffers.out);
  choose_variant<T>(geometry, is_aligned(x) && is_aligned(out), [&](auto variant) {
    using V = decltype(variant);
    for_each_launch<Real<T>>(geometry, V::vector, [&](const Launch<Real<T>>& launch, int64_t image) {
      const int64_t pixel = image * output_pixels(geometry);
      enqueue("dcnv3", stream, forward_kernel<T, V::vector, typename V::window>, launch,
              x + image * input_size(geometry), offset + pixel * geometry.offset_stride,
              mask + pixel * geometry.mask_stride, out + pixel * geometry.channels());
    });
  });
}

template <typename T>
void backward(const Geometry& geometry, const BackwardBuffers& buffers, void* stream) {
  using R = Real<T>;
  const auto grad = static_cast<const T*>(buffers.grad), x = static_cast<const T*>(buffers.x),
             offset = static_cast<const T*>(buffers.offset), mask = static_cast<const T*>(buffers.mask);
  const auto grad_x = static_cast<R*>(buffers.grad_x);
  const auto grad_offset = static_cast<T*>(buffers.grad_offset), grad_mask = static_cast<T*>(buffers.grad_mask);
  const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(grad_x);
  choose_variant<T>(geometry, aligned, [&](auto variant) {
    using V = decltype(variant);
    for_each_launch<R>(geometry, V::vector, [&](const Launch<R>& launch, int64_t image) {
      const int64_t pixel = image * output_pixels(geometry), point = pixel * geometry.groups * geometry.points;
      enqueue("dcnv3", stream, backward_kernel<T, V::vector, typename V::window>, launch,
              grad + pixel * geometry.channels(), x + image * input_size(geometry),
              offset + pixel * geometry.offset_stride, mask + pixel * geometry.mask_stride,
              grad_x + image * input_size(geometry), grad_offset + 2 * point, grad_mask + point);
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

}  // namespace dcnv3
