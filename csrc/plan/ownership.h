// Which rank owns which chunk, so that every rank computes equally much and needs little from the others?
#pragma once

#include "plan/cost.h"
#include "plan/demand.h"

namespace magi::plan {

// Deals the chunks so that every rank has equally many slots: a bisection that keeps neighbours together, trades that
// relieve busy ranks, and, where there are few chunks, a search around the result.
Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost);

// Deals the keys of a mask whose rows have owners: to ranks that need them, equally many to each.
Ownership assign_keys(const Demand& demand, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid);

// The steps, each a refinement of the last. Chunks beyond the last one of the grid stand for padding slots: no rows, no
// needs.

// Chunks of one rank and what they cost.
struct Share {
    std::vector<int> chunks;  // ascending
    std::vector<Range> keys;  // all that its rows need, merged
    double area = 0, remote = 0, time = 0;
};

// Fills in what the chunks cost.
void measure(Share& share, const Demand& demand, const Grid& grid, const CostModel& cost);

std::vector<Share> bisect(const Demand& demand, const Grid& grid, const CostModel& cost);
void exchange(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost);
void search(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost);

}  // namespace magi::plan
