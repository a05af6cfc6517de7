// Do two slices of a mask cover the same cell?
#pragma once

#include <utility>

#include "plan/grid.h"

namespace magi::plan {

// Indices of two slices that share an allowed cell, the smaller one first; {-1, -1} where none do.
std::pair<int64_t, int64_t> find_overlap(Slices slices);

}  // namespace magi::plan
