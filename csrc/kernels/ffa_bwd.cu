// Attention backward over band slices. A persistent block owns 128 keys of one kv head, walks the q rows of every slice
// that touches them for every query head of the group, and writes dk and dv once (zeros where nobody attends): no
// atomics on them, no second pass over heads. dq is summed in fp32 by bulk reduces into a workspace; between two tiles
// the consumers finish a share of what earlier tiles added up (ffa_bwd.cuh), while dk and dv leave by TMA from where
// their keys and values were, and the next ones arrive there.
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
// The same holds for sums. Item n finishes rows of head (n - lag) / tiles at the latest, all of whose tiles were handed
// out before item n, as lag is at least a section; the head that had its tile's slot before is finished by items before
// n, as the ring is that much longer (ffa_bwd.cpp). Planners wait for that, not consumers or storers: all visits of the
// block's tile before are planned then, so that it ends, and its storers count it without waiting for the next item.
// Where visits are ordered, too, both waits are for work handed out earlier, so the same argument holds for them.
//
// And for parts of a tile: the block with a later part waits for those before it, which are handed out earlier, each
// the first thing in its share, and so are computed without waiting for a later one.
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
constexpr bool kTall = kRows != backward_rows(HEAD_DIM, false);
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = HEAD_DIM == 128 ? 24 : kRows == 128 ? 40 : 72;
constexpr int kConsumerRegisters = HEAD_DIM == 128 ? 240 : kRows == 128 ? 232 : 216;
constexpr int kSteps = HEAD_DIM / 16;                                     // of the products over head_dim
constexpr int kAhead = HEAD_DIM == 128 ? kSteps : 1;                      // of dP's, queued before the exponentials
constexpr int kLseAhead = kRows == 128 ? kRows / 8 / kSteps : kRows / 8;  // pairs of lse read early
constexpr int kScores = kRows / 2, kOuts = HEAD_DIM / 2;                  // accumulators of a thread
constexpr int kDqRows = kHalves == 2 ? kRows : kRows / 2;                 // of one consumer, 64 columns wide
constexpr int kRowAlign = DETERMINISTIC ? kRows : 8;                      // where a visit may start
constexpr bool kFinishes = backward_finishes(kRows);
constexpr bool kShares = !DETERMINISTIC && !SOFTCAP;  // tiles may come in parts (a softcap leaves no registers)
constexpr int kPlanned = kFinishes ? 8 : 4;           // visits kept written down: storers that finish are late readers
constexpr int kZeros = 128;                           // written by a lane at a time
enum NamedBarrier { kDsReady = 1, kDqReady = 2, kDqFree = 4 };  // the last two + consumer
constexpr int kBulkBytes = kDqRows * 64 * 4;
constexpr int kDsBlock = kKeys * 32;  // bytes of 16 rows of ds

struct Part {          // of a tile in shares
    int slot, before;  // where the tile's parts add up, -1: it is whole; how many come before this one
    int more;          // come after it
};
struct alignas(16) Item {                     // a tile of keys of one kv head, or no keys
    int key0, num_keys, kv_head, num_visits;  // num_visits < 0: no more work
    int block0, block1;                       // of dq rows, to be finished before
    int load0;                                // where keys are loaded
    Part part;
};
struct TileEnd {  // what counts once it is added
    int kv_head, block0, block1, weight;
};
// Rows from row0 on; allowed cells have first <= i < last, lo <= key - i <= hi, keys in [key0, key1).
struct Visit {
    int row0, head, masked, order;
    int first, last, lo, hi, key0, key1, slot, tile_ends;
    TileEnd end;  // where tile_ends
};
struct Plan {                                      // the planner's notes: it has few registers
    int next, index, kv_head, head, left;          // left: visits
    int block0, block1, slots, complete, cleared;  // slots: from a head to its slot; heads known to be added, finished
    int tile_key0, tile_key1, first, num_slices;   // of the tile
    int slice, row0, row1, key0, key1, lo, hi;     // of one of its slices
    int down;                                      // the tile's walk goes from the last row to the first
    int top;                                       // where it begins in a slice, kUp: at the first row
    const int* orders;                             // of the tile's visits, by block of rows
    int whole, shares, total;                      // tiles not in shares; shares, and the weight of all tiles in them
    int head_weight;                               // of a head's tiles as they are counted
    int share, share_begin, share_end;             // the current one, and what is left of it
    int weight, part_begin, part_end;              // of a tile, and what of it is walked; then in visits
    int counted;                                   // the part's weight in `added`
    Part part;
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
    float zeros[kFinishes ? kZeros : 4];
    Visit visit[kPlanned];
    Item planned_item, item;
    Plan plan;
    DqJob job[kConsumers];
    int no_more[kConsumers];  // visits, for a storer that finishes
    u64 item_planned, item_taken, visit_planned[kPlanned], visit_taken[kPlanned];
    u64 kv_full, kv_free, q_full[kStages], q_free[kStages], dout_full[kStages], dout_free[kStages];
};
static_assert(sizeof(Smem) <= backward_smem(HEAD_DIM, kRows) && kStages == 2);

}  // namespace magi

