// Attention on the CPU: tiles of rows and keys in the accumulation dtype, vectorised per instruction set, spread over
// threads. Forward: one task per (query head, q tile) visits all slices that touch it with one online softmax (Milakov
// and Gimelshein 2018, Dao et al. 2022). Backward: one task per (kv head, run of k tiles) owns dk and dv and keeps a dq
// of its own, summed in a fixed order. Results do not depend on which thread runs which task.
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace magi::cpu {
namespace {

constexpr int kPanelRows = 6;  // rows of a register panel
constexpr int kTileKeys = 64;  // keys of a packed tile: whole vectors of every instruction set
constexpr int kTileRows = 96;  // rows of a q tile: whole panels
constexpr int kPad = 16;       // head dimensions are padded to whole vectors

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

template <class T>
struct ForwardTiles {
    int num_tiles, head_dim, v_padded;
    T softcap;
    const T* k_transposed;  // [kv_heads][num_tiles][head_dim][kTileKeys]
    const T* v_rows;        // [kv_heads][num_tiles * kTileKeys][v_padded]
};

template <class T>
struct BackwardTiles {
    int num_tiles, num_q, head_dim, v_dim, d_padded, v_padded;
    T softcap;
    const T *k_transposed, *v_transposed;  // [kv_heads][num_tiles][dim][kTileKeys]
    const T* k_rows;                       // [kv_heads][num_tiles * kTileKeys][d_padded]
    const T *q_rows, *dout_rows;           // [heads][num_q][padded]; q scaled
    const T *lse, *delta;                  // [heads][num_q]; lse in base 2
};

// What an instruction set provides.
template <class T>
struct TileKernels {
    void (*forward_slice)(const ForwardTiles<T>&, int kv_head, const Slice&, int row_begin, const T* q, T* out, T* most,
                          T* sum);
    void (*backward_slice)(const BackwardTiles<T>&, int head, int kv_head, int tile, const Slice&, T* dq, T* dk, T* dv);
};

#if defined(__x86_64__)
namespace avx512 {
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define MAGI_VECTOR_BYTES 64
#define MAGI_PANEL 4
#include "cpu/tile_kernels.inc"
#undef MAGI_VECTOR_BYTES
#undef MAGI_PANEL
#pragma GCC pop_options
}  // namespace avx512
namespace avx2 {
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MAGI_VECTOR_BYTES 32
#define MAGI_PANEL 2
#include "cpu/tile_kernels.inc"
#undef MAGI_VECTOR_BYTES
#undef MAGI_PANEL
#pragma GCC pop_options
}  // namespace avx2
#endif
namespace generic {
#define MAGI_VECTOR_BYTES 16
#define MAGI_PANEL 2
#include "cpu/tile_kernels.inc"
#undef MAGI_VECTOR_BYTES
#undef MAGI_PANEL
}  // namespace generic

template <class T>
const TileKernels<T>& tile_kernels() {
#if defined(__x86_64__)
    static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    static const bool medium = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wide) return avx512::kTileKernels<T>;
    if (medium) return avx2::kTileKernels<T>;
#endif
    return generic::kTileKernels<T>;
}

int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }
int padded(int dim) { return tiles_of(dim, kPad) * kPad; }

// Memory that is written before it is read.
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
    return std::make_unique_for_overwrite<T[]>(n);
}

// task(i) for every i of order, on all threads, each taking the next one as it comes free.
template <class Task>
void run_tasks(int64_t num_tasks, const Task& task) {
    std::atomic<int64_t> next{0};
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), num_tasks);
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker)
            for (int64_t i; (i = next++) < num_tasks;) task(i);
    });
}

// Which slices touch each tile of rows, in the order of the slices (CSR), and the tiles by falling area.
struct TileTable {
    std::vector<int> first, slice, heaviest;
};
TileTable tile_table(const std::vector<Slice>& slices, int num_tiles, int tile) {
    TileTable t;
    t.first.assign(num_tiles + 1, 0);
    std::vector<long long> cells(num_tiles, 0);
    for (const Slice& s : slices)
        for (int i = s.q0 / tile; i * tile < s.q1; ++i) {
            ++t.first[i + 1];
            cells[i] += area(crop(s, i * tile, (i + 1) * tile, s.k0, s.k1));
        }
    std::partial_sum(t.first.begin(), t.first.end(), t.first.begin());
    t.slice.resize(t.first[num_tiles]);
    std::vector<int> next(t.first.begin(), t.first.end() - 1);
    for (int n = 0; n < (int)slices.size(); ++n)
        for (int i = slices[n].q0 / tile; i * tile < slices[n].q1; ++i) t.slice[next[i]++] = n;
    t.heaviest.resize(num_tiles);
    std::iota(t.heaviest.begin(), t.heaviest.end(), 0);
    std::stable_sort(t.heaviest.begin(), t.heaviest.end(), [&](int a, int b) { return cells[a] > cells[b]; });
    return t;
}

