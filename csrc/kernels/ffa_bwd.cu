// Attention backward over band slices. A persistent block owns 128 keys of one kv head, walks the q rows of every slice
// that touches them for every query head of the group, and writes dk and dv once (zeros where nobody attends): no
// atomics on them, no second pass over heads. dq is summed in fp32 by bulk reduces into a workspace (ffa_bwd.cuh).
//
// One thread plans visits of 64, 80 or 128 rows (ROWS), another streams their Q, dO, lse and delta by TMA, and two
// warps add dq to the workspace; two consumer warpgroups own 64 keys each. S^T = K Q^T and dP^T = V dO^T are recomputed
// with keys as accumulator rows, so that P^T feeds dV and dS^T feeds dK from registers; dS^T also goes through swizzled
// shared memory, where it is the B operand of dQ^T = K^T dS^T (so that rows need not come in multiples of 64; each
// warpgroup takes half of the columns, or at head_dim 64 half of the rows). dq is stored while dK is computed. (The
// order of products and 80 rows are those of FlashAttention-3's backward, arXiv 2407.08608.)
//
// Deterministic variants add the visits of a block of rows in ascending key order. Work is handed out in that order by
// a counter to blocks that already run, and a visit waits only for work handed out earlier: the earliest unfinished
// work waits for nobody, so nobody waits forever, however few blocks are resident.
//
// Macros: HEAD_DIM 64 or 128 (smaller heads arrive zero-padded by TMA), ELEMENT bf16 or f16, SOFTCAP 0 or 1,
// DETERMINISTIC 0 or 1, ROWS as backward_rows has them.
#include "ffa_bwd.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace magi {

using T = ELEMENT;
constexpr int kHalves = HEAD_DIM / 64;  // a TMA box is 64 elements wide
constexpr int kConsumers = 2;           // warpgroups of 64 keys
constexpr int kKeys = kBackwardKeys, kRows = ROWS, kStages = kBackwardStages;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = HEAD_DIM == 128 ? 24 : kRows == 128 ? 40 : 72;
constexpr int kConsumerRegisters = HEAD_DIM == 128 ? 240 : kRows == 128 ? 232 : 216;
constexpr int kSteps = HEAD_DIM / 16;                                     // of the products over head_dim
constexpr int kAhead = HEAD_DIM == 128 ? kSteps : 1;                      // of dP's, queued before the exponentials
constexpr int kLseAhead = kRows == 128 ? kRows / 8 / kSteps : kRows / 8;  // pairs of lse read early
constexpr int kScores = kRows / 2, kOuts = HEAD_DIM / 2;                  // accumulators of a thread
constexpr int kDqRows = kHalves == 2 ? kRows : kRows / 2;                 // of one consumer, 64 columns wide
constexpr int kRowAlign = DETERMINISTIC ? kRows : 8;                      // where a visit may start
constexpr int kPlanned = 4;                                               // visits written down at a time
enum NamedBarrier { kDsReady = 1, kDqReady = 2, kDqFree = 4 };            // the last two + consumer
constexpr int kBulkBytes = kDqRows * 64 * 4;
constexpr int kDsBlock = kKeys * 32;  // bytes of 16 rows of ds

struct Item {                                 // a tile of keys of one kv head
    int key0, num_keys, kv_head, num_visits;  // num_visits < 0: no more work
};
// Rows from row0 on; allowed cells have first <= i < last, lo <= key - i <= hi, keys in [key0, key1).
struct Visit {
    int row0, head, masked, order;
    int first, last, lo, hi, key0, key1, spare0, spare1;
};
struct Plan {  // the planner's notes: it has few registers
    int next, index, kv_head, head;
    int tile_key0, tile_key1, first, num_slices;  // of the tile
    int slice, row0, row1, key0, key1, lo, hi;    // of one of its slices
    int down;                                     // the tile's walk goes from the last row to the first
};
struct DqJob {  // a consumer's share of dq, for its storer
    float* to;  // null: no more
    int* turn;
    int order;
};

