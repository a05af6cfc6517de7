// How do rows travel where ranks share nodes? Across the network once for each node, then on to the ranks inside that
// need them.
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"
#include "plan/tables.h"

namespace magi::plan {

// Rank node * node_size + place sits on a node. A row for another node goes to the rank at its owner's place there (the
// relay), which sends it on; all rows of a rank's key buffer thus come from its own node.
struct RelayStage {
    std::vector<Range> relay_send;      // own key rows, by destination node, ascending within
    std::vector<int64_t> relay_splits;  // [2, nodes] rows to send to and to receive from the same place on each node
    std::vector<Range> send;            // rows of [local key rows | relayed rows], by destination place
    std::vector<int64_t> splits;        // [2, node_size] likewise inside the node; to itself what it relays and needs
    std::vector<Slice> slices;          // local query rows x rows of the key buffer
};

struct RelaySchedule {
    std::vector<RelayStage> stages;
    std::vector<int64_t> rows;  // [world, stages] key rows in each stage's buffer
};

struct RelayTables {
    std::vector<Range> q_ranges, k_ranges;  // as in Tables
    std::vector<Slice> slices;              // own queries x own keys
    RelaySchedule forward, backward;
    std::vector<RankStats> ranks;  // [world]
};

// The relayed rows of a stage lie by source node, ascending within; the key buffer lies by relay, then by the node of
// the owner, ascending within. In each pass a row crosses to a node at most once, in one stage; where its owner shares
// the node, it does not cross. Rows take two steps from other nodes and one from the own node: of several stages the
// first has only the latter, so that they are there while the former are on their way.
RelayTables make_relay_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                              std::span<const int> k_chunks, int rank, int node_size, StageCounts counts,
                              const CostModel& cost);

// The first of `stages` whose rows may come from other nodes.
constexpr int first_crossing(int stages) { return stages > 1 ? 1 : 0; }

}  // namespace magi::plan
