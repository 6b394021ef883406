// Runs the CPU kernels of DCNv3 on heap blocks of exactly the tensors' sizes, with threads, and compares them with
// plain loops. Built with sanitizers by test_cpu_kernels.py. Exits with 1 on a difference.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "dcnv3_cpu.h"

using dcnv3::Geometry;

struct Problem {
  int64_t batch;
  int height, width, groups, depth;
  double spread;  // of the offsets, in pixels
  int kernel_height = 3, kernel_width = 3, stride = 1;
  bool remove_center = false, softmax = true;
};

const Problem problems[] = {
    {.batch = 1, .height = 40, .width = 6, .groups = 2, .depth = 16, .spread = 60},
    {.batch = 1, .height = 33, .width = 5, .groups = 3, .depth = 57, .spread = 2, .kernel_width = 2},
    {.batch = 2, .height = 17, .width = 9, .groups = 1, .depth = 8, .spread = 1e30, .remove_center = true},
    {.batch = 3, .height = 1, .width = 7, .groups = 5, .depth = 3, .spread = 1, .softmax = false},
    {.batch = 2, .height = 9, .width = 1, .groups = 1, .depth = 1, .spread = 3, .kernel_height = 5, .stride = 2},
    {.batch = 9, .height = 4, .width = 4, .groups = 2, .depth = 32, .spread = 1},
};

template <class T>
struct Tensors {
  std::vector<T> grad, x, offset, mask, out, grad_x, grad_offset, grad_mask;
};

// The same by plain loops in float64; results as double.
template <class T>
Tensors<double> plain(const Geometry& g, const Tensors<T>& t) {
  Tensors<double> r;
  r.out.resize(t.out.size()), r.grad_x.resize(t.x.size());
  r.grad_offset.resize(t.offset.size()), r.grad_mask.resize(t.mask.size());
  const int64_t pixels = g.batch * g.y.output * g.x.output, channels = g.channels();
  for (int64_t pixel = 0; pixel < pixels; pixel++) {
    const int64_t row = pixel / g.x.output % g.y.output, column = pixel % g.x.output;
    const int64_t image = pixel / g.x.output / g.y.output * g.y.input * g.x.input;
    for (int64_t group = 0; group < g.groups; group++) {
      const int64_t first = (pixel * g.groups + group) * g.points;
      std::vector<double> weights(g.points);
      double sum = 0, mean = 0;
      for (int k = 0; k < g.points; k++) {
        weights[k] = g.softmax ? std::exp(wide(t.mask[first + k])) : wide(t.mask[first + k]);
        sum += weights[k];
      }
      int k = 0;
      for (int i = 0; i < g.x.kernel; i++) {
        for (int j = 0; j < g.y.kernel; j++) {
          if (g.remove_center && i == g.x.kernel / 2 && j == g.y.kernel / 2) continue;
          if (g.softmax) weights[k] /= sum;
          // All sizes here are small: dilation 1 and scale 1.
          const double x = column * g.x.stride - g.x.padding + i + wide(t.offset[2 * (first + k)]);
          const double y = row * g.y.stride - g.y.padding + j + wide(t.offset[2 * (first + k) + 1]);
          if (x > -1 && y > -1 && x < g.x.input && y < g.y.input) {
            for (int corner = 0; corner < 4; corner++) {
              const int64_t cx = std::floor(x) + corner % 2, cy = std::floor(y) + corner / 2;
              if (cx < 0 || cy < 0 || cx >= g.x.input || cy >= g.y.input) continue;
              const double wx = 1 - std::abs(x - cx), wy = 1 - std::abs(y - cy);
              for (int64_t c = group * g.depth; c < (group + 1) * g.depth; c++) {
                const int64_t from = (image + cy * g.x.input + cx) * channels + c;
                const double grad = wide(t.grad[pixel * channels + c]), value = wide(t.x[from]);
                r.out[pixel * channels + c] += weights[k] * wx * wy * value;
                r.grad_x[from] += weights[k] * wx * wy * grad;
                r.grad_mask[first + k] += wx * wy * value * grad;
                r.grad_offset[2 * (first + k)] += weights[k] * wy * (corner % 2 ? 1 : -1) * value * grad;
                r.grad_offset[2 * (first + k) + 1] += weights[k] * wx * (corner / 2 ? 1 : -1) * value * grad;
              }
            }
          }
          k++;
        }
      }
      for (k = 0; k < g.points; k++) mean += weights[k] * r.grad_mask[first + k];
      for (k = 0; g.softmax && k < g.points; k++) r.grad_mask[first + k] = weights[k] * (r.grad_mask[first + k] - mean);
    }
  }
  return r;
}

template <class T>
bool passes(const Problem& p, const char* type, double tolerance) {
  std::mt19937 random(0);
  const int points = p.kernel_height * p.kernel_width - p.remove_center;
  const auto axis = [&](int size, int kernel) {
    return dcnv3::Axis{size, (size + 2 - kernel) / p.stride + 1, kernel, p.stride, 1, 1};
  };
  Geometry g{.batch = p.batch, .y = axis(p.height, p.kernel_height), .x = axis(p.width, p.kernel_width),
             .groups = p.groups, .depth = p.depth, .points = points, .offset_stride = p.groups * points * 2,
             .mask_stride = p.groups * points, .scale = 1, .remove_center = p.remove_center, .softmax = p.softmax};
  const size_t pixels = g.batch * g.y.output * g.x.output, channels = g.channels();
  Tensors<T> t;
  t.grad = random_values<T>(pixels * channels, 1, random);
  t.x = random_values<T>(g.batch * p.height * p.width * channels, 1, random);
  t.offset = random_values<T>(pixels * g.offset_stride, p.spread, random);
  t.mask = random_values<T>(pixels * g.mask_stride, 1, random);
  t.out = random_values<T>(t.grad.size(), NAN, random), t.grad_x = random_values<T>(t.x.size(), NAN, random);
  t.grad_offset = random_values<T>(t.offset.size(), NAN, random);
  t.grad_mask = random_values<T>(t.mask.size(), NAN, random);
  dcnv3::forward<T>(g, {t.x.data(), t.offset.data(), t.mask.data(), t.out.data()}, parallel_for);
  dcnv3::backward<T>(g, {t.grad.data(), t.x.data(), t.offset.data(), t.mask.data(), t.grad_x.data(),
                         t.grad_offset.data(), t.grad_mask.data()}, parallel_for);
  const Tensors<double> expected = plain(g, t);
  return report(type, tolerance, {difference(t.out, expected.out), difference(t.grad_x, expected.grad_x),
                                  difference(t.grad_offset, expected.grad_offset),
                                  difference(t.grad_mask, expected.grad_mask)});
}

int main() {
  bool passed = true;
  for (const Problem& problem : problems) {
    passed &= passes<double>(problem, "float64", 1e-12);
    passed &= passes<float>(problem, "float32", 2e-6);
    passed &= passes<simd::BFloat16>(problem, "bfloat16", 1. / 256 + 2e-6);
  }
  return passed ? 0 : 1;
}
