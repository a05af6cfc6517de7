#include "plan/grid.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace magi::plan {

void check_ownership(const Grid& grid, std::span<const int> chunks, const char* name) {
    const auto fail = [&](const std::string& why) { throw std::invalid_argument(std::string(name) + ": " + why); };
    if (static_cast<int>(chunks.size()) != grid.num_slots()) fail("expected one row of slots for each rank");
    std::vector<char> seen(grid.num_chunks(), 0);
    int count = 0;
    for (int rank = 0; rank < grid.world; ++rank) {
        int last = -1;
        bool padded = false;
        for (const int c : chunks.subspan(static_cast<size_t>(rank) * grid.slots, grid.slots)) {
            if (c == -1) {
                padded = true;
                continue;
            }
            if (c < 0 || c >= grid.num_chunks()) fail("chunk " + std::to_string(c) + " does not exist");
            if (padded || c <= last)
                fail("chunks of rank " + std::to_string(rank) + " must ascend, with padding (-1) at the end");
            if (seen[c]) fail("chunk " + std::to_string(c) + " has two owners");
            seen[c] = 1;
            last = c;
            ++count;
        }
    }
    if (count != grid.num_chunks()) fail("some chunk has no owner");
}

Runs runs_of(const Grid& grid, std::span<const int> chunks) {
    struct Home {
        int rank, slot;
    };
    std::vector<Home> home(grid.num_chunks());
    for (int rank = 0; rank < grid.world; ++rank) {
        for (int slot = 0; slot < grid.slots; ++slot) {
            const int c = chunks[static_cast<size_t>(rank) * grid.slots + slot];
            if (c >= 0) home[c] = {rank, slot};
        }
    }
    Runs out{{}, std::vector<int>(grid.num_chunks()), grid.chunk};
    int last_rank = -1;
    for (int c = 0; c < grid.num_chunks(); ++c) {
        const auto [rank, slot] = home[c];
        const Range rows = grid.rows(c);
        // Slots of a rank hold ascending chunks, so neighbouring chunks of one rank sit in neighbouring slots.
        if (rank == last_rank) {
            out.runs.back().end = rows.end;
        } else {
            out.runs.push_back({rows.begin, rows.end, rank, slot * grid.chunk});
        }
        out.of_chunk[c] = static_cast<int>(out.runs.size()) - 1;
        last_rank = rank;
    }
    return out;
}

int merge_ranges(std::span<Range> ranges) {
    const auto before = [](const Range& a, const Range& b) { return a.begin < b.begin; };
    if (!std::is_sorted(ranges.begin(), ranges.end(), before)) std::sort(ranges.begin(), ranges.end(), before);
    int count = 0;
    for (const Range r : ranges) {
        if (count > 0 && r.begin <= ranges[count - 1].end) {
            ranges[count - 1].end = std::max(ranges[count - 1].end, r.end);
        } else {
            ranges[count++] = r;
        }
    }
    return count;
}

}  // namespace magi::plan
