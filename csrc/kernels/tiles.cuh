// Which slices touch which tile of rows? The table's format, its size, and the walk that reads it. Host and device.
//
// A tile is a run of `tile_rows` rows from row0 on. Its slices are copied into one pool, grouped by tile and ascending
// by slice index, so the walk of a tile is one stream of reads. Tiles are listed heavy first. A walk advances in steps
// of `step` columns from the first column that any row of the tile sees; every step holds at least one allowed cell.
// For the backward the table is transposed: rows are keys, columns are queries, slices come exchanged (band.h
// transpose).
//
// The pool holds what masks need in practice (pool_capacity). A tile whose list no longer fits has first < 0, and its
// walk reads all slices of the mask instead: slower, same steps in the same order.
#pragma once

#include "band.h"

namespace magi {

struct Tile {
    int row0;
    int first;       // of its slices in the pool; -1: walk all slices of the mask
    int num_slices;  // to walk from there
    int num_steps;   // over all its slices
};

struct alignas(32) TileSlice {
    Slice slice;  // transposed already where the table is
    int index;    // of the slice in the mask
    int num_steps;
};

struct alignas(64) TileHeader {  // zeroed before many blocks build the table
    int pool_used;
    int tiles_done;
    int next_work;  // a persistent kernel's work counter
    int num_tiles;  // of a cut table
};

struct TileTable {
    TileHeader* header;
    Tile* tiles;      // [num_tiles], heavy first
    Tile* unsorted;   // [num_tiles], ascending row0
    TileSlice* pool;  // [capacity]
    int num_tiles, tile_rows, step, capacity;
    int cut;  // tiles also begin where slices do: num_tiles is a bound then, and the header has the number
};

// Tiles of a cut table carry their rows - 1 (up to 255, unsigned) beside `first`, which stays below 2^24.
constexpr int kRowsShift = 24;
constexpr int kMaxCuts = 255;  // slices of a cut table: one block orders their first rows

// Worth it for documents side by side, whose tiles would begin anywhere in them; not for many short slices.
MAGI_HD constexpr bool worth_cutting(int num_rows, int tile_rows, int num_slices) {
    return num_slices > 1 && num_slices <= kMaxCuts && num_rows / num_slices >= tile_rows &&
           (num_rows / tile_rows + num_slices + 2LL) * num_slices < (1 << 20);
}

// What one block builds in less time than many need to agree: 2^lane_bits lanes a tile, up to 32 slices a lane.
constexpr int kMostSmallTiles = 256, kMostSmallSlices = 256, kSmallThreads = 512;
MAGI_HD constexpr int lane_bits(int num_tiles) {
    return num_tiles <= kSmallThreads / 8 ? 3 : num_tiles <= kSmallThreads / 4 ? 2 : 1;
}
MAGI_HD constexpr int slices_of_lane(int num_slices, int lane_bits) {  // even: they are read in pairs
    return (((num_slices - 1) >> (lane_bits + 1)) + 1) * 2;
}
MAGI_HD constexpr bool small_table(int num_tiles, int num_slices) {
    return num_tiles <= kMostSmallTiles && num_slices <= 32 << lane_bits(num_tiles);
}

MAGI_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Two and a bit layers of slices over every row, plus both ends of every slice.
MAGI_HD constexpr int pool_capacity(int num_tiles, int num_slices) {
    const long long wanted = 4LL * num_tiles + 4LL * num_slices + 64, all = 1LL * num_tiles * num_slices;
    return static_cast<int>(wanted < all ? wanted : all);
}

MAGI_HD constexpr int table_tiles(int num_rows, int tile_rows, int num_slices, bool cut) {
    return ceil_div(num_rows, tile_rows) + (cut ? num_slices + 1 : 0);
}
MAGI_HD constexpr int table_capacity(int num_tiles, int num_slices, bool cut) {
    return cut ? num_tiles * num_slices : pool_capacity(num_tiles, num_slices);
}

MAGI_HD constexpr long long table_bytes(int num_rows, int tile_rows, int num_slices, bool cut = false) {
    const int tiles = table_tiles(num_rows, tile_rows, num_slices, cut);
    return static_cast<long long>(sizeof(TileHeader)) + 2LL * tiles * sizeof(Tile) + 64 +
           static_cast<long long>(sizeof(TileSlice)) * table_capacity(tiles, num_slices, cut);
}

// Lays the table over a workspace of table_bytes, aligned to 64.
MAGI_HD TileTable table_over(void* workspace, int num_rows, int tile_rows, int step, int num_slices, bool cut = false) {
    char* at = static_cast<char*>(workspace);
    TileTable t{};
    t.num_tiles = table_tiles(num_rows, tile_rows, num_slices, cut);
    t.cut = cut;
    t.tile_rows = tile_rows;
    t.step = step;
    t.capacity = table_capacity(t.num_tiles, num_slices, cut);
    t.header = reinterpret_cast<TileHeader*>(at);
    at += sizeof(TileHeader);
    t.pool = reinterpret_cast<TileSlice*>(at);
    at += static_cast<long long>(sizeof(TileSlice)) * t.capacity;
    t.tiles = reinterpret_cast<Tile*>(at);
    t.unsorted = t.tiles + t.num_tiles;
    return t;
}

// Columns that rows [row0, row1) of the slice see; begin >= end where none.
MAGI_HD constexpr Range tile_columns(const Slice& s, int row0, int row1) {
    const int first = max_of(s.q0, row0), last = min_of(s.q1, row1);
    if (first >= last || s.lo > s.hi) return {0, 0};
    return keys_of_rows(s, first, last);
}

MAGI_HD constexpr int num_steps(Range columns, int step) {
    return columns.begin < columns.end ? ceil_div(columns.end - columns.begin, step) : 0;
}

// How one block of rows [row0, row1) meets one step [col0, col0 + step) of a slice: full only if every cell is allowed.
MAGI_HD constexpr TileClass block_class(const Slice& s, int row0, int row1, int col0, int step) {
    const int first = max_of(s.q0, row0), last = min_of(s.q1, row1), end = min_of(col0 + step, s.k1);
    if (first >= last || col0 >= end) return kTileEmpty;
    const TileClass band = classify(s, first, last, col0, end);
    const bool whole = first == row0 && last == row1 && end == col0 + step;
    return band == kTileFull && !whole ? kTilePartial : band;
}

// A slice as the table sees it: cut to the tensors (slices on the device were not checked on the host), then exchanged.
MAGI_HD constexpr Slice table_slice(const Slice& s, int num_q, int num_k, bool transposed) {
    Slice c = crop(s, 0, num_q, 0, num_k);
    c.lo = max_of(s.lo, kNoLo);
    c.hi = min_of(s.hi, kNoHi);
    return transposed ? transpose(c) : c;
}

// Arguments of the builder kernel (tiles.cu).
struct TilesArgs {
    TileTable table;
    const Slice* slices;
    int num_slices, num_q, num_k, transposed;
};

}  // namespace magi
