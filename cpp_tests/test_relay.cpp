// With nodes: each allowed cell still computed once, each row crosses to a node at most once, and only where it is
// needed there.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "masks.h"
#include "plan/ownership.h"
#include "plan/relay.h"

namespace magi::plan {
namespace {

constexpr CostModel kCost{2.7e-11, 1.1e-8, 1e-6, 0.05, 0.1, 0.01};

void check_relay(const std::vector<Slice>& mask, const Grid& grid, const Ownership& chunks, int node_size,
                 StageCounts counts, RelaySchedule RelayTables::*pass) {
    const int world = grid.world;
    const Runs runs = runs_of(grid, chunks);
    std::vector<std::vector<int>> local(world,
                                        std::vector<int>(grid.slots * grid.chunk, -1));  // global row of each local one
    std::vector<int> owner(grid.total);
    for (const Run& run : runs.runs) {
        for (int row = run.begin; row < run.end; ++row) {
            local[run.rank][run.local + row - run.begin] = row;
            owner[row] = run.rank;
        }
    }
    std::vector<std::vector<int>> expected(grid.total, std::vector<int>(grid.total, 0)), computed(expected);
    for (const Slice& s : mask) {
        for (int q = s.q0; q < s.q1; ++q) {
            for (int k = s.k0; k < s.k1; ++k) expected[q][k] += in_band(s, q, k);
        }
    }
    std::vector<RelayTables> tables;
    for (int r = 0; r < world; ++r)
        tables.push_back(make_relay_tables(mask, grid, chunks, grid, chunks, r, node_size, counts, kCost));
    const int stages = static_cast<int>((tables[0].*pass).stages.size());
    const auto compute = [&](int rank, const std::vector<Slice>& slices, const std::vector<int>& keys) {
        for (const Slice& s : slices) {
            for (int q = s.q0; q < s.q1; ++q) {
                for (int k = s.k0; k < s.k1; ++k) {
                    if (in_band(s, q, k)) ++computed.at(local[rank].at(q)).at(keys.at(k));
                }
            }
        }
    };
    // What an exchange within groups delivers, from the senders' tables alone.
    const auto deliver = [&](const std::vector<std::vector<int>>& held, int members, auto group_of, auto index_in,
                             auto ranges_of, auto splits_of) {
        std::vector<std::vector<int>> received(world);
        for (int to = 0; to < world; ++to) {
            for (int from = 0; from < world; ++from) {
                if (group_of(from) != group_of(to)) continue;
                const std::vector<int64_t>& splits = splits_of(from);
                const int at = index_in(to);
                EXPECT_EQ(static_cast<int>(splits.size()), 2 * members);
                EXPECT_EQ(splits[at], splits_of(to)[members + index_in(from)]);
                std::vector<int> sent;
                for (const Range& r : ranges_of(from)) {
                    for (int row = r.begin; row < r.end; ++row) sent.push_back(held[from].at(row));
                }
                EXPECT_EQ(static_cast<int64_t>(sent.size()),
                          std::accumulate(splits.begin(), splits.begin() + members, int64_t{0}));
                const int64_t first = std::accumulate(splits.begin(), splits.begin() + at, int64_t{0});
                received[to].insert(received[to].end(), sent.begin() + first, sent.begin() + first + splits[at]);
            }
        }
        return received;
    };
    const auto node_of = [&](int r) { return r / node_size; };
    const auto place_of = [&](int r) { return r % node_size; };

    std::map<std::pair<int, int>, int> crossings;  // (row, node)
    for (int r = 0; r < world; ++r) compute(r, tables[r].slices, local[r]);
    for (int s = 0; s < stages; ++s) {
        const auto relayed = deliver(
            local, world / node_size, place_of, node_of,
            [&](int r) -> const auto& { return (tables[r].*pass).stages[s].relay_send; },
            [&](int r) -> const auto& { return (tables[r].*pass).stages[s].relay_splits; });
        std::vector<std::vector<int>> held(local);
        for (int r = 0; r < world; ++r) {
            for (const int row : relayed[r]) {
                ++crossings[{row, r / node_size}];
                ASSERT_EQ(owner[row] % node_size, r % node_size);
                ASSERT_NE(owner[row] / node_size, r / node_size);
                held[r].push_back(row);
            }
        }
        if (s < first_crossing(stages)) {
            for (int r = 0; r < world; ++r) ASSERT_TRUE(relayed[r].empty());
        }
        const auto buffers = deliver(
            held, node_size, node_of, place_of, [&](int r) -> const auto& { return (tables[r].*pass).stages[s].send; },
            [&](int r) -> const auto& { return (tables[r].*pass).stages[s].splits; });
        for (int r = 0; r < world; ++r) {
            ASSERT_EQ((tables[0].*pass).rows[r * stages + s], static_cast<int64_t>(buffers[r].size()));
            compute(r, (tables[r].*pass).stages[s].slices, buffers[r]);
        }
    }
    ASSERT_EQ(computed, expected);

    std::map<std::pair<int, int>, int> needed;
    for (int q = 0; q < grid.total; ++q) {
        for (int k = 0; k < grid.total; ++k) {
            const int node = owner[q] / node_size;
            if (expected[q][k] && owner[k] / node_size != node) needed[{k, node}] = 1;
        }
    }
    ASSERT_EQ(crossings, needed);
}

TEST(Relay, RowsCrossOncePerNode) {
    for (unsigned seed = 0; seed < 90; ++seed) {
        const int node_size = 1 + static_cast<int>(seed % 4), world = node_size * (1 + static_cast<int>(seed / 4 % 4));
        const int total = 20 + static_cast<int>(seed * 7 % 60), chunk = 1 + static_cast<int>(seed % 7);
        const Grid grid{total, chunk, world, (total + chunk * world - 1) / (chunk * world)};
        const std::vector<Slice> mask = random_bands(total, total, seed);
        const Ownership chunks = assign_chunks(demand_of(mask, grid, total), grid, kCost);
        const StageCounts counts{1 + static_cast<int>(seed % 3), 1 + static_cast<int>(seed % 4)};
        check_relay(mask, grid, chunks, node_size, counts, &RelayTables::forward);
        check_relay(mask, grid, chunks, node_size, counts, &RelayTables::backward);
    }
}

}  // namespace
}  // namespace magi::plan
