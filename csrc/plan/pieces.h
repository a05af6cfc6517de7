// The parts that every kind of table is made of: what ranks need, how it divides into stages, where slices land in key
// buffers.
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"
#include "plan/moves.h"

namespace magi::plan {

// Ranges of every rank, ascending and disjoint, in one flat table.
class RangesByRank {
  public:
    struct Entry {
        int rank;
        Range range;
    };
    RangesByRank(std::span<const Entry> entries, int world);
    std::span<const Range> of(int rank) const {
        return {ranges_.data() + offset_[rank], ranges_.data() + offset_[rank + 1]};
    }

  private:
    std::vector<int> offset_;
    std::vector<Range> ranges_;
};

// The rows that every rank owns.
RangesByRank owned_by_rank(const Runs& runs, int world);

// What every rank computes with, and the pieces of the mask that one rank computes.
struct Needs {
    RangesByRank keys;                // key rows
    RangesByRank guests;              // query rows that others own
    std::vector<int64_t> area;        // [world]
    std::vector<int64_t> own;         // [world] the part of it that needs only own rows and keys
    std::vector<Slice> pieces;        // of the one rank: local query rows x global keys
    std::vector<Slice> guest_pieces;  // of the one rank: global query rows of others x global keys
};

Needs needs_of(Slices slices, const Moves& moves, const Grid& grid, const Runs& q_runs, const Runs& k_runs, int rank);

// Global key rows that sit together in one key buffer.
struct Segment {
    int begin, end, source, buffer, offset;
};

// What of the pieces lies in each key buffer. `segments` ascend.
std::vector<std::vector<Slice>> place(std::span<const Slice> pieces, std::span<const Segment> segments,
                                      int num_buffers);

// The same for query rows: the pieces with their rows where the segments put them.
std::vector<Slice> place_rows(std::span<const Slice> pieces, std::span<const Segment> segments);

// Where each stage of a receiver ends, counted in its remote rows: of a few geometric series (which grow, shrink, or
// rise and fall) the one by which the pass would take the shortest, were every row as much work as any other.
void divide(Pass pass, int64_t remote, int64_t own_area, int64_t remote_area, const CostModel& cost,
            std::span<int64_t> ends);

// Calls visit(begin, end, run) for what each run holds of the ranges, in global order.
template <typename Visit>
void for_each_owned(std::span<const Range> ranges, const Runs& runs, Visit visit) {
    for (const Range& range : ranges) {
        for (size_t i = runs.first_reaching(range.begin); i < runs.runs.size() && runs.runs[i].begin < range.end; ++i) {
            const Run& run = runs.runs[i];
            visit(run.begin > range.begin ? run.begin : range.begin, run.end < range.end ? run.end : range.end, run);
        }
    }
}

}  // namespace magi::plan
