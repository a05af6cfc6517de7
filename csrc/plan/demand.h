// What does each chunk of query rows cost, and which keys does it need?
#pragma once

#include "plan/grid.h"

namespace magi::plan {

// A mask and its weight among several that share one ownership: how often a model applies it.
struct WeightedMask {
    Slices slices;
    double weight;
};

// Demand of one mask, or the weighted mean of several. Each mask has its own keys: those of mask i lie i * span further
// on, so that a key that two masks need counts for both.
struct Demand {
    bool shared;                  // keys live where their rows do (self-attention)
    int span;                     // total keys + 1: ranges of neighbouring masks never touch
    std::vector<double> weights;  // [masks], their sum is 1
    std::vector<double> area;     // [num_chunks] allowed cells
    std::vector<int> offset;      // [num_chunks + 1] into needs
    std::vector<Range> needs;     // key ranges of each chunk, ascending and disjoint

    std::span<const Range> of(int chunk) const {
        return {needs.data() + offset[chunk], needs.data() + offset[chunk + 1]};
    }
    // Rows of [begin, end), by the weight of the mask that they belong to.
    double rows(int begin, int end) const {
        return begin >= end ? 0 : weights.size() == 1 ? end - begin : weights[begin / span] * (end - begin);
    }
};

// Keys live with rows where there are equally many; otherwise nothing is known of where they will live.
Demand demand_of(std::span<const WeightedMask> masks, const Grid& q_grid, int total_k);

inline Demand demand_of(Slices slices, const Grid& q_grid, int total_k) {
    const WeightedMask one{slices, 1.0};
    return demand_of({&one, 1}, q_grid, total_k);
}

}  // namespace magi::plan
