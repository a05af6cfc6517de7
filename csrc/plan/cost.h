// What does a step cost? The one home of the model by which all parts of the planner decide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace magi::plan {

// Predicted seconds of a forward pass; only their ratios decide.
struct CostModel {
    double cell;     // per allowed cell, all heads
    double row;      // per received key row
    double launch;   // per collective, and per stage that computes, whatever they hold
    double exposed;  // share of the shorter one of compute and communication that is not hidden behind the longer one
    double traffic;  // worth of a second of communication that hides: it still takes bandwidth and power from others
    double slack;    // share of the mean step time by which a rank may exceed it before traffic is spent to relieve it

    // A step of one rank before its stages are known. The step of all takes as long as its slowest rank.
    double rank_time(double area, double rows) const {
        const double compute = cell * area, transfer = row * rows;
        return compute > transfer ? compute + exposed * transfer : transfer + exposed * compute;
    }

    // A step of one rank in stages: the communication of the next stage runs while this one computes. areas[0] needs no
    // communication, areas[1 + s] needs rows[s]. `compute` and `transfer` scale the two for a backward pass.
    template <typename Number>
    double staged_time(std::span<const Number> areas, std::span<const Number> rows, double compute = 1,
                       double transfer = 1) const {
        double total = 0;
        for (size_t s = 0; s < areas.size(); ++s) {
            const double arriving = s < rows.size() ? launch + transfer * row * static_cast<double>(rows[s]) : 0;
            const double overhead = s > 0 && areas[s] > 0 ? launch : 0;
            total += std::max(compute * cell * static_cast<double>(areas[s]) + overhead, arriving);
        }
        return total;
    }
};

// Backward against forward: five matrix products for two, and keys come again while their gradients go back.
constexpr double kBackwardCompute = 2.5, kBackwardTransfer = 2;

}  // namespace magi::plan
