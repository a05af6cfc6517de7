// How does host code reach the GPU? Kernels by variant name, launches, tensor maps and streams over the driver API,
// which is opened at run time: nothing of CUDA is needed to build or to load this library.
#pragma once

#include <cstddef>
#include <string>

#include "kernels/args.cuh"
#include "params.h"

namespace magi::cuda {

// Throws std::runtime_error naming the driver call.
void* current_stream(int device);
int num_sms(int device);
// Throws unless the device runs sm_90a code.
void check_hopper(int device);

// The kernel `entry` of a compiled variant (jit.py lists them), loaded once and ready for `smem` bytes of dynamic
// shared memory on this device. A variant that is not registered is compiled by the hook that jit.py sets; without it
// the error names the command.
void* kernel(const std::string& variant, const char* entry, int device, unsigned smem);

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};
// overlap: blocks may start before the kernel ahead of it in the stream has ended; the kernel waits for that itself
// (wait_for_earlier_kernels in ptx.cuh) before it touches memory.
void launch_raw(void* kernel, Grid grid, unsigned threads, unsigned smem, void* stream, const void* args, bool overlap);
template <class Args>
void launch(void* kernel, Grid grid, unsigned threads, unsigned smem, void* stream, const Args& args,
            bool overlap = false) {
    static_assert(sizeof(Args) <= 4096, "kernel parameters");
    launch_raw(kernel, grid, threads, smem, stream, &args, overlap);
}
void zero(void* data, size_t bytes, void* stream);

// Boxes of box_rows x 64 elements of one head, 128-byte swizzle. 2-byte dtypes; data 16-byte aligned, strides multiples
// of 16 bytes.
TensorMap heads_map(Dtype dtype, const Heads& t, int num_rows, int num_heads, int dim, int box_rows);
// Whether heads_map can describe it.
bool can_map(const Heads& t);

// cut: tiles also begin where slices do (worth_cutting).
// Queues the build of a tile table (kernels/tiles.cuh) over workspace (table_bytes, 64-byte aligned).
TileTable build_tiles(void* workspace, const Slice* slices, int num_slices, int num_q, int num_k, int tile_rows,
                      int step, bool transposed, int device, void* stream, bool cut = false);

}  // namespace magi::cuda
