// Given who owns what: which rows travel when, and which slices does one rank compute in each stage?
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"

namespace magi::plan {

struct StageTables {
    std::vector<Slice> slices;    // local query rows x rows of this stage's key buffer
    std::vector<Range> send;      // own key rows, by destination rank, ascending within
    std::vector<int64_t> splits;  // [2, world] rows to send to and to receive from each rank
    int64_t num_send() const;
    int64_t num_recv() const;
};

// Columns of the statistics that every rank knows about all ranks.
struct RankStats {
    int64_t area;    // allowed cells of this rank's query rows
    int64_t remote;  // key rows it receives, all stages
};

struct Tables {
    std::vector<Range> q_ranges, k_ranges;  // global rows of this rank in local order, padding left out
    std::vector<Slice> slices;              // own queries x own keys
    std::vector<StageTables> stages;        // the remote stages
    std::vector<RankStats> ranks;           // [world]
    std::vector<int64_t> stage_rows;        // [world, stages] key rows received in each stage
};

// A remote row that any query of a rank needs is received by it exactly once, in exactly one stage; nothing else
// travels. The stage of a row depends on its receiver alone, so that senders and receivers agree without talking: in
// global order, the stages grow or shrink geometrically, by the ratio that hides most of this receiver's communication,
// forward and backward.
Tables make_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                   std::span<const int> k_chunks, int rank, int num_stages, const CostModel& cost);

}  // namespace magi::plan
