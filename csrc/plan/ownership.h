// Which rank owns which chunk, so that every rank computes equally much and needs little from the others?
#pragma once

#include "plan/cost.h"
#include "plan/demand.h"

namespace magi::plan {

// Deals the chunks so that every rank has equally many slots.
Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost);

}  // namespace magi::plan
