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

namespace {

// Builds the stages of one pass, receiver after receiver.
class Scheduler {
  public:
    Scheduler(Pass pass, int num_stages, int world, int rank, const CostModel& cost)
        : pass_(pass), world_(world), rank_(rank), cost_(cost), ends_(num_stages) {
        out_.stages.resize(num_stages);
        for (StageTables& stage : out_.stages) stage.splits.assign(2 * static_cast<size_t>(world), 0);
        out_.rows.assign(static_cast<size_t>(world) * num_stages, 0);
    }

    // `arriving` are a receiver's remote rows in global order, each at its offset in its owner's memory.
    void add(int receiver, std::span<const Segment> arriving, int64_t remote, const Needs& needs) {
        divide(pass_, remote, needs.own[receiver], needs.area[receiver] - needs.own[receiver], cost_, ends_);
        int stage = 0;
        int64_t seen = 0;
        for (Segment piece : arriving) {
            while (piece.begin < piece.end) {
                while (seen >= ends_[stage]) ++stage;
                const int rows = static_cast<int>(std::min<int64_t>(ends_[stage] - seen, piece.end - piece.begin));
                StageTables& tables = out_.stages[stage];
                out_.rows[receiver * ends_.size() + stage] += rows;
                if (piece.source == rank_) {
                    tables.splits[receiver] += rows;
                    if (!tables.send.empty() && tables.send.back().end == piece.offset) {
                        tables.send.back().end += rows;
                    } else {
                        tables.send.push_back({piece.offset, piece.offset + rows});
                    }
                }
                if (receiver == rank_) {
                    tables.splits[world_ + piece.source] += rows;
                    segments_.push_back({piece.begin, piece.begin + rows, piece.source, stage, 0});
                }
                piece.begin += rows;
                piece.offset += rows;
                seen += rows;
            }
        }
    }

    Schedule finish(std::span<const Slice> pieces) {
        // A stage's key buffer holds the rows by source rank, each source's rows ascending.
        const int num_stages = static_cast<int>(out_.stages.size());
        std::vector<std::vector<int>> free(num_stages, std::vector<int>(world_, 0));
        for (int s = 0; s < num_stages; ++s) {
            const std::vector<int64_t>& splits = out_.stages[s].splits;
            std::exclusive_scan(splits.begin() + world_, splits.end(), free[s].begin(), 0);
        }
        for (Segment& segment : segments_) {
            int& next = free[segment.buffer][segment.source];
            segment.offset = next;
            next += segment.end - segment.begin;
        }
        std::vector<std::vector<Slice>> placed = place(pieces, segments_, num_stages);
        for (int s = 0; s < num_stages; ++s) out_.stages[s].slices = std::move(placed[s]);
        return std::move(out_);
    }

  private:
    Pass pass_;
    int world_, rank_;
    const CostModel& cost_;
    std::vector<int64_t> ends_;
    std::vector<Segment> segments_;  // of this rank, in global order
    Schedule out_;
};

}  // namespace

Tables make_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                   std::span<const int> k_chunks, int rank, StageCounts counts, const CostModel& cost) {
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

    Scheduler forward(Pass::kForward, counts.forward, world, rank, cost);
    Scheduler backward(Pass::kBackward, counts.backward, world, rank, cost);
    std::vector<Segment> arriving, own;
    for (int receiver = 0; receiver < world; ++receiver) {
        arriving.clear();
        int64_t remote = 0;
        for_each_owned(needs.of(receiver), k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank != receiver) {
                remote += end - begin;
                arriving.push_back({begin, end, run.rank, 0, run.local + begin - run.begin});
            } else if (receiver == rank) {
                own.push_back({begin, end, run.rank, 0, run.local + begin - run.begin});
            }
        });
        out.ranks[receiver] = {needs.area[receiver], remote};
        forward.add(receiver, arriving, remote, needs);
        backward.add(receiver, arriving, remote, needs);
    }
    out.slices = std::move(place(needs.pieces, own, 1)[0]);
    out.forward = forward.finish(needs.pieces);
    out.backward = backward.finish(needs.pieces);
    return out;
}

}  // namespace magi::plan
