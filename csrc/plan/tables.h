// Given who owns what: which rows travel when, and which slices does one rank compute in each stage?
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"
#include "plan/moves.h"

namespace magi::plan {

// Rows that travel together. They arrive by source rank, ascending within.
struct Transfer {
    std::vector<Range> send;      // own rows, by destination rank, ascending within
    std::vector<int64_t> splits;  // [2, world] rows to send to and to receive from each rank
    int64_t num_send() const;
    int64_t num_recv() const;
};

struct StageTables : Transfer {
    std::vector<Slice> slices;        // local query rows x rows of this stage's key buffer
    std::vector<Slice> guest_slices;  // guest rows x rows of this stage's key buffer
};

// Columns of the statistics that every rank knows about all ranks.
struct RankStats {
    int64_t area;      // allowed cells that this rank computes
    int64_t remote;    // key rows it receives, all stages
    int64_t guests;    // query rows of others that it receives
    int64_t returned;  // partial results of its own rows that it receives: one for each rank that a row visits
};

// The remote stages of one pass.
struct Schedule {
    std::vector<StageTables> stages;
    std::vector<int64_t> rows;  // [world, stages] key rows received in each stage
};

struct StageCounts {
    int forward, backward;
};

struct Tables {
    std::vector<Range> q_ranges, k_ranges;  // global rows of this rank in local order, padding left out
    std::vector<Slice> slices;              // own queries x own keys, in both passes
    Transfer guests;                        // query rows that visit other ranks, before the first remote stage
    std::vector<Slice> guest_slices;        // guest rows x own keys, in both passes
    Schedule forward, backward;
    std::vector<RankStats> ranks;  // [world]
};

// In each pass a remote row that any query of a rank needs is received by it exactly once, in exactly one stage;
// nothing else travels. The stage of a row depends on its receiver alone, so that senders and receivers agree without
// talking: in global order, divided as the cost model finds best for this receiver and pass. A query row visits a rank
// once, if any move gives that rank a cell of it.
Tables make_tables(Slices slices, const Moves& moves, const Grid& q_grid, std::span<const int> q_chunks,
                   const Grid& k_grid, std::span<const int> k_chunks, int rank, StageCounts counts,
                   const CostModel& cost);

}  // namespace magi::plan
