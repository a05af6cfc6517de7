#include "plan/tables.h"

#include <algorithm>
#include <numeric>

#include "plan/pieces.h"

namespace magi::plan {

int64_t Transfer::num_send() const {
    return std::accumulate(splits.begin(), splits.begin() + static_cast<std::ptrdiff_t>(splits.size() / 2), int64_t{0});
}
int64_t Transfer::num_recv() const {
    return std::accumulate(splits.begin() + static_cast<std::ptrdiff_t>(splits.size() / 2), splits.end(), int64_t{0});
}

namespace {

// Takes note of the next rows that travel from a rank to another one, as one of the two sees it.
void append(Transfer& transfer, int rank, int world, int source, int receiver, Range local) {
    const int rows = local.end - local.begin;
    if (source == rank) {
        transfer.splits[receiver] += rows;
        if (!transfer.send.empty() && transfer.send.back().end == local.begin) {
            transfer.send.back().end = local.end;
        } else {
            transfer.send.push_back(local);
        }
    }
    if (receiver == rank) transfer.splits[world + source] += rows;
}

// Where the segments of one buffer lie: by source rank, each source's rows ascending.
void set_offsets(std::vector<Segment>& segments, int buffer, const Transfer& transfer, int world) {
    std::vector<int> next(world);
    std::exclusive_scan(transfer.splits.begin() + world, transfer.splits.end(), next.begin(), 0);
    for (Segment& segment : segments) {
        if (segment.buffer != buffer) continue;
        segment.offset = next[segment.source];
        next[segment.source] += segment.end - segment.begin;
    }
}

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
                out_.rows[receiver * ends_.size() + stage] += rows;
                append(out_.stages[stage], rank_, world_, piece.source, receiver, {piece.offset, piece.offset + rows});
                if (receiver == rank_) {
                    segments_.push_back({piece.begin, piece.begin + rows, piece.source, stage, 0});
                }
                piece.begin += rows;
                piece.offset += rows;
                seen += rows;
            }
        }
    }

    // `pieces` of own rows, `guests` of the rows that visit.
    Schedule finish(std::span<const Slice> pieces, std::span<const Slice> guests) {
        const int num_stages = static_cast<int>(out_.stages.size());
        for (int s = 0; s < num_stages; ++s) set_offsets(segments_, s, out_.stages[s], world_);
        std::vector<std::vector<Slice>> placed = place(pieces, segments_, num_stages);
        for (int s = 0; s < num_stages; ++s) out_.stages[s].slices = std::move(placed[s]);
        placed = place(guests, segments_, num_stages);
        for (int s = 0; s < num_stages; ++s) out_.stages[s].guest_slices = std::move(placed[s]);
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

Tables make_tables(Slices slices, const Moves& moves, const Grid& q_grid, std::span<const int> q_chunks,
                   const Grid& k_grid, std::span<const int> k_chunks, int rank, StageCounts counts,
                   const CostModel& cost) {
    const int world = q_grid.world;
    const Runs q_runs = runs_of(q_grid, q_chunks), k_runs = runs_of(k_grid, k_chunks);
    const Needs needs = needs_of(slices, moves, q_grid, q_runs, k_runs, rank);

    Tables out;
    const auto ranges_of = [](std::span<const Range> ranges) {
        return std::vector<Range>(ranges.begin(), ranges.end());
    };
    out.q_ranges = ranges_of(owned_by_rank(q_runs, world).of(rank));
    out.k_ranges = ranges_of(owned_by_rank(k_runs, world).of(rank));
    out.ranks.resize(world);

    out.guests.splits.assign(2 * static_cast<size_t>(world), 0);
    std::vector<Segment> visits;
    for (int receiver = 0; receiver < world; ++receiver) {
        for_each_owned(needs.guests.of(receiver), q_runs, [&](int begin, int end, const Run& run) {
            const int first = run.local + begin - run.begin;
            append(out.guests, rank, world, run.rank, receiver, {first, first + end - begin});
            out.ranks[receiver].guests += end - begin;
            out.ranks[run.rank].returned += end - begin;
            if (receiver == rank) visits.push_back({begin, end, run.rank, 0, 0});
        });
    }
    set_offsets(visits, 0, out.guests, world);
    const std::vector<Slice> guests = place_rows(needs.guest_pieces, visits);

    Scheduler forward(Pass::kForward, counts.forward, world, rank, cost);
    Scheduler backward(Pass::kBackward, counts.backward, world, rank, cost);
    std::vector<Segment> arriving, own;
    for (int receiver = 0; receiver < world; ++receiver) {
        arriving.clear();
        int64_t remote = 0;
        for_each_owned(needs.keys.of(receiver), k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank != receiver) {
                remote += end - begin;
                arriving.push_back({begin, end, run.rank, 0, run.local + begin - run.begin});
            } else if (receiver == rank) {
                own.push_back({begin, end, run.rank, 0, run.local + begin - run.begin});
            }
        });
        out.ranks[receiver].area = needs.area[receiver];
        out.ranks[receiver].remote = remote;
        forward.add(receiver, arriving, remote, needs);
        backward.add(receiver, arriving, remote, needs);
    }
    out.slices = std::move(place(needs.pieces, own, 1)[0]);
    out.guest_slices = std::move(place(guests, own, 1)[0]);
    out.forward = forward.finish(needs.pieces, guests);
    out.backward = backward.finish(needs.pieces, guests);
    return out;
}

}  // namespace magi::plan