// The slices that hold a cell, cut to their cells.
std::vector<Slice> hulls(const Slice* slices, int n) {
    std::vector<Slice> kept;
    for (int i = 0; i < n; ++i)
        if (const Slice s = hull(slices[i]); s.q0 < s.q1) kept.push_back(s);
    return kept;
}

// rows [heads][num_rows padded to tiles of `tile`][padded dim] = factor * x; the padding is 0.
template <class T, class Acc = acc_t<T>>
std::unique_ptr<Acc[]> pack_rows(const Heads& x, int num_rows, int num_heads, int dim, int tile, Acc factor = 1) {
    const int64_t rows = (int64_t)tiles_of(num_rows, tile) * tile, width = padded(dim);
    auto packed = scratch<Acc>(num_heads * rows * width);
    parallel_for(0, num_heads * rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t head = i / rows, row = i % rows;
            Acc* out = packed.get() + i * width;
            const int used = row < num_rows ? dim : 0;
            const T* in = (const T*)x.data + (used ? row * x.row_stride + head * x.head_stride : 0);
            for (int e = 0; e < used; ++e) out[e] = to_acc(in[e]) * factor;
            for (int e = used; e < width; ++e) out[e] = 0;
        }
    });
    return packed;
}

// tiles [heads][num_tiles][dim][kTileKeys] = x transposed; keys past the last one are 0.
template <class T, class Acc = acc_t<T>>
std::unique_ptr<Acc[]> pack_transposed(const Heads& x, int num_rows, int num_heads, int dim) {
    const int num_tiles = tiles_of(num_rows, kTileKeys);
    auto packed = scratch<Acc>((int64_t)num_heads * num_tiles * dim * kTileKeys);
    parallel_for(0, (int64_t)num_heads * num_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t head = i / num_tiles, row = i % num_tiles * kTileKeys;
            Acc* out = packed.get() + i * dim * kTileKeys;
            const int rows = std::min<int64_t>(kTileKeys, num_rows - row);
            const T* in = (const T*)x.data + row * x.row_stride + head * x.head_stride;
            for (int e = 0; e < dim; ++e) {
                for (int r = 0; r < rows; ++r) out[e * kTileKeys + r] = to_acc(in[r * x.row_stride + e]);
                for (int r = rows; r < kTileKeys; ++r) out[e * kTileKeys + r] = 0;
            }
        }
    });
    return packed;
}

// Scores leave the product in base 2, or divided by softcap where that is on.
template <class Acc>
Acc score_factor(double softmax_scale, double softcap) {
    return Acc(softcap > 0 ? softmax_scale / softcap : softmax_scale * M_LOG2E);
}

