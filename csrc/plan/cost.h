// What does a step cost? The one home of the model by which all parts of the planner decide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "band.h"

namespace magi::plan {

enum class Pass { kForward, kBackward };

// Backward against forward: five matrix products for two, and gradients in twice the width of the keys that they go
// back to.
constexpr double kBackwardCompute = 2.5, kGradientRow = 2;

constexpr int kTile = 128;  // rows and keys of a kernel's tile

// Cells of the tiles of which a slice allows any: the kernel computes these whole. In closed form, since tiles are
// cells of a coarser slice; where a band leaves through a corner of the rectangle, that tile may count too.
constexpr long long tiled_area(const Slice& s) {
    if (s.q1 <= s.q0 || s.k1 <= s.k0 || s.lo > s.hi) return 0;
    const auto up = [](int x) { return (x + kTile - 1) >> 7; };
    const Slice tiles{
        s.q0 >> 7, up(s.q1), s.k0 >> 7, up(s.k1), s.lo <= kNoLo ? kNoLo : s.lo >> 7, s.hi >= kNoHi ? kNoHi : up(s.hi)};
    return area(tiles) * kTile * kTile;
}
static_assert(kTile == 1 << 7);

// Predicted seconds of a forward pass; only their ratios decide.
struct CostModel {
    double cell = 0;     // per cell of a tile that the kernel computes, all heads
    double row = 0;      // per received key row
    double launch = 0;   // per collective, and per stage that computes, whatever they hold
    double exposed = 0;  // share of the shorter one of compute and communication that is not hidden behind the longer
    double traffic = 0;  // worth of a second of communication that hides: it takes bandwidth and power from others
    double slack = 0;    // share of the mean step time by which a rank may exceed it before traffic relieves it
    // Query rows that visit another rank: per row received there, per partial result that its owner receives.
    double guest = 0, returned = 0, guest_backward = 0, returned_backward = 0;
    double fill = 0;  // what a tile of rows takes besides its tiles of keys, in tiles of keys

    // The work of one kernel, in cells: whole tiles, and what starting on rows takes. The slices ascend by their rows.
    double work(std::span<const Slice> slices) const {
        double tiles = 0;
        int rows = 0, seen = 0;
        for (const Slice& s : slices) {
            tiles += static_cast<double>(tiled_area(s));
            rows += std::max(0, s.q1 - std::max(s.q0, seen));
            seen = std::max(seen, s.q1);
        }
        return tiles + fill * kTile * rows;
    }

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
