// Attention backward over band slices for heads above 128. As in ffa_bwd.cu, a persistent block owns a tile of keys of
// one kv head, walks the q rows of every slice that touches them in visits for every query head of the group, and
// writes dk and dv once; dq is summed in fp32 by bulk reduces into a workspace (ffa_bwd.cuh) that a kernel of its own
// finishes.
//
// What differs is who owns what: a tile's dk and dv fill the registers of both consumers, so they share one tile. The
// first computes S = Q K^T and P, the second dP = dO V^T meanwhile, and dS with P as it was rounded for dV; both are
// kept in shared memory as [row / 16][key][row % 16]. (Half of the keys each would read Q and dO twice.)
// All gradients are computed transposed, as dV^T = dO^T P, dK^T = Q^T dS and dQ^T = K^T dS^T: their accumulators' rows
// are columns of the head in chunks of 64 that the consumers divide between them, so that a tile may have any number of
// keys (BackwardWideShape: as many as registers and shared memory hold). Where the number of chunks is odd, the last
// one is shared: half of the keys each, of dq half of the rows. (Keys as columns of dK and dV is how FlashAttention-3
// fits heads of 256, arXiv 2407.08608.)
//
// dq leaves in pieces of a few rows x 64 columns, through a ring of buffers for each consumer.
// The order of work, and why ordered visits never wait forever: ffa_bwd.cu.
//
// Macros: SHAPE, an index of kBackwardWideShapes (smaller heads arrive zero-padded by TMA), ELEMENT bf16 or f16,
// SOFTCAP 0 or 1, DETERMINISTIC 0 or 1.
#include "ffa_bwd.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace magi {

using T = ELEMENT;
constexpr BackwardWideShape kShape = kBackwardWideShapes[SHAPE];
constexpr int kQChunks = kShape.head_dim / 64, kVChunks = kShape.v_dim / 64;  // a TMA box is 64 elements wide
constexpr int kKeys = kShape.keys, kHalf = kKeys / 2, kRows = kBackwardWideRows;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kScores = kKeys / 2;                    // accumulators of a thread
constexpr int kRowAlign = DETERMINISTIC ? kRows : 8;  // where a visit may start
constexpr int kPlanned = 8;                           // visits kept written down; storers are late readers
constexpr int kScoreBlock = kKeys * 32;               // bytes of 16 rows of p or ds
constexpr int kPieceRows = kShape.dq_rows, kPieces = kQChunks * (kRows / 2) / kPieceRows;  // of a consumer's dq a visit
constexpr int kBuffers = kShape.dq_buffers / kConsumers;  // that a consumer's dq leaves through
enum NamedBarrier { kScoresNear = 1, kPReady = 2, kDsReady = 3 };

struct alignas(16) Item {                     // a tile of keys of one kv head
    int key0, num_keys, kv_head, num_visits;  // num_visits < 0: no more work
};
// Rows from row0 on; allowed cells have first <= i < last, lo <= key - i <= hi, keys in [key0, key1).
struct Visit {
    int row0, head, masked, order;
    int first, last, lo, hi, key0, key1;
};
struct Plan {  // the planner's notes: it has few registers
    int index, kv_head, head;
    int tile_key0, tile_key1, first, num_slices;  // of the tile
    int slice, row0, row1, key0, key1, lo, hi;    // of one of its slices
    int down, top;                                // walk_tile
    const int* orders;                            // of the tile's visits, by block of rows
};