struct Smem {
    u16 k[kHalves][kKeys * 64], v[kHalves][kKeys * 64];
    u16 q[kStages][kHalves][kRows * 64], dout[kStages][kHalves][kRows * 64];
    u16 ds[2][kKeys * kRows];  // [row / 16][key][row % 16], swizzled by hand
    float dq[kConsumers][kDqRows * 64];
    float lse[kStages][kRows], delta[kStages][kRows];
    Visit visit[kPlanned];
    Item planned_item, item;
    Plan plan;
    DqJob job[kConsumers];
    u64 item_planned, item_taken, visit_planned[kPlanned], visit_taken[kPlanned];
    u64 kv_full, kv_free, q_full[kStages], q_free[kStages], dout_full[kStages], dout_free[kStages];
};
static_assert(sizeof(Smem) <= backward_smem(HEAD_DIM, kRows) && kStages == 2);

// ---- planner: one thread walks the tiles' slices, a little ahead of the loads
// -----------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ Slice slice_at(const BackwardArgs& a, int first, int i) {
    if (first < 0) return table_slice(a.slices[i], a.num_q, a.num_k, true);
    const int4* entry = reinterpret_cast<const int4*>(a.table.pool + first + i);
    const int4 x = __ldg(entry), y = __ldg(entry + 1);
    return {x.x, x.y, x.z, x.w, y.x, y.y};
}

// Where the visits of a slice begin whose first row is this one.
__device__ __forceinline__ int first_row(int row) { return row - static_cast<u32>(row) % kRowAlign; }

__device__ __forceinline__ int take_work(const BackwardArgs& a) { return atomicAdd(&a.table.header->next_work, 1); }

// Writes down visit `n` of the current slice: rows from row0 on, and what of them the consumers may use.
__device__ __forceinline__ void plan_visit(const BackwardArgs& a, Smem& s, int n, int row0) {
    const Plan& plan = s.plan;
    // The loader took visit n - 2 when the consumers were done with visit n - 4.
    if (n >= 2) barrier_wait(s.visit_taken[(n - 2) % kPlanned], (n - 2) / kPlanned & 1);
    Visit& visit = s.visit[n % kPlanned];
    visit.row0 = row0;
    visit.head = plan.head;
    bool masked = row0 < plan.row0 || row0 + kRows > plan.row1 || plan.key0 > 0 || plan.key1 < kKeys;
    visit.first = plan.row0 - row0;
    visit.last = min(plan.row1 - row0, kRows);
    visit.key0 = plan.key0;
    visit.key1 = plan.key1;
    const int lo = row0 - plan.hi, hi = row0 - plan.lo;  // of key - row within the tile
    visit.lo = lo;
    visit.hi = hi;
    visit.masked = masked || lo > 1 - kRows || hi < kKeys - 1;
    if (DETERMINISTIC) visit.order = a.order[static_cast<long long>(plan.index) * a.num_blocks + row0 / kRows];
    barrier_arrive(s.visit_planned[n % kPlanned]);
}

