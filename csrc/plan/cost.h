// What does a step cost? The one home of the model by which all parts of the planner decide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace magi::plan {

enum class Pass { kForward, kBackward };

// Backward against forward: five matrix products for two, and gradients in twice the width of the keys that they go
// back to.
constexpr double kBackwardCompute = 2.5, kGradientRow = 2;

constexpr int kTile = 128;  // rows and keys of a kernel's tile

// Predicted seconds of a forward pass; only their ratios decide.
struct CostModel {
    double cell;     // per allowed cell, all heads
    double row;      // per received key row
    double launch;   // per collective, and per stage that computes, whatever they hold
    double exposed;  // share of the shorter one of compute and communication that is not hidden behind the longer one
    double traffic;  // worth of a second of communication that hides: it still takes bandwidth and power from others
    double slack;    // share of the mean step time by which a rank may exceed it before traffic is spent to relieve it
    // Query rows that visit another rank: per row received there, per partial result that its owner receives.
    double guest = 0, returned = 0, guest_backward = 0, returned_backward = 0;

    // A step of one rank before its stages are known. The step of all takes as long as its slowest rank.
    double rank_time(double area, double rows) const { return step_time(cell * area, row * rows); }
    double step_time(double compute, double transfer) const {
        return compute > transfer ? compute + exposed * transfer : transfer + exposed * compute;
    }

    // A pass of one rank in stages. areas[0] needs no communication, areas[1 + s] the rows[s] of stage s.
    double staged_time(Pass pass, std::span<const double> areas, std::span<const double> rows) const {
        return pass == Pass::kForward ? forward_time(areas, rows) : backward_time(areas, rows);
    }

  private:
    // The rows of the next stage arrive while this one computes.
    double forward_time(std::span<const double> areas, std::span<const double> rows) const {
        double total = 0;
        for (size_t s = 0; s < areas.size(); ++s) {
            total += std::max(computing(areas, s), s < rows.size() ? arriving(rows[s]) : 0);
        }
        return total;
    }

    // While a stage computes, the gradients of the stage before go home and the rows of the next arrive; the last
    // gradients go home alone.
    double backward_time(std::span<const double> areas, std::span<const double> rows) const {
        double total = 0;
        for (size_t s = 0; s <= areas.size(); ++s) {
            const double compute = s < areas.size() ? computing(areas, s, kBackwardCompute) : 0;
            const double keys = s < rows.size() ? arriving(rows[s]) : 0;
            const double gradients = s >= 2 ? arriving(kGradientRow * rows[s - 2]) : 0;
            total += std::max(compute, keys + gradients);
        }
        return total;
    }

    double arriving(double rows) const { return launch + row * rows; }
    double computing(std::span<const double> areas, size_t s, double factor = 1) const {
        return factor * cell * areas[s] + (s > 0 && areas[s] > 0 ? launch : 0);
    }
};

}  // namespace magi::plan
