// Does the backward's work ever wait for what was handed out later? Its order of work, of visits and of finished rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "kernels/ffa_bwd.cuh"
#include "masks.h"

namespace magi {
namespace {

TEST(BackwardOrder, RowsAreFinishedOnceByWorkAfterTheirTiles) {
    std::mt19937 random(1);
    for (int round = 0; round < 2000; ++round) {
        const auto draw = [&](int most) { return 1 + static_cast<int>(random() % most); };
        const int tiles = draw(40), heads = draw(30), section = draw(heads), blocks = draw(200);
        const FinishRing ring = finish_ring(tiles, section, heads, draw(132));
        const Sections sections = sections_of(tiles, section, heads, ring.lag);
        EXPECT_TRUE(sections.last_head % section == 0 && sections.last_head < heads);
        const int work = tiles * heads, share = ceil_div(blocks, tiles);
        std::vector<int> handed_out(heads), seen(work), finished(heads, work);  // the last of a head's work items
        for (int n = 0; n < work; ++n) {
            const WorkItem x = work_item(n, tiles, sections, heads);
            ++seen.at(x.kv_head * tiles + x.tile);
            handed_out[x.kv_head] = n;
        }
        EXPECT_EQ(seen, std::vector<int>(work, 1));
        int done = 0;
        for (int n = 0; n < work; ++n) {
            EXPECT_EQ(blocks_before(n, ring.lag, tiles, blocks, share), done);
            for (const int end = blocks_before(n + 1, ring.lag, tiles, blocks, share); done < end; ++done) {
                EXPECT_LT(handed_out.at(done / blocks), n);
                finished[done / blocks] = n;
            }
            const int before = work_item(n, tiles, sections, heads).kv_head - ring.heads;  // who had the slot
            if (before < 0) continue;
            EXPECT_LT(finished[before], n);
            EXPECT_GE(done, (before + 1) * blocks);
        }
        EXPECT_LE(done, heads * blocks);  // the rest is handed out block by block
    }
}

struct Worker {
    int tile = 0, kv_head = 0, next = 0;  // of the tile's visits
    bool busy = false;
};

// Blocks of rows that a tile of keys visits: the slices from the last to the first, each from its last row down.
std::vector<int> walk(const std::vector<Slice>& slices, int num_q, int num_k, int tile, int rows) {
    std::vector<int> out;
    for (size_t i = slices.size(); i-- > 0;) {
        const Range seen = tile_columns(table_slice(slices[i], num_q, num_k, true), tile * kBackwardKeys,
                                        std::min((tile + 1) * kBackwardKeys, num_k));
        for (int block = num_q / rows; block >= 0; --block)
            if (visits_block(seen, block, rows)) out.push_back(block);
    }
    return out;
}

TEST(BackwardOrder, TurnsComeWithAnyWalkAndAnyNumberOfBlocks) {
    for (unsigned seed = 0; seed < 60; ++seed) {
        std::mt19937 random(seed);
        const int num_q = 100 + random() % 1500, num_k = 100 + random() % 1500, rows = seed % 2 ? 64 : 80;
        const int heads = 1 + random() % 5;
        const std::vector<Slice> slices = plan::random_bands(num_q, num_k, seed);
        const int tiles = ceil_div(num_k, kBackwardKeys), blocks = num_q / rows + 1, work = tiles * heads;
        const Sections sections = sections_of(tiles, 1 + random() % heads, heads, random() % (2 * work));
        std::vector<std::vector<int>> visits(tiles), order(tiles);
        std::vector<int> before(blocks);
        for (int t = 0; t < tiles; ++t) {
            visits[t] = walk(slices, num_q, num_k, t, rows);
            if (seed % 3 == 0) std::shuffle(visits[t].begin(), visits[t].end(), random);
            for (const int block : visits[t]) order[t].push_back(before[block]);
            for (const int block : visits[t]) ++before[block];
        }
        std::vector<Worker> workers(1 + random() % 9);
        std::vector<std::vector<std::vector<int>>> added(heads, std::vector<std::vector<int>>(blocks));  // by tiles
        int next_work = 0;
        for (;;) {
            std::vector<Worker*> able;
            bool busy = false;
            for (Worker& w : workers) {
                while (!w.busy && next_work < work) {
                    const WorkItem x = work_item(next_work++, tiles, sections, heads);
                    w = {x.tile, x.kv_head, 0, !visits[x.tile].empty()};
                }
                busy |= w.busy;
                if (!w.busy) continue;
                const size_t turn = added[w.kv_head][visits[w.tile][w.next]].size();
                if (turn >= static_cast<size_t>(order[w.tile][w.next])) able.push_back(&w);
            }
            if (!busy) break;
            ASSERT_FALSE(able.empty()) << "everybody waits, seed " << seed;
            Worker& w = *able[random() % able.size()];
            added[w.kv_head][visits[w.tile][w.next]].push_back(w.tile);
            w.busy = ++w.next < static_cast<int>(visits[w.tile].size());
        }
        for (const auto& head : added) {
            for (int block = 0; block < blocks; ++block) {
                EXPECT_EQ(static_cast<int>(head[block].size()), before[block]);
                EXPECT_TRUE(std::is_sorted(head[block].begin(), head[block].end()));
            }
        }
    }
}

}  // namespace
}  // namespace magi
