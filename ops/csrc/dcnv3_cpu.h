// DCNv3 kernels for the CPU.
//
// For each output pixel the points of all groups are located at once (dcnv3_points.h); then each group sums vectors of
// channels (sampling_cpu.h). The backward adds into memory that its task owns: no atomics, and sums in a fixed order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "dcnv3_points.h"
#include "sampling_cpu.h"

namespace dcnv3 {

// The tensors of one call; T is the stored type. Gradients of offset and mask are contiguous.
template <class T>
struct Forward {
  const T *x, *offset, *mask;
  T* out;
};

template <class T>
struct Backward {
  const T *grad, *x, *offset, *mask;
  T *grad_x, *grad_offset, *grad_mask;
};

// What the points of one output pixel make up.
inline Sums sums_of(const Geometry& geometry) {
  return {geometry.groups, geometry.points, geometry.depth, geometry.depth};
}

// Output rows [first, last), counted through the batch.
template <class T>
void forward_rows(const Geometry& geometry, const Forward<T>& tensors, int64_t first, int64_t last) {
  PixelPoints<simd::Real<T>> table(geometry);
  const Sums sums = sums_of(geometry);
  const int64_t channels = geometry.channels(), image = int64_t(geometry.y.input) * geometry.x.input * channels;
  for (int64_t line = first; line < last; line++) {
    const int64_t row = line % geometry.y.output;
    const T* x = tensors.x + line / geometry.y.output * image;
    for (int64_t column = 0; column < geometry.x.output; column++) {
      const int64_t pixel = line * geometry.x.output + column;
      table.template locate_points<false>(tensors.offset + pixel * geometry.offset_stride,
                                          tensors.mask + pixel * geometry.mask_stride, row, column);
      for_each_block(geometry.depth, [&](int channel, auto width) {
        gather_block<width, false>(sums, table, x + channel, tensors.out + pixel * channels + channel);
      });
    }
  }
}

// Rows [first, last) of an image.
struct Rows {
  int64_t first, last;

