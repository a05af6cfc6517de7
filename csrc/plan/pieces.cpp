#include "plan/pieces.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

namespace magi::plan {
namespace {

// Bounds that cut nothing off are dropped, so that slices of one shape compare equal.
Slice normalized(Slice s) {
    if (s.lo <= s.k0 - (s.q1 - 1)) s.lo = kNoLo;
    if (s.hi >= s.k1 - 1 - s.q0) s.hi = kNoHi;
    return s;
}

bool same_band_within(const Slice& part, int lo, int hi) {
    const Slice a = normalized(part), b = normalized({part.q0, part.q1, part.k0, part.k1, lo, hi});
    return a.lo == b.lo && a.hi == b.hi;
}

// Joins b to a where together they are one slice: side by side, with one band that describes both.
bool join(Slice& a, const Slice& b) {
    const bool beside = a.q0 == b.q0 && a.q1 == b.q1 && a.k1 == b.k0;
    const bool below = a.k0 == b.k0 && a.k1 == b.k1 && a.q1 == b.q0;
    if (!beside && !below) return false;
    const int lo = std::max(a.lo, b.lo), hi = std::min(a.hi, b.hi);
    if (!same_band_within(a, lo, hi) || !same_band_within(b, lo, hi)) return false;
    a = {a.q0, b.q1, a.k0, b.k1, lo, hi};
    return true;
}

template <typename Key>
void join_sorted(std::vector<Slice>& slices, Key key) {
    std::sort(slices.begin(), slices.end(), [&](const Slice& a, const Slice& b) { return key(a) < key(b); });
    size_t count = 0;
    for (const Slice& s : slices) {
        if (count == 0 || !join(slices[count - 1], s)) slices[count++] = s;
    }
    slices.resize(count);
}

void simplify(std::vector<Slice>& slices) {
    for (Slice& s : slices) s = normalized(s);
    join_sorted(slices, [](const Slice& s) { return std::tuple(s.q0, s.q1, s.k0); });
    join_sorted(slices, [](const Slice& s) { return std::tuple(s.k0, s.k1, s.q0); });
    for (Slice& s : slices) s = normalized(hull(s));
    std::sort(slices.begin(), slices.end(), [](const Slice& a, const Slice& b) {
        return std::tuple(a.q0, a.k0, a.q1, a.k1, a.lo, a.hi) < std::tuple(b.q0, b.k0, b.q1, b.k1, b.lo, b.hi);
    });
}

}  // namespace

RangesByRank::RangesByRank(std::span<const Entry> entries, int world) : offset_(world + 1, 0), ranges_(entries.size()) {
    for (const Entry& entry : entries) ++offset_[entry.rank + 1];
    std::partial_sum(offset_.begin(), offset_.end(), offset_.begin());
    std::vector<int> cursor(offset_);
    for (const Entry& entry : entries) ranges_[cursor[entry.rank]++] = entry.range;
    int kept = 0;
    for (int r = 0; r < world; ++r) {
        const int begin = offset_[r], end = offset_[r + 1];
        const int merged = merge_ranges(std::span(ranges_).subspan(begin, end - begin));
        std::copy_n(ranges_.begin() + begin, merged, ranges_.begin() + kept);
        offset_[r] = kept;
        kept += merged;
    }
    offset_[world] = kept;
    ranges_.resize(kept);
}

RangesByRank owned_by_rank(const Runs& runs, int world) {
    std::vector<RangesByRank::Entry> entries;
    entries.reserve(runs.runs.size());
    for (const Run& run : runs.runs) entries.push_back({run.rank, {run.begin, run.end}});
    return {entries, world};
}

Needs needs_of(Slices slices, const Moves& moves, const Grid& grid, const Runs& q_runs, const Runs& k_runs, int rank) {
    const RangesByRank owned = owned_by_rank(k_runs, grid.world);
    std::vector<int64_t> areas(grid.world, 0), own_areas(grid.world, 0);
    std::vector<Slice> pieces, guest_pieces;
    std::vector<RangesByRank::Entry> keys_found, guests_found;  // in slice order
    keys_found.reserve(slices.size() + q_runs.runs.size());
    for (const Slice& s : slices) {
        if (s.q0 >= s.q1 || s.k0 >= s.k1 || s.lo > s.hi) continue;
        for (int i = q_runs.first_reaching(s.q0);
             i < static_cast<int>(q_runs.runs.size()) && q_runs.runs[i].begin < s.q1; ++i) {
            const Run& run = q_runs.runs[i];
            moves.split(crop(s, run.begin, run.end, s.k0, s.k1), run.rank, [&](const Slice& piece, int computer) {
                const Range keys = keys_of_rows(piece, piece.q0, piece.q1);
                if (keys.begin >= keys.end) return;
                areas[computer] += area(piece);
                keys_found.push_back({computer, keys});
                if (computer != run.rank) {
                    const Range rows = rows_of_keys(piece, piece.k0, piece.k1);
                    guests_found.push_back({computer, rows});
                    if (computer == rank) guest_pieces.push_back(piece);
                    return;
                }
                if (computer == rank) pieces.push_back(shift(piece, run.local - run.begin, 0));
                const std::span<const Range> own = owned.of(computer);
                auto home =
                    std::partition_point(own.begin(), own.end(), [&](const Range& r) { return r.end <= keys.begin; });
                for (; home != own.end() && home->begin < keys.end; ++home) {
                    own_areas[computer] += area(crop(piece, piece.q0, piece.q1, home->begin, home->end));
                }
            });
        }
    }
    return {{keys_found, grid.world}, {guests_found, grid.world}, std::move(areas),
            std::move(own_areas),     std::move(pieces),          std::move(guest_pieces)};
}

std::vector<std::vector<Slice>> place(std::span<const Slice> pieces, std::span<const Segment> segments,
                                      int num_buffers) {
    std::vector<std::vector<Slice>> buffers(num_buffers);
    for (const Slice& piece : pieces) {
        const Range keys = keys_of_rows(piece, piece.q0, piece.q1);
        auto segment = std::partition_point(segments.begin(), segments.end(),
                                            [&](const Segment& s) { return s.end <= keys.begin; });
        for (; segment != segments.end() && segment->begin < keys.end; ++segment) {
            const Slice cut = crop(piece, piece.q0, piece.q1, segment->begin, segment->end);
            const Slice tight = hull(cut);
            if (tight.q0 < tight.q1)
                buffers[segment->buffer].push_back(shift(cut, 0, segment->offset - segment->begin));
        }
    }
    for (std::vector<Slice>& slices : buffers) simplify(slices);
    return buffers;
}

std::vector<Slice> place_rows(std::span<const Slice> pieces, std::span<const Segment> segments) {
    std::vector<Slice> turned;
    turned.reserve(pieces.size());
    for (const Slice& piece : pieces) turned.push_back(transpose(piece));
    std::vector<Slice> placed = std::move(place(turned, segments, 1)[0]);
    for (Slice& slice : placed) slice = transpose(slice);
    return placed;
}

void divide(Pass pass, int64_t remote, int64_t own_area, int64_t remote_area, const CostModel& cost,
            std::span<int64_t> ends) {
    const int stages = static_cast<int>(ends.size());
    // Doublings from a stage to the next, in front of the peak and behind it.
    constexpr std::pair<int, int> kSeries[] = {{0, 0}, {1, 0}, {0, 1}, {2, 0}, {0, 2}, {1, 1}};
    std::vector<int64_t> weight(stages), trial(stages);
    std::vector<double> areas(1 + stages), rows(stages);
    areas[0] = static_cast<double>(own_area);
    double best = std::numeric_limits<double>::infinity();
    for (const auto& [up, down] : kSeries) {
        for (int s = 0; s < stages; ++s) {
            const int risen = up * s, falling = down * (stages - 1 - s);
            weight[s] = int64_t{1} << std::min(up > 0 && down > 0 ? std::min(risen, falling) : risen + falling, 20);
        }
        const int64_t total = std::accumulate(weight.begin(), weight.end(), int64_t{0});
        int64_t upto = 0;
        for (int s = 0; s < stages; ++s) {
            upto += weight[s];
            trial[s] = remote * upto / total;
            rows[s] = static_cast<double>(trial[s] - (s > 0 ? trial[s - 1] : 0));
            areas[1 + s] = remote > 0 ? static_cast<double>(remote_area) * rows[s] / static_cast<double>(remote) : 0;
        }
        const double time = cost.staged_time(pass, areas, rows);
        if (time < best) {
            best = time;
            std::copy(trial.begin(), trial.end(), ends.begin());
        }
    }
}

}  // namespace magi::plan