template <class T, class Out>
void forward(const ForwardParams& p) {
    using Acc = acc_t<T>;
    const AttentionShape& sh = p.shape;
    const int group = sh.num_q_heads / sh.num_kv_heads, v_padded = padded(sh.v_dim);
    const auto slices = hulls(p.slices, p.num_slices);
    const int num_q_tiles = tiles_of(sh.num_q, kTileRows);
    const TileTable table = tile_table(slices, num_q_tiles, kTileRows);
    const auto k_transposed = pack_transposed<T>(p.k, sh.num_k, sh.num_kv_heads, sh.head_dim);
    const auto v_rows = pack_rows<T>(p.v, sh.num_k, sh.num_kv_heads, sh.v_dim, kTileKeys);
    const ForwardTiles<Acc> work{
        tiles_of(sh.num_k, kTileKeys), sh.head_dim, v_padded, Acc(p.softcap), k_transposed.get(), v_rows.get()};
    const TileKernels<Acc>& kernels = tile_kernels<Acc>();
    const Acc factor = score_factor<Acc>(p.softmax_scale, p.softcap);

    run_tasks((int64_t)num_q_tiles * sh.num_q_heads, [&](int64_t task) {
        const int tile = table.heaviest[task / sh.num_q_heads], head = task % sh.num_q_heads;
        const int row_begin = tile * kTileRows, row_end = std::min(row_begin + kTileRows, sh.num_q);
        std::vector<Acc> q(kTileRows * sh.head_dim), out(kTileRows * v_padded, 0), most(kTileRows, kNone<Acc>),
            sum(kTileRows, 0);
        for (int row = row_begin; row < row_end; ++row) {
            const T* in = (const T*)p.q.data + row * p.q.row_stride + head * p.q.head_stride;
            for (int e = 0; e < sh.head_dim; ++e) q[(row - row_begin) * sh.head_dim + e] = to_acc(in[e]) * factor;
        }
        for (int n = table.first[tile]; n < table.first[tile + 1]; ++n) {
            const Slice s = crop(slices[table.slice[n]], row_begin, row_end, 0, sh.num_k);
            kernels.forward_slice(work, head / group, s, row_begin, q.data(), out.data(), most.data(), sum.data());
        }
        for (int row = row_begin; row < row_end; ++row) {
            const int r = row - row_begin;
            const int64_t i = (int64_t)row * sh.num_q_heads + head;
            Acc m = most[r], l = sum[r];
            Acc* o = out.data() + r * v_padded;
            // A sink is a key without a value; a previous partial is a key whose score is its lse.
            auto add = [&](Acc score, const Acc* value) {
                if (score == kNone<Acc>) return;
                const Acc next = std::max(m, score), keep = std::exp2(m - next), weight = std::exp2(score - next);
                l = l * keep + weight;
                for (int e = 0; e < sh.v_dim; ++e) o[e] = o[e] * keep + (value ? weight * value[e] : Acc(0));
                m = next;
            };
            for (int n = 0; n < p.num_sinks; ++n)
                add(((const Acc*)p.sink)[n * sh.num_q_heads + head] * Acc(M_LOG2E), nullptr);
            if (p.lse_prev) add(((const Acc*)p.lse_prev)[i] * Acc(M_LOG2E), (const Acc*)p.out_prev + i * sh.v_dim);
            const bool bare = m == kNone<Acc>;
            ((Acc*)p.lse)[i] = bare ? kNone<Acc> : (m + std::log2(l)) * Acc(M_LN2);
            const Acc inverse = bare ? Acc(0) : Acc(1) / l;
            Out* result = (Out*)p.out.data + row * p.out.row_stride + head * p.out.head_stride;
            for (int e = 0; e < sh.v_dim; ++e) result[e] = from_acc<Out>(o[e] * inverse);
        }
    });
}

// out[row, head] = from_acc(factor * sum of num_parts addends) (+ previous).
template <class Grad, class Acc>
void write_rows(const Heads& out, const Acc* parts, int64_t part_stride, int num_parts, int num_rows, int num_heads,
                int dim, int64_t head_rows, Acc factor, const Grad* previous) {
    const int64_t width = padded(dim);
    parallel_for(0, (int64_t)num_rows * num_heads, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / num_heads, head = i % num_heads;
            const Acc* in = parts + (head * head_rows + row) * width;
            Grad* result = (Grad*)out.data + row * out.row_stride + head * out.head_stride;
            for (int e = 0; e < dim; ++e) {
                Acc total = 0;
                for (int part = 0; part < num_parts; ++part) total += in[part * part_stride + e];
                result[e] = from_acc<Grad>(total * factor + (previous ? to_acc(previous[i * dim + e]) : Acc(0)));
            }
        }
    });
}

