// Attention forward over band slices. A persistent block takes a tile of q rows of one head, walks the keys of every
// slice that touches it with one online softmax, and writes out and lse once: no atomics on results, no zero-fill, the
// same bits every time.
//
// One warp plans steps a little ahead, and three threads stream the keys, the values and the queries of what is planned
// by TMA, so that no load waits for the room of another; each consumer warpgroup owns 64 rows. Consumers take turns at
// the tensor cores (FlashAttention-3's ping-pong, arXiv 2407.08608), and each overlaps the softmax of one step with its
// products of the step before. Per consumer a step is empty (skipped), full (no mask) or partial (two comparisons an
// element).
//
// One of kForwardShapes (args.cuh) is compiled in. They differ in how they fit into the registers:
//  - what a thread can read again lives in shared memory where it needs the registers (kRoomy says that it does not);
//  - weights may overwrite the scores, to be packed after the product that reads the step before (kPackEarly says that
//    they do not). Where they turn out too large there is nothing left to weigh again: the warp multiplies once more.
//
// Macros: HEAD_DIM, V_DIM and ROWS of the shape (smaller heads arrive zero-padded by TMA), ELEMENT bf16 or f16,
// TRANSFORM 0 or 1 (scores are scaled and capped one by one, for softcap, for scales that are not positive, and where
// the largest score of each head is asked for).
#include "ptx.cuh"
#include "wgmma.cuh"

namespace magi {

using T = ELEMENT;
constexpr ForwardShape kShape = forward_shape(HEAD_DIM, V_DIM, ROWS);
static_assert(kShape.head_dim == HEAD_DIM && kShape.v_dim == V_DIM && kShape.rows() == ROWS);
constexpr int kParts = HEAD_DIM / 64, kVParts = V_DIM / 64;  // a TMA box is 64 elements wide
constexpr int kConsumers = kShape.consumers;                 // warpgroups of 64 rows
constexpr int kRows = 64, kTileRows = ROWS, kKeys = kShape.keys, kStages = kShape.stages;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr bool kRoomy = kConsumers == 2 && HEAD_DIM <= 128;
constexpr int kPlanned = 4;  // steps kept written down
constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;
constexpr int kScores = kKeys / 2, kOuts = V_DIM / 2;  // accumulators of a thread
// The softmax of a step runs beside the product of the step before, but for variants short of registers.
constexpr bool kOverlap = !TRANSFORM || (kConsumers == 2 && V_DIM < 256);
// Weights are packed while the product of the step before reads its own, where registers allow: steps then take turns
// with two sets of them. After it otherwise.
constexpr bool kPackEarly = kRoomy;
constexpr int kTurnBarrier = 1;  // named barriers kTurnBarrier + consumer

struct Work {                         // a tile of one head, or one consumer's share of it
    int row0, row1, head, num_steps;  // num_steps < 0: no more work
    int spare;  // with four words ptxas orders a plain step worse: 1 to 3 % of dense masks up to 16k
};
struct alignas(16) Step {  // one k tile; keys from key0 on
    int key0, kv_head;     // kv_head < 0: no more steps
    int end, lo, hi;
    int row0, row1;
    int met[kConsumers];  // each consumer's TileClass, and from bit 2 on how many steps after this one are full for it
};

struct Smem {
    u16 q[kConsumers][kParts][kRows * 64];
    u16 k[kStages][kParts][kKeys * 64], v[kStages][kVParts][kKeys * 64];
    Step step[kStages], planned_step[kPlanned];
    Work planned_tile, work[kConsumers];
    Work mine[kConsumers][4];  // a warp's copy until its rows are written, unless roomy
    u64 step_planned[kPlanned], step_taken[kPlanned], tile_planned, tile_taken;
    u64 q_full[kConsumers], q_free[kConsumers], k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
};

static_assert(sizeof(Smem) + 1024 <= kShape.smem() && kShape.smem() <= 227 * 1024);

}  // namespace magi

#include "ffa_fwd.cuh"