  bool overlaps(Rows other) const { return first < other.last && other.first < last; }
};

// The input rows that the points of output rows `rows` of one image can touch.
template <class T>
Rows touched_rows(const Geometry& geometry, const T* offset, int64_t image, Rows rows) {
  PixelPoints<simd::Real<T>> table(geometry);
  for (int64_t row = rows.first; row < rows.last; row++) {
    for (int64_t column = 0; column < geometry.x.output; column++) {
      const int64_t pixel = (image * geometry.y.output + row) * geometry.x.output + column;
      table.extend_range(offset + pixel * geometry.offset_stride, row);
    }
  }
  const auto [lowest, highest] = table.range();
  if (lowest > highest) return {0, 0};
  // A row more on both sides: the compiler may round coordinates here unlike in locate_points.
  return {std::max<int64_t>(0, static_cast<int64_t>(std::floor(lowest)) - 1),
          std::min<int64_t>(geometry.y.input, static_cast<int64_t>(std::floor(highest)) + 3)};
}

// Output rows `rows` of one image. grad_x is where the image's row 0 would be: only rows that are touched need exist.
template <class T>
void backward_rows(const Geometry& geometry, const Backward<T>& tensors, int64_t image, Rows rows,
                   simd::Real<T>* grad_x) {
  PixelPoints<simd::Real<T>> table(geometry);
  const Sums sums = sums_of(geometry);
  const int64_t channels = geometry.channels(), points = geometry.groups * geometry.points;
  const T* x = tensors.x + image * geometry.y.input * geometry.x.input * channels;
  for (int64_t row = rows.first; row < rows.last; row++) {
    for (int64_t column = 0; column < geometry.x.output; column++) {
      const int64_t pixel = (image * geometry.y.output + row) * geometry.x.output + column;
      table.template locate_points<true>(tensors.offset + pixel * geometry.offset_stride,
                                         tensors.mask + pixel * geometry.mask_stride, row, column);
      table.clear_dots();
      for_each_block(geometry.depth, [&](int channel, auto width) {
        scatter_block<width>(sums, table, tensors.grad + pixel * channels + channel, x + channel, grad_x + channel);
      });
      table.store_gradients(tensors.grad_offset + pixel * points * 2, tensors.grad_mask + pixel * points);
    }
  }
}

// A task of the backward: a band of one image's output rows.
template <class S>
struct Band {
  int64_t image;
  Rows output, input;
  std::vector<S> own;  // gradient of the input rows, where another band adds to the shared one
};

// Bands per image, for small batches on many cores. It depends on the shape alone, and so does the order of all sums:
// results are the same bits for any number of threads.
inline int64_t bands_per_image(const Geometry& geometry) {
  constexpr int64_t wanted_tasks = 8, least_rows = 8;
  const int64_t wanted = (wanted_tasks + geometry.batch - 1) / geometry.batch;
  return std::max<int64_t>(1, std::min(wanted, geometry.y.output / least_rows));
}

// parallel_for(count, body): body(first, last) on ranges that cover [0, count).
template <class T, class ParallelFor>
void forward(const Geometry& geometry, const Forward<T>& tensors, const ParallelFor& parallel_for) {
  parallel_for(geometry.batch * geometry.y.output,
               [&](int64_t first, int64_t last) { forward_rows(geometry, tensors, first, last); });
}

template <class T, class ParallelFor>
void backward(const Geometry& geometry, const Backward<T>& tensors, const ParallelFor& parallel_for) {
  using S = simd::Real<T>;
  const int64_t height = geometry.y.input, line = int64_t(geometry.x.input) * geometry.channels();
  const int64_t num_bands = bands_per_image(geometry);
  std::unique_ptr<S[]> wide;  // grad_x in the type of the sums, where that is another
  S* grad_x;
  if constexpr (std::is_same_v<S, T>) {
    grad_x = tensors.grad_x;
  } else {
    wide = std::make_unique_for_overwrite<S[]>(geometry.batch * height * line);
    grad_x = wide.get();
  }

  std::vector<Band<S>> bands(geometry.batch * num_bands);
  parallel_for(bands.size(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t image = i / num_bands, band = i % num_bands, rows = geometry.y.output;
      const Rows output = {rows * band / num_bands, rows * (band + 1) / num_bands};
      const Rows input = num_bands == 1 ? Rows{0, height} : touched_rows(geometry, tensors.offset, image, output);
      bands[i] = {image, output, input, {}};
    }
  });
  // As many bands as do not overlap, every second one with ordinary offsets, add to grad_x without a buffer.
  std::vector<bool> shares(bands.size(), true);
  for (size_t i = 0; i < bands.size(); i++) {
    for (size_t j = i - i % num_bands; j < i; j++) {
      if (shares[j] && bands[j].input.overlaps(bands[i].input)) shares[i] = false;
    }
  }
  parallel_for(bands.size(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      Band<S>& band = bands[i];
      const int64_t begin = band.input.first * line, size = (band.input.last - band.input.first) * line;
      S* to = grad_x + band.image * height * line;
      if (shares[i]) {
        std::fill_n(to + begin, size, S(0));
      } else {
        band.own.resize(size);
        to = band.own.data() - begin;
      }
      backward_rows(geometry, tensors, band.image, band.output, to);
    }
  });
  parallel_for(geometry.batch * height, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const int64_t image = r / height, row = r % height;
      S* to = grad_x + r * line;
      bool written = false;
      for (int64_t i = image * num_bands; i < (image + 1) * num_bands; i++) {
        written |= shares[i] && bands[i].input.overlaps({row, row + 1});
      }
      if (!written) std::fill_n(to, line, S(0));
      for (int64_t i = image * num_bands; i < (image + 1) * num_bands; i++) {
        const Band<S>& band = bands[i];
        if (shares[i] || !band.input.overlaps({row, row + 1})) continue;
        const S* from = band.own.data() + (row - band.input.first) * line;
        for (int64_t c = 0; c < line; c++) to[c] += from[c];
      }
      if constexpr (!std::is_same_v<S, T>) simd::narrow(to, tensors.grad_x + r * line, line);
    }
  });
}

}  // namespace dcnv3
