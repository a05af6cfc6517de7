#include "plan/ownership.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>

namespace magi::plan {
namespace {

Ownership table_of(std::span<const int> rank_of_slot, const Grid& grid) {
    Ownership chunks(grid.num_slots(), -1);
    std::vector<int> next(grid.world, 0);
    for (int c = 0; c < grid.num_chunks(); ++c) chunks[rank_of_slot[c] * grid.slots + next[rank_of_slot[c]]++] = c;
    return chunks;
}

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
// West, 1985), so every rank ends with a few contiguous runs. Of the windows that balance, the one that tears the least apart wins.
class Bisection {
public:
    Bisection(const Demand& demand, const Grid& grid, const CostModel& cost)
        : grid_(grid), cost_(cost), area_(grid.num_slots(), 0), link_(grid.num_slots(), 0), order_(grid.num_slots()),
          scratch_(grid.num_slots()), prefix_(grid.num_slots() + 1), rank_of_(grid.num_slots(), 0) {
        std::copy(demand.area.begin(), demand.area.end(), area_.begin());
        for (int c = 1; c < grid.num_chunks(); ++c) link_[c] = shared_rows(demand.of(c - 1), demand.of(c));
        std::iota(order_.begin(), order_.end(), 0);
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
        const int count = end - begin, left_ranks = num_ranks / 2, window = left_ranks * grid_.slots;
        prefix_[0] = 0;
        for (int i = 0; i < count; ++i) prefix_[i + 1] = prefix_[i] + area_[order_[begin + i]];
        const double share = static_cast<double>(prefix_[count]) * left_ranks / num_ranks;
        double best = std::numeric_limits<double>::infinity();
        int at = 0;
        for (int i = 0; i < count; ++i) {
            const int stop = i + window;
            const int64_t inside = stop <= count ? prefix_[stop] - prefix_[i] : prefix_[count] - prefix_[i] + prefix_[stop - count];
            const double off = std::abs(static_cast<double>(inside) - share) / left_ranks * cost_.cell;
            if (off >= best) continue;
            const double torn = tear(begin, count, i) + tear(begin, count, stop <= count ? stop : stop - count);
            const double value = off + torn * cost_.row * cost_.exposed / num_ranks;
            if (value < best) {
                best = value;
                at = i;
            }
        }
        // Both parts keep the global order of their chunks.
        int left = begin, right = begin + window;
        for (int i = 0; i < count; ++i) {
            const int from_window = i - at < 0 ? i - at + count : i - at;
            (from_window < window ? scratch_[left++] : scratch_[right++]) = order_[begin + i];
        }
        std::copy(scratch_.begin() + begin, scratch_.begin() + end, order_.begin() + begin);
        split(begin, begin + window, first_rank, left_ranks);
        split(begin + window, end, first_rank + left_ranks, num_ranks - left_ranks);
    }

    const Grid& grid_;
    const CostModel& cost_;
    std::vector<int64_t> area_, link_;
    std::vector<int> order_, scratch_;
    std::vector<int64_t> prefix_;
    std::vector<int> rank_of_;
};

}  // namespace

Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost) {
    return table_of(Bisection(demand, q_grid, cost).run(), q_grid);
}

Ownership assign_min_heap(const Demand& demand, const Grid& q_grid) {
    std::vector<int> order(q_grid.num_chunks()), rank_of(q_grid.num_chunks()), used(q_grid.world, 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return demand.area[a] > demand.area[b]; });
    using Load = std::pair<int64_t, int>;
    std::priority_queue<Load, std::vector<Load>, std::greater<>> lightest;
    for (int r = 0; r < q_grid.world; ++r) lightest.push({0, r});
    for (const int c : order) {
        const auto [load, r] = lightest.top();
        lightest.pop();
        rank_of[c] = r;
        if (++used[r] < q_grid.slots) lightest.push({load + demand.area[c], r});
    }
    return table_of(rank_of, q_grid);
}

}  // namespace magi::plan
