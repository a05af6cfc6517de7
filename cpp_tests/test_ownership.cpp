// Plans are as good as the best there is where all can be tried, and have the known shape where there is one.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "masks.h"
#include "plan/ownership.h"

namespace magi::plan {
namespace {

// Seconds of the slowest rank for every set of chunks, measured once.
class Brute {
  public:
    Brute(const Demand& demand, const Grid& grid, const CostModel& cost)
        : demand_(demand), grid_(grid), cost_(cost), time_(size_t{1} << grid.num_chunks(), -1) {}

    double time(unsigned set) {
        if (time_[set] < 0) {
            Share share;
            for (int c = 0; c < grid_.num_chunks(); ++c) {
                if (set >> c & 1) share.chunks.push_back(c);
            }
            measure(share, demand_, grid_, cost_);
            time_[set] = share.time;
        }
        return time_[set];
    }

    double best() {
        best_ = std::numeric_limits<double>::infinity();
        deal((1u << grid_.num_chunks()) - 1, grid_.world, 0);
        return best_;
    }

  private:
    // The lowest chunk left goes to the next rank, with every choice of others; ranks are interchangeable.
    void deal(unsigned left, int ranks, double slowest) {
        if (slowest >= best_) return;
        if (left == 0) {
            best_ = slowest;
            return;
        }
        if (ranks == 0) return;
        const unsigned low = left & -left, rest = left ^ low;
        for (unsigned others = rest;; others = (others - 1) & rest) {
            const unsigned set = others | low;
            if (std::popcount(set) <= grid_.slots) deal(left ^ set, ranks - 1, std::max(slowest, time(set)));
            if (others == 0) break;
        }
    }

    const Demand& demand_;
    const Grid& grid_;
    const CostModel& cost_;
    std::vector<double> time_;
    double best_ = 0;
};

TEST(Ownership, NothingIsThreePercentBetter) {
    for (const double bandwidth : {1e9, 20e9, 360e9}) {
        double worst = 1;
        for (unsigned seed = 0; seed < 500; ++seed) {
            std::mt19937 random(seed);
            const int world = 2 + static_cast<int>(seed % 3), slots = std::max(1, 12 / world - (seed % 5 == 0));
            const int chunk = 64 + static_cast<int>(random() % 200);
            const int total = world * slots * chunk - (seed % 7 == 0 ? static_cast<int>(random() % chunk) : 0);
            std::vector<Slice> mask = random_bands(total, total, seed);
            if (seed % 4 != 0) {
                std::vector<int> lengths;
                for (int left = total; left > 0; left -= lengths.back()) {
                    const double log_length = 2 + (std::log(total) - 2) * (random() % 1000) / 1000.0;
                    lengths.push_back(std::min(left, static_cast<int>(std::exp(log_length))));
                }
                mask = documents(lengths);
            }
            const Grid grid{total, chunk, world, slots};
            const CostModel cost{1e-9, 4096 / bandwidth, 50e-6, 0.05, 0.1, 0.01};
            const Demand demand = demand_of(mask, grid, total);
            Brute brute(demand, grid, cost);
            const Ownership chunks = assign_chunks(demand, grid, cost);
            double ours = 0;
            for (int r = 0; r < world; ++r) {
                unsigned set = 0;
                for (int s = 0; s < slots; ++s) {
                    if (chunks[r * slots + s] >= 0) set |= 1u << chunks[r * slots + s];
                }
                ours = std::max(ours, brute.time(set));
            }
            const double best = brute.best();
            if (best > 0) worst = std::max(worst, ours / best);
            EXPECT_LE(ours, 1.03 * best) << "seed " << seed << " bandwidth " << bandwidth;
        }
        RecordProperty("worst_at_" + std::to_string(static_cast<int>(bandwidth / 1e9)), std::to_string(worst));
        std::cout << "bandwidth " << bandwidth << ": at worst " << worst << " of the best\n";
    }
}

std::vector<Share> shares_of(const Ownership& chunks, const Demand& demand, const Grid& grid, const CostModel& cost) {
    std::vector<Share> shares(grid.world);
    for (int slot = 0; slot < grid.num_slots(); ++slot) {
        if (chunks[slot] >= 0) shares[slot / grid.slots].chunks.push_back(chunks[slot]);
    }
    for (Share& share : shares) measure(share, demand, grid, cost);
    return shares;
}

constexpr CostModel kCost{5.5e-11, 1.1e-8, 50e-6, 0.05, 0.1, 0.01};

TEST(Ownership, CausalGoesZigzag) {
    const Grid grid{65536, 128, 8, 64};
    const std::vector<Slice> mask = documents({65536});
    const Demand demand = demand_of(mask, grid, grid.total);
    double rows = 0, most = 0, sum = 0;
    for (const Share& share : shares_of(assign_chunks(demand, grid, kCost), demand, grid, kCost)) {
        rows += share.remote / 8;
        most = std::max(most, share.area);
        sum += share.area;
    }
    EXPECT_LE(most / (sum / 8), 1.001);
    EXPECT_LE(rows, 0.75 * 65536);
}

TEST(Ownership, WindowsGoNearlyContiguous) {
    const Grid grid{65536, 128, 8, 64};
    const std::vector<Slice> mask = {{0, 65536, 0, 65536, -1023, 0}};
    const Demand demand = demand_of(mask, grid, grid.total);
    for (const Share& share : shares_of(assign_chunks(demand, grid, kCost), demand, grid, kCost)) {
        EXPECT_LE(share.remote, 0.15 * 8192 + 1024);
    }
}

TEST(Ownership, SeveralMasksCountByTheirWeights) {
    const Grid grid{8192, 64, 4, 32};
    const std::vector<Slice> window = {{0, 8192, 0, 8192, -255, 0}}, whole = documents({8192});
    const WeightedMask masks[] = {{window, 3}, {whole, 1}};
    const Demand both = demand_of(masks, grid, 8192), first = demand_of(window, grid, 8192),
                 second = demand_of(whole, grid, 8192);
    const Ownership chunks = assign_chunks(both, grid, kCost);
    const auto a = shares_of(chunks, first, grid, kCost), b = shares_of(chunks, second, grid, kCost),
               ab = shares_of(chunks, both, grid, kCost);
    for (int r = 0; r < 4; ++r) {
        EXPECT_NEAR(ab[r].area, 0.75 * a[r].area + 0.25 * b[r].area, 1e-6 * ab[r].area);
        EXPECT_NEAR(ab[r].remote, 0.75 * a[r].remote + 0.25 * b[r].remote, 1e-6 * ab[r].remote + 1e-6);
    }
}

TEST(Ownership, KeysLiveWhereTheyAreNeeded) {
    const Grid q_grid{400, 50, 4, 2}, k_grid{80, 10, 4, 2};
    std::vector<Slice> mask;  // block i of rows sees block i of keys only
    for (int i = 0; i < 4; ++i) mask.push_back({100 * i, 100 * i + 100, 20 * i, 20 * i + 20, kNoLo, kNoHi});
    const Demand demand = demand_of(mask, q_grid, 80);
    const Ownership q = assign_chunks(demand, q_grid, kCost), k = assign_keys(demand, q_grid, q, k_grid);
    EXPECT_EQ(q, k);  // blocks of both are two chunks each
}

}  // namespace
}  // namespace magi::plan
