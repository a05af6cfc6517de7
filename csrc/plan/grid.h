// How are rows cut into chunks, and where does each chunk live?
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "band.h"

namespace magi::plan {

using Slices = std::span<const Slice>;

// `total` rows cut into chunks of `chunk` rows (the last may be shorter), dealt out in `slots` chunks for each rank.
// There may be more slots than chunks: a slot without a chunk is padding.
struct Grid {
    int total, chunk, world, slots;

    int num_chunks() const { return (total + chunk - 1) / chunk; }
    int num_slots() const { return world * slots; }
    Range rows(int c) const {
        const long long begin = static_cast<long long>(c) * chunk;
        return {static_cast<int>(min_of(begin, total)), static_cast<int>(min_of(begin + chunk, total))};
    }

  private:
    static long long min_of(long long a, long long b) { return a < b ? a : b; }
};

// Chunks of every rank, ascending, then -1 for each padding slot: [world, slots].
using Ownership = std::vector<int>;

// Throws std::invalid_argument unless `chunks` names every chunk of the grid once, ascending and padded at the end of
// each rank.
void check_ownership(const Grid& grid, std::span<const int> chunks, const char* name);

// Neighbouring chunks of one rank: global rows [begin, end) are local rows local, local + 1, ...
struct Run {
    int begin, end, rank, local;
};

// All runs in global order, and for every chunk the index of the run that holds it.
struct Runs {
    std::vector<Run> runs;
    std::vector<int> of_chunk;
    int chunk;

    int first_reaching(int row) const { return of_chunk[row / chunk]; }
};

Runs runs_of(const Grid& grid, std::span<const int> chunks);

// Sorts ranges and joins those that touch or overlap; returns how many are left in front.
int merge_ranges(std::span<Range> ranges);

}  // namespace magi::plan
