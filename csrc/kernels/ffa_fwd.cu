// Attention forward over band slices. A persistent block takes a tile of q rows of one head, walks the keys of every
// slice that touches it with one online softmax, and writes out and lse once: no atomics on results, no zero-fill, the
// same bits every time.
//
// One producer thread streams K and V through a ring by TMA; each consumer warpgroup owns 64 rows. Consumers take turns
// at the tensor cores (FlashAttention-3's ping-pong, arXiv 2407.08608), and each overlaps the softmax of one step with
// its products of the step before. Per consumer a step is empty (skipped), full (no mask) or partial (two comparisons
// an element).
//
// Macros: HEAD_DIM 64 or 128 (smaller heads arrive zero-padded by TMA), ELEMENT bf16 or f16, TRANSFORM 0 or 1 (scores
// are scaled and capped one by one, for softcap and for scales that are not positive).
#include "ptx.cuh"
#include "wgmma.cuh"

namespace magi {

using T = ELEMENT;
constexpr int kHalves = HEAD_DIM / 64;  // a TMA box is 64 elements wide
constexpr int kConsumers = 2;           // warpgroups of 64 rows
constexpr int kRows = 64, kTileRows = kForwardRows, kKeys = kForwardKeys, kStages = kForwardStages;
static_assert(kTileRows == kRows * kConsumers);
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
constexpr int kScores = kKeys / 2, kOuts = HEAD_DIM / 2;  // accumulators of a thread
constexpr int kTurnBarrier = 1;                           // named barriers kTurnBarrier + consumer

struct Work {                         // one consumer's share of a tile
    int row0, row1, head, num_steps;  // num_steps < 0: no more work
};
struct Step {  // one k tile; keys from key0 on
    int key0, end, lo, hi;
    int row0, row1;
    int met[kConsumers];  // each consumer's TileClass, and from bit 2 on how many steps after this one are full for it
};

struct Smem {
    u16 q[kConsumers][kHalves][kRows * 64];
    u16 k[kStages][kHalves][kKeys * 64], v[kStages][kHalves][kKeys * 64];
    Step step[kStages];
    Work work[kConsumers];
    u64 q_full[kConsumers], q_free[kConsumers], k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
};

static_assert(sizeof(Smem) + 1024 <= forward_smem(HEAD_DIM));

}  // namespace magi

#include "ffa_fwd.cuh"

