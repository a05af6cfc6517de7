#include <algorithm>
#include <cmath>
#include <limits>

#include "plan/ownership.h"

namespace magi::plan {
namespace {

// Iterated local search over swaps of two chunks, each measured exactly. It pays where chunks are few: there single
// chunks weigh much, and every pair can be tried. Its effort is bounded, so for long sequences it does nothing.
class Search {
  public:
    Search(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost)
        : shares_(shares), demand_(demand), grid_(grid), cost_(cost) {}

    void run() {
        const int64_t pairs = int64_t{grid_.world} * (grid_.world - 1) / 2 * grid_.slots * grid_.slots;
        if (pairs == 0 || pairs * 2 * grid_.slots > kEffort) return;
        for (const Share& share : shares_) scale_ += share.time / grid_.world;
        if (scale_ <= 0) return;
        std::vector<Share> best = shares_;
        double least = burden(best);
        descend();
        for (int stale = 0; effort_ < kEffort && stale < kStale; ++stale) {
            const double now = burden(shares_);
            if (now < least) {
                least = now;
                best = shares_;
                stale = 0;
            } else {
                shares_ = best;
            }
            disturb();
            descend();
        }
        if (burden(shares_) >= least) shares_ = best;
    }

  private:
    static constexpr int64_t kEffort = 60000;  // chunks measured
    static constexpr int kStale = 24;          // fruitless disturbances in a row before it gives up

    // The slowest rank decides; then the rest of the ranks, and all traffic.
    double burden(const std::vector<Share>& shares) const {
        double slowest = 0, sum = 0, rows = 0;
        for (const Share& share : shares) {
            slowest = std::max(slowest, share.time);
            sum += share.time;
            rows += share.remote;
        }
        return slowest + 1e-3 * (sum + cost_.traffic * cost_.row * rows) / grid_.world;
    }

    // A smooth stand-in for the slowest rank: it also rewards relieving the second slowest. Smoother finds more ways,
    // steeper says better what counts: descents take turns.
    double weight(const Share& share) const {
        const double t = share.time / scale_, t2 = t * t, t4 = t2 * t2, t8 = t4 * t4, t16 = t8 * t8;
        return (steep_ ? t16 * t16 : t8) + 1e-3 * cost_.traffic * cost_.row * share.remote / scale_;
    }

    void descend() {
        for (bool moved = true; moved && effort_ < kEffort;) {
            moved = false;
            for (int a = 0; a < grid_.world; ++a) {
                for (int b = a + 1; b < grid_.world; ++b) moved = improve(a, b) || moved;
            }
        }
    }

    // The best swap between two ranks, if it helps.
    bool improve(int a, int b) {
        double best = weight(shares_[a]) + weight(shares_[b]);
        const double enough = best * (1 - 1e-9);
        Share found_a, found_b;
        for (int i = 0; i < grid_.slots; ++i) {
            for (int j = 0; j < grid_.slots; ++j) {
                const int x = shares_[a].chunks[i], y = shares_[b].chunks[j];
                if (x >= grid_.num_chunks() && y >= grid_.num_chunks()) continue;
                swapped(shares_[a], i, y, trial_a_);
                swapped(shares_[b], j, x, trial_b_);
                const double value = weight(trial_a_) + weight(trial_b_);
                if (value < std::min(best, enough)) {
                    best = value;
                    found_a = trial_a_;
                    found_b = trial_b_;
                }
            }
        }
        if (found_a.chunks.empty()) return false;
        std::swap(shares_[a], found_a);
        std::swap(shares_[b], found_b);
        return true;
    }

    void swapped(const Share& from, int slot, int chunk, Share& out) {
        out.chunks = from.chunks;
        out.chunks[slot] = chunk;
        std::sort(out.chunks.begin(), out.chunks.end());
        measure(out, demand_, grid_, cost_);
        effort_ += grid_.slots;
    }

    // Swaps a few chunks at random; the generator is our own, so that all ranks draw the same.
    void disturb() {
        steep_ = !steep_;
        for (int k = 0; k < 3; ++k) {
            const int a = draw(grid_.world), b = (a + 1 + draw(grid_.world - 1)) % grid_.world;
            const int i = draw(grid_.slots), j = draw(grid_.slots);
            const int x = shares_[a].chunks[i], y = shares_[b].chunks[j];
            swapped(Share(shares_[a]), i, y, shares_[a]);
            swapped(Share(shares_[b]), j, x, shares_[b]);
        }
    }

    int draw(int below) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<int>((state_ >> 33) % static_cast<uint64_t>(below));
    }

    std::vector<Share>& shares_;
    const Demand& demand_;
    const Grid& grid_;
    const CostModel& cost_;
    Share trial_a_, trial_b_;
    double scale_ = 0;
    int64_t effort_ = 0;
    bool steep_ = false;
    uint64_t state_ = 1;
};

}  // namespace

void search(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost) {
    Search(shares, demand, grid, cost).run();
}

}  // namespace magi::plan
