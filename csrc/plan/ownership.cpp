#include "plan/ownership.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace magi::plan {
namespace {

// Slots are numbered like chunks; those beyond the last chunk are padding: no rows, no area, no needs.

int64_t shared_rows(std::span<const Range> a, std::span<const Range> b) {
    int64_t rows = 0;
    for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
        rows += std::max(0, std::min(a[i].end, b[j].end) - std::max(a[i].begin, b[j].begin));
        a[i].end < b[j].end ? ++i : ++j;
    }
    return rows;
}

// Halves a list of chunks again and again: a window of the list for one half of the ranks, the rest for the other half. On the
// circle of all windows of the right length there is always one with just its share of the area (necklace splitting; Goldberg and
// West, 1985), so every rank ends with a few contiguous runs: documents stay whole, windows go contiguous, causal goes zigzag. Of
// the windows that balance, the one that tears the least apart wins.
class Bisection {
public:
    Bisection(const Demand& demand, const Grid& grid, const CostModel& cost)
        : grid_(grid), cost_(cost), area_(grid.num_slots(), 0), link_(grid.num_slots(), 0), order_(grid.num_slots()),
          scratch_(grid.num_slots()), prefix_(2 * grid.num_slots() + 1), rank_of_(grid.num_slots(), 0) {
        std::copy(demand.area.begin(), demand.area.end(), area_.begin());
        for (int c = 1; c < grid.num_chunks(); ++c) link_[c] = shared_rows(demand.of(c - 1), demand.of(c));
        std::iota(order_.begin(), order_.end(), 0);
        fair_share_ = static_cast<double>(std::accumulate(area_.begin(), area_.end(), int64_t{0})) / grid.world;
    }

    std::vector<int> run() {
        split(0, grid_.num_slots(), 0, grid_.world);
        return std::move(rank_of_);
    }

private:
    // Rows that two neighbours of the list both need: what tearing them apart sends twice.
    double tear(int begin, int count, int at) const {
        if (at == 0 || at == count) return 0;
        const int left = order_[begin + at - 1], right = order_[begin + at];
        return right == left + 1 ? static_cast<double>(link_[right]) : 0;
    }

    void split(int begin, int end, int first_rank, int num_ranks) {
        if (num_ranks == 1) {
            for (int i = begin; i < end; ++i) rank_of_[order_[i]] = first_rank;
            return;
        }
        const int count = end - begin, left_ranks = num_ranks / 2, right_ranks = num_ranks - left_ranks;
        const int window = left_ranks * grid_.slots;
        // Running sums go on once more around the circle, so that no window needs a seam.
        prefix_[0] = 0;
        for (int i = 0; i < count; ++i) prefix_[i + 1] = prefix_[i] + area_[order_[begin + i]];
        const int64_t total = prefix_[count];
        for (int i = 1; i <= window; ++i) prefix_[count + i] = total + prefix_[i];
        const double fair = std::max(fair_share_, static_cast<double>(total) / num_ranks);
        const double per_left = cost_.cell / left_ranks, per_right = cost_.cell / right_ranks;
        double best = std::numeric_limits<double>::infinity();
        int at = 0;
        for (int i = 0; i < count; ++i) {
            const int64_t inside = prefix_[i + window] - prefix_[i];
            const double busier = std::max(static_cast<double>(inside) * per_left, static_cast<double>(total - inside) * per_right);
            double value = std::max(0.0, busier - cost_.cell * fair);
            if (value >= best) continue;
            value += cost_.traffic * cost_.row * (tear(begin, count, i) + tear(begin, count, (i + window) % count));
            if (value < best) {
                best = value;
                at = i;
            }
        }
        // Both parts keep the global order of their chunks: [0, head) and [at, stop) are the window.
        const int stop = std::min(at + window, count), head = at + window - stop;
        const auto list = order_.begin() + begin;
        const auto middle = std::copy(list + at, list + stop, std::copy(list, list + head, scratch_.begin()));
        std::copy(list + stop, list + count, std::copy(list + head, list + at, middle));
        std::copy_n(scratch_.begin(), count, list);
        split(begin, begin + window, first_rank, left_ranks);
        split(begin + window, end, first_rank + left_ranks, right_ranks);
    }