#include "ffa_bwd_shared.cuh"

namespace magi {

// ---- planner: one thread walks the tiles' slices, a little ahead of the loads ----
__device__ __forceinline__ int take_work(const BackwardArgs& a) { return atomicAdd(&a.table.header->next_work, 1); }

__device__ __forceinline__ int blocks_before(const BackwardArgs& a, int n) {
    return blocks_before(n, a.lag, a.table.num_tiles, a.row_blocks * a.heads_per_kv, a.share);
}

// A consumer's share of a block of kFinishRows, as of a visit: half of the columns or half of the rows.
constexpr int kShareRows = kHalves == 2 ? kFinishRows : kFinishRows / 2;

__device__ __forceinline__ float* sums_of(const BackwardArgs& a, int block, int w) {
    const int head = block / a.row_blocks, row0 = block % a.row_blocks * kFinishRows;
    const int ring = a.ring_heads * a.heads_per_kv, slot = head - head / ring * ring;
    const long long row =
        kHalves == 2 ? (slot * 2LL + w) * a.rows_pad : static_cast<long long>(slot) * a.rows_pad + w * kShareRows;
    return a.dq_sum + (row + row0) * 64;
}

// Waits until the first `heads` heads' counts are `all`; `known` remembers.
__device__ __forceinline__ void wait_for_heads(const int* counts, int all, int heads, int& known) {
    if (known >= heads) return;
    for (int head = known; head < heads;) {
        const int one = turn_peek(counts + head);
        const int next = turn_peek(counts + min(head + 1, heads - 1));  // both on their way at once
        if (one < all)
            __nanosleep(100);
        else
            head += next < all ? 1 : 2;
    }
    turns_acquire();
    known = heads;
}

// Writes down visit `n` of the current slice: rows from row0 on, and what of them the consumers may use.
__device__ __forceinline__ void plan_visit(const BackwardArgs& a, Smem& s, int n, int row0) {
    Plan& plan = s.plan;
    // The loader took visit n - 2 when the consumers were done with visit n - 4.
    if (n >= 2) barrier_wait(s.visit_taken[(n - 2) % kPlanned], (n - 2) / kPlanned & 1);
    Visit& visit = s.visit[n % kPlanned];
    visit.row0 = row0;
    visit.head = plan.head;
    if (kFinishes) {
        visit.slot = plan.head + plan.slots;
        plan.left = plan.left - 1;
        visit.tile_ends = plan.left == 0;
        if (plan.left == 0) visit.end = {plan.kv_head, plan.block0, plan.block1, plan.counted};
    }
    describe_cells(plan, row0, visit);
    barrier_arrive(s.visit_planned[n % kPlanned]);
}

__device__ __forceinline__ int walk_weight(const BackwardArgs& a, int tile) {
    return a.table.tiles[tile].num_steps * a.heads_per_kv + 2;  // the two: for the tile itself, were it empty
}

// Of a head's tiles, if they may be shared by it; by the planner's warp.
__device__ __forceinline__ int sum_weights(const BackwardArgs& a) {
    int sum = 0;
    for (int i = threadIdx.x % 32; kShares && a.shares.count > 0 && a.shares.first == 0 && i < a.table.num_tiles;
         i += 32)
        sum += walk_weight(a, i);
    return __reduce_add_sync(~0u, sum);
}

// What is shared, and how: the same in every block.
__device__ __forceinline__ void plan_shares(const BackwardArgs& a, Plan& plan, int sum) {
    const int tiles = a.table.num_tiles * a.num_kv_heads;
    plan.whole = tiles;
    plan.shares = plan.total = plan.share_begin = plan.share_end = 0;
    plan.head_weight = a.table.num_tiles;
    plan.part = {-1, 0, 0};
    plan.counted = 1;
    if (!kShares || a.shares.count == 0) return;
    const bool equal = equal_walks(a.table.tiles[0], a.table.tiles[a.table.num_tiles - 1]);
    if (a.shares.first > 0) {
        if (!equal) return;
        plan.whole = a.shares.first;
        plan.shares = a.shares.count;
        plan.total = (tiles - plan.whole) * plan.shares;
    } else {
        const int total = sum * a.num_kv_heads, shares = max(min(a.shares.count, total / kLeastShare), 1);
        const int rounds = equal ? ceil_div(tiles, a.shares.count) : 1;  // unequal ones fill up each other's rounds
        if (rounds * walk_weight(a, 0) < total / shares + kPartVisits) return;
        plan.whole = 0;
        plan.shares = shares;
        plan.total = total;
        plan.head_weight = sum;
    }
}

__device__ __forceinline__ int share_begin(const Plan& plan, int i) {
    return i * (plan.total / plan.shares) + i * (plan.total % plan.shares) / plan.shares;
}

// The next tile or part of one. Numbers past the last tile stand for what comes after all tiles.
__device__ __forceinline__ void take_part(const BackwardArgs& a, Plan& plan) {
    if (!kShares || plan.share_begin >= plan.share_end) {
        plan.next = take_work(a);  // late: work that is reserved early is kept from blocks that idle at the end
        if (!kShares || plan.next < plan.whole || plan.shares == 0) return;
        plan.share = plan.next - plan.whole;
        plan.part.slot = -1;
        if (plan.share >= plan.shares) {
            plan.next = a.table.num_tiles * a.num_kv_heads + plan.share - plan.shares;
            return;
        }
        plan.share_begin = share_begin(plan, plan.share);
        plan.share_end = share_begin(plan, plan.share + 1);
    }
    // From the last tile to the first: that one's later parts are in shares that are handed out later.
    const int last = plan.share_end - 1;
    int begin = 0;
    if (plan.whole > 0) {
        plan.weight = plan.shares;
        begin = last / plan.weight * plan.weight;
        plan.next = plan.whole + last / plan.weight;
    } else {
        int tile = 0;
        for (;; ++tile) {
            plan.weight = walk_weight(a, tile);
            if (last < begin + plan.weight * a.num_kv_heads) break;
            begin += plan.weight * a.num_kv_heads;
        }
        const int head = (last - begin) / plan.weight;
        begin += head * plan.weight;
        plan.next = tile * a.num_kv_heads + head;
    }
    const int from = max(plan.share_begin, begin);
    plan.part_begin = from - begin;
    plan.part_end = plan.share_end - begin;
    plan.share_end = from;
    if (plan.whole == 0) plan.counted = plan.part_end - plan.part_begin;
    plan.part = {-1, 0, 0};
    if (plan.part_begin == 0 && plan.part_end == plan.weight) return;
    int first = min(begin / (plan.total / plan.shares), plan.shares - 1);  // share of the tile
    while (share_begin(plan, first) > begin) --first;
    // Of the tiles that begin in a share, one reaches past it.
    const bool few = a.table.num_tiles * a.num_kv_heads - plan.whole < plan.shares;
    plan.part = {few ? plan.next - plan.whole : first, plan.share - first, plan.part_end < plan.weight};
}

// How many of a tile's visits come before a part's begin or end.
__device__ __forceinline__ int visits_before(int visits, int at, int weight) {
    return at == weight ? visits : min(static_cast<int>(__fdividef(static_cast<float>(visits) * at, weight)), visits);
}

__device__ void plan_visits(const BackwardArgs& a, Smem& s, int sum) {
    Plan& plan = s.plan;
    plan.complete = plan.cleared = 0;
    plan_shares(a, plan, sum);
    int n = 0;
    for (u32 parity = 1;; parity ^= 1) {
        const int num_tiles = a.table.num_tiles * a.num_kv_heads;
        take_part(a, plan);
        const int head_blocks = a.row_blocks * a.heads_per_kv;
        bool done = plan.next >= num_tiles;
        if (kFinishes) {
            plan.block0 = blocks_before(a, min(plan.next, num_tiles));
            if (plan.next < num_tiles) {
                plan.block1 = blocks_before(a, plan.next + 1);
            } else {  // the rest, one by one
                plan.block0 = plan.block0 + (plan.next - num_tiles);
                plan.block1 = plan.block0 + 1;
            }
            done = done && plan.block0 >= head_blocks * a.num_kv_heads;
            if (!done && plan.block0 < plan.block1)
                wait_for_heads(a.added, plan.head_weight * kConsumers, (plan.block1 - 1) / head_blocks + 1,
                               plan.complete);
        }
        plan.tile_key0 = plan.tile_key1 = 0;
        int visits = done ? -1 : 0;
        bool empty = false;
        if (plan.next < num_tiles) {
            find_tile(a, plan, plan.next);
            if (kFinishes) {
                plan.slots = (plan.kv_head % a.ring_heads - plan.kv_head) * a.heads_per_kv;
                if (plan.kv_head >= a.ring_heads)
                    wait_for_heads(a.finished, head_blocks * kConsumers, plan.kv_head - a.ring_heads + 1, plan.cleared);
            }
            count_visits(a, plan, visits);
            if (kShares && plan.part.slot >= 0) {
                plan.part_begin = visits_before(visits, plan.part_begin, plan.weight);
                plan.part_end = visits_before(visits, plan.part_end, plan.weight);
                visits = plan.part_end - plan.part_begin;
            }
            // Nobody sees these keys. If rows were finished before, they count after an empty visit (of zeros: no NaN).
            if (kFinishes && visits == 0) {
                empty = plan.block0 < plan.block1;
                visits = empty;
                if (!empty)
                    for (int w = 0; w < kConsumers; ++w) turn_pass(a.added + plan.kv_head, plan.counted);
            }
            plan.left = visits;
        }
        barrier_wait(s.item_taken, parity);
        s.planned_item = {plan.tile_key0, plan.tile_key1 - plan.tile_key0,  plan.kv_head,  visits,
                          plan.block0,    done ? plan.block0 : plan.block1, plan.tile_key0};
        if (kShares) s.planned_item.part = plan.part;
        if (kFinishes && empty) s.planned_item.load0 = a.num_k;
        barrier_arrive(s.item_planned);
        if (done) break;
        if (kFinishes)  // sums of that long ago have left L2
#pragma unroll 1
            for (int block = plan.block0; block < plan.block1; ++block) {
                const float* sums = sums_of(a, block, 0);
                bulk_prefetch(sums, kShareRows * 64 * sizeof(float));
                bulk_prefetch(sums + (kHalves == 2 ? a.rows_pad : kShareRows) * 64LL, kShareRows * 64 * sizeof(float));
            }
        if (visits == 0) continue;
        if (DETERMINISTIC) plan.orders = a.order + static_cast<long long>(plan.index) * a.num_blocks;
        if (empty) {
            plan.head = plan.kv_head * a.heads_per_kv;
            plan.row0 = plan.row1 = plan.key0 = plan.key1 = plan.lo = plan.hi = 0;
            plan_visit(a, s, n++, a.rows_pad - kRows);  // past the last row: loads give zeros
            continue;
        }
        int* const part_begin = kShares && plan.part.slot >= 0 ? &plan.part_begin : nullptr;
        walk_tile<kShares>(a, plan, [&](int row0) { plan_visit(a, s, n++, row0); }, part_begin, &plan.part_end);
    }
}

// ---- loader: one thread streams what is planned ----
__device__ void load_visits(const BackwardArgs& a, Smem& s) {
    int n = 0;
    for (u32 item = 0;; ++item) {
        barrier_wait(s.item_planned, item & 1);
        int left = s.planned_item.num_visits;
        const int visits = left;
        for (;;) {
            // Keys and values come second: their place is free later than that of the first visit's rows.
            if (left == visits - 1 || visits <= 0) {
                barrier_wait(s.kv_free, (item & 1) ^ 1);
                s.item = s.planned_item;
                barrier_arrive_expect(s.kv_full, visits > 0 ? sizeof(s.k) + sizeof(s.v) : 0);
#pragma unroll 1
                for (int h = 0; h < kHalves && visits > 0; ++h) {
                    tma_load(s.k[h], a.k, s.kv_full, 64 * h, s.planned_item.kv_head,
                             kFinishes ? s.planned_item.load0 : s.planned_item.key0);
                    tma_load(s.v[h], a.v, s.kv_full, 64 * h, s.planned_item.kv_head,
                             kFinishes ? s.planned_item.load0 : s.planned_item.key0);
                }
                barrier_arrive(s.item_taken);
            }
            if (left <= 0) break;
            asm volatile("" : "+r"(n));  // addresses are computed afresh: there are no registers to keep them
            const int stage = n % kStages;
            const u32 parity = (n / kStages & 1) ^ 1;
            const Visit& visit = s.visit[n % kPlanned];
            barrier_wait(s.visit_planned[n % kPlanned], n / kPlanned & 1);
            barrier_wait(s.q_free[stage], parity);
            barrier_arrive(s.visit_taken[n % kPlanned]);
            load_rows(a, visit, a.q, a.lse_log2, s.q[stage], s.lse[stage], s.q_full[stage]);
            barrier_wait(s.dout_free[stage], parity);
            load_rows(a, visit, a.dout, a.delta, s.dout[stage], s.delta[stage], s.dout_full[stage]);
            --left, ++n;
        }
        if (left < 0) break;
    }
}

// ---- storers: one warp a consumer adds its dq tiles to the workspace ----
// At the end of a tile: zeros where blocks of rows were finished before it, for the head that has the slot next; then
// the tile and the blocks count. Who sees what:
// - Adds and zeros are bulk copies. The lane that issued them waits until they are done, the warp meets, and lane 0's
//   fence and count release them all; a planner's acquire passes them on by the item's barrier to the consumers, which
//   read past L1.
// - The consumers have the sums in registers before they arrive for the tile's last visit; the first fence orders
//   their reads before the zeros, which another proxy writes.
// - A block that adds to the slot for the next head planned that tile after it acquired the count of the zeros.
__device__ __forceinline__ void end_tile(const BackwardArgs& a, Smem& s, int w, const TileEnd& end) {
    const int lane = threadIdx.x % 32;
    auto reused = [&](int block) { return block / a.row_blocks + a.ring_heads * a.heads_per_kv < a.num_heads; };
    if (end.block0 < end.block1) fence_async_global();
#pragma unroll 1
    for (int block = end.block0; block < end.block1; ++block)
        for (int i = lane * kZeros; reused(block) && i < kShareRows * 64; i += 32 * kZeros)
            bulk_store(sums_of(a, block, w) + i, s.zeros, sizeof(s.zeros));
    bulk_wait();
    __syncwarp();
    if (lane == 0) {
        turns_fence();
        turn_count(a.added + end.kv_head, end.weight);
#pragma unroll 1
        for (int block = end.block0; block < end.block1; ++block)
            if (reused(block)) turn_count(a.finished + block / (a.row_blocks * a.heads_per_kv));
    }
    __syncwarp();
}

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

// The same where dq is finished here; what is to be added where it reads from the visits themselves.
__device__ void store_and_count(const BackwardArgs& a, Smem& s, int w) {
    const bool leader = threadIdx.x % 32 == 0;
    named_arrive(kDqFree + w, 160);
    for (u32 n = 0;; ++n) {
        named_sync(kDqReady + w, 160);
        if (s.no_more[w]) break;
        // Its place is taken by visit n + kPlanned, when the consumers are past what this warp has yet to store.
        const Visit& visit = s.visit[n % kPlanned];
        const bool ends = visit.tile_ends;
        int* const turn = a.turn + (visit.head * 2 + w) * a.num_blocks + visit.row0 / kRows;
        if (leader) {
            if (DETERMINISTIC)
                while (turn_read(turn) < visit.order) __nanosleep(20);  // see store_dq
            const long long row = kHalves == 2 ? (visit.slot * 2LL + w) * a.rows_pad
                                               : static_cast<long long>(visit.slot) * a.rows_pad + w * kDqRows;
            bulk_add(a.dq_sum + (row + visit.row0) * 64, s.dq[w], kBulkBytes);
            bulk_wait_read();
        }
        __syncwarp();
        named_arrive(kDqFree + w, 160);
        if (DETERMINISTIC && leader) {
            bulk_wait();
            turn_pass(turn);
        }
        if (ends) end_tile(a, s, w, visit.end);  // consumers are at most two visits ahead: it is not written over
    }
}

// ---- consumers ----
// p = exp2(score - lse), both in log2 units, from accumulator `begin` on. The copies keep their place among products.
template <int Count>
__device__ __forceinline__ void probabilities(const BackwardArgs& a, const float2 (&lse)[kScores / 4], int begin,
                                              float (&p)[kScores]) {
#pragma unroll
    for (int i = begin; i < begin + Count; ++i) {
        p[i] = probability(a, p[i], i % 2 ? lse[i / 4].y : lse[i / 4].x);
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

// ds = p (dp - delta), into dp, under a softcap times the capped scores' derivative.
__device__ __forceinline__ void score_gradients(const BackwardArgs& a, const float* delta, const float* lse, int column,
                                                const float (&p)[kScores], float (&dp)[kScores]) {
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
        const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j + column);
        const float2 l = SOFTCAP ? *reinterpret_cast<const float2*>(lse + 8 * j + column) : float2{};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = 4 * j + e;
            dp[i] = p[i] * (dp[i] - (e % 2 ? d.y : d.x));
            if (SOFTCAP) dp[i] *= cap_slope(a, p[i], e % 2 ? l.y : l.x);
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
        if (kFinishes || a.grad_is_float) {  // the others are staged, see below
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

// A warp's 16 keys of dk or dv go to where its keys or values were, swizzled as those, and from there by TMA, while dq
// is finished. (Where it is not, nothing would hide that the next keys are loaded later.)
__device__ __forceinline__ void stage_keys(u32 to, float scale, float (&d)[kOuts]) {
    const int lane = threadIdx.x % 32, row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int x = 0; x < HEAD_DIM / 16; ++x) {
        u32 m[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) m[e] = pack<T>(d[8 * x + 2 * e] * scale, d[8 * x + 2 * e + 1] * scale);
        store_matrices(to + x / 4 * kKeys * 128 + row * 128 + ((x % 4 * 2 + lane / 16 ^ row % 8) << 4), m);
    }
}

// Adds to a warp's share of dk and dv what the tile's parts before this one have of it; leaves the sum where more come.
__device__ __forceinline__ void add_parts(const BackwardArgs& a, const Part& part, int w, float (&dk)[kOuts],
                                          float (&dv)[kOuts]) {
    const int lane = threadIdx.x % 32, at = part.slot * 8 + w * 4 + threadIdx.x % 128 / 32;
    float4* sums = reinterpret_cast<float4*>(a.partial) + at * (kOuts / 2 * 32LL) + lane;
    const auto add = [&](float4* from, float(&d)[kOuts]) {
#pragma unroll
        for (int i = 0; i < kOuts / 4; ++i) {
            const float4 x = __ldcg(from + 32 * i);
            d[4 * i] += x.x, d[4 * i + 1] += x.y, d[4 * i + 2] += x.z, d[4 * i + 3] += x.w;
        }
    };
    const auto leave = [&](float4* to, const float(&d)[kOuts]) {
#pragma unroll
        for (int i = 0; i < kOuts / 4; ++i)
            __stcg(to + 32 * i, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
    };
    if (part.before > 0) {
        if (lane == 0)
            while (turn_read(a.parts + at) < part.before) __nanosleep(100);
        __syncwarp();
        add(sums, dk);
        add(sums + kOuts / 4 * 32, dv);
    }
    if (part.more) {
        leave(sums, dk);
        leave(sums + kOuts / 4 * 32, dv);
        __syncwarp();
        if (lane == 0) turn_pass(a.parts + at);
    }
}

// ---- dq: sums to results ----
// A warp takes blocks of 4 rows x 64 columns (ffa_bwd.cuh), 16 blocks apart where the other warps have theirs between.
// A lane's two vectors hold two rows of columns i and i + 8, and of both 32 further.
constexpr int kPairs = kShareRows / 16;

__device__ __forceinline__ int first_vector() {
    const int thread = threadIdx.x % 128, warp = thread / 32;
    return 64 * warp + (thread % 32 ^ (warp % 2 * 4));
}

// Every vector gets a value, so that none has to be kept from one tile to the next.
__device__ __forceinline__ void load_sums(const BackwardArgs& a, int block, int w, bool any, float4 (&x)[kPairs][2]) {
    const float4* sums = reinterpret_cast<const float4*>(sums_of(a, block, w)) + first_vector();
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) x[i][j] = any ? __ldcg(sums + 256 * i + 32 * j) : float4{};
}

// dq = scale * sums (+ dq_prev). Lanes that are 2 apart exchange, so that each has two columns of one row beside each
// other; then four lanes turn theirs into 16 bytes each.
__device__ __forceinline__ void write_rows(const BackwardArgs& a, int block, int w, const float4 (&x)[kPairs][2]) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int head = block / a.row_blocks;
    const bool second = lane & 2;  // of two rows
    const int row0 = block % a.row_blocks * kFinishRows + (kHalves == 2 ? 0 : w * kShareRows) + thread / 32 * 4 +
                     lane % 2 * 2 + second;
    const int column0 = (kHalves == 2 ? w * 64 : 0) + lane / 16 * 16, c = column0 + lane / 4 % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int row = row0 + 16 * i;
        const bool valid = row < a.num_q;
        float y[4][2];  // columns +0, +1; +8, +9; +32, +33; +40, +41
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float4 f = x[i][j];
            const float lo = __shfl_xor_sync(~0u, second ? f.x : f.y, 2),
                        hi = __shfl_xor_sync(~0u, second ? f.z : f.w, 2);
            y[2 * j][0] = (second ? lo : f.x) * a.scale, y[2 * j][1] = (second ? f.y : lo) * a.scale;
            y[2 * j + 1][0] = (second ? hi : f.z) * a.scale, y[2 * j + 1][1] = (second ? f.w : hi) * a.scale;
        }
        if (a.dq_prev) {
            const long long at = (static_cast<long long>(row) * a.num_heads + head) * a.head_dim;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = c + j / 2 * 32 + j % 2 * 8;
                if (!valid || column >= a.head_dim) continue;
                if (a.grad_is_float) {
                    const float2 prev =
                        *reinterpret_cast<const float2*>(static_cast<const float*>(a.dq_prev) + at + column);
                    y[j][0] += prev.x, y[j][1] += prev.y;
                } else {
                    const u32 prev = *reinterpret_cast<const u32*>(static_cast<const u16*>(a.dq_prev) + at + column);
                    y[j][0] += to_float(T{static_cast<u16>(prev)});
                    y[j][1] += to_float(T{static_cast<u16>(prev >> 16)});
                }
            }
        }
        const long long at = row * a.dq_row_stride + head * a.dq_head_stride;
        if (a.grad_is_float) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = c + j / 2 * 32 + j % 2 * 8;
                if (valid && column < a.head_dim)
                    *reinterpret_cast<float2*>(static_cast<float*>(a.dq) + at + column) = make_float2(y[j][0], y[j][1]);
            }
        } else {
            u32 z[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) z[j] = pack<T>(y[j][0], y[j][1]);
            transpose_quad<4>(z, lane);
            const int column = column0 + lane / 8 % 2 * 32 + lane / 4 % 2 * 8;
            if (valid && column < a.head_dim)
                __stcs(reinterpret_cast<uint4*>(static_cast<u16*>(a.dq) + at + column),
                       make_uint4(z[0], z[1], z[2], z[3]));
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
    int block = 0, end = 0;  // of the blocks to be finished
    float4 sums[kPairs][2];
    auto next_item = [&] {
        barrier_wait(s.item_planned, kv_parity);
        block = uniform(s.planned_item.block0);
        end = uniform(s.planned_item.block1);
        release(s.item_taken);
        load_sums(a, block, w, block < end, sums);
    };
    if (kFinishes) next_item();
    for (;;) {
        while (kFinishes && block < end) {  // while keys and values are loaded
            write_rows(a, block, w, sums);
            ++block;
            load_sums(a, block, w, block < end, sums);
        }
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
            if (!kFinishes && thread == 0) {
                const int row0 = s.visit[planned].row0, head = s.visit[planned].head;
                const long long block = kHalves == 2 ? head * 2 + w : head;
                s.job[w] = {a.dq_sum + (block * a.rows_pad + row0 + (kHalves == 2 ? 0 : w * kDqRows)) * 64,
                            a.turn + (head * 2 + w) * a.num_blocks + row0 / kRows, s.visit[planned].order};
            }
            fence_async_shared();
            named_arrive(kDqReady + w, 160);
            wgmma_wait<0>();
            pin(dk);
            release(s.q_free[stage]);
        }
        const Item item = s.item;
        if (!kFinishes) release(s.kv_free);
        if (kShares && item.part.slot >= 0) add_parts(a, item.part, w, dk, dv);
        if (kShares && item.part.more) {
            // A later part writes them.
        } else if (kFinishes && !a.grad_is_float) {
            if (item.num_keys > 0) {
                named_sync(kDsReady, 256);  // the other consumer has read these keys, too
                const u32 to = keys + thread / 32 * 2048;
                stage_keys(to, a.scale, dk);
                stage_keys(to + sizeof(s.k), 1.f, dv);
                fence_async_shared();
                __syncwarp();
                if (lane == 0) {
#pragma unroll
                    for (int h = 0; h < kHalves; ++h) {
                        const int key0 = item.key0 + 64 * w + thread / 32 * 16;
                        tma_store(a.dk_map, to + h * sizeof(s.k[0]), 64 * h, item.kv_head, key0);
                        tma_store(a.dv_map, to + sizeof(s.k) + h * sizeof(s.v[0]), 64 * h, item.kv_head, key0);
                    }
                    bulk_commit();
                }
            }
        } else if (!kFinishes || item.num_keys > 0) {
            write_keys(a, item, key, a.scale, a.dk, a.dk_row_stride, a.dk_head_stride, a.head_dim, dk);
            write_keys(a, item, key, 1.f, a.dv, a.dv_row_stride, a.dv_head_stride, a.v_dim, dv);
        }
        if (kFinishes) {
            auto release_keys = [&] {
                if (lane == 0) bulk_wait_read();
                release(s.kv_free);
            };
            if (SOFTCAP) release_keys();  // earlier than it is read, for registers
            next_item();
            if (!SOFTCAP) release_keys();
        }
    }
    if (kFinishes && lane == 0) bulk_wait();
    named_sync(kDqFree + w, 160);
    if (thread == 0) {
        s.no_more[w] = 1;
        s.job[w].to = nullptr;
    }
    named_arrive(kDqReady + w, 160);
}

