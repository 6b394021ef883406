// Runs the CPU kernels of deformable attention on heap blocks of exactly the tensors' sizes, with threads, and compares
// them with plain loops. Built with sanitizers by test_cpu_kernels.py. Exits with 1 on a difference.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "deformable_attention_cpu.h"

using deformable_attention::Geometry;
using deformable_attention::Level;

struct Problem {
  int64_t batch, queries;
  int heads, depth, points;
  double spread;  // of the locations around the middle of the levels
  std::vector<std::pair<int, int>> shapes;
};

const Problem problems[] = {
    {.batch = 1, .queries = 70, .heads = 2, .depth = 32, .points = 4, .spread = 1, .shapes = {{9, 7}, {4, 3}, {1, 1}}},
    {.batch = 2, .queries = 5, .heads = 3, .depth = 57, .points = 3, .spread = 0.2, .shapes = {{1, 9}, {9, 1}}},
    {.batch = 3, .queries = 129, .heads = 1, .depth = 1, .points = 1, .spread = 1e30, .shapes = {{5, 5}}},
    {.batch = 2, .queries = 2, .heads = 5, .depth = 8, .points = 150, .spread = 2, .shapes = {{2, 2}, {3, 2}}},
    {.batch = 1, .queries = 0, .heads = 2, .depth = 16, .points = 4, .spread = 1, .shapes = {{3, 3}}},
};

template <class T>
struct Tensors {
  std::vector<T> grad, value, weights, out, grad_value, grad_weights;
  std::vector<simd::Real<T>> locations, grad_locations;
};

// The same by plain loops in float64; results as double.
template <class T>
Tensors<double> plain(const Geometry& g, const Tensors<T>& t) {
  Tensors<double> r;
  r.out.resize(t.out.size()), r.grad_value.resize(t.value.size());
  r.grad_locations.resize(t.locations.size()), r.grad_weights.resize(t.weights.size());
  const int64_t channels = g.channels(), sums = g.batch * g.queries * g.heads;
  for (int64_t sum = 0; sum < sums; sum++) {
    const int64_t head = sum % g.heads, image = sum / g.heads / g.queries;
    for (int l = 0; l < g.num_levels; l++) {
      const Level& level = g.levels[l];
      for (int64_t k = (sum * g.num_levels + l) * g.points; k < (sum * g.num_levels + l + 1) * g.points; k++) {
        const double x = t.locations[2 * k] * level.width - 0.5, y = t.locations[2 * k + 1] * level.height - 0.5;
        const double weight = wide(t.weights[k]);
        if (!(x > -1 && y > -1 && x < level.width && y < level.height)) continue;
        for (int corner = 0; corner < 4; corner++) {
          const int64_t cx = std::floor(x) + corner % 2, cy = std::floor(y) + corner / 2;
          if (cx < 0 || cy < 0 || cx >= level.width || cy >= level.height) continue;
          const double wx = 1 - std::abs(x - cx), wy = 1 - std::abs(y - cy);
          for (int64_t c = 0; c < g.depth; c++) {
            const int64_t to = sum * g.depth + c;
            const int64_t pixel = image * g.pixels + level.first + cy * level.width + cx;
            const int64_t from = pixel * channels + head * g.depth + c;
            const double grad = wide(t.grad[to]), value = wide(t.value[from]);
            r.out[to] += weight * wx * wy * value;
            r.grad_value[from] += weight * wx * wy * grad;
            r.grad_weights[k] += wx * wy * value * grad;
            r.grad_locations[2 * k] += weight * wy * (corner % 2 ? 1 : -1) * value * grad * level.width;
            r.grad_locations[2 * k + 1] += weight * wx * (corner / 2 ? 1 : -1) * value * grad * level.height;
          }
        }
      }
    }
  }
  return r;
}

template <class T>
bool passes(const Problem& p, const char* type, double tolerance) {
  std::mt19937 random(0);
  Geometry g{.batch = p.batch, .pixels = 0, .queries = p.queries, .heads = p.heads, .depth = p.depth,
             .points = p.points, .num_levels = static_cast<int32_t>(p.shapes.size()), .levels = {}};
  for (size_t l = 0; l < p.shapes.size(); l++) {
    g.levels[l] = {p.shapes[l].first, p.shapes[l].second, static_cast<int32_t>(g.pixels)};
    g.pixels += p.shapes[l].first * p.shapes[l].second;
  }
  const size_t outputs = p.batch * p.queries * g.channels(), values = p.batch * g.pixels * g.channels();
  const size_t points = p.batch * p.queries * p.heads * g.num_levels * p.points;
  Tensors<T> t;
  t.grad = random_values<T>(outputs, 1, random), t.value = random_values<T>(values, 1, random);
  t.weights = random_values<T>(points, 1, random);
  t.locations = random_values<simd::Real<T>>(2 * points, p.spread, random);
  for (auto& location : t.locations) location += 0.5;
  t.out = random_values<T>(outputs, NAN, random), t.grad_value = random_values<T>(values, NAN, random);
  t.grad_locations = random_values<simd::Real<T>>(2 * points, NAN, random);
  t.grad_weights = random_values<T>(points, NAN, random);
  deformable_attention::forward<T>(g, {t.value.data(), t.locations.data(), t.weights.data(), t.out.data()},
                                   parallel_for);
  deformable_attention::backward<T>(
      g, {t.grad.data(), t.value.data(), t.locations.data(), t.weights.data(), t.grad_value.data(),
          t.grad_locations.data(), t.grad_weights.data()}, parallel_for);
  const Tensors<double> expected = plain(g, t);
  return report(type, tolerance, {difference(t.out, expected.out), difference(t.grad_value, expected.grad_value),
                                  difference(t.grad_locations, expected.grad_locations),
                                  difference(t.grad_weights, expected.grad_weights)});
}

int main() {
  bool passed = true;
  for (const Problem& problem : problems) {
    passed &= passes<double>(problem, "float64", 1e-12);
    passed &= passes<float>(problem, "float32", 4e-6);
    passed &= passes<simd::BFloat16>(problem, "bfloat16", 1. / 256 + 4e-6);
  }
  return passed ? 0 : 1;
}
