// How does a warpgroup multiply on the tensor cores? Descriptors, the four wgmma forms, and the accumulator's layout;
// and how does a warp by itself.
//
// Accumulator of m64nN: thread t holds rows r = t / 32 * 16 + t % 32 / 4 and r + 8, columns 8j + c and 8j + c + 1 with
// c = t % 4 * 2; d[4j], d[4j + 1] are row r, d[4j + 2], d[4j + 3] row r + 8. Packed in pairs, 16 columns of an
// accumulator are the register A operand of a following product.
#pragma once

#include "ptx.cuh"

namespace magi {

enum Swizzle : u32 { kSwizzle128 = 1, kSwizzle32 = 3 };

// Descriptor of a shared-memory operand; strides and starts in bytes.
//   K-major (rows x 64 elements):  stride = 1024 B between groups of 8 rows; leading unused; next 16 k: start + 32 B.
//   MN-major (transposed):         leading = bytes between blocks of 64 columns; stride = 1024 B between groups of 8 k
//                                  rows; next 16 k: start + 2048 B.
// With 32-byte swizzle, for MN-major operands that are not a multiple of 64 wide: leading = bytes between blocks of 16
// columns; stride = 256 B between groups of 8 k rows; next 16 k: start + 512 B.
// On a walk only the low word changes, so that an instruction costs one addition in the uniform registers.
struct Operand {
    u32 low, high;
    __device__ __forceinline__ Operand(u32 addr, u32 leading, u32 stride, Swizzle swizzle = kSwizzle128)
        : low((addr & 0x3FFFF) >> 4 | leading >> 4 << 16), high(stride >> 4 | swizzle << 30) {}
    __device__ __forceinline__ u64 at(u32 bytes) const { return static_cast<u64>(high) << 32 | (low + (bytes >> 4)); }
};

// fence: before the first product that reads registers written by ordinary code. commit: closes a group.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most Pending groups are still running on return. Pin the accumulators of the finished ones before reading them.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving reads of an accumulator above the wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

#define MAGI_D4(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define MAGI_D8(o)                                                                                              \
    "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), \
        "+f"(d[o + 7])
#define MAGI_D16(o) MAGI_D8(o), MAGI_D8(o + 8)
#define MAGI_D32(o) MAGI_D16(o), MAGI_D16(o + 16)

// The accumulators of an instruction N columns wide, N / 2 a thread: operands, and their names in its text.
#define MAGI_D_32 MAGI_D16(0)
#define MAGI_D_40 MAGI_D16(0), MAGI_D4(16)
#define MAGI_D_48 MAGI_D16(0), MAGI_D8(16)
#define MAGI_D_56 MAGI_D16(0), MAGI_D8(16), MAGI_D4(24)
#define MAGI_D_64 MAGI_D32(0)
#define MAGI_D_80 MAGI_D_64, MAGI_D8(32)
#define MAGI_D_96 MAGI_D_80, MAGI_D8(40)
#define MAGI_D_112 MAGI_D_80, MAGI_D16(40)
#define MAGI_D_128 MAGI_D_64, MAGI_D32(32)
#define MAGI_D_192 MAGI_D_128, MAGI_D32(64)
#define MAGI_D_256 MAGI_D_192, MAGI_D32(96)
#define MAGI_NAMES_32                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, " \
    "%8, %9, %10, %11, %12, %13, %14, %15"
#define MAGI_NAMES_40 MAGI_NAMES_32 ", %16, %17, %18, %19"
#define MAGI_NAMES_48 MAGI_NAMES_40 ", %20, %21, %22, %23"
#define MAGI_NAMES_56 MAGI_NAMES_48 ", %24, %25, %26, %27"
#define MAGI_NAMES_64 MAGI_NAMES_56 ", %28, %29, %30, %31"
#define MAGI_NAMES_80 \
    MAGI_NAMES_64     \
    ", "              \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define MAGI_NAMES_96 \
    MAGI_NAMES_80     \
    ", "              \
    "%40, %41, %42, %43, %44, %45, %46, %47"
#define MAGI_NAMES_112 \
    MAGI_NAMES_96      \
    ", "               \
    "%48, %49, %50, %51, %52, %53, %54, %55"
#define MAGI_NAMES_128 \
    MAGI_NAMES_112     \
    ", "               \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define MAGI_NAMES_192                         \
    MAGI_NAMES_128                             \
    ", "                                       \
    "%64, %65, %66, %67, %68, %69, %70, %71, " \
    "%72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, " \
    "%88, %89, %90, %91, %92, %93, %94, %95"
#define MAGI_NAMES_256                                 \
    MAGI_NAMES_192                                     \
    ", "                                               \
    "%96, %97, %98, %99, %100, %101, %102, %103, "     \
    "%104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"

// One instruction; the numbers are those of its operands behind the accumulators.
#define MAGI_WGMMA(N, TYPE, A, B, P, TRANS)                                                                       \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
    " {" MAGI_NAMES_##N "}, " A ", %" #B ", p, 1, 1, " TRANS ";\n}"
#define MAGI_WGMMA_SS(N, TYPE, A, B, P, TA, TB)                       \
    asm volatile(MAGI_WGMMA(N, TYPE, "%" #A, B, P, "%" #TA ", %" #TB) \
                 : MAGI_D_##N                                         \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB))
#define MAGI_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, P, TB)                                        \
    asm volatile(MAGI_WGMMA(N, TYPE, "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}", B, P, "%" #TB) \
                 : MAGI_D_##N                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB))
#define MAGI_BY_TYPE(FORM, N, ...)        \
    do {                                  \
        if constexpr (kIsBf16<T>)         \
            FORM(N, "bf16", __VA_ARGS__); \
        else                              \
            FORM(N, "f16", __VA_ARGS__);  \
    } while (0)

// d = A B (+ d), one step of 16 along k; A and B in shared memory. kTrans: 0 = K-major, 1 = MN-major.
template <class T, int N, int kTransA, int kTransB>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
    static_assert((N % 8 == 0 && N >= 32 && N <= 64) || N == 80 || N == 96 || N == 112 || N == 128,
                  "add the instruction shape here");
    if constexpr (N == 32) MAGI_BY_TYPE(MAGI_WGMMA_SS, 32, 16, 17, 18, 19, 20);
    if constexpr (N == 40) MAGI_BY_TYPE(MAGI_WGMMA_SS, 40, 20, 21, 22, 23, 24);
    if constexpr (N == 48) MAGI_BY_TYPE(MAGI_WGMMA_SS, 48, 24, 25, 26, 27, 28);
    if constexpr (N == 56) MAGI_BY_TYPE(MAGI_WGMMA_SS, 56, 28, 29, 30, 31, 32);
    if constexpr (N == 64) MAGI_BY_TYPE(MAGI_WGMMA_SS, 64, 32, 33, 34, 35, 36);
    if constexpr (N == 80) MAGI_BY_TYPE(MAGI_WGMMA_SS, 80, 40, 41, 42, 43, 44);
    if constexpr (N == 96) MAGI_BY_TYPE(MAGI_WGMMA_SS, 96, 48, 49, 50, 51, 52);
    if constexpr (N == 112) MAGI_BY_TYPE(MAGI_WGMMA_SS, 112, 56, 57, 58, 59, 60);
    if constexpr (N == 128) MAGI_BY_TYPE(MAGI_WGMMA_SS, 128, 64, 65, 66, 67, 68);
}

// The same with A in registers (see the layout above).
template <class T, int N, int kTransB>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int accumulate) {
    static_assert(N == 64 || N == 128 || N == 192 || N == 256, "add the instruction shape here");
    if constexpr (N == 64) MAGI_BY_TYPE(MAGI_WGMMA_RS, 64, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 128) MAGI_BY_TYPE(MAGI_WGMMA_RS, 128, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (N == 192) MAGI_BY_TYPE(MAGI_WGMMA_RS, 192, 96, 97, 98, 99, 100, 101, 102);
    if constexpr (N == 256) MAGI_BY_TYPE(MAGI_WGMMA_RS, 256, 128, 129, 130, 131, 132, 133, 134);
}

// One warp's 16 x 8 += 16 x 8 times 8 x 8, accumulators as above.
template <class T>
__device__ __forceinline__ void warp_product(float& c0, float& c1, float& c2, float& c3, const u32 (&a)[2], u32 b) {
    if constexpr (kIsBf16<T>)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
            : "r"(a[0]), "r"(a[1]), "r"(b));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
            : "r"(a[0]), "r"(a[1]), "r"(b));
}

}  // namespace magi