namespace magi {

// ---- producer ----
struct Item {  // a tile of one head
    int head, row0, row1, first, num_slices, num_steps;
};
__device__ Item item_of(const ForwardArgs& a, int num_tiles, int work) {
    const int section = work / (num_tiles * a.section_heads), first_head = section * a.section_heads;
    const int heads = min(a.section_heads, a.num_heads - first_head), at = work - first_head * num_tiles;
    const int4 tile = __ldg(reinterpret_cast<const int4*>(a.table.tiles) + at / heads);
    const int rows = a.table.cut ? (tile.y >> kRowsShift) + 1 : kTileRows;
    const int first = a.table.cut ? tile.y & ((1 << kRowsShift) - 1) : tile.y;
    return {first_head + at % heads, tile.x, min(tile.x + rows, a.num_q), first, tile.z, tile.w};
}

// Steps [begin, end) of a walk from column col0 on that are full for rows [row0, row1).
__device__ Range full_steps(const Slice& c, int row0, int row1, int col0) {
    const int first = max(0, row1 - 1 + c.lo - col0), last = min(c.k1, row0 + c.hi + 1) - col0;
    return {ceil_div(first, kKeys), c.q0 <= row0 && row1 <= c.q1 && last > 0 ? last / kKeys : 0};
}

__device__ void load_tiles(const ForwardArgs& a, Smem& s) {
    wait_for_earlier_kernels();  // the one that builds the table
    const int num_tiles = a.table.cut ? __ldcg(&a.table.header->num_tiles) : a.table.num_tiles;
    const int total = num_tiles * a.num_heads;
    Ring ring;
    int work = blockIdx.x;
    Item item = item_of(a, num_tiles, min(work, total - 1));
    u32 round = 0;
    for (; work < total; ++round) {
        // The next tile is reserved late, so that a block that runs behind leaves it to another, and looked up early
        // enough to arrive before this one ends.
        int next = -1, steps_left = item.num_steps;
        Item next_item;
        auto look_ahead = [&] {
            if (steps_left <= 4 && next < 0)
                next = gridDim.x + atomicAdd(&a.table.header->next_work, 1);
            else if (steps_left <= 2)
                next_item = item_of(a, num_tiles, min(next, total - 1));
        };
        const int kv_head = item.head / a.heads_per_kv;
        auto load_q = [&] {
#pragma unroll
            for (int w = 0; w < kConsumers; ++w) {
                barrier_wait(s.q_free[w], (round & 1) ^ 1);
                s.work[w] = {item.row0 + kRows * w, item.row1, item.head, item.num_steps};
                barrier_arrive_expect(s.q_full[w], item.num_steps ? sizeof(s.q[w]) : 0);
                for (int h = 0; h < kHalves && item.num_steps; ++h)
                    tma_load(s.q[w][h], a.q, s.q_full[w], 64 * h, item.head, item.row0 + kRows * w);
            }
        };
        bool q_loaded = item.num_steps == 0;
        if (q_loaded) load_q();

        for (int i = 0; i < item.num_slices; ++i) {
            Slice c;
            if (item.first >= 0) {
                const int4* entry = reinterpret_cast<const int4*>(a.table.pool + item.first + i);
                const int4 lo = __ldg(entry), hi = __ldg(entry + 1);
                c = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y};
            } else {
                c = table_slice(a.slices[i], a.num_q, a.num_k, false);
            }
            const Range keys = tile_columns(c, item.row0, item.row1);
            Range full[kConsumers];
#pragma unroll
            for (int w = 0; w < kConsumers; ++w)
                full[w] = full_steps(c, item.row0 + kRows * w, min(item.row0 + kRows * (w + 1), item.row1), keys.begin);
            int key0 = keys.begin;
            for (int j = 0; key0 < keys.end; ++j, key0 += kKeys, --steps_left) {
                look_ahead();
                barrier_wait(s.k_free[ring.stage], ring.parity ^ 1);
                Step& step = s.step[ring.stage];
                step.key0 = key0, step.end = c.k1, step.lo = c.lo, step.hi = c.hi, step.row0 = c.q0, step.row1 = c.q1;
#pragma unroll
                for (int w = 0; w < kConsumers; ++w) {
                    const int row0 = item.row0 + kRows * w;
                    const TileClass met = block_class(c, row0, min(row0 + kRows, item.row1), key0, kKeys);
                    const int run = j + 1 >= full[w].begin ? max(0, full[w].end - (j + 1)) : 0;
                    step.met[w] = met | run << 2;
                }
                barrier_arrive_expect(s.k_full[ring.stage], sizeof(s.k[0]));
                for (int h = 0; h < kHalves; ++h)
                    tma_load(s.k[ring.stage][h], a.k, s.k_full[ring.stage], 64 * h, kv_head, key0);
                if (!q_loaded)
                    load_q();  // after the first keys: these need not wait for the previous tile's last product
                q_loaded = true;
                barrier_wait(s.v_free[ring.stage], ring.parity ^ 1);
                barrier_arrive_expect(s.v_full[ring.stage], sizeof(s.v[0]));
                for (int h = 0; h < kHalves; ++h)
                    tma_load(s.v[ring.stage][h], a.v, s.v_full[ring.stage], 64 * h, kv_head, key0);
                ring.advance();
            }
        }
        look_ahead();
        look_ahead();
        work = next, item = next_item;
    }
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
        barrier_wait(s.q_free[w], (round & 1) ^ 1);
        s.work[w].num_steps = -1;
        barrier_arrive(s.q_full[w]);
    }
}