    const Grid& grid_;
    const CostModel& cost_;
    std::vector<int64_t> area_, link_;
    std::vector<int> order_, scratch_;
    std::vector<int64_t> prefix_;
    std::vector<int> rank_of_;
    double fair_share_ = 0;
};

// Trades chunks one for one between ranks that hold the others up and ranks that have room, where it adds the fewest rows.
class Exchange {
public:
    Exchange(const Demand& demand, const Grid& grid, const CostModel& cost, std::span<const int> rank_of)
        : demand_(demand), grid_(grid), cost_(cost), ranks_(grid.world) {
        for (Rank& rank : ranks_) rank.chunks.reserve(grid.slots);
        for (int c = 0; c < grid.num_slots(); ++c) ranks_[rank_of[c]].chunks.push_back(c);
        double mean = 0;
        for (Rank& rank : ranks_) {
            for (const int c : rank.chunks) rank.area += area(c);
            collect_keys(rank);
            mean += rank.time / grid.world;
        }
        limit_ = mean * (1 + cost.slack);
    }

    Ownership run() {
        // Siblings of the last bisection share documents: trades between them are nearly free.
        for (int a = 0; a + 1 < grid_.world; a += 2) relieve(ranks_[a], ranks_[a + 1]);
        std::vector<int> order(grid_.world);
        std::iota(order.begin(), order.end(), 0);
        for (int round = 0; round < kRounds; ++round) {
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return ranks_[a].time > ranks_[b].time; });
            bool moved = false;
            for (int i = 0; i < grid_.world && ranks_[order[i]].time > limit_; ++i) {
                Rank& busy = ranks_[order[i]];
                for (int p = 0; p < kPartners && busy.time > limit_; ++p) {
                    Rank& partner = ranks_[order[grid_.world - 1 - (i + p) % grid_.world]];
                    if (partner.time < limit_ && relieve(busy, partner)) moved = true;
                }
            }
            if (!moved) break;
        }
        Ownership chunks;
        for (const Rank& rank : ranks_) {
            for (const int c : rank.chunks) chunks.push_back(c < grid_.num_chunks() ? c : -1);
        }
        return chunks;
    }

