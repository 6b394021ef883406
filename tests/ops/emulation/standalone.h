// A program around a driver's run function, for builds that Python cannot load, such as those with a sanitizer.
//
// It reads records from standard input and writes their results to standard output. A record is a Call, the sizes in
// bytes of its eight buffers, and the contents of the first four, the inputs. The answer is the contents of the last
// four: the output and the gradients, the first of which is accumulated.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

// Memory of exactly the asked size, so that AddressSanitizer sees the first byte beyond.
struct Release {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{16}); }
};
using Buffer = std::unique_ptr<char[], Release>;

template <typename Call>
int answer_records(const char* (*run)(const Call*, void* const*)) {
  Call call;
  while (std::fread(&call, sizeof call, 1, stdin) == 1) {
    int64_t sizes[8];
    if (std::fread(sizes, sizeof sizes, 1, stdin) != 1) return 1;
    Buffer buffers[8];
    void* pointers[8];
    for (int i = 0; i < 8; i++) {
      buffers[i].reset(new (std::align_val_t{16}) char[sizes[i]]);
      pointers[i] = buffers[i].get();
      if (i < 4 && std::fread(pointers[i], 1, sizes[i], stdin) != static_cast<size_t>(sizes[i])) return 1;
      // NaN in every type, but for what is accumulated.
      if (i >= 4) std::memset(pointers[i], i == 5 ? 0 : 0xff, sizes[i]);
    }
    if (const char* error = run(&call, pointers)) {
      std::fprintf(stderr, "%s\n", error);
      return 1;
    }
    for (int i = 4; i < 8; i++) std::fwrite(pointers[i], 1, sizes[i], stdout);
  }
  return 0;
}
