#include "plan/ownership.h"

#include <algorithm>

namespace magi::plan {

void measure(Share& share, const Demand& demand, const Grid& grid, const CostModel& cost) {
    share.keys.clear();
    share.area = share.remote = 0;
    for (const int c : share.chunks) {
        if (c >= grid.num_chunks()) break;
        share.area += demand.area[c];
        const std::span<const Range> needs = demand.of(c);
        share.keys.insert(share.keys.end(), needs.begin(), needs.end());
    }
    share.keys.resize(merge_ranges(share.keys));
    for (const Range& r : share.keys) share.remote += demand.rows(r.begin, r.end);
    // What of it the rank owns, in every mask's copy of the keys.
    size_t at = 0;
    for (size_t m = 0; demand.shared && m < demand.weights.size(); ++m) {
        const int shift = static_cast<int>(m) * demand.span;
        for (const int c : share.chunks) {
            if (c >= grid.num_chunks()) break;
            const Range rows = grid.rows(c);
            const int begin = rows.begin + shift, end = rows.end + shift;
            while (at < share.keys.size() && share.keys[at].end <= begin) ++at;
            for (size_t i = at; i < share.keys.size() && share.keys[i].begin < end; ++i) {
                share.remote -= demand.rows(std::max(share.keys[i].begin, begin), std::min(share.keys[i].end, end));
            }
        }
    }
    share.time = cost.rank_time(share.area, share.remote);
}

Ownership assign_chunks(const Demand& demand, const Grid& q_grid, const CostModel& cost) {
    std::vector<Share> shares = bisect(demand, q_grid, cost);
    for (Share& share : shares) measure(share, demand, q_grid, cost);
    exchange(shares, demand, q_grid, cost);
    search(shares, demand, q_grid, cost);
    Ownership chunks;
    chunks.reserve(q_grid.num_slots());
    for (const Share& share : shares) {
        for (const int c : share.chunks) chunks.push_back(c < q_grid.num_chunks() ? c : -1);
    }
    return chunks;
}

Ownership assign_keys(const Demand& demand, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid) {
    // Merged needs of every rank, then rows of each key chunk that each rank needs.
    struct Use {
        double rows;
        int chunk, rank;
    };
    std::vector<Use> uses;
    for (int r = 0; r < q_grid.world; ++r) {
        std::vector<Range> keys;
        for (const int c : q_chunks.subspan(static_cast<size_t>(r) * q_grid.slots, q_grid.slots)) {
            if (c >= 0) keys.insert(keys.end(), demand.of(c).begin(), demand.of(c).end());
        }
        keys.resize(merge_ranges(keys));
        const size_t first = uses.size();
        for (const Range& need : keys) {
            const int shift = need.begin / demand.span * demand.span;
            for (int row = need.begin - shift; row < need.end - shift;) {
                const int c = row / k_grid.chunk, stop = std::min(need.end - shift, k_grid.rows(c).end);
                const double rows = demand.rows(row + shift, stop + shift);
                if (uses.size() > first && uses.back().chunk == c) {
                    uses.back().rows += rows;
                } else {
                    uses.push_back({rows, c, r});
                }
                row = stop;
            }
        }
    }
    // Where an owner needs what it owns, nothing is sent to it: most rows first. Of equals, the rank with most room,
    // then order.
    std::stable_sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.rows > b.rows; });
    std::vector<int> owner(k_grid.num_chunks(), -1), room(k_grid.world, k_grid.slots);
    for (const Use& use : uses) {
        if (owner[use.chunk] < 0 && room[use.rank] > 0) {
            owner[use.chunk] = use.rank;
            --room[use.rank];
        }
    }
    Ownership chunks(k_grid.num_slots(), -1);
    std::vector<int> used(k_grid.world, 0);
    int spare = 0;
    for (int c = 0; c < k_grid.num_chunks(); ++c) {
        if (owner[c] < 0) {
            while (room[spare] == 0) ++spare;
            owner[c] = spare;
            --room[spare];
        }
        chunks[static_cast<size_t>(owner[c]) * k_grid.slots + used[owner[c]]++] = c;
    }
    return chunks;
}

}  // namespace magi::plan