extern "C" __global__ __launch_bounds__(kThreads, 1) void ffa_bwd(const __grid_constant__ BackwardArgs a) {
    extern __shared__ __align__(1024) char raw[];  // as the swizzle needs it
    Smem& s = *reinterpret_cast<Smem*>(raw);
    for (int i = threadIdx.x; kFinishes && i < kZeros; i += kThreads) s.zeros[i] = 0;
    if (kFinishes) fence_async_shared();
    if (threadIdx.x < kConsumers) s.no_more[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        barrier_init(s.item_planned, 1);
        barrier_init(s.item_taken, kFinishes ? 1 + 4 * kConsumers : 1);
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
    wait_for_earlier_kernels();
    if (HEAD_DIM == 128 && a.middle) {
        let_later_kernels_start();  // the other way's
        if (long_walk(*a.middle) != kTall) return;
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<kProducerRegisters>();
        if (threadIdx.x == 0)
            load_visits(a, s);
        else if (threadIdx.x >= 32 && threadIdx.x < 32 * (1 + kConsumers))
            kFinishes ? store_and_count(a, s, threadIdx.x / 32 - 1) : store_dq(s, threadIdx.x / 32 - 1);
        else if (threadIdx.x >= 96) {
            const int sum = sum_weights(a);
            if (threadIdx.x == 96) plan_visits(a, s, sum);
        }
    } else {
        registers_grow<kConsumerRegisters>();
        differentiate(a, s, uniform(threadIdx.x / 128) - 1);
    }
}

}  // namespace magi
