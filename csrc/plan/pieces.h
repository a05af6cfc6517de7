// The parts that every kind of table is made of: what ranks need, how it divides into stages, where slices land in key
// buffers.
#pragma once

#include "plan/cost.h"
#include "plan/grid.h"

namespace magi::plan {

// The row ranges of every rank, ascending.
class RunsByRank {
  public:
    RunsByRank(const Runs& runs, int world);
    std::span<const Range> of(int rank) const {
        return {ranges_.data() + offset_[rank], ranges_.data() + offset_[rank + 1]};
    }

  private:
    std::vector<int> offset_;
    std::vector<Range> ranges_;
};

// Needed key ranges of every rank, merged, in one flat table; and the pieces of the mask that one rank computes.
struct Needs {
    std::vector<int> offset;  // [world + 1]
    std::vector<Range> ranges;
    std::vector<int64_t> area;  // [world]
    std::vector<int64_t> own;   // [world] the part of it that needs only own keys
    std::vector<Slice> pieces;  // of the one rank: local query rows x global keys

    std::span<const Range> of(int rank) const {
        return {ranges.data() + offset[rank], ranges.data() + offset[rank + 1]};
    }
};

Needs needs_of(Slices slices, const Grid& grid, const Runs& q_runs, const Runs& k_runs, int rank);

// Global key rows that sit together in one key buffer: buffer 0 is what the rank owns, 1 + s is stage s.
struct Segment {
    int begin, end, source, buffer, offset;
};

// Slices of the pieces in every key buffer, those of the own rows first. `segments` ascend and cover all that the
// pieces need.
std::vector<std::vector<Slice>> place(std::span<const Slice> pieces, std::span<const Segment> segments, int num_stages);

// Where each stage of a receiver ends, counted in its remote rows. Were every row as much work as any other, stages in
// a ratio of g would hide the communication of each behind the compute of the one before; the best of a few g is taken.
void divide(int64_t remote, int64_t own_area, int64_t remote_area, const CostModel& cost, std::span<int64_t> ends);

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
