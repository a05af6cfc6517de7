// How do rows travel where ranks share nodes? Across the network once for each node, then on to the ranks inside that
// need them.
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"

namespace magi::plan {

// Rank node * node_size + place sits on a node. A row for another node goes to the rank at its owner's place there (the
// relay), which sends it on; all rows of a rank's key buffer thus come from its own node.
struct RelayStage {
    std::vector<Range> relay_send;      // own key rows, by destination node, ascending within
    std::vector<int64_t> relay_splits;  // [2, world] rows to send to and to receive from each rank; same place only
    std::vector<Range> send;            // rows of [local key rows | relayed rows], by destination rank
    std::vector<int64_t>
        splits;  // [2, world]; same node only, the rank itself too: for it a relayed row is there already
    std::vector<Slice> slices;  // local query rows x rows of the key buffer
};

struct RelayTables {
    std::vector<Slice> slices;  // own queries x own keys
    std::vector<RelayStage> stages;
};

// The relayed rows of a stage lie by source node, ascending within; the key buffer lies by relay, then by the node of
// the owner, ascending within. A row crosses to a node at most once, in one stage; where its owner shares the node, it
// does not cross.
RelayTables make_relay_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                              std::span<const int> k_chunks, int rank, int node_size, int num_stages,
                              const CostModel& cost);

}  // namespace magi::plan