struct Smem {
    u16 k[kQChunks][kKeys * 64], v[kVChunks][kKeys * 64];
    u16 q[kShape.q_stages][kQChunks][kRows * 64], dout[kShape.dout_stages][kVChunks][kRows * 64];
    u16 p[kKeys * kRows], ds[kKeys * kRows];  // [row / 16][key][row % 16], swizzled by hand
    float dq[kConsumers][kBuffers][kPieceRows * 64];
    float lse[kShape.q_stages][kRows], delta[kShape.dout_stages][kRows];
    Visit visit[kPlanned];
    Item planned_item, item;
    Plan plan;
    u64 item_planned, item_taken, visit_planned[kPlanned], visit_taken[kPlanned];
    u64 kv_full, kv_free, p_free, q_full[kShape.q_stages], q_free[kShape.q_stages];
    u64 dout_full[kShape.dout_stages], dout_free[kShape.dout_stages];
    u64 dq_full[kConsumers][kBuffers], dq_free[kConsumers][kBuffers];
};
static_assert(kShape.dq_buffers % kConsumers == 0 && sizeof(Smem) <= kShape.smem() && kShape.smem() <= 227 * 1024);

}  // namespace magi

#include "ffa_bwd_shared.cuh"

namespace magi {

// ---- planner: one thread walks the tiles' slices, a little ahead of the loads ----
// Where visit `n` is written down.
__device__ __forceinline__ Visit& visit_to_plan(Smem& s, int n) {
    // The loader took visit n - 2 when the consumers were done with visit n - 4, so storers are with visit n - 5.
    if (n >= 2) barrier_wait(s.visit_taken[(n - 2) % kPlanned], (n - 2) / kPlanned & 1);
    return s.visit[n % kPlanned];
}

__device__ void plan_visits(const BackwardArgs& a, Smem& s) {
    Plan& plan = s.plan;
    int n = 0;
    for (u32 parity = 1;; parity ^= 1) {
        const int next = atomicAdd(&a.table.header->next_work, 1);
        const bool done = next >= a.table.num_tiles * a.num_kv_heads;
        int visits = done ? -1 : 0;
        plan.tile_key0 = plan.tile_key1 = 0;
        if (!done) {
            find_tile(a, plan, next);
            count_visits(a, plan, visits);
        }
        barrier_wait(s.item_taken, parity);
        s.planned_item = {plan.tile_key0, plan.tile_key1 - plan.tile_key0, plan.kv_head, visits};
        barrier_arrive(s.item_planned);
        if (done) break;
        if (visits == 0) continue;
        if (DETERMINISTIC) plan.orders = a.order + static_cast<long long>(plan.index) * a.num_blocks;
        walk_tile(a, plan, [&](int row0) {
            Visit& visit = visit_to_plan(s, n);
            visit.row0 = row0;
            visit.head = plan.head;
            describe_cells(plan, row0, visit);
            barrier_arrive(s.visit_planned[n % kPlanned]);
            ++n;
        });
    }
    visit_to_plan(s, n).head = -1;  // for the storers
    barrier_arrive(s.visit_planned[n % kPlanned]);
}

// ---- loader: one thread streams what is planned ----
__device__ void load_visits(const BackwardArgs& a, Smem& s) {
    int n = 0;
    for (u32 item = 0;; ++item) {
        barrier_wait(s.item_planned, item & 1);
        int left = s.planned_item.num_visits;
        barrier_wait(s.kv_free, (item & 1) ^ 1);
        s.item = s.planned_item;
        barrier_arrive_expect(s.kv_full, left > 0 ? sizeof(s.k) + sizeof(s.v) : 0);
        if (left > 0) {
#pragma unroll 1
            for (int c = 0; c < kQChunks; ++c)
                tma_load(s.k[c], a.k, s.kv_full, 64 * c, s.planned_item.kv_head, s.planned_item.key0);
#pragma unroll 1
            for (int c = 0; c < kVChunks; ++c)
                tma_load(s.v[c], a.v, s.kv_full, 64 * c, s.planned_item.kv_head, s.planned_item.key0);
        }
        barrier_arrive(s.item_taken);
        if (left < 0) break;
        for (; left > 0; --left, ++n) {
            asm volatile("" : "+r"(n));  // addresses are computed afresh: there are no registers to keep them
            const Visit& visit = s.visit[n % kPlanned];
            barrier_wait(s.visit_planned[n % kPlanned], n / kPlanned & 1);
            const int q_stage = n % kShape.q_stages;
            barrier_wait(s.q_free[q_stage], n / kShape.q_stages & 1 ^ 1);
            barrier_arrive(s.visit_taken[n % kPlanned]);
            load_rows(a, visit, a.q, a.lse_log2, s.q[q_stage], s.lse[q_stage], s.q_full[q_stage]);
            const int dout_stage = n % kShape.dout_stages;
            barrier_wait(s.dout_free[dout_stage], n / kShape.dout_stages & 1 ^ 1);
            load_rows(a, visit, a.dout, a.delta, s.dout[dout_stage], s.delta[dout_stage], s.dout_full[dout_stage]);
        }
    }
}

// ---- storers: a thread for each consumer adds its pieces of dq to the workspace ----
__device__ void add_dq(const BackwardArgs& a, Smem& s, int w) {
    Ring<kBuffers> buffer;
    auto turn_of = [&](const Visit& visit) {
        return a.turn + (visit.head * 2 + w) * a.num_blocks + visit.row0 / kRows;
    };
    bool my_turn = false;
    for (int n = 0;; ++n) {
        const Visit& visit = s.visit[n % kPlanned];
        barrier_wait(s.visit_planned[n % kPlanned], n / kPlanned & 1);
        if (visit.head < 0) break;
        // Past its order once this tile itself has been there, for another slice: that sum is done, see below.
        if (DETERMINISTIC && !my_turn)
            while (turn_read(turn_of(visit)) < visit.order) __nanosleep(20);
#pragma unroll 1
        for (int piece = 0; piece < kPieces; ++piece) {
            barrier_wait(s.dq_full[w][buffer.stage], buffer.parity);
            const int c = piece / (kRows / kPieceRows);
            const bool shared = c == kQChunks / 2;  // the last one of an odd number
            const int chunk = shared ? kQChunks - 1 : 2 * c + w;
            const int row = piece % (kRows / kPieceRows) * kPieceRows + (shared ? w * (kRows / 2) : 0);
            bulk_add(a.dq_sum +
                         ((visit.head * static_cast<long long>(kQChunks) + chunk) * a.rows_pad + visit.row0 + row) * 64,
                     s.dq[w][buffer.stage], sizeof(s.dq[0][0]));
            if (DETERMINISTIC && piece == kPieces - 1) {  // a look at the next turn takes as long as the add
                const Visit& next = s.visit[(n + 1) % kPlanned];
                my_turn = barrier_passed(s.visit_planned[(n + 1) % kPlanned], (n + 1) / kPlanned & 1) &&
                          next.head >= 0 && turn_read(turn_of(next)) >= next.order;
            }
            bulk_wait_read();
            barrier_arrive(s.dq_free[w][buffer.stage]);
            buffer.advance();
        }
        if (DETERMINISTIC) {
            bulk_wait();  // the sums are in memory
            turn_pass(turn_of(visit));
        }
    }
    bulk_wait();
}

// ---- consumers ----
// What a thread holds of a gradient: columns in chunks of 64, transposed; whole ones, and half of the keys of a shared
// one.
template <int kChunks>
struct Gradient {
    float whole[kChunks / 2][kKeys / 2], half[kChunks % 2 ? kHalf / 2 : 1];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int c = 0; c < kChunks / 2; ++c)
#pragma unroll
            for (int i = 0; i < kKeys / 2; ++i) whole[c][i] = 0;
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i)
            if (kChunks % 2) half[i] = 0;
    }
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int c = 0; c < kChunks / 2; ++c) pin(whole[c]);
        if (kChunks % 2) pin(half);
    }
    // Adds (rows x columns)^T times (rows x keys): chunk `c` of this consumer.
    __device__ __forceinline__ void add_whole(int c, u32 rows, u32 scores, int w) {
        const Operand a(rows + (2 * c + w) * (kRows * 128), 16, 1024), b(scores, 16, 256, kSwizzle32);
#pragma unroll
        for (int x = 0; x < kRows / 16; ++x)
            wgmma_ss<T, kKeys, 1, 0>(whole[c], a.at(2048 * x), b.at(kScoreBlock * x), 1);
    }
    __device__ __forceinline__ void add_half(u32 rows, u32 scores, int w) {
        const Operand a(rows + (kChunks - 1) * (kRows * 128), 16, 1024),
            b(scores + w * (kHalf * 32), 16, 256, kSwizzle32);
        if constexpr (kChunks % 2) {
#pragma unroll
            for (int x = 0; x < kRows / 16; ++x)
                wgmma_ss<T, kHalf, 1, 0>(half, a.at(2048 * x), b.at(kScoreBlock * x), 1);
        }
    }
};

