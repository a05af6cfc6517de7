// What does the backward hand to its kernels, and how is its workspace laid out? Host and device.
//
// Gradients of queries are summed in fp32 in a workspace of their own, in the order in which threads hold them in the
// accumulators of dq^T: [slot][head_dim / 64][row / 4] blocks of 4 rows x 64 columns, [column / 16][column % 8]
// [row / 2 % 2][column / 8 % 2][row % 2] within a block, where odd blocks exchange columns % 4 of 0, 1 and 2, 3 (their
// place in bytes is XORed with 64, so that a warp stores both at once). Rows go from 0 to rows_pad, and 8 of them are
// contiguous in 64 columns: a tile that starts at any multiple of 8 is one bulk reduce.
//
// Where backward_finishes, sums become results (scaled, converted, added to what was there) block by block while the
// main kernel runs: the n-th work item finishes a share of the rows that tile n - lag belongs to. By then all tiles of
// that head are handed out, and the lag is long enough for them to have ended. At the end of the tile its sums are
// zeroed, for the head ring_heads on. Elsewhere every head has a slot, and a kernel of its own finishes.
#pragma once

#include "args.cuh"

namespace magi {

constexpr int kBackwardKeys = 128, kBackwardStages = 2;
constexpr int kFinishRows = 128;  // of dq, of one query head, finished at a time

// Rows of a visit. More rows cost fewer bytes of shared memory each, as the keys are read once a visit, but more of
// them are padding where walks are short: `tall` is for long ones. Registers bound it. The host sees how long slices
// are, not how far a band reaches in them: where it would take tall visits at head_dim 128 it launches both ways, and
// the tile in the middle of the table, which is sorted, says which one is to leave at once.
constexpr int kLongWalk = 3072;  // rows
MAGI_HD constexpr bool long_walk(const Tile& middle) { return middle.num_steps >= kLongWalk / 64; }
constexpr int kMostRows = 128;
MAGI_HD constexpr int backward_rows(int head_dim, bool tall) { return tall ? (head_dim == 64 ? 128 : 80) : 64; }

// Whether the main kernel finishes dq. Tall visits have no registers to spare.
MAGI_HD constexpr bool backward_finishes(int rows) { return rows == 64; }

// Rows of the workspace: a visit may start at any row and reach past the end, and the last kFinishRows are read whole.
MAGI_HD constexpr int backward_rows_pad(int num_q) { return ceil_div(num_q, kMostRows) * kMostRows + kMostRows; }

// Work is handed out by sections of heads, in a section by ascending tiles, of a tile head by head. The last section,
// from last_head on, has more heads: tiles come heavy first, and nothing after it fills the blocks that end early.
struct Sections {
    int heads, last_head;
};
struct WorkItem {
    int tile, kv_head;
};
MAGI_HD constexpr WorkItem work_item(int n, int num_tiles, Sections sections, int num_kv_heads) {
    const int first_head = min_of(n / (num_tiles * sections.heads) * sections.heads, sections.last_head);
    const int heads = first_head < sections.last_head ? sections.heads : num_kv_heads - first_head;
    const int at = n - first_head * num_tiles;
    return {at / heads, first_head + at % heads};
}
// The last one joins those whose tiles are at most `most` together.
MAGI_HD constexpr Sections sections_of(int num_tiles, int section_heads, int num_kv_heads, long long most) {
    const int usual = num_kv_heads > 0 ? (num_kv_heads - 1) / section_heads * section_heads : 0;
    const long long heads = num_tiles > 0 ? most / num_tiles : num_kv_heads;
    const int first = heads < num_kv_heads ? num_kv_heads - static_cast<int>(heads) : 0;
    return {section_heads, min_of(usual, ceil_div(first, section_heads) * section_heads)};
}

// Blocks of dq rows that are finished before work item n: those of the heads before tile n - lag, and of its own head's
// a share for every tile before it. All tiles of these heads are handed out before n.
MAGI_HD constexpr int blocks_before(int n, int lag, int num_tiles, int head_blocks, int share) {
    n -= lag;
    if (n <= 0) return 0;
    const int head = n / num_tiles;
    return head * head_blocks + min_of((n - head * num_tiles) * share, head_blocks);
}

// How far behind dq is finished, and for how many heads it has sums meanwhile: a head's tiles find their slot finished
// by work handed out before them. Under a causal mask the heaviest tile takes as long as two others: a section and two
// rounds of all thread blocks later all have ended. The last section may have as many tiles.
struct FinishRing {
    int lag, heads;
};
MAGI_HD constexpr FinishRing finish_ring(int num_tiles, int section_heads, int num_kv_heads, int thread_blocks) {
    const long long tiles = static_cast<long long>(section_heads) * num_tiles, section = tiles > 0 ? tiles : 1;
    const long long ended = 2LL * thread_blocks, lag = section + ended;
    const long long heads = (1 + (lag + ended + section - 1) / section) * section_heads;
    return {lag < 1 << 30 ? static_cast<int>(lag) : 1 << 30,
            heads < num_kv_heads ? static_cast<int>(heads) : num_kv_heads};
}

// Where blocks would idle while others walk the last tiles, every block gets a share of the walks instead: the end of
// one tile, whole ones, the begin of another. In fp32 and in the order of the shares, a tile's parts add what they have
// of its dk and dv, and the last one writes the results: any number of runs gives the same bits. Few tiles are shared
// all of them, by the length of their walks; of many that walk equally far, as under full masks, those of the last
// round (where dq is finished elsewhere; ordered visits have a tile to themselves). The table says how long walks are,
// so it decides whether shares pay.
struct Shares {
    int first, count;  // the first tile in shares, and how many they are; 0: none
};
constexpr int kLeastShare = 8;   // visits
constexpr int kPartVisits = 12;  // as long as what comes with one more part
MAGI_HD constexpr Shares shares_of(int tiles, int blocks, long long visits, bool last_round) {
    if (4LL * tiles <= 5LL * blocks) return {0, visits * tiles < 1 << 30 ? blocks : 0};
    int rest = tiles % blocks;
    if (4 * rest < blocks) rest += blocks;  // else a tile's many parts would wait for each other
    const long long idle = visits * (ceil_div(rest, blocks) * blocks - rest);  // visits
    return last_round && rest % blocks > 0 && idle >= 1LL * kPartVisits * blocks ? Shares{tiles - rest, blocks}
                                                                                 : Shares{tiles, 0};
}
MAGI_HD constexpr bool equal_walks(const Tile& longest, const Tile& shortest) {
    return 8LL * shortest.num_steps >= 7LL * longest.num_steps;
}

// Whether a slice's rows of a tile touch a block of rows, one visit of it then.
MAGI_HD constexpr bool visits_block(Range rows, int block, int block_rows) {
    return rows.begin < rows.end && rows.begin / block_rows <= block && block <= (rows.end - 1) / block_rows;
}

MAGI_HD constexpr unsigned backward_smem(int head_dim, int rows) {
    return 2 * head_dim * 2 * (kBackwardKeys + kBackwardStages * rows)  // k, v; q, dout
           + 2 * 2 * kBackwardKeys * rows                               // ds, twice
           + 4 * rows * head_dim                                        // dq
           + 2 * 4 * kBackwardStages * rows + 1792;                     // lse, delta; zeros, visits, barriers
}

// Shapes above 128, known to both sides: a tile of keys against visits of rows, rings of q and dout, and buffers of
// so many rows x 64 columns that dq leaves through, half of them a ring for each consumer. Registers (a tile's dk and
// dv, over both consumers) and 227 KB of shared memory bound it.
constexpr int kBackwardWideRows = 64;
struct BackwardWideShape {
    int head_dim, v_dim, keys, q_stages, dout_stages, dq_rows, dq_buffers;
    MAGI_HD constexpr unsigned smem() const {  // k, v; q, dout; p, ds; dq; lse, delta; visits, barriers
        return 2 * keys * (head_dim + v_dim) + 2 * kBackwardWideRows * (q_stages * head_dim + dout_stages * v_dim) +
               4 * keys * kBackwardWideRows + 256 * dq_rows * dq_buffers +
               4 * kBackwardWideRows * (q_stages + dout_stages) + 1280;
    }
};
constexpr BackwardWideShape kBackwardWideShapes[] = {
    {192, 128, 112, 2, 2, 32, 4},
    {192, 192, 96, 2, 2, 32, 4},
    {256, 256, 80, 2, 1, 16, 6},
};
// Smaller heads take the first one that holds them, padded with zeros.
MAGI_HD constexpr int backward_wide_shape(int head_dim, int v_dim) {
    int i = 0;
    while (kBackwardWideShapes[i].head_dim < head_dim || kBackwardWideShapes[i].v_dim < v_dim) ++i;
    return i;
}

struct BackwardArgs {
    TensorMap q, k, v, dout;
    TensorMap dk_map, dv_map;  // boxes of a warp's keys; where backward_finishes, unless grad_is_float
    TileTable table;           // transposed: tiles of keys
    const Slice* slices;
    int num_slices;
    int num_q, num_k, num_heads, num_kv_heads, heads_per_kv, head_dim, v_dim;
    int rows_pad;
    const Tile* middle;     // decides whether this is the way that works, null: it is
    Sections sections;      // kv heads worked on together, so that their rows stay in L2
    int waves, wave_tiles;  // of a head's tiles: how often all blocks take one, and how many that is
    const float* lse_log2;  // [heads, rows_pad]: lse * log2(e), +inf where lse is -inf
    const float* delta;     // [heads, rows_pad]
    float* dq_sum;          // the workspace above, zeroed
    void *dq, *dk, *dv;
    const void* dq_prev;  // [num_q, heads, head_dim] or null
    long long dq_row_stride, dq_head_stride, dk_row_stride, dk_head_stride, dv_row_stride, dv_head_stride;
    int grad_is_float;
    float scale, scale_log2, softcap;
    // Finishing dq, see above.
    int row_blocks;  // of kFinishRows, of a query head
    int share;       // of a head's, finished by one work item
    int lag;         // work items
    int ring_heads;  // kv heads that have slots
    int* added;      // [kv heads], zeroed: tiles added (in shares: their weights), counted by each consumer's storer
    int* finished;   // [kv heads], zeroed: blocks read and zeroed, likewise
    // Tiles in shares, see above.
    Shares shares;
    int* parts;      // [slots, 8 warps], zeroed: how many are in `partial`
    float* partial;  // [slots, 8 warps, dk and dv, head_dim / 8, 32 lanes, 4]: accumulators as they are
    // Deterministic variants: visits of a block of backward_rows rows take turns.
    int num_blocks;
    int* turn;         // [heads, 2, num_blocks], zeroed
    const int* order;  // [key tile, num_blocks]: visits of the block before this tile's
};

// ffa_bwd_rows.cu
constexpr int kPrepareRows = 32, kPrepareHeads = 8;  // of a block of threads: short inputs need many
struct BackwardPrepareArgs {
    const float *lse, *delta;  // [num_q, num_heads]
    // Where delta is null it is rowsum(dout * out) - dlse, strides in multiples of 8 elements.
    const void *dout, *out;
    const float* dlse;  // [num_q, num_heads] or null
    long long dout_row_stride, dout_head_stride, out_row_stride, out_head_stride;
    int v_dim, type;
    float *lse_log2, *delta_out;
    int num_q, num_heads, rows_pad;
    const Tile* middle;  // where two ways are launched, or null
    float* zeros;        // to be zeroed, a multiple of 4 words
    long long num_zeros, num_zeros_tall;
    // Deterministic: the order of visits, from the table.
    TileTable table;
    const Slice* slices;
    int num_slices, num_k, block_rows;  // block_rows of visits that are not tall, if there is a choice
    int* order;                         // as above, or null
};
struct BackwardFinishArgs {
    const Tile* middle;  // null, or of a table where there is nothing to do unless visits are tall
    const float* dq;     // workspace
    const void* dq_prev;
    void* out;
    long long out_row_stride, out_head_stride;
    int num_q, num_heads, head_dim, padded_dim, rows_pad, type, is_float;
    float scale;
};

}  // namespace magi
