// Which rank owns which chunk, so that every rank computes equally much and needs little from the others?
#pragma once

#include "plan/demand.h"

namespace magi::plan {

// Predicted seconds; only their ratios decide. One step of a rank takes the longer of compute and communication, plus the
// share of the shorter one that is not hidden behind it.
struct CostModel {
    double cell;       // per allowed cell, all heads
    double row;        // per received key row
    double exposed;    // share of the shorter activity that is not hidden

    double rank_time(double area, double rows) const {
        const double compute = cell * area, transfer = row * rows;
        return compute > transfer ? compute + exposed * transfer : transfer + exposed * compute;
    }
};

// Deals the chunks of every rank.
Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost);

// The classical baseline: heaviest chunk first, to the lightest rank with a free slot.
Ownership assign_min_heap(const Demand& demand, const Grid& q_grid);

}  // namespace magi::plan
