// Where does it pay that query rows travel, not keys alone?
#pragma once

#include "plan/cost.h"
#include "plan/moves.h"

namespace magi::plan {

// Moves that shorten the step of a mask whose rows and keys have owners; none where nothing does. Ranks that share
// their rows cut the keys among them: of G ranks each receives the rows of all and a G-th of the keys, where alone it
// would receive all keys (two-dimensional tiles; the volume falls with the square root of the ranks, Loomis and
// Whitney, 1949). Groups are the halvings of the ownership's bisection, whose members share documents, and each is
// shared or halved, whichever takes less.
std::vector<Move> choose_moves(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                               std::span<const int> k_chunks, const CostModel& cost);

}  // namespace magi::plan
