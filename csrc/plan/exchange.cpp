#include <algorithm>
#include <numeric>

#include "plan/ownership.h"

namespace magi::plan {
namespace {

// Trades chunks one for one between ranks that hold the others up and ranks that have room, where it adds the fewest
// rows.
class Exchange {
  public:
    Exchange(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost)
        : shares_(shares), by_area_(grid.world), demand_(demand), grid_(grid), cost_(cost) {
        double mean = 0;
        for (const Share& share : shares) mean += share.time / grid.world;
        limit_ = mean * (1 + cost.slack);
    }

    void run() {
        // Siblings of the last bisection share documents: trades between them are nearly free.
        for (int a = 0; a + 1 < grid_.world; a += 2) relieve(a, a + 1);
        std::vector<int> order(grid_.world);
        std::iota(order.begin(), order.end(), 0);
        for (int round = 0; round < kRounds; ++round) {
            std::stable_sort(order.begin(), order.end(),
                             [&](int a, int b) { return shares_[a].time > shares_[b].time; });
            bool moved = false;
            for (int i = 0; i < grid_.world && shares_[order[i]].time > limit_; ++i) {
                for (int p = 0; p < kPartners && shares_[order[i]].time > limit_; ++p) {
                    const int partner = order[grid_.world - 1 - (i + p) % grid_.world];
                    if (shares_[partner].time < limit_ && relieve(order[i], partner)) moved = true;
                }
            }
            if (!moved) break;
        }
    }

  private:
    static constexpr int kRounds = 24, kPartners = 12, kTrades = 3;

    // A chunk by its area; ordered heaviest first.
    struct Load {
        double area;
        int chunk;
        bool operator<(const Load& other) const { return area != other.area ? area > other.area : chunk < other.chunk; }
    };

    double area(int c) const { return c < grid_.num_chunks() ? demand_.area[c] : 0; }

    // Sorted when first asked for: most ranks never trade.
    std::vector<Load>& by_area(int rank) {
        std::vector<Load>& loads = by_area_[rank];
        if (loads.empty()) {
            for (const int c : shares_[rank].chunks) loads.push_back({area(c), c});
            std::sort(loads.begin(), loads.end());
        }
        return loads;
    }

    // Rows of a chunk's keys that a rank does not need yet.
    double added(int c, const Share& share) const {
        if (c >= grid_.num_chunks()) return 0;
        double rows = 0;
        for (const Range& need : demand_.of(c)) {
            rows += demand_.rows(need.begin, need.end);
            auto it = std::partition_point(share.keys.begin(), share.keys.end(),
                                           [&](const Range& r) { return r.end <= need.begin; });
            for (; it != share.keys.end() && it->begin < need.end; ++it) {
                rows -= demand_.rows(std::max(it->begin, need.begin), std::min(it->end, need.end));
            }
        }
        return rows;
    }

    // What two ranks cost the others: the time by which they exceed the limit, and their traffic.
    double burden(double area_a, double rows_a, double area_b, double rows_b) const {
        return std::max(0.0, cost_.rank_time(area_a, rows_a) - limit_) +
               std::max(0.0, cost_.rank_time(area_b, rows_b) - limit_) + cost_.traffic * cost_.row * (rows_a + rows_b);
    }

    // Trades until neither rank exceeds the limit or no trade helps; true if any was made.
    bool relieve(int first, int second) {
        bool moved = false;
        for (int trade = 0; trade < kTrades; ++trade) {
            const bool in_order = shares_[first].time >= shares_[second].time;
            const int busier = in_order ? first : second, calmer = in_order ? second : first;
            const Share &a = shares_[busier], &b = shares_[calmer];
            if (a.time <= limit_) break;
            const double area_a = a.area, area_b = b.area, rows_a = a.remote, rows_b = b.remote;
            const double even = (a.time - b.time) / 2 / cost_.cell;
            double best = burden(area_a, rows_a, area_b, rows_b);
            const double least = cost_.traffic * cost_.row * (rows_a + rows_b);  // nothing exceeds, nothing is added
            int give = -1, take = -1;
            const std::vector<Load>&from_a = by_area(busier), &from_b = by_area(calmer);
            size_t j = 0;
            for (const Load& x : from_a) {
                while (j + 1 < from_b.size() && x.area - from_b[j].area < even) ++j;
                for (const size_t k : {j, j > 0 ? j - 1 : j}) {
                    const Load& y = from_b[k];
                    const double change = x.area - y.area;
                    if (change <= 0 || burden(area_a - change, rows_a, area_b + change, rows_b) >= best) continue;
                    const double more_a = rows_a + added(y.chunk, a);
                    if (burden(area_a - change, more_a, area_b + change, rows_b) >= best) continue;
                    const double more_b = rows_b + added(x.chunk, b);
                    const double value = burden(area_a - change, more_a, area_b + change, more_b);
                    if (value < best) {
                        best = value;
                        give = x.chunk;
                        take = y.chunk;
                    }
                }
                if (best <= least) break;
            }
            if (give < 0) break;
            replace(busier, give, take);
            replace(calmer, take, give);
            moved = true;
        }
        return moved;
    }

    void replace(int rank, int out, int in) {
        std::vector<Load>& loads = by_area(rank);
        std::vector<int>& chunks = shares_[rank].chunks;
        chunks.erase(std::lower_bound(chunks.begin(), chunks.end(), out));
        chunks.insert(std::lower_bound(chunks.begin(), chunks.end(), in), in);
        const Load gone{area(out), out}, come{area(in), in};
        loads.erase(std::lower_bound(loads.begin(), loads.end(), gone));
        loads.insert(std::lower_bound(loads.begin(), loads.end(), come), come);
        measure(shares_[rank], demand_, grid_, cost_);
    }

    std::vector<Share>& shares_;
    std::vector<std::vector<Load>> by_area_;  // of each rank; empty until asked for
    const Demand& demand_;
    const Grid& grid_;
    const CostModel& cost_;
    double limit_ = 0;
};

}  // namespace

void exchange(std::vector<Share>& shares, const Demand& demand, const Grid& grid, const CostModel& cost) {
    Exchange(shares, demand, grid, cost).run();
}

}  // namespace magi::plan
