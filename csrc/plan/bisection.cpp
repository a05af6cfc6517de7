#include <algorithm>
#include <limits>
#include <numeric>

#include "plan/ownership.h"

namespace magi::plan {
namespace {

double shared_rows(const Demand& demand, int first, int second) {
    const std::span<const Range> a = demand.of(first), b = demand.of(second);
    double rows = 0;
    for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
        rows += demand.rows(std::max(a[i].begin, b[j].begin), std::min(a[i].end, b[j].end));
        a[i].end < b[j].end ? ++i : ++j;
    }
    return rows;
}

// Halves a list of chunks again and again: a window of the list for one half of the ranks, the rest for the other half.
// On the circle of all windows of the right length there is always one with just its share of the area (necklace
// splitting; Goldberg and West, 1985), so every rank ends with a few contiguous runs: documents stay whole, windows go
// contiguous, causal goes zigzag. Of the windows that balance, the one that tears the least apart wins.
class Bisection {
  public:
    Bisection(const Demand& demand, const Grid& grid, const CostModel& cost)
        : grid_(grid),
          cost_(cost),
          area_(grid.num_slots(), 0),
          link_(grid.num_slots(), 0),
          order_(grid.num_slots()),
          scratch_(grid.num_slots()),
          prefix_(2 * grid.num_slots() + 1),
          rank_of_(grid.num_slots(), 0) {
        std::copy(demand.area.begin(), demand.area.end(), area_.begin());
        for (int c = 1; c < grid.num_chunks(); ++c) link_[c] = shared_rows(demand, c - 1, c);
        std::iota(order_.begin(), order_.end(), 0);
        fair_share_ = std::accumulate(area_.begin(), area_.end(), 0.0) / grid.world;
    }

    std::vector<Share> run() {
        split(0, grid_.num_slots(), 0, grid_.world);
        std::vector<Share> shares(grid_.world);
        for (Share& share : shares) share.chunks.reserve(grid_.slots);
        for (int c = 0; c < grid_.num_slots(); ++c) shares[rank_of_[c]].chunks.push_back(c);
        return shares;
    }

  private:
    // Rows that two neighbours of the list both need: what tearing them apart sends twice.
    double tear(int begin, int count, int at) const {
        if (at == 0 || at == count) return 0;
        const int left = order_[begin + at - 1], right = order_[begin + at];
        return right == left + 1 ? link_[right] : 0;
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
        const double total = prefix_[count];
        for (int i = 1; i <= window; ++i) prefix_[count + i] = total + prefix_[i];
        const double fair = std::max(fair_share_, total / num_ranks);
        const double per_left = cost_.cell / left_ranks, per_right = cost_.cell / right_ranks;
        double best = std::numeric_limits<double>::infinity();
        int at = 0;
        for (int i = 0; i < count; ++i) {
            const double inside = prefix_[i + window] - prefix_[i];
            const double busier = std::max(inside * per_left, (total - inside) * per_right);
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
    std::vector<double> area_, link_;
    std::vector<int> order_, scratch_;
    std::vector<double> prefix_;
    std::vector<int> rank_of_;
    double fair_share_ = 0;
};

}  // namespace

std::vector<Share> bisect(const Demand& demand, const Grid& grid, const CostModel& cost) {
    return Bisection(demand, grid, cost).run();
}

}  // namespace magi::plan
