#include "plan/tables.h"

#include <algorithm>
#include <numeric>

#include "plan/pieces.h"

namespace magi::plan {

int64_t StageTables::num_send() const {
    return std::accumulate(splits.begin(), splits.begin() + static_cast<std::ptrdiff_t>(splits.size() / 2), int64_t{0});
}
int64_t StageTables::num_recv() const {
    return std::accumulate(splits.begin() + static_cast<std::ptrdiff_t>(splits.size() / 2), splits.end(), int64_t{0});
}

Tables make_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                   std::span<const int> k_chunks, int rank, int num_stages, const CostModel& cost) {
    const int world = q_grid.world;
    const Runs q_runs = runs_of(q_grid, q_chunks), k_runs = runs_of(k_grid, k_chunks);
    const Needs needs = needs_of(slices, q_grid, q_runs, k_runs, rank);

    Tables out;
    const auto ranges_of = [](std::span<const Range> ranges) {
        return std::vector<Range>(ranges.begin(), ranges.end());
    };
    out.q_ranges = ranges_of(RunsByRank(q_runs, world).of(rank));
    out.k_ranges = ranges_of(RunsByRank(k_runs, world).of(rank));
    out.ranks.resize(world);
    out.stage_rows.assign(static_cast<size_t>(world) * num_stages, 0);
    out.stages.resize(num_stages);
    for (StageTables& stage : out.stages) stage.splits.assign(2 * static_cast<size_t>(world), 0);

    std::vector<Segment> segments;  // of this rank, in global order
    std::vector<Segment> arriving;  // of one receiver
    std::vector<int64_t> ends(num_stages);
    for (int receiver = 0; receiver < world; ++receiver) {
        arriving.clear();
        int64_t remote = 0;
        for_each_owned(needs.of(receiver), k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank != receiver) remote += end - begin;
            // Of the others' own rows nothing moves; of this rank's, the slices below need the place.
            if (run.rank != receiver || receiver == rank) {
                arriving.push_back({begin, end, run.rank, 0, run.local + begin - run.begin});
            }
        });
        out.ranks[receiver] = {needs.area[receiver], remote};

        divide(remote, needs.own[receiver], needs.area[receiver] - needs.own[receiver], cost, ends);
        int stage = 0;
        int64_t seen = 0;
        for (Segment piece : arriving) {
            if (piece.source == receiver) {
                segments.push_back(piece);
                continue;
            }
            while (piece.begin < piece.end) {
                while (seen >= ends[stage]) ++stage;
                const int rows = static_cast<int>(std::min<int64_t>(ends[stage] - seen, piece.end - piece.begin));
                StageTables& tables = out.stages[stage];
                out.stage_rows[static_cast<size_t>(receiver) * num_stages + stage] += rows;
                if (piece.source == rank) {
                    tables.splits[receiver] += rows;
                    if (!tables.send.empty() && tables.send.back().end == piece.offset) {
                        tables.send.back().end += rows;
                    } else {
                        tables.send.push_back({piece.offset, piece.offset + rows});
                    }
                }
                if (receiver == rank) {
                    tables.splits[world + piece.source] += rows;
                    segments.push_back({piece.begin, piece.begin + rows, piece.source, 1 + stage, 0});
                }
                piece.begin += rows;
                piece.offset += rows;
                seen += rows;
            }
        }
    }

    // A stage's key buffer holds the rows by source rank, each source's rows ascending.
    std::vector<std::vector<int>> free(num_stages, std::vector<int>(world, 0));
    for (int s = 0; s < num_stages; ++s) {
        std::exclusive_scan(out.stages[s].splits.begin() + world, out.stages[s].splits.end(), free[s].begin(), 0);
    }
    for (Segment& segment : segments) {
        if (segment.buffer == 0) continue;
        int& next = free[segment.buffer - 1][segment.source];
        segment.offset = next;
        next += segment.end - segment.begin;
    }

    std::vector<std::vector<Slice>> placed = place(needs.pieces, segments, num_stages);
    out.slices = std::move(placed[0]);
    for (int s = 0; s < num_stages; ++s) out.stages[s].slices = std::move(placed[1 + s]);
    return out;
}

}  // namespace magi::plan
