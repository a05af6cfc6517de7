// Each allowed cell is computed exactly once; each needed row is sent exactly once; all ranks agree.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "masks.h"
#include "plan/ownership.h"
#include "plan/tables.h"

namespace magi::plan {
namespace {

constexpr CostModel kCost{2.7e-11, 1.1e-8, 1e-6, 0.05, 0.1, 0.01};

Grid grid_of(int total, int chunk, int world) {
    const int slots = std::max(1, (total + chunk * world - 1) / (chunk * world));
    return {total, chunk, world, slots};
}

Ownership dealt_round_robin(const Grid& grid) {
    Ownership out;
    for (int r = 0; r < grid.world; ++r) {
        for (int slot = 0; slot < grid.slots; ++slot) {
            const int c = slot * grid.world + r;
            out.push_back(c < grid.num_chunks() ? c : -1);
        }
    }
    return out;
}

std::vector<int> rows_of(const std::vector<Range>& ranges) {
    std::vector<int> out;
    for (const Range& r : ranges) {
        for (int row = r.begin; row < r.end; ++row) out.push_back(row);
    }
    return out;
}

using Cells = std::vector<std::vector<int>>;

void add(Cells& cells, const std::vector<Slice>& slices, const std::vector<int>& rows, const std::vector<int>& keys) {
    for (const Slice& s : slices) {
        for (int q = s.q0; q < s.q1; ++q) {
            for (int k = s.k0; k < s.k1; ++k) {
                if (in_band(s, q, k)) ++cells.at(rows.at(q)).at(keys.at(k));
            }
        }
    }
}

void check_pass(const std::vector<Tables>& tables, Schedule Tables::*pass, const Cells& expected) {
    const int world = static_cast<int>(tables.size());
    Cells computed(expected.size(), std::vector<int>(expected.empty() ? 0 : expected[0].size(), 0));
    for (int r = 0; r < world; ++r) {
        const Tables& mine = tables[r];
        const std::vector<StageTables>& stages = (mine.*pass).stages;
        const std::vector<int> rows = rows_of(mine.q_ranges), own = rows_of(mine.k_ranges);
        add(computed, mine.slices, rows, own);
        std::vector<int> received;
        for (size_t s = 0; s < stages.size(); ++s) {
            std::vector<int> buffer;
            for (int source = 0; source < world; ++source) {
                const StageTables& theirs = (tables[source].*pass).stages[s];
                const std::vector<int> sent = rows_of(theirs.send), home = rows_of(tables[source].k_ranges);
                ASSERT_EQ(static_cast<int64_t>(sent.size()), theirs.num_send());
                ASSERT_EQ(theirs.splits[r], stages[s].splits[world + source]);
                const int64_t first = std::accumulate(theirs.splits.begin(), theirs.splits.begin() + r, int64_t{0});
                for (int64_t i = first; i < first + theirs.splits[r]; ++i) buffer.push_back(home.at(sent.at(i)));
            }
            ASSERT_EQ(static_cast<int64_t>(buffer.size()), stages[s].num_recv());
            ASSERT_EQ((tables[0].*pass).rows[r * stages.size() + s], static_cast<int64_t>(buffer.size()));
            add(computed, stages[s].slices, rows, buffer);
            received.insert(received.end(), buffer.begin(), buffer.end());
        }
        std::vector<int> needed;
        for (int key = 0; expected.size() > 0 && key < static_cast<int>(expected[0].size()); ++key) {
            const bool wanted = std::any_of(rows.begin(), rows.end(), [&](int row) { return expected[row][key] > 0; });
            if (wanted && std::find(own.begin(), own.end(), key) == own.end()) needed.push_back(key);
        }
        std::sort(received.begin(), received.end());
        ASSERT_EQ(received, needed);
        for (int other = 0; other < world; ++other) {
            ASSERT_EQ(tables[other].ranks[r].remote, static_cast<int64_t>(needed.size()));
        }
    }
    ASSERT_EQ(computed, expected);
}

void check_plan(const std::vector<Slice>& mask, const Grid& q_grid, const Ownership& q, const Grid& k_grid,
                const Ownership& k, int stages) {
    check_ownership(q_grid, q, "q");
    check_ownership(k_grid, k, "k");
    const int world = q_grid.world;
    std::vector<int> all_q(q_grid.total), all_k(k_grid.total);
    std::iota(all_q.begin(), all_q.end(), 0);
    std::iota(all_k.begin(), all_k.end(), 0);
    Cells expected(q_grid.total, std::vector<int>(k_grid.total, 0));
    add(expected, mask, all_q, all_k);

    std::vector<Tables> tables;
    const StageCounts counts{stages, stages % 3 + 1};
    for (int r = 0; r < world; ++r)
        tables.push_back(make_tables(mask, Moves(), q_grid, q, k_grid, k, r, counts, kCost));
    check_pass(tables, &Tables::forward, expected);
    check_pass(tables, &Tables::backward, expected);
}

TEST(Tables, EveryCellOnceOnRandomMasks) {
    for (unsigned seed = 0; seed < 150; ++seed) {
        const int total = 20 + static_cast<int>(seed * 7 % 70), world = 1 + static_cast<int>(seed % 16);
        const Grid grid = grid_of(total, 1 + static_cast<int>(seed % 9), world);
        const std::vector<Slice> mask = random_bands(total, total, seed);
        const Demand demand = demand_of(mask, grid, grid.total);
        for (const Ownership& chunks : {assign_chunks(demand, grid, kCost), dealt_round_robin(grid)}) {
            check_plan(mask, grid, chunks, grid, chunks, 1 + static_cast<int>(seed % 4));
        }
    }
}

TEST(Tables, QueriesAndKeysMayLiveApart) {
    for (unsigned seed = 0; seed < 40; ++seed) {
        const Grid q_grid = grid_of(60, 7, 4), k_grid = grid_of(35, 4, 4);
        const std::vector<Slice> mask = random_bands(60, 35, seed);
        const Demand demand = demand_of(mask, q_grid, k_grid.total);
        const Ownership q = assign_chunks(demand, q_grid, kCost);
        check_plan(mask, q_grid, q, k_grid, assign_keys(demand, q_grid, q, k_grid), 2);
    }
}

TEST(Tables, NeighbouringChunksMakeOneSlice) {
    const Grid grid = grid_of(1024, 16, 2);
    const std::vector<Slice> mask = {{0, 1024, 0, 1024, -63, 0}};
    Ownership chunks(64);
    std::iota(chunks.begin(), chunks.end(), 0);
    for (int r = 0; r < 2; ++r)
        EXPECT_EQ(make_tables(mask, Moves(), grid, chunks, grid, chunks, r, {1, 1}, kCost).slices.size(), 1u);
}

TEST(Ownership, BadTablesAreRefused) {
    const Grid grid = grid_of(40, 10, 2);
    EXPECT_NO_THROW(check_ownership(grid, Ownership{0, 3, 1, 2}, "chunks"));
    for (const Ownership& bad : {Ownership{0, 1, 2}, Ownership{0, 1, 2, 2}, Ownership{1, 0, 2, 3},
                                 Ownership{0, 1, 2, 4}, Ownership{0, 1, 2, -1}}) {
        EXPECT_THROW(check_ownership(grid, bad, "chunks"), std::invalid_argument);
    }
}

}  // namespace
}  // namespace magi::plan
