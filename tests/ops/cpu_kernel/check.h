// What the programs that check the CPU kernels share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "simd.h"

template <class T>
double wide(T value) {
  return simd::load<1>(&value);
}

template <class T>
std::vector<T> random_values(size_t count, double spread, std::mt19937& random) {
  std::normal_distribution<simd::Real<T>> normal;
  std::vector<T> values(count);
  for (T& value : values) simd::store<1>(&value, static_cast<simd::Real<T>>(spread * normal(random)));
  return values;
}

template <class T>
double difference(const std::vector<T>& found, const std::vector<double>& expected) {
  double largest = 1e-30, difference = 0;
  for (size_t i = 0; i < found.size(); i++) {
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::max(difference, std::abs(wide(found[i]) - expected[i]));
    if (std::isnan(wide(found[i]))) return INFINITY;
  }
  return difference / largest;
}

const auto parallel_for = [](int64_t count, const auto& body) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; i++) threads.emplace_back([&, i] { body(count * i / 3, count * (i + 1) / 3); });
  for (auto& thread : threads) thread.join();
};

// Print the differences and say whether all are below the tolerance.
inline bool report(const char* type, double tolerance, std::initializer_list<double> differences) {
  const bool passed = std::max(differences) < tolerance;
  std::printf("%s %s:", passed ? "passed" : "FAILED", type);
  for (const double d : differences) std::printf(" %.1e", d);
  std::printf("\n");
  return passed;
}