__device__ void plan_visits(const BackwardArgs& a, Smem& s) {
    Plan& plan = s.plan;
    int n = 0;
    for (u32 parity = 1;; parity ^= 1) {
        plan.next = take_work(a);  // late: work that is reserved early is kept from blocks that idle at the end
        const bool done = plan.next >= a.table.num_tiles * a.num_kv_heads;
        int visits = -1;
        if (!done) {
            {
                const int work = plan.next, first_head = work / (a.table.num_tiles * a.section_heads) * a.section_heads;
                const int heads = min(a.section_heads, a.num_kv_heads - first_head);
                const int at = work - first_head * a.table.num_tiles;
                plan.index = at / heads;
                plan.kv_head = first_head + at % heads;
            }
            // Tiles that begin together come down from the last row. Under a causal mask they end one after the
            // other, each at its first row; the next ones go up from there and meet those that began before them,
            // so that all blocks visit the same rows at the same time, while these are in L2. Waves of tiles, or
            // heads where all tiles are one wave, therefore take turns. Ordered visits all go down.
            {
                int wave = plan.kv_head * a.waves;
                for (int i = plan.index; i >= a.wave_tiles; i -= a.wave_tiles) ++wave;
                plan.down = DETERMINISTIC || wave % 2 == 0;
            }
            {
                const int4 tile =
                    __ldg(reinterpret_cast<const int4*>(DETERMINISTIC ? a.table.unsorted : a.table.tiles) + plan.index);
                plan.tile_key0 = tile.x;
                plan.tile_key1 = min(tile.x + kKeys, a.num_k);
                plan.first = tile.y;
                plan.num_slices = tile.z;
            }
            visits = 0;
            for (int i = 0; i < plan.num_slices; ++i) {
                const Range rows = tile_columns(slice_at(a, plan.first, i), plan.tile_key0, plan.tile_key1);
                if (rows.begin < rows.end) visits += ceil_div(rows.end - first_row(rows.begin), kRows);
            }
            visits *= a.heads_per_kv;
        }
        barrier_wait(s.item_taken, parity);
        s.planned_item = {plan.tile_key0, plan.tile_key1 - plan.tile_key0, plan.kv_head, visits};
        barrier_arrive(s.item_planned);
        if (done) break;
        if (visits == 0) continue;
        const int first_head = plan.kv_head * a.heads_per_kv;
        // In ordered visits one head follows the other. Otherwise a block of rows is visited for all heads of the group
        // while its rows are in L2, where other tiles visit it too.
        plan.head = first_head;
        for (int left = DETERMINISTIC ? a.heads_per_kv : 1; left > 0; --left) {
            for (plan.slice = 0; plan.slice < plan.num_slices; plan.slice = plan.slice + 1) {
                {
                    const Slice x = slice_at(a, plan.first, plan.slice);  // transposed: its rows are keys
                    const Range rows = tile_columns(x, plan.tile_key0, plan.tile_key1);
                    if (rows.begin >= rows.end) continue;
                    plan.row0 = rows.begin;
                    plan.row1 = rows.end;
                    plan.key0 = max(x.q0 - plan.tile_key0, 0);
                    plan.key1 = min(x.q1 - plan.tile_key0, kKeys);
                    plan.lo = x.lo + plan.tile_key0;  // bounds of row - (key - tile_key0)
                    plan.hi = x.hi + plan.tile_key0;
                }
                const int from = first_row(plan.row0), last = (plan.row1 - 1 - from) / kRows;
                for (int block = 0; block <= last; ++block) {
                    const int row0 = from + (plan.down ? last - block : block) * kRows;
                    if (DETERMINISTIC) {
                        plan_visit(a, s, n++, row0);
                    } else {
                        for (int h = 0; h < a.heads_per_kv; ++h) {
                            plan.head = first_head + h;
                            plan_visit(a, s, n++, row0);
                        }
                    }
                }
            }
            if (DETERMINISTIC) plan.head = plan.head + 1;
        }
    }
}

// ---- loader: one thread streams what is planned
// -----------------------------------------------------------------------------------------------------------------------
__device__ void load_visits(const BackwardArgs& a, Smem& s) {
    int n = 0;
    for (u32 item = 0;; ++item) {
        barrier_wait(s.item_planned, item & 1);
        int left = s.planned_item.num_visits;
        barrier_wait(s.kv_free, (item & 1) ^ 1);
        s.item = s.planned_item;
        barrier_arrive_expect(s.kv_full, left > 0 ? sizeof(s.k) + sizeof(s.v) : 0);
        for (int h = 0; h < kHalves && left > 0; ++h) {
            tma_load(s.k[h], a.k, s.kv_full, 64 * h, s.planned_item.kv_head, s.planned_item.key0);
            tma_load(s.v[h], a.v, s.kv_full, 64 * h, s.planned_item.kv_head, s.planned_item.key0);
        }
        barrier_arrive(s.item_taken);
        if (left < 0) break;
        for (; left > 0; --left, ++n) {
            asm volatile("" : "+r"(n));  // addresses are computed afresh: there are no registers to keep them
            const int stage = n % kStages;
            const u32 parity = (n / kStages & 1) ^ 1;
            const Visit& visit = s.visit[n % kPlanned];
            barrier_wait(s.visit_planned[n % kPlanned], n / kPlanned & 1);
            barrier_wait(s.q_free[stage], parity);
            barrier_arrive(s.visit_taken[n % kPlanned]);
            barrier_arrive_expect(s.q_full[stage], sizeof(s.q[0]) + sizeof(s.lse[0]));
#pragma unroll 1
            for (int h = 0; h < kHalves; ++h)
                tma_load(s.q[stage][h], a.q, s.q_full[stage], 64 * h, visit.head, visit.row0);
            bulk_load(s.lse[stage], a.lse_log2 + static_cast<long long>(visit.head) * a.rows_pad + visit.row0,
                      sizeof(s.lse[0]), s.q_full[stage]);
            barrier_wait(s.dout_free[stage], parity);
            barrier_arrive_expect(s.dout_full[stage], sizeof(s.dout[0]) + sizeof(s.delta[0]));
#pragma unroll 1
            for (int h = 0; h < kHalves; ++h)
                tma_load(s.dout[stage][h], a.dout, s.dout_full[stage], 64 * h, visit.head, visit.row0);
            bulk_load(s.delta[stage], a.delta + static_cast<long long>(visit.head) * a.rows_pad + visit.row0,
                      sizeof(s.delta[0]), s.dout_full[stage]);
        }
    }
}

