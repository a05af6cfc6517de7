// Launches the row-movement kernels: wide accesses where sizes and addresses allow, a grid that fills the chip.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "cuda/cuda.h"
#include "cuda/launcher.h"

namespace magi::cuda {
namespace {

constexpr int kThreads = 256;  // as in rows.cu

int element_type(Dtype dtype, const char* what) {
    switch (dtype) {
        case Dtype::kF16: return kElementF16;
        case Dtype::kBF16: return kElementBF16;
        case Dtype::kF32: return kElementF32;
        default:
            throw std::runtime_error(std::string("magi_attention: ") + what +
                                     " must be float16, bfloat16 or float32 on CUDA, got float64");
    }
}

bool aligned(std::initializer_list<const void*> pointers, int bytes) {
    return std::all_of(pointers.begin(), pointers.end(),
                       [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

Grid fill(int64_t blocks, int device) { return {(unsigned)std::clamp<int64_t>(blocks, 1, 8LL * num_sms(device))}; }
Grid one_each(int64_t blocks, int device) { return {(unsigned)std::clamp<int64_t>(blocks, 1, num_sms(device))}; }

bool bulk_rows(int64_t row_bytes) { return row_bytes % 16 == 0 && row_bytes <= INT32_MAX; }

// The running sums of the ranges go to memory first, unless these and their `total` rows are few and each block sums
// for itself (null).
constexpr int64_t kNever = INT64_MAX;
const long long* scan_ranges(const RowRange* ranges, int64_t num_ranges, int64_t total, void* workspace, int device,
                             void* stream) {
    if (num_ranges <= kFewRanges && total <= INT32_MAX) return nullptr;
    auto* first = static_cast<long long*>(workspace);
    launch(kernel("rows", "scan", device, 0), {1}, 1024, 0, stream, ScanArgs{ranges, first, (int)num_ranges});
    return first;
}

}  // namespace

size_t ranges_workspace(int64_t num_ranges) { return (num_ranges + 1) * sizeof(long long); }

void range_gather(const void* src, void* dst, int64_t row_bytes, int64_t total, const RowRange* ranges,
                  int64_t num_ranges, void* workspace, int device) {
    if (total == 0 || row_bytes == 0) return;
    void* stream = current_stream(device);
    const bool bulk = bulk_rows(row_bytes) && aligned({src, dst}, 16);
    const long long* first = scan_ranges(ranges, num_ranges, bulk ? total : kNever, workspace, device, stream);
    const GatherArgs args{(const char*)src, (char*)dst, ranges, first, (int)num_ranges, total, row_bytes};
    if (bulk) {
        const int64_t stages = (total * row_bytes + kRowStageBytes - 1) / kRowStageBytes;
        launch(kernel("rows", "gather16", device, kGatherSmem), one_each(stages, device), 32 * kGatherWarps,
               kGatherSmem, stream, args, /*overlap=*/true);
    } else {
        const char* gather = row_bytes % 4 == 0 && aligned({src, dst}, 4) ? "gather4" : "gather1";
        const int64_t tile_rows = std::clamp<int64_t>(32768 / row_bytes, 1, kThreads);
        launch(kernel("rows", gather, device, 0), fill((total + tile_rows - 1) / tile_rows, device), kThreads, 0,
               stream, args);
    }
}

void range_scatter_reduce(Dtype dtype, const void* src, void* dst, int64_t total, int64_t num_rows,
                          int64_t row_elements, const RowRange* ranges, int64_t num_ranges, bool mean, void* workspace,
                          int device) {
    if (num_rows == 0 || row_elements == 0) return;
    if (num_rows > INT32_MAX) throw std::runtime_error("magi_attention: rows must be less than 2**31 on CUDA");
    void* stream = current_stream(device);
    const int type = element_type(dtype, "y");
    const int64_t row_bytes = row_elements * (type == kElementF32 ? 4 : 2);
    const bool bulk = bulk_rows(row_bytes) && aligned({src, dst}, 16);
    const long long* first = scan_ranges(ranges, num_ranges, bulk ? total : kNever, workspace, device, stream);
    const ScatterArgs args{src,      dst,          ranges, first, static_cast<long long*>(workspace), (int)num_ranges,
                           num_rows, row_elements, type,   mean};
    if (bulk) {
        const char* scatter = type == kElementF32    ? "scatter_f32"
                              : type == kElementBF16 ? "scatter_bf16"
                                                     : "scatter_f16";
        const int64_t stages = (num_rows * row_bytes + kRowStageBytes - 1) / kRowStageBytes;
        launch(kernel("rows", scatter, device, kScatterSmem), one_each(stages, device), 32 * kScatterWarps,
               kScatterSmem, stream, args, /*overlap=*/true);
    } else {
        launch(kernel("rows", "scatter1", device, 0), fill((num_rows + 7) / 8, device), kThreads, 0, stream, args);
    }
}

void merge_partials(Dtype dtype_a, const void* out_a, const float* lse_a, Dtype dtype_b, const void* out_b,
                    const float* lse_b, void* out, float* lse, int64_t num_rows, int dim, int device) {
    if (num_rows == 0) return;
    const MergeArgs args{out_a,
                         out_b,
                         lse_a,
                         lse_b,
                         out,
                         lse,
                         num_rows,
                         dim,
                         element_type(dtype_a, "out"),
                         element_type(dtype_b, "out_i")};
    void* stream = current_stream(device);
    const int64_t eights = num_rows * dim / 8;
    if (dim % 8 == 0 && eights < (int64_t(1) << 31) && aligned({out_a, out_b, out}, 16))
        launch(kernel("rows", "merge8", device, 0), {(unsigned)((eights + kMergeEights - 1) / kMergeEights)}, kThreads,
               0, stream, args);
    else
        launch(kernel("rows", "merge1", device, 0), fill((num_rows * dim + kThreads - 1) / kThreads, device), kThreads,
               0, stream, args);
}

void ffa_delta(Dtype dtype, int num_rows, int num_heads, int dim, const Heads& dout, const Heads& out,
               const float* dlse, float* delta, int device) {
    if (num_rows == 0 || num_heads == 0) return;
    const auto strided = [](const Heads& t) { return t.row_stride % 8 == 0 && t.head_stride % 8 == 0; };
    const bool wide = dim % 8 == 0 && strided(dout) && strided(out) && aligned({dout.data, out.data}, 16);
    const int64_t rows = (int64_t)num_rows * num_heads, rows_per_block = wide ? kThreads / 16 : kThreads / 32;
    const DeltaArgs args{
        dout.data,       out.data, dlse,      delta, dout.row_stride,           dout.head_stride, out.row_stride,
        out.head_stride, rows,     num_heads, dim,   element_type(dtype, "out")};
    void* stream = current_stream(device);
    if (wide && args.type != kElementF32 && dim <= 128 && rows < (int64_t(1) << 31))
        launch(kernel("rows", "delta_short", device, 0), {(unsigned)((rows + 63) / 64)}, kThreads, 0, stream, args);
    else
        launch(kernel("rows", wide ? "delta8" : "delta1", device, 0),
               fill((rows + rows_per_block - 1) / rows_per_block, device), kThreads, 0, stream, args);
}

void band_slices(const RowRange* q_ranges, const RowRange* k_ranges, const int* types, Slice* slices, int num_slices,
                 int device) {
    if (num_slices == 0) return;
    launch(kernel("rows", "bands", device, 0), {(unsigned)((num_slices + kThreads - 1) / kThreads)}, kThreads, 0,
           current_stream(device), BandArgs{q_ranges, k_ranges, types, slices, num_slices});
}

}  // namespace magi::cuda
