// How are the Hopper instructions spelled? Barriers, bulk copies, register budgets and conversions; one function each.
#pragma once

#include "args.cuh"
#include "band.h"

namespace magi {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 smem_addr(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- mbarriers: a phase ends when all arrivals and all expected bytes are in ----
__device__ __forceinline__ void barrier_init(u64& bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(&bar)), "r"(arrivals));
}
// After all barrier_init, before the __syncthreads that publishes them.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u64& bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(&bar)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(u64& bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(&bar)), "r"(bytes)
                 : "memory");
}
// Returns once the phase with this parity (0 for the first) has ended.
__device__ __forceinline__ void barrier_wait(u64& bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nW%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D%=;\nbra "
        "W%=;\nD%=:\n}" ::"r"(smem_addr(&bar)),
        "r"(parity)
        : "memory");
}
// Whether it has.
__device__ __forceinline__ bool barrier_passed(u64& bar, u32 parity) {
    u32 passed;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(smem_addr(&bar)), "r"(parity)
                 : "memory");
    return passed;
}
// Where a walk over the stages of a ring is, and the parity that ends their phase, without divisions.
template <int Size>
struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == Size) stage = 0, parity ^= 1;
    }
};

// ---- named barriers: ids 1-15; 0 is __syncthreads ----
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- bulk copies ----
// One box of a [rows, heads, dim] tensor, swizzled as the map says; cells outside the tensor arrive as zero.
__device__ __forceinline__ void tma_load(void* dst, const TensorMap& map, u64& bar, int dim, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(smem_addr(dst)),
        "l"(&map), "r"(smem_addr(&bar)), "r"(dim), "r"(head), "r"(row)
        : "memory");
}
// The other way, as part of the calling thread's group; cells outside the tensor are left out.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 src, int dim, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(src), "r"(dim), "r"(head), "r"(row)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Contiguous bytes, a multiple of 16, both sides 16-byte aligned.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, u32 bytes, u64& bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_addr(dst)),
        "l"(src), "r"(bytes), "r"(smem_addr(&bar))
        : "memory");
}
// Adds fp32 words of shared memory to global memory, as one group of the calling thread.
__device__ __forceinline__ void bulk_add(float* dst, const float* src, u32 bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(
            dst),
        "r"(smem_addr(src)), "r"(bytes)
        : "memory");
}
// Contiguous bytes as above, the other way, as one group of the calling thread.
__device__ __forceinline__ void bulk_store(void* dst, const void* src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(dst),
                 "r"(smem_addr(src)), "r"(bytes)
                 : "memory");
}
// Line `line` of those bytes on its way to L2, where later writes to it would be seen: also ahead of a wait for the
// kernel that writes them.
__device__ __forceinline__ void prefetch_lines(const void* from, u32 bytes, u32 line) {
    if (line * 128 < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + line * 128));
}
// Asks for bytes that will be read soon.
__device__ __forceinline__ void bulk_prefetch(const void* src, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
// Until the thread's groups, all but the last Pending, have read their source; until they are done.
template <int Pending = 0>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Ordinary stores to shared memory become visible to wgmma and bulk copies; then a barrier.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Ordinary accesses to global memory before it, bulk copies after it.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The sum of x over the lanes up to this one.
template <class Int>
__device__ __forceinline__ Int sum_upto(Int x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const Int below = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += below;
    }
    return x;
}

// threadIdx.x, read where it is needed and not kept in a register.
__device__ __forceinline__ u32 thread_index() {
    u32 i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}

// The same value in all lanes, told to the compiler: it then lives in uniform registers, as descriptors and branches
// like it.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Kernels that are launched to overlap the end of the one before (programmatic dependent launch): the later one waits
// before it touches memory, the earlier one says when later blocks may start.
__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_later_kernels_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- registers ----
template <int N>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- stores and turns ----
// Four 8 x 8 matrices of 2-byte elements from accumulator layout to rows of 16 bytes; lane l names row l % 8 of matrix
// l / 8.
__device__ __forceinline__ void store_matrices(u32 row_addr, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_addr), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
// The same with rows and columns of the matrices exchanged, and back.
__device__ __forceinline__ void store_matrices_transposed(u32 row_addr, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_addr), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 row_addr, u32 (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row_addr)
                 : "memory");
}
// Exchanges rows and columns of an 8 x 8 matrix in accumulator layout, a pair of elements a lane.
__device__ __forceinline__ u32 transpose_matrix(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}
// The other way, two of them; lane l names row l % 8 of matrix l / 8 % 2.
__device__ __forceinline__ void load_matrices(u32 row_addr, u32 (&x)[2]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(row_addr)
                 : "memory");
}
__device__ __forceinline__ void store_shared(u32 addr, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
// A counter in global memory that blocks take turns by: what came before a pass is seen by who reads it.
__device__ __forceinline__ int turn_read(const int* turn) {
    int x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(turn) : "memory");
    return x;
}
__device__ __forceinline__ void turn_pass(int* turn, int by = 1) {
    asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], %1;" ::"l"(turn), "r"(by) : "memory");
}
// The same for several counters: what came before the fence is seen by who reads a count that came after it.
__device__ __forceinline__ void turns_fence() {
    asm volatile("fence.proxy.async.global;\nfence.acq_rel.gpu;" ::: "memory");
}
// The other side: reads of several counters, and a fence once they are what was waited for.
__device__ __forceinline__ int turn_peek(const int* turn) {
    int x;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(turn) : "memory");
    return x;
}
__device__ __forceinline__ void turns_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void turn_count(int* turn, int by = 1) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(turn), "r"(by) : "memory");
}
// Turns the words of four lanes around: lane i of a quad gets word i of its lanes 0..3. A quad's lanes are Apart apart.
template <int Apart = 1>
__device__ __forceinline__ void transpose_quad(u32 (&x)[4], int lane) {
    const bool odd = lane & Apart, high = lane & 2 * Apart;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 got = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], Apart);
        (odd ? x[i] : x[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 got = __shfl_xor_sync(~0u, high ? x[i] : x[i + 2], 2 * Apart);
        (high ? x[i] : x[i + 2]) = got;
    }
}

// ---- arithmetic ----
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
template <class T>
__device__ __forceinline__ u32 pack(float lo, float hi);
template <>
__device__ __forceinline__ u32 pack<bf16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <>
__device__ __forceinline__ u32 pack<f16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
// A copy that the compiler cannot merge with its source, where `ones` is two elements of 1 that it does not know; on
// the arithmetic units, which the softmax leaves idle. Exact.
template <class T>
__device__ __forceinline__ u32 times_one(u32 x, u32 ones);
template <>
__device__ __forceinline__ u32 times_one<bf16>(u32 x, u32 ones) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(ones), "r"(0x80008000u));
    return r;
}
template <>
__device__ __forceinline__ u32 times_one<f16>(u32 x, u32 ones) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(ones), "r"(0x80008000u));
    return r;
}
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// Floats of one sign order like integers, and every negative one is the larger unsigned number. Not for NaN.
__device__ __forceinline__ void atomic_max(float* at, float x) {
    if (__float_as_int(x) >= 0)
        atomicMax(reinterpret_cast<int*>(at), __float_as_int(x));
    else
        atomicMin(reinterpret_cast<u32*>(at), __float_as_uint(x));
}
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

}  // namespace magi