// ---- storers: one warp a consumer adds its dq tiles to the workspace
// ----------------------------------------------------------------------------------------------------------------
__device__ void store_dq(Smem& s, int w) {
    const bool leader = threadIdx.x % 32 == 0;
    named_arrive(kDqFree + w, 160);
    for (;;) {
        named_sync(kDqReady + w, 160);
        const DqJob job = s.job[w];
        if (!job.to) break;
        if (leader) {
            if (DETERMINISTIC) {
                // Past job.order once this tile itself has been there, for another slice: that sum is done, see below.
                while (turn_read(job.turn) < job.order) __nanosleep(20);
            }
            bulk_add(job.to, s.dq[w], kBulkBytes);
            bulk_wait_read();
        }
        __syncwarp();
        named_arrive(kDqFree + w, 160);
        if (DETERMINISTIC && leader) {
            bulk_wait();  // the sum is in memory
            turn_pass(job.turn);
        }
    }
    if (leader) bulk_wait();
}

// ---- consumers
// ----------------------------------------------------------------------------------------------------------------------
// p = exp2(score - lse), both in log2 units, from accumulator `begin` on. The copies keep their place among products.
template <int Count>
__device__ __forceinline__ void probabilities(const BackwardArgs& a, const float2 (&lse)[kScores / 4], int begin,
                                              float (&p)[kScores]) {
    const float inner = 2 * kLog2e * a.scale / a.softcap, outer = a.softcap * kLog2e;
#pragma unroll
    for (int i = begin; i < begin + Count; ++i) {
        const float minus = i % 2 ? lse[i / 4].y : lse[i / 4].x;
        if (SOFTCAP)
            p[i] =
                exp2_fast(outer - __fdividef(2 * outer, exp2_fast(p[i] * inner) + 1) - minus);  // cap * tanh(x / cap)
        else
            p[i] = exp2_fast(p[i] * a.scale_log2 - minus);
        if (Count < kScores) asm volatile("" : "+f"(p[i]));
    }
}

__device__ __forceinline__ void mask_probabilities(const Visit& visit, int key, int column, float (&p)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int j = key + 8 * h;  // within the tile
        const int begin = max(visit.first, j - visit.hi), end = min(visit.last, j - visit.lo + 1);
        const u32 length = j >= visit.key0 && j < visit.key1 ? max(end - begin, 0) : 0;
#pragma unroll
        for (int y = 0; y < kRows / 8; ++y)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (static_cast<u32>(8 * y + column + e - begin) >= length) p[4 * y + 2 * h + e] = 0;
    }
}

// ds = p (dp - delta), into dp. Under a softcap also times 1 - tanh^2, with tanh read back from p.
__device__ __forceinline__ void score_gradients(const BackwardArgs& a, const float* delta, const float* lse, int column,
                                                const float (&p)[kScores], float (&dp)[kScores]) {
    const float per_cap = 1 / (a.softcap * kLog2e);
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
        const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j + column);
        const float2 l = SOFTCAP ? *reinterpret_cast<const float2*>(lse + 8 * j + column) : float2{};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float x = p[4 * j + e];
            float ds = x * (dp[4 * j + e] - (e % 2 ? d.y : d.x));
            if (SOFTCAP) {
                const float tanh = (__log2f(x) + (e % 2 ? l.y : l.x)) * per_cap;
                ds = x > 0 ? ds * (1 - tanh * tanh) : 0.f;
            }
            dp[4 * j + e] = ds;
        }
    }
}