// Steps of 16 columns, from First on to Last, of d = rows times keys^T: S or dP.
template <int First, int Last>
__device__ __forceinline__ void multiply_rows(float (&d)[kScores], u32 row_addr, u32 key_addr) {
    const Operand rows(row_addr, 16, 1024), keys(key_addr, 16, 1024);
#pragma unroll
    for (int x = First; x < Last; ++x)
        wgmma_ss<T, kKeys, 0, 0>(d, rows.at(x / 4 * (kRows * 128) + 32 * (x % 4)),
                                 keys.at(x / 4 * (kKeys * 128) + 32 * (x % 4)), x);
    wgmma_commit();
}

// p = exp2(score - lse), both in log2 units; lse of rows r and r + 8.
__device__ __forceinline__ void probabilities(const BackwardArgs& a, float2 lse, float (&p)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) p[i] = probability(a, p[i], i % 4 / 2 ? lse.y : lse.x);
}

__device__ __forceinline__ void mask_probabilities(const Visit& visit, int row, int key, float (&p)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = row + 8 * h;  // within the visit
        const int begin = max(visit.key0, i + visit.lo), end = min(visit.key1, i + visit.hi + 1);
        const u32 length = i >= visit.first && i < visit.last ? max(end - begin, 0) : 0;
#pragma unroll
        for (int y = 0; y < kKeys / 8; ++y)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (static_cast<u32>(8 * y + key + e - begin) >= length) p[4 * y + 2 * h + e] = 0;
    }
}

