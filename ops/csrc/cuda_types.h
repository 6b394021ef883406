// Types of elements, with no header of torch or CUDA: any host compiler can include this.
#pragma once

#include <cstdint>

namespace sampling {

enum class ElementType : int32_t { float32, float64, float16, bfloat16 };

}  // namespace sampling