// Rows of dk or dv: this thread's keys key and key + 8 of the tile.
__device__ __forceinline__ void write_keys(const BackwardArgs& a, const Item& item, int key, float scale, void* to,
                                           long long row_stride, long long head_stride, int dim, float (&d)[kOuts]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const bool valid = key + 8 * e < item.num_keys;
        const long long at = (item.key0 + key + 8 * e) * row_stride + item.kv_head * head_stride;
        if (a.grad_is_float) {
            float* out = static_cast<float*>(to) + at + lane % 4 * 2;
#pragma unroll
            for (int i = 2 * e; i < kOuts; i += 4)
                if (valid && i / 4 * 8 < dim)
                    *reinterpret_cast<float2*>(out + i / 4 * 8) = make_float2(d[i] * scale, d[i + 1] * scale);
        } else {
            u16* out = static_cast<u16*>(to) + at;
#pragma unroll
            for (int b = 0; b < kOuts; b += 16) {  // four blocks of eight columns: 16 bytes a lane
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    x[i] = pack<T>(d[b + 4 * i + 2 * e] * scale, d[b + 4 * i + 2 * e + 1] * scale);
                transpose_quad(x, lane);
                const int c = b * 2 + lane % 4 * 8;
                if (valid && c < dim) *reinterpret_cast<uint4*>(out + c) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
}

__device__ void differentiate(const BackwardArgs& a, Smem& s, int w) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int key = 64 * w + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;  // the accumulators' layout: wgmma.cuh
    float dk[kOuts], dv[kOuts], p[kScores], dp[kScores];
    float dq[kDqRows / 2];
    u32 a_dv[kRows / 16][4], a_dk[kRows / 16][4];
    u32 keys = smem_addr(s.k[0]) + 8192 * w;
    u32 key_columns = smem_addr(s.k[w * (kHalves - 1)]);
    // stmatrix: lane l names row l % 8 of matrix l / 8; matrix m holds keys + 8 (m & 1), rows + 8 (m >> 1).
    const int ds_key = 64 * w + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
    const int ds_at = ds_key * 32 + ((lane / 16 ^ (ds_key >> 2 & 1)) << 4);
    u32 visit = 0, kv_parity = 0;

    auto release = [&](u64& bar) {
        __syncwarp();                        // all lanes have read
        if (lane == 0) barrier_arrive(bar);  // every warp by itself
    };
    for (;;) {
        barrier_wait(s.kv_full, kv_parity);
        kv_parity ^= 1;
        const int num_visits = uniform(s.item.num_visits);
        if (num_visits < 0) break;
#pragma unroll
        for (int i = 0; i < kOuts; ++i) dk[i] = dv[i] = 0;
        pin(dk);
        pin(dv);
        for (int n = 0; n < num_visits; ++n, ++visit) {
            const int stage = visit % kStages, planned = visit % kPlanned;
            const u32 parity = visit / kStages & 1;
            asm volatile(""
                         : "+r"(keys), "+r"(key_columns));  // their operands are built afresh: there are no registers
            const u32 q = smem_addr(s.q[stage][0]), dout = smem_addr(s.dout[stage][0]), ds = smem_addr(s.ds[stage]);
            {
                const Operand k(keys, 16, 1024), rows(q, 16, 1024);
                barrier_wait(s.q_full[stage], parity);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < HEAD_DIM / 16; ++x)
                    wgmma_ss<T, kRows, 0, 0>(p, k.at(x / 4 * sizeof(s.k[0]) + 32 * (x % 4)),
                                             rows.at(x / 4 * sizeof(s.q[0][0]) + 32 * (x % 4)), x);
                wgmma_commit();
            }
            float2 lse[kScores / 4];
            auto read_lse = [&](int begin, int end) {
#pragma unroll
                for (int j = begin; j < end; ++j)
                    lse[j] = *reinterpret_cast<const float2*>(s.lse[stage] + 8 * j + column);
            };
            read_lse(0, kLseAhead);
            const bool masked = s.visit[planned].masked;
            {
                const Operand v(keys + sizeof(s.k), 16, 1024), rows(dout, 16, 1024);
                auto multiply = [&](int x) {
                    wgmma_ss<T, kRows, 0, 0>(dp, v.at(x / 4 * sizeof(s.k[0]) + 32 * (x % 4)),
                                             rows.at(x / 4 * sizeof(s.q[0][0]) + 32 * (x % 4)), x);
                };
                barrier_wait(s.dout_full[stage], parity);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kAhead; ++x) multiply(x);
                wgmma_commit();
                wgmma_wait<1>();
                pin(p);
                if constexpr (kAhead == kSteps) {
                    probabilities<kScores>(a, lse, 0, p);
                } else {
#pragma unroll
                    for (int x = 0; x < kSteps; ++x) {
                        constexpr int kBlock = kScores / kSteps;
                        if (kLseAhead < kScores / 4 && x + 1 < kSteps)
                            read_lse((x + 1) * kBlock / 4, (x + 2) * kBlock / 4);
                        probabilities<kBlock>(a, lse, kBlock * x, p);
                        if (x + kAhead >= kSteps) continue;
                        wgmma_fence();
                        multiply(x + kAhead);
                        if (x + kAhead == kSteps - 1) wgmma_commit();
                    }
                }
            }
            if (masked) mask_probabilities(s.visit[planned], key, column, p);
            wgmma_wait<0>();
            pin(dp);
            score_gradients(a, s.delta[stage], s.lse[stage], column, p, dp);
#pragma unroll
            for (int x = 0; x < kRows / 16; ++x) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    a_dv[x][e] = pack<T>(p[8 * x + 2 * e], p[8 * x + 2 * e + 1]);
                    a_dk[x][e] = pack<T>(dp[8 * x + 2 * e], dp[8 * x + 2 * e + 1]);
                }
                store_matrices(ds + ds_at + x * kDsBlock, a_dk[x]);
            }
            {
                const Operand rows(dout, sizeof(s.dout[0][0]), 1024);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kRows / 16; ++x) wgmma_rs<T, HEAD_DIM, 1>(dv, a_dv[x], rows.at(2048 * x), 1);
                wgmma_commit();
            }
            fence_async_shared();
            named_sync(kDsReady, 256);
            {
                const Operand k(key_columns, 16, 1024);
                const Operand rows(kHalves == 2 ? ds : ds + w * (kDqRows / 16 * kDsBlock), kDsBlock, 256, kSwizzle32);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kKeys / 16; ++x)
                    wgmma_ss<T, kDqRows, 1, 1>(dq, k.at(2048 * x), rows.at(512 * x), x);
                wgmma_commit();
            }
            wgmma_wait<1>();
            pin(dv);
            release(s.dout_free[stage]);
            {
                const Operand rows(q, sizeof(s.q[0][0]), 1024);
                wgmma_fence();
#pragma unroll
                for (int x = 0; x < kRows / 16; ++x) wgmma_rs<T, HEAD_DIM, 1>(dk, a_dk[x], rows.at(2048 * x), 1);
                wgmma_commit();
            }
            wgmma_wait<1>();
            pin(dq);

            named_sync(kDqFree + w, 160);  // the storer has read the tile before
            const int odd = lane % 4 / 2;  // of the eight rows, the second four
            const u32 to =
                smem_addr(s.dq[w]) + odd * 1024 + ((thread / 32 * 256 + lane / 4 * 32 + lane % 2 * 16) ^ (odd * 64));