// Scores of a thread are kept as [row / 16][key][row % 16]; `at` is where this lane's row of matrices 0 to 3 begins:
// keys of eight and eight, of each the first and the second eight rows.
__device__ __forceinline__ void store_scores(u32 at, const float (&x)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 8) {
        const u32 words[4] = {pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]), pack<T>(x[i + 4], x[i + 5]),
                              pack<T>(x[i + 6], x[i + 7])};
        store_matrices_transposed(at + i * 64, words);
    }
}

// What a softcap multiplies gradients with, in place of p.
__device__ __forceinline__ void cap_slopes(const BackwardArgs& a, float2 lse, float (&p)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) p[i] = cap_slope(a, p[i], i % 4 / 2 ? lse.y : lse.x);
}

// ds = p (dp - delta), into dp; p, and under a softcap its slopes in place of ds, as the other consumer stored them.
__device__ __forceinline__ void score_gradients(u32 p_at, u32 ds_at, float2 delta, float (&dp)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; i += 8) {
        u32 p[4], slope[4];
        load_matrices_transposed(p_at + i * 64, p);
        if (SOFTCAP) load_matrices_transposed(ds_at + i * 64, slope);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const u16 bits = static_cast<u16>(j % 2 ? p[j / 2] >> 16 : p[j / 2]);
            float ds = to_float(T{bits}) * (dp[i + j] - (j % 4 / 2 ? delta.y : delta.x));
            if (SOFTCAP) ds *= to_float(T{static_cast<u16>(j % 2 ? slope[j / 2] >> 16 : slope[j / 2])});
            dp[i + j] = ds;
        }
    }
}

