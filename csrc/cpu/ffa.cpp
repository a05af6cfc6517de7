// Attention on the CPU: tiles of rows and keys in the accumulation dtype, vectorised per instruction set, spread over
// threads. Forward: one task per (heads of a group, q tile) visits all slices that touch it with one online softmax
// (Milakov and Gimelshein 2018, Dao et al. 2022). Backward: one task per (kv head, run of k tiles) owns dk and dv and
// keeps a dq of its own, summed in a fixed order. Results do not depend on which thread runs which task. Tiles are
// widened as they are visited: the only memory beside the tensors is the backward's dq.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace magi::cpu {
namespace {

constexpr int kPanelRows = 6;    // rows of a register panel
constexpr int kTileKeys = 64;    // keys of a tile: whole vectors of every instruction set
constexpr int kPanelLanes = 64;  // query lanes (rows x heads of a group) that the forward works on at a time
constexpr int kTilePanels = 4;   // panels of a forward tile at most: they share the loading of keys
constexpr int kTileRows = 96;    // rows of a backward tile: whole panels
constexpr int kPad = 16;         // head dimensions are padded to whole vectors

constexpr int tiles_of(int rows, int tile) { return (rows + tile - 1) / tile; }
constexpr int padded(int dim) { return tiles_of(dim, kPad) * kPad; }

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

// How a floating point number is laid out, and 2^r = sum of series.c[k] * r^k (ln2^k / k!).
template <class T, int kTerms>
struct Series {
    T c[kTerms + 1];
    constexpr Series() {
        long double term = 1;
        for (int k = 0; k <= kTerms; ++k, term *= 0.693147180559945309417232121458176568L / k) c[k] = T(term);
    }
};
template <class T>
struct FloatBits {
    static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
    static constexpr int kDegree = sizeof(T) == 4 ? 7 : 13;
    static constexpr T kRound = T(3ll << (kMantissa - 1));  // adding it rounds to an integer
    static constexpr Series<T, kDegree> kSeries{};
};

// One head of a tensor [rows, heads, dim] in its storage dtype.
struct HeadRows {
    const char* data;
    int64_t row_stride;  // bytes
    int dim;
    const char* row(int64_t i) const { return data + i * row_stride; }
};

// The state of one q tile of the forward: rows [row, row_end) of `heads` query heads, lane = (row - tile.row) * heads +
// head.
template <class T>
struct QueryTile {
    int row, row_end, heads;
    const T* q;     // [panels, head_dim, kPanelLanes], scaled
    T* out;         // [panels, v_dim, kPanelLanes], not yet divided by sum
    T *most, *sum;  // [panels, kPanelLanes]
    T *k, *v;       // room for [kTileKeys, padded dim]
};

// The state of one k tile of the backward: keys [key, key + kTileKeys), zeros past the last one.
template <class T>
struct KeyTile {
    int key, d_padded, v_padded;
    T *k, *k_transposed, *v_transposed;  // [kTileKeys, d_padded], scaled [head_dim, kTileKeys], [v_dim, kTileKeys]
    T *dk, *dv;                          // [kTileKeys, padded dim]
    T *q, *dout;                         // room for [kTileRows, padded dim]
};

// One query head of the backward.
template <class T>
struct QueryHead {
    HeadRows q, dout;
    const T *lse, *delta;  // of its first row; natural log
    int64_t stat_stride;   // between rows
    T* dq;                 // [num_q, d_padded], without the softmax scale
};

// What an instruction set provides. cap > 0: a score, in base 2, is cap * tanh of the product.
template <class T>
struct TileKernels {
    void (*load)(Dtype, const HeadRows&, int row, int num_rows, T* to, int64_t width);
    void (*forward_slice)(Dtype, const HeadRows& k, const HeadRows& v, T cap, const Slice&, QueryTile<T>&);
    void (*backward_slice)(Dtype, const QueryHead<T>&, T cap, const Slice&, KeyTile<T>&);
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

// Memory that is written before it is read, on a cache line's boundary so that no vector spans two.
struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;
template <class T>
Scratch<T> scratch(int64_t n) {
    void* p = std::aligned_alloc(64, (std::max<int64_t>(n, 1) * sizeof(T) + 63) / 64 * 64);
    if (!p) throw std::bad_alloc();
    return Scratch<T>((T*)p);
}

// task(i, room) for every i, on all threads, each taking the next one as it comes free; room holds num_elements.
template <class T, class Task>
void run_tasks(int64_t num_tasks, int64_t num_elements, const Task& task) {
    std::atomic<int64_t> next{0};
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), num_tasks);
    parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
        const Scratch<T> room = scratch<T>(num_elements);
        for (int64_t worker = begin; worker < end; ++worker)
            for (int64_t i; (i = next++) < num_tasks;) task(i, room.get());
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

template <class T>
HeadRows head_rows(const Heads& x, int64_t head, int dim) {
    return {(const char*)((const T*)x.data + head * x.head_stride), x.row_stride * (int64_t)sizeof(T), dim};
}

// to [dim, ld] = factor * from [num_rows, width] transposed.
template <class T>
void transpose(const T* from, int64_t width, int num_rows, int dim, T factor, T* to, int64_t ld) {
    for (int e = 0; e < dim; ++e)
        for (int r = 0; r < num_rows; ++r) to[e * ld + r] = from[r * width + e] * factor;
}

// Scores leave the product in base 2, or divided by softcap where that is on.
template <class Acc>
Acc score_factor(double softmax_scale, double softcap) {
    return Acc(softcap > 0 ? softmax_scale / softcap : softmax_scale * M_LOG2E);
}

// *at = max(*at, x), among threads.
template <class Acc>
void raise_to(Acc* at, Acc x) {
    const std::atomic_ref<Acc> most(*at);
    for (Acc known = most; known < x && !most.compare_exchange_weak(known, x);) {
    }
}

template <class T, class Out>
void forward(const ForwardParams& p) {
    using Acc = acc_t<T>;
    const AttentionShape& sh = p.shape;
    const int d_padded = padded(sh.head_dim), v_padded = padded(sh.v_dim);
    // The heads of a group share keys: as many as fit go into one panel, so that short inputs fill the lanes too. Small
    // inputs get small tiles, for enough tasks.
    const int group = sh.num_q_heads / sh.num_kv_heads;
    int heads = std::min(group, kPanelLanes);
    while (group % heads) --heads;
    const int num_blocks = sh.num_q_heads / heads;
    const int64_t lanes_per_task = (int64_t)sh.num_q * sh.num_q_heads / 64;
    const int panels = std::clamp<int64_t>(lanes_per_task / kPanelLanes, 1, kTilePanels);
    const int tile_lanes = panels * kPanelLanes, tile_rows = tile_lanes / heads,
              num_tiles = tiles_of(sh.num_q, tile_rows);
    const auto slices = hulls(p.slices, p.num_slices);
    const TileTable table = tile_table(slices, num_tiles, tile_rows);
    const TileKernels<Acc>& kernels = tile_kernels<Acc>();
    const Acc factor = score_factor<Acc>(p.softmax_scale, p.softcap);

    const int64_t room_size = (sh.head_dim + sh.v_dim + 2) * tile_lanes + kTileKeys * (d_padded + v_padded);
    run_tasks<Acc>((int64_t)num_tiles * num_blocks, room_size, [&](int64_t task, Acc* room) {
        const int t = table.heaviest[task / num_blocks], head = task % num_blocks * heads, kv_head = head / group;
        const int row = t * tile_rows, row_end = std::min(row + tile_rows, sh.num_q), lanes = (row_end - row) * heads;
        Acc *q = room, *out = q + sh.head_dim * tile_lanes, *sum = out + sh.v_dim * tile_lanes,
            *most = sum + tile_lanes;
        Acc *k = most + tile_lanes, *v = k + kTileKeys * d_padded;
        std::fill(q, most, Acc(0));
        std::fill_n(most, tile_lanes, kNone<Acc>);
        QueryTile<Acc> tile{row, row_end, heads, q, out, most, sum, k, v};
        // A lane's vector of dim elements, kPanelLanes apart.
        auto column = [](Acc* panels, int lane, int dim) {
            return panels + lane / kPanelLanes * dim * kPanelLanes + lane % kPanelLanes;
        };
        for (int lane = 0; lane < lanes; ++lane) {
            const T* in =
                (const T*)p.q.data + (row + lane / heads) * p.q.row_stride + (head + lane % heads) * p.q.head_stride;
            Acc* to = column(q, lane, sh.head_dim);
            for (int e = 0; e < sh.head_dim; ++e) to[e * kPanelLanes] = to_acc(in[e]) * factor;
        }
        for (int n = table.first[t]; n < table.first[t + 1]; ++n) {
            const Slice s = hull(crop(slices[table.slice[n]], row, row_end, 0, sh.num_k));
            kernels.forward_slice(p.dtype, head_rows<T>(p.k, kv_head, sh.head_dim),
                                  head_rows<T>(p.v, kv_head, sh.v_dim), Acc(p.softcap * M_LOG2E), s, tile);
        }
        for (int lane = 0; lane < lanes && p.max_logits; ++lane)
            raise_to((Acc*)p.max_logits + head + lane % heads, most[lane] * Acc(M_LN2));
        for (int lane = 0; lane < lanes; ++lane) {
            const int64_t i = (int64_t)(row + lane / heads) * sh.num_q_heads + head + lane % heads;
            Acc m = most[lane], l = sum[lane];
            Acc* o = column(out, lane, sh.v_dim);
            // A sink is a key without a value; a previous partial is a key whose score is its lse.
            auto add = [&](Acc score, const Acc* value) {
                if (score == kNone<Acc>) return;
                const Acc next = std::max(m, score), keep = std::exp2(m - next), weight = std::exp2(score - next);
                l = l * keep + weight;
                for (int e = 0; e < sh.v_dim; ++e)
                    o[e * kPanelLanes] = o[e * kPanelLanes] * keep + (value ? weight * value[e] : Acc(0));
                m = next;
            };
            for (int n = 0; n < p.num_sinks; ++n)
                add(((const Acc*)p.sink)[n * sh.num_q_heads + head + lane % heads] * Acc(M_LOG2E), nullptr);
            if (p.lse_prev) add(((const Acc*)p.lse_prev)[i] * Acc(M_LOG2E), (const Acc*)p.out_prev + i * sh.v_dim);
            const bool bare = m == kNone<Acc>;
            ((Acc*)p.lse)[i] = bare ? kNone<Acc> : (m + std::log2(l)) * Acc(M_LN2);
            const Acc inverse = bare ? Acc(0) : Acc(1) / l;
            Out* result =
                (Out*)p.out.data + (row + lane / heads) * p.out.row_stride + (head + lane % heads) * p.out.head_stride;
            for (int e = 0; e < sh.v_dim; ++e) result[e] = from_acc<Out>(o[e * kPanelLanes] * inverse);
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
    const TileKernels<Acc>& kernels = tile_kernels<Acc>();

    // Enough tasks for the threads: where there are few kv heads, each one's k tiles are dealt out, heavy ones first,
    // to several tasks, as far as their dq fit into a gigabyte.
    const int64_t part_stride = (int64_t)heads * sh.num_q * d_padded;
    const int64_t affordable = (1 << 30) / std::max<int64_t>(1, part_stride * sizeof(Acc));
    const int64_t wanted = std::min<int64_t>(num_tiles, torch::stable::get_num_threads() / kv_heads);
    const int num_parts = std::max<int64_t>(1, std::min(wanted, affordable));
    auto dq = scratch<Acc>(num_parts * part_stride);
    const int64_t room_size = kTileKeys * (3 * (d_padded + v_padded)) + kTileRows * (d_padded + v_padded);
    run_tasks<Acc>((int64_t)kv_heads * num_parts, room_size, [&](int64_t task, Acc* room) {
        const int kv_head = task % kv_heads, part = task / kv_heads;
        Acc* dq_part = dq.get() + part * part_stride;
        std::fill_n(dq_part + (int64_t)kv_head * group * sh.num_q * d_padded, (int64_t)group * sh.num_q * d_padded,
                    Acc(0));
        Acc *k = room, *k_transposed = k + kTileKeys * d_padded, *dk = k_transposed + kTileKeys * d_padded;
        Acc *v = dk + kTileKeys * d_padded, *v_transposed = v + kTileKeys * v_padded,
            *dv = v_transposed + kTileKeys * v_padded;
        Acc *q = dv + kTileKeys * v_padded, *dout = q + kTileRows * d_padded;
        for (int t = part; t < num_tiles; t += num_parts) {
            const int index = table.heaviest[t], key = index * kTileKeys,
                      num_keys = std::min(kTileKeys, sh.num_k - key);
            std::fill(room, q, Acc(0));
            kernels.load(p.dtype, head_rows<T>(p.k, kv_head, sh.head_dim), key, num_keys, k, d_padded);
            kernels.load(p.dtype, head_rows<T>(p.v, kv_head, sh.v_dim), key, num_keys, v, v_padded);
            transpose(k, d_padded, kTileKeys, sh.head_dim, factor, k_transposed, kTileKeys);
            transpose(v, v_padded, kTileKeys, sh.v_dim, Acc(1), v_transposed, kTileKeys);
            KeyTile<Acc> tile{key, d_padded, v_padded, k, k_transposed, v_transposed, dk, dv, q, dout};
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                const QueryHead<Acc> query{head_rows<T>(p.q, head, sh.head_dim),
                                           head_rows<T>(p.dout, head, sh.v_dim),
                                           (const Acc*)p.lse + head,
                                           (const Acc*)p.delta + head,
                                           heads,
                                           dq_part + (int64_t)head * sh.num_q * d_padded};
                for (int n = table.first[index]; n < table.first[index + 1]; ++n)
                    kernels.backward_slice(p.dtype, query, Acc(p.softcap * M_LOG2E), slices[table.slice[n]], tile);
            }
            for (int i = 0; i < num_keys; ++i) {
                Grad* dk_row = (Grad*)p.dk.data + (key + i) * p.dk.row_stride + kv_head * p.dk.head_stride;
                Grad* dv_row = (Grad*)p.dv.data + (key + i) * p.dv.row_stride + kv_head * p.dv.head_stride;
                for (int e = 0; e < sh.head_dim; ++e)
                    dk_row[e] = from_acc<Grad>(dk[i * d_padded + e] * Acc(p.softmax_scale));
                for (int e = 0; e < sh.v_dim; ++e) dv_row[e] = from_acc<Grad>(dv[i * v_padded + e]);
            }
        }
    });
    const Grad* dq_prev = (const Grad*)p.dq_prev;
    parallel_for(0, (int64_t)sh.num_q * heads, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / heads, head = i % heads;
            Grad* out = (Grad*)p.dq.data + row * p.dq.row_stride + head * p.dq.head_stride;
            Acc* total = dq.get() + (head * sh.num_q + row) * d_padded;
            for (int part = 1; part < num_parts; ++part)
                for (int e = 0; e < sh.head_dim; ++e) total[e] += total[part * part_stride + e];
            const Grad* previous = dq_prev ? dq_prev + i * sh.head_dim : nullptr;
            for (int e = 0; e < sh.head_dim; ++e)
                out[e] = from_acc<Grad>(total[e] * Acc(p.softmax_scale) + (previous ? to_acc(previous[e]) : Acc(0)));
        }
    });
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