#pragma unroll
            for (int j = 0; j < kDqRows / 8; ++j)
                store_shared(to + j * 2048, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
            if (thread == 0) {
                const int row0 = s.visit[planned].row0, head = s.visit[planned].head;
                const long long block = kHalves == 2 ? head * 2 + w : head;
                s.job[w] = {a.dq + (block * a.rows_pad + row0 + (kHalves == 2 ? 0 : w * kDqRows)) * 64,
                            a.turn + (head * 2 + w) * a.num_blocks + row0 / kRows, s.visit[planned].order};
            }
            fence_async_shared();
            named_arrive(kDqReady + w, 160);
            wgmma_wait<0>();
            pin(dk);
            release(s.q_free[stage]);
        }
        const Item item = s.item;
        release(s.kv_free);
        write_keys(a, item, key, a.scale, a.dk, a.dk_row_stride, a.dk_head_stride, a.head_dim, dk);
        write_keys(a, item, key, 1.f, a.dv, a.dv_row_stride, a.dv_head_stride, a.v_dim, dv);
    }
    named_sync(kDqFree + w, 160);
    if (thread == 0) s.job[w].to = nullptr;
    named_arrive(kDqReady + w, 160);
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
        for (int i = 0; i < kStages; ++i) {
            barrier_init(s.q_full[i], 1);
            barrier_init(s.dout_full[i], 1);
            barrier_init(s.q_free[i], 4 * kConsumers);
            barrier_init(s.dout_free[i], 4 * kConsumers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<kProducerRegisters>();
        if (threadIdx.x == 0)
            load_visits(a, s);
        else if (threadIdx.x >= 32 && threadIdx.x < 32 * (1 + kConsumers))
            store_dq(s, threadIdx.x / 32 - 1);
        else if (threadIdx.x == 96)
            plan_visits(a, s);
    } else {
        registers_grow<kConsumerRegisters>();
        differentiate(a, s, uniform(threadIdx.x / 128) - 1);
    }
}

}  // namespace magi