// 64 columns of dk or dv, transposed accumulators of Keys keys from `key0` of the tile on.
template <int Keys>
__device__ __forceinline__ void write_chunk(const BackwardArgs& a, const Item& item, int key0, int column0, float scale,
                                            void* to, long long row_stride, long long head_stride, int dim,
                                            const float (&d)[Keys / 2]) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const long long first = static_cast<long long>(item.key0) * row_stride + item.kv_head * head_stride;
    column0 += warp * 16;
    if (a.grad_is_float) {
        float* out = static_cast<float*>(to) + first;
#pragma unroll
        for (int i = 0; i < Keys / 2; ++i) {
            const int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2, c = column0 + i % 4 / 2 * 8 + lane / 4;
            if (key < item.num_keys && c < dim) out[key * row_stride + c] = d[i] * scale;
        }
    } else {
        u16* out = static_cast<u16*>(to) + first;
#pragma unroll
        for (int y = 0; y < Keys / 8; y += 2) {  // 16 keys x 16 columns a warp: 16 bytes a lane
            u32 x[4]{};
#pragma unroll
            for (int i = 0; i < (y + 1 < Keys / 8 ? 4 : 2); ++i)
                x[i] = transpose_matrix(pack<T>(d[4 * y + 2 * i] * scale, d[4 * y + 2 * i + 1] * scale));
            transpose_quad(x, lane);
            const int key = key0 + 8 * (y + lane % 4 / 2) + lane / 4, c = column0 + lane % 2 * 8;
            if (key < min(item.num_keys, key0 + Keys) && c < dim)
                *reinterpret_cast<uint4*>(out + key * row_stride + c) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <int kChunks>
__device__ __forceinline__ void write_gradient(const BackwardArgs& a, const Item& item, int w, float scale, void* to,
                                               long long row_stride, long long head_stride, int dim,
                                               const Gradient<kChunks>& g) {
#pragma unroll
    for (int c = 0; c < kChunks / 2; ++c)
        write_chunk<kKeys>(a, item, 0, 64 * (2 * c + w), scale, to, row_stride, head_stride, dim, g.whole[c]);
    if constexpr (kChunks % 2)
        write_chunk<kHalf>(a, item, w * kHalf, 64 * (kChunks - 1), scale, to, row_stride, head_stride, dim, g.half);
}

template <int w>
__device__ void differentiate(const BackwardArgs& a, Smem& s) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int row = warp * 16 + lane / 4, key = lane % 4 * 2;  // the accumulators' layout: wgmma.cuh
    Gradient<kQChunks> dk;
    Gradient<kVChunks> dv;
    // stmatrix: lane l names row l % 8 of matrix l / 8; matrix m holds rows + 8 (m & 1), keys + 8 (m >> 1).
    const u32 scores_at =
        warp * kScoreBlock + (lane / 16 * 8 + lane % 8) * 32 + ((lane / 8 % 2 ^ (lane >> 2 & 1)) << 4);
    const int odd = lane % 4 / 2;  // of the eight rows of dq, the second four
    const u32 piece_at = odd * 1024 + ((warp * 256 + lane / 4 * 32 + lane % 2 * 16) ^ (odd * 64));
    Ring<kShape.q_stages> q_stage;
    Ring<kShape.dout_stages> dout_stage;
    Ring<kBuffers> buffer;
    u32 visit = 0, kv_parity = 0, p_parity = 1;

    auto release = [&](u64& bar) {
        __syncwarp();                        // all lanes have read
        if (lane == 0) barrier_arrive(bar);  // every warp by itself
    };
    // dq^T, piece by piece to the next buffers.
    auto store_dq = [&](const float* dq, int rows) {
#pragma unroll
        for (int piece = 0; piece < rows / kPieceRows; ++piece) {
            barrier_wait(s.dq_free[w][buffer.stage], buffer.parity ^ 1);
            const u32 to = smem_addr(s.dq[w][buffer.stage]) + piece_at;
#pragma unroll
            for (int j = 0; j < kPieceRows / 8; ++j) {
                const float* x = dq + piece * (kPieceRows / 2) + 4 * j;
                store_shared(to + j * 2048, x[0], x[1], x[2], x[3]);
            }
            fence_async_shared();
            release(s.dq_full[w][buffer.stage]);
            buffer.advance();
        }
    };
    const u32 p_addr = smem_addr(s.p), ds_addr = smem_addr(s.ds);
    for (;;) {
        barrier_wait(s.kv_full, kv_parity);
        kv_parity ^= 1;
        const int num_visits = uniform(s.item.num_visits);
        if (num_visits < 0) break;
        dk.clear();
        dv.clear();
        dk.keep();
        dv.keep();
        for (int n = 0; n < num_visits; ++n, ++visit) {
            const u32 q = smem_addr(s.q[q_stage.stage][0]), dout = smem_addr(s.dout[dout_stage.stage][0]);
            float x[kScores];
            // S by the first consumer; dP by the second, behind it: while the first computes p.
            if constexpr (w == 0) {
                constexpr int kSteps = 4 * kQChunks;
                barrier_wait(s.q_full[q_stage.stage], q_stage.parity);
                wgmma_fence();
                multiply_rows<0, kSteps - 4>(x, q, smem_addr(s.k[0]));
                multiply_rows<kSteps - 4, kSteps>(x, q, smem_addr(s.k[0]));
                const float2 lse = {s.lse[q_stage.stage][row], s.lse[q_stage.stage][row + 8]};
                const bool masked = s.visit[visit % kPlanned].masked;
                wgmma_wait<1>();
                SOFTCAP ? named_sync(kScoresNear, 256) : named_arrive(kScoresNear, 256);
                wgmma_wait<0>();
                pin(x);
                probabilities(a, lse, x);
                if (masked) mask_probabilities(s.visit[visit % kPlanned], row, key, x);
                barrier_wait(s.p_free, p_parity);  // dV and ds of the visit before have read p
                p_parity ^= 1;
                store_scores(p_addr + scores_at, x);
                if (SOFTCAP) {  // ds of the visit before was read, as the second consumer waited for these scores
                    cap_slopes(a, lse, x);
                    store_scores(ds_addr + scores_at, x);
                }
                fence_async_shared();
            } else {
                barrier_wait(s.dout_full[dout_stage.stage], dout_stage.parity);
                named_sync(kScoresNear, 256);
                wgmma_fence();
                multiply_rows<0, 4 * kVChunks>(x, dout, smem_addr(s.v[0]));
            }
            // Also: both consumers' products with ds of the visit before are done.
            named_sync(kPReady, 256);
            if (w == 0) barrier_wait(s.dout_full[dout_stage.stage], dout_stage.parity);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < kVChunks / 2; ++c) dv.add_whole(c, dout, p_addr, w);
            dv.add_half(dout, p_addr, w);
            wgmma_commit();
            if constexpr (w == 1) {
                const float2 delta = {s.delta[dout_stage.stage][row], s.delta[dout_stage.stage][row + 8]};
                wgmma_wait<1>();
                pin(x);
                score_gradients(p_addr + scores_at, ds_addr + scores_at, delta, x);
                store_scores(ds_addr + scores_at, x);
                fence_async_shared();
                barrier_wait(s.q_full[q_stage.stage], q_stage.parity);
            }
            named_sync(kDsReady, 256);
            // dq stored while dk is computed.
#pragma unroll
            for (int c = 0; c < kQChunks / 2; ++c) {
                float dq[kRows / 2];
                const Operand columns(smem_addr(s.k[0]) + (2 * c + w) * sizeof(s.k[0]), 16, 1024);
                const Operand rows(ds_addr, kScoreBlock, 256, kSwizzle32);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kKeys / 16; ++x)
                    wgmma_ss<T, kRows, 1, 1>(dq, columns.at(2048 * x), rows.at(512 * x), x);
                wgmma_commit();
                if (c == 0) {
                    wgmma_wait<1>();
                    dv.keep();
                    release(s.dout_free[dout_stage.stage]);
                    release(s.p_free);
                    wgmma_fence();
                }
                dk.add_whole(c, q, ds_addr, w);
                wgmma_commit();
                wgmma_wait<1>();
                pin(dq);
                store_dq(dq, kRows);
            }
            if constexpr (kQChunks % 2) {
                float dq[kRows / 4];
                const Operand columns(smem_addr(s.k[kQChunks - 1]), 16, 1024);
                const Operand rows(ds_addr + w * (kRows / 32 * kScoreBlock), kScoreBlock, 256, kSwizzle32);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kKeys / 16; ++x)
                    wgmma_ss<T, kRows / 2, 1, 1>(dq, columns.at(2048 * x), rows.at(512 * x), x);
                wgmma_commit();
                dk.add_half(q, ds_addr, w);
                wgmma_commit();
                wgmma_wait<1>();
                pin(dq);
                store_dq(dq, kRows / 2);
            }
            wgmma_wait<0>();
            dk.keep();
            release(s.q_free[q_stage.stage]);
            q_stage.advance();
            dout_stage.advance();
        }
        const Item item = s.item;
        release(s.kv_free);
        write_gradient<kQChunks>(a, item, w, a.scale, a.dk, a.dk_row_stride, a.dk_head_stride, a.head_dim, dk);
        write_gradient<kVChunks>(a, item, w, 1.f, a.dv, a.dv_row_stride, a.dv_head_stride, a.v_dim, dv);
    }
}

