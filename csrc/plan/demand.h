// What does each chunk of query rows cost, and which keys does it need?
#pragma once

#include "plan/grid.h"

namespace magi::plan {

struct Demand {
    std::vector<int64_t> area;   // [num_chunks] allowed cells
    std::vector<int> offset;     // [num_chunks + 1] into needs
    std::vector<Range> needs;    // key ranges of each chunk, ascending and disjoint

    std::span<const Range> of(int chunk) const {
        return {needs.data() + offset[chunk], needs.data() + offset[chunk + 1]};
    }
};

Demand demand_of(Slices slices, const Grid& q_grid);

}  // namespace magi::plan