namespace magi {

// ---- planner: a warp, of which a lane looks at each step for each consumer ----
__device__ int4 tile_of(const ForwardArgs& a, int num_tiles, int work, int& head) {
    const int section = min(work / (num_tiles * a.section_heads), a.last_section);
    const int first_head = section * a.section_heads, at = work - first_head * num_tiles;
    const int heads = section < a.last_section ? a.section_heads : a.num_heads - first_head;
    head = first_head + at % heads;
    return __ldg(reinterpret_cast<const int4*>(a.table.tiles) + at / heads);
}

// Which of the slice's steps, from column col0 on, are full for rows [row0, row1): the first, and past the last.
__device__ Range full_steps(const Slice& c, int row0, int row1, int col0) {
    const int first = max(0, row1 - 1 + c.lo - col0), last = min(c.k1, row0 + c.hi + 1) - col0;
    return {ceil_div(first, kKeys), c.q0 <= row0 && row1 <= c.q1 && last > 0 ? last / kKeys : 0};
}

__device__ void plan_tiles(const ForwardArgs& a, Smem& s) {
    const int lane = threadIdx.x, w = min(lane, kConsumers - 1);
    Ring<kPlanned> ring;
    auto plan_tile = [&](const Work& tile) {
        if (lane > 0) return;
        s.planned_tile = tile;
        barrier_arrive(s.tile_planned);
    };
    auto plan_step = [&](const Slice& c, int key0, int kv_head, int met) {
        barrier_wait(s.step_taken[ring.stage], ring.parity ^ 1);
        Step& step = s.planned_step[ring.stage];
        step.met[w] = met;
        if (lane == 0) {
            step.key0 = key0, step.kv_head = kv_head, step.end = c.k1, step.lo = c.lo, step.hi = c.hi;
            step.row0 = c.q0, step.row1 = c.q1;
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(s.step_planned[ring.stage]);
        ring.advance();
    };
    wait_for_earlier_kernels();  // the one that builds the table
    const int num_tiles = a.table.cut ? __ldcg(&a.table.header->num_tiles) : a.table.num_tiles;
    u32 parity = 0;
    for (int work = blockIdx.x; work < num_tiles * a.num_heads; parity ^= 1) {
        int head;
        const int4 tile = tile_of(a, num_tiles, work, head);
        const int row0 = tile.x, num_slices = tile.z;
        const int first = a.table.cut ? tile.y & ((1 << kRowsShift) - 1) : tile.y;
        const int rows = a.table.cut ? (static_cast<u32>(tile.y) >> kRowsShift) + 1 : kTileRows;
        const int row1 = min(row0 + rows, a.num_q);
        plan_tile({row0, row1, head, tile.w});
        // From the last key down: under a causal mask the step that needs a mask is then the one that needs a first
        // maximum, too.
        for (int i = num_slices - 1; i >= 0; --i) {
            Slice c;
            if (first >= 0) {
                const int4* entry = reinterpret_cast<const int4*>(a.table.pool + first + i);
                const int4 x = __ldg(entry), y = __ldg(entry + 1);
                c = {x.x, x.y, x.z, x.w, y.x, y.y};
            } else {
                c = table_slice(a.slices[i], a.num_q, a.num_k, false);
            }
            const Range keys = tile_columns(c, row0, row1);
            const int row = row0 + kRows * w, row_end = min(row + kRows, row1);
            const Range full = full_steps(c, row, row_end, keys.begin);
            for (int at = num_steps(keys, kKeys) - 1; at >= 0; --at) {
                const int key0 = keys.begin + at * kKeys;
                int met = kTileFull;
                if (at < full.begin || at >= full.end) met = block_class(c, row, row_end, key0, kKeys);
                const int run = at > full.end ? 0 : max(0, at - full.begin);
                plan_step(c, key0, head / a.heads_per_kv, met | run << 2);
            }
        }
        // Late, so that a block that runs behind leaves the next tile to another.
        barrier_wait(s.tile_taken, parity);
        work = gridDim.x + uniform(lane == 0 ? atomicAdd(&a.table.header->next_work, 1) : 0);
    }
    plan_tile({0, 0, 0, -1});
    plan_step({}, 0, -1, 0);
}

// ---- loaders: a thread each ----
__device__ void load_keys(const ForwardArgs& a, Smem& s) {
    Ring<kPlanned> next;
    for (Ring<kStages> ring;; ring.advance(), next.advance()) {
        barrier_wait(s.step_planned[next.stage], next.parity);
        const Step step = s.planned_step[next.stage];
        barrier_arrive(s.step_taken[next.stage]);
        if (step.kv_head < 0) break;
        barrier_wait(s.k_free[ring.stage], ring.parity ^ 1);
        s.step[ring.stage] = step;
        barrier_arrive_expect(s.k_full[ring.stage], sizeof(s.k[0]));
#pragma unroll
        for (int h = 0; h < kParts; ++h)
            tma_load(s.k[ring.stage][h], a.k, s.k_full[ring.stage], 64 * h, step.kv_head, step.key0);
    }
}
__device__ void load_values(const ForwardArgs& a, Smem& s) {
    Ring<kPlanned> next;
    for (Ring<kStages> ring;; ring.advance(), next.advance()) {
        barrier_wait(s.step_planned[next.stage], next.parity);
        const int key0 = s.planned_step[next.stage].key0, kv_head = s.planned_step[next.stage].kv_head;
        barrier_arrive(s.step_taken[next.stage]);
        if (kv_head < 0) break;
        barrier_wait(s.v_free[ring.stage], ring.parity ^ 1);
        barrier_arrive_expect(s.v_full[ring.stage], sizeof(s.v[0]));
#pragma unroll
        for (int h = 0; h < kVParts; ++h)
            tma_load(s.v[ring.stage][h], a.v, s.v_full[ring.stage], 64 * h, kv_head, key0);
    }
}
__device__ void load_queries(const ForwardArgs& a, Smem& s) {
    for (u32 round = 0;; ++round) {
        barrier_wait(s.tile_planned, round & 1);
        const Work tile = s.planned_tile;
#pragma unroll 1
        for (int w = 0; w < kConsumers; ++w) {
            const int row0 = tile.row0 + kRows * w;
            barrier_wait(s.q_free[w], (round & 1) ^ 1);
            s.work[w] = {row0, tile.row1, tile.head, tile.num_steps};
            barrier_arrive_expect(s.q_full[w], tile.num_steps > 0 ? sizeof(s.q[0]) : 0);
#pragma unroll
            for (int h = 0; h < kParts && tile.num_steps > 0; ++h)
                tma_load(s.q[w][h], a.q, s.q_full[w], 64 * h, tile.head, row0);
        }
        if (tile.num_steps < 0) break;
        barrier_arrive(s.tile_taken);
    }
}

// ---- consumers ----
// p = exp2(score - most), packed as the next product's operand or else in the place of the scores, and their sums by
// row. Rows that saw no key yet have most = -inf; 0 is subtracted there.
__device__ __forceinline__ void weigh_scores(float scale, float (&d)[kScores], const Rows& rows,
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
        if constexpr (kPackEarly)
            p[i / 8][i / 2 % 4] = pack<T>(even, odd);
        else
            d[i] = even, d[i + 1] = odd;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) sum[e] += odd_sum[e];
}

// The scores of this warp's rows once more, by itself: ordinary products, with the accumulators of the warpgroup's.
__device__ __forceinline__ void score_again(u32 q, u32 k, float (&d)[kScores]) {
    // Addresses of the lane's row of two matrices; with the swizzle the next 8 elements are 16 bytes off by exclusive
    // or.
    const u32 i = thread_index();
    q += (i % 128 / 32 * 16 + i % 16) * 128 + i % 8 * 16;
    k += i % 16 * 128 + i % 8 * 16;
#pragma unroll
    for (int j = 0; j < kScores; ++j) d[j] = 0;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
#pragma unroll 1
        for (u32 at = 0; at < 128; at += 16) {
            u32 x[2], y[2];
            load_matrices(q ^ at, x);
#pragma unroll
            for (int j = 0; j < kScores; j += 8) {
                load_matrices((k ^ at) + 256 * j, y);
                warp_product<T>(d[j], d[j + 1], d[j + 2], d[j + 3], x, y[0]);
                warp_product<T>(d[j + 4], d[j + 5], d[j + 6], d[j + 7], x, y[1]);
            }
        }
        q += kRows * 128;
        k += kKeys * 128;
    }
}

