// The machine's ceilings: fused multiply-adds and loads per second, with the vector width that the kernels use.
#include <omp.h>

#include <cstddef>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
// More independent chains than latency times units on current cores.
constexpr int kChains = 12;

namespace {

volatile float sink;

float total(const Vector* chain) {
  float sum = 0;
  for (int i = 0; i < kChains; i++)
    for (int lane = 0; lane < kLanes; lane++) sum += chain[i][lane];
  return sum;
}

// Best time in seconds of `repeats` runs of work(thread), all threads starting together.
template <class Work>
double best_time(int threads, int repeats, Work work) {
  double best = 1e30;
  for (int r = 0; r < repeats; r++) {
    double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp barrier
#pragma omp master
      start = omp_get_wtime();
#pragma omp barrier
      work(omp_get_thread_num());
#pragma omp barrier
#pragma omp master
      end = omp_get_wtime();
    }
    if (end - start < best) best = end - start;
  }
  return best;
}

}  // namespace

// float32 GFLOP/s, a multiply-add counting as two.
extern "C" double multiply_add_rate(int threads, int repeats) {
  constexpr long kSteps = 4000000;
  const double seconds = best_time(threads, repeats, [](int) {
    Vector chain[kChains], factor, term;
    for (int lane = 0; lane < kLanes; lane++) factor[lane] = 0.999f + sink, term[lane] = 0.001f + sink;
    for (auto& one : chain) one = factor;
    for (long step = 0; step < kSteps; step++)
      for (auto& one : chain) one = one * factor + term;
    sink = total(chain) * 0;
  });
  return 2e-9 * kSteps * kChains * kLanes * threads / seconds;
}

// GB/s of vector loads from a buffer of `bytes` per thread, read again and again.
extern "C" double load_rate(int threads, int repeats, size_t bytes) {
  const size_t count = bytes / sizeof(Vector) / kChains * kChains;
  const size_t passes = (size_t(1) << 31) / bytes + 1;
  std::vector<std::vector<Vector>> buffers(threads);
  const double seconds = best_time(threads, repeats + 1, [&](int thread) {
    auto& buffer = buffers[thread];
    // The first repeat also allocates, on the thread that reads.
    if (buffer.empty()) buffer.assign(count, Vector{});
    Vector chain[kChains] = {};
    for (size_t pass = 0; pass < passes; pass++) {
      const Vector* from = buffer.data();
      // The compiler must not hoist the loads of an unchanged buffer out of this loop.
      asm volatile("" : "+r"(from) : : "memory");
      for (size_t i = 0; i < count; i += kChains)
        for (int j = 0; j < kChains; j++) chain[j] += from[i + j];
    }
    sink = total(chain) * 0;
  });
  return 1e-9 * passes * count * sizeof(Vector) * threads / seconds;
}
