// wgmma.m64n256k16, n16 and n48: the products of a warpgroup, both operands in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace rankwise::kernels {

// The 128 sums of a thread as operands 0 to 127 of an instruction.
// clang-format off
#define RANKWISE_SUM_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RANKWISE_EIGHT_SUMS(i)                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]),         \
  "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define RANKWISE_SUMS \
  RANKWISE_EIGHT_SUMS(0), RANKWISE_EIGHT_SUMS(8), RANKWISE_EIGHT_SUMS(16), RANKWISE_EIGHT_SUMS(24), \
  RANKWISE_EIGHT_SUMS(32), RANKWISE_EIGHT_SUMS(40), RANKWISE_EIGHT_SUMS(48), RANKWISE_EIGHT_SUMS(56), \
  RANKWISE_EIGHT_SUMS(64), RANKWISE_EIGHT_SUMS(72), RANKWISE_EIGHT_SUMS(80), RANKWISE_EIGHT_SUMS(88), \
  RANKWISE_EIGHT_SUMS(96), RANKWISE_EIGHT_SUMS(104), RANKWISE_EIGHT_SUMS(112), RANKWISE_EIGHT_SUMS(120)
#define RANKWISE_WGMMA(type)                                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                   \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                    \
               " {" RANKWISE_SUM_NAMES "}, %128, %129, p, 1, 1, 0, %131;\n}\n"                 \
               : RANKWISE_SUMS                                                                 \
               : "l"(left), "l"(right), "r"(static_cast<uint32_t>(keep)), "n"(static_cast<int>(right_by_row)))
#define RANKWISE_WGMMA_16(type)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                     \
               " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, %11;\n}\n"            \
               : RANKWISE_EIGHT_SUMS(0)                                                        \
               : "l"(left), "l"(right), "r"(static_cast<uint32_t>(keep)), "n"(static_cast<int>(by_row)))
#define RANKWISE_WGMMA_48(type)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %26, 0;\n"                                    \
               "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                     \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "      \
               "%16, %17, %18, %19, %20, %21, %22, %23}, %24, %25, p, 1, 1, %27, %27;\n}\n"    \
               : RANKWISE_EIGHT_SUMS(0), RANKWISE_EIGHT_SUMS(8), RANKWISE_EIGHT_SUMS(16)       \
               : "l"(left), "l"(right), "r"(static_cast<uint32_t>(keep)), "n"(static_cast<int>(by_row)))
// clang-format on

// Starts sums (+)= left right for a left [64, 16] and a right [16, 256] of T, named by descriptors;
// without `keep` the sums begin at 0. Warp w of the warpgroup has rows 16 w to 16 w + 15, a lane
// the sums 4 j + 2 i + e of row lane / 4 + 8 i and column 8 j + 2 (lane % 4) + e.
template <typename T, bool right_by_row>
__device__ inline void multiply_group(float (&sums)[128], uint64_t left, uint64_t right,
                                      bool keep) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    RANKWISE_WGMMA("bf16");
  } else {
    RANKWISE_WGMMA("f16");
  }
}

// The same for a right operand [16, 2 * count] of 16 or 48 columns. `by_row` also names the left
// one's layout: [16, 64], its rows along the depth.
template <typename T, bool by_row, int count>
__device__ inline void multiply_narrow(float (&sums)[count], uint64_t left, uint64_t right,
                                       bool keep) {
  static_assert(count == 8 || (count == 24 && std::is_same_v<T, __nv_bfloat16>), "");
  if constexpr (count == 24) {
    RANKWISE_WGMMA_48("bf16");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    RANKWISE_WGMMA_16("bf16");
  } else {
    RANKWISE_WGMMA_16("f16");
  }
}

#undef RANKWISE_WGMMA_48
#undef RANKWISE_WGMMA_16
#undef RANKWISE_WGMMA
#undef RANKWISE_SUMS
#undef RANKWISE_EIGHT_SUMS
#undef RANKWISE_SUM_NAMES

}  // namespace rankwise::kernels