extern "C" __global__ __launch_bounds__(kThreads, 1) void ffa_bwd(const __grid_constant__ BackwardArgs a) {
    extern __shared__ __align__(1024) char raw[];  // as the swizzle needs it
    Smem& s = *reinterpret_cast<Smem*>(raw);
    if (threadIdx.x == 0) {
        barrier_init(s.item_planned, 1);
        barrier_init(s.item_taken, 1);
        for (int i = 0; i < kPlanned; ++i) {
            barrier_init(s.visit_planned[i], 1);
            barrier_init(s.visit_taken[i], 1);
        }
        barrier_init(s.kv_full, 1);
        barrier_init(s.kv_free, 4 * kConsumers);
        barrier_init(s.p_free, 4 * kConsumers);
        for (int i = 0; i < kShape.q_stages; ++i) {
            barrier_init(s.q_full[i], 1);
            barrier_init(s.q_free[i], 4 * kConsumers);
        }
        for (int i = 0; i < kShape.dout_stages; ++i) {
            barrier_init(s.dout_full[i], 1);
            barrier_init(s.dout_free[i], 4 * kConsumers);
        }
        for (int i = 0; i < kBuffers; ++i) {
            for (int w = 0; w < kConsumers; ++w) {
                barrier_init(s.dq_full[w][i], 4);
                barrier_init(s.dq_free[w][i], 1);
            }
        }
        barrier_init_fence();
    }
    wait_for_earlier_kernels();
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<kProducerRegisters>();
        if (threadIdx.x == 0)
            load_visits(a, s);
        else if (threadIdx.x == 32 || threadIdx.x == 64)
            add_dq(a, s, threadIdx.x / 32 - 1);
        else if (threadIdx.x == 96)
            plan_visits(a, s);
    } else {
        registers_grow<kConsumerRegisters>();
        uniform(threadIdx.x / 128) == 1 ? differentiate<0>(a, s) : differentiate<1>(a, s);
    }
}

}  // namespace magi