private:
    static constexpr int kRounds = 24, kPartners = 12, kTrades = 3;

    // A chunk by its area; ordered heaviest first.
    struct Load {
        int64_t area;
        int chunk;
        bool operator<(const Load& other) const { return area != other.area ? area > other.area : chunk < other.chunk; }
    };

    struct Rank {
        std::vector<int> chunks;     // ascending
        std::vector<Load> by_area;   // heaviest first; empty until asked for
        std::vector<Range> keys;     // all that its rows need, merged
        int64_t area = 0, remote = 0;
        double time = 0;
    };

    int64_t area(int c) const { return c < grid_.num_chunks() ? demand_.area[c] : 0; }

    void collect_keys(Rank& rank) {
        rank.keys.clear();
        for (const int c : rank.chunks) {
            if (c >= grid_.num_chunks()) break;
            const std::span<const Range> needs = demand_.of(c);
            rank.keys.insert(rank.keys.end(), needs.begin(), needs.end());
        }
        rank.keys.resize(merge_ranges(rank.keys));
        rank.remote = 0;
        for (const Range& r : rank.keys) rank.remote += r.end - r.begin;
        size_t at = 0;
        for (const int c : rank.chunks) {
            if (c >= grid_.num_chunks()) break;
            const Range rows = grid_.rows(c);
            while (at < rank.keys.size() && rank.keys[at].end <= rows.begin) ++at;
            for (size_t i = at; i < rank.keys.size() && rank.keys[i].begin < rows.end; ++i) {
                rank.remote -= std::min(rank.keys[i].end, rows.end) - std::max(rank.keys[i].begin, rows.begin);
            }
        }
        rank.time = cost_.rank_time(static_cast<double>(rank.area), static_cast<double>(rank.remote));
    }

    const std::vector<Load>& by_area(Rank& rank) const {
        if (rank.by_area.empty()) {
            for (const int c : rank.chunks) rank.by_area.push_back({area(c), c});
            std::sort(rank.by_area.begin(), rank.by_area.end());
        }
        return rank.by_area;
    }

    // Rows of a chunk's keys that a rank does not need yet.
    int64_t added(int c, const Rank& rank) const {
        if (c >= grid_.num_chunks()) return 0;
        int64_t rows = 0;
        for (const Range& need : demand_.of(c)) {
            rows += need.end - need.begin;
            auto it = std::partition_point(rank.keys.begin(), rank.keys.end(), [&](const Range& r) { return r.end <= need.begin; });
            for (; it != rank.keys.end() && it->begin < need.end; ++it) {
                rows -= std::min(it->end, need.end) - std::max(it->begin, need.begin);
            }
        }
        return rows;
    }

    // What two ranks cost the others: the time by which they exceed the limit, and their traffic.
    double burden(double area_a, double rows_a, double area_b, double rows_b) const {
        return std::max(0.0, cost_.rank_time(area_a, rows_a) - limit_) + std::max(0.0, cost_.rank_time(area_b, rows_b) - limit_) +
               cost_.traffic * cost_.row * (rows_a + rows_b);
    }

    // Trades until neither rank exceeds the limit or no trade helps; true if any was made.
    bool relieve(Rank& first, Rank& second) {
        bool moved = false;
        for (int trade = 0; trade < kTrades; ++trade) {
            Rank& a = first.time >= second.time ? first : second;
            Rank& b = &a == &first ? second : first;
            if (a.time <= limit_) break;
            const double area_a = static_cast<double>(a.area), area_b = static_cast<double>(b.area);
            const double rows_a = static_cast<double>(a.remote), rows_b = static_cast<double>(b.remote);
            const double even = (a.time - b.time) / 2 / cost_.cell;
            double best = burden(area_a, rows_a, area_b, rows_b);
            const double least = cost_.traffic * cost_.row * (rows_a + rows_b);    // nothing exceeds, nothing is added
            int give = -1, take = -1;
            const std::vector<Load>&from_a = by_area(a), &from_b = by_area(b);
            size_t j = 0;
            for (const Load& x : from_a) {
                while (j + 1 < from_b.size() && static_cast<double>(x.area - from_b[j].area) < even) ++j;
                for (const size_t k : {j, j > 0 ? j - 1 : j}) {
                    const Load& y = from_b[k];
                    const double change = static_cast<double>(x.area - y.area);
                    if (change <= 0 || burden(area_a - change, rows_a, area_b + change, rows_b) >= best) continue;
                    const double more_a = rows_a + static_cast<double>(added(y.chunk, a));
                    if (burden(area_a - change, more_a, area_b + change, rows_b) >= best) continue;
                    const double more_b = rows_b + static_cast<double>(added(x.chunk, b));
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
            replace(a, give, take);
            replace(b, take, give);
            moved = true;
        }
        return moved;
    }

    void replace(Rank& rank, int out, int in) {
        rank.chunks.erase(std::lower_bound(rank.chunks.begin(), rank.chunks.end(), out));
        rank.chunks.insert(std::lower_bound(rank.chunks.begin(), rank.chunks.end(), in), in);
        const Load gone{area(out), out}, come{area(in), in};
        rank.by_area.erase(std::lower_bound(rank.by_area.begin(), rank.by_area.end(), gone));
        rank.by_area.insert(std::lower_bound(rank.by_area.begin(), rank.by_area.end(), come), come);
        rank.area += area(in) - area(out);
        collect_keys(rank);
    }

    const Demand& demand_;
    const Grid& grid_;
    const CostModel& cost_;
    std::vector<Rank> ranks_;
    double limit_ = 0;
};

}  // namespace

Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost) {
    return Exchange(demand, q_grid, cost, Bisection(demand, q_grid, cost).run()).run();
}

}  // namespace magi::plan
