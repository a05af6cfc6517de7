// Which rank owns which chunk, so that every rank computes equally much and needs little from the others?
#pragma once

#include "plan/demand.h"

namespace magi::plan {

// Predicted seconds; only their ratios decide. One step of a rank takes the longer of compute and communication, plus the share of
// the shorter one that is not hidden behind it. The step of all takes as long as its slowest rank.
struct CostModel {
    double cell;       // per allowed cell, all heads
    double row;        // per received key row
    double exposed;    // share of the shorter activity that is not hidden
    double traffic;    // worth of a second of communication that hides: it still takes bandwidth and power from others
    double slack;      // share of the mean step time by which a rank may exceed it before traffic is spent to relieve it

    double rank_time(double area, double rows) const {
        const double compute = cell * area, transfer = row * rows;
        return compute > transfer ? compute + exposed * transfer : transfer + exposed * compute;
    }
};

// Deals the chunks so that every rank has equally many slots.
Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost);

}  // namespace magi::plan