template <class T, class Grad>
void backward(const BackwardParams& p) {
    using Acc = acc_t<T>;
    const AttentionShape& sh = p.shape;
    const int heads = sh.num_q_heads, kv_heads = sh.num_kv_heads, group = heads / kv_heads;
    const int d_padded = padded(sh.head_dim), v_padded = padded(sh.v_dim), num_tiles = tiles_of(sh.num_k, kTileKeys);
    auto slices = hulls(p.slices, p.num_slices);
    std::vector<Slice> transposed(slices);
    for (Slice& s : transposed) s = transpose(s);
    const TileTable table = tile_table(transposed, num_tiles, kTileKeys);

    const Acc factor = score_factor<Acc>(p.softmax_scale, p.softcap);
    const auto k_transposed = pack_transposed<T>(p.k, sh.num_k, kv_heads, sh.head_dim);
    const auto v_transposed = pack_transposed<T>(p.v, sh.num_k, kv_heads, sh.v_dim);
    const auto k_rows = pack_rows<T>(p.k, sh.num_k, kv_heads, sh.head_dim, kTileKeys);
    const auto q_rows = pack_rows<T>(p.q, sh.num_q, heads, sh.head_dim, 1, factor);
    const auto dout_rows = pack_rows<T>(p.dout, sh.num_q, heads, sh.v_dim, 1);
    const auto lse = scratch<Acc>((int64_t)heads * sh.num_q), delta = scratch<Acc>((int64_t)heads * sh.num_q);
    for (int64_t row = 0; row < sh.num_q; ++row)
        for (int64_t head = 0; head < heads; ++head) {
            lse[head * sh.num_q + row] = ((const Acc*)p.lse)[row * heads + head] * Acc(M_LOG2E);
            delta[head * sh.num_q + row] = ((const Acc*)p.delta)[row * heads + head];
        }
    const BackwardTiles<Acc> work{num_tiles,    sh.num_q,        sh.head_dim,        sh.v_dim,           d_padded,
                                  v_padded,     Acc(p.softcap),  k_transposed.get(), v_transposed.get(), k_rows.get(),
                                  q_rows.get(), dout_rows.get(), lse.get(),          delta.get()};
    const TileKernels<Acc>& kernels = tile_kernels<Acc>();

    // Enough tasks for the threads: where there are few kv heads, each one's k tiles are dealt out, heavy ones first,
    // to several tasks.
    const int num_parts =
        std::max(1, std::min(num_tiles, (int)torch::stable::get_num_threads() / std::max(1, kv_heads)));
    const int64_t part_stride = (int64_t)heads * sh.num_q * d_padded;
    auto dq = scratch<Acc>(num_parts * part_stride);
    auto dk = scratch<Acc>((int64_t)kv_heads * num_tiles * kTileKeys * d_padded);
    auto dv = scratch<Acc>((int64_t)kv_heads * num_tiles * kTileKeys * v_padded);
    run_tasks((int64_t)kv_heads * num_parts, [&](int64_t task) {
        const int kv_head = task % kv_heads, part = task / kv_heads;
        Acc* dq_part = dq.get() + part * part_stride;
        std::fill_n(dq_part + (int64_t)kv_head * group * sh.num_q * d_padded, (int64_t)group * sh.num_q * d_padded,
                    Acc(0));
        for (int t = part; t < num_tiles; t += num_parts) {
            const int tile = table.heaviest[t];
            const int64_t tile_row = ((int64_t)kv_head * num_tiles + tile) * kTileKeys;
            std::fill_n(dk.get() + tile_row * d_padded, kTileKeys * d_padded, Acc(0));
            std::fill_n(dv.get() + tile_row * v_padded, kTileKeys * v_padded, Acc(0));
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
                for (int n = table.first[tile]; n < table.first[tile + 1]; ++n)
                    kernels.backward_slice(work, head, kv_head, tile, slices[table.slice[n]],
                                           dq_part + (int64_t)head * sh.num_q * d_padded,
                                           dk.get() + tile_row * d_padded, dv.get() + tile_row * v_padded);
        }
    });
    write_rows<Grad, Acc>(p.dq, dq.get(), part_stride, num_parts, sh.num_q, heads, sh.head_dim, sh.num_q,
                          Acc(p.softmax_scale), (const Grad*)p.dq_prev);
    // q was packed with its factor: dk = scale * dS^T q = scale / factor * dS^T (factor * q).
    const int64_t head_rows = (int64_t)num_tiles * kTileKeys;
    const Acc k_factor = Acc(p.softcap > 0 ? p.softcap : M_LN2);
    write_rows<Grad, Acc>(p.dk, dk.get(), 0, 1, sh.num_k, kv_heads, sh.head_dim, head_rows, k_factor, nullptr);
    write_rows<Grad, Acc>(p.dv, dv.get(), 0, 1, sh.num_k, kv_heads, sh.v_dim, head_rows, Acc(1), nullptr);
}

// The output type is the storage type or the accumulator.
template <class Body>
void dispatch2(Dtype dtype, Dtype out_dtype, const Body& body) {
    dispatch(dtype, [&]<class T>(T t) { out_dtype == dtype ? body(t, t) : body(t, acc_t<T>{}); });
}

}  // namespace

void ffa_forward(const ForwardParams& params) {
    dispatch2(params.dtype, params.out_dtype, [&]<class T, class Out>(T, Out) { forward<T, Out>(params); });
}
void ffa_backward(const BackwardParams& params) {
    dispatch2(params.dtype, params.grad_dtype, [&]<class T, class Grad>(T, Grad) { backward<T, Grad>(params); });
}

}  // namespace magi::cpu