// ---- consumers ----
// p = exp2(score - most), packed as the next product's operand, and its sums by row. Rows that saw no key yet have most
// = -inf; 0 is subtracted there.
__device__ __forceinline__ void weigh_scores(float scale, const float (&d)[kScores], const Rows& rows,
                                             u32 (&p)[kKeys / 16][4], float (&sum)[2]) {
    float base[2], odd_sum[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        base[e] = rows.most[e] == -infinity() ? 0.f : rows.most[e] * scale;
        sum[e] = 0;
    }
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
        const int e = i / 2 % 2;
        const float even = exp2_fast(d[i] * scale - base[e]), odd = exp2_fast(d[i + 1] * scale - base[e]);
        sum[e] += even;
        odd_sum[e] += odd;
        p[i / 8][i / 2 % 4] = pack<T>(even, odd);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) sum[e] += odd_sum[e];
}

__device__ void attend_tiles(const ForwardArgs& a, Smem& s, int w) {
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4,
              column = lane % 4 * 2;  // the accumulators' layout: wgmma.cuh
    const float scale = TRANSFORM ? 1.f : a.scale_log2;
    const float slack = kForwardSlack / scale;
    const u32 q_addr = smem_addr(s.q[w][0]);
    float d[kScores], o[kOuts];
    u32 p[kKeys / 16][4], next_p[kKeys / 16][4];
    float sum[2];
    Rows rows;
    u32 ones;
    asm volatile("mov.b32 %0, %1;" : "=r"(ones) : "r"(a.ones));  // kept in a register

    auto take_turn = [&] { named_sync(kTurnBarrier + w, 256); };
    auto pass_turn = [&] { named_arrive(kTurnBarrier + (w + 1) % kConsumers, 256); };
    auto release = [&](u64& bar) {
        if (lane == 0) barrier_arrive(bar);  // every warp by itself
    };
    auto issue_scores = [&](int stage) {
        const Operand q(q_addr, 16, 1024), k(smem_addr(s.k[0][0]) + stage * sizeof(s.k[0]), 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; ++i)
            wgmma_ss<T, kKeys, 0, 0>(d, q.at(i / 4 * sizeof(s.q[0][0]) + 32 * (i % 4)),
                                     k.at(i / 4 * sizeof(s.k[0][0]) + 32 * (i % 4)), i);
        wgmma_commit();
    };
    auto issue_outs = [&](int stage) {
        const Operand v(smem_addr(s.v[0][0]) + stage * sizeof(s.v[0]), sizeof(s.v[0][0]), 1024);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) wgmma_rs<T, HEAD_DIM, 1>(o, p[i], v.at(2048 * i), 1);
        wgmma_commit();
    };
    auto met_at = [&](int stage) { return uniform(s.step[stage].met[w]); };
    Ring ring;
    if (w == kConsumers - 1) pass_turn();  // consumer 0 goes first
    for (u32 item = 0;; ++item) {
        barrier_wait(s.q_full[w], item & 1);
        const Work work = s.work[w];
        int left = uniform(work.num_steps);
        if (left < 0) break;
        bool fresh = true;  // rows of this warp may have seen no key
        rows = {{-infinity(), -infinity()}, {0, 0}, {0, 0}};
#pragma unroll
        for (int i = 0; i < kOuts; ++i) o[i] = 0;
        // Weights of the scores in d. Looking for the maximum would cost a third of the time, so a full step takes the
        // one in use (lazy rescaling, as FlashAttention-4 does it, without looking): weights far above 1 are as exact
        // as others, and their sum tells when they are too large. Then, and where rows may have had no key yet, the
        // maximum moves first. Returns whether the outputs have to be rescaled.
        auto weigh = [&](Mode mode) {
            if (TRANSFORM) transform_scores(a, d);
            bool grew = false;
            if (mode != kPlain) {
                if (mode == kMasked) mask_scores(s.step[ring.stage], work.row0 + row, column, d);
                __syncwarp();  // all lanes have read the step
                grew = move_maximum(scale, slack, d, rows);
                fresh = __any_sync(~0u, rows.most[0] == -infinity() || rows.most[1] == -infinity());
            }
            release(s.k_free[ring.stage]);
            --left;
            for (;;) {
                weigh_scores(scale, d, rows, next_p, sum);
                if (mode != kPlain || __all_sync(~0u, sum[0] <= kLimit && sum[1] <= kLimit)) return grew;
                grew = move_maximum(scale, slack, d, rows);
                mode = kCareful;
            }
        };
        // What is to be done with a step that meets this consumer so; rows without a maximum need one first.
        auto mode_of = [&](int met) { return (met & 3) == kTilePartial ? kMasked : fresh ? kCareful : kPlain; };
        auto accept = [&](bool grew) {  // after the product that reads p
            if (grew) {
#pragma unroll
                for (int i = 0; i < kOuts; ++i) o[i] *= rows.rescale[i / 2 % 2];
            }
            rows.sum[0] += sum[0];
            rows.sum[1] += sum[1];
#pragma unroll
            for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) p[i][e] = times_one<T>(next_p[i][e], ones);
        };
        while (left > 0) {
            barrier_wait(s.k_full[ring.stage], ring.parity);
            int met = met_at(ring.stage);
            if ((met & 3) == kTileEmpty) {
                take_turn();
                pass_turn();
                release(s.k_free[ring.stage]);
                --left;
                barrier_wait(s.v_full[ring.stage], ring.parity);  // a release belongs to this round of the ring
                release(s.v_free[ring.stage]);
                ring.advance();
                continue;
            }
            take_turn();
            issue_scores(ring.stage);
            pass_turn();
            wgmma_wait<0>();
            pin(d);
            accept(weigh(mode_of(met)));
            int full_left = fresh ? 0 : met >> 2;  // steps that need no look
            Ring v_ring = ring;
            ring.advance();
            while (left > 0) {
                barrier_wait(s.k_full[ring.stage], ring.parity);
                Mode mode = kPlain;
                if (--full_left < 0) {
                    met = met_at(ring.stage);
                    if ((met & 3) == kTileEmpty) break;
                    mode = mode_of(met);
                    full_left = fresh ? 0 : met >> 2;
                }
                take_turn();
                issue_scores(ring.stage);
                barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
                issue_outs(v_ring.stage);
                pass_turn();
                wgmma_wait<1>();
                pin(d);
                const bool grew = weigh(mode);
                wgmma_wait<0>();
                pin(o);
                release(s.v_free[v_ring.stage]);
                accept(grew);
                v_ring = ring;
                ring.advance();
            }
            barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
            issue_outs(v_ring.stage);
            wgmma_wait<0>();
            pin(o);
            release(s.v_free[v_ring.stage]);
        }
        release(s.q_free[w]);
        write_rows(a, work, work.row0 + row, column, scale, rows, o);
    }
    if (w == 0) take_turn();  // the last turn passed
}

extern "C" __global__ __launch_bounds__(kThreads, 1) void ffa_fwd(const __grid_constant__ ForwardArgs a) {
    extern __shared__ __align__(1024) char raw[];  // as the swizzle needs it
    Smem& s = *reinterpret_cast<Smem*>(raw);
    if (threadIdx.x == 0) {
        for (int w = 0; w < kConsumers; ++w) {
            barrier_init(s.q_full[w], 1);
            barrier_init(s.q_free[w], 4);
        }
        for (int i = 0; i < kStages; ++i) {
            barrier_init(s.k_full[i], 1);
            barrier_init(s.v_full[i], 1);
            barrier_init(s.k_free[i], 4 * kConsumers);
            barrier_init(s.v_free[i], 4 * kConsumers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<kProducerRegisters>();
        if (threadIdx.x == 0) load_tiles(a, s);
    } else {
        registers_grow<kConsumerRegisters>();
        attend_tiles(a, s, uniform(threadIdx.x / 128) - 1);
    }
}

}  // namespace magi