__device__ void attend_tiles(const ForwardArgs& a, Smem& s, int w) {
    const int lane = threadIdx.x % 32;
    // The accumulators' layout: wgmma.cuh.
    auto row_of = [](u32 i) { return static_cast<int>(i % 128 / 32 * 16 + i % 32 / 4); };
    const int own_row = row_of(threadIdx.x), own_column = threadIdx.x % 4 * 2;
    auto row = [&] { return kRoomy ? own_row : row_of(thread_index()); };
    auto column = [&] { return kRoomy ? own_column : static_cast<int>(thread_index() % 4 * 2); };
    const float scale = TRANSFORM ? 1.f : a.scale_log2;
    const float slack = TRANSFORM ? kForwardSlack : a.slack;
    const u32 q_addr = smem_addr(s.q[w][0]);
    const bool look_always = TRANSFORM && a.max_logits;
    float d[kScores], o[kOuts];
    u32 p[kKeys / 16][4], next_p[kKeys / 16][4];
    float sum[2];
    Rows rows;
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
    auto issue_outs = [&](int stage, const u32(&p)[kKeys / 16][4]) {
        const Operand v(smem_addr(s.v[0][0]) + stage * sizeof(s.v[0]), sizeof(s.v[0][0]), 1024);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) wgmma_rs<T, V_DIM, 1>(o, p[i], v.at(2048 * i), 1);
        wgmma_commit();
    };
    auto met_at = [&](int stage) { return uniform(s.step[stage].met[w]); };
    Ring<kStages> ring;
    if (w == kConsumers - 1) pass_turn();  // consumer 0 goes first
    Work own_work;
    Work& work = kRoomy ? own_work : s.mine[w][threadIdx.x % 128 / 32];
    auto all_see_work = [] {
        if constexpr (!kRoomy) __syncwarp();
    };
    for (u32 round = 0;; ++round) {
        all_see_work();
        barrier_wait(s.q_full[w], round & 1);
        all_see_work();
        if (kRoomy || lane == 0) work = s.work[w];
        all_see_work();
        const int steps = uniform(work.num_steps);
        if (steps < 0) break;
        int left = steps;
        bool fresh = true;  // rows of this warp may have seen no key
        rows = {{-infinity(), -infinity()}, {0, 0}, {0, 0}, {0, 0}};
        float largest = -infinity();
#pragma unroll
        for (int i = 0; i < kOuts; ++i) o[i] = 0;
        auto end_scores = [&] {  // queries go with the last ones, so that the next arrive beside what is left to do
            release(s.k_free[ring.stage]);
            if (--left == 0 && kRoomy) release(s.q_free[w]);
        };
        if (steps == 0 && kRoomy) release(s.q_free[w]);
        // Weights of the scores in d. Looking for the maximum would cost a third of the time, so a full step takes the
        // one in use (lazy rescaling, as FlashAttention-4 does it, without looking): weights far above 1 are as exact
        // as others, and their sum tells when they are too large. Then, and where rows may have had no key yet, the
        // maximum moves first. Returns whether the outputs have to be rescaled.
        auto weigh = [&](Mode mode, u32(&to)[kKeys / 16][4]) {
            if (TRANSFORM) transform_scores(a, d);
            bool grew = false;
            if (mode != kPlain) {
                if (mode == kMasked) mask_scores(s.step[ring.stage], work.row0 + row(), column(), d);
                __syncwarp();  // all lanes have read the step
                grew = move_maximum(scale, slack, d, rows);
                fresh = look_always || __any_sync(~0u, rows.most[0] == -infinity() || rows.most[1] == -infinity());
#pragma unroll
                for (int e = 0; e < 2 && look_always; ++e)
                    if (work.row0 + row() + 8 * e < work.row1) largest = fmaxf(largest, rows.found[e]);
            }
            if (kPackEarly) end_scores();  // before the weights: nobody reads these keys again
            for (;;) {
                weigh_scores(scale, d, rows, to, sum);
                if (mode != kPlain || __all_sync(~0u, sum[0] <= kLimit && sum[1] <= kLimit)) break;
                if constexpr (!kPackEarly) {
                    score_again(q_addr, smem_addr(s.k[0][0]) + ring.stage * sizeof(s.k[0]), d);
                    if (TRANSFORM) transform_scores(a, d);
                }
                grew = move_maximum(scale, slack, d, rows);
                mode = kCareful;
            }
            if (!kPackEarly) end_scores();
            return grew;
        };
        // What is to be done with a step that meets this consumer so; rows without a maximum need one first.
        auto mode_of = [&](int met) { return (met & 3) == kTilePartial ? kMasked : fresh ? kCareful : kPlain; };
        auto accept = [&](bool grew, bool first) {  // after the product that reads p
            if (grew && !first) {                   // or else the outputs are zero
#pragma unroll
                for (int i = 0; i < kOuts; ++i) o[i] *= rows.rescale[i / 2 % 2];
            }
            rows.sum[0] += sum[0];
            rows.sum[1] += sum[1];
            if (kPackEarly) return;
            pin(d);  // not before the product has read p
#pragma unroll
            for (int i = 0; i < kScores; i += 2) p[i / 8][i / 2 % 4] = pack<T>(d[i], d[i + 1]);
        };
        while (left > 0) {
            barrier_wait(s.k_full[ring.stage], ring.parity);
            int met = met_at(ring.stage);
            if ((met & 3) == kTileEmpty) {
                take_turn();
                pass_turn();
                end_scores();
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
            const bool first = kRoomy && left == steps;
            accept(weigh(mode_of(met), p), first);
            int full_left = fresh ? 0 : met >> 2;  // steps that need no look
            Ring<kStages> v_ring = ring;
            ring.advance();
            // The next step: its scores beside the outputs of the step before, whose weights are in `from`. False where
            // the run ends.
            auto step = [&](const u32(&from)[kKeys / 16][4], u32(&to)[kKeys / 16][4]) {
                if (left <= 0) return false;
                barrier_wait(s.k_full[ring.stage], ring.parity);
                Mode mode = kPlain;
                if (--full_left < 0) {
                    met = met_at(ring.stage);
                    if ((met & 3) == kTileEmpty) return false;
                    mode = mode_of(met);
                    full_left = fresh ? 0 : met >> 2;
                }
                take_turn();
                issue_scores(ring.stage);
                barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
                issue_outs(v_ring.stage, from);
                pass_turn();
                wgmma_wait<1>();
                pin(d);
                const bool grew = weigh(mode, to);
                wgmma_wait<0>();
                pin(o);
                release(s.v_free[v_ring.stage]);
                accept(grew, false);
                v_ring = ring;
                ring.advance();
                return true;
            };
            if constexpr (kOverlap && kPackEarly) {
                while (step(p, next_p)) {
                    if (step(next_p, p)) continue;
#pragma unroll
                    for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
                        for (int e = 0; e < 4; ++e) p[i][e] = times_one<T>(next_p[i][e], a.ones);
                    break;
                }
            } else if constexpr (kOverlap) {
                while (step(p, p)) continue;
            }
            barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
            issue_outs(v_ring.stage, p);
            wgmma_wait<0>();
            pin(o);
            release(s.v_free[v_ring.stage]);
        }
        if (!kRoomy) release(s.q_free[w]);
        write_rows(a, work, work.row0 + row(), column(), scale, rows, o);
        if (look_always) {
#pragma unroll
            for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
            if (lane == 0) atomic_max(a.max_logits + work.head, largest * kLn2);
        }
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
        for (int i = 0; i < kPlanned; ++i) {
            barrier_init(s.step_planned[i], 1);
            barrier_init(s.step_taken[i], 2);
        }
        barrier_init(s.tile_planned, 1);
        barrier_init(s.tile_taken, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<kProducerRegisters>();
        const int role = uniform(threadIdx.x / 32);
        const bool leader = threadIdx.x % 32 == 0;
        if (role == 0) {
            plan_tiles(a, s);
        } else if (role == 1) {
            if (leader) load_keys(a, s);
        } else if (role == 2) {
            if (leader) load_values(a, s);
        } else if (leader) {
            load_queries(a, s);
        }
    } else {
        registers_grow<kConsumerRegisters>();
        attend_tiles(a, s, uniform(threadIdx.x / 128) - 1);
    }
}

}  // namespace magi
